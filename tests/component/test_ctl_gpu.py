"""`vllmctl gpu` on a host with GPUs: a real command, the real binding above the stub, a real lease, a driver that hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.component.gpu_hosts import TOTAL_MIB, GpuHost, uuid
from vllmd.config.paths import root_paths
from vllmd.core.xids import HINTS
from vllmd.gpu import quarantine
from vllmd.gpu.quarantine import Record

pytestmark = pytest.mark.component


def ctl(host: GpuHost, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """`before`: Python that is executed first."""
    script = f"{before}\nimport sys; from vllmd.ctl import main; sys.exit(main())"
    argv = [sys.executable, "-c", script, "--root", str(host.root), "gpu", *arguments]
    environ = {"PATH": os.environ["PATH"], "HOME": str(host.root), **host.stub.environ()}
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60, check=False)


def gpus(host: GpuHost) -> list[dict[str, Any]]:
    return list(json.loads(ctl(host, "--json").stdout)["gpus"])


def test_it_shows_who_has_which_gpu() -> None:
    with GpuHost(2) as host, host.instance("qwen3", {"gpus": ["0"]}) as instance:
        instance.wait_ready()
        host.memory(0, 60000, (instance.engine_process("VLLM::Worker").pid, 59000))
        done = ctl(host)
        assert (done.returncode, done.stderr) == (0, "")
        first, second = done.stdout.splitlines()[1:3]
        assert first.split()[-8:] == ["GPU-00000000", "leased", "qwen3", f"60000/{TOTAL_MIB}", "MiB", "41", "°C", "-"]
        assert second.split()[-8:] == ["GPU-00000001", "free", "-", f"500/{TOTAL_MIB}", "MiB", "41", "°C", "-"]
        one, two = gpus(host)
        [holder] = one["holders"]
        assert (holder["instance"], holder["pid"], one["usable"], two["holders"]) == ("qwen3", instance.pid, True, [])
        instance.kill_engine("vllm")
        host.memory(0)
        instance.wait_exit()


def test_a_quarantine_is_shown_and_lifted() -> None:
    with GpuHost(2) as host:
        paths = root_paths(host.root)
        quarantine.add(paths, Record(uuid(1), "reset", 119, "Xid 119: the GSP does not answer", HINTS["reset"]))
        host.stub.gpu(1, field_230=1)
        done = ctl(host)
        assert done.returncode == 3
        assert "quarantined since 20" in done.stdout
        assert "Xid 119" in done.stdout
        refused = ctl(host, "clear", "1")
        assert refused.returncode == 69
        assert "still cannot be used" in refused.stderr
        assert "Traceback" not in refused.stderr
        host.stub.gpu(1, field_230=0)
        done = ctl(host, "clear", uuid(1))
        assert (done.returncode, quarantine.read(paths)) == (0, {})
        assert ctl(host).returncode == 0


def test_a_gpu_that_has_fallen_off_the_bus_is_shown_as_lost() -> None:
    with GpuHost(2) as host:
        host.stub.gpu(1, fails=15)
        done = ctl(host)
        assert done.returncode == 3
        assert "lost" in done.stdout.splitlines()[2]


def test_a_driver_that_hangs_is_told_at_the_deadline() -> None:
    with GpuHost() as host:
        host.stub.set(hang="nvmlDeviceGetTemperature")
        began = time.monotonic()
        done = ctl(host, before="import vllmd.ctl_gpu_facts as facts; facts.DRIVER_TIMEOUT_S = 1.5")
        assert time.monotonic() - began < 20
        assert done.returncode == 69
        assert "stuck in nvmlDeviceGetTemperature" in done.stdout


def test_without_a_driver_there_is_no_gpu_and_nothing_is_wrong() -> None:
    with GpuHost() as host:
        host.stub.set(init=9)
        done = ctl(host)
        assert done.returncode == 0
        assert done.stdout.startswith("no GPU")


def test_where_a_quarantine_may_not_be_lifted_it_says_so() -> None:
    with GpuHost() as host:
        paths = root_paths(host.root)
        quarantine.add(paths, Record(uuid(0), "reset", 119, "Xid 119"))
        done = ctl(host, "clear", "0", before="import os\ndef unlink(*a, **k): raise PermissionError(13, 'Permission denied')\nos.unlink = unlink")
        assert done.returncode == 77
        assert "Permission denied" in done.stderr
        assert "sudo" in done.stderr
