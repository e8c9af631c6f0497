"""What vLLM would tell after 10 to 50 s of imports, or never, told at once: flags, GPU counts, key, socket."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllmd.config.values import shown
from vllmd.core.plan import Installed
from vllmd.engines import environment, given_keys, vllm_config_file, vllm_flags
from vllmd.engines.protocol import Context, SettingRefused
from vllmd.errors import ConfigError

_SUN_PATH_BYTES = 107
"""Longest name of a unix socket."""

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_FLAG = re.compile(r"-{0,2}[A-Za-z][\w.-]*", re.ASCII)

_FEATURES = {
    "--shutdown-timeout": "requests in flight are cut off at a stop",
    "--uds": "it cannot serve on a unix socket",
    "--middleware": "keys guard /v1 and a few other paths only, and a change of them needs a restart",
}
"""Flags that older versions lack -> what that means."""


def check(context: Context) -> list[str]:
    """ConfigError on what cannot work; returns warnings."""
    warnings = [
        *_args(context),
        *_config_file(context),
        *_limits(context.installed),
    ]
    _refuse_gpu_count(context)
    _refuse_pickle(context)
    _refuse_environment(context.config.engine.env)
    warnings += _access(context)
    if context.config.serve.listen == "uds":
        socket_path(context)
    return warnings


def arguments(context: Context) -> dict[str, Any]:
    """`engine.args` by canonical name without dashes; a --no-x counts as x: false."""
    found: dict[str, Any] = {}
    for key, value in context.config.engine.args.items():
        flag = vllm_flags.dashed(key)
        name = vllm_flags.canonical(flag, context.installed.flags)
        negated = flag.startswith("--no-") and not name.startswith("--no-")
        found[name.lstrip("-")] = (not value) if negated and isinstance(value, bool) else value
    return found


def socket_path(context: Context) -> str:
    path = str(context.paths.sockets / f"{context.instance}.sock")
    if len(path.encode()) > _SUN_PATH_BYTES:
        raise ConfigError(
            "socket_path_too_long",
            f"serve.listen: {path} is longer than the {_SUN_PATH_BYTES} bytes of a unix socket's name",
            "use a shorter --root",
        )
    return path


def pass_through(argv: Sequence[str], context: Context) -> list[str]:
    """Checks flags given by hand; returns warnings. What vllmd owns is an error, or with strict_flags false a warning."""
    warnings = []
    if argv and not argv[0].startswith("-"):
        reason = f"{shown(argv[0])} is no flag, and the model is chosen already"
        raise SettingRefused("argument_unknown", "the command line", reason, "remove it; vLLM's flags begin with --")
    for spelling in vllm_flags.flags_of(argv):
        flag = spelling.split("=", 1)[0]
        warnings += _owned("the command line", flag, flag, context)
        warnings += _tuned_twice("the command line", flag, flag, context)
        _refuse_unknown("the command line", flag, context.installed)
    return warnings


def _args(context: Context) -> list[str]:
    warnings = []
    seen: dict[str, str] = {}
    for key in context.config.engine.args:
        _refuse_malformed(key)
        place, flag = f"engine.args.{key}", vllm_flags.dashed(key)
        warnings += _owned(place, key, flag, context)
        warnings += _tuned_twice(place, key, flag, context)
        _refuse_unknown(place, flag, context.installed)
        name = vllm_flags.canonical(flag, context.installed.flags) + flag.partition(".")[1] + flag.partition(".")[2]
        if name in seen:
            raise SettingRefused(
                "flag_twice", place, f"is the same flag as engine.args.{seen[name]}", "remove one of them"
            )
        seen[name] = key
        vllm_flags.render(key, context.config.engine.args[key], context.installed)
    return warnings


def _refuse_malformed(key: str) -> None:
    """A key with the value in it: it is not shown further than to its name, as it may be a secret."""
    if not _FLAG.fullmatch(key):
        name = re.split(r"[=\s]", key.strip(), maxsplit=1)[0]
        reason = f"has a key that is more than the name of a flag, beginning with {shown(name)}"
        raise SettingRefused("flag_malformed", "engine.args", reason, "write each flag as NAME: VALUE")


def _config_file(context: Context) -> list[str]:
    if not context.config.engine.config_file:
        return []
    entries, places = vllm_config_file.read(context.config.engine.config_file)
    warnings = []
    for key in entries:
        flag = vllm_flags.dashed(key)
        warnings += _owned(places[key], key, flag, context)
        warnings += _tuned_twice(places[key], key, flag, context)
        _refuse_unknown(places[key], flag, context.installed)
    return warnings


def _owned(place: str, key: str, flag: str, context: Context) -> list[str]:
    setting = vllm_flags.owner(flag, context.installed)
    if not setting:
        return []
    what = f"{vllm_flags.canonical(flag, context.installed.flags)} is set by vllmd, from {setting}"
    if context.config.engine.strict_flags:
        raise SettingRefused("flag_owned", place, what, f"set {setting}, and remove {key} here")
    return [f"{place}: {what}; ignored here"]


def _tuned_twice(place: str, key: str, flag: str, context: Context) -> list[str]:
    """A flag with a setting of its own may be given as a flag too, but not both ways at once."""
    field = vllm_flags.TUNED.get(vllm_flags.canonical(flag, context.installed.flags), "")
    if field and getattr(context.config.tuning, field, None) not in (None, ""):
        raise SettingRefused("flag_twice", place, f"serve.{field} is set too", f"remove {key} here, or serve.{field}")
    return []


def _refuse_unknown(place: str, flag: str, installed: Installed) -> None:
    hint = vllm_flags.unknown(flag, installed)
    if hint:
        raise SettingRefused("flag_unknown", place, f"vLLM {installed.version} has no flag {flag}", hint)


def _limits(installed: Installed) -> Iterable[str]:
    """What the installed version lacks is done without, and said."""
    if not installed.flags:
        yield f"{installed.executable}: its flags are not known (`vllmctl engine install` records them), so they are not checked and a stop does not drain"
        return
    for flag, meaning in _FEATURES.items():
        if flag not in installed.flags:
            yield f"vLLM {installed.version} has no {flag}: {meaning}"


def _refuse_gpu_count(context: Context) -> None:
    """tensor x pipeline x data parallel must equal the GPUs. With `all` their number is preflight's to know."""
    gpus, tuning = context.config.gpus, context.config.tuning
    if isinstance(gpus, str):
        return
    count = gpus if isinstance(gpus, int) else len(gpus)
    product, nodes, data = _world(context)
    if product != count * nodes:
        sizes = (
            f"tensor {tuning.tensor_parallel_size} x pipeline {tuning.pipeline_parallel_size} x data {data} = {product}"
        )
        wanted = f"{count} GPU{'s' if count > 1 else ''}" + (f" on each of {nodes} nodes" if nodes > 1 else "")
        raise SettingRefused(
            "gpu_count",
            "gpus",
            f"{wanted}, but {sizes}",
            "make serve.tensor_parallel_size (or gpus) fit: the product must equal the number of GPUs",
        )


def _world(context: Context) -> tuple[int, int, int]:
    """(GPUs that it will use on all hosts, hosts, data parallel ranks)."""
    given, tuning = arguments(context), context.config.tuning
    data = _count(given.get("data-parallel-size-local"), tuning.data_parallel_size)
    return tuning.tensor_parallel_size * tuning.pipeline_parallel_size * data, _count(given.get("nnodes"), 1), data


def devices(context: Context) -> int:
    """GPUs that it will use on this host, rounded up; a CPU build uses none, however many it is shown."""
    if context.installed.variant == "cpu":
        return 0
    product, nodes, _ = _world(context)
    return -(-product // nodes)


def _access(context: Context) -> list[str]:
    serve = context.config.serve
    given = given_keys.api_keys(serve.api_key, context.environ)
    if serve.auth == "key":
        if context.access.guard_file:
            _refuse_other_servers(context)
        return []
    if given:
        what = "no key is asked for, and one is given (serve.api_key, or the credential api-key)"
        raise SettingRefused("auth_contradiction", "serve.auth", what, "remove `auth: none`, or the key")
    if serve.listen == "uds" or serve.host in _LOOPBACK:
        return []
    return [f"serve.auth: none: whoever reaches {serve.host}:{serve.port} may use every path"]


def _refuse_other_servers(context: Context) -> None:
    """Servers of vLLM that know no ASGI: a middleware is never asked there, and every path would be open."""
    path = context.config.engine.config_file
    entries = {vllm_flags.canonical(vllm_flags.dashed(key), context.installed.flags).lstrip("-"): value for key, value in vllm_config_file.read(path)[0].items()} if path else {}
    given = {**entries, **arguments(context)}
    found = [(f"engine.args.{name}", f"--{name}") for name in ("grpc", "grpc-port") if given.get(name) not in (None, False)]
    name = "VLLM_USE_RUST_FRONTEND"
    env = context.config.engine.env
    if env.get(name, context.environ.get(name, "0")).strip() not in ("", "0"):
        found.append((f"engine.env.{name}" if name in env else name, name))
    for key, what in found:
        reason = f"{what} starts a server that no middleware guards: it would answer without a key"
        raise SettingRefused("server_unguarded", key, reason, "remove it, or set serve.auth: none and guard the instance by other means")


def _refuse_pickle(context: Context) -> None:
    """This format loads pickle files although safetensors are there, which is all that was validated."""
    if arguments(context).get("load-format") == "pt" and not context.config.model.allow_pickle:
        what = "loads pickle files, which can run code that they bring, although safetensors may be there"
        raise SettingRefused("load_format_pickle", "engine.args.load-format", what, "remove it, or set model.allow_pickle: true if you trust the model")


def _count(value: Any, otherwise: int) -> int:
    try:
        return max(int(value), 1)
    except (TypeError, ValueError):
        return otherwise


def _refuse_environment(env: Mapping[str, str]) -> None:
    for name in env:
        if environment.is_never_passed(name):
            hint = "set serve.api_key, or a credential named api-key" if name == "VLLM_API_KEY" else "remove it"
            raise SettingRefused("env_refused", f"engine.env.{name}", "never reaches an engine", hint)
