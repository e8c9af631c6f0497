"""doctor's decisions, on made-up hosts."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from vllmd.config.paths import SYSTEM
from vllmd.core.xids import HINTS
from vllmd.ctl.doctor import checks_gpus, checks_host, checks_instances, checks_places, checks_units, show
from vllmd.ctl.doctor.examine import Report
from vllmd.ctl.doctor.facts import (
    Clock,
    Disk,
    Failure,
    HeldLock,
    HostFacts,
    InsideFacts,
    InstanceFacts,
    Line,
    Place,
    PlaceFacts,
    PortFacts,
    Service,
    SourceFacts,
    SystemdFacts,
    UnitFacts,
)
from vllmd.ctl.doctor.finding import Finding, Unseen, command_in, split_advice
from vllmd.ctl.doctor.gather_host import journal_storage
from vllmd.ctl.doctor.rules import RULES, amount, seconds
from vllmd.ctl.files import Problem
from vllmd.ctl.gpu_facts import Host, Seen
from vllmd.gpu.quarantine import Record
from vllmd.preflight.gpu import Findings
from vllmd.system.hardware import Hardware, PciGpu

pytestmark = pytest.mark.unit

NOW = 1_800_000_000.0
VLLMD = Service("vllmd", 990, frozenset({990}))
WELL = HostFacts("6.1.0-28-amd64", controllers=frozenset({"memory", "pids", "cpu"}), clock=Clock(NOW, unsynchronised=False, newest=("/etc/vllmd/a.yaml", NOW - 9), built_at=NOW - 99), service=VLLMD)
NVIDIA = Hardware("x86_64", gpus=(PciGpu("nvidia", "2330"),), nvidia_driver="570.86.15")
UUID = "GPU-00000001-1111-2222-3333-444455556666"
WELL_UNIT = {
    "LoadState": "loaded", "Type": "notify", "Delegate": "yes", "KillMode": "mixed", "Restart": "on-failure", "RestartPreventExitStatus": "2 3 64 65 69 77 78",
    "TimeoutStartUSec": "1min 30s", "LimitMEMLOCK": "infinity", "LimitNOFILE": "524288", "TasksMax": "infinity", "TemporaryFileSystem": "/dev/shm:mode=1777,size=50%",
}  # fmt: skip


def checks(said: Iterable[Finding | Unseen]) -> dict[str, Finding]:
    return {each.check: each for each in said if isinstance(each, Finding)}


def unit(**values: str) -> UnitFacts:
    return UnitFacts(WELL_UNIT | values)


def systemd(*units: UnitFacts) -> SystemdFacts:
    names = tuple("abc"[: len(units)])
    return SystemdFacts(252, {f"vllmd@{name}.service": each for name, each in zip(names, units, strict=True)}, names)


# -- the host


def test_a_host_that_is_well_has_no_finding() -> None:
    assert checks(checks_host.check(WELL, SystemdFacts(252))) == {}


@pytest.mark.parametrize(
    ("host", "check", "mend"),
    [
        (replace(WELL, release="5.10.0-33-amd64"), "kernel-old", ""),
        (replace(WELL, unified=False), "cgroup-v1", "systemctl reboot"),
        (replace(WELL, controllers=frozenset({"cpu", "pids"})), "cgroup-controllers", ""),
        (replace(WELL, service=None), "account-missing", "systemd-sysusers"),
        (replace(WELL, overcommit=2), "overcommit", "vm.overcommit_memory=0"),
        (replace(WELL, clock=replace(WELL.clock, unsynchronised=True)), "clock-unsynchronised", "timedatectl set-ntp true"),
        (replace(WELL, clock=replace(WELL.clock, unsynchronised=True, has_ntp=False)), "clock-unsynchronised", "systemd-timesyncd"),
        (replace(WELL, clock=replace(WELL.clock, built_at=NOW + 3 * 86400)), "clock-behind", "timedatectl set-ntp true"),
        (replace(WELL, clock=replace(WELL.clock, newest=("/etc/vllmd/a.yaml", NOW + 3 * 86400))), "clock-file-ahead", "touch /etc/vllmd/a.yaml"),
        (replace(WELL, storage="none"), "journal-none", "Storage=persistent"),
        (replace(WELL, storage="volatile"), "journal-volatile", "Storage=persistent"),
        (replace(WELL, has_journal_directory=False), "journal-volatile", "mkdir -p /var/log/journal"),
    ],
)
def test_what_is_wrong_with_a_host_is_said_with_what_mends_it(host: HostFacts, check: str, mend: str) -> None:
    found = checks(checks_host.check(host, SystemdFacts(252)))
    assert list(found) == [check]
    assert mend in found[check].mend


def test_an_old_systemd_is_said() -> None:
    assert list(checks(checks_host.check(WELL, SystemdFacts(249)))) == ["systemd-old"]


def test_what_a_container_cannot_tell_is_said_to_be_unseen() -> None:
    host = replace(WELL, container="systemd-nspawn", controllers=frozenset(), clock=replace(WELL.clock, unsynchronised=True))
    said = list(checks_host.check(host, None))
    assert {type(each) for each in said} == {Unseen}
    assert len(said) == 2


def test_storage_of_the_journal_is_that_of_the_last_drop_in(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert journal_storage(tmp_path) == "auto"
    write("usr/lib/systemd/journald.conf.d/90-x.conf", "[Journal]\nStorage=volatile\n")
    write("etc/systemd/journald.conf", "[Journal]\n#Storage=none\n")
    assert journal_storage(tmp_path) == "volatile"
    write("etc/systemd/journald.conf.d/90-x.conf", "[Journal]\nCompress=yes\n")
    assert journal_storage(tmp_path) == "auto", "a drop-in of the same name in /etc replaces it"
    write("etc/systemd/journald.conf.d/zz.conf", "[Journal]\nStorage = none\n")
    assert journal_storage(tmp_path) == "none"


# -- units


def test_a_unit_as_it_is_shipped_has_no_finding() -> None:
    assert checks(checks_units.check(systemd(unit(), unit()), "system")) == {}


BAD = {
    "Type": "simple", "NotifyAccess": "none", "Delegate": "no", "KillMode": "process", "KillSignal": "2", "SendSIGKILL": "no", "Restart": "no", "RestartPreventExitStatus": "2 3",
    "TimeoutStartUSec": "5s", "TimeoutStopUSec": "900ms", "RuntimeMaxUSec": "1d", "OOMPolicy": "stop", "ProtectControlGroups": "yes", "PrivateDevices": "yes",
    "PrivateNetwork": "yes", "PrivateUsers": "yes", "MemoryDenyWriteExecute": "yes", "ProtectProc": "invisible", "ProcSubset": "pid", "LimitMEMLOCK": "65536",
    "LimitNOFILE": "1024", "TasksMax": "512", "LogRateLimitIntervalUSec": "30s", "PrivateTmp": "no", "TemporaryFileSystem": "",
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.key))
def test_each_setting_that_a_drop_in_can_undo_is_found(rule: object) -> None:
    key = rule.key  # type: ignore[attr-defined]
    found = list(checks_units.check(systemd(unit(**{key: BAD[key]})), "system"))
    assert len(found) == 1
    assert isinstance(found[0], Finding)
    assert found[0].check.startswith("unit-")
    assert found[0].mend.endswith("systemctl daemon-reload")


def test_the_line_of_a_drop_in_is_taken_out_and_nothing_else(tmp_path: Path) -> None:
    dropin = tmp_path / "10 my.conf"
    dropin.write_text("[Service]\nKillMode=process\n  KillMode = none\nKillModeX=1\nNice=0\n")
    bad = UnitFacts(WELL_UNIT | {"KillMode": "none"}, (Line("/lib/vllmd@.service", 9, "KillMode", is_dropin=False), Line(str(dropin), 2, "KillMode", is_dropin=True), Line(str(dropin), 3, "KillMode", is_dropin=True)))
    [found] = checks_units.check(systemd(bad), "system")
    assert found.where == f"{dropin}:3"
    assert os.system(found.mend.removesuffix(" && systemctl daemon-reload")) == 0
    assert dropin.read_text() == "[Service]\nKillModeX=1\nNice=0\n"


def test_one_drop_in_of_all_instances_is_said_once() -> None:
    assert len(list(checks_units.check(systemd(unit(KillMode="none"), unit(KillMode="none")), "system"))) == 1


@pytest.mark.parametrize(("text", "value"), [("1min 30s", 90.0), ("infinity", float("inf")), ("0", 0.0), ("1w 2d 3h", 788400.0), ("500ms", 0.5)])
def test_time_spans_of_systemctl_are_understood(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


def test_limits_of_systemctl_are_understood() -> None:
    assert (amount("65536"), amount("infinity"), amount(str(2**64 - 1))) == (65536, float("inf"), float("inf"))


def test_units_that_cannot_start() -> None:
    found = checks(checks_units.check(systemd(unit(LoadState="masked"), unit(NeedDaemonReload="yes"), unit(LoadState="not-found")), "system"))
    assert {check: each.mend for check, each in found.items()} == {"unit-masked": "systemctl unmask vllmd@a.service", "daemon-reload": "systemctl daemon-reload", "unit-unusable": ""}


def test_a_failed_start_is_said_with_its_cause() -> None:
    problem = Problem("port_in_use", "the port is taken", "choose another", 2)
    found = checks(checks_units.starts(systemd(unit(ActiveState="failed", Result="start-limit-hit")), {"a": problem}, "vllmctl"))
    assert found["start-failed"].mend == "vllmctl start a"
    assert "the limit of starts is reached: the port is taken" in found["start-failed"].what


def test_the_watch_of_the_gpus_must_run_where_there_is_a_driver() -> None:
    units = {"vllmd-gpu.service": UnitFacts({"LoadState": "loaded", "ActiveState": "failed"})}
    assert checks(checks_units.host_units(SystemdFacts(252, units), WELL)) == {}
    assert "gpu-watch-down" in checks(checks_units.host_units(SystemdFacts(252, units), replace(WELL, hardware=NVIDIA)))


# -- places


def test_a_root_that_follows_the_advice_follows_no_link_of_the_service() -> None:
    """chmod follows links, and below the state directory the service can make them."""
    folder = Place(str(SYSTEM.state / "models"), "directory", 990, 990, 0o777)
    keys = Place("/var/lib/vllmd/instances/a/keys.json", "file", 0, 0, 0o644)
    facts = PlaceFacts(folders=(Place("/etc/vllmd", "directory", 0, 0, 0o755), folder), keys=(keys,))
    found = checks(checks_places.check(SYSTEM, facts, VLLMD))
    assert found["directory-mode"].mend == "runuser -u vllmd -- chmod 0755 /var/lib/vllmd/models"
    assert found["keys-owner"].mend == f"chown -h vllmd:vllmd {keys.path} && runuser -u vllmd -- chmod 0600 {keys.path}"


def test_a_lock_that_the_service_would_refuse_is_found() -> None:
    folder = Place("/run/vllmd/locks", "directory", 990, 990, 0o755)
    for place in (Place("/x", "link"), Place("/x", "file", 1000, 0, 0o600), Place("/x", "file", 990, 990, 0o600, links=2), Place("/x", "other"), Place("/x", "file", 990, 990, 0)):
        assert list(checks(checks_places.check(SYSTEM, PlaceFacts(folders=(folder,), locks=((place, folder),)), VLLMD)))[-1] == "lock-stale", place
    good = Place("/x", "file", 990, 990, 0o600)
    assert "lock-stale" not in checks(checks_places.check(SYSTEM, PlaceFacts(folders=(folder,), locks=((good, folder),)), VLLMD))


def test_a_lock_that_no_instance_holds_is_named_with_its_holder() -> None:
    folders = (Place("/etc/vllmd", "directory", 0, 0, 0o755),)
    held = (HeldLock("/run/vllmd/locks/preflight.8000.lock", 42, "vllm-preflight", "session-1.scope"), HeldLock("/run/vllmd/locks/x", 43, "vllmd", "vllmd@a.service"))
    found = checks(checks_places.check(SYSTEM, PlaceFacts(folders=folders, held=held), VLLMD))
    assert found["lock-held"].mend == "kill 42"


GIB = 1 << 30


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        (Disk("store", "/s", 1, 500 * GIB, 1000 * GIB, 10**6, 10**7), []),
        (Disk("store", "/s", 1, 100 << 20, 1000 * GIB, 10**6, 10**7), ["disk-full"]),
        (Disk("store", "/s", 1, GIB, 1000 * GIB, 10**6, 10**7), ["disk-low"]),
        (Disk("store", "/s", 1, 500 * GIB, 1000 * GIB, 10, 10**7), ["inodes-gone"]),
        (Disk("store", "/s", 1, 500 * GIB, 1000 * GIB, 1000, 10**7), ["inodes-low"]),
        (Disk("store", "/s", 1, 500 * GIB, 1000 * GIB, 0, 0), []),
        (Disk("store", "/s", 1, 500 * GIB, 1000 * GIB, 10**6, 10**7, is_read_only=True), ["disk-read-only"]),
    ],
)
def test_room_on_disks(disk: Disk, expected: list[str]) -> None:
    assert list(checks(checks_places.disks([disk], "vllmctl"))) == expected


def test_one_file_system_is_said_once_with_all_that_lies_on_it() -> None:
    [found] = checks_places.disks([Disk("store", "/s", 1, 0, GIB), Disk("cache", "/c", 1, 0, GIB)], "vllmctl")
    assert (found.where, found.mend) == ("/s, /c", "vllmctl store gc --dir /s; vllmctl cache clear --unused")


# -- GPUs


@pytest.mark.parametrize(
    ("gpus", "check", "mend"),
    [
        (Host(stuck_in="nvmlInit"), "driver-hung", "systemctl reboot"),
        (Host(note="RM has detected an NVML/RM version mismatch."), "driver-differs", "systemctl reboot"),
        (Host(note="NVML Error with code 18"), "driver-differs", "systemctl reboot"),
        (Host(note="Driver Not Loaded"), "driver-unusable", "systemctl reboot"),
        (Host((Seen(1, UUID, lost="lost"),)), "gpu-lost", "systemctl reboot"),
        (Host((Seen(1, UUID, lost="reset_required"),)), "gpu-reset", "systemctl stop vllmd-gpu.service && nvidia-smi --gpu-reset -i 1"),
        (Host((Seen(1, UUID, recovery_action=1),)), "gpu-reset", "systemctl stop vllmd-gpu.service && nvidia-smi --gpu-reset -i 1"),
        (Host((Seen(1, UUID, quarantine=Record(UUID, "reset")),)), "gpu-quarantined", f"vllmctl gpu clear {UUID}"),
        (Host((Seen(1, UUID, recovery_action=1, quarantine=Record(UUID, "reset")),)), "gpu-quarantined", "systemctl stop vllmd-gpu.service && nvidia-smi --gpu-reset -i 1"),
        (Host((Seen(1, UUID, quarantine=Record(UUID, "reboot")),)), "gpu-quarantined", "systemctl reboot"),
        (Host((Seen(1, UUID, quarantine=Record(UUID, "replace")),)), "gpu-quarantined", f"vllmctl gpu clear --force {UUID}"),
        (Host((Seen(-1, UUID, lost="not seen", quarantine=Record(UUID, "reset")),)), "gpu-quarantined", f"vllmctl gpu clear --force {UUID}"),
        (Host((Seen(1, UUID, verdict_class="warn", verdict="512 remapped rows", hint=HINTS["warn"]),)), "gpu-sick", ""),
    ],
)
def test_what_is_wrong_with_gpus(gpus: Host, check: str, mend: str) -> None:
    found = checks(checks_gpus.check(replace(WELL, hardware=NVIDIA), gpus, "vllmctl"))
    assert list(found) == [check]
    assert found[check].mend.startswith(mend)


def test_cards_without_driver_and_drivers_without_device_files() -> None:
    no_driver = replace(WELL, hardware=replace(NVIDIA, nvidia_driver=""))
    assert checks(checks_gpus.check(no_driver, Host(), "vllmctl"))["driver-missing"].mend == "modprobe nvidia"
    no_files = replace(WELL, hardware=NVIDIA, missing_devices=("/dev/nvidia-uvm",))
    assert checks(checks_gpus.check(no_files, Host((Seen(0, UUID),)), "vllmctl"))["device-missing"].mend == "nvidia-modprobe -c 0 -u"


def test_a_host_without_gpus_has_no_finding() -> None:
    assert checks(checks_gpus.check(WELL, Host(note="NVML Shared Library Not Found"), "vllmctl")) == {}


def test_an_engine_for_cuda_where_there_is_none_is_a_misfit() -> None:
    instance = InstanceFacts("a", executable="/v", cuda="12.8", wants_gpu=True)
    [found] = checks_gpus.fits([instance], Findings(), 1.0)
    assert (found.check, found.mend) == ("engine-misfit", "vllmctl engine install --cpu")
    assert list(checks_gpus.fits([replace(instance, wants_gpu=False)], Findings(), 1.0)) == []


# -- instances


@pytest.mark.parametrize(
    ("port", "check", "mend"),
    [
        (PortFacts("a", "127.0.0.1", 8000, "free"), "", ""),
        (PortFacts("a", "127.0.0.1", 8000, "held", "vllmd@a.service", is_own=True), "", ""),
        (PortFacts("a", "127.0.0.1", 8000, "held", "nginx.service", (7,), "nginx"), "port-taken", "systemctl stop nginx.service"),
        (PortFacts("a", "127.0.0.1", 8000, "held", "session-3.scope", (7,), "python3"), "port-taken", "kill 7"),
        (PortFacts("a", "127.0.0.1", 8000, "held", "vllmd@b.service", (7,), "vllm", free=8001), "port-taken", "mkdir -p -m 0755 /etc/vllmd/a.d && printf '%s\\n' 'serve: {port: 8001}' >/etc/vllmd/a.d/90-doctor-serve.yaml"),
        (PortFacts("a", "10.9.9.9", 8000, "unavailable"), "address-missing", "mkdir -p -m 0755 /etc/vllmd/a.d && printf '%s\\n' 'serve: {host: 127.0.0.1}'"),
        (PortFacts("a", "127.0.0.1", 80, "free", free=1025), "port-privileged", "mkdir"),
    ],
)
def test_ports(port: PortFacts, check: str, mend: str) -> None:
    found = checks(checks_instances.ports([port], SYSTEM, WELL))
    assert list(found) == ([check] if check else [])
    assert not check or found[check].mend.startswith(mend)


def test_two_instances_on_one_port_are_told_before_both_are_started() -> None:
    both = [PortFacts("a", "127.0.0.1", 8000, "free"), PortFacts("b", "127.0.0.1", 8000, "free", free=8001)]
    assert checks(checks_instances.ports(both, SYSTEM, WELL))["port-shared"].instance == "b"


def test_a_refused_token_is_replaced_and_a_source_out_of_reach_is_not_asked() -> None:
    refused = SourceFacts("a", "hf-hub", "failed", failure=Failure("hub_token_refused", "the hub answers 401", "Make a new one.", 77))
    away = SourceFacts("b", "hf-hub", "failed", failure=Failure("source_unreachable", "no answer", "Look at the network.", 66))
    instances = [InstanceFacts("a", is_here=False), InstanceFacts("b", is_here=True)]
    first, second = checks(checks_instances.sources([refused, away], instances, SYSTEM)).values()
    assert (first.check, first.severity, first.asks) == ("credential-refused", "error", "a new token")
    assert first.mend.endswith("install -m 0600 /dev/stdin /etc/credstore/vllmd.hf-token")
    assert (second.check, second.severity) == ("source-unreachable", "warning"), "its model is here"
    [unseen] = checks_instances.sources([refused], instances, SYSTEM, has_credentials=False)
    assert isinstance(unseen, Unseen), "without root the unit's token was not sent"


def test_a_device_that_the_service_may_not_open() -> None:
    def found(number: int, *owner: object) -> Finding:
        facts = InsideFacts("a", devices={"/dev/kfd": number}, owners={"/dev/kfd": owner} if owner else {})  # type: ignore[dict-item]
        [said] = checks_instances.inside(facts, "vllmd")
        return said

    assert found(errno.EACCES, 0, 0, 0o600, "root").mend == "chmod 0666 /dev/kfd"
    assert found(errno.EACCES, 0, 44, 0o660, "render").mend == "usermod -aG render vllmd"
    assert "'DeviceAllow=/dev/kfd rw'" in found(errno.EPERM).mend, "it is the unit's list, not the mode of the file"
    assert found(errno.ENXIO).check == "device-dead"


def test_what_the_inside_of_a_unit_lacks() -> None:
    facts = InsideFacts("a", readable={"/etc/vllmd/a.yaml": errno.EACCES}, writable={"/data": errno.EACCES}, is_delegated=False)
    assert set(checks(checks_instances.inside(facts, "vllmd"))) == {"file-unreadable", "directory-unwritable", "cgroup-undelegated"}


def test_a_configuration_that_others_than_root_may_not_read_is_unseen() -> None:
    hidden = InstanceFacts("a", Failure("config_unreadable", "a.yaml: Permission denied", "", 77))
    [said] = checks_instances.configuration([hidden], is_root=False)
    assert isinstance(said, Unseen)
    [said] = checks_instances.configuration([hidden], is_root=True)
    assert isinstance(said, Finding)


# -- advice


def test_only_a_command_that_can_be_typed_as_it_stands_is_taken_from_a_hint() -> None:
    assert command_in("`vllmctl engine install --cpu` installs the build that fits.") == "vllmctl engine install --cpu"
    assert command_in("`vllmctl gpu clear UUID` allows it again.") == ""
    assert command_in("`journalctl -k -g NVRM` says why") == ""
    assert split_advice("/etc/a.yaml: every user of this host may write it: chmod o-w /etc/a.yaml") == ("/etc/a.yaml: every user of this host may write it", "chmod o-w /etc/a.yaml")


def test_each_finding_is_one_line_whatever_stands_in_it() -> None:
    report = Report((Finding("x", "here\nthere", "what\x1b[2J", "mend"),), (Unseen("this", "that"),), (), 1.0)
    first, unseen, last = show.lines(report)
    assert first == "error: here\\nthere: what\\x1b[2J; run: mend"
    assert unseen == "not looked at: this: that"
    assert last.startswith("1 errors, 0 warnings")
