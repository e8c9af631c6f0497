"""Which build of an engine this machine can run, from what /sys and /proc tell. Pure: the looking is system/hardware's."""

from __future__ import annotations

from vllmd.preflight.fit import Misfit
from vllmd.system.hardware import Hardware

VARIANTS = ("cuda", "rocm", "cpu")
_VENDOR = {"cuda": "nvidia", "rocm": "amd"}
_NAMES = {"cuda": "NVIDIA", "rocm": "AMD"}
_X86 = ("x86_64", "amd64")


def suitable(hardware: Hardware) -> str:
    """The build that fits best; '' where none does."""
    return next((variant for variant in VARIANTS if unfit(variant, hardware) is None), "")


def reason(variant: str, hardware: Hardware) -> str:
    """Why that one, for people."""
    if variant == "cpu":
        return "there is no GPU that engines can compute on"
    return f"there is {'a driver' if _driver(variant, hardware) else 'a GPU'} of {_NAMES[variant]}"


def _driver(variant: str, hardware: Hardware) -> str:
    return hardware.amd_driver if variant == "rocm" else hardware.nvidia_driver


def unfit(variant: str, hardware: Hardware) -> Misfit | None:
    """What keeps this build from this machine; None where nothing is known to."""
    if variant == "cpu":
        return _unfit_processor(hardware)
    if variant not in _VENDOR or hardware.has(_VENDOR[variant]):
        return None
    what = f"the {variant} build needs a GPU of {_NAMES[variant]}, and this host has neither one nor its driver"
    return Misfit(what, _instead(variant, hardware), is_certain=True)


def _unfit_processor(hardware: Hardware) -> Misfit | None:
    """vLLM brings its CPU kernels compiled for AVX2 and for AVX-512; on less it ends with SIGILL, or without a word."""
    if hardware.machine not in _X86 or not hardware.cpu_flags or "avx2" in hardware.cpu_flags:
        return None
    return Misfit("the cpu build needs a processor with AVX2, and this one has none", _instead("cpu", hardware), is_certain=True)


def _instead(variant: str, hardware: Hardware) -> str:
    other = next((each for each in VARIANTS if each != variant and _fits(each, hardware)), "")
    return f"the build that fits is `vllmctl engine install --{other}`" if other else "no build of vLLM fits this machine"


def _fits(variant: str, hardware: Hardware) -> bool:
    if variant == "cpu":
        return _unfit_processor(hardware) is None
    return hardware.has(_VENDOR[variant])
