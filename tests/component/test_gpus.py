"""The choice under way: two starts that see the same free GPU, and a lease that is kept while memory is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.config.paths import root_paths
from vllmd.config.settings import Preflight, Stop
from vllmd.core.gpu_choice import Device
from vllmd.errors import GpuUnavailable, TryLater
from vllmd.gpu import leases
from vllmd.gpu.leases import Claim, Holder, Leases
from vllmd.instance import gpus as module
from vllmd.instance.gpus import Gpus, Need
from vllmd.preflight import devices
from vllmd.preflight.devices import Seen

pytestmark = pytest.mark.component

UUIDS = [f"GPU-{index:08x}-1111-2222-3333-444455556666" for index in range(3)]


class Journal:
    def __init__(self) -> None:
        self.told: list[str] = []

    def event(self, _kind: str, text: str, **_fields: Any) -> None:
        self.told.append(text)


class Bench:
    """Gpus of an instance on a host whose GPUs are `free` (MiB of 80,000), looked at again and again."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *free: int, gpus: Any = 1, **settings: Any) -> None:
        self.paths = root_paths(root)
        self.free = list(free)
        self.looks = 0
        self.on_look: Callable[[int], None] = lambda _count: None
        self.journal = Journal()
        self.lost: dict[int, str] = {}
        config = SimpleNamespace(gpus=gpus, gpus_shared=False, preflight=Preflight(**{"gpu_wait_s": 5.0, **settings}), stop=Stop(gpu_release_timeout_s=0.1))
        context: Any = SimpleNamespace(config=config, paths=self.paths, instance="me", environ={})
        monkeypatch.setattr(devices, "look", self._look)
        monkeypatch.setattr(module, "POLL_S", 0.01)
        monkeypatch.setattr(module, "replace", lambda _object, **changes: SimpleNamespace(**changes))
        self.gpus = Gpus(context, Need(0.9), self.journal, say=lambda _text: None)  # type: ignore[arg-type]

    def _look(self, _timeout_s: float) -> Seen:
        self.looks += 1
        self.on_look(self.looks)
        found = (Device(index, UUIDS[index], "H100", 80000, free, lost=self.lost.get(index, "")) for index, free in enumerate(self.free))
        return Seen(tuple(found), "nvml")

    def take(self) -> Any:
        return asyncio.run(self.gpus.take()).config.gpus

    def others(self, *indices: int) -> Leases:
        return leases.take(self.paths, [Claim(UUIDS[index]) for index in indices], "other")


def test_who_is_second_takes_the_next_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one leased between our look at the leases and our own."""
    bench = Bench(tmp_path, monkeypatch, 80000, 80000, gpu_wait_s=0)
    held = bench.others(0)
    real, seen = leases.holders, list[Mapping[str, tuple[Holder, ...]]]()

    def late(paths: Any) -> Mapping[str, tuple[Holder, ...]]:
        seen.append({} if not seen else real(paths))
        return seen[-1]

    monkeypatch.setattr(leases, "holders", late)
    try:
        assert bench.take() == (UUIDS[1],)
    finally:
        held.release()
        bench.gpus.release()
    assert len(seen) >= 2


def test_memory_that_was_taken_between_the_choice_and_the_lease_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, 80000, 80000)

    def look(count: int) -> None:
        bench.free[0] = 80000 if count == 1 else 1000

    bench.on_look = look
    assert bench.take() == (UUIDS[1],)
    bench.gpus.release()


def test_a_lease_is_kept_while_the_memory_of_a_list_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, 1000, gpus=("0",))
    kept = list[bool]()

    def look(count: int) -> None:
        if count > 2:
            kept.append(UUIDS[0] in leases.holders(bench.paths))
        if count == 5:
            bench.free[0] = 80000

    bench.on_look = look
    assert bench.take() == (UUIDS[0],)
    assert kept
    assert all(kept)
    assert len([text for text in bench.journal.told if "1000 of 80000" in text]) == 1, "said once, not at each look"
    bench.gpus.release()


def test_what_is_still_taken_at_the_end_of_the_wait_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, 1000, gpus=("0",), gpu_wait_s=0.05)
    with pytest.raises(TryLater, match="1000 of 80000"):
        bench.take()
    assert leases.holders(bench.paths) == {}


def test_a_gpu_that_is_lost_during_the_wait_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, 1000, gpus=("0",), gpu_wait_s=60)
    bench.on_look = lambda count: bench.lost.update({0: "lost"}) if count == 3 else None
    with pytest.raises(GpuUnavailable):
        bench.take()
    bench.gpus.release()
    assert leases.holders(bench.paths) == {}


def test_a_wait_of_no_time_still_looks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, 80000, gpus="all", gpu_wait_s=0)
    asyncio.run(bench.gpus.take())
    assert bench.gpus.uuids == (UUIDS[0],)
    bench.gpus.release()


def test_memory_is_back_when_it_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, 79500, gpus=("0",))
    bench.take()
    bench.free[0] = 20000
    missing = asyncio.run(bench.gpus.returned())
    assert missing is not None
    assert (missing.code, missing.status) == ("gpu_memory_not_back", 75)
    assert "59500 MiB less free" in missing.what
    bench.free[0] = 79500
    bench.take()
    bench.free[0] = 79400
    assert asyncio.run(bench.gpus.returned()) is None
    looks = bench.looks
    assert asyncio.run(bench.gpus.returned()) is None
    assert bench.looks == looks, "nothing was started since: nobody is asked"
    bench.gpus.release()
