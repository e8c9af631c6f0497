"""Starting the engine's main process by way of the launcher, and watching it by pidfd: all with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests import procs
from tests.cgroups import ServiceCgroup
from vllmd.errors import ConfigError, EngineFailed, PermissionMissing
from vllmd.system import process
from vllmd.system.host import start_time
from vllmd.system.process import Child, ExitStatus, SpawnSpec, spawn

pytestmark = pytest.mark.component

PYTHON = sys.executable


LIBC_OWN = 0x180000000
"""Signals 32 and 33: posix_spawn leaves them ignored; the C library of the new program takes them when it needs them."""


def nothing(pid: int, start: int) -> None:
    pass


def python(code: str, *arguments: str, **more: object) -> SpawnSpec:
    return SpawnSpec(argv=(PYTHON, "-I", "-S", "-c", code, *arguments), **more)  # type: ignore[arg-type]


async def read_all(descriptor: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    done = loop.create_future()

    def more() -> None:
        piece = os.read(descriptor, 65536)
        data.extend(piece)
        if not piece:
            loop.remove_reader(descriptor)
            done.set_result(None)

    loop.add_reader(descriptor, more)
    await asyncio.wait_for(done, 20)
    return bytes(data)


def run(spec: SpawnSpec, scenario: Callable[[Child], Awaitable[None]], before_exec: Callable[[int, int], None] = nothing) -> None:
    async def main() -> None:
        child = await spawn(spec, before_exec)
        try:
            await scenario(child)
        finally:
            child.signal(signal.SIGKILL)
            await asyncio.wait_for(child.wait(), 10)
            child.close()
            os.close(child.stdout)
            os.close(child.stderr)

    asyncio.run(main())


def answers(spec: SpawnSpec) -> bytes:
    """What the program prints."""
    found: list[bytes] = []

    async def scenario(child: Child) -> None:
        found.append(await read_all(child.stdout))

    run(spec, scenario)
    return found[0]


def test_output_goes_to_two_pipes_and_the_status_is_told() -> None:
    async def scenario(child: Child) -> None:
        assert await read_all(child.stdout) == b"out\n"
        assert await read_all(child.stderr) == b"err\n"
        status = await asyncio.wait_for(child.wait(), 10)
        assert status == ExitStatus(code=3)
        assert child.exit_status == status
        assert await child.wait() == status
        assert child.signal(signal.SIGTERM) is False

    run(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"), scenario)


def test_a_signal_is_told_by_its_name() -> None:
    async def scenario(child: Child) -> None:
        assert child.exit_status is None
        assert child.signal(signal.SIGTERM)
        status = await asyncio.wait_for(child.wait(), 10)
        assert status.describe() == "killed by SIGTERM"

    run(SpawnSpec(argv=("/bin/sleep", "60")), scenario)
    assert ExitStatus(code=0).describe() == "exit status 0"
    assert ExitStatus(signal=9).describe() == "killed by SIGKILL"
    assert ExitStatus(signal=11, core_dumped=True).describe() == "killed by SIGSEGV (core dumped)"
    assert ExitStatus(signal=63).describe() == "killed by signal 63"


STATE = """
import json, os, signal, sys
blocked = [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
status = {k: v.strip() for k, v in (line.split(":", 1) for line in open("/proc/self/status"))}
json.dump({
    "argv": sys.argv[1:], "environ": dict(os.environ), "cwd": os.getcwd(), "umask": os.umask(0), "blocked": blocked,
    "ignored": int(status["SigIgn"], 16), "session": os.getsid(0) == os.getpid(), "stdin": os.readlink("/proc/self/fd/0"),
    "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1],
    "oom": open("/proc/self/oom_score_adj").read().strip(), "cgroup": open("/proc/self/cgroup").read(),
}, sys.stdout)
"""


def test_the_engine_inherits_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment, descriptor, signal disposition or mask, session; exactly what the specification says instead."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        env = {"ONLY": "this é", "EMPTY": ""}
        spec = python(STATE, "a b", "ü\n", env=env, cwd=str(tmp_path), umask=0o027, oom_score_adj=500)
        state = json.loads(answers(spec))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        os.close(read)
        os.close(write)
    assert state["argv"] == ["a b", "ü\n"]
    assert {name: value for name, value in state["environ"].items() if name != "LC_CTYPE"} == env
    assert (state["cwd"], state["umask"], state["stdin"]) == (str(tmp_path), 0o027, "/dev/null")
    assert state["session"] is True
    assert state["blocked"] == []
    # Python itself, in the test's program, ignores these two; SIGINT and the others must not be ignored
    assert state["ignored"] & ~(LIBC_OWN | 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0
    assert state["fds"] == [0, 1, 2]
    assert state["oom"] == "500"


def test_a_program_that_is_not_python_has_no_signal_ignored() -> None:
    """Python's launcher ignores SIGPIPE; an engine that inherited that would never end when its reader is gone."""
    text = answers(SpawnSpec(argv=("/bin/grep", "SigIgn", "/proc/self/status"))).decode()
    assert int(text.split()[1], 16) & ~LIBC_OWN == 0


def test_the_record_is_written_before_the_engine_exists() -> None:
    seen: list[tuple[str, int, int]] = []

    def before(pid: int, start: int) -> None:
        seen.append((Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-3].decode(), start, start_time(pid)))

    async def scenario(child: Child) -> None:
        await asyncio.wait_for(child.wait(), 10)
        assert child.start_time == seen[0][1]

    run(SpawnSpec(argv=("/bin/true",)), scenario, before)
    assert seen[0][0].endswith("launcher.py")
    assert seen[0][1] == seen[0][2] > 0


def test_the_launcher_already_carries_the_launchs_id() -> None:
    """Without a cgroup it is found by that, should the supervisor die before the exec."""
    seen: list[dict[str, str]] = []

    async def scenario(child: Child) -> None:
        await asyncio.wait_for(child.wait(), 10)

    spec = SpawnSpec(argv=("/bin/true",), env={"VLLMD_LAUNCH_ID": "abc", "SECRET": "x"})
    run(spec, scenario, lambda pid, start: seen.append(procs.environ_of(pid)))
    assert seen[0]["VLLMD_LAUNCH_ID"] == "abc"
    assert "SECRET" not in seen[0]


@pytest.mark.parametrize(
    ("program", "kind", "code"),
    [
        ("absent", ConfigError, "engine_missing"),
        ("not_executable", PermissionMissing, "engine_not_executable"),
        ("no_program", ConfigError, "engine_missing"),
        ("no_interpreter", ConfigError, "engine_missing"),
    ],
)
def test_an_exec_that_fails_says_why_and_leaves_nothing(tmp_path: Path, program: str, kind: type[Exception], code: str) -> None:
    for name, content, mode in (("not_executable", "", 0o644), ("no_program", "\x7fnonsense", 0o755), ("no_interpreter", "#!/absent/python\n", 0o755)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)
    with pytest.raises(kind) as caught:
        asyncio.run(spawn(SpawnSpec(argv=(str(tmp_path / program),)), nothing))
    assert caught.value.code == code  # type: ignore[attr-defined]
    assert program in str(caught.value)


def test_an_absent_directory_and_cgroup_are_named() -> None:
    with pytest.raises(ConfigError, match="/absent/directory"):
        asyncio.run(spawn(SpawnSpec(argv=("/bin/true",), cwd="/absent/directory"), nothing))
    with pytest.raises(EngineFailed, match="/absent/cgroup"):
        asyncio.run(spawn(SpawnSpec(argv=("/bin/true",), cgroup="/absent/cgroup"), nothing))


def test_too_many_arguments_are_an_error_and_not_a_hang() -> None:
    with pytest.raises(EngineFailed, match="Argument list too long"):
        asyncio.run(spawn(SpawnSpec(argv=("/bin/true", "x" * 3_000_000)), nothing))


def test_when_the_record_cannot_be_written_nothing_is_executed(tmp_path: Path) -> None:
    def full(pid: int, start: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        asyncio.run(spawn(SpawnSpec(argv=("/bin/touch", str(tmp_path / "touched"))), full))
    assert not (tmp_path / "touched").exists()


def test_a_cancelled_launch_leaves_nothing() -> None:
    async def main() -> None:
        entered = asyncio.Event()

        def before(pid: int, start: int) -> None:
            entered.set()
            task.cancel()

        task = asyncio.create_task(spawn(SpawnSpec(argv=("/bin/sleep", "60")), before))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert entered.is_set()

    asyncio.run(main())


def test_a_launch_cancelled_at_its_last_instant_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the exec is done before we look, nothing has to be waited for any more: the cancellation must not swallow a child
    that runs."""
    read_line = process._read_line

    async def late(link: socket.socket) -> bytes:
        if cancelled:
            time.sleep(0.3)  # the launcher becomes the engine meanwhile
        return await read_line(link)

    cancelled: list[int] = []
    monkeypatch.setattr(process, "_read_line", late)

    async def main() -> None:
        def before(pid: int, start: int) -> None:
            cancelled.append(pid)
            task.cancel()

        task = asyncio.create_task(spawn(SpawnSpec(argv=("/bin/sleep", "60")), before))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not procs.is_alive(cancelled[0])


def test_the_process_is_in_its_cgroup_before_it_is_the_engine() -> None:
    group = ServiceCgroup()
    try:
        seen: list[str] = []
        spec = SpawnSpec(argv=("/bin/cat", "/proc/self/cgroup"), cgroup=str(group.path))
        where: list[bytes] = []

        async def scenario(child: Child) -> None:
            where.append(await read_all(child.stdout))

        run(spec, scenario, lambda pid, start: seen.append(Path(f"/proc/{pid}/cgroup").read_text()))
        for text in (seen[0], where[0].decode()):
            line = next(line for line in text.splitlines() if line.startswith("0::"))
            assert line.endswith(f"/{group.top.name}/{group.path.name}")
    finally:
        group.remove()


SUPERVISOR = """
import asyncio, os, signal, sys
from vllmd.system.process import SpawnSpec, spawn

def before(pid, start):
    print(pid, flush=True)
    if sys.argv[1] == "entered":
        signal.pause()

async def main():
    await spawn(SpawnSpec(argv=("/bin/sleep", "60"), cgroup=sys.argv[2]), before)
    print("running", flush=True)
    signal.pause()

asyncio.run(main())
"""


@contextlib.contextmanager
def killed_supervisor(when: str, cgroup: str):  # type: ignore[no-untyped-def]
    """The pid that a supervisor had started when it was killed by SIGKILL."""
    with subprocess.Popen([PYTHON, "-c", SUPERVISOR, when, cgroup], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        if when == "running":
            assert supervisor.stdout.readline() == b"running\n"
        supervisor.kill()
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_supervisor_killed_between_entering_and_exec_leaves_nothing() -> None:
    group = ServiceCgroup()
    try:
        with killed_supervisor("entered", str(group.path)) as pid:
            procs.wait_until("the launcher's end", lambda: not procs.is_alive(pid))
    finally:
        group.remove()


def test_without_a_cgroup_the_kernel_ends_the_engine_with_the_supervisor() -> None:
    with killed_supervisor("running", "") as pid:
        procs.wait_until("the engine's end", lambda: not procs.is_alive(pid))


def test_launching_is_quick() -> None:
    async def main() -> float:
        best = 9.0
        for _ in range(5):
            started = time.monotonic()
            child = await spawn(SpawnSpec(argv=("/bin/true",)), nothing)
            best = min(best, time.monotonic() - started)
            await child.wait()
            child.close()
            os.close(child.stdout)
            os.close(child.stderr)
        return best

    assert asyncio.run(main()) < 0.25
