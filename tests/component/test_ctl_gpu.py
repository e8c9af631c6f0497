"""`vllmctl gpu` on a host with GPUs: a real command, the real binding above the stub, a real lease, a driver that hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from tests import procs
from tests.component.gpu_hosts import TOTAL_MIB, GpuHost, uuid
from tests.gpu_service import GpuService
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
        done = ctl(host, before="import vllmd.ctl.gpu_facts as facts; facts.DRIVER_TIMEOUT_S = 1.5")
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


# In a container of systemd-nspawn the boot id outside of a unit's sandbox is made up, while ProtectKernelTunables= shows the kernel's.
ANOTHER_BOOT = "import vllmd.gpu.quarantine as q, vllmd.system.host as h; q.boot_id = h.boot_id = lambda: '4346ac0c-f6a0-49f2-9190-0fa74313c65b'"


def test_what_the_service_quarantined_in_its_own_view_of_the_boot_is_quarantined_for_vllmctl_too() -> None:
    with GpuService(2) as service:
        service.log.xid(79, 1)
        procs.wait_until("the quarantine", lambda: quarantine.read(service.paths))
        script = f"{ANOTHER_BOOT}\nimport sys; from vllmd.ctl import main; sys.exit(main())"

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            argv = [sys.executable, "-c", script, "--root", str(service.root), "gpu", *arguments]
            return subprocess.run(argv, env={"PATH": os.environ["PATH"], **service.stub.environ()}, capture_output=True, text=True, timeout=60, check=False)

        assert "quarantined since 20" in run().stdout
        refused = run("clear", uuid(1))
        assert (refused.returncode, "class reboot" in refused.stderr) == (69, True)
        assert "is lifted" in run("clear", "--force", uuid(1)).stdout
        assert quarantine.read_all(service.paths) == {}


def test_what_another_boot_left_is_forgotten_by_force_alone() -> None:
    with GpuHost(2) as host:
        paths = root_paths(host.root)
        quarantine.add(paths, Record(uuid(1), "reboot", 79, "Xid 79", HINTS["reboot"]), boot="0-1")
        assert "is not quarantined" in ctl(host, "clear", uuid(1)).stdout
        assert quarantine.read_all(paths)
        assert "is not quarantined, and what earlier boots knew of it is forgotten" in ctl(host, "clear", "--force", uuid(1)).stdout
        assert quarantine.read_all(paths) == {}
