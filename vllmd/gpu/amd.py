"""AMD's GPUs as the kernel tells of them in /sys/class/drm: the same document as NVML's, as far as sysfs goes.

There is no Xid here. What amdgpu reports of errors is its RAS counters; the kernel's own reset is in its log. A GPU is named
by its unique id where it has one, else by its place on the bus.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllmd.core.gpu_findings import canonical_pci
from vllmd.system.files import read_small

DRM = Path("/sys/class/drm")
KFD = Path("/sys/class/kfd/kfd/topology/nodes")
_AMD = "0x1002"
_CARD = re.compile("card[0-9]{1,3}")
_LIMIT = 1 << 16
_DEVICES = {"0x74a": "gfx942", "0x74b": "gfx942", "0x75a": "gfx950", "0x75b": "gfx950"}
"""Beginnings of the device ids of MI300 and MI350: for a host without /sys/class/kfd."""


def read(root: Path = DRM, kfd: Path | None = None) -> list[dict[str, Any]]:
    """[] where there is none. Blocks as long as the kernel does, so only in a child. `kfd`: default KFD, for the real root alone."""
    with contextlib.suppress(OSError):
        cards = sorted((path for path in root.iterdir() if _CARD.fullmatch(path.name)), key=lambda path: int(path.name[4:]))
        devices = [path / "device" for path in cards]
        found = [device for device in devices if _word(device / "vendor") == _AMD and _number(device / "mem_info_vram_total")]
        targets = architectures(kfd or (KFD if root == DRM else root.parent / "kfd"))
        return [_gpu(index, device, targets) for index, device in enumerate(found)]
    return []


def architectures(nodes: Path) -> dict[str, str]:
    """What the compiler calls each GPU (gfx942), by its place on the bus, as the compute driver tells it."""
    found = {}
    for path in _listed(nodes):
        words = dict(line.partition(" ")[::2] for line in _text(path / "properties").splitlines())
        version, place, domain = (int(words.get(key, "0")) if words.get(key, "0").isdecimal() else 0 for key in ("gfx_target_version", "location_id", "domain"))
        if version:
            pci = canonical_pci(f"{domain & 0xFFFF:04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.0")
            found[pci] = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    return found


def _gpu(index: int, device: Path, targets: Mapping[str, str]) -> dict[str, Any]:
    pci = canonical_pci(device.resolve().name)
    serial = _word(device / "unique_id")
    total, used = _number(device / "mem_info_vram_total"), _number(device / "mem_info_vram_used")
    gpu: dict[str, Any] = {
        "index": index,
        "uuid": f"GPU-{serial}" if re.fullmatch("[0-9a-f]{1,32}", serial) else f"GPU-pci-{pci.replace(':', '-').replace('.', '-')}",
        "pci": pci,
        "name": _word(device / "product_name") or f"AMD GPU {_word(device / 'device')}",
        "memory_total_mib": _mib(total),
        "memory_used_mib": _mib(used),
        "memory_free_mib": _mib(total - used) if total is not None and used is not None else None,
        "utilization_pct": _number(device / "gpu_busy_percent"),
        "lost": "",
        "clock_reasons": [],
        "ecc": _ras(device),
        "remapped": {},
        "nvlink": {},
        "fabric": "",
        "pcie": _bus(device),
        "compute_capability": "",
        "architecture": targets.get(pci) or _DEVICES.get(_word(device / "device")[:5], ""),
        "processes": [],
        "mig": [],
        **_sensors(device),
    }
    pages = _retired(device)
    return {key: value for key, value in {**gpu, "retired_pages": pages}.items() if value is not None}


def _mib(count: int | None) -> int | None:
    return None if count is None else count >> 20


def _sensors(device: Path) -> dict[str, Any]:
    """Of the first of its hwmon folders: the edge (or junction) temperature in degrees, the power in watts."""
    for folder in sorted(_listed(device / "hwmon")):
        degrees = _first(folder / f"temp{number}_input" for number in (1, 2, 3))
        watts = _first(folder / name for name in ("power1_average", "power1_input"))
        return {
            "temperature_c": None if degrees is None else degrees // 1000,
            "power_w": None if watts is None else watts / 1e6,
        }
    return {}


def _ras(device: Path) -> dict[str, int]:
    """Sums over the blocks of the chip: 'ue: 0\\nce: 3' in each *_err_count."""
    counts: dict[str, int] = {}
    for path in _listed(device / "ras"):
        if path.name.endswith("_err_count"):
            for kind, name in (("ce", "corrected"), ("ue", "uncorrected")):
                if said := re.search(rf"^{kind}: ([0-9]+)", _text(path), re.MULTILINE):
                    counts[name] = counts.get(name, 0) + int(said[1])
    return counts


def _retired(device: Path) -> int | None:
    """Lines of ras/gpu_vram_bad_pages that are retired (R) or about to be (P)."""
    path = device / "ras" / "gpu_vram_bad_pages"
    return len(re.findall(r": [RPF]\s*$", _text(path), re.MULTILINE)) if path.exists() else None


def _bus(device: Path) -> dict[str, int]:
    widths = {"width": _number(device / "current_link_width"), "max_width": _number(device / "max_link_width")}
    return {key: value for key, value in widths.items() if value}


def _listed(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []


def _first(paths: Iterator[Path]) -> int | None:
    return next((value for path in paths if (value := _number(path)) is not None), None)


def _number(path: Path) -> int | None:
    word = _word(path)
    return int(word) if re.fullmatch("[0-9]{1,18}", word) else None


def _word(path: Path) -> str:
    text = _text(path).strip()
    return text[:128] if text.isprintable() else ""


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return read_small(path, _LIMIT).decode(errors="replace")
    return ""
