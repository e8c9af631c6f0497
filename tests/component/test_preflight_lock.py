"""The port's lock: who gets it, and which files and directories are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.listeners import NOBODY, ROOT
from tests.needs import need
from vllmd.errors import PermissionMissing, TryLater
from vllmd.preflight import lock

pytestmark = pytest.mark.component


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


def test_the_second_is_refused_at_once_and_told_by_whom(folder: Path) -> None:
    with lock.take(folder / "l"):
        assert oct((folder / "l").stat().st_mode)[-3:] == "600"
        with pytest.raises(TryLater, match=str(os.getpid())) as caught:
            lock.take(folder / "l")
        assert caught.value.code == "lock_held"
    lock.take(folder / "l").release()


def test_it_ends_with_an_exec_unless_it_is_kept(folder: Path) -> None:
    for keep in (False, True):
        with lock.take(folder / "l") as held:
            if keep:
                held.keep_over_exec()
            argv = [sys.executable, "-c", "print(flush=True); input()"]
            with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
                assert child.stdout is not None
                child.stdout.readline()  # vfork lets us go on before the exec has closed what it closes
                held.release()
                if keep:
                    with pytest.raises(TryLater):
                        lock.take(folder / "l")
                else:
                    lock.take(folder / "l").release()
                child.communicate(b"\n")


def test_a_symlink_is_refused_and_its_target_untouched(folder: Path) -> None:
    (folder / "precious").write_text("precious")
    (folder / "l").symlink_to(folder / "precious")
    with pytest.raises(PermissionMissing, match="symbolic link") as caught:
        lock.take(folder / "l")
    assert caught.value.code == "lock_refused"
    assert (folder / "precious").read_text() == "precious"


def test_a_directory_reached_by_a_symlink_is_refused(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(PermissionMissing):
        lock.take(folder / "link" / "l")


@pytest.mark.parametrize("kind", ["fifo", "directory", "hard link"])
def test_what_is_no_file_of_its_own_is_refused_without_waiting(folder: Path, kind: str) -> None:
    path = folder / "l"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        (folder / "precious").write_text("precious")
        path.hardlink_to(folder / "precious")
    with pytest.raises(PermissionMissing):
        lock.take(path)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_root_uses_no_directory_that_others_may_write_into(folder: Path, mode: int) -> None:
    need(os.geteuid() == 0, "root")
    (folder / "shared").mkdir()
    (folder / "shared").chmod(mode)
    with pytest.raises(PermissionMissing, match="root"):
        lock.take(folder / "shared" / "l")


AS_NOBODY = """
import os, sys
from pathlib import Path
from vllmd.preflight import lock
from vllmd.errors import VllmdError
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
try:
    lock.take(Path(sys.argv[1])); print("taken")
except VllmdError as error:
    print(error.what)
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    need(os.geteuid() == 0, "root")
    path = Path("/var/tmp") / f"vllmd-test-shared-{os.getpid()}"
    path.mkdir()
    yield path
    for each in path.iterdir():
        each.unlink()
    path.rmdir()


def as_nobody(path: Path) -> str:
    argv = [sys.executable, "-c", AS_NOBODY, str(path)]
    return subprocess.run(argv, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def test_others_may_use_a_sticky_directory_but_no_file_of_somebody_else(shared: Path) -> None:
    shared.chmod(0o1777)
    assert as_nobody(shared / "own") == "taken"
    (shared / "others").touch()
    os.chown(shared / "others", 33, 33)
    (shared / "others").chmod(0o666)
    assert "belongs to user 33" in as_nobody(shared / "others") or "Permission denied" in as_nobody(shared / "others")
    shared.chmod(0o777)
    assert "written by everybody" in as_nobody(shared / "another")


def test_what_root_makes_in_the_services_directory_does_not_shut_the_service_out(shared: Path) -> None:
    os.chown(shared, NOBODY, NOBODY)
    lock.take(shared / "l").release()
    assert as_nobody(shared / "l") == "taken"


def test_the_default_is_the_runtime_directory_then_the_users_and_tmp_never_for_root(folder: Path) -> None:
    runtime = folder / "run"
    assert lock.default_path(8000, runtime, {}, 0) == runtime / "preflight.8000.lock"
    assert lock.default_path(8000, runtime, {"XDG_RUNTIME_DIR": str(folder)}, 1000) == folder / "vllmd-preflight.8000.lock"
    assert lock.default_path(8000, runtime, {"XDG_RUNTIME_DIR": "relative"}, 1000) == Path("/tmp/vllm-preflight.lock")
    runtime.mkdir()
    assert lock.default_path(8000, runtime, {}, 1000) == runtime / "preflight.8000.lock"
    (runtime / "locks").mkdir()
    assert lock.default_path(8000, runtime, {}, 1000) == runtime / "locks/preflight.8000.lock"


def test_root_makes_the_directory_that_is_missing(folder: Path) -> None:
    need(os.geteuid() == 0, "root")
    lock.take(folder / "new" / "l").release()
    assert oct((folder / "new").stat().st_mode)[-3:] == "755"
