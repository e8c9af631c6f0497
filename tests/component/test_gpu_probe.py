"""The GPU probe as a real child: the cascade of libraries and programs, and a driver that never answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import procs
from tests.fakes.nvml import Stub, uuid
from tests.needs import need
from vllmd.gpu import amd, probe
from vllmd.preflight import devices, gpu
from vllmd.preflight.gates import Limits
from vllmd.preflight.gpu import GpuRequest

pytestmark = pytest.mark.component

FAKES = Path(__file__).parent.parent / "fakes"
FULL = {
    "name": "NVIDIA H100", "uuid": "GPU-1", "total_mib": 81559, "free_mib": 80000, "temperature": 41, "utilization": 3, "pstate": 0,
    "clocks": 0, "capability": [9, 0], "recovery": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_driver_of_this_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An own PATH for nvidia-smi, and the fake NVML, which has no driver unless a test gives it GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    fakes = tmp_path / "modules"
    fakes.mkdir()
    (fakes / "pynvml.py").symlink_to(FAKES / "pynvml.py")
    # Nothing but the fake may be found by its name, and vllmd not by the fakes' folder.
    monkeypatch.setattr(gpu, "_package_home", lambda: f"{fakes}:{Path(__file__).parent.parent.parent}")
    monkeypatch.setenv("NVML_FAKE", '{"error": 9}')
    return folder


def nvml(monkeypatch: pytest.MonkeyPatch, *gpus: dict[str, object]) -> None:
    monkeypatch.setenv("NVML_FAKE", json.dumps({"gpus": gpus}))


def smi(folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_nvml_gives_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, FULL, {**FULL, "uuid": "GPU-2", "clocks": 0x40, "pstate": 32})
    found = gpu.read(30)
    assert (found.source, found.hung_in) == ("nvml", "")
    one, two = found.gpus
    assert (one.index, one.name, one.uuid, one.memory_total_mib, one.memory_free_mib) == (0, "NVIDIA H100", "GPU-1", 81559, 80000)
    assert (one.temperature_c, one.utilization_pct, one.pstate, one.compute_capability) == (41, 3, 0, "9.0")
    assert (one.driver_version, one.clocks_event_reasons_active, one.lost) == ("570.86.15", "0x0000000000000000", "")
    assert (two.clocks_event_reasons_active, two.pstate) == ("0x0000000000000040", None)


def test_figures_that_a_gpu_does_not_have_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, {"name": "GB10"})
    [one] = gpu.read(30).gpus
    assert (one.name, one.memory_total_mib, one.temperature_c, one.lost) == ("GB10", None, None, "")


@pytest.mark.parametrize(("change", "lost"), [({"fails": 15}, "lost"), ({"fails": 16}, "reset_required"), ({"recovery": 2}, "reboot_required")])
def test_a_gpu_that_is_lost_or_must_be_reset_refuses(monkeypatch: pytest.MonkeyPatch, change: dict[str, object], lost: str) -> None:
    nvml(monkeypatch, FULL, {**FULL, **change})
    assert [each.lost for each in gpu.read(30).gpus] == ["", lost]
    assert "GPU 1" in gpu.check(GpuRequest()).failures[0]
    assert gpu.check(GpuRequest(wanted=("0",))).failures == ()


def test_without_nvml_nvidia_smi_gives_the_figures(no_driver_of_this_machines: Path) -> None:
    line = "0, NVIDIA H100, GPU-1, 81559, 80000, 41, 3, P0, 570.86.15, 9.0, 0x0000000000000040"
    smi(no_driver_of_this_machines, f'echo "{line}"')
    found = gpu.read(30)
    [one] = found.gpus
    assert (found.source, one.memory_free_mib, one.pstate, one.compute_capability) == ("nvidia-smi", 80000, 0, "9.0")
    assert one.clocks_event_reasons_active == "0x0000000000000040"


def test_an_older_nvidia_smi_is_asked_for_less(no_driver_of_this_machines: Path) -> None:
    script = 'case "$1" in *clocks_*|*compute_cap*) echo "Field is not a valid field to query."; exit 2;; esac\n'
    smi(no_driver_of_this_machines, script + 'echo "0, Tesla K80, GPU-1, [N/A], 11000, 41, [Not Supported], P8, 470.1"')
    [one] = gpu.read(30).gpus
    assert (one.name, one.memory_total_mib, one.utilization_pct, one.pstate) == ("Tesla K80", None, None, 8)


def test_an_nvidia_smi_that_fails_is_a_warning_with_its_words(no_driver_of_this_machines: Path) -> None:
    smi(no_driver_of_this_machines, 'echo "has failed because it could not communicate" >&2; exit 9')
    found = gpu.check(GpuRequest())
    assert (found.source, found.failures) == ("skipped", ())
    assert "could not communicate" in found.warnings[0]


def test_without_any_driver_it_is_skipped_with_a_warning() -> None:
    need(shutil.which("nvidia-smi", path="/usr/bin:/bin") is None, "a machine without NVIDIA driver")
    found = gpu.check(GpuRequest(limits=Limits(fail_on=frozenset({"memory"}))))
    assert (found.source, found.gpus, found.failures, len(found.warnings)) == ("skipped", (), (), 1)


def test_a_driver_call_that_never_returns_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_FAKE", '{"hang": true}')
    start = time.monotonic()
    found = gpu.check(GpuRequest(timeout_s=1.5))
    assert time.monotonic() - start < 4
    assert "stuck in nvml" in found.failures[0]


def test_an_nvidia_smi_that_never_returns_ends_at_the_deadline_with_all_its_processes(no_driver_of_this_machines: Path, tmp_path: Path) -> None:
    smi(no_driver_of_this_machines, f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do /bin/sleep 60; done")
    start = time.monotonic()
    found = gpu.check(GpuRequest(timeout_s=1.5))
    assert time.monotonic() - start < 4
    assert "stuck in nvidia-smi" in found.failures[0]
    pid = int((tmp_path / "pid").read_text())
    procs.wait_until("the end of nvidia-smi", lambda: not procs.is_alive(pid))


LIBCUDA = """
#include <stdlib.h>
static int word(const char *n) { const char *v = getenv(n); return v ? atoi(v) : 0; }
int cuInit(unsigned flags) { (void)flags; return word("CUDA_STUB_RESULT"); }
int cuDeviceGetCount(int *n) { *n = getenv("CUDA_VISIBLE_DEVICES") ? 0 : word("CUDA_STUB_DEVICES"); return 0; }
int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
"""


@pytest.fixture
def libcuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc", path="/usr/local/bin:/usr/bin:/bin")
    need(compiler is not None, "a C compiler")
    (tmp_path / "stub.c").write_text(LIBCUDA)
    subprocess.run([str(compiler), "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "stub.c")], env={"PATH": "/usr/bin:/bin"}, check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))


@pytest.mark.usefixtures("libcuda")
class TestLibcuda:
    def test_a_driver_with_devices_is_fine_and_gives_its_cuda_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_STUB_DEVICES", "1")
        nvml(monkeypatch, FULL)
        assert (gpu.read(30).cuda_result, gpu.read(30).cuda_driver) == (0, 12080)
        assert gpu.check(GpuRequest()).failures == ()
        assert gpu.check(GpuRequest(cuda="13.0")).warnings != ()

    @pytest.mark.parametrize("result", ["0", "100"])
    def test_a_driver_without_devices_refuses(self, monkeypatch: pytest.MonkeyPatch, result: str) -> None:
        monkeypatch.setenv("CUDA_STUB_RESULT", result)
        assert "no device" in gpu.check(GpuRequest()).failures[0]
        assert gpu.check(GpuRequest(wanted="none")).failures == ()

    def test_gpus_hidden_by_the_environment_are_not_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_STUB_DEVICES", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        nvml(monkeypatch, FULL)
        assert gpu.check(GpuRequest()).failures == ()


def test_a_module_in_the_current_directory_does_not_pose_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "cwd"
    trap.mkdir()
    for name in ("json", "ctypes", "vllmd"):
        (trap / f"{name}.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')")
    monkeypatch.chdir(trap)
    nvml(monkeypatch, FULL)
    assert gpu.read(30).source == "nvml"
    assert not (tmp_path / "trapped").exists()


class TestTorch:
    @pytest.fixture
    def python(self, tmp_path: Path) -> Path:
        return tmp_path / "python"

    def engine(self, python: Path, script: str) -> str:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return str(python)

    def test_it_must_import_and_see_cuda(self, python: Path) -> None:
        assert gpu.torch_failure(self.engine(python, "echo cuda"), 10) == ""
        assert "sees no CUDA" in gpu.torch_failure(self.engine(python, "echo no CUDA"), 10)
        assert "cannot import torch" in gpu.torch_failure(self.engine(python, "exit 1"), 10)
        assert "cannot be executed" in gpu.torch_failure(str(python.parent / "absent"), 10)
        assert "not known" in gpu.torch_failure("", 10)

    def test_root_runs_what_another_account_owns_with_that_one_s_rights(self) -> None:
        need(os.geteuid() == 0, "root")
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            Path(name).chmod(0o755)
            python = Path(name, "python3")
            self.engine(python, "[ $(/usr/bin/id -u) = 54321 ] && [ $(/usr/bin/id -G) = 54321 ] && echo cuda")
            os.chown(name, 54321, 54321)
            assert gpu.torch_failure(str(python), 10) == ""

    def test_a_python_without_torch_fails_for_real(self) -> None:
        assert "cannot import torch" in gpu.torch_failure(sys.executable, 30)

    def test_an_import_that_hangs_ends_at_the_deadline(self, python: Path) -> None:
        start = time.monotonic()
        assert "did not end" in gpu.torch_failure(self.engine(python, "exec /bin/sleep 60"), 0.5)
        assert time.monotonic() - start < 3

    def test_it_is_asked_only_when_it_is_required(self, python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml(monkeypatch, FULL)
        engine = self.engine(python, "exit 1")
        assert gpu.check(GpuRequest(python=engine)).failures == ()
        assert gpu.check(GpuRequest(python=engine, require_torch=True)).failures != ()


def test_the_probe_gets_no_secrets_and_no_notify_socket(no_driver_of_this_machines: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NOTIFY_SOCKET", "VLLM_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "x")
    smi(no_driver_of_this_machines, f"/usr/bin/env > {tmp_path}/environ")
    gpu.read(30)
    names = {line.partition("=")[0] for line in (tmp_path / "environ").read_text().splitlines()}
    assert "PATH" in names
    assert not names & {"NOTIFY_SOCKET", "VLLM_API_KEY", "HF_TOKEN"}
    assert os.environ["HF_TOKEN"] == "x"


def test_for_the_gates_around_a_launch_it_says_who_has_memory_and_which_mig_devices_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real binding, above the stub of the driver's library."""
    monkeypatch.setattr(gpu, "_package_home", lambda: str(Path(__file__).parent.parent.parent))
    stub = Stub(tmp_path, 2)
    for name, value in stub.environ().items():
        monkeypatch.setenv(name, value)
    stub.gpu(0, memory="80000 10000 70000")
    stub.processes(0, (os.getpid(), 69000), (2**22 - 1, 100))
    stub.slices(1, ("MIG-1", 10000, 9000))
    seen = devices.look(30)
    assert (seen.source, seen.hung_in) == ("nvml", "")
    one, two = seen.devices
    assert (one.index, one.uuid, one.memory_total_mib, one.memory_free_mib, one.slices) == (0, uuid(0), 80000, 10000, ())
    assert [(each.pid, each.used_mib) for each in one.processes] == [(os.getpid(), 69000), (2**22 - 1, 100)]
    assert one.processes[0].name == Path("/proc/self/comm").read_text().strip()
    assert one.processes[1].name == "", "gone, or not to be seen"
    assert [(each.uuid, each.memory_total_mib, each.memory_free_mib) for each in two.slices] == [("MIG-1", 10000, 9000)]
    stub.set(hang="nvmlDeviceGetMemoryInfo")
    assert devices.look(1.5).hung_in == "nvml"


def test_amd_s_gpus_are_told_by_sysfs_and_a_processor_s_own_graphics_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"index": 1, "uuid": "GPU-1", "name": "MI300X", "memory_total_mib": 196592, "memory_free_mib": 196000, "lost": "", "processes": [], "mig": []}
    monkeypatch.setattr(amd, "read", lambda: [{"index": 0, "memory_total_mib": 512}, card])
    assert probe.read_sysfs()["gpus"] == [card]
    found = gpu.parse(json.dumps({"source": "sysfs", "gpus": [card]}), timed_out=False)
    assert gpu.judge(GpuRequest(wanted=("1",)), found).failures == ()
    monkeypatch.setattr(amd, "read", list)
    assert probe.read_sysfs() == {}
