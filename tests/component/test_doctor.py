"""`vllmctl doctor` on a host with GPUs: the real command above the stub of the driver, and its advice followed.

What only the machine itself could do, `systemctl reboot` and `nvidia-smi --gpu-reset`, is done to the stub.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.component.gpu_hosts import GpuHost, uuid
from tests.json_docs import differences
from tests.ports import free_port
from vllmd.config.paths import root_paths
from vllmd.core.xids import HINTS
from vllmd.gpu import quarantine
from vllmd.gpu.quarantine import Record

pytestmark = pytest.mark.component

OF_THIS_MACHINE = {"cgroup-controllers", "cgroup-v1", "clock-unsynchronised", "clock-behind", "journal-none", "journal-volatile", "kernel-old", "overcommit", "disk-low", "disk-full", "inodes-low"}


def environ(host: GpuHost) -> dict[str, str]:
    programs = host.root / "programs"
    return {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(host.root), **host.stub.environ()}


def doctor(host: GpuHost, *arguments: str) -> dict[str, dict[str, Any]]:
    argv = [sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", "--root", str(host.root), "doctor", "--json", *arguments]
    done = subprocess.run(argv, env=environ(host), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(done.stdout)
    assert done.returncode == (1 if document["findings"] else 0)
    assert differences("vllmctl doctor --json", document) == []
    return {each["check"]: each for each in document["findings"] if each["check"] not in OF_THIS_MACHINE}


def follow(host: GpuHost, finding: dict[str, Any]) -> None:
    done = subprocess.run(["sh", "-c", finding["mend"]], env=environ(host), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{finding['mend']}: {done.stdout}{done.stderr}"


def programs(host: GpuHost) -> None:
    """systemctl and nvidia-smi of this host: a reboot and a reset make the driver what it was at first; vllmctl is the real one."""
    folder = host.root / "programs"
    folder.mkdir()
    well = host.root / "well"
    well.write_bytes(host.stub.path.read_bytes())
    cure = f'cp "{well}" "{well}.new" && mv "{well}.new" "{host.stub.path}"'
    texts = {"systemctl": f'case $1 in reboot) {cure} ;; esac', "nvidia-smi": f'[ "$*" = "--gpu-reset -i 1" ] && {cure}', "vllmctl": f'exec "{sys.executable}" -c "import sys; from vllmd.ctl import main; sys.exit(main())" "$@"'}
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)


def test_a_host_with_gpus_that_are_well_has_no_finding() -> None:
    with GpuHost(2) as host:
        programs(host)
        assert doctor(host) == {}


def quarantined(host: GpuHost) -> None:
    quarantine.add(root_paths(host.root), Record(uuid(1), "reset", 119, "Xid 119: the GSP does not answer", HINTS["reset"]))


def quarantined_and_waiting(host: GpuHost) -> None:
    quarantined(host)
    host.stub.gpu(1, field_230=1)


@pytest.mark.parametrize(
    ("check", "plant", "mend"),
    [
        ("driver-differs", lambda host: host.stub.set(init=18), "systemctl reboot"),
        ("driver-hung", lambda host: host.stub.set(hang="nvmlDeviceGetTemperature"), "systemctl reboot"),
        ("gpu-lost", lambda host: host.stub.gpu(1, fails=15), "systemctl reboot"),
        ("gpu-reset", lambda host: host.stub.gpu(1, field_230=1), "systemctl stop vllmd-gpu.service && nvidia-smi --gpu-reset -i 1"),
        ("gpu-quarantined", quarantined, "vllmctl --root"),
        ("gpu-quarantined", quarantined_and_waiting, "systemctl stop vllmd-gpu.service && nvidia-smi --gpu-reset -i 1"),
    ],
)
def test_a_sick_gpu_is_found_and_the_advice_mends_it(check: str, plant: Callable[[GpuHost], None], mend: str) -> None:
    with GpuHost(2) as host:
        programs(host)
        plant(host)
        began = time.monotonic()
        found = doctor(host, "--timeout", "6")
        assert time.monotonic() - began < 12, "a driver that hangs does not hang doctor"
        assert check in found
        assert found[check]["mend"].startswith(mend)
        follow(host, found[check])
        assert doctor(host) == {}


def test_a_port_of_somebody_else_is_named_with_the_process_that_has_it() -> None:
    with GpuHost(0) as host:
        programs(host)
        port = free_port()
        (host.root / "etc").mkdir()
        (host.root / "etc/a.yaml").write_text(json.dumps({"serve": {"port": port}, "gpus": "none"}))
        assert doctor(host) == {}
        squatter = subprocess.Popen([sys.executable, "-c", f"import socket, sys; s = socket.create_server(('127.0.0.1', {port})); print('here', flush=True); s.accept()"], stdout=subprocess.PIPE)
        try:
            assert squatter.stdout is not None
            squatter.stdout.readline()
            assert str(squatter.pid) in str(doctor(host)["port-taken"])
        finally:
            squatter.kill()
            squatter.communicate()


def test_an_instance_that_runs_by_hand_is_not_a_stranger_on_its_own_port() -> None:
    with GpuHost(1) as host, host.instance("demo") as instance:
        instance.wait_ready()
        (host.root / "programs").mkdir()
        found = doctor(host)
        instance.signal(signal.SIGTERM)
        instance.wait_exit()
        assert not {"port-taken", "lock-held"} & set(found)


def test_a_source_that_answers_nothing_is_left_at_its_deadline() -> None:
    import socket

    with GpuHost(0) as host, socket.create_server(("127.0.0.1", 0)) as silent:
        programs(host)
        port = silent.getsockname()[1]
        (host.root / "etc").mkdir()
        text = {"model": {"id": "org/tiny", "sources": ["hf-hub"], "hf_endpoint": f"http://127.0.0.1:{port}"}, "serve": {"port": free_port()}, "engine": {"executable": "/bin/true"}, "gpus": "none"}
        (host.root / "etc/a.yaml").write_text(json.dumps(text))
        began = time.monotonic()
        found = doctor(host, "--timeout", "6")
        assert time.monotonic() - began < 12
        assert "source-unreachable" in found, "that it does not answer is a finding"


def test_an_instance_that_nobody_knows_is_an_error() -> None:
    with GpuHost(0) as host:
        argv = [sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", "--root", str(host.root), "doctor", "nope"]
        done = subprocess.run(argv, env=environ(host), capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (64, False)
        assert "no instance nope" in done.stderr
