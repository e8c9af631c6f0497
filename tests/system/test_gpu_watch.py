"""vllmd-gpu.service under a real systemd: the stub of the driver below it, a pipe in the kernel log's place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.nvml import Stub, library, pci, uuid
from tests.system.container import wait_for
from tests.system.guides import blocks, followed
from tests.system.host import Host

pytestmark = pytest.mark.system

DRIVER = "/opt/stub"
LOG = "/run/vllmd/kmsg"
UNIT = "vllmd-gpu.service"


class Gpus:
    """The host's GPUs, and its watch."""

    def __init__(self, host: Host) -> None:
        self.host = host
        folder = host.container.path(DRIVER)
        folder.mkdir(parents=True)
        shutil.copy(library() / "libnvidia-ml.so.1", folder)
        self.stub = Stub(Path(folder), 2)
        folder.chmod(0o755)
        self.driver = {"LD_LIBRARY_PATH": DRIVER, "NVML_STUB_STATE": f"{DRIVER}/{self.stub.path.name}"}
        self.environment = "Environment=" + " ".join(f"{key}={value}" for key, value in self.driver.items())
        command = f"/usr/local/bin/vllmd gpu-watch --kmsg {LOG} --set gpu_watch.interval_s=0.2"
        text = f"[Unit]\nConditionPathExists=\n[Service]\n{self.environment}\nExecStart=\nExecStart={command}\nWatchdogSec=2\nRestartSec=0.1\n"
        host.container.write(f"/etc/systemd/system/{UNIT}.d/test.conf", text)
        host.shell(f"systemctl daemon-reload && systemd-tmpfiles --create && mkfifo -m 0666 {LOG}")

    def show(self, name: str) -> str:
        return self.host.run("systemctl", "show", "-p", name, "--value", UNIT).out.strip()

    def xid(self, number: int, index: int) -> None:
        line = f"4,1,{time.monotonic_ns() // 1000},-;NVRM: Xid (PCI:{pci(index)}): {number}, pid=1, name=python3\n"
        pipe = os.open(self.host.container.path(LOG), os.O_RDWR)
        try:
            os.write(pipe, line.encode())
        finally:
            os.close(pipe)

    def entries(self, event: str) -> list[dict[str, str]]:
        self.host.run("journalctl", "--sync")
        return [json.loads(line) for line in self.host.run("journalctl", "-o", "json", f"VLLMD_EVENT={event}").out.splitlines()]


@pytest.fixture
def gpus(host: Host) -> Iterator[Gpus]:
    made = Gpus(host)
    host.run("systemctl", "start", UNIT)
    yield made
    host.shell(f"systemctl stop {UNIT}; rm -rf /etc/systemd/system/{UNIT}.d /usr/local/bin/nvidia-smi {DRIVER} {LOG} /run/vllmd/gpu-kmsg.json /var/lib/vllmd/gpus/*; systemctl daemon-reload; systemctl reset-failed {UNIT} || :")


def test_on_a_host_without_a_gpu_it_is_skipped(host: Host) -> None:
    host.run("systemctl", "start", UNIT)
    assert host.run("systemctl", "show", "-p", "ConditionResult", "-p", "ActiveState", "--value", UNIT).out.split() == ["inactive", "no"]
    assert host.run("systemctl", "is-enabled", UNIT).out.strip() == "enabled"


def test_a_lost_gpu_is_quarantined_for_every_instance_until_a_person_clears_it(gpus: Gpus) -> None:
    host = gpus.host
    assert (gpus.show("ActiveState"), gpus.show("User")) == ("active", "vllmd")
    connects = "import socket; socket.socket(socket.AF_UNIX).connect('/run/vllmd/gpu.sock')"
    assert host.run("stat", "-c", "%U %G %a", "/run/vllmd/gpu.sock").out.strip() == "vllmd vllmd 660"
    assert host.run("runuser", "-u", "nobody", "-g", "vllmd-admin", "--", "python3", "-c", connects, check=False).status == 0
    assert "Permission denied" in host.run("runuser", "-u", "nobody", "--", "python3", "-c", connects, check=False).err
    wait_for(lambda: "2 GPUs" in gpus.show("StatusText"), 10, "the status")
    gpus.xid(79, 1)
    record = wait_for(lambda: host.shell(f"cat /var/lib/vllmd/gpus/{uuid(1)}.json", check=False).out, 10, "the quarantine")
    assert (json.loads(record)["class"], json.loads(record)["xid"]) == ("reboot", 79)
    assert host.run("stat", "-c", "%U", f"/var/lib/vllmd/gpus/{uuid(1)}.json").out.strip() == "vllmd"
    [entry] = wait_for(lambda: gpus.entries("gpu-quarantined"), 10, "the journal")
    assert (entry["VLLMD_GPU"], entry["PRIORITY"], entry["_SYSTEMD_UNIT"]) == (uuid(1), "3", UNIT)
    assert f"GPU {uuid(1)} is quarantined" in host.run("journalctl", "-x", f"MESSAGE_ID={entry['MESSAGE_ID']}").out
    assert "gpu-quarantined" in gpus.host.run("vllmctl", "events", "-n", "all").out
    wait_for(lambda: "1 reboot" in gpus.show("StatusText"), 10, "the status")

    name = host.instance("lost", dropin=gpus.environment, gpus=[uuid(1)])
    host.start(name, check=False)
    assert host.wait_unit(name, 20, ActiveState="failed").status == ("exit-code", 69)
    cleared = host.run("vllmctl", "gpu", "clear", "--force", uuid(1))
    assert host.shell("cat /var/lib/vllmd/gpus/* 2>/dev/null || :").out == "", cleared.out
    host.start(name)
    host.stop(name)


def test_a_watch_that_hangs_is_ended_by_the_watchdog_and_leaves_nothing(gpus: Gpus) -> None:
    host_pid = next(pid for pid, line in gpus.host.container.processes("vllmd").items() if "gpu-watch" in line)
    wait_for(lambda: any("gpu.sampler" in line for line in gpus.host.container.processes("vllmd").values()), 10, "the sampler")
    gpus.host.run("python3", "-c", f"import os; os.kill({host_pid}, {int(signal.SIGSTOP)})")
    wait_for(lambda: gpus.show("NRestarts") == "1" and gpus.show("ActiveState") == "active", 30, "the restart")
    lines = gpus.host.container.processes("vllmd")
    assert host_pid not in lines
    wait_for(lambda: sum("gpu.sampler" in line for line in gpus.host.container.processes("vllmd").values()) == 1, 10, "one sampler")


def test_its_sandbox_bears_the_driver_and_stopping_the_target_stops_it(gpus: Gpus) -> None:
    """The stub is loaded, events are waited for, and memory of processes is attributed, all within the unit's sandbox."""
    wait_for(lambda: '"nvml"' in gpus.host.shell("curl -s --unix-socket /run/vllmd/gpu.sock http://x/status || python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/vllmd/gpu.sock'); s.sendall(b'GET /status HTTP/1.0\\r\\n\\r\\n'); print(s.makefile().read())\"").out, 10, "the document")
    gpus.stub.event(31)
    wait_for(lambda: gpus.entries("gpu-finding"), 10, "the driver's event")
    gpus.host.run("systemctl", "stop", "vllmd.target")
    wait_for(lambda: gpus.show("ActiveState") == "inactive", 20, "its end")
    assert gpus.show("Result") == "success"
    assert gpus.host.container.processes("vllmd") == {}


def test_the_guide_for_a_gpu_that_died(gpus: Gpus) -> None:
    """docs/guides/gpu-died.md: GPU 1 wants a reset while two serve one model."""
    host, guide = gpus.host, "gpu-died.md"
    name = host.instance("chat", dropin=gpus.environment, serve={"tensor_parallel_size": 2})
    reset = f"#!/bin/sh\n[ \"$*\" = '--gpu-reset -i 1' ] && ! systemctl -q is-active {UNIT} && sed -i 's/^gpu 1 field 230 1$/gpu 1 field 230 0/' {gpus.driver['NVML_STUB_STATE']}\n"
    host.container.write("/usr/local/bin/nvidia-smi", reset, 0o755)
    host.start(name)
    assert host.state(name)["gpus"] == [uuid(0), uuid(1)]
    gpus.stub.gpu(1, field_230=1)
    gpus.xid(119, 1)
    assert host.wait_unit(name, 20, ActiveState="failed").status == ("exit-code", 69)
    [look] = blocks(guide, "look")
    for command in look.splitlines():
        said = host.shell(command, check=False).out
        assert uuid(1)[:12] in said, command
        assert "reset" in said, command
    others, repair, back = blocks(guide)
    followed(host, [others])
    assert host.state(name)["gpus"] == [uuid(0)]
    followed(host, [repair], **gpus.driver)  # as everybody finds a driver's library
    assert host.run("vllmctl", "gpu", env=gpus.driver).status == 0
    followed(host, [back])
    assert host.state(name)["gpus"] == [uuid(0), uuid(1)]
