"""The engine of the benchmark of cold starts: imports (sleeps $BENCH_IMPORT_S), then reads all weights in turn through a mapping,
as engines do, and goes on as the stub $BENCH_STUB. Standard library only.

Files in $BENCH_STAMPS, each a monotonic time: `opened`, before the first weight is read; `loaded`, after the last.
"""

import mmap
import os
import sys
import time
from pathlib import Path

PIECE_BYTES = 1 << 20


def stamp(name: str) -> None:
    path = Path(os.environ["BENCH_STAMPS"], name)
    path.with_suffix(".new").write_text(repr(time.monotonic()))
    path.with_suffix(".new").rename(path)


def load(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for offset in range(0, len(mapped), PIECE_BYTES):
            mapped[offset : offset + PIECE_BYTES]


def main(argv: list[str]) -> None:
    time.sleep(float(os.environ["BENCH_IMPORT_S"]))
    stamp("opened")
    for path in sorted(Path(argv[argv.index("serve") + 1]).glob("*.safetensors")):
        load(path)
    stamp("loaded")
    os.execv(sys.executable, [sys.executable, "-IS", os.environ["BENCH_STUB"], *argv[1:]])


if __name__ == "__main__":
    main(sys.argv)
