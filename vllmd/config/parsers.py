"""From what YAML or the environment gave to a typed value: the parsers that the rows of settings.py name.

A parser takes text (environment, command line) or what YAML made (str, int, float, bool, list, mapping), and returns the
typed value or raises ValueError with a reason that is written for a person. One that can go on in spite of something
odd returns `Warned(value, reasons)`; only layers.py sees that, and it keeps the reasons with their place.

Each parser is a `Parser`, which also carries its JSON schema and its form in words, so that documentation needs no
second list of types.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from vllmd.config.values import EMPTY as EMPTY  # settings.py names it p.EMPTY
from vllmd.config.values import FrozenDict, Parser, Warned, frozen, kind_of, parser, shown, string_of

NUMBER = re.compile(r"[0-9]+([.][0-9]+)?", re.ASCII)
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def _one_line(value: object) -> str:
    string = string_of(value)
    if any(ord(c) < 32 or ord(c) in (127, 0x85, 0x2028, 0x2029) for c in string):
        raise ValueError(f"contains a line break or control character: {shown(string)}")
    return string


text = Parser(string_of, "text", {"type": "string"})
one_line = Parser(_one_line, "text on one line", {"type": "string", "pattern": r"^[^\n\r\t\u0000]*$"})


@parser("word", type="string", pattern="^[A-Za-z][A-Za-z0-9_.-]*$")
def word(value: object) -> str:
    string = string_of(value)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", string, re.ASCII):
        raise ValueError(f"must be one word of letters, digits, '_', '.' and '-', not {shown(string)}")
    return string


def _path_part(string: str, what: str) -> str:
    """One component that becomes part of a path and of a command line."""
    if string in (".", ".."):
        raise ValueError(f"{what} must not be '.' or '..'")
    if string.startswith("-"):
        raise ValueError(f"{what} must not begin with '-': {shown(string)}")
    if "\\" in string or not string.isprintable():
        raise ValueError(f"{what} contains a backslash or control character: {shown(string)}")
    return string


@parser("model name", type="string", pattern="^[^/\\\\]*$")
def model_name(value: object) -> str:
    string = _one_line(value)
    if "/" in string:
        raise ValueError(f"must be a name without '/', not {shown(string)} (the full id goes in model.id)")
    if string != string.strip():
        raise ValueError(f"begins or ends with a space: {shown(string)}")
    return _path_part(string, "the name")


@parser("ORG/NAME", type="string")
def model_id(value: object) -> str:
    string = _one_line(value)
    if string and (string.startswith(("/", "~", "./")) or string.count("/") > 1):
        raise ValueError(f"must be ORG/NAME or NAME, not {shown(string)} (a directory goes in model.path)")
    if any(not part or part != part.strip() for part in string.split("/")) and string:
        raise ValueError(f"has an empty part or a space beside '/': {shown(string)}")
    for part in string.split("/"):
        _path_part(part, "a part of the id")
    return string


@parser("branch, tag or commit", type="string", pattern="^[A-Za-z0-9._/-]*$")
def revision(value: object) -> str:
    string = string_of(value)
    if not re.fullmatch(r"[A-Za-z0-9._/-]*", string, re.ASCII):
        raise ValueError(f"may hold letters, digits, '.', '_', '-' and '/' only, not {shown(string)}")
    if string and any(part in ("", ".", "..") for part in string.split("/")):
        raise ValueError(f"has an empty part, '.' or '..': {shown(string)}")
    return _path_part(string, "the revision")


@parser("absolute path", type="string", pattern="^([/~].*)?$")
def absolute_path(value: object) -> str:
    """A leading ~ or ~USER expands; empty stays empty (the row's way to say 'the default place')."""
    string = _one_line(value)
    expanded = os.path.expanduser(string)  # noqa: PTH111 - Path would also drop a trailing part such as '/.'
    if expanded.startswith("~"):
        raise ValueError(f"has no home directory for {shown(string)}")
    if expanded and not expanded.startswith("/"):
        raise ValueError(f"must be an absolute path, not {shown(string)}")
    return os.path.normpath(expanded) if expanded else ""


@parser("host name or address", type="string")
def host(value: object) -> str:
    string = string_of(value)
    bare = string[1:-1] if string.startswith("[") and string.endswith("]") else string
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    label = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
    if len(bare) > 253 or not re.fullmatch(rf"{label}(\.{label})*\.?", string, re.ASCII):
        raise ValueError(f"must be a host name or an IP address, not {shown(string)}")
    if re.fullmatch(r"[0-9.]+", string):
        raise ValueError(f"is not a valid IPv4 address: {shown(string)}")
    return string


@parser("ADDRESS:PORT, or an absolute path", type="string")
def listen_address(value: object) -> str:
    """'127.0.0.1:9108', '[::1]:9108', '/run/x.sock'. An address, no name: whoever listens must not wait for a resolver."""
    string = string_of(value)
    if not string or string[:1] in "/~":
        return str(absolute_path(string))
    address, _, port = string.rpartition(":")
    bare = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    try:
        found = ipaddress.ip_address("127.0.0.1" if bare == "localhost" else bare)
        if (found.version == 6) != (bare != address) or not re.fullmatch("[0-9]{1,5}", port, re.ASCII) or not 0 < int(port) < 65536:
            raise ValueError
    except ValueError:
        raise ValueError(f"must be ADDRESS:PORT, as 127.0.0.1:9108 or [::1]:9108, or an absolute path, not {shown(string)}") from None
    return f"[{found}]:{port}" if found.version == 6 else f"{found}:{port}"


@parser("regular expression", type="string", format="regex")
def regex(value: object) -> str:
    string = string_of(value)
    if len(string) > 4096:
        raise ValueError("is longer than 4096 characters")
    try:
        re.compile(string, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a regular expression: {error}: {shown(string)}") from None
    return string


_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


@parser("true or false", enum=[True, False, "true", "false", "yes", "no", "1", "0", 0, 1])
def boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    found = _BOOLEANS.get(str(value).lower()) if isinstance(value, str | int) else None
    if found is None:
        raise ValueError(f"must be true or false (also yes, no, 1, 0), not {shown(value)}")
    return found


@parser("true or false; in the environment 1 or 0", enum=[True, False, 0, 1, "0", "1"])
def boolean01(value: object) -> bool:
    """The strict switch of the commands that people use today: 0 or 1, and nothing else, in the environment."""
    if isinstance(value, bool):
        return value
    if str(value) not in ("0", "1") or not isinstance(value, str | int):
        raise ValueError(f"must be 0 or 1, not {shown(value)}")
    return str(value) == "1"


def _to_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, not {kind_of(value) if not isinstance(value, bool) else shown(value)}")
    if isinstance(value, str) and (len(value) > 32 or not NUMBER.fullmatch(value)):
        raise ValueError(f"must be a plain number like 5 or 0.5, not {shown(value)}")
    if isinstance(value, int) and abs(value) > 10**18:
        raise ValueError("is out of range")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, not {shown(value)}")
    return number


def _bounds(low: float | None, above: float | None, high: float | None) -> str:
    parts = [f"at least {low:g}" if low is not None else "", f"more than {above:g}" if above is not None else ""]
    parts.append(f"at most {high:g}" if high is not None else "")
    return " and ".join(part for part in parts if part)


def _within(value: float, low: float | None, above: float | None, high: float | None) -> None:
    outside = (low is not None and value < low) or (above is not None and value <= above)
    if outside or (high is not None and value > high):
        raise ValueError(f"must be {_bounds(low, above, high)}, not {value:.15g}")


def _number_schema(kind: str, low: float | None, above: float | None, high: float | None) -> dict[str, Any]:
    limits = {"minimum": low, "exclusiveMinimum": above, "maximum": high}
    return {"type": kind, **{name: limit for name, limit in limits.items() if limit is not None}}


def number(low: float | None = None, above: float | None = None, high: float | None = None) -> Parser:
    """A finite number; in text only digits with at most one point, as the commands that people use today take it."""

    def parse(value: object) -> float:
        found = _to_number(value)
        _within(found, low, above, high)
        return found

    return Parser(parse, f"number {_bounds(low, above, high)}".strip(), _number_schema("number", low, above, high))


MAX_SECONDS = 365 * 86400


def seconds(low: float | None = None, above: float | None = None) -> Parser:
    """A duration. Beyond a year it would be no deadline, and the kernel's clocks and systemd's overflow at some point."""
    plain = number(low, above)

    def parse(value: object) -> float:
        found: float = plain(value)
        _within(found, None, None, MAX_SECONDS)
        return found

    return Parser(parse, plain.form, {**plain.schema, "maximum": MAX_SECONDS})


def integer(low: int | None = None, high: int | None = None) -> Parser:
    def parse(value: object) -> int:
        if isinstance(value, str) and "://" in value:
            raise ValueError(f"must be a whole number, not {shown(value)}")
        found = _to_number(value)
        if found != int(found) or (isinstance(value, str) and "." in value):
            raise ValueError(f"must be a whole number, not {shown(value)}")
        _within(found, low, None, high)
        return int(value)  # type: ignore[call-overload,no-any-return]  # not by way of float: it has only 53 bits

    return Parser(parse, f"whole number {_bounds(low, None, high)}".strip(), _number_schema("integer", low, None, high))


def choice(*choices: str) -> Parser:
    words = ", ".join(c for c in choices if c)

    def parse(value: object) -> str:
        string = string_of(value)
        for known in choices:
            if string.lower() == known.lower():
                return known
        raise ValueError(f"must be one of {words}, not {shown(string)}")

    return Parser(parse, f"one of {words}", {"enum": list(choices)})


def _items(value: object) -> list[str]:
    """A comma list, or a YAML list, of one-line text; empty items are dropped."""
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise ValueError(f"must be a list, or text with commas, not {kind_of(value)}")
    return [item for item in (_one_line(item).strip() for item in found) if item]


_LIST_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


@parser("list, or text with commas", **_LIST_SCHEMA)
def listing(value: object) -> tuple[str, ...]:
    return tuple(_items(value))


_URL_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()+,;=:@/-]*")


@parser("list of paths, or text with commas", **_LIST_SCHEMA)
def url_paths(value: object) -> tuple[str, ...]:
    """Paths as a server sees them, decoded; no patterns."""
    found = _items(value)
    for item in found:
        if not _URL_PATH.fullmatch(item):
            raise ValueError(f"has {shown(item)}; a path begins with / and is taken exactly as it stands, without patterns")
    return tuple(dict.fromkeys(found))


def subset(*choices: str) -> Parser:
    """Some of the choices, in the order given, each once; an unknown one is an error."""

    def parse(value: object) -> tuple[str, ...]:
        found = [item.lower() for item in _items(value)]
        for item in found:
            if item not in choices:
                raise ValueError(f"has {shown(item)}; possible are {', '.join(choices)}")
        return tuple(dict.fromkeys(found))

    schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"enum": list(choices)}}]}
    return Parser(parse, f"list of {', '.join(choices)}", schema)


KNOWN_SOURCES = ("bundled", "local", "hf-cache", "r2", "hf-hub")
SOURCE_ALIASES = {"flox": "bundled", "s3": "r2"}


@parser("list of bundled, local, hf-cache, r2, hf-hub", **_LIST_SCHEMA)
def sources(value: object) -> tuple[str, ...] | Warned:
    """An unknown source is skipped with a warning: an older host must start with a newer host's list."""
    items = [SOURCE_ALIASES.get(item, item) for item in _items(value)]
    known = tuple(dict.fromkeys(item for item in items if item in KNOWN_SOURCES))
    unknown = [item for item in items if item not in KNOWN_SOURCES]
    if not known:
        raise ValueError(f"names no known source; possible are {', '.join(KNOWN_SOURCES)}")
    return Warned(known, tuple(f"unknown source {shown(item)} skipped" for item in unknown)) if unknown else known


def _object(value: object) -> Mapping[Any, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be a mapping; as text, a JSON object: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping, not {kind_of(value)}")
    return value


@parser("mapping; as text, a JSON object", type="object")
def mapping(value: object) -> FrozenDict:
    result = frozen(_object(value))
    assert isinstance(result, FrozenDict)
    return result


def _environment_value(name: str, value: object) -> str:
    if isinstance(value, bool):
        raise ValueError(f"{name}: YAML reads this as {value}; write it in quotes as the program wants it ('1', 'true')")
    if isinstance(value, int | float):
        return str(value)
    try:
        return string_of(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@parser("mapping of names to text", type="object", additionalProperties={"type": ["string", "number"]})
def env_mapping(value: object) -> FrozenDict:
    found = _object(value)
    for name in found:
        if not isinstance(name, str) or not ENVIRONMENT_NAME.fullmatch(name):
            raise ValueError(f"{shown(name)} is not a name of an environment variable")
    return FrozenDict({name: _environment_value(name, item) for name, item in found.items()})


@parser("MiB, or auto", anyOf=[{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^(auto|[0-9]+)$"}])
def mib_or_auto(value: object) -> str:
    if isinstance(value, str) and value.lower() == "auto":
        return "auto"
    try:
        return str(integer(low=0)(value))
    except ValueError:
        raise ValueError(f"must be auto or a whole number of MiB, not {shown(value)}") from None


def gib_to_mib(value: str) -> str:
    """Text in GiB to text in MiB, for an alias whose unit differs."""
    return str(round(_to_number(value) * 1024))


_GPU = re.compile(r"0|[1-9][0-9]{0,3}|(GPU|MIG)-[0-9A-Za-z][0-9A-Za-z/-]{0,99}", re.ASCII)


def _gpu_list(items: list[Any]) -> tuple[str, ...]:
    tokens = [str(item) if isinstance(item, int) and not isinstance(item, bool) else _one_line(item) for item in items]
    for token in tokens:
        if not _GPU.fullmatch(token):
            raise ValueError(f"has {shown(token)}, which is no index, GPU-... or MIG-... id")
    if len(set(tokens)) != len(tokens):
        raise ValueError("names a GPU twice")
    return tuple(tokens)


@parser(
    "all, none, a number, or a list of indices and ids",
    anyOf=[{"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": ["string", "integer"]}}],
)
def gpus(value: object) -> str | int | tuple[str, ...]:
    if isinstance(value, str) and value.lower() in ("all", "none"):
        return value.lower()
    if isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"[0-9]+", value, re.ASCII)):
        count = int(integer(high=1024)(value))
        if count < 1:
            raise ValueError("must be at least 1; write none for an instance without GPUs")
        return count
    items = value if isinstance(value, list | tuple) else [item.strip() for item in string_of(value).split(",")]
    found = _gpu_list([item for item in items if item != ""])
    if not found:
        raise ValueError("is an empty list; write none for an instance without GPUs")
    return found


def as_gpu_list(value: str) -> str:
    """VLLM_GPU_DEVICES holds indices: its 1 is GPU 1, where our 1 is any one GPU."""
    return f"{value}," if value.isdecimal() else value
