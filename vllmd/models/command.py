"""vllm-resolve-model: the resolve stage as the command that people chain today, configured by environment alone.

    vllm-preflight && vllm-resolve-model && vllm-serve

Finds and verifies the model, and leaves what it found in an env file that vllm-serve reads. Status 1 on any failure.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllmd import __version__
from vllmd.config import envfile
from vllmd.config.rows import table
from vllmd.config.settings import Model
from vllmd.config.sources import from_environment
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.errors import ConfigError, ModelInvalid, UsageError, VllmdError
from vllmd.models.identity import hash12, request_from, slug
from vllmd.models.inventory import is_snapshot
from vllmd.models.ioerrors import translated
from vllmd.models.progress import Progress
from vllmd.models.provenance import FILE as PROVENANCE
from vllmd.models.resolve import resolve, verified
from vllmd.system.files import storage_error

USAGE = """usage: vllm-resolve-model [--help] [--version]

Finds the model that the environment names, verifies it, and writes an env file
for vllm-serve. VLLM_MODEL and VLLM_MODELS_DIR are required, and VLLM_MODEL_ID or
VLLM_MODEL_ORG; the others are those of `model` in vllmd.yaml(5).

status  0  found and verified
        1  anything else; standard error says what
"""
VIA_TODAY = {"bundled": "flox"}
"""In the env file a source keeps the name that readers of today's files know."""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The command, without its name in `argv`. Returns 0, or 1 after saying on stderr what failed."""
    try:
        return _run(argv, environ)
    except VllmdError as error:
        print(f"[model] ERROR: {error.what}", file=sys.stderr)
        if error.hint:
            print(f"[model] {error.hint}", file=sys.stderr)
        return 1


def _run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    if list(argv) in (["-h"], ["--help"]):
        print(USAGE, end="")
    elif list(argv) == ["--version"]:
        print(f"vllm-resolve-model {__version__}")
    elif argv:
        raise UsageError("usage", f"unknown argument {argv[0]!r}", "It is configured by environment variables alone; see --help.")
    else:
        _resolve(environ)
    return 0


def _resolve(environ: Mapping[str, str]) -> None:
    settings = settings_from(environ)
    request = request_from(settings, Path())
    path = _checked_env_file(settings, request)
    with _placed("VLLM_MODELS_DIR", request.store, "create"):
        request.store.mkdir(parents=True, exist_ok=True)
    model = _first_verified(request, settings, environ)
    with _placed("VLLM_MODEL_ENV_FILE" if settings.env_file else "FLOX_ENV_CACHE", path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        envfile.write(path, exports(request, model), "Written by vllm-resolve-model for vllm-serve.")
    print(f"[model] Env file: {path}", flush=True)


@contextmanager
def _placed(variable: str, path: Path, verb: str) -> Iterator[None]:
    """A place that a variable names wrongly is that variable's fault, not the model's. The file's own name is said, not
    that of the temporary one beside it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise translated(error, f"{verb} {path}") from error
        if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError | FileNotFoundError):
            raise ConfigError("bad_place", f"{variable}: cannot {verb} {path}: {error.strerror}", f"Correct {variable}.") from error
        raise storage_error(error, f"{verb} {path}") from error


def settings_from(environ: Mapping[str, str]) -> Model:
    """The model's settings by environment alone. ConfigError names the variable that is wrong."""
    rows = {key: row for key, row in table(None).items() if row.attribute == "model"}
    given = from_environment(environ, rows)
    for warning in (warning for item in given for warning in item.warnings):
        print(f"[model] warning: {warning}", file=sys.stderr)
    return Model(**{item.row.name: item.value for item in given})


def _checked_env_file(settings: Model, request: ModelRequest) -> Path:
    """What today's command requires is required; the place of the env file."""
    if not settings.name:
        raise ConfigError("model_missing", "VLLM_MODEL is not set", "Set it to the model's name, for example Qwen3-8B.")
    if not settings.dir:
        raise ConfigError("models_dir_missing", "VLLM_MODELS_DIR is not set", "Set it to the directory that holds your models.")
    if not request.id and not request.path:
        raise ConfigError("model_id_missing", "neither VLLM_MODEL_ID nor VLLM_MODEL_ORG is set", "Set VLLM_MODEL_ID=ORG/NAME.")
    return env_file(settings, request)


def env_file(settings: Model, request: ModelRequest) -> Path:
    """Where vllm-resolve-model writes and vllm-serve reads. ConfigError where nothing says where."""
    if settings.env_file:
        return Path(settings.env_file)
    if not settings.flox_env_cache:
        raise ConfigError("env_file_unknown", "neither VLLM_MODEL_ENV_FILE nor FLOX_ENV_CACHE is set", "Set VLLM_MODEL_ENV_FILE=/path/of/model.env.")
    return Path(settings.flox_env_cache, f"vllm-model.{slug(request.key)}.{hash12(request.identity)}.env")


def _first_verified(request: ModelRequest, settings: Model, environ: Mapping[str, str]) -> ResolvedModel:
    """As today, a model whose sums are wrong is no hit: the next source is asked."""
    rejected: dict[Path, VllmdError] = {}
    say = _Teller()
    while True:
        model = resolve(request, settings, environ, say, rejected)
        try:
            return verified(model, request, settings, say)
        except ModelInvalid as error:
            say(Progress("verify", model.via, text=f"failed ({error.what})"))
            rejected[model.directory] = error


class _Teller:
    """Each sentence as a line; of bytes on their way, each tenth."""

    def __init__(self) -> None:
        self._tenth = -1

    def __call__(self, progress: Progress) -> None:
        if progress.fraction is not None:
            tenth = int(progress.fraction * 10)
            if tenth <= self._tenth or progress.phase != "fetch":
                return
            self._tenth = tenth
        if progress.text:
            print(f"[model] {progress.text}", flush=True)


def exports(request: ModelRequest, model: ResolvedModel) -> dict[str, str]:
    """The env file's variables: those of both versions in use today. The model is always a path, never an id."""
    directory = str(model.directory)
    found = {
        "VLLM_MODEL": request.name,
        "VLLM_MODEL_ID": request.key,
        "HF_HUB_OFFLINE": "1",
        "_VLLM_RESOLVED_MODEL": directory,
        "_VLLM_RESOLVED_VIA": VIA_TODAY.get(model.via, model.via),
        "_VLLM_MODEL_IDENTITY": request.identity,
        "_VLLM_MODEL_DIR": directory,
    }
    if request.revision:
        found["VLLM_MODEL_REVISION"] = request.revision
    if (model.directory / PROVENANCE).is_file():
        found["_VLLM_MODEL_PROVENANCE_FILE"] = str(model.directory / PROVENANCE)
    if not is_snapshot(model.directory):
        return found | {"VLLM_MODEL_PATH": directory}
    hub = model.directory.parents[2]
    home = {"HF_HOME": str(hub.parent)} if hub.name == "hub" else {}
    return found | home | {"_VLLM_RESOLVED_SNAPSHOT": directory}
