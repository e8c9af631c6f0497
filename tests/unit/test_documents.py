"""What the documents name is there: pages, headings, commands with their flags, settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.package.commands import Command, commands
from tools.package.wheels import CHECKOUT
from vllmd.config.rows import table
from vllmd.engines.vllm_tuning import Tuning

pytestmark = pytest.mark.unit

PAGES = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]+\]\((?P<to>[^)\s]+)\)")
CODE = re.compile(r"`(?P<span>[^`\n]+)`|^ {4}(?:\$ )?(?:sudo )?(?P<line>vllm(?:ctl|d) .*)$", re.MULTILINE)
END = re.compile(r" \||;|&&|#| -- | \[|\)|\.\.\.")
"""Where a command line ends, or stops being one: the placeholders of a table."""
KNOWN = {command.words[0]: command for command in commands()}


def ident(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def anchors(page: Path) -> set[str]:
    """Of each heading, as forges make them."""
    heads = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"(?ms)^```.*?^```|`[^`\n]+`", "", page.read_text())
    return (found["to"] for found in LINK.finditer(text) if "://" not in found["to"])


@pytest.mark.parametrize("page", PAGES, ids=ident)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_found_from_the_first() -> None:
    """By links, or by name, as in the table of another page."""
    seen: set[Path] = set()
    left = [CHECKOUT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        named = re.findall(r"(?<![\w/])(?:docs/)?[\w.-]+\.md\b", page.read_text())
        left += [each for each in ((page.parent / name) for name in [*links(page), *named]) if each.is_file() and each.resolve() not in seen]
        left = [each.resolve() for each in left]
    assert [ident(page) for page in PAGES if page not in seen] == []


def spoken() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each command line of ours; `a|b` is two of them."""
    for page in PAGES:
        for found in CODE.finditer(page.read_text()):
            text = END.split(found["span"] or found["line"] or "")[0].strip().removeprefix("sudo ")
            if re.match(r"vllm(ctl|d) -?[a-z]", text):
                words = [word.split("|") for word in text.replace("\\|", "|").split()]
                yield from ((ident(page), list(line)) for line in itertools.product(*words))


def resolved(words: list[str]) -> tuple[Command, list[str]]:
    """The verb that the words reach, and those that it does not take for a verb."""
    at, rest = KNOWN[words[0]], words[1:]
    while rest and rest[0] in ("--user", "--root"):
        rest = rest[1 if rest[0] == "--user" else 2 :]
    while rest and (below := next((verb for verb in at.verbs if verb.words[-1] == rest[0]), None)):
        at, rest = below, rest[1:]
    return at, rest


def test_commands_and_flags_that_are_named_exist() -> None:
    count = 0
    for page, words in spoken():
        verb, rest = resolved(words)
        assert len(verb.words) > 1 or rest == [] or rest[0].startswith("-"), f"{page}: {' '.join(words)}"
        known = {flag for each in (KNOWN[words[0]], verb) for option in each.options for flag in option.flags}
        assert {word for word in rest if word.startswith("--")} <= known, f"{page}: {' '.join(words)}"
        count += 1
    assert count > 100, "the pattern finds them no longer"


def test_settings_that_are_named_exist() -> None:
    keys = set(table(Tuning))
    sections = {key.partition(".")[0] for key in keys}
    files = (".md", ".txt", ".log", ".json", ".sock", ".jinja")
    for page in PAGES:
        if page.name == "json.md":  # whose keys are of other objects
            continue
        for key in re.findall(r"`([a-z]+\.[a-z_0-9]+)(?:`|: )", page.read_text()):
            if key.partition(".")[0] in sections and not key.endswith(files):
                assert key in keys, f"{ident(page)}: {key}"


def test_files_of_the_source_that_are_named_exist() -> None:
    """From the root of the checkout, or of the package, as ARCHITECTURE.md names them."""
    for page in PAGES:
        for name in re.findall(r"(?<![\w/.~*-])((?:[a-z_]+/)+[\w.-]+\.(?:py|sh|toml|catalog|schema\.json))\b", page.read_text()):
            assert any((root / name).exists() for root in (CHECKOUT, CHECKOUT / "vllmd", CHECKOUT / "vllmd/models", page.parent)), f"{ident(page)}: {name}"
