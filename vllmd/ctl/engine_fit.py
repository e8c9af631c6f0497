"""Does an engine fit this host's hardware? Said before it is installed, chosen or started, with the one that does fit."""

from __future__ import annotations

from functools import cache

from vllmd.config.paths import Paths
from vllmd.engines import choice
from vllmd.engines.record import Record
from vllmd.errors import ConfigError
from vllmd.preflight import gpu, variant
from vllmd.preflight.fit import Misfit, misfits
from vllmd.system.hardware import of_this_host

_DRIVER_S = 20.0


def best() -> str:
    """The variant to install where nobody says. ConfigError where none fits."""
    found = variant.suitable(of_this_host())
    if not found:
        raise ConfigError("engine_unfit", "no build of vLLM fits this machine: it has no GPU, and a processor without AVX2", "--cpu --anyway installs one all the same")
    return found


def refuse_variant(name: str) -> None:
    """Before anything is downloaded. ConfigError."""
    found = variant.unfit(name, of_this_host())
    if found is not None:
        raise _error(found.what, found.hint)


def refuse(known: Record, paths: Paths) -> None:
    """ConfigError where the engine cannot run on this hardware; it names one that is installed and can, if there is any."""
    found = next(iter(of(known)), None)
    if found is None:
        return
    others = [name for name, other in choice.installed_engines(paths.engines) if other != known and not of(other)]
    raise _error(found.what, f"`vllmctl engine use {others[0]}`: that one fits" if others else found.hint)


def _error(what: str, hint: str) -> ConfigError:
    return ConfigError("engine_unfit", what, f"{hint}; --anyway insists (for a machine that is set up for another)")


def of(known: Record) -> list[Misfit]:
    """What speaks against the engine on this host."""
    found = variant.unfit(known.variant, of_this_host())
    if found is not None:
        return [found]
    if not known.cuda or not of_this_host().nvidia_driver:
        return []
    seen = _driver()
    return misfits(known.cuda, known.archs, seen.gpus, seen.cuda_driver)


@cache
def _driver() -> gpu.Findings:
    """What the driver says of the GPUs, asked once. One that does not answer speaks against no engine."""
    return gpu.read(_DRIVER_S)
