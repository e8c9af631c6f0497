"""All checks in order, as `vllmd run` asks for them: policies, unix sockets, GPU gates before and after."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from tests import procs
from tests.cgroups import ServiceCgroup
from tests.listeners import VLLM, Held, holding
from tests.needs import need
from tests.ports import free_port
from vllmd.config.settings import Preflight
from vllmd.core.plan import Endpoint
from vllmd.preflight.claims import LaunchRecord, Own, Policy, Standalone, Stray
from vllmd.preflight.lock import take
from vllmd.preflight.report import Report
from vllmd.preflight.run import PreflightRequest, policy_of, run
from vllmd.system import procfs
from vllmd.system.cgroupnames import unified_mount

pytestmark = pytest.mark.component


@pytest.fixture
def port() -> int:
    return free_port()


def settings(**words: object) -> Preflight:
    base: dict[str, object] = {"skip_gpu_check": True, "term_grace_s": 0.3, "port_free_poll_s": 0.02}
    return Preflight(**(base | words))  # type: ignore[arg-type]


def checked(port: int, policy: Policy, *, host: str = "127.0.0.1", **words: object) -> Report:
    return run(PreflightRequest((Endpoint("tcp", host, port),), settings(**words), policy))


def record_of(held: Held, launch_id: str = "", cgroup: str = "") -> LaunchRecord:
    stat = procfs.stat(held.pid)
    assert stat is not None
    return LaunchRecord(launch_id, procfs.boot_id(), held.pid, stat.start_time, cgroup, os.geteuid())


def test_run_ends_what_its_own_launch_left_and_no_other_vllm(port: int) -> None:
    with holding("127.0.0.1", port, *VLLM) as server:
        refused = checked(port, Own())
        assert (refused.code, refused.reason, refused.action) == (2, "port_owned_by_other_process", "")
        assert procs.is_alive(server.pid)
        assert "reclaim: stray" in refused.hint
        taken = checked(port, Own((record_of(server),)))
        assert (taken.ok, taken.action, taken.pids) == (True, "stopped", (server.pid,))
        assert not procs.is_alive(server.pid)


def test_run_ends_a_stray_when_told_so(port: int) -> None:
    with holding("127.0.0.1", port, *VLLM) as server:
        assert checked(port, policy_of(settings(reclaim="stray"), Own())).action == "stopped"
        assert not procs.is_alive(server.pid)


def test_run_never_touches_another_instance_even_with_stray(port: int, service: ServiceCgroup) -> None:
    with holding("127.0.0.1", port, *VLLM, before=service.enter([])) as server:
        found = checked(port, Stray(Own()))
        assert (found.code, found.reason, found.units) == (2, "owned_by_instance", ("vllmd@test.service",))
        assert "systemctl stop vllmd@test.service" in found.hint
        assert procs.is_alive(server.pid)


def test_run_ends_whatever_is_in_its_own_units_cgroup(port: int, service: ServiceCgroup) -> None:
    own = Own(cgroup=unified_mount().path(str(service.path)))
    with holding("127.0.0.1", port, before=service.enter([])) as left:
        assert checked(port, own).action == "stopped"
        assert not procs.is_alive(left.pid)


def test_workers_that_outlived_their_server_are_ended_although_the_port_is_free(port: int) -> None:
    """vllm#55510: the API server is gone, its workers hold the GPU's memory."""
    launch = f"launch-{port}"
    with holding("127.0.0.1", free_port(), env={"VLLMD_LAUNCH_ID": launch}) as worker:
        own = Own((LaunchRecord(launch, procfs.boot_id(), 1, 1, "", os.geteuid()),))
        assert checked(port, own, dry_run=True).action == "would_stop"
        assert procs.is_alive(worker.pid)
        found = checked(port, own)
        assert (found.action, found.pids) == ("stopped", (worker.pid,))
        assert not procs.is_alive(worker.pid)


def test_a_lock_that_another_start_holds_is_refused_and_released_afterwards(port: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    request = PreflightRequest((Endpoint("tcp", "127.0.0.1", port),), settings(), Own(), lock_path=tmp_path / "l")
    with take(tmp_path / "l"):
        refused = run(request)
    assert (refused.code, refused.reason) == (1, "lock_held")
    assert run(request).ok
    take(tmp_path / "l").release()


def test_several_endpoints_are_one_question(port: int) -> None:
    second = free_port()
    endpoints = (Endpoint("tcp", "127.0.0.1", port), Endpoint("tcp", "127.0.0.1", second))
    with holding("127.0.0.1", second) as other:
        found = run(PreflightRequest(endpoints, settings(), Standalone()))
    assert (found.code, found.pids, found.ports) == (2, (other.pid,), (port, second))


def test_connections_that_no_server_can_pass_over_are_named_and_once_closed_waited_for(port: int) -> None:
    """Their listener had no SO_REUSEADDR, so that not even TIME_WAIT lets go of the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
    with server, client:
        held = checked(port, Standalone())
        assert (held.code, held.pids) == (2, (os.getpid(),))
        server.close()
    start = time.monotonic()
    left = checked(port, Standalone(), port_free_timeout_s=0.3)
    assert (left.code, left.reason) == (5, "port_held_by_closed_connections")
    assert 0.3 <= time.monotonic() - start < 5
    dry = checked(port, Standalone(), dry_run=True)
    assert (dry.code, len(dry.warnings)) == (0, 1)


class TestUnixSockets:
    def checked(self, path: Path, policy: Policy, *, remove_stale: bool = False, **words: object) -> Report:
        return run(PreflightRequest((Endpoint("uds", path=str(path)),), settings(**words), policy, remove_stale=remove_stale))

    def test_a_stale_one_is_told_and_removed_only_for_run(self, tmp_path: Path) -> None:
        path = tmp_path / "e.sock"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        told = self.checked(path, Standalone())
        assert (told.ok, str(path) in told.warnings[0], path.exists()) == (True, True, True)
        assert self.checked(path, Own(), remove_stale=True, dry_run=True).ok
        assert path.exists()
        assert self.checked(path, Own(), remove_stale=True).warnings == ()
        assert not path.exists()

    def test_a_live_one_is_judged_like_a_port(self, tmp_path: Path) -> None:
        path = tmp_path / "e.sock"
        with holding(str(path), 0, *VLLM) as server:
            assert self.checked(path, Own(), remove_stale=True).code == 2
            assert path.exists()
            assert self.checked(path, Standalone()).action == "stopped"
            assert not procs.is_alive(server.pid)

    def test_a_symlink_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "e.sock").symlink_to(tmp_path / "x")
        found = self.checked(tmp_path / "e.sock", Own(), remove_stale=True)
        assert (found.code, found.reason) == (1, "socket_path_refused")


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi whose one GPU is what the file says: temperature and free memory (of 80000)."""
    need(shutil.which("nvidia-smi") is None, "a machine without NVIDIA driver")
    folder = tmp_path / "bin"
    folder.mkdir()
    script = '#!/bin/sh\n. "$(dirname "$0")/state"\n'
    script += 'case "$1" in *clocks_*) exit 2;; esac\necho "0, H100, GPU-1, 80000, $FREE, $TEMPERATURE, 0, P0, 570.1, 9.0"\n'
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)
    (folder / "state").write_text("FREE=79000 TEMPERATURE=40")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "state"


def test_a_gpu_that_is_refused_costs_no_working_server(port: int, smi: Path) -> None:
    smi.write_text("FREE=79000 TEMPERATURE=99")
    with holding("127.0.0.1", port, *VLLM) as server:
        found = checked(port, Standalone(), skip_gpu_check=False, gpu_fail_on=("temperature",))
        assert procs.is_alive(server.pid)
    assert (found.code, found.reason, found.action) == (1, "gpu_hard_fail", "")
    assert (found.gpus[0].temperature_c, found.gpu_check_source) == (99, "nvidia-smi")


def test_a_warm_gpu_only_warns_by_default(port: int, smi: Path) -> None:
    smi.write_text("FREE=1000 TEMPERATURE=99")
    found = checked(port, Standalone(), skip_gpu_check=False)
    assert found.ok
    assert any("99 °C" in warning for warning in found.warnings)
    assert any("in use" in warning for warning in found.warnings)


def test_memory_that_the_old_server_holds_is_asked_for_again_once_it_has_ended(port: int, smi: Path) -> None:
    with holding("127.0.0.1", port, *VLLM) as server:
        smi.write_text(f"TEMPERATURE=40 FREE=100; grep -q . /proc/{server.pid}/cmdline || FREE=79000")
        found = checked(port, Standalone(), skip_gpu_check=False, gpu_fail_on=("memory",), gpu_min_free="70000")
        assert (found.ok, found.action, found.gpus[0].memory_free_mib) == (True, "stopped", 79000)


def test_memory_that_does_not_come_back_is_a_failure_in_bounded_time(port: int, smi: Path) -> None:
    smi.write_text("FREE=100 TEMPERATURE=40")
    gates = settings(skip_gpu_check=False, gpu_fail_on=("memory",), gpu_min_free="70000")
    with holding("127.0.0.1", port, *VLLM):
        start = time.monotonic()
        request = PreflightRequest((Endpoint("tcp", "127.0.0.1", port),), gates, Standalone(), gpu_release_timeout_s=1)
        found = run(request)
    assert (found.code, found.reason) == (1, "gpu_memory_not_back")
    assert time.monotonic() - start < 10


def test_without_anything_to_end_the_memory_must_be_free_now(port: int, smi: Path) -> None:
    smi.write_text("FREE=100 TEMPERATURE=40")
    found = checked(port, Standalone(), skip_gpu_check=False, gpu_fail_on=("memory",), gpu_min_free="70000")
    assert (found.code, found.reason) == (1, "gpu_hard_fail")


def test_a_port_that_is_not_ours_is_said_before_any_gpu_is_asked(port: int, smi: Path) -> None:
    smi.write_text("sleep 30")
    with holding("127.0.0.1", port):
        start = time.monotonic()
        assert checked(port, Standalone(), skip_gpu_check=False).code == 2
        assert time.monotonic() - start < 5
