"""vllm-preflight from outside: its statuses 0 to 5, what it ends, what it prints."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import procs
from tests.cgroups import ServiceCgroup
from tests.listeners import NOBODY, VLLM, holding, preflight
from tests.needs import need
from tests.ports import free_port
from vllmd.preflight.reclaim import launch_cgroup
from vllmd.system.cgroupnames import unified_mount

pytestmark = pytest.mark.component

KEYS = {
    "schema", "status", "ok", "code", "reason", "action", "error", "hint", "host", "port", "ports", "pids", "units", "uids", "dry_run",
    "gpus", "gpu_check_source", "warnings", "cmdlines",
}  # fmt: skip


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path / "lock"


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A lock of nobody's own: pytest's directory is only ours."""
    folder = Path("/var/tmp") / f"vllmd-test-nobody-{os.getpid()}"
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    yield folder / "lock"
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()


@pytest.fixture
def service() -> Iterator[ServiceCgroup]:
    group = ServiceCgroup()
    yield group
    group.remove()


def test_a_free_port_is_0_and_noop(port: int, lock: Path) -> None:
    told = preflight(port, lock=lock)
    assert told.status == 0
    assert set(told.json) == KEYS
    assert told.json | {"status": "ok", "ok": True, "code": 0, "action": "noop", "port": port, "pids": [], "schema": 1} == told.json


def test_a_listener_that_is_no_vllm_is_2_and_lives_on(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port) as other:
        told = preflight(port, lock=lock)
        assert procs.is_alive(other.pid)
    assert told.status == 2
    assert set(told.json) == KEYS
    assert (told.json["status"], told.json["reason"], told.json["pids"]) == ("error", "port_owned_by_other_process", [other.pid])
    assert str(other.pid) in told.err


def test_a_vllm_is_ended_and_the_port_free(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, *VLLM) as server:
        told = preflight(port, lock=lock)
        assert told.status == 0, told.err
        assert (told.json["action"], told.json["pids"]) == ("stopped", [server.pid])
        assert "vllm serve" in told.json["cmdlines"][str(server.pid)]
        assert not procs.is_alive(server.pid)
    socket.create_server(("127.0.0.1", port)).close()


def test_a_vllm_that_is_loading_holds_its_port_without_listening_and_is_ended_too(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, "--bound", "--reuse", "port", *VLLM) as server:
        told = preflight(port, lock=lock)
        assert (told.status, told.json["action"]) == (0, "stopped")
        assert not procs.is_alive(server.pid)


def test_a_shell_that_says_vllm_serve_does_not_make_its_child_a_vllm(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, before=["/bin/bash", "-c", 'shift; "$@"; : vllm serve model', "vllm", "vllm serve"]) as other:
        told = preflight(port, lock=lock)
        assert procs.is_alive(other.pid)
    assert told.status == 2


def test_a_python_process_that_mentions_vllm_is_no_vllm(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, "--", "-m", "vllmd", "vllm-plugin", "serve") as other:
        assert preflight(port, lock=lock).status == 2
        assert procs.is_alive(other.pid)


def test_a_vllm_beside_a_stranger_is_2_and_nothing_is_ended(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, *VLLM) as server, holding("127.0.0.2", port) as other:
        told = preflight(port, lock=lock, env={"VLLM_HOST": "0.0.0.0"})
        assert told.status == 2
        assert procs.is_alive(server.pid)
        assert procs.is_alive(other.pid)


def test_a_dry_run_says_what_would_be_stopped_and_stops_nothing(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, *VLLM) as server:
        told = preflight(port, lock=lock, env={"VLLM_DRY_RUN": "1"})
        assert procs.is_alive(server.pid)
    assert (told.status, told.json["status"], told.json["action"]) == (0, "ok", "would_stop")
    assert (told.json["dry_run"], told.json["pids"]) == (True, [server.pid])


def test_a_dry_run_over_a_stranger_is_2(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port):
        assert preflight(port, lock=lock, env={"VLLM_DRY_RUN": "1"}).status == 2


def test_a_pattern_of_the_users_replaces_the_owner_test(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, "--", "my-engine") as server:
        told = preflight(port, lock=lock, env={"VLLM_OWNER_REGEX": "MY-engine$"})
        assert (told.status, procs.is_alive(server.pid)) == (0, False)
    with holding("127.0.0.1", port, *VLLM) as server:
        told = preflight(port, lock=lock, env={"VLLM_OWNER_REGEX": "MY-engine$"})
        assert (told.status, procs.is_alive(server.pid)) == (2, True)


def test_signatures_add_to_the_owner_test(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, "--", "my-engine") as server:
        told = preflight(port, lock=lock, env={"VLLM_PROCESS_SIGNATURES": "nothing,y-eng"})
        assert (told.status, procs.is_alive(server.pid)) == (0, False)


def test_preflight_never_ends_the_process_that_called_it(port: int, lock: Path) -> None:
    """The listener is an ancestor, as when a test server runs its own preflight."""
    with socket.create_server(("127.0.0.1", port)):
        assert preflight(port, lock=lock, env={"VLLM_OWNER_REGEX": "."}).status == 2


class TestOtherUsers:
    @pytest.fixture(autouse=True)
    def root(self) -> None:
        need(os.geteuid() == 0, "root")

    def test_another_users_vllm_is_3_and_lives_on(self, port: int, lock: Path) -> None:
        with holding("127.0.0.1", port, "--uid", str(NOBODY), *VLLM) as server:
            told = preflight(port, lock=lock)
            assert procs.is_alive(server.pid)
        assert told.status == 3
        assert (told.json["reason"], told.json["uids"]) == ("port_owned_by_other_uid", [NOBODY])

    @pytest.mark.parametrize("name", ["VLLM_ALLOW_KILL_OTHER_UID", "VLLM_ALLOW_OTHER_UID_KILL"])
    def test_it_is_ended_when_that_is_allowed(self, port: int, lock: Path, name: str) -> None:
        with holding("127.0.0.1", port, "--uid", str(NOBODY), *VLLM) as server:
            assert preflight(port, lock=lock, env={name: "1"}).status == 0
            assert not procs.is_alive(server.pid)

    def test_another_users_other_server_is_2(self, port: int, lock: Path) -> None:
        with holding("127.0.0.1", port, "--uid", str(NOBODY)):
            assert preflight(port, lock=lock).status == 2

    def test_without_privileges_its_cgroup_tells_3(self, port: int, nobodys: Path, service: ServiceCgroup) -> None:
        unit = service.top / "some.service"
        unit.mkdir()
        enter = ["/bin/sh", "-c", f'echo $$ > {unit}/cgroup.procs && exec "$@"', "sh"]
        with holding("127.0.0.1", port, *VLLM, before=enter):
            told = preflight(port, lock=nobodys, as_nobody=True)
        assert told.status == 3
        assert (told.json["units"], told.json["uids"], told.json["pids"]) == (["some.service"], [0], [])
        assert "systemctl stop some.service" in told.json["hint"]

    def test_without_privileges_its_cgroup_tells_2(self, port: int, nobodys: Path, service: ServiceCgroup) -> None:
        unit = service.top / "web.service"
        unit.mkdir()
        with holding("127.0.0.1", port, before=["/bin/sh", "-c", f'echo $$ > {unit}/cgroup.procs && exec "$@"', "sh"]):
            told = preflight(port, lock=nobodys, as_nobody=True)
        assert (told.status, told.json["units"]) == (2, ["web.service"])

    def test_where_neither_proc_nor_cgroup_tells_it_is_4(self, port: int, nobodys: Path) -> None:
        point = unified_mount().point
        need(bool(point), "a cgroup2 hierarchy")
        hide = f'mount --make-rprivate / && mount -t proc -o hidepid=invisible proc /proc && umount -l {point} && exec "$@"'
        with holding("127.0.0.1", port, *VLLM) as server:
            told = preflight(port, lock=nobodys, as_nobody=True, before=["unshare", "-m", "/bin/sh", "-c", hide, "sh"])
            assert procs.is_alive(server.pid)
        assert told.status == 4
        assert told.json["reason"] == "listener_unattributable"


class TestInstances:
    def test_an_instance_of_vllmd_is_never_touched(self, port: int, lock: Path, service: ServiceCgroup) -> None:
        with holding("127.0.0.1", port, *VLLM, before=service.enter([])) as server:
            told = preflight(port, lock=lock)
            assert procs.is_alive(server.pid)
        assert (told.status, told.json["reason"]) == (2, "owned_by_instance")
        assert (told.json["units"], "systemctl stop vllmd@test.service" in told.json["hint"]) == (["vllmd@test.service"], True)

    def test_a_vllm_of_another_unit_is_ended_with_a_warning(self, port: int, lock: Path, service: ServiceCgroup) -> None:
        unit = service.top / "vllm.service"
        unit.mkdir()
        enter = ["/bin/sh", "-c", f'echo $$ > {unit}/cgroup.procs && exec "$@"', "sh"]
        with holding("127.0.0.1", port, *VLLM, before=enter):
            told = preflight(port, lock=lock)
        assert told.status == 0
        assert any("systemctl stop vllm.service" in warning for warning in told.json["warnings"])
        assert launch_cgroup("/x/vllm.service") == ""


def test_a_port_that_is_still_held_after_the_stop_is_5_with_the_pids_that_remain(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, "--reuse", "port", "--successor", *VLLM) as server:
        told = preflight(port, lock=lock, env={"VLLM_PORT_FREE_TIMEOUT": "0.3", "VLLM_TERM_GRACE": "5"})
        assert not procs.is_alive(server.pid)
        assert (told.status, told.json["reason"]) == (5, "port_still_listening_after_stop")
        [remaining] = told.json["pids"]
        assert procs.is_alive(remaining)
        assert "listener.py" in told.json["cmdlines"][str(remaining)]


class TestCommands:
    def test_the_command_replaces_preflight_once_the_port_is_free(self, port: int, lock: Path) -> None:
        told = preflight(port, "sh", "-c", "echo $PPID $VLLM_PORT; exit 7", lock=lock)
        assert (told.status, told.out) == (7, f"{os.getpid()} {port}\n")

    def test_a_double_dash_begins_the_command(self, port: int, lock: Path) -> None:
        assert preflight(port, "--", "printf", "%s", "--json", lock=lock).out == "--json"

    def test_nothing_is_executed_when_a_check_fails(self, port: int, lock: Path, tmp_path: Path) -> None:
        with holding("127.0.0.1", port):
            assert preflight(port, "touch", str(tmp_path / "executed"), lock=lock).status == 2
        assert not (tmp_path / "executed").exists()

    def test_nothing_is_executed_in_a_dry_run(self, port: int, lock: Path, tmp_path: Path) -> None:
        assert preflight(port, "touch", str(tmp_path / "executed"), lock=lock, env={"VLLM_DRY_RUN": "1"}).status == 0
        assert not (tmp_path / "executed").exists()

    def test_a_command_that_does_not_exist_is_1(self, port: int, lock: Path) -> None:
        told = preflight(port, "/no/such/command", lock=lock)
        assert (told.status, "No such file" in told.err) == (1, True)

    def test_json_with_a_command_is_1_and_says_so_as_json(self, port: int, lock: Path) -> None:
        told = preflight(port, "true", lock=lock, env={"VLLM_PREFLIGHT_JSON": "1"})
        assert (told.status, told.json["reason"]) == (1, "json_with_command")

    def test_the_lock_is_released_by_the_exec(self, port: int, lock: Path) -> None:
        script = f"import fcntl; f = open({str(lock)!r}); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')"
        assert preflight(port, sys.executable, "-c", script, lock=lock).out == "free\n"

    def test_the_command_gets_back_the_signals_that_python_ignores(self, port: int, lock: Path) -> None:
        told = preflight(port, "grep", "SigIgn", "/proc/self/status", lock=lock)
        ignored = int(told.out.split()[1], 16)
        assert not ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))


BAD = [
    ({"VLLM_PORT": "0"}, "invalid_configuration"),
    ({"VLLM_PORT": "65536"}, "invalid_configuration"),
    ({"VLLM_PORT": "80x"}, "invalid_configuration"),
    ({"VLLM_DRY_RUN": "yes"}, "invalid_configuration"),
    ({"VLLM_TERM_GRACE": "-1"}, "invalid_configuration"),
    ({"VLLM_TERM_GRACE": "1e3"}, "invalid_configuration"),
    ({"VLLM_PORT_FREE_POLL": "0"}, "invalid_configuration"),
    ({"VLLM_GPU_WARN_PCT": "101"}, "invalid_configuration"),
    ({"VLLM_GPU_FAIL_ON": "temperature,noise"}, "invalid_configuration"),
    ({"VLLM_TERM_GRACE": "1", "VLLM_STOP_TIMEOUT": "2"}, "invalid_configuration"),
    ({"VLLM_OWNER_REGEX": "("}, "bad_owner_regex"),
    ({"VLLM_HOST": "no-such-host.invalid"}, "host_unresolvable"),
    ({"VLLM_HOST": "198.51.100.7"}, "address_unavailable"),
]


@pytest.mark.parametrize(("env", "reason"), BAD, ids=str)
def test_what_is_configured_wrong_is_1_with_a_reason(port: int, lock: Path, env: dict[str, str], reason: str) -> None:
    told = preflight(port, lock=lock, env=env)
    assert (told.status, told.json["code"], told.json["reason"]) == (1, 1, reason)
    assert told.json["error"]
    assert told.json["hint"]


def test_settings_of_other_stages_are_not_this_ones_business(port: int, lock: Path) -> None:
    assert preflight(port, lock=lock, env={"VLLM_MODEL": "a/b/c", "VLLM_TENSOR_PARALLEL_SIZE": "many"}).status == 0


def test_a_lock_that_is_held_is_1_and_names_the_holder(port: int, lock: Path) -> None:
    with lock.open("w") as file:
        file.write("4711")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        told = preflight(port, lock=lock)
    assert (told.status, told.json["reason"], "4711" in told.json["error"]) == (1, "lock_held", True)


def test_an_unknown_option_is_1(port: int, lock: Path) -> None:
    assert preflight(port, "--jsno", lock=lock).status == 1


def test_secrets_on_other_peoples_command_lines_are_not_repeated(port: int, lock: Path) -> None:
    with holding("127.0.0.1", port, "--", "--api-key", "sk-very-secret", "--password=hunter22"):
        told = preflight(port, lock=lock)
    assert told.status == 2
    assert "very-secret" not in told.out + told.err
    assert "hunter22" not in told.out + told.err


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_touch_nothing(port: int, lock: Path, flag: str) -> None:
    told = preflight(port, flag, lock=lock)
    assert (told.status, told.out.split()[0] in ("usage:", "vllm-preflight")) == (0, True)
    assert not lock.exists()
