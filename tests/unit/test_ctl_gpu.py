"""`vllmctl gpu`: what people and programs read of every GPU, and what a clear refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllmd import ctl
from vllmd.config.paths import Paths, root_paths
from vllmd.errors import GpuUnavailable, UsageError
from vllmd.gpu import client, leases, quarantine
from vllmd.gpu.leases import Claim
from vllmd.gpu.quarantine import Record

pytestmark = pytest.mark.unit

UUIDS = [f"GPU-{index:08x}-1111-2222-3333-444455556666" for index in range(3)]


def gpu(index: int, **more: Any) -> dict[str, Any]:
    ok = {"class": "ok", "what": "", "hint": ""}
    figures = {"memory_total_mib": 81559, "memory_used_mib": 559, "memory_free_mib": 81000, "temperature_c": 41}
    return {"index": index, "uuid": UUIDS[index], "name": "NVIDIA H100", "lost": "", "processes": [], "verdict": ok, **figures, **more}


class Ctl:
    """Runs the command in an own root; the driver's answer is `said`."""

    def __init__(self, paths: Paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = paths
        self.said: dict[str, Any] = {"schema": 1, "source": "nvml", "driver_version": "570.86.15", "gpus": [gpu(0), gpu(1), gpu(2)]}
        self._capsys = capsys
        monkeypatch.setattr(client, "read_once", lambda _paths, _timeout_s: self.said)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        status = ctl.run(["--root", str(self.paths.runtime.parent), "gpu", *arguments])
        return status, self._capsys.readouterr().out

    def quarantine(self, index: int, cls: Any, xid: int = 79) -> None:
        quarantine.add(self.paths, Record(UUIDS[index], cls, xid, f"Xid {xid}: something", "Do something.", first_at=1e9))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ctl:
    return Ctl(root_paths(tmp_path), capsys, monkeypatch)


def test_a_free_gpu_is_one_line_with_everything(run: Ctl) -> None:
    status, out = run()
    head, *lines = out.splitlines()
    assert status == 0
    assert head.split() == ["GPU", "NAME", "UUID", "STATE", "OWNER", "MEMORY", "TEMP", "ERRORS"]
    assert lines[0].split() == ["0", "NVIDIA", "H100", "GPU-00000000", "free", "-", "559/81559", "MiB", "41", "°C", "-"]
    assert lines[-1] == "driver 570.86.15, by nvml"
    assert len(lines) == 4


def test_the_owner_is_who_holds_the_lease_else_whose_processes_are_on_it(run: Ctl) -> None:
    run.said["gpus"][1] = gpu(1, processes=[{"pid": 7, "used_mib": 100, "unit": "notebook.service"}, {"pid": 8, "used_mib": 1, "unit": ""}])
    held = leases.take(run.paths, [Claim(UUIDS[0])], "qwen3")
    try:
        lines = run()[1].splitlines()
    finally:
        held.release()
    assert "leased  qwen3 " in lines[1].replace("leased ", "leased ", 1)
    assert "in use" in lines[2]
    assert "notebook.service, pid 8" in lines[2]


def test_who_is_on_a_leased_gpu_without_a_lease_is_told(run: Ctl) -> None:
    run.said["gpus"][0] = gpu(0, processes=[{"pid": 7, "used_mib": 100, "unit": "notebook.service"}])
    held = leases.take(run.paths, [Claim(UUIDS[0])], "qwen3")
    try:
        assert "also used by pid 7 of notebook.service, 100 MiB" in run()[1]
    finally:
        held.release()


def test_a_quarantined_gpu_says_why_and_what_to_do_and_the_status_is_3(run: Ctl) -> None:
    run.quarantine(1, "reboot")
    status, out = run()
    assert status == 3
    assert "quarantined since 2001-09-0" in out
    assert "class reboot, seen once: Xid 79: something" in out
    assert "     Do something." in out.splitlines()


@pytest.mark.parametrize(
    ("change", "state"), [({"lost": "lost"}, "lost"), ({"verdict": {"class": "reset", "what": "it wants a reset", "hint": "Reset it."}}, "reset")]
)
def test_a_gpu_that_the_driver_gives_up_is_3(run: Ctl, change: dict[str, Any], state: str) -> None:
    run.said["gpus"][2] = gpu(2, **change)
    status, out = run("--json")
    assert status == 3
    found = json.loads(out)["gpus"]
    assert [(each["state"], each["usable"]) for each in found] == [("free", True), ("free", True), (state, False)]


def test_a_warning_does_not_make_it_unusable(run: Ctl) -> None:
    run.said["gpus"][2] = gpu(2, verdict={"class": "warn", "what": "rows wait to be remapped", "hint": "Reset it soon."})
    status, out = run()
    assert status == 0
    assert "rows wait to be remapped: Reset it soon." in out


def test_errors_are_counted(run: Ctl) -> None:
    run.said["gpus"][0] = gpu(0, ecc={"corrected": 3, "uncorrected": 2}, remapped={"correctable": 0, "uncorrectable": 1, "pending": True, "failed": False})
    assert "2 uncorrected, 3 corrected, remapped rows uncorrectable 1, pending 1" in run()[1]


def test_a_driver_that_hangs_is_69(run: Ctl) -> None:
    run.said = {"schema": 1, "source": "nvml", "stuck_in": "nvmlDeviceGetMemoryInfo", "gpus": []}
    status, out = run()
    assert status == 69
    assert "stuck in nvmlDeviceGetMemoryInfo" in out


def test_a_host_without_gpu_is_fine(run: Ctl) -> None:
    run.said = {"schema": 1, "source": "none", "gpus": []}
    assert run() == (0, "no GPU\n")
    run.quarantine(0, "reboot")
    status, out = run()
    assert status == 3, "one that has fallen off the bus is not seen any more"
    assert UUIDS[0][:12] in out
    assert "not seen" in out


HOSTILE = "\x1b[2J\x07GPU\nfake line\u202e"


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"gpus": 7},
        {"gpus": [None, [], "x", {}]},
        {"gpus": [{"index": True, "uuid": 5, "processes": [[]], "mig": {"a": 1}, "ecc": [], "remapped": {"pending": "x", "failed": []}, "verdict": "x"}]},
        {"gpus": [{"index": 10**30, "uuid": HOSTILE, "name": HOSTILE * 1000, "lost": HOSTILE, "verdict": {"class": HOSTILE, "what": HOSTILE}}], "stuck_in": HOSTILE},
        {"gpus": [{"index": 0, "memory_total_mib": -5, "memory_free_mib": 1e300, "processes": [{"pid": -1, "unit": HOSTILE}]}]},
        {"driver_version": HOSTILE, "source": HOSTILE, "gpus": [{"index": 0}]},
    ],
)
def test_what_the_service_s_user_wrote_moves_no_cursor_and_breaks_nothing(run: Ctl, said: dict[str, Any]) -> None:
    run.said = said
    for arguments in ((), ("--json",)):
        _, out = run(*arguments)
        assert all(char.isprintable() or char == "\n" for char in out)
        assert "\nfake" not in out
        assert len(out) < 5000
    folder = run.paths.state / "gpus"
    folder.mkdir(parents=True)
    (folder / f"{UUIDS[0]}.json").write_text(json.dumps({**Record(UUIDS[0], "replace").as_dict(), "what": HOSTILE, "hint": HOSTILE * 50}))
    _, out = run()
    assert all(char.isprintable() or char == "\n" for char in out)


# -- clear


def test_a_clear_lifts_a_reset_that_was_done(run: Ctl) -> None:
    run.quarantine(1, "reset", 119)
    status, out = run("clear", "1")
    assert (status, quarantine.read(run.paths)) == (0, {})
    assert "is lifted (it was: Xid 119: something)" in out
    assert "is not quarantined" in run("clear", UUIDS[1])[1]


@pytest.mark.parametrize("change", [{"lost": "reset_required"}, {"recovery_action": 1}])
def test_a_clear_before_the_reset_is_refused_unless_forced(run: Ctl, change: dict[str, Any]) -> None:
    run.quarantine(1, "reset")
    run.said["gpus"][1] = gpu(1, **change)
    with pytest.raises(GpuUnavailable) as refused:
        run("clear", "1")
    assert refused.value.code == "gpu_still_sick"
    assert "--force" in refused.value.hint
    assert UUIDS[1] in quarantine.read(run.paths)
    run("clear", "--force", "1")
    assert quarantine.read(run.paths) == {}


@pytest.mark.parametrize("cls", ["reboot", "replace"])
def test_a_clear_of_what_needs_more_than_a_reset_is_refused_unless_forced(run: Ctl, cls: str) -> None:
    run.quarantine(1, cls)
    with pytest.raises(GpuUnavailable) as refused:
        run("clear", UUIDS[1][:16])
    assert refused.value.code == "gpu_needs_more"
    assert f"class {cls}" in refused.value.what
    run("clear", UUIDS[1], "--force")
    assert quarantine.read(run.paths) == {}


def test_the_driver_s_own_verdict_on_a_quarantined_gpu_alone_does_not_hold_a_clear_up(run: Ctl) -> None:
    """The host service shows the quarantine itself as the verdict's class: that would make every clear impossible."""
    run.quarantine(1, "reset")
    record = quarantine.read(run.paths)[UUIDS[1]]
    run.said["gpus"][1] = gpu(1, quarantine=record.as_dict(), verdict={"class": "reset", "what": record.what, "hint": record.hint})
    assert run()[1].count(record.what) == 1
    run("clear", "1")
    assert quarantine.read(run.paths) == {}


@pytest.mark.parametrize("token", ["9", "GPU-", "GPU-ffffffff", "../../x"])
def test_a_gpu_that_is_not_there_or_not_named_clearly_is_a_usage_error(run: Ctl, token: str) -> None:
    with pytest.raises(UsageError, match="GPU"):
        run("clear", token)
