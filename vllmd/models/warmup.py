"""Whether a start reads the whole model while the engine imports: that fills the page cache, and verifies every byte.

It must never cost a sound start anything. So by itself it is not done over a network, where the engine would wait for the same
bytes behind us, nor with a model that would push itself out of memory again before the engine comes to read it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vllmd.models.amounts import size

NETWORK: Mapping[int, str] = MappingProxyType(
    {
        0x6969: "NFS",
        0x517B: "SMB",
        0xFF534D42: "CIFS",
        0xFE534D42: "SMB",
        0x00C36400: "Ceph",
        0x65735546: "FUSE",
        0x0BD00BD0: "Lustre",
        0x47504653: "GPFS",
        0x19830326: "BeeGFS",
        0x20030528: "OrangeFS",
        0xAAD7AAEA: "PanFS",
        0x01161970: "GFS2",
        0x7461636F: "OCFS2",
        0x01021997: "9p",
        0x5346414F: "AFS",
        0x6B414653: "AFS",
    }
)
"""statfs(2)'s f_type of file systems whose bytes come from elsewhere, or may."""

SHARE = 0.9
"""Of the free memory: the engine needs some too."""
POLITE_S = 20.0
"""So long an engine imports at the least, on a calm machine, before it opens the weights."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`reads` every byte or only what must be; `drops` behind it what was read; `why` not, for people ('' where nothing needs to
    be said)."""

    reads: bool
    drops: bool = False
    why: str = ""


def decide(mode: str, network: str, model_bytes: int, free_bytes: int, *, must: bool) -> Decision:
    """`mode` is auto, on or off; `network` the file system's name or ''; `must`: every byte is to be verified in any case."""
    fits = model_bytes <= free_bytes * SHARE
    if must or mode == "on":
        return Decision(reads=True, drops=not fits)
    if mode == "off":
        return Decision(reads=False, drops=not fits)
    anyway = "; model.warm_up: on does it all the same"
    if network:
        return Decision(reads=False, drops=not fits, why=f"its bytes are not read ahead and not verified, as it lies on {network}{anyway}")
    if not fits:
        what = f"its {size(model_bytes)} are not read ahead and not verified, as {size(free_bytes)} of memory are free{anyway}"
        return Decision(reads=False, drops=True, why=what)
    return Decision(reads=True)


def network_of(directory: Path) -> str:
    """The name of the network file system on which it lies, '' on one of this host. OSError."""
    buffer = ctypes.create_string_buffer(512)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(directory), buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(directory))
    return NETWORK.get(ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF, "")


def free_bytes(root: Path = Path("/")) -> int:
    """What can still come into the page cache: of the machine's memory, and of what our control groups may have."""
    fields = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines() if ":" in line)
    machine = _number(fields.get("MemAvailable", "").removesuffix("kB")) << 10
    return min([machine, *_rooms(root)])


def _rooms(root: Path) -> Iterable[int]:
    """Of our control group (v2) and of each one above it that has a limit."""
    own = next((line[3:] for line in _text(root / "proc/self/cgroup").splitlines() if line.startswith("0::/")), "")
    base = root / "sys/fs/cgroup"
    group = base / own.lstrip("/")
    while own and group != base:
        limits = [_number(text) for name in ("memory.max", "memory.high") if (text := _text(group / name).strip()).isdecimal()]
        if limits:
            yield max(min(limits) - _number(_text(group / "memory.current")) + _cached(group), 0)
        group = group.parent


def _cached(group: Path) -> int:
    """Counted as used, but given up when it is needed."""
    fields = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    return _number(fields.get("inactive_file", "")) + _number(fields.get("active_file", ""))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0
