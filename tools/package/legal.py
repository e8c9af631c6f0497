"""debian/copyright in its machine-readable form: the project's licence, and that of each vendored distribution."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from email.message import Message
from email.parser import Parser
from pathlib import Path

_HEAD = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: vllmd
Comment: The Python distributions below usr/lib/vllmd are those of their publishers, unchanged but for what is left out.
 The whole text of each licence lies beside the modules, in NAME.dist-info.

Files: *
Copyright: {year} the authors of vllmd
License: Apache-2.0
"""
_APACHE = """
License: Apache-2.0
 On Debian systems, the full text of the Apache License 2.0 is in /usr/share/common-licenses/Apache-2.0.
"""
_CLASSIFIER = re.compile(r"License :: (?:OSI Approved :: )?(.+)")
_TEXT = re.compile(r"(?i)licen[cs]e|copying|notice")


def write(target: Path, site: Path, epoch: int) -> None:
    head = _HEAD.format(year=datetime.fromtimestamp(epoch, UTC).year)
    target.write_text(head + "".join(_stanza(info) for info in sorted(site.glob("*.dist-info"))) + _APACHE)


def _stanza(info: Path) -> str:
    told = Parser().parsestr((info / "METADATA").read_text())
    modules = sorted({path.parts[len(info.parent.parts)] for path in _modules(info)}) or [info.name]
    files = " ".join(f"usr/lib/vllmd/*/{name}" for name in modules)
    author = told.get("Author") or told.get("Author-email") or told.get("Maintainer-email") or f"the authors of {told['Name']}"
    texts = ", ".join(str(path.relative_to(info.parent)) for path in sorted(info.rglob("*")) if path.is_file() and _TEXT.search(path.name)) or "METADATA alone names it"
    name = f"{told['Name']}-license"
    return f"\nFiles: {files}\nCopyright: {' '.join(author.split())}\nLicense: {name}\n\nLicense: {name}\n {licence_of(told)}; text: {texts}\n"


def _modules(info: Path) -> Iterator[Path]:
    """A wheel says its top-level names in files that not every builder writes."""
    listed = info / "top_level.txt"
    names = listed.read_text().split() if listed.exists() else [info.name.split("-")[0]]
    yield from (info.parent / name for name in names)
    yield info


def licence_of(told: Message) -> str:
    expression = told.get("License-Expression")
    classified = [match[1] for each in told.get_all("Classifier", []) if (match := _CLASSIFIER.fullmatch(each))]
    short = (told.get("License") or "").strip().splitlines()[:1]
    return expression or ", ".join(classified) or (short[0] if short else "see its text")
