"""Two resolutions of one model, a model in use, and lock files that somebody else laid out."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import tiny_models
from tests.needs import need
from vllmd.errors import PermissionMissing, TryLater
from vllmd.models import demo
from vllmd.models.lock import Lock, locked
from vllmd.models.resolve import resolve
from vllmd.models.store import hold

pytestmark = pytest.mark.component


def nothing(_: object) -> None:
    pass


def test_second_resolution_waits_says_for_whom_and_gives_up(tmp_path: Path) -> None:
    told: list[str] = []
    started = time.monotonic()
    refused = pytest.raises(TryLater, match=f"held by pid {os.getpid()} on ")
    with locked(tmp_path, "abc", 5, nothing), refused, locked(tmp_path, "abc", 0.2, told.append):
        pytest.fail("two held one lock")
    assert 0.2 <= time.monotonic() - started < 4
    assert f"waiting for pid {os.getpid()} on " in told[0]


def test_lock_is_taken_as_soon_as_the_other_ends(tmp_path: Path) -> None:
    other = locked(tmp_path, "abc", 5, nothing)
    other.__enter__()
    threading.Timer(0.2, other.__exit__, (None, None, None)).start()
    with locked(tmp_path, "abc", 10, nothing):
        pass


def test_holder_that_gets_on_is_waited_for(tmp_path: Path) -> None:
    """A download of hours by another instance must not end the wait for it; one that hangs must."""
    told: list[str] = []
    stop = threading.Event()
    done = 0

    def get_on(held: Lock) -> None:
        nonlocal done
        while not stop.wait(0.05):
            done += 1
            held.said_at = float("-inf")  # else only once a second is written
            held.say(f"{done} of 100 GB")

    with locked(tmp_path, "abc", 5, nothing) as held:
        worker = threading.Thread(target=get_on, args=(held,))
        worker.start()
        threading.Timer(1.5, stop.set).start()
        started = time.monotonic()
        with pytest.raises(TryLater, match=f"held by pid {os.getpid()} on .*: [0-9]+ of 100 GB; waited ") as caught, locked(tmp_path, "abc", 0.7, told.append):
            pytest.fail("two held one lock")
        waited = time.monotonic() - started
        worker.join()
    assert waited >= 1.4 + 0.7
    assert f"{done} of 100 GB" in caught.value.what
    assert "gives up after 1 s without progress" in told[0]


def test_progress_is_written_once_a_second_and_never_more_than_a_line(tmp_path: Path) -> None:
    path = tmp_path / ".locks/vllm-model.abc.lock"
    with locked(tmp_path, "abc", 5, nothing) as held:
        held.say("first\nline\x1b[2J" + "x" * 1000)
        text = path.read_text()
        held.say("second")
        assert path.read_text() == text
        assert text.startswith(f"pid {os.getpid()} on ")
        assert text.endswith("\n")
        assert text.strip().isprintable()
        assert len(text) < 300
        held.said_at -= 2
        held.say("third")
        assert path.read_text().endswith(": third\n")


def test_lock_file_that_is_removed_while_it_is_held_makes_no_second_holder(tmp_path: Path) -> None:
    path = tmp_path / ".locks/vllm-model.abc.lock"
    with locked(tmp_path, "abc", 5, nothing) as held:
        path.unlink()
        held.say("1 of 100 GB")
        assert path.read_text().endswith(": 1 of 100 GB\n")
        with pytest.raises(TryLater, match="held by pid"), locked(tmp_path, "abc", 0.1, nothing):
            pytest.fail("two held one lock")
        path.unlink()
        with locked(tmp_path, "abc", 0, nothing), pytest.raises(TryLater, match="was removed while it was held"):
            held.say("2 of 100 GB")


def test_who_waited_for_a_lock_file_that_was_removed_meets_the_others_on_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / ".locks/vllm-model.abc.lock"
    told: list[str] = []
    first, third = (locked(tmp_path, "abc", 5, nothing) for _ in range(2))
    first.__enter__()

    def replace(text: str) -> None:
        if not told:
            path.unlink()
            third.__enter__()
            first.__exit__(None, None, None)
        told.append(text)

    with pytest.raises(TryLater, match="held by pid"), locked(tmp_path, "abc", 0.3, replace):
        pytest.fail("two held one lock")
    third.__exit__(None, None, None)


def test_other_models_do_not_wait(tmp_path: Path) -> None:
    with locked(tmp_path, "abc", 0, nothing), locked(tmp_path, "def", 0, nothing):
        pass


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    program = "import sys,os\nfrom pathlib import Path\nfrom vllmd.models.lock import locked\n"
    program += "with locked(Path(sys.argv[1]), 'abc', 0, print): print('held', flush=True); os.read(0, 1)"
    child = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(TryLater, match=f"held by pid {child.pid} "), locked(tmp_path, "abc", 0, nothing):
            pass
        child.kill()
        child.wait()
        with locked(tmp_path, "abc", 10, nothing):
            pass
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "hardlink", "directory"])
def test_lock_that_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / ".locks").mkdir()
    target, lock = tmp_path / "victim", tmp_path / ".locks/vllm-model.abc.lock"
    if kind != "dangling":
        target.write_text("precious")
    if kind == "fifo":
        os.mkfifo(lock)
    elif kind == "directory":
        lock.mkdir()
    elif kind == "hardlink":
        lock.hardlink_to(target)
    else:
        lock.symlink_to(target)
    with pytest.raises(PermissionMissing, match="refused as a lock") as caught, locked(tmp_path, "abc", 0, nothing):
        pass
    assert caught.value.code == "lock_refused"
    assert kind == "dangling" or target.read_text() == "precious"
    assert kind != "dangling" or not target.exists()


def test_lock_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".locks").symlink_to("elsewhere")
    with pytest.raises(PermissionMissing, match="is a link"), locked(tmp_path, "abc", 0, nothing):
        pass


def test_lock_of_a_stranger_is_refused_and_stops_the_resolution(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root, to make a file of another user")
    demo.make(tmp_path / "Tiny")
    asked = tiny_models.request(tmp_path)
    resolve(asked, tiny_models.settings(), {}, nothing)
    [lock] = (tmp_path / ".locks").iterdir()
    os.chown(lock, 12345, 12345)
    with pytest.raises(PermissionMissing, match="belongs to uid 12345"):
        resolve(asked, tiny_models.settings(), {}, nothing)


def test_what_root_leaves_in_a_services_store_is_the_services(tmp_path: Path) -> None:
    """Else one `vllmd resolve` by root would make the service fail for ever."""
    need(os.geteuid() == 0, "root")
    os.chown(tmp_path, 12345, 12345)
    demo.make(tmp_path / "Tiny")
    resolve(tiny_models.request(tmp_path), tiny_models.settings(), {}, nothing)
    [lock] = (tmp_path / ".locks").iterdir()
    assert (lock.stat().st_uid, lock.parent.stat().st_uid) == (12345, 12345)
    resolve(tiny_models.request(tmp_path), tiny_models.settings(), {}, nothing)


def test_model_in_use_cannot_be_collected(tmp_path: Path) -> None:
    directory = demo.make(tmp_path / "Tiny")
    collector = os.open(directory, os.O_RDONLY)
    try:
        with hold(directory), hold(directory), pytest.raises(BlockingIOError):
            fcntl.flock(collector, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(collector, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(TryLater, match="is being removed"):
            hold(directory, timeout_s=0.1)
    finally:
        os.close(collector)
    hold(directory).close()


def test_hold_survives_no_exec(tmp_path: Path) -> None:
    with hold(tmp_path):
        held = [int(fd.name) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and fd.readlink() == tmp_path]
        assert held
        assert not any(os.get_inheritable(fd) for fd in held)
