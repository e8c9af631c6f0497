"""A download in a process of its own, to be killed or measured: LISTING (as JSON) on stdin, then STORE URL CONNECTIONS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.component.downloads import ORIGIN, Plain
from vllmd.models.download import Limits, download
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.stage import Stage
from vllmd.models.transfer import work, worker


def main(store: str, url: str, connections: str) -> None:
    work.MIN_PART_BYTES = 4 << 20
    worker.NOTE_BYTES = 1 << 20
    files = tuple(RemoteFile(name, size, f"pin-{name}", sums) for name, size, sums in json.load(sys.stdin))
    listing = Listing(files, ORIGIN)
    stage = Stage.open(Path(store), "tiny", listing)
    download(listing, Plain(url), stage, Limits(int(connections), 20.0), {}, lambda progress: None, lambda line: None)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main(*sys.argv[1:])
