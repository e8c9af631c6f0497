"""An instance's configuration, read and checked: what every command does first. No engine is loaded for it; some commands need none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllmd.config import layers
from vllmd.config.layers import Loaded
from vllmd.config.paths import Paths
from vllmd.config.settings import Config
from vllmd.core.model import ModelRequest
from vllmd.engines import registry
from vllmd.errors import ConfigError
from vllmd.models.identity import request_from

if TYPE_CHECKING:
    from vllmd.engines.protocol import Engine


@dataclass(frozen=True, slots=True)
class Prepared:
    """An instance's configuration, parsed. `overrides`: what --set gave, for a reload."""

    instance: str
    paths: Paths
    environ: Mapping[str, str]
    overrides: Mapping[str, object]
    loaded: Loaded

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def engine(self) -> Engine:
        """The one that it names; loaded now, if it was not before. ConfigError where it does not load."""
        return registry.get(self.config.engine.name)

    def secrets(self, config: Config | None = None) -> tuple[str, ...]:
        """Everything that nothing may print: of this configuration, of systemd's credentials, of the environment."""
        from vllmd.config import show
        from vllmd.system import credentials

        return tuple(dict.fromkeys((*show.secrets(config or self.config), *credentials.secrets(self.environ))))


def prepare(
    instance: str, paths: Paths, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Prepared:
    """Reads and checks the layers. ConfigError names the file, line and key."""
    given = overrides or {}
    loaded = layers.load(paths, instance, environ, given, registry.tuning)
    _keep_ports_apart(loaded)
    return Prepared(instance, paths, environ, given, loaded)


def model_request(config: Config, paths: Paths) -> ModelRequest:
    return request_from(config.model, paths.models)


def _keep_ports_apart(loaded: Loaded) -> None:
    """The metrics are served before the checks of the start: those would find the port taken, by ourselves."""
    serve, listen = loaded.config.serve, loaded.config.metrics.listen
    if serve.listen == "tcp" and not listen.startswith("/") and listen.endswith(f":{serve.port}"):
        where = f"{loaded.origins['metrics.listen']} and {loaded.origins['serve.port']}"
        raise ConfigError("metrics_port_taken", f"{where}: metrics.listen and serve.port both have port {serve.port}", "Give metrics.listen another port.")
