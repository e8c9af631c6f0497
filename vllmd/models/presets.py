"""The presets: YAML files that come with vllmd, and an administrator's own, which replace those of the same name.

A file that is not right is told with its line, and takes nobody else away; one that would have replaced another does not let that
one come back, since the administrator did not mean it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllmd
from vllmd.config import yamlfile
from vllmd.config.paths import Paths
from vllmd.config.values import kind_of, shown
from vllmd.config.yamlfile import Document
from vllmd.core import tiers
from vllmd.core.preset_choice import SIZES, Draft, Preset, Variant
from vllmd.core.tiers import TIERS
from vllmd.errors import ConfigError, VllmdError

FOLDER, TEMPLATES = "presets", "chat-templates"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
KEYS = ("title", "about", "order", "tiers")
VARIANT_KEYS = ("model", "revision", "min_gib", "min_capability", "context", "gpus", "serve", "args", "env", "chat_template", "draft")
_LARGE = 1 << 24


@dataclass(frozen=True, slots=True)
class Presets:
    """In the order in which they are offered; and the files that are not right, by the name that their preset would have."""

    good: tuple[Preset, ...]
    bad: Mapping[str, VllmdError]

    def get(self, name: str) -> Preset | None:
        return next((preset for preset in self.good if preset.id == name), None)


def shared() -> Path:
    """Where what is shipped lies: beside the program in a checkout, else where `make install` or a package put it."""
    places = (Path(vllmd.__file__).parent.parent / "share", Path("/usr/local/share/vllmd"), Path("/usr/share/vllmd"))
    return next((place for place in places if (place / FOLDER).is_dir()), places[-1])


def folders(paths: Paths) -> tuple[Path, ...]:
    """The shipped ones, then the administrator's."""
    return (shared() / FOLDER, paths.config / FOLDER)


def read(paths: Paths) -> Presets:
    return read_from(folders(paths))


def read_from(places: Iterable[Path]) -> Presets:
    files: dict[str, Path] = {}
    bad: dict[str, VllmdError] = {}
    for place in places:
        try:
            files |= {path.stem: path for path in sorted(place.iterdir()) if path.suffix == ".yaml" and not path.name.startswith(".")}
        except FileNotFoundError:
            continue
        except OSError as error:
            bad[str(place)] = ConfigError("presets_unreadable", f"{place}: {error.strerror}", f"let everybody read it: chmod a+rx {place}")
    good = []
    for name, path in files.items():
        try:
            good.append(parse(name, yamlfile.load(path)))
        except VllmdError as error:
            bad[name] = error
        except FileNotFoundError:
            bad[name] = ConfigError("preset_unreadable", f"{path} is a link that leads nowhere", "correct the link, or remove it")
    return Presets(tuple(sorted(good, key=lambda preset: (preset.order, preset.id))), bad)


# -- one file


def parse(name: str, document: Document) -> Preset:
    """ConfigError (preset_invalid) with file, line and key."""
    reader = _Reader(document)
    if not _NAME.fullmatch(name):
        raise reader.bad((), f"{name!r:.80} cannot be the name of a preset", "name the file in lower-case letters, digits, '.', '_' and '-'")
    reader.known((), KEYS)
    given = reader.mapping(("tiers",))
    reader.known(("tiers",), tuple(TIERS))
    if not given:
        raise reader.bad(("tiers",), "names no tier", f"one or more of {', '.join(TIERS)}")
    whole = {tier: _variant(reader, ("tiers", tier)) for tier, value in given.items() if not isinstance(value, str)}
    return Preset(
        id=name,
        title=reader.text(("title",), default=name),
        about=reader.text(("about",), default=""),
        order=reader.number(("order",), default=1000, low=0),
        variants={tier: whole[tier] if tier in whole else _same(reader, tier, str(value), whole) for tier, value in given.items()},
        where=document.where,
    )


def _same(reader: _Reader, tier: str, other: str, whole: Mapping[str, Variant]) -> Variant:
    if other not in whole:
        raise reader.bad(("tiers", tier), f"is the same as {other!r:.40}, which is not described here", f"name one of {', '.join(whole) or 'the tiers'}, or describe it")
    return whole[other]


def _variant(reader: _Reader, at: tuple[str, ...]) -> Variant:
    reader.mapping(at)
    reader.known(at, VARIANT_KEYS)
    return Variant(
        model=reader.checked((*at, "model"), _hub_id, required=True),
        min_gib=reader.number((*at, "min_gib"), low=1),
        revision=reader.text((*at, "revision"), default=""),
        context=_context(reader, (*at, "context")),
        sizes=_sizes(reader, (*at, "gpus")),
        min_capability=reader.checked((*at, "min_capability"), _capability) or (0, 0),
        serve=reader.mapping((*at, "serve")),
        args=reader.mapping((*at, "args")),
        env={key: reader.checked((*at, "env", key), _variable, required=True) for key in reader.mapping((*at, "env"))},
        templates=tuple(reader.checked((*at, "chat_template"), _names) or ()),
        draft=_draft(reader, (*at, "draft")),
    )


def _context(reader: _Reader, at: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    steps = []
    for gib in reader.mapping(at):
        if not gib.isascii() or not gib.isdigit():
            raise reader.bad((*at, gib), f"{gib!r:.40} is no number of GiB", "write GIB: TOKENS, as in {32: 65536, 80: 131072}")
        steps.append((int(gib), reader.number((*at, gib), low=1)))
    for (less, short), (more, long) in zip(sorted(steps), sorted(steps)[1:], strict=False):
        if short > long:
            raise reader.bad((*at, str(more)), f"{more} GiB give fewer tokens than {less}", "let the tokens grow with the memory")
    return tuple(sorted(steps))


def _sizes(reader: _Reader, at: tuple[str, ...]) -> tuple[int, ...]:
    found = reader.checked(at, _counts)
    return SIZES if found is None else tuple(sorted(set(found)))


def _draft(reader: _Reader, at: tuple[str, ...]) -> Draft | None:
    if not reader.mapping(at):
        return None
    reader.known(at, ("model", "method", "tokens"))
    return Draft(reader.checked((*at, "model"), _hub_id, required=True), reader.text((*at, "method")), reader.number((*at, "tokens"), low=1))


def _hub_id(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", value, re.ASCII):
        raise ValueError(f"must be ORG/NAME, not {shown(value)}")
    return value


def _variable(value: object) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"must be text, and YAML reads it as {shown(value)}: write it in quotes")
    return str(value)


def _capability(value: object) -> tuple[int, int]:
    found = tiers.numbers(str(value))
    if found == (0, 0):
        raise ValueError(f"must be a compute capability, as \"7.5\", not {shown(value)}")
    return found


def _names(value: object) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(each, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.jinja", each, re.ASCII) for each in names):
        raise ValueError(f"must be the name of a file *.jinja, or a list of such, not {shown(value)}")
    return names


def _counts(value: object) -> list[int]:
    if not isinstance(value, list) or not value or not all(isinstance(each, int) and not isinstance(each, bool) and 0 < each <= 64 for each in value):
        raise ValueError(f"must be a list of numbers of GPUs, as [1, 2, 4], not {shown(value)}")
    return value


@dataclass(frozen=True, slots=True)
class _Reader:
    """Values at paths into a document, or a ConfigError with the place."""

    document: Document

    def bad(self, at: tuple[str, ...], reason: str, hint: str) -> ConfigError:
        key = f"{'.'.join(at)}: " if at else ""
        return ConfigError("preset_invalid", f"{self.document.where}:{self.document.line(*at)}: {key}{reason}", hint)

    def at(self, at: tuple[str, ...]) -> Any:
        value: Any = self.document.values
        for key in at:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def known(self, at: tuple[str, ...], keys: tuple[str, ...]) -> None:
        import difflib  # needed for errors only

        for key in self.mapping(at):
            if key not in keys:
                near = difflib.get_close_matches(key, keys, n=1)
                raise self.bad((*at, key), "unknown key", f"did you mean {near[0]}?" if near else f"known are {', '.join(keys)}")

    def mapping(self, at: tuple[str, ...]) -> Mapping[str, Any]:
        value = self.at(at)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.bad(at, f"must be a mapping, not {kind_of(value)}", "write KEY: VALUE below it")
        return value

    def checked(self, at: tuple[str, ...], parse: Callable[[object], Any], *, required: bool = False) -> Any:
        """None where it is not given."""
        value = self.at(at)
        if value is None and not required:
            return None
        if value is None:
            raise self.bad(at, "is missing", "docs/choosing.md shows a whole preset")
        try:
            return parse(value)
        except ValueError as error:
            raise self.bad(at, str(error), "docs/choosing.md shows a whole preset") from None

    def text(self, at: tuple[str, ...], *, default: str | None = None) -> str:
        def one_line(value: object) -> str:
            if not isinstance(value, str) or not value.isprintable() or len(value) > 200:
                raise ValueError(f"must be one line of text, not {shown(value)}")
            return value

        found = self.checked(at, one_line, required=default is None)
        return default or "" if found is None else str(found)

    def number(self, at: tuple[str, ...], *, low: int, default: int | None = None) -> int:
        def whole(value: object) -> int:
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= _LARGE:
                raise ValueError(f"must be a whole number from {low} on, not {shown(value)}")
            return value

        found = self.checked(at, whole, required=default is None)
        return default or 0 if found is None else int(found)
