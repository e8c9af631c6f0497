"""configuration -> plan, with the engine. The stages after it live in preflight, models and engines; the daemon runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vllmd.config.given import BUILT_IN
from vllmd.config.layers import Loaded
from vllmd.config.settings import Config
from vllmd.configured import Prepared, model_request
from vllmd.core.plan import MODEL_PLACEHOLDER, Deadlines, Installed, Plan
from vllmd.engines.protocol import GUARD_FILE, Access, Context, SettingRefused
from vllmd.errors import ConfigError


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
