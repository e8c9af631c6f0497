"""Flags of vLLM from a command line, as settings: `engine.args`, or the setting of `serve` that has the same meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vllmd.config.redact import redact_argv
from vllmd.engines import vllm_flags
from vllmd.errors import UsageError

_SETTINGS = {flag: name for flag, name in vllm_flags.TUNED.items() if name != "max_tokens"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_FLAG = re.compile(r"--[A-Za-z0-9]([\w.-]*\w)?|-[A-Za-z0-9]+", re.ASCII)
_SIZES = ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size")


def settings(words: Sequence[str]) -> dict[str, Any]:
    """{"serve": {...}, "engine": {"args": {...}}}, each only where something is in it. UsageError."""
    serve: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for flag, values in _flags(words):
        name, is_negative = _canonical(flag)
        value = _value(flag, values, is_negative=is_negative)
        if name in _SETTINGS:
            serve[_SETTINGS[name]] = value
        else:
            args[name.removeprefix("--")] = value
    return ({"serve": serve} if serve else {}) | ({"engine": {"args": args}} if args else {})


def secret(words: Sequence[str]) -> str:
    """The first flag that has a secret; '' for none."""
    flag = ""
    for given, shown in zip(words, redact_argv(words), strict=True):
        flag = given.partition("=")[0] if given.startswith("-") else flag
        if given != shown:
            return flag
    return ""


def _flags(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words behind it."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("-") and not _NUMBER.fullmatch(word) and len(word) > 1:
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif not found:
            raise UsageError("usage", f"{word!r} is no flag", "flags of vLLM begin with --; the model stands before `--`")
        else:
            found[-1][1].append(word)
    yield from found


def _canonical(flag: str) -> tuple[str, bool]:
    """The long name, dashed (what stands behind a dot stays as it is), and whether it was --no-."""
    if flag.startswith("-O"):
        return "--optimization-level", False
    name = vllm_flags.canonical(flag)
    owner = vllm_flags.OWNED.get(name, "")
    if name in _SIZES:
        raise UsageError("flag_owned", f"{flag} follows from the GPUs", "--gpus N before the `--` says on how many; other divisions go into a drop-in of your own (serve.pipeline_parallel_size)")
    if owner:
        raise UsageError("flag_owned", f"{flag} is set by {owner}", f"write {owner} into the instance's file" if owner != "model" else "give the model before the `--`")
    if not name.startswith("--") or not _FLAG.fullmatch(flag):
        raise UsageError("flag_unknown", f"{flag} is no flag of vLLM that is known here", "write its long name")
    dotted = flag.partition(".")[1] + flag.partition(".")[2]
    is_negative = flag.replace("_", "-").startswith("--no-") and flag.partition(".")[1] == ""
    plain = name if not name.startswith("--no-") else f"--{name.removeprefix('--no-')}"
    return plain + dotted, is_negative


def _value(flag: str, values: list[str], *, is_negative: bool) -> Any:
    if flag.startswith("-O") and len(flag) > 2:
        values = [flag[2:]]
    if not values:
        return not is_negative
    if is_negative:
        raise UsageError("usage", f"{flag} takes no value", f"remove {values[0]!r}")
    read = [_read(each) for each in values]
    return read[0] if len(read) == 1 else read


def _read(text: str) -> Any:
    """A number and JSON as such; everything else is the text that it is."""
    if _NUMBER.fullmatch(text):
        return int(text)
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError("usage", f"{text!r:.80} is not JSON: {error}", "quote it for the shell: '{\"key\": 1}'") from None
    return text
