"""Was the engine built for these GPUs and this driver? Said before a start that would fail after a minute."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vllmd.preflight.report import Gpu

_OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""The oldest driver branch that runs programs of a CUDA major version (CUDA's table of minor version compatibility)."""
_ARCH = re.compile(r"(sm_|compute_)?(\d+?)\.?(\d)([af]?)(\+ptx)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Misfit:
    """`is_certain`: the engine cannot run; else it may (CUDA's forward compatibility packages)."""

    what: str
    hint: str
    is_certain: bool


def misfits(cuda: str, archs: Iterable[str], gpus: Iterable[Gpu], cuda_driver: int = 0) -> list[Misfit]:
    """What keeps an engine of this CUDA version ('13.0'; '' unknown or a CPU build) and these architectures ('9.0',
    'sm_90', '12.0+PTX'; none: unknown) from these GPUs. `cuda_driver` is what the driver supports, as 13000; 0 unknown."""
    gpus = list(gpus)
    found = _driver_misfit(cuda, gpus, cuda_driver)
    known = [match for arch in archs if (match := _ARCH.fullmatch(arch.strip()))]
    for gpu in gpus if known else ():
        capability = _numbers(gpu.compute_capability)
        if len(capability) == 2 and not any(_runs_on(match, capability) for match in known):
            what = f"the engine was not built for GPU {gpu.index} {gpu.name} (compute capability {gpu.compute_capability})"
            found.append(Misfit(what, "`vllmctl engine list` says which installed engine fits; else install one whose torch was built for it: `vllmctl engine install --cuda --index-url ...`.", is_certain=True))
    return found


def _driver_misfit(cuda: str, gpus: list[Gpu], cuda_driver: int) -> list[Misfit]:
    major = next(iter(_numbers(cuda)), 0)
    version = next((gpu.driver_version for gpu in gpus if gpu.driver_version), "")
    oldest = _OLDEST_DRIVER.get(major)
    if not major or not oldest:
        return []
    too_old = cuda_driver // 1000 < major if cuda_driver else bool(version) and _numbers(version)[:2] < oldest
    if not too_old:
        return []
    needed = ".".join(map(str, oldest))
    what = f"the engine was built for CUDA {cuda}, and the driver {version or 'here'} is older than it needs"
    return [Misfit(what, f"Install driver {needed} or newer, or an engine built for an older CUDA.", is_certain=False)]


def _runs_on(arch: re.Match[str], capability: tuple[int, ...]) -> bool:
    """Machine code runs on the same major version from its minor on, 'a' on its own only; PTX on anything newer."""
    kind, major, minor, suffix, ptx = arch.groups()
    built = (int(major), int(minor))
    if suffix.lower() == "a":
        return built == capability
    if (ptx or kind == "compute_") and built <= capability:
        return True
    return kind != "compute_" and built[0] == capability[0] and built[1] <= capability[1]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
