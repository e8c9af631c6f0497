"""`vllmctl store verify`: every byte, against the sums that the store has."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.ctl_progress import Shown, progress
from vllmd.ctl_store import Place
from vllmd.ctl_store_chosen import look, named, permitted, shown
from vllmd.ctl_store_remove import describe
from vllmd.errors import ModelInvalid, UsageError
from vllmd.models import amounts, audit, published
from vllmd.models.audit import Expected
from vllmd.models.catalog import PUBLISHED_KIND, Item


@dataclass(frozen=True, slots=True)
class Wrong:
    """`name` is a file of the item; `reason` follows on its path."""

    path: Path
    reason: str


def verify(place: Place, names: Iterable[str], *, everything: bool) -> int:
    """ModelInvalid (65) where a file is wrong, after all were read; then its version is not offered any more."""
    found = look(place)
    if everything == bool(names):
        raise UsageError("usage", "give either ids or --all", "vllmctl store verify --help")
    items = list(found.items) if everything else list({item.directory: item for name in names for item in named(found, name, None)}.values())
    wrong: list[Wrong] = []
    with permitted(place, "verify"):
        for item in items:
            wrong += _verify(item, is_named=not everything)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        hint = "The next start fetches it anew where a source has it; `journalctl -k -p err` shows a disk that fails."
        raise ModelInvalid("model_corrupt", f"{shown(str(wrong[0].path))}: {wrong[0].reason}{more}", hint)
    return 0


def _verify(item: Item, *, is_named: bool) -> list[Wrong]:
    expected = audit.expected(item)
    if expected is None:
        if is_named:
            sys.stdout.write(f"{_called(item)}: no sums speak for it\n")
        return []
    began = time.monotonic()
    with progress(shown(item.identity)) as show:

        def report(done: int, total: int) -> None:
            show(Shown("verify", done / total if total else None, f"{amounts.size(done)} of {amounts.size(total)}"))

        wrong = audit.differences(expected, report)
    if item.kind == PUBLISHED_KIND:
        _remember(item, wrong)
    for name, reason in wrong.items():
        sys.stdout.write(f"{_called(item)}: {shown(name)} {reason}\n")
    if not wrong:
        sys.stdout.write(f"{_called(item)}: {_summary(expected, time.monotonic() - began)}\n")
    return [Wrong(expected.directory / name, reason) for name, reason in wrong.items()]


def _remember(item: Item, wrong: Mapping[str, str]) -> None:
    if wrong:
        published.mark_damaged(item.directory, wrong)
    elif item.damaged:
        published.forget_damage(item.directory)
        sys.stdout.write(f"{_called(item)}: was marked as damaged; every byte of it is right now\n")


def _called(item: Item) -> str:
    return shown(item.identity) if item.kind not in (PUBLISHED_KIND, "hub-cache") else describe(item)


def _summary(expected: Expected, seconds: float) -> str:
    total = sum(file.size for file in expected.files)
    return f"{amounts.files(len(expected.files))}, {amounts.size(total)} verified, {total / 1e9 / max(seconds, 1e-6):.1f} GB/s"
