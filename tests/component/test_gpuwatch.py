"""What an instance does about findings on GPUs: whose they are, what they are, and what is only watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.config.paths import Paths, root_paths
from vllmd.config.settings import Watch
from vllmd.core import events as ev
from vllmd.core.gpu_findings import Finding, of_xid
from vllmd.gpu import quarantine
from vllmd.instance.gpuwatch import GpuWatch
from vllmd.instance.judging import Judge
from vllmd.instance.vitals import Vitals

pytestmark = pytest.mark.component

OURS, OTHER = "GPU-00000000-aaaa", "GPU-11111111-bbbb"
OUR_PID, OTHER_PID = 101, 202


class Journal:
    def __init__(self) -> None:
        self.entries: list[tuple[str, str, dict[str, Any]]] = []

    def event(self, kind: str, text: str, **fields: Any) -> None:
        self.entries.append((kind, text, fields))


class Client:
    """Says what it was given, and then nothing for ever."""

    def __init__(self, *said: Finding | dict[str, Any]) -> None:
        self._said = said
        self.all_said = asyncio.Event()
        self.is_closed = False

    async def stream(self) -> AsyncIterator[Finding | dict[str, Any]]:
        for each in self._said:
            yield each
        self.all_said.set()
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.is_closed = True


class Watched:
    """One run of the watch over `said`."""

    def __init__(self, paths: Paths, *said: Finding | dict[str, Any], uuids: tuple[str, ...] = (OURS,), pids: tuple[int, ...] = (OUR_PID,), **watch: Any) -> None:
        self.journal, self.vitals, self.posted = Journal(), Vitals(), list[ev.Event]()
        self.paths, self._said, self._uuids, self._settings = paths, said, uuids, Watch(**watch)
        self.family: Any = SimpleNamespace(pids=lambda: pids)
        self.client: Any = Client

    def run(self) -> Watched:
        asyncio.run(self._run())
        return self

    async def _run(self) -> None:
        client = self.client(*self._said)
        judge = Judge(self.journal, self.vitals, self.posted.append, lambda: self._settings)  # type: ignore[arg-type]
        gpus: Any = SimpleNamespace(uuids=self._uuids)
        watch = GpuWatch(
            self.paths, gpus, self.family, judge=judge, vitals=self.vitals, journal=self.journal, settings=lambda: self._settings, client=client  # type: ignore[arg-type]
        )
        task = asyncio.create_task(watch.run())
        done = asyncio.create_task(client.all_said.wait())
        async with asyncio.timeout(10):
            await asyncio.wait([task, done], return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        task.cancel()
        await asyncio.gather(task, done, return_exceptions=True)
        assert client.is_closed or not self._uuids

    @property
    def failures(self) -> list[tuple[str, int]]:
        return [(event.failure.code, event.failure.status) for event in self.posted if isinstance(event, ev.VerdictReached)]

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.journal.entries]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return root_paths(tmp_path)


def test_an_error_of_our_own_work_restarts_the_engine(paths: Paths) -> None:
    watched = Watched(paths, of_xid(31, uuid=OURS, pid=OUR_PID)).run()
    assert watched.failures == [("gpu_xid", 70)]
    assert watched.kinds == ["gpu-verdict"]
    assert watched.vitals.verdicts["gpu_xid", "acted"] == 1
    assert quarantine.read(paths) == {}


@pytest.mark.parametrize(
    "finding", [of_xid(31, uuid=OURS, pid=OTHER_PID), of_xid(79, uuid=OTHER), of_xid(31, uuid=OTHER, pid=OUR_PID), of_xid(79)], ids=["pid", "uuid", "gpu", "nobody"]
)
def test_what_is_another_process_s_or_another_gpu_s_is_nothing_to_us(paths: Paths, finding: Finding) -> None:
    watched = Watched(paths, finding).run()
    assert (watched.failures, watched.kinds) == ([], [])
    assert quarantine.read(paths) == {}


def test_a_process_of_ours_that_the_error_has_ended_is_still_ours(paths: Paths) -> None:
    """The kernel's line can come after the process has gone."""
    pids = [(OUR_PID,), ()]
    watched = Watched(paths, {"gpus": []}, of_xid(31, uuid=OURS, pid=OUR_PID))
    watched.family = SimpleNamespace(pids=lambda: pids.pop(0) if pids else ())

    class Late(Client):
        async def stream(self) -> AsyncIterator[Finding | dict[str, Any]]:
            while pids[:1] == [(OUR_PID,)]:
                await asyncio.sleep(0.01)
            async for each in super().stream():
                yield each

    watched.client = Late
    watched.run()
    assert watched.failures == [("gpu_xid", 70)]


def test_a_lost_gpu_is_quarantined_and_forbids_the_restart(paths: Paths) -> None:
    watched = Watched(paths, of_xid(79, uuid=OURS, at=1000.0)).run()
    assert watched.failures == [("gpu_lost", 69)]
    record = quarantine.read(paths)[OURS]
    assert (record.cls, record.xid, record.count) == ("reboot", 79, 1)


def test_a_gpu_that_needs_a_reset_is_quarantined(paths: Paths) -> None:
    watched = Watched(paths, of_xid(119, uuid=OURS, at=1000.0)).run()
    assert watched.failures == [("gpu_quarantined", 69)]
    assert quarantine.read(paths)[OURS].cls == "reset"


def test_what_the_host_service_has_just_recorded_is_not_counted_twice(paths: Paths) -> None:
    finding = of_xid(79, uuid=OURS, at=1000.0)
    quarantine.add(paths, quarantine.Record(OURS, "reboot", 79, finding.what, finding.hint, last_at=999.5))
    Watched(paths, finding).run()
    assert quarantine.read(paths)[OURS].count == 1


def test_a_detector_that_only_observes_ends_nothing_and_records_nothing(paths: Paths) -> None:
    watched = Watched(paths, of_xid(79, uuid=OURS), of_xid(31, uuid=OURS, pid=OUR_PID), observe=("gpu_lost", "gpu_xid")).run()
    assert watched.failures == []
    assert watched.kinds == ["would-act", "would-act"]
    assert watched.vitals.verdicts == {("gpu_lost", "observed"): 1, ("gpu_xid", "observed"): 1}
    assert quarantine.read(paths) == {}


def test_a_warning_is_journalled_once_and_ends_nothing(paths: Paths) -> None:
    watched = Watched(paths, of_xid(63, uuid=OURS)).run()
    assert watched.failures == []
    [(kind, text, fields)] = watched.journal.entries
    assert (kind, fields["xid"], fields["detector"]) == ("gpu-trouble", 63, "gpu_xid")
    assert OURS[:12] in text


def test_a_quarantine_that_cannot_be_written_ends_the_engine_all_the_same(paths: Paths) -> None:
    paths.state.mkdir(parents=True)
    (paths.state / "gpus").write_text("in the way")
    watched = Watched(paths, of_xid(79, uuid=OURS)).run()
    assert watched.failures == [("gpu_lost", 69)]
    assert "could not be written" in watched.journal.entries[0][1]


def test_the_latest_snapshot_is_kept_for_the_metrics(paths: Paths) -> None:
    assert Watched(paths, {"at": 1}, {"at": 2}).run().vitals.gpus == {"at": 2}


def test_without_a_gpu_nobody_is_asked(paths: Paths) -> None:
    watched = Watched(paths, of_xid(79, uuid=OURS), uuids=()).run()
    assert (watched.failures, watched.vitals.gpus) == ([], None)
