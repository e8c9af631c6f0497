"""Man pages from markdown: as much of it as the pages in docs/ use. Headings, paragraphs, lists, tables, code, `words`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_INLINE = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<bold>[^*]+)\*\*|\[(?P<text>[^\]]+)\]\((?P<link>[^)]+)\)")
_ITEM = re.compile(r"(?P<mark>-|\d+\.) +(?P<text>.*)")


def escaped(text: str) -> str:
    """A line that begins with a dot or a quote would be a request. Not everything that shows a page takes it for UTF-8."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga").replace("^", "\\(ha").replace("~", "\\(ti")
    text = "".join(each if each.isascii() else f"\\[u{ord(each):04X}]" for each in text)
    return f"\\&{text}" if text.startswith(".") else text


def inline(text: str) -> str:
    parts, end = [], 0
    for match in _INLINE.finditer(text):
        parts.append(escaped(text[end : match.start()]))
        bold = match["code"] or match["bold"]
        parts.append(f"\\fB{escaped(bold)}\\fR" if bold else escaped(match["text"]))
        end = match.end()
    joined = "".join([*parts, escaped(text[end:])])
    return f"\\&{joined}" if joined.startswith(("\\(aq", ".")) else joined


def title(name: str, section: int, summary: str, date: str, version: str) -> str:
    head = f'.TH {name.upper()} {section} "{date}" "vllmd {version}" "vllmd"'
    return f".\\\" Made by the package's build.\n{head}\n.nh\n.ad l\n.SH NAME\n{escaped(name)} \\- {escaped(summary)}\n"


def heading(text: str) -> str:
    return f".SH {escaped(text.upper())}\n"


def term(name: str, text: str) -> str:
    return f".TP\n{name}\n{text or '.'}\n" if text else f".TP\n{name}\n"


def code(lines: Iterable[str]) -> str:
    body = "\n".join(f"\\&{escaped(line)}" if line else "" for line in lines)
    return f".PP\n.RS 4\n.nf\n{body}\n.fi\n.RE\n"


def markdown(text: str) -> str:
    """The whole page, without its first heading and its comments."""
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    return "".join(_block(block) for block in _blocks(text.splitlines()))


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines that belong together: until a blank line, save in fenced and in indented code."""
    block: list[str] = []
    fenced = False
    for line in [*lines, ""]:
        if line.startswith("```"):
            fenced = not fenced
        indented = bool(block) and block[0].startswith("    ") and line.startswith("    ")
        if line.strip() == "" and not fenced and not indented:
            if block:
                yield block
            block = []
        else:
            block.append(line)


def _block(block: list[str]) -> str:
    first = block[0]
    if first.startswith("```"):
        return code(line for line in block[1:] if not line.startswith("```"))
    if first.startswith("    "):
        return code(line[4:] for line in block)
    if first.startswith("#"):
        rest = _block(block[1:]) if block[1:] else ""
        return _heading(first) + rest
    if first.startswith("|"):
        return _table(block)
    if _ITEM.match(first):
        return "".join(_items(block))
    return f".PP\n{inline(' '.join(line.strip() for line in block))}\n"


def _heading(line: str) -> str:
    marks, _, text = line.partition(" ")
    return "" if marks == "#" else heading(text) if marks == "##" else f".SS {escaped(text)}\n"


def _items(block: list[str]) -> Iterator[str]:
    item: list[str] = []
    mark = ""
    for line in block:
        found = _ITEM.match(line)
        if found:
            if item:
                yield _item(mark, item)
            mark, item = found["mark"], [found["text"]]
        else:
            item.append(line.strip())
    yield _item(mark, item)


def _item(mark: str, lines: list[str]) -> str:
    bullet = "\\(bu" if mark == "-" else mark
    return f".IP {bullet} 4\n{inline(' '.join(lines))}\n"


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def _table(block: list[str]) -> str:
    """The first column is what a person looks for; the last explains it; between them stands what it takes."""
    names, rows = _cells(block[0]), [_cells(line) for line in block[2:]]
    return "".join(_row(names, row) for row in rows)


def _row(names: list[str], row: list[str]) -> str:
    between = [f"{escaped(name)}: {inline(cell)}" for name, cell in zip(names[1:-1], row[1:-1], strict=False) if cell]
    text = inline(row[-1]) + "".join(f"\n.br\n{line}" for line in between)
    return term(inline(row[0]), text)
