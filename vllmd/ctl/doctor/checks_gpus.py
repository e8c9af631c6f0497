"""The GPUs: a driver that hangs or differs from its library, cards that are lost, wait for a reset or are quarantined. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vllmd.ctl.doctor.facts import HostFacts, InstanceFacts
from vllmd.ctl.doctor.finding import Finding, command, command_in
from vllmd.ctl.gpu_facts import Host, Seen, todo
from vllmd.ctl.unit import GPU_WATCH
from vllmd.preflight.gates import Limits
from vllmd.preflight.gpu import Findings, GpuRequest, judge

_DIFFERS = re.compile(r"mismatch|code 18\b", re.IGNORECASE)
_REBOOT = "systemctl reboot"


def check(host: HostFacts, gpus: Host, vllmctl: str) -> Iterator[Finding]:
    yield from _driver(host, gpus)
    for seen in gpus.gpus:
        yield from _gpu(seen, vllmctl)


def _driver(host: HostFacts, gpus: Host) -> Iterator[Finding]:
    hardware, where = host.hardware, "the GPU driver"
    if gpus.stuck_in:
        yield Finding("driver-hung", where, f"does not answer (stuck in {gpus.stuck_in})", _REBOOT, "`journalctl -k -g NVRM` says why")
    elif _DIFFERS.search(gpus.note):
        version = f" (the kernel has {hardware.nvidia_driver})" if hardware.nvidia_driver else ""
        yield Finding("driver-differs", where, f"and its library have different versions{version}: it was updated since the last boot", _REBOOT)
    elif not gpus.gpus and hardware.nvidia_driver:
        yield Finding("driver-unusable", where, f"{hardware.nvidia_driver} is loaded, and it cannot be asked: {gpus.note or 'it shows no GPU'}", _REBOOT, "nvidia-smi says more")
    elif not gpus.gpus and not hardware.nvidia_driver and any(each.vendor == "nvidia" for each in hardware.gpus):
        yield Finding("driver-missing", where, "is not loaded, and there is an NVIDIA GPU", "modprobe nvidia", "where there is no such module, install your distribution's driver")
    if host.missing_devices:
        yield Finding("device-missing", ", ".join(host.missing_devices), "the driver is loaded, and its device files are not there", "nvidia-modprobe -c 0 -u", "the unit's sandbox may not make them; nvidia-persistenced does at boot")


def _gpu(seen: Seen, vllmctl: str) -> Iterator[Finding]:
    where = f"GPU {seen.label}" if seen.index >= 0 else f"GPU {seen.uuid}"
    record = seen.quarantine
    if record is not None:
        since = f"is quarantined (class {record.cls}): {record.what or 'no reason is recorded'}"
        yield Finding("gpu-quarantined", where, since, _lift(seen, f"{vllmctl} gpu clear"), todo(record))
    elif seen.lost == "reset_required" or seen.recovery_action in (1, 4):
        yield Finding("gpu-reset", where, "needs a reset", _reset(seen), seen.hint)
    elif seen.lost:
        yield Finding("gpu-lost", where, f"the driver says {seen.lost.replace('_', ' ')}", _REBOOT, seen.hint or "journalctl -k -g NVRM")
    elif seen.verdict_class not in ("", "ok"):
        yield Finding("gpu-sick", where, seen.verdict, command_in(seen.hint), seen.hint, severity="warning")


def _lift(seen: Seen, clear: str) -> str:
    """What lifts the quarantine, whatever the driver still wants first."""
    record = seen.quarantine
    if record is None or seen.index < 0 or record.cls == "replace":  # a card that is not in the host any more; or one that a person must look at
        return f"{clear} --force {command(seen.uuid)}"
    if record.cls == "reboot" or (seen.lost and seen.lost != "reset_required"):
        return _REBOOT
    clear = f"{clear} {command(seen.uuid)}"
    return f"{_reset(seen)} && {clear}" if seen.lost or seen.recovery_action else clear


def _reset(seen: Seen) -> str:
    """Nothing may use it, the watch included."""
    using = command(*dict.fromkeys((*(each.unit for each in seen.holders if each.unit.startswith("vllmd@")), GPU_WATCH)))
    return f"systemctl stop {using} && nvidia-smi --gpu-reset -i {seen.index} && systemctl start {using}"


def fits(instances: Sequence[InstanceFacts], found: Findings, timeout_s: float) -> Iterator[Finding]:
    """Whether each engine runs on what there is, as preflight judges it."""
    for each in instances:
        if each.wants_gpu and each.executable:
            judged = judge(GpuRequest("all", Limits(), timeout_s, cuda=each.cuda, archs=each.archs), found)
            for what in judged.failures if not found.hung_in else ():
                yield Finding("engine-misfit", f"instance {each.name}", what, command_in(judged.hint), judged.hint, each.name)
