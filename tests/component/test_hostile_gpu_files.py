"""Files below <state>/gpus and <runtime>/gpus as they must not be, against instances, `vllmctl gpu`, `vllmctl gpu clear` and `vllmd check`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import procs
from tests.component.gpu_hosts import GpuHost, uuid
from tests.component.test_ctl_gpu import ctl
from vllmd.config.paths import root_paths
from vllmd.core import gpu_choice
from vllmd.core.gpu_choice import Device, Rules
from vllmd.core.gpu_findings import of_xid, parse
from vllmd.gpu import leases, quarantine
from vllmd.gpu.quarantine import Record
from vllmd.instance import metric_gpus

pytestmark = pytest.mark.component


def words(**more: Any) -> dict[str, Any]:
    return {**Record(uuid(0), "replace", 64, "why", "do").as_dict(), **more}


@pytest.mark.parametrize("at", [9e11, -9e11, 3e11, -1.0, True, float("nan"), float("inf"), 10**400])
def test_a_time_that_no_calendar_has_stops_nobody(at: Any) -> None:
    with GpuHost() as host:
        folder = quarantine.folder_of(root_paths(host.root))
        folder.mkdir(parents=True)
        (folder / f"{uuid(0)}.json").write_text(json.dumps(words(first_at=at, last_at=at)))
        done = ctl(host)
        assert (done.returncode, done.stderr) == (3, "")
        assert "class replace" in done.stdout
        with host.instance() as instance:
            assert instance.wait_exit() == 69, instance.describe()
            assert instance.last_json()["error"]["code"] == "gpu_quarantined"


def test_files_without_meaning_do_not_hide_a_record() -> None:
    with GpuHost() as host:
        paths = root_paths(host.root)
        quarantine.add(paths, Record(uuid(0), "reboot", 79, "Xid 79"))
        for number in range(1500):
            (quarantine.folder_of(paths) / f"A{number:05}").touch()
            (quarantine.folder_of(paths) / f"GPU-{0:08x}-0{number:05}.json").write_text("{}")
        assert set(quarantine.read(paths)) == {uuid(0)}
        assert ctl(host).returncode == 3


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "file", "dangling"])
@pytest.mark.parametrize("which", ["state", "runtime"])
def test_a_folder_that_is_none(kind: str, which: str) -> None:
    with GpuHost() as host:
        paths = root_paths(host.root)
        folder = quarantine.folder_of(paths) if which == "state" else paths.gpus
        folder.parent.mkdir(parents=True, exist_ok=True)
        victim = host.root / "victim"
        victim.mkdir()
        match kind:
            case "fifo":
                os.mkfifo(folder)
            case "folder":
                (folder / uuid(0)).mkdir(parents=True)
            case "file":
                folder.touch()
            case _:
                folder.symlink_to(victim if kind == "link" else "/nowhere/at/all")
        began = time.monotonic()
        done = ctl(host)
        assert (done.returncode, done.stderr) == (0, "")
        done = ctl(host, "clear", "0", "--force")
        assert "Traceback" not in done.stderr
        with host.instance() as instance:
            if which == "state":
                instance.wait_ready()
                instance.signal(signal.SIGTERM)
                assert instance.wait_exit() == 0
            else:
                status = instance.wait_exit()
                error = instance.last_json()["error"]
                assert status in (73, 74, 75, 77), instance.describe()
                assert str(paths.gpus) in error["what"]
                assert f"{paths.gpus}," in error["hint"] or kind != "link", error
            assert "Traceback" not in instance.log()
        assert time.monotonic() - began < 40


@pytest.mark.parametrize("kind", ["fifo", "folder", "huge", "nan", "bool"])
def test_lease_files_as_they_must_not_be(kind: str) -> None:
    with GpuHost() as host:
        paths = root_paths(host.root)
        path = leases.path_of(paths, uuid(0))
        path.parent.mkdir(parents=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            content = {"huge": b"x" * (64 << 20), "nan": b'{"pid": NaN, "instance": "a"}\n{"pid": 1e999, "instance": "a"}\n', "bool": b'{"pid": true, "instance": "init"}\n'}[kind]
            path.write_bytes(content)
        done = ctl(host)
        assert (done.returncode, done.stderr) == (0, "")
        with host.instance() as instance:
            if kind in ("fifo", "folder"):
                assert instance.wait_exit() == 77, instance.describe()
                assert instance.last_json()["error"]["code"] == "lease_refused"
            else:
                instance.wait_ready()
                assert [each.instance for each in leases.holders(paths)[uuid(0)]] == ["demo"]
                instance.signal(signal.SIGTERM)
                assert instance.wait_exit() == 0


def test_a_pid_that_is_a_truth_value_names_nobody(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    path.write_text('{"pid": true, "instance": "init"}\n{"pid": 7, "instance": "seven"}\n')
    fd = os.open(path, os.O_RDONLY)
    try:
        assert leases._content(fd) == {7: "seven"}
    finally:
        os.close(fd)


@pytest.mark.parametrize("at", [True, float("nan"), float("inf"), -float("inf"), -1.0, 1e13, 10**400])
def test_a_finding_at_no_time_is_none(at: Any) -> None:
    assert parse({**of_xid(79, uuid=uuid(0)).as_dict(), "at": at}) is None


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), True, "x", [], {}])
def test_figures_that_are_none_are_left_out_of_the_metrics(value: Any) -> None:
    keys = ("index", "memory_total_mib", "temperature_c", "recovery_action", "lost", "quarantine", "verdict", "pci", "clock_reasons", "mig", "name", "retired_pages")
    gpu = {"uuid": uuid(0), **dict.fromkeys(keys, value), "ecc": {"corrected": value}, "remapped": {"pending": value}, "nvlink": {"crc_errors": value}, "pcie": {"width": value}}
    samples = list(metric_gpus.gpu_samples({"at": value, "gpus": [gpu], "driver_version": value, "stuck_in": value}, {uuid(0)}))
    assert all(abs(number) < float("inf") for _, _, number in samples)


@pytest.mark.parametrize("token", ["²", "९", "-1", "NoDevFiles", "GPU", "MIG", ""])
def test_tokens_that_name_no_gpu(token: str) -> None:
    seen = [Device(0, uuid(0)), Device(9, uuid(9))]
    for wanted in ("all", 1, (token,)):
        gpu_choice.choose(seen, wanted, Rules(), token)


HOLD = """
import sys
from pathlib import Path
from vllmd.config.paths import root_paths
from vllmd.errors import TryLater
from vllmd.gpu import leases
for line in sys.stdin:
    try:
        held = leases.take(root_paths(Path(sys.argv[1])), [leases.Claim(u) for u in sys.argv[3:]], sys.argv[2])
        print("held", flush=True)
        sys.stdin.readline()
        held.release()
        print("free", flush=True)
    except TryLater as error:
        print(error.what, flush=True)
        sys.stdin.readline()
        print("free", flush=True)
"""


def test_of_two_that_want_one_gpu_in_the_same_instant_one_has_it(tmp_path: Path) -> None:
    """Twenty times: one has both GPUs, and the other one is told by whom."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    two = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), name, *order], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        for name, order in (("one", (uuid(0), uuid(1))), ("two", (uuid(1), uuid(0))))
    ]
    try:
        for _ in range(20):
            said: list[str] = []
            for word in range(2):
                for each in two:
                    assert each.stdin
                    each.stdin.write("go\n")
                    each.stdin.flush()
                lines = [each.stdout.readline().strip() for each in two if each.stdout]
                said = lines if not word else said
            assert sorted(text == "held" for text in said) == [False, True], said
            assert any("in use by" in text for text in said), said
    finally:
        for each in two:
            each.kill()
            each.communicate()


def test_check_and_clear_beside_a_hostile_host(tmp_path: Path) -> None:
    with GpuHost() as host:
        paths = root_paths(host.root)
        paths.runtime.mkdir(parents=True, exist_ok=True)
        os.mkfifo(paths.gpu_socket)
        folder = quarantine.folder_of(paths)
        folder.mkdir(parents=True)
        (folder / f"{uuid(0)}.json").mkdir()
        assert ctl(host).returncode == 0
        assert "Traceback" not in ctl(host, "clear", "0", "--force").stderr


def test_the_wait_for_memory_ends_where_the_driver_begins_to_hang() -> None:
    with GpuHost() as host:
        host.memory(0, 79000, (os.getpid(), 70000))
        with host.instance(config={"preflight": {"gpu_wait_s": 60, "gpu_timeout_s": 1.5}}) as instance:
            procs.wait_until("the wait", lambda: "the start waits for GPUs" in instance.log())
            host.stub.set(hang="nvmlDeviceGetMemoryInfo")
            began = time.monotonic()
            assert instance.wait_exit() == 69, instance.describe()
            assert time.monotonic() - began < 8
            assert instance.last_json()["error"]["code"] == "gpu_driver_hung"
            assert leases.holders(root_paths(host.root)) == {}


def test_a_stop_while_the_driver_hangs_at_the_gate() -> None:
    with GpuHost() as host:
        host.memory(0, 79000, (os.getpid(), 70000))
        with host.instance(config={"preflight": {"gpu_wait_s": 60, "gpu_timeout_s": 20}}) as instance:
            procs.wait_until("the wait", lambda: "the start waits for GPUs" in instance.log())
            host.stub.set(hang="nvmlDeviceGetMemoryInfo")
            time.sleep(1)
            began = time.monotonic()
            instance.signal(signal.SIGTERM)
            assert instance.wait_exit() == 0, instance.describe()
            assert time.monotonic() - began < 5
