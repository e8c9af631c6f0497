"""What holds for every test: it leaves no child process, zombie, file descriptor or thread behind."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import matrix, procs

# Shared machines stand still now and then; how fast something is, make bench says.
hypothesis.settings.register_profile("vllmd", deadline=None)
hypothesis.settings.load_profile("vllmd")

ALONE = {"alone", "engine"}
PARTS = ("together", "containers", "alone")
"""Markers of tests that need the machine for themselves."""
LEFT_DEADLINE_S = 3.0
"""How long things that are just ending may take."""


def _children() -> dict[int, str]:
    found: dict[int, str] = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                found[int(pid)] = _describe(int(pid))
    return found


def _describe(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        state = stat.rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "gone"
    return f"{'zombie ' if state == 'Z' else ''}{pid} {command or stat.split()[1]}"


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[int(path.name)] = str(path.readlink())
    # the one that listed the directory
    return {fd: target for fd, target in found.items() if not target.startswith(f"/proc/{os.getpid()}/fd")}


def _threads() -> dict[int, str]:
    return {thread.ident or 0: thread.name for thread in threading.enumerate()}


def _left(children: dict[int, str], descriptors: dict[int, str], threads: dict[int, str]) -> list[str]:
    left = [f"child process: {what}" for pid, what in _children().items() if pid not in children]
    left += [f"descriptor {fd}: {what}" for fd, what in _descriptors().items() if descriptors.get(fd) != what]
    left += [f"thread: {name}" for ident, name in _threads().items() if ident not in threads]
    return left


def _end_children(before: dict[int, str]) -> None:
    """So that one bad test does not spoil the others."""
    for pid in set(_children()) - set(before):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture(autouse=True, scope="module")
def adoption_ends_with_the_module() -> Iterator[None]:
    """A fixture of a whole module may adopt orphans before `nothing_left` first looks."""
    yield
    procs.set_adopting(adopting=False)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that leaves a child, zombie, descriptor or thread; there is no way to opt out."""
    before, adopting = (_children(), _descriptors(), _threads()), procs.is_adopting()
    yield
    left = _left(*before)
    deadline = time.monotonic() + LEFT_DEADLINE_S
    while left and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
        left = _left(*before)
    procs.set_adopting(adopting=adopting)
    if left:
        _end_children(before[0])
        pytest.fail(f"{request.node.name} leaves behind:\n  " + "\n  ".join(left), pytrace=False)


def _part(item: pytest.Item) -> str:
    marks = {mark.name for mark in item.iter_markers()}
    return "alone" if marks & ALONE else "containers" if "system" in marks else "together"


def _patience_s(item: pytest.Item) -> float:
    return max((mark.args[0] for mark in item.iter_markers("timeout")), default=0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=PARTS, help="only the tests of this part (tools/test.sh)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if not part:
        return
    chosen = [item for item in items if _part(item) == part]
    config.hook.pytest_deselected(items=[item for item in items if _part(item) != part])
    if part == "containers":  # the longest file first: else one process does it at the end, and the other has nothing to do
        longest = {item.path: max(_patience_s(other) for other in chosen if other.path == item.path) for item in chosen}
        chosen.sort(key=lambda item: -longest[item.path])
    items[:] = chosen


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker process of pytest-xdist hands its rows over to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["matrix"] = [dataclasses.asdict(row) for row in matrix.ROWS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    matrix.ROWS.extend(matrix.Row(**row) for row in getattr(node, "workeroutput", {}).get("matrix", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if matrix.ROWS:
        terminalreporter.section("fault matrix")
        terminalreporter.write_line("\n".join(matrix.table()))
