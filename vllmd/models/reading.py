"""Reads the files of a model that are to be verified, and says how far it is and how fast."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllmd.models import amounts
from vllmd.models.hashing import Digest, Manner, hash_files
from vllmd.models.inventory import Inventory, ModelFile, invalid, take
from vllmd.models.progress import Progress

Report = Callable[[Progress], None]
WINDOW = 10
"""Reports, half a second each, over which the rate is taken."""


@dataclass(slots=True)
class Speaker:
    """From (done, total) to events with rate and time left."""

    source: str
    report: Report
    seen: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.seen.append((now, done))
        since, before = self.seen[0]
        rate = int((done - before) / (now - since)) if now > since else 0
        eta = round((total - done) / rate) if rate > 0 else -1
        text = f"verifying {amounts.progress(done, total, rate, eta)}"
        self.report(Progress("verify", self.source, done, total, text, bytes_per_s=rate, eta_s=eta))


def read(inventory: Inventory, wanted: Mapping[ModelFile, frozenset[str]], source: str, report: Report, manner: Manner) -> dict[str, Digest]:
    """What hash_files says, of a model that did not change meanwhile. ModelInvalid."""
    digests = hash_files(inventory.directory, wanted, Speaker(source, report), manner)
    if take(inventory.directory).files != inventory.files:
        raise invalid(inventory.directory, "was changed while it was verified", "Wait until it is complete, then start again.")
    return digests
