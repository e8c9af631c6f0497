"""vLLM's command line: one canonical spelling for a flag, who owns which, and the way from `engine.args` to an argv.

vLLM takes a flag as --tensor-parallel-size, --tensor_parallel_size, -tp, --tensor-parallel-size=2, --tensor-par and,
for a JSON value, --x.key; booleans also as --no-x. A guard that compares strings misses most of these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllmd.core.plan import Installed
from vllmd.engines.protocol import SettingRefused

OWNED: Mapping[str, str] = {
    "--host": "serve.host",
    "--port": "serve.port",
    "--uds": "serve.listen",
    "--model": "model",
    "--served-model-name": "serve.served_model_name",
    "--tensor-parallel-size": "serve.tensor_parallel_size",
    "--pipeline-parallel-size": "serve.pipeline_parallel_size",
    "--data-parallel-size": "serve.data_parallel_size",
    "--api-key": "serve.api_key",
    "--config": "engine.config_file",
    "--shutdown-timeout": "stop.shutdown_timeout_s",
}
"""Flags that only vllmd gives, and the setting that says their value."""

TUNED: Mapping[str, str] = {
    "--enable-prefix-caching": "prefix_caching",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--max-model-len": "max_model_len",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--override-generation-config": "max_tokens",
    "--gpu-memory-utilization": "gpu_memory_utilization",
}
"""Flags that have a setting too: in two places at once they are an error, in one they are fine."""

SHORT: Mapping[str, str] = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-O": "--optimization-level",
}

_APPENDED = frozenset({"--middleware"})
"""Given once per value; the other flags with several values take them in one row."""


def canonical(spelling: str, known: Iterable[str] = ()) -> str:
    """The long, positive, dashed name of a flag however it is spelled; abbreviations are resolved among `known` and
    the owned ones, as argparse does (a name that is ambiguous stays as it is)."""
    name = spelling.split("=", 1)[0].split(".", 1)[0]
    if name.startswith("-O"):
        name = "-O"
    elif name.startswith("--"):
        name = "--" + name[2:].replace("_", "-")
    names = {*known, *OWNED, *SHORT}
    if name not in names:
        longer = {SHORT.get(full, full) for full in names if full.startswith(name)} if len(name) > 1 else set()
        longer -= {f"--no-{full[2:]}" for full in longer}
        name = longer.pop() if len(longer) == 1 else name
    name = SHORT.get(name, name)
    positive = f"--{name.removeprefix('--no-')}"
    return positive if name.startswith("--no-") and (positive in names or positive in TUNED) else name


def owner(spelling: str, installed: Installed) -> str:
    """The setting that owns this flag; '' where nobody does."""
    return OWNED.get(canonical(spelling, installed.flags), "")


def unknown(spelling: str, installed: Installed) -> str:
    """The hint for a flag that the installed vLLM does not have; '' where it has it, or where its flags are not known."""
    name = canonical(spelling, installed.flags)
    if not installed.flags or name in installed.flags or name in SHORT.values():
        return ""
    import difflib

    close = difflib.get_close_matches(name, installed.flags, n=1)
    return f"did you mean {close[0]}?" if close else f"`{installed.executable} serve --help=all` lists what it has"


def dashed(key: str) -> str:
    """The flag that a key of a mapping means: enforce_eager, enforce-eager and --enforce-eager are one."""
    if key.startswith("-"):
        return key
    head, dot, rest = key.partition(".")
    return f"--{head.replace('_', '-')}{dot}{rest}"


def render(key: str, value: Any, installed: Installed) -> list[str]:
    """One entry of `engine.args` as arguments: true is --x, false --no-x, a list several values, a mapping JSON."""
    flag = dashed(key)
    if value is True:
        return [flag]
    if value is False:
        return _negated(flag, installed)
    if value is None:
        raise SettingRefused(
            "flag_empty", f"engine.args.{key}", "has no value", f"write `{key}: true`, or a value, or remove it"
        )
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return _several(flag, [_text(item) for item in value])
    return _single(flag, _text(value))


def _negated(flag: str, installed: Installed) -> list[str]:
    """A switch that has no --no- form is off when it is not given."""
    negative = f"--no-{flag.removeprefix('--')}"
    return [] if installed.flags and negative not in installed.flags else [negative]


def _several(flag: str, values: list[str]) -> list[str]:
    if not values:
        return []
    if canonical(flag) in _APPENDED or any(value.startswith("-") for value in values):
        return [argument for value in values for argument in _single(flag, value)]
    return [flag, *values]


def _single(flag: str, value: str) -> list[str]:
    """A value that begins with a dash would be taken for a flag."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def _text(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def flags_of(argv: Sequence[str]) -> list[str]:
    """The arguments that are flags, as they are spelled; a negative number is none."""
    return [
        argument
        for argument in argv
        if argument.startswith("-") and len(argument) > 1 and not argument[1].isdigit() and argument[1] != "."
    ]


def without_owned(argv: Sequence[str], installed: Installed) -> list[str]:
    """An argv without the flags that vllmd owns, nor their values."""
    kept: list[str] = []
    dropping = False
    for argument in argv:
        if flags_of([argument]):
            dropping = bool(owner(argument, installed))
            if not dropping:
                kept.append(argument)
            dropping = dropping and "=" not in argument
        elif not dropping:
            kept.append(argument)
    return kept
