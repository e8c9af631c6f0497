"""Engines by name: ours, those that other packages announce as entry points in the group `vllmd.engines`, and those
registered by hand. An engine is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from vllmd.errors import ConfigError

if TYPE_CHECKING:
    from vllmd.engines.protocol import Engine

GROUP = "vllmd.engines"


def _vllm() -> Engine:
    from vllmd.engines.vllm import Vllm  # only the chosen engine is imported

    return Vllm()


_factories: dict[str, Callable[[], Engine]] = {"vllm": _vllm}


def register(name: str, factory: Callable[[], Engine]) -> None:
    """Adds an engine, or replaces the one of that name."""
    _factories[name] = factory
    _made.cache_clear()


def get(name: str) -> Engine:
    """ConfigError where there is no engine of that name, or where it does not load."""
    return _made(name)


def tuning(name: str) -> type[Any]:
    """The settings of an engine of that name (engines/protocol). Ours tells them without being loaded. ConfigError as `get`."""
    if _factories.get(name) is _vllm:
        from vllmd.engines.vllm_tuning import Tuning

        return Tuning
    return get(name).tuning


def names() -> list[str]:
    return sorted({*_factories, *_announced()})


@cache
def _made(name: str) -> Engine:
    factory = _factories.get(name) or _announced().get(name)
    if factory is None:
        import difflib  # needed for errors only

        close = difflib.get_close_matches(name, names(), n=1)
        raise ConfigError(
            "engine_unknown",
            f"engine.name: there is no engine {name!r}",
            f"did you mean {close[0]}?" if close else f"known are {', '.join(names())}",
        )
    return factory()


def _announced() -> dict[str, Callable[[], Engine]]:
    from importlib import metadata  # 10 ms, and not needed for the engines above

    return {point.name: _loader(point) for point in metadata.entry_points(group=GROUP)}


def _loader(point: object) -> Callable[[], Engine]:
    def load() -> Engine:
        try:
            factory: Callable[[], Engine] = point.load()  # type: ignore[attr-defined]
        except Exception as error:
            raise ConfigError(
                "engine_broken", f"engine.name: the plug-in {point} does not load: {error}", "reinstall or remove it"
            ) from error
        return factory()

    return load
