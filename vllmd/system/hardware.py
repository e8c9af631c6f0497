"""What this machine computes with, read from /sys and /proc alone: no driver is asked, so nothing here can block.

Good enough to tell which build of an engine can run, and to keep apart what was compiled for different hardware. What a
GPU can do (compute capability, memory, health) is the driver's to say: gpu/probe asks it, in a child.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllmd.system.files import read_small

_VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}
_COMPUTING = ("0x0300", "0x0302", "0x0380", "0x1200")
"""PCI classes: VGA, 3D, other display, processing accelerator (AMD's MI300). The others of a card are sound, bridges, USB."""
_LIMIT_BYTES = 1 << 20
_CODE = re.compile(r"avx|fma|f16c|bmi|amx|sse4|sve|asimd|bf16|i8mm|neon")
"""Instructions that compilers choose from. Other flags come and go with the kernel's version."""


@dataclass(frozen=True, slots=True)
class PciGpu:
    """`vendor` is nvidia or amd, `device` the PCI device id in hex: all GPUs of one model have the same."""

    vendor: str
    device: str


@dataclass(frozen=True, slots=True)
class Hardware:
    """`cpu_flags` is empty where the kernel does not tell; a driver is '' where none is loaded."""

    machine: str
    cpu_flags: frozenset[str] = frozenset()
    gpus: tuple[PciGpu, ...] = ()
    nvidia_driver: str = ""
    amd_driver: str = ""

    @property
    def code_flags(self) -> tuple[str, ...]:
        return tuple(sorted(flag for flag in self.cpu_flags if _CODE.match(flag)))

    def has(self, vendor: str) -> bool:
        """Whether engines can compute on GPUs of this vendor: a driver is loaded, or (its device may appear later) a card is there."""
        driver = self.nvidia_driver if vendor == "nvidia" else self.amd_driver
        return bool(driver) or any(gpu.vendor == vendor for gpu in self.gpus)


@cache
def of_this_host() -> Hardware:
    return look()


def look(sys: Path = Path("/sys"), proc: Path = Path("/proc"), machine: str = "") -> Hardware:
    return Hardware(
        machine or os.uname().machine,
        _cpu_flags(proc),
        tuple(sorted(_gpus(sys), key=lambda gpu: (gpu.vendor, gpu.device))),
        _nvidia_driver(sys, proc),
        _amd_driver(sys),
    )


def _text(path: Path) -> str:
    try:
        return read_small(path, _LIMIT_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _cpu_flags(proc: Path) -> frozenset[str]:
    try:
        with (proc / "cpuinfo").open(encoding="ascii", errors="replace") as lines:
            for line in lines:  # the first processor's; its rest is megabytes on a large host
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def _gpus(sys: Path) -> Iterator[PciGpu]:
    for device in sys.glob("bus/pci/devices/*"):
        vendor = _VENDORS.get(_text(device / "vendor"))
        if vendor and _text(device / "class").startswith(_COMPUTING):
            yield PciGpu(vendor, _text(device / "device").removeprefix("0x"))


def _nvidia_driver(sys: Path, proc: Path) -> str:
    """The module's own version; in a container that has no /sys of the module, the text that the driver keeps."""
    found = _text(sys / "module/nvidia/version")
    if found:
        return found
    said = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", _text(proc / "driver/nvidia/version"))
    return said.group(1) if said else ""


def _amd_driver(sys: Path) -> str:
    """The module's version, which only AMD's own packages have; the kernel's stands for the one in the tree."""
    if not (sys / "module/amdgpu").is_dir():
        return ""
    return _text(sys / "module/amdgpu/version") or os.uname().release
