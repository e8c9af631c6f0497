"""What an instance and the commands learn about GPUs: from the host unit's gpu.sock, or, where nobody answers there, from a
sampler child of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vllmd.config.paths import Paths
from vllmd.core.gpu_findings import Finding

Snapshot = dict[str, Any]
"""The GPU document (docs/gpu.md): {"schema": 1, "source", "gpus": [...], ...}."""


@dataclass(frozen=True, slots=True)
class Options:
    """`interval_s` between snapshots, `call_timeout_s` until a driver call counts as stuck: settings of gpu_watch."""

    interval_s: float = 5.0
    call_timeout_s: float = 15.0


class Client:
    """One subscription, from `stream` until `close`."""

    def __init__(self, paths: Paths, options: Options | None = None) -> None:
        self.paths = paths
        self.options = options or Options()
        self.source = ""
        """Where it comes from now: 'host' (gpu.sock), 'own' (a child of ours), '' before the first."""

    async def stream(self) -> AsyncIterator[Finding | Snapshot]:
        """For ever, until `close` or cancellation: findings at once, a snapshot every interval. Never raises for what the other
        side does. A consumer that is slow loses snapshots, then findings, the oldest first."""
        raise NotImplementedError
        yield {}  # makes it a generator

    async def close(self) -> None:
        """Idempotent; nothing is left of a child of ours."""


def read_once(paths: Paths, timeout_s: float) -> Snapshot:
    """One snapshot, blocking for `timeout_s` at most: from gpu.sock, else from a sampler child. Where the driver hangs,
    `stuck_in` names the call; where there is no GPU, `source` is 'none'. Never raises."""
    raise NotImplementedError
