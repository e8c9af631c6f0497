"""The file of metrics while it is written and removed at once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pytest

from tests import procs
from vllmd.config.settings import Metrics
from vllmd.system import files, publishing
from vllmd.system.publishing import Publisher
from vllmd.system.terminal import Stderr


def test_a_write_that_the_end_overtakes_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor ended in the very moment in which the file was written: it was written again behind its removal, and told
    for ever that all is well."""
    begun, go_on, written = threading.Event(), threading.Event(), threading.Event()

    def slow(path: Path, content: bytes, *, fsync: bool) -> None:
        begun.set()
        assert go_on.wait(10)
        files.write_atomic(path, content, fsync=fsync)
        written.set()

    monkeypatch.setattr(publishing, "write_atomic", slow)

    async def scenario() -> None:
        publisher = Publisher("vllmd-demo.prom", lambda: ("text/plain", b"up 1\n"), journal)
        publisher.apply(Metrics(textfile=str(tmp_path)))
        await asyncio.to_thread(begun.wait, 10)
        closing = asyncio.create_task(publisher.close())
        await asyncio.sleep(0)  # the cancelled write is abandoned; its thread still stands before the rename
        asyncio.get_running_loop().call_later(0.1, go_on.set)
        await closing

    with contextlib.closing(Stderr({})) as journal:
        asyncio.run(scenario())
    assert written.wait(10)
    procs.wait_until("the removal", lambda: list(tmp_path.iterdir()) == [], 5)
