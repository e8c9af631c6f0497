"""What keeps an engine from starting at all: each with its status, one line of what and one of what to do."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests import procs
from tests.component.daemons import Tampered, ends, quick, stop
from tests.harness import Instance, merged
from tests.needs import need

pytestmark = pytest.mark.component


def reconfigured(change: dict[str, object]) -> Instance:
    return quick(config=change)


def truncated() -> Instance:
    instance = quick()
    for weights in (instance.root / "model-generate").glob("*.safetensors"):
        os.truncate(weights, weights.stat().st_size - 7)
    return instance


def not_executable() -> Instance:
    instance = quick()
    program = instance.root / "engine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    instance.config["engine"]["executable"] = str(program)
    instance.write_config()
    return instance


def without_interpreter() -> Instance:
    instance = not_executable()
    program = instance.root / "engine"
    program.write_text("#!/nowhere/python\n")
    program.chmod(0o755)
    return instance


def unreadable_state() -> Instance:
    """A file where a directory should be."""
    instance = quick()
    (instance.root / "lib").write_text("")
    return instance


Make = Callable[[], Instance]
CASES: dict[str, tuple[Make, int, str]] = {
    "a damaged model": (truncated, 65, "model.*safetensors"),
    "no model there": (lambda: reconfigured({"model": {"path": "/nowhere/at/all"}}), 66, "/nowhere/at/all"),
    "an unknown key": (lambda: reconfigured({"serve": {"prot": 1}}), 78, "serve.prot"),
    "a bad value": (lambda: reconfigured({"serve": {"port": "x"}}), 78, "serve.port"),
    "an unknown flag": (lambda: reconfigured({"engine": {"args": {"enforce-eagre": True}}}), 78, "enforce-eagre"),
    "a flag of ours": (lambda: reconfigured({"engine": {"args": {"port": 1}}}), 78, "port"),
    "no engine there": (lambda: reconfigured({"engine": {"executable": "/nowhere/vllm"}}), 78, "/nowhere/vllm"),
    "an engine that is not executable": (not_executable, 78, "engine.*is not executable"),
    "an engine without its interpreter": (without_interpreter, 78, "interpreter"),
    "a state directory that is none": (unreadable_state, 74, "lib"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_start_says_so_with_its_status(case: str) -> None:
    make, status, word = CASES[case]
    with make() as instance:
        assert instance.wait_exit() == status, instance.describe()
        log = instance.log()
        assert "Traceback" not in log
        assert "READY" not in {name for message in instance.notify.messages for name in message.fields}
        told = instance.notify.told("STATUS")[-1]
        assert told.startswith("Failed: ")
        for part in word.split(".*"):
            assert part in told
        assert not instance.engine()
        if status != 74:
            error = instance.last_json()["error"]
            assert error["status"] == status
            assert error["what"] in told
            assert error["hint"]
            assert error["hint"] in log.replace('\\"', '"')


def test_a_file_that_is_no_yaml_names_its_line() -> None:
    instance = quick()
    (instance.root / "etc/demo.yaml").write_text("serve:\n  port: [1\n")
    with instance:
        assert instance.wait_exit() == 78
        assert "demo.yaml" in instance.last_json()["error"]["what"]


def test_an_instance_that_nobody_configured_is_78_and_says_where_to_begin() -> None:
    instance = quick()
    (instance.root / "etc/demo.yaml").unlink()
    with instance:
        error = ends(instance, 78, "no_instance", ready=False)
        assert f"{instance.root}/etc/demo.yaml does not exist" in error["what"]


def test_a_failure_is_followed_by_a_start_that_succeeds() -> None:
    """Nothing of the failed start stands in the way: no lock, socket, record."""
    with quick(config={"engine": {"args": {"enforce-eagre": True}}}) as instance:
        assert instance.wait_exit() == 78
        instance.config = merged(instance.config, {"engine": {"args": {"enforce-eager": True}}})
        del instance.config["engine"]["args"]["enforce-eagre"]
        instance.write_config()
        instance.start()
        instance.wait_ready()
        stop(instance)
        assert instance.last_json()["error"] is None


# Full file systems

MOUNT = 'mount -t tmpfs -o size={size},nr_inodes={inodes} full "$0" && {fill} exec "$@"'


def full(directory: str, size: str = "64k", inodes: int = 200, fill: str = "") -> Tampered:
    """The daemon sees a tiny tmpfs at that directory of its root, in a mount namespace of its own."""
    need(os.geteuid() == 0, "root")
    instance = Tampered.quick()
    place = instance.root / directory
    place.mkdir(parents=True, exist_ok=True)
    script = MOUNT.format(size=size, inodes=inodes, fill=fill)
    instance.before = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(place))
    return instance


FILL = 'head -c 1M /dev/zero > "$0/filler" 2>/dev/null;'


@pytest.mark.parametrize("directory", ["lib", "run"])
def test_a_full_disk_ends_with_74_and_hangs_nowhere(directory: str) -> None:
    with full(directory, fill=FILL) as instance:
        assert instance.wait_exit() == 74, instance.describe()
        assert "No space left" in instance.notify.told("STATUS")[-1]
        assert "Traceback" not in instance.log()
        assert instance.engine() == []


def test_no_inode_left_ends_with_74() -> None:
    with full("lib", inodes=2) as instance:
        assert instance.wait_exit() == 74, instance.describe()
        assert "Traceback" not in instance.log()


LATER = '(while ! [ -e "$0/../gate" ]; do sleep 0.05; done; ' + FILL + ' touch "$0/../filled") & '


@pytest.mark.parametrize("directory", ["lib", "run"])
def test_a_disk_that_fills_up_later_ends_no_instance(directory: str) -> None:
    """status.json and last.json are for readers; what serves goes on, and keeps its exit status."""
    with full(directory, fill=LATER) as instance:
        instance.wait_ready()
        (instance.root / "gate").touch()
        procs.wait_until("a full disk", lambda: (instance.root / "filled").exists())
        assert instance.ask("/health")[0] == 200
        instance.kill_engine("vllm")
        assert instance.wait_exit() == 70, instance.describe()
        assert "Traceback" not in instance.log()
        if directory == "lib":
            assert "cannot write" in instance.log()
        assert instance.engine() == []


@pytest.mark.parametrize("descriptors", [20, 17, 15, 13, 12])
def test_a_host_that_gives_no_more_descriptors_is_75_and_no_bug(descriptors: int) -> None:
    with Tampered.quick(before=("bash", "-c", f'ulimit -n {descriptors}; exec "$@"', "bash"), gpus="all") as instance:
        assert instance.wait_exit() == 75, instance.describe()
        error = instance.last_json()["error"]
        assert error["code"] == "host_exhausted"
        assert "LimitNOFILE" in error["hint"]
        assert error["what"] in instance.notify.told("STATUS")[-1]
        assert "Traceback" not in instance.log()
