"""Publishing that ends in the middle: killed at every step and at random moments, refused by the disk at every step, and
beside other processes that publish, collect and serve. Afterwards the link leads to a whole version, the old or the new one,
and the next publication leaves nothing half behind."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import publishing, tiny_models
from tests.needs import need
from vllmd.errors import StorageFailed, VllmdError
from vllmd.models import publish, retention
from vllmd.models.identity import label
from vllmd.models.published import directories
from vllmd.models.store import hold, published_target

pytestmark = pytest.mark.component

# Programs that run beside the tests, each with the store as its first argument.
PUBLISHER = """
import sys
from pathlib import Path
from tests import publishing, tiny_models
store, model_id, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
for number in range(first, first + count):
    publishing.publish_version(store, number, asked=tiny_models.request(store, model_id))
    print(number, flush=True)
"""
COLLECTOR = """
import random, sys
from pathlib import Path
from vllmd.models import retention
from vllmd.models.published import directories
store, seed, removed = Path(sys.argv[1]), random.Random(7), 0
while not (store / "over").exists():
    for directory in directories(store):
        if seed.random() < 0.2:
            removed += isinstance(retention.remove_version(store, directory), retention.Removed)
    retention.empty_trash(store, lambda text: None)
print(removed)
"""
SERVER = """
import sys, time
from pathlib import Path
from tests import publishing, tiny_models
from vllmd.errors import TryLater
from vllmd.models import publish
from vllmd.models.store import hold
store, served = Path(sys.argv[1]), 0
while not (store / "over").exists():
    for model_id in ("acme/Tiny", "other/Tiny"):
        try:
            found = publish.current(store, tiny_models.request(store, model_id))
            if found is None:
                continue
            with hold(found[0]):
                for wait_s in (0, 0.01):
                    time.sleep(wait_s)
                    assert publishing.differing(*found) == [], found[0]
                served += 1
        except TryLater:
            pass
print(served)
"""
ROOT = Path(__file__).parents[2]
WRITING = {"os.rename", "os.symlink", "os.mkdir", "os.chmod", "os.chown", "os.remove", "os.rmdir", "os.link", "os.utime", "fcntl.flock", "shutil.rmtree"}
KILLS = int(os.environ.get("VLLMD_SOAK_KILLS", "200"))
@pytest.fixture
def store() -> Iterator[Path]:
    """In memory: what is tested is the order of the steps, and a loaded disk would take minutes for the fsyncs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


class Steps:
    """Counts the steps by which a process changes files, and does something before step N."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at, self.act, self.count = at, act, 0

    def install(self) -> None:
        sys.addaudithook(self._hook)
        for name in ("fsync", "write", "ftruncate"):
            setattr(os, name, self._counted(getattr(os, name)))

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if event in WRITING or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            self.step()

    def _counted(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object) -> object:
            self.step()
            return call(*args)

        return counted

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()


def in_child(work: Callable[[], None], steps: Steps) -> int:
    """Runs `work` in a fork, with the steps counted, and returns how it ended: 0, -SIGNAL, 1 for an error of our tree, 2 for
    any other; or 10 where it ended well before its step came."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            steps.install()
            work()
            status = 0 if steps.count >= steps.at else 10
        except VllmdError:
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepared(store: Path, kind: str) -> Callable[[], None]:
    """A store with two versions, and the work that is going to be interrupted."""
    shutil.rmtree(store)
    store.mkdir()
    publishing.publish_version(store, 1)
    second = publishing.publish_version(store, 2)
    if kind == "remove":
        return lambda: assert_removed(retention.remove_version(store, second))
    if kind == "mend":
        damage(second / "LICENSE")
        publish.mark_damaged(second, ["LICENSE"])
        (second / "config.json").unlink()
    work = publishing.staged(store, 2 if kind == "mend" else 3, asked=tiny_models.request(store))
    return lambda: assert_published(work())


def damage(path: Path) -> None:
    """Other bytes, of the same length, of a file that no other version shares."""
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(b"?" * size)


def assert_removed(result: object) -> None:
    assert isinstance(result, retention.Removed)


def assert_published(directory: Path) -> None:
    assert directory.is_dir()


def allowed(store: Path, kind: str) -> list[str]:
    """What is wrong with what is offered. A version that was damaged before is not, until it is mended."""
    asked = tiny_models.request(store)
    return [] if kind == "mend" and publish.current(store, asked) is None else publishing.wrong(store, asked)


@pytest.mark.parametrize("kind", ["next", "mend", "remove"])
def test_killed_at_every_step(store: Path, kind: str) -> None:
    outcomes: set[int] = set()
    targets: set[str] = set()
    for step in range(1, 1000):
        status = in_child(prepared(store, kind), Steps(step, killed))
        outcomes.add(status)
        if status == 10:
            break
        assert allowed(store, kind) == [], f"killed before step {step}"
        targets.add(str(published_target(store, store / label(tiny_models.request(store)))))
        publishing.publish_version(store, 4, keep=1 if kind == "mend" else 2)
        assert publishing.wrong(store, tiny_models.request(store)) == []
        assert publishing.half(store) == [], f"killed before step {step}"
        assert len(directories(store)) <= 2
    assert outcomes == {-signal.SIGKILL, 10}
    assert step > 20
    assert len(targets) == (1 if kind == "mend" else 2)


@pytest.mark.parametrize(("kind", "number"), [("next", errno.ENOSPC), ("next", errno.EIO), ("mend", errno.EIO)])
def test_disk_that_refuses_any_one_step(store: Path, kind: str, number: int) -> None:
    """The old version or the new one is served, the error is one of ours, and the next publication succeeds."""
    outcomes: list[int] = []

    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    for step in range(1, 1000):
        outcomes.append(in_child(prepared(store, kind), Steps(step, refuse)))
        if outcomes[-1] == 10:
            break
        assert outcomes[-1] in (0, 1), f"step {step}"
        assert allowed(store, kind) == [], f"refused step {step}"
        publishing.publish_version(store, 4, keep=1 if kind == "mend" else 2)
        assert publishing.wrong(store, tiny_models.request(store)) == []
        assert publishing.half(store) == [], f"refused step {step}"
    assert outcomes.count(1) > 20


def kill_at_random(store: Path, rounds: int) -> None:
    seed = random.Random(os.environ.get("VLLMD_SOAK_SEED", "11"))
    asked = tiny_models.request(store)
    for round_ in range(rounds):
        with started(PUBLISHER, store, "acme/Tiny", round_ * 1000, 1000) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(seed.uniform(0, 0.05))
            child.kill()
        assert publishing.wrong(store, asked) == [], f"round {round_}"
        publishing.publish_version(store, round_ * 1000 + 999)
        assert publishing.wrong(store, asked) == [], f"round {round_}"
        assert publishing.half(store) == [], f"round {round_}"


@contextmanager
def started(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_killed_at_random(store: Path) -> None:
    kill_at_random(store, 10)


@pytest.mark.soak
def test_killed_at_random_many_times(store: Path) -> None:
    kill_at_random(store, KILLS)


def at_once(store: Path, count: int) -> None:
    """Two resolvers of one model, one of another that shares files with it, a collector, and somebody who serves: whoever
    holds a version finds it whole to the byte."""
    with ExitStack() as stack:
        server, collector = (stack.enter_context(started(program, store)) for program in (SERVER, COLLECTOR))
        models = ("acme/Tiny", "acme/Tiny", "other/Tiny")
        publishers = [stack.enter_context(started(PUBLISHER, store, model, 1_000_000 * number, count)) for number, model in enumerate(models)]
        outputs = [child.communicate(timeout=600)[0] for child in publishers]
        (store / "over").touch()
        served, removed = (child.communicate(timeout=60)[0] for child in (server, collector))
        assert [child.returncode for child in (*publishers, server, collector)] == [0] * 5
    assert all(output.count("\n") == count + 1 for output in outputs)
    assert int(served) > 0
    assert int(removed) > 0
    for model_id in set(models):
        publishing.publish_version(store, 1, asked=tiny_models.request(store, model_id))
        assert publishing.wrong(store, tiny_models.request(store, model_id)) == []
    assert publishing.half(store) == []


def test_publishers_collector_and_server_at_once(store: Path) -> None:
    at_once(store, 60)


@pytest.mark.soak
def test_publishers_collector_and_server_for_long(store: Path) -> None:
    at_once(store, 5 * KILLS)


@pytest.mark.parametrize("short_of", ["size", "nr_inodes"])
def test_disk_that_is_full_at_any_write(tmp_path: Path, short_of: str) -> None:
    """A real one: a little more room each time, until there is enough."""
    need(os.geteuid() == 0, "root, to mount")
    outcomes: list[str] = []
    for room in range(40):
        with mounted(tmp_path) as store:
            publishing.publish_version(store, 1)
            work = publishing.staged(store, 2, asked=tiny_models.request(store))
            used = os.statvfs(store)
            limit = used.f_files - used.f_ffree + room if short_of == "nr_inodes" else (used.f_blocks - used.f_bfree + room) * used.f_frsize
            remount(store, f"{short_of}={max(limit, 1)}")
            try:
                work()
                outcomes.append("ok")
            except StorageFailed as error:
                outcomes.append(error.code)
            assert publishing.wrong(store, tiny_models.request(store)) == [], f"room for {room}"
            remount(store, "size=8m,nr_inodes=1000")
            publishing.publish_version(store, 3)
            assert (publishing.wrong(store, tiny_models.request(store)), publishing.half(store)) == ([], []), f"room for {room}"
        if outcomes[-1] == "ok":
            break
    print(outcomes)
    assert set(outcomes[:-1]) == {"disk_full"}
    assert outcomes[-1] == "ok"


def test_disk_that_became_read_only(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root, to mount")
    with mounted(tmp_path) as store:
        first = publishing.publish_version(store, 1)
        work = publishing.staged(store, 2, asked=tiny_models.request(store))
        remount(store, "ro")
        with pytest.raises(StorageFailed, match="Read-only file system") as caught:
            work()
        assert caught.value.code == "read_only"
        with hold(first):
            assert publishing.wrong(store, tiny_models.request(store)) == []
        with pytest.raises(StorageFailed, match="Read-only file system"):
            retention.remove_version(store, first)
        remount(store, "rw")
        work()
        assert publishing.half(store) == []


@contextmanager
def mounted(directory: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=1000", "vllmd-test", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def remount(store: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", store], check=True)


def recorded(work: Callable[[], None], store: Path) -> list[str]:
    """The renames, removals and fsyncs of a process that does `work`, with paths below the store."""
    calls: list[str] = []

    def place(path: object, fd: object = -1) -> str:
        base = Path(f"/proc/self/fd/{fd}").readlink() if isinstance(fd, int) and fd >= 0 else ""
        return str(Path(base, str(path) if isinstance(path, str | Path) else "")).removeprefix(f"{store}/")

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "os.rename":
            calls.append(f"rename {place(args[0], args[2])} {place(args[1], args[3])}")
        elif event in ("os.remove", "os.rmdir"):
            calls.append(f"remove {place(args[0], args[1])}")

    fsync = os.fsync

    def noted_fsync(fd: int) -> None:
        calls.append(f"fsync {place('', fd)}")
        fsync(fd)

    def noted() -> None:
        setattr(os, "fsync", noted_fsync)  # noqa: B010 - of a process that ends with the work
        sys.addaudithook(hook)
        work()
        (store / "calls").write_text("\n".join(calls))

    assert in_child(noted, Steps(0, killed)) == 0
    return (store / "calls").read_text().splitlines()


def test_service_without_privileges_goes_on_with_what_root_published(store: Path) -> None:
    """It links to files that it may not write, and removes them."""
    need(os.geteuid() == 0, "root, to become another user")
    os.chown(store, 12345, 12345)
    publishing.publish_version(store, 1)

    def work() -> None:
        os.setgroups([])
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)
        for number in (2, 3):
            publishing.publish_version(store, number)
        assert_removed(retention.remove_version(store, publishing.publish_version(store, 4)))

    assert in_child(work, Steps(0, killed)) == 0
    assert {path.parent.name for path in directories(store)} == {label(tiny_models.request(store))}
    assert len(directories(store)) == 1
    assert list((store / ".trash").iterdir()) == []


def test_all_of_it_is_on_the_disk_before_it_is_served_and_that_before_the_old_goes(store: Path) -> None:
    """What a power cut would leave, as far as the order of the calls tells."""
    asked = tiny_models.request(store)
    first = publishing.publish_version(store, 1, keep=1)
    work = publishing.staged(store, 2, asked=asked, keep=1)
    stage = f".staging/{label(asked)}/files"
    calls = recorded(lambda: assert_published(work()), store)
    home, version = f".published/{label(asked)}", published_target(store, store / label(asked))
    assert version is not None
    placed = calls.index(f"rename {stage} {home}/{version.name}")
    linked = next(index for index, call in enumerate(calls) if call.startswith(f"rename {home}/.link.") and call.endswith(f" {label(asked)}"))
    doomed = next(index for index, call in enumerate(calls) if call.startswith(f"rename {home}/{first.name} .trash/"))
    deleted = next(index for index, call in enumerate(calls) if call.startswith("remove .trash/"))
    # config.json, tokenizer.json and LICENSE are the first version's, and on the disk since then
    names = ("model.safetensors", "sub/notes.txt", "sub", ".complete", ".vllm-model-provenance", ".vllmd-manifest.json")
    assert {f"fsync {stage}/{name}" for name in names} <= set(calls[:placed])
    settled = max(index for index, call in enumerate(calls[:placed]) if call == f"fsync {stage}")
    assert settled > max(calls.index(f"fsync {stage}/{name}") for name in names)
    assert f"fsync {home}" in calls[placed:linked]
    named = next(index for index, call in enumerate(calls) if call.endswith(" Tiny"))
    assert f"fsync {store}" in calls[linked:named]
    assert {f"fsync {home}", "fsync .trash"} <= set(calls[doomed:deleted])
    assert placed < linked < named < doomed < deleted


def test_links_are_gone_from_the_disk_before_what_they_led_to(store: Path) -> None:
    asked = tiny_models.request(store)
    directory = publishing.publish_version(store, 1)
    calls = recorded(lambda: assert_removed(retention.remove_version(store, directory)), store)
    unlinked = max(calls.index(f"remove {name}") for name in (label(asked), "Tiny"))
    doomed = next(index for index, call in enumerate(calls) if call.startswith("rename .published/"))
    assert unlinked < calls.index(f"fsync {store}") < doomed
