"""Executes an engine in the place of this process: `vllm-serve` as people use it today, and `vllmd serve NAME`.

`vllm-serve` is configured by environment alone and keeps its statuses: 2 for a variable that is missing or wrong, 1 for
any other failure.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from vllmd.config import envfile, layers
from vllmd.config.paths import SYSTEM, Paths, user_paths
from vllmd.config.settings import Config
from vllmd.config.values import shown
from vllmd.core.plan import Command
from vllmd.engines import caches, environment, given_keys, record, registry
from vllmd.engines.execute import execute
from vllmd.engines.protocol import Context, Engine, Holding, Preparing
from vllmd.engines.vllm_check import pass_through
from vllmd.engines.vllm_flags import without_owned
from vllmd.errors import ConfigError, VllmdError
from vllmd.system.sharedlock import share

EnvFiles: TypeAlias = Callable[[Config], Sequence[Path]]
"""The places where vllm-resolve-model may have left the env file, the best first (the models package knows them)."""

REQUIRED = (
    "VLLM_TENSOR_PARALLEL_SIZE",
    "VLLM_PIPELINE_PARALLEL_SIZE",
    "VLLM_MAX_MODEL_LEN",
    "VLLM_MAX_NUM_BATCHED_TOKENS",
    "VLLM_KV_CACHE_DTYPE",
    "VLLM_SERVED_MODEL_NAME",
)

_WRONG_ENVIRONMENT = 2
_FAILED = 1

_HELP = """usage: vllm-serve [--print-cmd] [--dry-run] [-h] [--] [FLAGS OF vllm serve ...]

Executes vLLM for the model that vllm-resolve-model found. Configured by the
environment variables of `serve` and `engine` in vllmd.yaml(5); flags that
vllm-serve does not know are passed through.

  --print-cmd   write the command line to stderr, then execute it
  --dry-run     write the command line to stderr, and exit 0
  --version     print the version
  -h, --help    print this

status  that of vLLM, which takes its place
        1  it could not be executed
        2  the environment or a flag is wrong
"""

_FROM_ENV_FILE = re.compile(r"HF_HOME|HF_HUB_OFFLINE|VLLM_MODEL(_[A-Z_]+)?|_VLLM_[A-Z_]+")
"""A file that chooses the model may not choose PATH or LD_PRELOAD."""


@dataclass(frozen=True, slots=True)
class _Options:
    print_cmd: bool = False
    dry_run: bool = False
    show: str = ""
    extra: tuple[str, ...] = ()


def main(
    argv: Sequence[str], environ: Mapping[str, str], env_files: EnvFiles | None = None, paths: Paths | None = None
) -> int:
    """`vllm-serve`. Does not return when all is well, save for --dry-run, --help and --version: 0."""
    options = _options(argv)
    if options.show:
        sys.stdout.write(options.show)
        return 0
    try:
        context = _context(environ, paths or _default_paths(environ))
        keys = given_keys.api_keys(environ.get("VLLM_API_KEY", ""), environ)
    except VllmdError as error:
        return _complain(error, _WRONG_ENVIRONMENT if error.code != "engine_missing" else _FAILED)
    try:
        command = _command(context, _resolved(context, environ, env_files), options.extra, keys)
        with _held(registry.get("vllm"), context, dry_run=options.dry_run):
            return execute(command, print_cmd=options.print_cmd, dry_run=options.dry_run)
    except _WrongEnvironment as error:
        return _complain(error, _WRONG_ENVIRONMENT)
    except VllmdError as error:
        return _complain(error, _FAILED)


def serve_instance(
    context: Context,
    engine: Engine,
    model: str | Path,
    extra: Sequence[str] = (),
    *,
    print_cmd: bool = False,
    dry_run: bool = False,
) -> int:
    """`vllmd serve NAME`: the instance's engine for the model in this directory, without the daemon around it.

    `extra` are flags from the command line, checked where the engine can. Returns only for a dry run (0); VllmdError.
    """
    warnings, extra = _checked(engine, context, extra)
    for warning in warnings:
        _say(f"WARN: {warning}")
    command = engine.command(context, _prepared(engine, context, str(model)))
    with _held(engine, context, dry_run=dry_run):
        return execute(replace(command, argv=(*command.argv, *extra)), print_cmd=print_cmd, dry_run=dry_run)


class _WrongEnvironment(ConfigError):
    pass


def _options(argv: Sequence[str]) -> _Options:
    found = _Options()
    for index, argument in enumerate(argv):
        match argument:
            case "--":
                return replace(found, extra=(*found.extra, *argv[index + 1 :]))
            case "--print-cmd":
                found = replace(found, print_cmd=True)
            case "--dry-run":
                found = replace(found, dry_run=True)
            case "-h" | "--help":
                return replace(found, show=_HELP)
            case "--version":
                return replace(found, show=_version())
            case _:
                found = replace(found, extra=(*found.extra, argument))
    return found


def _version() -> str:
    from vllmd import __version__

    return f"vllm-serve {__version__}\n"


def _default_paths(environ: Mapping[str, str]) -> Paths:
    """Engines are the user's own if one was chosen there, else the host's."""
    if os.geteuid() == 0:
        return SYSTEM
    paths = user_paths(dict(environ))
    return paths if (paths.engines / record.CURRENT).exists() else replace(paths, engines=SYSTEM.engines)


def _context(environ: Mapping[str, str], paths: Paths) -> Context:
    for name in REQUIRED:
        if not environ.get(name, "").strip():
            raise ConfigError("variable_missing", f"{name} is not set", f"export {name}=...")
    engine = registry.get("vllm")
    config = layers.load(paths, None, environ, {}, lambda name: registry.get(name).tuning, read_files=False).config
    config = _as_today(config)
    environ = {name: value for name, value in environ.items() if name != "CREDENTIALS_DIRECTORY"}
    return Context(config, caches.trusted(paths), "vllm-serve", engine.installed(config, paths, environ), environ)


def _as_today(config: Config) -> Config:
    """What this command does differently from an instance: prefix caching off adds no flag, the key stays in the
    environment (nobody would remove a file after this process has become vLLM), Flox's places for the configuration."""
    tuning = replace(config.tuning, prefix_caching=config.tuning.prefix_caching or None)
    serve = replace(config.serve, api_key="")
    return replace(
        config,
        tuning=tuning,
        serve=serve,
        engine=replace(config.engine, config_file=config.engine.config_file or _flox_config(config)),
    )


def _flox_config(config: Config) -> str:
    places = ((config.model.flox_env_project, "config.yaml"), (config.model.flox_env_cache, "vllm-config.yaml"))
    found = (Path(directory, name) for directory, name in places if directory)
    return next((str(path) for path in found if path.is_file()), "")


def _resolved(context: Context, environ: Mapping[str, str], env_files: EnvFiles | None) -> dict[str, str]:
    """The variables of the env file, checked to be of the model that is asked for."""
    model = context.config.model
    path = _env_file(context.config, env_files)
    if model.env_file_trusted:
        _say(f"WARN: a shell reads {path} (VLLM_ENV_FILE_TRUSTED)")
        variables = envfile.read_trusted(
            path, environ=environ, allow=lambda name: not environment.is_never_passed(name)
        )
    else:
        variables = envfile.read(path, allow=lambda name: _FROM_ENV_FILE.fullmatch(name) is not None)
    if not variables.get("_VLLM_RESOLVED_MODEL"):
        raise ConfigError(
            "env_file_incomplete", f"{path} does not set _VLLM_RESOLVED_MODEL", "run vllm-resolve-model again"
        )
    _refuse_other_model(path, variables, model.id + (f"@{model.revision}" if model.id and model.revision else ""))
    _refuse_no_model(path, variables["_VLLM_RESOLVED_MODEL"])
    return variables


def _refuse_no_model(path: Path, model: str) -> None:
    """It becomes an argument: a directory that is there, or a hub's id, and never a flag."""
    if model.startswith("-") or not model.isprintable():
        what = f"{path}: _VLLM_RESOLVED_MODEL is neither a directory nor an id: {shown(model)}"
        raise ConfigError("env_file_invalid", what, "run vllm-resolve-model again")
    if model.startswith("/") and not Path(model).is_dir():
        raise ConfigError("env_file_stale", f"{path}: there is no directory {model}", "run vllm-resolve-model again")


def _refuse_other_model(path: Path, variables: Mapping[str, str], wanted: str) -> None:
    found = variables.get("_VLLM_MODEL_IDENTITY", "")
    if wanted and found and wanted != found:
        raise ConfigError(
            "env_file_other_model", f"{path} is of {found}, and {wanted} is asked for", "run vllm-resolve-model for it"
        )


def _env_file(config: Config, env_files: EnvFiles | None) -> Path:
    if config.model.env_file:
        return Path(config.model.env_file)
    if not config.model.flox_env_cache:
        raise _WrongEnvironment(
            "variable_missing",
            "neither VLLM_MODEL_ENV_FILE nor FLOX_ENV_CACHE is set",
            "export VLLM_MODEL_ENV_FILE=...",
        )
    if not Path(config.model.flox_env_cache).is_dir():
        raise _WrongEnvironment(
            "variable_wrong",
            f"FLOX_ENV_CACHE is no directory: {config.model.flox_env_cache}",
            "correct it, or export VLLM_MODEL_ENV_FILE=...",
        )
    if not config.model.id:
        raise _WrongEnvironment(
            "variable_missing", "the model's id is not known", "export VLLM_MODEL_ID, or VLLM_MODEL and VLLM_MODEL_ORG"
        )
    places = env_files(config) if env_files else ()
    for path in places:
        if path.is_file():
            return path
    looked = ", ".join(str(path) for path in places) or config.model.flox_env_cache
    raise ConfigError(
        "env_file_missing", f"no env file of {config.model.id} ({looked})", "run vllm-resolve-model first"
    )


def _command(context: Context, variables: Mapping[str, str], extra: Sequence[str], keys: Sequence[str]) -> Command:
    """The engine's command, with the hub's variables of the env file, and the tokens where it is given an id."""
    engine = registry.get("vllm")
    for warning in engine.check(context):
        _say(f"WARN: {warning}")
    warnings, extra = _checked(engine, context, extra)
    for warning in warnings:
        _say(f"WARN: {warning}")
    model = variables["_VLLM_RESOLVED_MODEL"]
    local = model.startswith("/")
    model = _prepared(engine, context, model) if local else model
    environ = context.environ
    command = engine.command(context, model)
    env = {**command.env, **{name: value for name, value in variables.items() if name in ("HF_HOME", "HF_HUB_OFFLINE")}}
    if not local:
        env.update(
            {name: value for name, value in environ.items() if name.startswith(("HF_", "HUGGING_FACE_HUB_TOKEN"))} | env
        )
        env["HF_HUB_OFFLINE"] = variables.get("HF_HUB_OFFLINE", environ.get("HF_HUB_OFFLINE", "0"))
    if keys:
        env["VLLM_API_KEY"] = keys[0]
    return replace(command, argv=(*command.argv, *extra), env=env, secrets=(*command.secrets, *keys))


def _prepared(engine: Engine, context: Context, directory: str) -> str:
    """What the engine is given instead of the model's directory, where it wants something else."""
    if not isinstance(engine, Preparing):
        return directory
    try:
        served, said = engine.prepare(context, Path(directory))
    except OSError as error:
        _say(f"WARN: the model is served as it is: {error.filename or context.paths.cache}: {error.strerror}")
        return directory
    if said:
        _say(said)
    return str(served)


@contextlib.contextmanager
def _held(engine: Engine, context: Context, *, dry_run: bool) -> Iterator[None]:
    """What the engine runs from is not removed under it: the locks go over to the program that this process becomes."""
    with contextlib.ExitStack() as stack:
        for directory in engine.holds(context) if isinstance(engine, Holding) and not dry_run else ():
            with contextlib.suppress(OSError):
                stack.callback(share(directory, inherited=True))
        yield


def _checked(engine: Engine, context: Context, extra: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """Only vLLM's flags are known well enough to be checked; another engine is given what was typed."""
    if engine.name != "vllm" or not extra:
        return [], extra
    return pass_through(extra, context), without_owned(extra, context.installed)


def _complain(error: VllmdError, status: int) -> int:
    _say(f"ERROR: {error.what}")
    if error.hint:
        _say(f"hint: {error.hint}")
    return status


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
