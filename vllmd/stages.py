"""config -> plan: what every command does first. The stages after it live in preflight, models and engines; the daemon runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.config import layers, show
from vllmd.config.given import BUILT_IN
from vllmd.config.layers import Loaded
from vllmd.config.paths import Paths
from vllmd.config.settings import Config
from vllmd.core.plan import MODEL_PLACEHOLDER, Deadlines, Installed, ModelRequest, Plan
from vllmd.engines import registry
from vllmd.engines.protocol import GUARD_FILE, Access, Context, Engine, SettingRefused
from vllmd.errors import ConfigError
from vllmd.models.identity import request_from
from vllmd.system import credentials


@dataclass(frozen=True, slots=True)
class Prepared:
    """An instance's configuration, parsed, with the engine that it names. `overrides`: what --set gave, for a reload."""

    instance: str
    paths: Paths
    environ: Mapping[str, str]
    overrides: Mapping[str, object]
    loaded: Loaded
    engine: Engine

    @property
    def config(self) -> Config:
        return self.loaded.config

    def secrets(self, config: Config | None = None) -> tuple[str, ...]:
        """Everything that nothing may print: of this configuration, of systemd's credentials, of the environment."""
        return tuple(dict.fromkeys((*show.secrets(config or self.config), *credentials.secrets(self.environ))))


def prepare(
    instance: str, paths: Paths, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Prepared:
    """Reads and checks the layers. ConfigError names the file, line and key."""
    engines: dict[str, Engine] = {}

    def tuning_for(name: str) -> type[Any]:
        engines[name] = registry.get(name)
        return engines[name].tuning

    given = overrides or {}
    loaded = layers.load(paths, instance, environ, given, tuning_for)
    _keep_ports_apart(loaded)
    return Prepared(instance, paths, environ, given, loaded, engines[loaded.config.engine.name])


def model_request(config: Config, paths: Paths) -> ModelRequest:
    return request_from(config.model, paths.models)


def context(prepared: Prepared, internal_key: str = "", client_keys: tuple[str, ...] = ()) -> Context:
    """The installed engine, looked up (nothing is run). ConfigError when there is none."""
    guard_file = prepared.paths.instance_runtime(prepared.instance) / GUARD_FILE if prepared.config.serve.auth == "key" else ""
    with _placed(prepared.loaded):
        installed: Installed = prepared.engine.installed(prepared.config, prepared.paths, prepared.environ)
    access = Access(str(guard_file), internal_key, client_keys)
    return Context(prepared.config, prepared.paths, prepared.instance, installed, prepared.environ, access)


def deadlines(config: Config) -> Deadlines:
    return Deadlines(
        stall_s=config.start.stall_timeout_s,
        start_s=config.start.start_timeout_s,
        shutdown_s=config.stop.shutdown_timeout_s,
        start_grace_s=config.stop.start_grace_s,
        kill_s=config.stop.kill_timeout_s,
        proof_s=config.start.proof_timeout_s,
        gpu_release_s=0.0 if config.gpus == "none" else config.stop.gpu_release_timeout_s,
    )


def plan(prepared: Prepared, where: Context) -> Plan:
    """Everything decided; the engine's own checks included. ConfigError on what cannot work."""
    config, engine = prepared.config, prepared.engine
    with _placed(prepared.loaded):
        warnings = engine.check(where)
    request = model_request(config, prepared.paths)
    return Plan(
        instance=prepared.instance,
        engine=engine.name,
        installed=where.installed,
        model=request,
        served_name=config.serve.served_model_name or request.name,
        task=config.serve.task,
        endpoints=engine.endpoints(where),
        command=engine.command(where, MODEL_PLACEHOLDER),
        deadlines=deadlines(config),
        gpus=config.gpus,
        warnings=(*prepared.loaded.warnings, *warnings),
    )


def _keep_ports_apart(loaded: Loaded) -> None:
    """The metrics are served before the checks of the start: those would find the port taken, by ourselves."""
    serve, listen = loaded.config.serve, loaded.config.metrics.listen
    if serve.listen == "tcp" and not listen.startswith("/") and listen.endswith(f":{serve.port}"):
        where = f"{loaded.origins['metrics.listen']} and {loaded.origins['serve.port']}"
        raise ConfigError("metrics_port_taken", f"{where}: metrics.listen and serve.port both have port {serve.port}", "Give metrics.listen another port.")


@contextlib.contextmanager
def _placed(loaded: Loaded) -> Iterator[None]:
    """An engine knows which key it refuses; the file and line of it are known here."""
    try:
        yield
    except SettingRefused as error:
        origin = loaded.origins.get(error.key, BUILT_IN)
        if origin == BUILT_IN:
            raise
        raise ConfigError(error.code, f"{origin}: {error.what}", error.hint) from None
