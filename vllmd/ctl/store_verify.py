"""`vllmctl store verify`: every byte, against the sums that the store has."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllmd.ctl.progress import Shown, progress
from vllmd.ctl.store import Place
from vllmd.ctl.store_chosen import changing, look, named, permitted, shown
from vllmd.ctl.store_remove import describe
from vllmd.errors import ModelInvalid, UsageError
from vllmd.models import amounts, audit, published
from vllmd.models.audit import Expected
from vllmd.models.catalog import HUB_KIND, PUBLISHED_KIND, Item
from vllmd.system.owner import as_owner


@dataclass(frozen=True, slots=True)
class Wrong:
    """`name` is a file of the item; `reason` follows on its path."""

    path: Path
    reason: str
    hint: str


def verify(place: Place, names: Sequence[str], *, everything: bool) -> int:
    """ModelInvalid (65) where a file is wrong, after all were read; then its version is not offered any more."""
    found = look(place)
    if everything and names:
        raise UsageError("usage", "--all verifies what ids name too", "give either")
    everything = not names
    items = list(found.items) if everything else list({item.directory: item for name in names for item in named(found, name, None)}.values())
    wrong: list[Wrong] = []
    with permitted(place, "verify"):
        verifiable = [(item, expected) for item in items if (expected := _expected(item, is_named=not everything)) is not None]
        for item, expected in verifiable:
            wrong += _verify(place, item, expected)
    if everything and not verifiable:
        sys.stdout.write(f"there is nothing in {place.store} that sums speak for\n")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelInvalid("model_corrupt", f"{shown(str(wrong[0].path))}: {wrong[0].reason}{more}", wrong[0].hint)
    return 0


def _hint(item: Item) -> str:
    disk = "`journalctl -k -p err` shows a disk that fails."
    if item.kind == PUBLISHED_KIND:
        return f"The next start fetches it anew where a source has it; {disk}"
    if item.kind == HUB_KIND:
        return f"vllmctl store rm {shown(item.identity)}: the next start fetches it anew; {disk}"
    return f"Put the file there again; {disk}"


def _expected(item: Item, *, is_named: bool) -> Expected | None:
    expected = audit.expected(item)
    if expected is None and is_named:
        sys.stdout.write(f"{_called(item)}: no sums speak for it\n")
    return expected


def _verify(place: Place, item: Item, expected: Expected) -> list[Wrong]:
    began = time.monotonic()
    with progress(shown(item.identity)) as show:

        def report(done: int, total: int) -> None:
            show(Shown("verify", done / total if total else None, f"{amounts.size(done)} of {amounts.size(total)}"))

        wrong = audit.differences(expected, report)
    if item.kind == PUBLISHED_KIND:
        _remember(place, item, wrong)
    for name, reason in wrong.items():
        sys.stdout.write(f"{_called(item)}: {shown(name)} {reason}\n")
    if not wrong:
        sys.stdout.write(f"{_called(item)}: {_summary(expected, time.monotonic() - began)}\n")
    return [Wrong(expected.directory / name, reason, _hint(item)) for name, reason in wrong.items()]


def _remember(place: Place, item: Item, wrong: Mapping[str, str]) -> None:
    if wrong:
        try:
            with as_owner(place.store):
                published.mark_damaged(item.directory, wrong)
        except OSError as error:
            sys.stderr.write(f"{_called(item)} could not be marked as damaged: {error.strerror}\n")
    elif item.damaged:
        with changing(place, "write"):
            published.forget_damage(item.directory)
        sys.stdout.write(f"{_called(item)}: was marked as damaged; every byte of it is right now\n")


def _called(item: Item) -> str:
    return shown(item.identity) if item.kind not in (PUBLISHED_KIND, HUB_KIND) else describe(item)


def _summary(expected: Expected, seconds: float) -> str:
    total = sum(file.size for file in expected.files)
    return f"{amounts.files(len(expected.files))}, {amounts.size(total)} verified, {total / 1e9 / max(seconds, 1e-6):.1f} GB/s"
