"""The unit files: valid for systemd 252, sandboxed, and in agreement with the program's exit statuses and paths."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.needs import need
from vllmd.config.paths import SYSTEM
from vllmd.errors import Status

pytestmark = pytest.mark.unit

UNITS = Path(__file__).resolve().parents[2] / "units"
SCORES = {"vllmd@.service": 2.0, "vllmd-gpu.service": 1.2}
"""Of `systemd-analyze security` on 252; 2.0 is the bar, and what is better must not silently get worse."""
NO_RESTART = {
    Status.PORT_FOREIGN,
    Status.PORT_OTHER_USER,
    Status.USAGE,
    Status.DATAERR,
    Status.UNAVAILABLE,
    Status.NOPERM,
    Status.CONFIG,
}


def settings(unit: str) -> list[tuple[str, str]]:
    lines = (UNITS / unit).read_text().splitlines()
    return [(key, value) for key, sep, value in (line.partition("=") for line in lines if not line.startswith("#")) if sep]


def values(key: str, unit: str = "vllmd@.service") -> list[str]:
    return [value for name, value in settings(unit) if name == key]


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """The units as they are installed, with programs that exist."""
    need(shutil.which("systemd-analyze") is not None, "systemd-analyze")
    program = tmp_path / "vllmd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in ("vllmd@.service", "vllmd-gpu.service", "vllmd.target"):
        (tmp_path / unit).write_text((UNITS / unit).read_text().replace("@BINDIR@", str(tmp_path)))
    return tmp_path


def analyze(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *argv], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("unit", ["vllmd@demo.service", "vllmd-gpu.service", "vllmd.target"])
def test_systemd_finds_nothing_wrong_with(rendered: Path, unit: str) -> None:
    if "demo" in unit:
        (rendered / unit).write_text((rendered / "vllmd@.service").read_text())
    done = analyze("verify", "--man=no", f"./{unit}", cwd=rendered)
    complaints = [line for line in done.stderr.splitlines() if unit in line or "vllmd@" in line]
    assert complaints == []


@pytest.mark.parametrize("unit", SCORES)
def test_sandbox_scores_as_recorded(rendered: Path, unit: str) -> None:
    done = analyze("security", "--offline=true", "--no-pager", f"--threshold={SCORES[unit] * 10:.0f}", f"./{unit}", cwd=rendered)
    overall = re.search(r"Overall exposure level .*?: ([0-9.]+)", done.stdout)
    assert overall is not None, done.stderr
    assert float(overall[1]) <= SCORES[unit]
    assert done.returncode == 0


def test_no_restart_where_a_person_must_act_and_only_there() -> None:
    listed = {int(number) for number in values("RestartPreventExitStatus")[0].split()}
    assert listed == {int(status) for status in NO_RESTART}
    assert values("Restart") == ["on-failure"]


def test_nothing_needs_a_newer_systemd_than_252() -> None:
    assert values("Type") == ["notify"], "notify-reload is of 253"
    newer = {"DelegateSubgroup", "RestartSteps", "RestartMaxDelaySec", "ImportCredential", "MemoryZSwapMax", "SurviveFinalKillSignal", "OpenFile"}
    assert newer.isdisjoint(name for name, _ in settings("vllmd@.service"))


def test_instance_name_is_never_unescaped() -> None:
    """%I turns qwen3-8b into qwen3/8b."""
    assert not [value for _, value in settings("vllmd@.service") if "%I" in value]


def test_reload_needs_no_procps() -> None:
    assert [value.split()[0] for value in values("ExecReload")] == ["/bin/sh"]


def test_each_instance_has_its_own_tmp_and_a_dev_shm_that_anyone_may_fill() -> None:
    assert values("PrivateTmp") == ["yes"]
    assert values("TemporaryFileSystem") == ["/dev/shm:mode=1777,size=50%"]


@pytest.mark.parametrize("key", ["MemoryDenyWriteExecute", "ProtectControlGroups", "ProtectProc", "PrivateDevices", "PrivateUsers"])
def test_sandbox_leaves_out_what_vllm_does_not_bear(key: str) -> None:
    assert values(key) == []


def test_directories_are_those_of_the_program() -> None:
    assert values("StateDirectory") == [SYSTEM.state.name]
    assert values("CacheDirectory") == [SYSTEM.cache.name]
    assert Path("/run", values("RuntimeDirectory")[0]) == SYSTEM.instance_runtime("%i")
    assert values("RuntimeDirectoryPreserve") == ["restart"]
    made = {line.split()[1] for line in (UNITS / "tmpfiles.d/vllmd.conf").read_text().splitlines() if line.startswith("d ")}
    wanted = (SYSTEM.runtime, SYSTEM.gpus, SYSTEM.locks, SYSTEM.sockets, SYSTEM.state, SYSTEM.models, SYSTEM.cache)
    assert {str(path) for path in wanted} <= made


@pytest.mark.parametrize("unit", ["vllmd@.service", "vllmd-gpu.service"])
def test_stopping_the_target_stops_every_instance_and_the_watch(unit: str) -> None:
    assert values("PartOf", unit) == ["vllmd.target"]
    assert values("WantedBy", unit) == ["vllmd.target"]
    assert values("WantedBy", "vllmd.target") == ["multi-user.target"]


def test_root_s_directories_cannot_be_replaced_by_the_service() -> None:
    """systemd chowns, and removes, what lies at /run/vllmd/i/NAME: through a link that would be anybody's directory."""
    lines = [line.split() for line in (UNITS / "tmpfiles.d/vllmd.conf").read_text().splitlines() if line.startswith("d ")]
    made = {path: (mode, user) for _, path, mode, user, _, _ in lines}
    assert made["/run/vllmd"] == ("1775", "root"), "sticky: entries of others cannot be renamed or removed"
    assert made["/run/vllmd/i"] == ("0755", "root")


def test_only_the_gpu_watch_reads_the_kernel_s_log() -> None:
    assert values("AmbientCapabilities", "vllmd-gpu.service") == values("CapabilityBoundingSet", "vllmd-gpu.service") == ["CAP_SYSLOG"]
    assert "/dev/kmsg r" in values("DeviceAllow", "vllmd-gpu.service")
    assert values("ProtectKernelLogs", "vllmd-gpu.service") == []
    assert values("ProtectKernelLogs") == ["yes"]


def test_an_instance_starts_after_the_gpu_watch_and_does_without_it() -> None:
    assert "vllmd-gpu.service" in values("After")
    assert "vllmd-gpu.service" in values("Wants")
    assert values("Requires") == []
    made = (UNITS / "tmpfiles.d/vllmd.conf").read_text()
    assert f"d {SYSTEM.state}/gpus 0755 vllmd vllmd" in made
