"""What an engine works at, for people: requests, tokens per second and the KV cache, out of two readings of its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllmd.core.pulse import Rank, Sample


@dataclass(frozen=True, slots=True)
class Load:
    """None is what the engine does not say, or cannot be known of one reading. `kv_cache_ratio` is of the fullest rank:
    that one queues, or preempts, first."""

    running: int
    waiting: int
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    kv_cache_ratio: float | None = None


def load_of(before: Sample | None, now: Sample) -> Load:
    """`before`: the last good reading, if there is one."""
    ranks = now.ranks.values()
    used = [rank.kv_used for rank in ranks if rank.kv_used is not None]
    return Load(
        running=round(sum(rank.running for rank in ranks)),
        waiting=round(sum(rank.waiting for rank in ranks)),
        tokens_per_s=_rate(before, now, lambda rank: rank.generated),
        prompt_tokens_per_s=_rate(before, now, lambda rank: rank.prompted),
        kv_cache_ratio=round(min(1.0, max(used)), 3) if used else None,
    )


def _rate(before: Sample | None, now: Sample, counter: Callable[[Rank], float | None]) -> float | None:
    """Of the ranks that both readings show. A counter that began anew says nothing."""
    if before is None or now.at <= before.at:
        return None
    grown = [_growth(before.ranks, name, counter(rank), counter) for name, rank in now.ranks.items() if name in before.ranks]
    known = [each for each in grown if each is not None]
    return round(sum(known) / (now.at - before.at), 1) if known and len(known) == len(grown) else None


def _growth(before: Mapping[str, Rank], name: str, now: float | None, counter: Callable[[Rank], float | None]) -> float | None:
    then = counter(before[name])
    return now - then if now is not None and then is not None and now >= then else None
