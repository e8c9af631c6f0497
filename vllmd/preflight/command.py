"""vllm-preflight: the preflight stage as the command that people chain today, configured by environment alone.

    vllm-preflight && vllm-resolve-model && vllm-serve        or        vllm-preflight CMD...

Statuses 0 to 5 are a stable contract. Logs go to stderr; stdout carries the report when it is asked for as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from vllmd import __version__
from vllmd.config.paths import SYSTEM
from vllmd.config.rows import table
from vllmd.config.settings import Preflight, Serve
from vllmd.config.sources import from_environment
from vllmd.core.plan import Endpoint, Installed
from vllmd.errors import ConfigError, UsageError, VllmdError
from vllmd.preflight import lock
from vllmd.preflight.report import Report
from vllmd.preflight.run import PreflightRequest, policy_of, run

USAGE = """usage: vllm-preflight [--json] [--help] [--version] [[--] COMMAND...]

Checks that VLLM_HOST:VLLM_PORT is free, ends a vLLM of this user that holds
it, and checks the GPUs; then executes COMMAND, if there is one. Configured by
environment variables: those of `serve`, `preflight` and `gpus` in vllmd.yaml(5).

status  0  free, or freed
        1  bad configuration, a GPU that cannot be used, or locked
        2  held by something that is no vLLM
        3  held by another user's vLLM
        4  nobody can tell who holds it
        5  still held after what held it was stopped
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line and the environment, parsed."""

    command: tuple[str, ...]
    wants_json: bool
    preflight: Preflight
    serve: Serve
    gpus: Any


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The command, without its name in `argv`. Returns 0 to 5, or never, when COMMAND was executed."""
    if list(argv[:1]) in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if list(argv) == ["--version"]:
        print(f"vllm-preflight {__version__}")
        return 0
    try:
        asked = _asked(argv, environ)
    except VllmdError as error:
        return _finish(_misconfigured(error, environ), wants_json=_may_want_json(argv, environ))
    return _run(asked, environ)


def _asked(argv: Sequence[str], environ: Mapping[str, str]) -> Asked:
    command, json_flag = _command(argv)
    preflight, serve, gpus = settings_from(environ)
    wants_json = json_flag or preflight.json
    if wants_json and command:
        what = "VLLM_PREFLIGHT_JSON cannot be used with a command: stdout would be both's"
        raise UsageError("json_with_command", what, "Run vllm-preflight and the command one after the other, with &&.")
    return Asked(command, wants_json, preflight, serve, gpus)


def _command(argv: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    words = list(argv)
    json_flag = words[:1] == ["--json"]
    words = words[1:] if json_flag else words
    if words[:1] == ["--"]:
        return tuple(words[1:]), json_flag
    if words and words[0].startswith("-"):
        raise UsageError("usage", f"unknown option {words[0]}", "See vllm-preflight --help; `--` begins the command.")
    return tuple(words), json_flag


def settings_from(environ: Mapping[str, str]) -> tuple[Preflight, Serve, Any]:
    """The settings of this stage alone: what others got wrong is theirs to say. ConfigError names the variable."""
    keys = ("serve.host", "serve.port", "gpus")
    rows = {key: row for key, row in table(None).items() if row.attribute == "preflight" or key in keys}
    environ = dict(environ)
    if not any(environ.get(name) for name in ("VLLMD_GPUS", "VLLM_GPU_DEVICES")) and environ.get("CUDA_VISIBLE_DEVICES"):
        environ["VLLM_GPU_DEVICES"] = environ["CUDA_VISIBLE_DEVICES"]
    given = {item.row.key: item for item in from_environment(environ, rows)}
    values: dict[str, dict[str, Any]] = {"preflight": {}, "serve": {}}
    for item in given.values():
        if item.row.attribute in values:
            values[item.row.attribute][item.row.name] = item.value
    gpus = given["gpus"].value if "gpus" in given else "all"
    return Preflight(**values["preflight"]), Serve(**values["serve"]), gpus


def _run(asked: Asked, environ: Mapping[str, str]) -> int:
    settings = asked.preflight
    path = Path(settings.lock_file) if settings.lock_file else lock.default_path(asked.serve.port, SYSTEM.runtime, environ, os.geteuid())
    try:
        held = lock.take(path)
    except VllmdError as error:
        return _finish(_failed(error, asked), wants_json=asked.wants_json)
    with held:
        report = run(_request(asked, environ))
        status = _finish(report, wants_json=asked.wants_json)
        if status or not asked.command:
            return status
        if settings.dry_run:
            _say(f"dry run: would execute {asked.command[0]}")
            return 0
        return _execute(asked, environ)


def _request(asked: Asked, environ: Mapping[str, str]) -> PreflightRequest:
    request = PreflightRequest(
        endpoints=(Endpoint("tcp", asked.serve.host, asked.serve.port),),
        settings=asked.preflight,
        policy=policy_of(asked.preflight, None),
        gpus=asked.gpus,
    )
    if not request.gpu.is_wanted:
        return request
    installed, fraction = _engine(environ)
    return replace(
        request, memory_fraction=fraction, python=installed.python, cuda=installed.cuda, archs=installed.archs
    )


def _engine(environ: Mapping[str, str]) -> tuple[Installed, float]:
    """What is known of the engine that will follow; nothing, where the environment does not say or has it wrong, which
    its own stage will tell."""
    from vllmd.config import layers
    from vllmd.engines import registry
    from vllmd.engines.protocol import Context

    try:
        loaded = layers.load(SYSTEM, None, environ, {}, lambda name: registry.get(name).tuning, read_files=False)
        engine = registry.get(loaded.config.engine.name)
        installed = engine.installed(loaded.config, SYSTEM, environ)
        return installed, engine.memory_fraction(Context(loaded.config, SYSTEM, "", installed, environ))
    except VllmdError:
        return Installed(""), 0.0


def _execute(asked: Asked, environ: Mapping[str, str]) -> int:
    """Become the command. The lock ends with the exec: a second preflight may then find the server, and end it."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores both, and an ignored signal survives an exec
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        _become(asked.command, environ)
    except OSError as error:
        report = _failed(ConfigError("command_not_executable", f"{asked.command[0]}: {error.strerror}", "Check its path and mode."), asked)
        return _finish(report, wants_json=False)


def _become(command: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    os.execvpe(command[0], list(command), dict(environ))


def _failed(error: VllmdError, asked: Asked) -> Report:
    return Report(
        ok=False,
        code=1,
        host=asked.serve.host,
        ports=(asked.serve.port,),
        reason=error.code,
        error=error.what,
        hint=error.hint,
        dry_run=asked.preflight.dry_run,
    )


def _misconfigured(error: VllmdError, environ: Mapping[str, str]) -> Report:
    """Nothing parsed: host and port only where they make sense by themselves."""
    port = environ.get("VLLM_PORT", "") or "8000"
    ports = (int(port),) if port.isascii() and port.isdigit() and len(port) < 6 else ()
    reason = "bad_owner_regex" if "VLLM_OWNER_REGEX" in error.what else "invalid_configuration"
    reason = error.code if error.code == "json_with_command" else reason
    return Report(ok=False, code=1, host=environ.get("VLLM_HOST", "") or "127.0.0.1", ports=ports, reason=reason, error=error.what, hint=error.hint)


def _may_want_json(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    return list(argv[:1]) == ["--json"] or environ.get("VLLM_PREFLIGHT_JSON") == "1"


def _finish(report: Report, *, wants_json: bool) -> int:
    """Tell the report, to people on stderr and to programs on stdout; its status."""
    for gpu in report.gpus:
        _say(f"GPU {gpu.index} {gpu.name}: {gpu.memory_free_mib} of {gpu.memory_total_mib} MiB free")
    for warning in report.warnings:
        _say(f"warning: {warning}")
    if report.ok:
        _say(_told(report))
    else:
        _say(f"error: {report.error}")
        _say(report.hint)
    if wants_json:
        print(json.dumps(report.as_dict()), flush=True)
    return report.code


def _told(report: Report) -> str:
    where = f"{report.host}:{','.join(map(str, report.ports))}"
    pids = " ".join(map(str, report.pids))
    return {"would_stop": f"{where}: would stop {pids}", "stopped": f"{where} is free: stopped {pids}"}.get(report.action, f"{where} is free")


def _say(text: str) -> None:
    if text:
        print(f"[preflight] {text}", file=sys.stderr, flush=True)
