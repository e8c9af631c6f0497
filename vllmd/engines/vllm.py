"""vLLM behind the engine protocol: with its neighbours vllm_*.py the only place that knows its flags, logs and habits."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllmd.config.paths import Paths
from vllmd.config.settings import Config
from vllmd.core.plan import Command, Endpoint, Installed
from vllmd.engines import (
    caches,
    choice,
    environment,
    record,
    vllm_check,
    vllm_config_file,
    vllm_flags,
    vllm_guard,
    vllm_host,
    vllm_logs,
    vllm_proof,
    vllm_task,
    vllm_tokenizer,
    vllm_toolkit,
    vllm_tuning,
    vllm_weights,
)
from vllmd.engines.protocol import Context, LogFact, ProofRequest, Reading, SettingRefused
from vllmd.errors import ConfigError, PermissionMissing

if TYPE_CHECKING:
    from vllmd.core.faults import Signs
    from vllmd.core.sizing import Wanted

_DEFAULT_MEMORY_FRACTION = 0.92
"""vLLM's own --gpu-memory-utilization (0.32; it was 0.9 before)."""


class Vllm:
    name = "vllm"
    tuning = vllm_tuning.Tuning
    health_path = "/health"
    phases: Sequence[str] = vllm_logs.PHASES
    artifact = "huggingface"
    heartbeat_path = "/metrics"
    heartbeat_limit_bytes = 16 << 20
    """A vLLM with 16 ranks answers about 2 MB."""
    excuses: Sequence[str] = ("/is_paused", "/is_sleeping")
    """In dev mode only. Whoever trains with it pauses it for as long as new weights take, with requests in flight; the scheduler answers."""

    # What only the watch needs is imported when it asks: a command that looks up a model should not wait for it.

    @property
    def signs(self) -> Signs:
        from vllmd.engines.vllm_faults import SIGNS

        return SIGNS

    def installed(self, config: Config, paths: Paths, environ: Mapping[str, str]) -> Installed:
        return _found(config, paths, environ)

    def check(self, context: Context) -> list[str]:
        vllm_host.refuse_unfit(context)
        return vllm_check.check(context)

    def endpoints(self, context: Context) -> tuple[Endpoint, ...]:
        serve = context.config.serve
        if serve.listen == "uds":
            return (Endpoint("uds", path=vllm_check.socket_path(context)),)
        return (Endpoint("tcp", host=serve.host, port=serve.port),)

    def command(self, context: Context, model: str) -> Command:
        keys = vllm_guard.told(context)
        config_path, private = _config_file(context, keys)
        argv = (
            context.installed.executable,
            "serve",
            model,
            *_always(context, config_path),
            *tuned(context),
            *_chosen(context),
        )
        secrets = dict.fromkeys((*keys, *vllm_guard.all_keys(context), *_secret_values(context)))
        return Command(argv, _environment(context), private, tuple(secrets))

    def prepare(self, context: Context, directory: Path) -> tuple[Path, str]:
        vllm_weights.check(directory, context.installed.executable, context.installed.version)
        said = caches.begin(context)
        served, more = vllm_tokenizer.prepare(directory, context.installed.executable, context.paths.cache)
        return served, "; ".join(filter(None, (said, more)))

    def task(self, context: Context, model: Path) -> str:
        arguments = vllm_check.arguments(context)
        if arguments.get("headless") not in (None, False):
            return "joined"
        wanted = context.config.serve.task
        return vllm_task.task_of(model, arguments) if wanted == "auto" else wanted

    def proofs(self, context: Context, task: str) -> tuple[ProofRequest, ...]:
        return vllm_proof.proofs(task, served_name(context.config), self.headers(context))

    def guards(self, context: Context) -> bool:
        return vllm_guard.is_guarded(context)

    def headers(self, context: Context) -> Mapping[str, str]:
        return vllm_guard.headers(context)

    def example(self, context: Context, model: Path) -> tuple[str, Any] | None:
        return vllm_proof.example(
            self.task(context, model), served_name(context.config), chats=vllm_task.has_chat_template(model)
        )

    def memory_fraction(self, context: Context) -> float:
        said = context.config.tuning.gpu_memory_utilization or vllm_check.arguments(context).get(
            "gpu-memory-utilization"
        )
        try:
            return float(said) if said else _DEFAULT_MEMORY_FRACTION
        except (TypeError, ValueError):
            return _DEFAULT_MEMORY_FRACTION

    def devices(self, context: Context) -> int | None:
        return vllm_check.devices(context)

    def sizing(self, context: Context) -> Wanted:
        from vllmd.engines.vllm_sizing import wanted

        return wanted(context, self.memory_fraction(context))

    def compile_caches(self, context: Context) -> tuple[Path, ...]:
        return caches.compiled(caches.place(context))

    def holds(self, context: Context) -> tuple[Path, ...]:
        directory = Path(context.installed.executable).parent.parent
        return (*((directory,) if context.installed.name else ()), caches.place(context))

    def read_line(self, line: str) -> LogFact:
        return vllm_logs.read_line(line)

    def heartbeat(self) -> Reading:
        from vllmd.engines.vllm_heartbeat import Reading

        return Reading()

    def addressed(self, request: ProofRequest, rank: str) -> ProofRequest:
        from vllmd.engines.vllm_heartbeat import addressed

        return addressed(request, rank)


def served_name(config: Config) -> str:
    """The name that clients use: the configured one, else the model's own."""
    model = config.model
    return (
        config.serve.served_model_name
        or model.name
        or model.id.rpartition("/")[2]
        or model.path.rstrip("/").rpartition("/")[2]
    )


def _is_program(path: Path) -> bool:
    """PermissionMissing where this user may not even look: an engine that is there is not to be reported as missing."""
    try:
        return stat.S_ISREG(path.stat().st_mode) and os.access(path, os.X_OK)
    except PermissionError as error:
        hint = "let this user read and execute the engine: chmod -R a+rX, from the engines directory down"
        raise PermissionMissing("engine_not_permitted", f"{path}: {error.strerror}", hint) from None
    except OSError:
        return False


def _found(config: Config, paths: Paths, environ: Mapping[str, str]) -> Installed:
    """engine.executable or engine.version, else the engine that `vllmctl engine` chose, else vllm on PATH."""
    engine = config.engine
    if engine.executable and engine.version:
        reason = f"engine.executable is set too ({engine.executable})"
        raise SettingRefused("engine_twice", "engine.version", reason, "remove one of them")
    if engine.executable:
        return record.describe(_given(Path(engine.executable)), "engine.executable")
    if engine.version:
        return record.describe(_pinned(engine.version, paths), "engine.version")
    current = paths.engines / record.CURRENT / "bin/vllm"
    if _is_program(current):
        return record.describe(current, "current")
    found = shutil.which("vllm", path=environ.get("PATH", ""))
    if found is None:
        raise ConfigError(
            "engine_missing", f"no vLLM: neither in {paths.engines} nor on PATH", "run `vllmctl engine install`"
        )
    return record.describe(Path(found), "PATH")


def _given(program: Path) -> Path:
    if _is_program(program):
        return program
    reason = f"there is no program {program}" if not program.is_file() else f"{program} is not executable"
    hint = "correct it, or remove it and run `vllmctl engine install`"
    raise SettingRefused("engine_missing", "engine.executable", reason, hint)


def _pinned(version: str, paths: Paths) -> Path:
    try:
        name = choice.pinned(paths.engines, version)
    except ConfigError as error:
        raise SettingRefused(error.code, "engine.version", error.what, error.hint) from None
    program = paths.engines / name / "bin/vllm"
    if not _is_program(program):
        raise SettingRefused("engine_missing", "engine.version", f"{program} is no program", f"`vllmctl engine verify {name}` says what is missing")
    return program


def _config_file(context: Context, keys: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Path for --config ('' for none), and the private file to write there where the user's own does not do as it is."""
    path = context.config.engine.config_file
    entries: Mapping[str, Any] = vllm_config_file.read(path)[0] if path else {}
    kept = vllm_config_file.without_owned(entries, context.installed)
    if not keys and len(kept) == len(entries) and path.endswith((".yaml", ".yml", "")):
        return path, {}
    private = str(context.paths.instance_runtime(context.instance) / vllm_config_file.PRIVATE_NAME)
    return private, {private: vllm_config_file.text(kept, keys)}


def _always(context: Context, config_path: str) -> list[str]:
    """What stands on every command line, because it must win over any configuration file."""
    serve, tuning, flags = context.config.serve, context.config.tuning, context.installed.flags
    argv = ["--config", config_path] if config_path else []
    if serve.listen == "uds":
        argv += ["--uds", vllm_check.socket_path(context)]
    else:
        argv += ["--host", serve.host, "--port", str(serve.port)]
    argv += vllm_flags.render("served-model-name", served_name(context.config), context.installed)
    argv += [
        "--tensor-parallel-size",
        str(tuning.tensor_parallel_size),
        "--pipeline-parallel-size",
        str(tuning.pipeline_parallel_size),
    ]
    if tuning.data_parallel_size > 1:
        argv += ["--data-parallel-size", str(tuning.data_parallel_size)]
    if "--shutdown-timeout" in flags:
        argv += ["--shutdown-timeout", str(round(context.config.stop.shutdown_timeout_s))]
    return argv


def tuned(context: Context) -> list[str]:
    """vLLM's own settings that were set."""
    tuning = context.config.tuning
    argv: list[str] = []
    if tuning.prefix_caching is not None:
        argv.append("--enable-prefix-caching" if tuning.prefix_caching else "--no-enable-prefix-caching")
    for flag in ("--kv-cache-dtype", "--max-model-len", "--max-num-batched-tokens", "--gpu-memory-utilization"):
        value = getattr(tuning, vllm_flags.TUNED[flag])
        if value:
            argv += [flag, str(value)]
    if tuning.max_tokens:
        argv += ["--override-generation-config", json.dumps({"max_new_tokens": tuning.max_tokens})]
    return argv


def _chosen(context: Context) -> list[str]:
    """`engine.args`, without what vllmd owns; the access log is off unless a person says otherwise."""
    installed = context.installed
    args = context.config.engine.args
    argv = [
        argument
        for key, value in args.items()
        if not vllm_flags.owner(vllm_flags.dashed(key), installed)
        for argument in vllm_flags.render(key, value, installed)
    ]
    quiet = "--disable-uvicorn-access-log"
    if quiet in installed.flags and quiet.removeprefix("--") not in vllm_check.arguments(context):
        argv.append(quiet)
    return [*argv, *vllm_guard.arguments(context)]


def _environment(context: Context) -> dict[str, str]:
    config, cache = context.config, context.paths.cache
    defaults = {
        "HOME": str(cache),
        "XDG_CACHE_HOME": str(cache),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "HF_HUB_VERBOSITY": "info",
        **caches.variables(caches.place(context)),
    }
    fixed = {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": config.engine.logging_level or "INFO",
        **environment.visible_devices(config.gpus, context.environ.get("CUDA_VISIBLE_DEVICES")),
    }
    programs = Path(context.installed.executable).parent
    toolkit = _toolkit(context, programs.parent)
    home = toolkit.get("CUDA_HOME")
    built = environment.build(
        context.environ,
        ours=environment.our_names(vllm_tuning.Tuning),
        given=config.engine.env,
        defaults=defaults | toolkit,
        fixed=fixed,
        path_first=f"{programs}:{home}/bin" if home else str(programs),
    )
    return {**built, **vllm_guard.environment(context)}


def _toolkit(context: Context, directory: Path) -> dict[str, str]:
    """CUDA's compiler from pip's packages, for a CUDA build on a host that has none."""
    if not context.installed.cuda:
        return {}
    given = {**context.environ, **context.config.engine.env}
    return vllm_toolkit.environment(directory, given.get("PATH", ""), given)


def _secret_values(context: Context) -> list[str]:
    return [value for name, value in context.config.engine.env.items() if environment.is_secret(name) and value]
