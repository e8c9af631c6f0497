"""Leases on GPUs with real locks and real processes: one holder, named by the kernel, gone with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import procs
from tests.needs import need
from vllmd.config.paths import Paths, root_paths
from vllmd.errors import PermissionMissing
from vllmd.gpu import leases
from vllmd.gpu.leases import Claim, Held

pytestmark = pytest.mark.component

ONE = "GPU-11111111-2222-3333-4444-555555555555"
TWO = "GPU-99999999-2222-3333-4444-555555555555"
MIG = "MIG-aaaaaaaa-2222-3333-4444-555555555555"

HOLD = """
import sys, time
from pathlib import Path
from vllmd.config.paths import root_paths
from vllmd.gpu import leases
held = leases.take(root_paths(Path(sys.argv[1])), [leases.Claim(u, sys.argv[3] == "shared") for u in sys.argv[4:]], sys.argv[2])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return root_paths(tmp_path)


@contextmanager
def holder(paths: Paths, instance: str, *uuids: str, mode: str = "alone") -> Iterator[int]:
    """Another process that holds them; its pid."""
    argv = [sys.executable, "-c", HOLD, str(paths.runtime.parent), instance, mode, *uuids]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()


def test_a_lease_is_for_one_and_the_refusal_names_the_holder(paths: Paths) -> None:
    with holder(paths, "qwen3", ONE) as pid:
        with pytest.raises(Held) as refused:
            leases.take(paths, [Claim(ONE)], "llama")
        assert f"{ONE} is in use by instance qwen3 (pid {pid}" in refused.value.what
        assert refused.value.status == 75
        assert refused.value.code == "gpu_leased"
        [seen] = leases.holders(paths)[ONE]
        assert (seen.pid, seen.instance, seen.shared) == (pid, "qwen3", False)
        leases.take(paths, [Claim(TWO)], "llama").release()


def test_the_kernel_gives_a_lease_back_when_its_holder_is_killed(paths: Paths) -> None:
    with holder(paths, "qwen3", ONE) as pid:
        os.kill(pid, signal.SIGKILL)
        procs.wait_until("its end", lambda: not leases.holders(paths))
        taken = leases.take(paths, [Claim(ONE)], "llama")
        assert [each.instance for each in leases.holders(paths)[ONE]] == ["llama"]
        taken.release()
        assert leases.holders(paths) == {}


def test_of_several_all_are_taken_or_none(paths: Paths) -> None:
    with holder(paths, "qwen3", TWO):
        with pytest.raises(Held):
            leases.take(paths, [Claim(TWO), Claim(ONE)], "llama")
        assert list(leases.holders(paths)) == [TWO]


def test_those_who_share_share_and_nobody_else_comes_between(paths: Paths) -> None:
    with holder(paths, "one", ONE, mode="shared") as first, holder(paths, "two", ONE, mode="shared") as second:
        found = {each.pid: (each.instance, each.shared) for each in leases.holders(paths)[ONE]}
        assert found == {first: ("one", True), second: ("two", True)}
        leases.take(paths, [Claim(ONE, shared=True)], "three").release()
        with pytest.raises(Held) as refused:
            leases.take(paths, [Claim(ONE)], "alone")
        assert "instance one" in refused.value.what
        assert "instance two" in refused.value.what


def test_who_wants_to_share_with_one_that_does_not_is_told_so(paths: Paths) -> None:
    with holder(paths, "qwen3", ONE), pytest.raises(Held) as refused:
        leases.take(paths, [Claim(ONE, shared=True)], "llama")
    assert "does not share" in refused.value.hint


def test_a_mig_instance_keeps_its_gpu_from_being_taken_whole_and_leaves_the_others_free(paths: Paths) -> None:
    with holder(paths, "slice", MIG):
        parent = leases.take(paths, [Claim(ONE, shared=True), Claim(MIG.replace("aaaa", "bbbb"))], "other-slice")
        with pytest.raises(Held):
            leases.take(paths, [Claim(ONE)], "whole")
        parent.release()


def test_a_program_that_is_executed_does_not_inherit_the_lease(paths: Paths) -> None:
    taken = leases.take(paths, [Claim(ONE)], "qwen3")
    child = subprocess.Popen(["/bin/sleep", "600"], close_fds=False)
    try:
        procs.wait_until("the exec", lambda: b"sleep" in Path(f"/proc/{child.pid}/cmdline").read_bytes())
        taken.release()
        leases.take(paths, [Claim(ONE)], "llama").release()
    finally:
        child.kill()
        child.wait()


def test_an_earlier_holders_name_does_not_stand_for_the_next(paths: Paths) -> None:
    leases.take(paths, [Claim(ONE)], "a-very-long-name-of-an-instance").release()
    taken = leases.take(paths, [Claim(ONE)], "b")
    assert (paths.gpus / ONE).read_text().count("\n") == 1
    assert [each.instance for each in leases.holders(paths)[ONE]] == ["b"]
    taken.release()


# -- hostile files


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "hard link"])
def test_what_is_no_plain_file_of_ours_is_refused(paths: Paths, tmp_path: Path, kind: str) -> None:
    paths.gpus.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = paths.gpus / ONE
    match kind:
        case "symlink":
            path.symlink_to(victim)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case _:
            path.hardlink_to(victim)
    with pytest.raises(PermissionMissing, match="lease"):
        leases.take(paths, [Claim(ONE)], "qwen3")
    assert victim.read_text() == "precious"
    assert leases.holders(paths) == {}


def test_a_file_of_another_user_is_refused(paths: Paths) -> None:
    need(os.geteuid() == 0, "root, to make a file of another user")
    paths.gpus.mkdir(parents=True)
    (paths.gpus / ONE).touch()
    os.chown(paths.gpus / ONE, 12345, 12345)
    with pytest.raises(PermissionMissing, match="belongs to user 12345"):
        leases.take(paths, [Claim(ONE)], "qwen3")


def test_a_directory_that_others_may_write_is_refused(paths: Paths) -> None:
    paths.gpus.mkdir(parents=True)
    paths.gpus.chmod(0o777)
    with pytest.raises(PermissionMissing, match="written by"):
        leases.take(paths, [Claim(ONE)], "qwen3")


@pytest.mark.parametrize("uuid", ["../../../etc/passwd", "GPU-../x", "GPU-", "0", "", "GPU-a b", "GPU-a\n"])
def test_what_is_no_uuid_becomes_no_path(paths: Paths, uuid: str) -> None:
    with pytest.raises(ValueError, match="no UUID"):
        leases.path_of(paths, uuid)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"[" * 60000, b'{"pid": PID, "instance": "\\u001b[31mroot"}', b'{"pid": "x"}', b"7\n[]\n"]
)
def test_the_holder_is_whom_the_kernel_names_whatever_the_file_says(paths: Paths, content: bytes) -> None:
    taken = leases.take(paths, [Claim(ONE)], "qwen3")
    (paths.gpus / ONE).write_bytes(content.replace(b"PID", str(os.getpid()).encode()))
    [seen] = leases.holders(paths)[ONE]
    assert (seen.pid, seen.instance) == (os.getpid(), "")
    (paths.gpus / ONE).write_text('{"pid": 1, "instance": "somebody-else"}\n')
    assert [each.pid for each in leases.holders(paths)[ONE]] == [os.getpid()]
    taken.release()
    assert leases.holders(paths) == {}
