"""The report as JSON and as the error of `vllmd run`; names of units; order of a tree."""

from __future__ import annotations

import json

import pytest

from vllmd.errors import ConfigError, GpuUnavailable, PermissionMissing, PortRefused, Status, TryLater
from vllmd.preflight.reclaim import launch_cgroup, post_order
from vllmd.preflight.report import Gpu, Report
from vllmd.system.cgroupnames import Mount, is_instance, is_login, is_user_unit, unit_of
from vllmd.system.procfs import Stat

pytestmark = pytest.mark.unit


def report(code: int, reason: str) -> Report:
    return Report(ok=not code, code=code, host="h", ports=(8000, 8001), reason=reason, error="e", hint="h", cmdlines={7: "x"}, gpus=(Gpu(0),))


def test_it_is_one_object_with_todays_keys_beside_ours() -> None:
    told = json.loads(json.dumps(report(2, "x").as_dict()))
    assert {key: told[key] for key in ("schema", "status", "ok", "code", "port", "ports")} == {
        "schema": 1, "status": "error", "ok": False, "code": 2, "port": 8000, "ports": [8000, 8001],
    }  # fmt: skip
    assert told["cmdlines"] == {"7": "x"}
    assert set(told["gpus"][0]) >= {
        "index", "memory_total_mib", "memory_free_mib", "temperature_c", "utilization_pct", "pstate", "clocks_event_reasons_active", "warnings",
    }  # fmt: skip
    assert report(0, "").as_dict()["status"] == "ok"


@pytest.mark.parametrize(
    ("code", "reason", "kind", "status"),
    [
        (2, "port_owned_by_other_process", PortRefused, 2),
        (3, "port_owned_by_other_uid", PortRefused, 3),
        (4, "listener_unattributable", PortRefused, 4),
        (5, "port_still_listening_after_stop", PortRefused, 5),
        (1, "gpu_hard_fail", GpuUnavailable, 69),
        (1, "gpu_memory_not_back", TryLater, 75),
        (1, "lock_held", TryLater, 75),
        (1, "port_not_permitted", PermissionMissing, 77),
        (1, "host_unresolvable", ConfigError, 78),
    ],
)
def test_under_run_every_reason_has_its_status(code: int, reason: str, kind: type[Exception], status: int) -> None:
    error = report(code, reason).as_error()
    assert (type(error), error.status, error.code) == (kind, Status(status), reason)


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/system.slice/system-vllmd.slice/vllmd@a.service/engine-1", "vllmd@a.service"),
        ("/system.slice/nginx.service", "nginx.service"),
        ("/user.slice/user-1.slice/session-3.scope", "session-3.scope"),
        ("/user.slice/user-1.slice/user@1.service/app.slice/a.service", "a.service"),
        ("/user.slice/user-1.slice/user@1.service", "user@1.service"),
        ("/machine.slice/machine-x.scope/payload/system.slice/nginx.service", "machine-x.scope"),
        ("/system.slice/_cpu.service/x", "cpu.service"),
        ("/init.scope", "init.scope"),
        ("/", ""),
        ("", ""),
    ],
)
def test_a_path_names_the_unit_that_can_be_stopped(cgroup: str, unit: str) -> None:
    assert unit_of(cgroup) == unit


def test_instances_logins_and_user_units_are_told_apart() -> None:
    assert is_instance("/machine.slice/machine-x.scope/payload/system.slice/system-vllmd.slice/vllmd@a.service/x")
    assert not is_instance("/system.slice/vllmd.service")
    assert is_login("/user.slice/user-1.slice/session-3.scope")
    assert not is_login("/machine.slice/libpod-1.scope")
    assert is_user_unit("/user.slice/user-1.slice/user@1.service/app.slice/a.service")
    assert not is_user_unit("/user.slice/user-1.slice/user@1.service")


def test_paths_and_directories_are_two_views_of_one_mount() -> None:
    whole, part = Mount("/sys/fs/cgroup", "/"), Mount("/mnt", "/box")
    assert whole.directory("/a/b") == "/sys/fs/cgroup/a/b"
    assert (whole.directory("/"), whole.path("/sys/fs/cgroup")) == ("/sys/fs/cgroup", "/")
    assert (part.directory("/box/a"), part.path("/mnt/a"), part.directory("/other")) == ("/mnt/a", "/box/a", "")
    assert (Mount("", "").directory("/a"), whole.path("/elsewhere")) == ("", "")


def test_only_a_cgroup_made_for_a_launch_is_ended_as_a_whole() -> None:
    assert launch_cgroup("/s/vllmd@a.service/engine-1/deeper") == "/s/vllmd@a.service/engine-1"
    assert launch_cgroup("/s/vllm.service") == ""
    assert launch_cgroup("/") == ""


def test_a_tree_is_ended_children_first_and_each_process_once() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 10, 13: 11, 20: 1}
    table = {pid: Stat(pid, "x", "S", ppid, pid, pid, 1) for pid, ppid in parents.items()}
    found = post_order([10, 13, 99], table)
    assert sorted(found) == [10, 11, 12, 13, 99]
    assert found.index(13) < found.index(11) < found.index(10)
    assert found.index(12) < found.index(10)
