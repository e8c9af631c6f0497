"""The watch over a ready engine: its /health, every few seconds; only explicit refusals count (core/health)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllmd.config.settings import Watch
from vllmd.core.health import Refusals
from vllmd.errors import EngineFailed
from vllmd.instance.probing import Probe
from vllmd.system.http import request


async def watch(probe: Probe, settings: Callable[[], Watch]) -> EngineFailed:
    """Returns the verdict, when there is one. `settings` is asked at each turn, so that a reload applies."""
    refusals = Refusals(limit=settings().failures)
    while not refusals.reached:
        now = settings()
        # After a refusal look again soon: a dead engine says 503 within 0.3 s, and each turn would cost a whole interval.
        await asyncio.sleep(min(now.interval_s, 1.0) if refusals.count else now.interval_s)
        answer = await request(probe.endpoint, "GET", probe.health_path, timeout_s=now.request_timeout_s)
        listening = answer.outcome != "refused" or any(map(probe.is_ours, probe.listeners(probe.endpoint)))
        refusals = refusals.after(answer.outcome, answer.status, listening=listening)
    kind = "503 on /health" if refusals.kind == "503" else "connection refused, and the listener is gone"
    what = f"the engine refuses: {refusals.count} times in a row {kind}"
    return EngineFailed("engine_unhealthy", what, "the engine's own lines in the journal say why")
