"""The driver library as a stub in C (nvml_stub.c), built once, and its world, which tests change while it is in use.

`environ()` is what a process needs to find it; the real binding (pynvml) stands above it. It is built where the source's sum
says, so that another source is another library.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.needs import need

_SOURCE = Path(__file__).with_name("nvml_stub.c")
_FULL = {
    "pci": "00000000:{bus:02X}:00.0", "name": "NVIDIA H100 80GB HBM3", "memory": "81559 80000 500", "temperature": "41", "power": "71000",
    "clocks": "0", "utilization": "3", "pstate": "0", "capability": "9 0", "ecc": "0 0", "remapped": "0 0 0 0", "field 230": "0", "field 38": "0",
    "fabric": "3 0", "pcie": "5 16 5 16",
}  # fmt: skip


def library() -> Path:
    """The directory with libnvidia-ml.so.1."""
    compiler = shutil.which("cc", path="/usr/local/bin:/usr/bin:/bin")
    need(compiler is not None, "a C compiler")
    home = Path(os.environ.get("VLLMD_DEV_CACHE") or Path.home() / ".cache/vllmd-dev")
    folder = home / "nvml-stub" / hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    built = folder / "libnvidia-ml.so.1"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several test runs may build it at once
            fresh = Path(scratch, "built")
            subprocess.run(
                [str(compiler), "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-stringop-truncation", "-shared", "-fPIC", "-pthread", "-o", str(fresh), str(_SOURCE)],
                env={"PATH": "/usr/local/bin:/usr/bin:/bin"}, check=True,
            )  # fmt: skip
            fresh.rename(built)
    return folder


class Stub:
    """A host's GPUs. Everything that changes takes effect at the next call into the driver."""

    def __init__(self, folder: Path, gpus: int = 1) -> None:
        self.path = folder / "nvml-stub.state"
        self.words: dict[str, str] = {"driver": "570.86.15"}
        self.extra: list[str] = []
        self.gpus: list[dict[str, str]] = []
        self.lists: list[list[str]] = []
        self._events = 0
        for index in range(gpus):
            self.add(uuid(index))
        self.write()

    def add(self, name: str) -> None:
        bus = 0x10 + len(self.gpus)
        self.gpus.append({"uuid": name, **{key: value.format(bus=bus) for key, value in _FULL.items()}})
        self.lists.append([])

    def environ(self) -> dict[str, str]:
        return {"LD_LIBRARY_PATH": str(library()), "NVML_STUB_STATE": str(self.path)}

    def set(self, **words: object) -> None:
        """Of the whole host, as init=9 or hang='nvmlDeviceGetTemperature'; None takes one away."""
        for key, value in words.items():
            self.words.pop(key, None)
            if value is not None:
                self.words[key] = str(value)
        self.write()

    def gpu(self, index: int = 0, **words: object) -> None:
        """Of one GPU, as memory='81559 100 0', fails=15 or field_230=1; None takes one away."""
        for name, value in words.items():
            key = name.replace("_", " ")
            self.gpus[index].pop(key, None)
            if value is not None:
                self.gpus[index][key] = str(value)
        self.write()

    def processes(self, index: int, *of: tuple[int, int]) -> None:
        """(pid, MiB) of each that has memory of that GPU."""
        self.lists[index] = [line for line in self.lists[index] if not line.startswith("process")]
        self.lists[index] += [f"process {pid} {mib}" for pid, mib in of]
        self.write()

    def slices(self, index: int, *of: tuple[str, int, int]) -> None:
        """(UUID, total, free) of each MIG device."""
        self.lists[index] = [line for line in self.lists[index] if not line.startswith("mig")]
        self.lists[index] += [f"mig {name} {total} {free}" for name, total, free in of]
        self.write()

    def event(self, xid: int, index: int = 0) -> None:
        """An NVML event, given once to whoever waits."""
        self._events += 1
        self.extra.append(f"event {self._events} {index} {xid}")
        self.write()

    def write(self) -> None:
        lines = [f"{key} {value}" for key, value in self.words.items()] + self.extra
        for index, (gpu, lists) in enumerate(zip(self.gpus, self.lists, strict=True)):
            lines += [f"gpu {index} {key} {value}" for key, value in gpu.items()] + [f"gpu {index} {line}" for line in lists]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n")
        fresh.replace(self.path)


def uuid(index: int) -> str:
    return f"GPU-{index:08x}-1111-2222-3333-444455556666"


def pci(index: int) -> str:
    """As the kernel's log names it."""
    return f"0000:{0x10 + index:02x}:00"
