"""The units: drop-ins that undo what vllmd needs, units that cannot start, failed starts. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

from vllmd.ctl.doctor.facts import HostFacts, SystemdFacts, UnitFacts
from vllmd.ctl.doctor.finding import Finding, command
from vllmd.ctl.doctor.rules import RULES, WRITTEN_AS, Rule
from vllmd.ctl.files import Problem
from vllmd.ctl.unit import GPU_WATCH, TARGET

_OVERRIDES = "/etc/systemd/system/vllmd@.service.d"
_NEXT = "an instance that runs takes it at its next start"


def check(systemd: SystemdFacts, scope: str) -> Iterator[Finding]:
    found: dict[str, list[tuple[str, Finding]]] = {}
    for name in systemd.names:
        unit = systemd.units.get(f"vllmd@{name}.service", UnitFacts())
        yield from _loaded(name, unit, scope)
        for finding in _settings(name, unit) if unit["LoadState"] == "loaded" else ():
            found.setdefault(finding.mend, []).append((name, finding))
    for several in found.values():  # a drop-in of the template is every instance's: said once
        yield several[0][1]


def _loaded(name: str, unit: UnitFacts, scope: str) -> Iterator[Finding]:
    where, systemctl = f"vllmd@{name}.service", "systemctl --user" if scope == "user" else "systemctl"
    if unit["LoadState"] == "masked":
        yield Finding("unit-masked", where, "is masked: it cannot be started", f"{systemctl} unmask {where}", instance=name)
    elif unit["LoadState"] in ("error", "bad-setting") or (unit["LoadState"] == "not-found" and scope == "system"):
        yield Finding("unit-unusable", where, f"systemd cannot load it ({unit['LoadState']})", note=f"systemd-analyze verify {where}; install vllmd again if vllmd@.service is gone", instance=name)
    if unit["NeedDaemonReload"] == "yes":
        yield Finding("daemon-reload", where, "its files were changed, and systemd goes by the old ones", f"{systemctl} daemon-reload", instance=name, severity="warning")


def _settings(name: str, unit: UnitFacts) -> Iterator[Finding]:
    for rule in RULES:
        if rule.key in unit.values and not rule.is_good(unit[rule.key]):
            yield _finding(name, unit, rule)


def _finding(name: str, unit: UnitFacts, rule: Rule) -> Finding:
    names = WRITTEN_AS.get(rule.key, (rule.key,))
    lines = [line for line in unit.lines if line.key in names]
    dropins = list(dict.fromkeys(line.path for line in lines if line.is_dropin))
    said = f"{names[0]}={unit[rule.key]}"
    if dropins:
        last = next(line for line in reversed(lines) if line.is_dropin)
        where = f"{last.path}:{last.number}"
        mend = f"sed -i -E {shlex.quote(f'/^[[:space:]]*({chr(124).join(names)})[[:space:]]*=/d')} {shlex.join(dropins)} && systemctl daemon-reload"
    else:
        where = f"vllmd@{name}.service"
        mend = f"mkdir -p {_OVERRIDES} && printf '[Service]\\n%s\\n' {shlex.quote(rule.wanted.replace('%', '%%'))} >>{_OVERRIDES}/90-vllmd-doctor.conf && systemctl daemon-reload"
    return Finding(f"unit-{_dashed(rule.key)}", where, f"{said}: {rule.why}", mend, _NEXT, name, rule.severity)


def _dashed(key: str) -> str:
    """LimitMEMLOCK -> limit-memlock, TimeoutStartUSec -> timeout-start."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", key.removesuffix("USec"))
    return "-".join(words).lower()


def host_units(systemd: SystemdFacts, host: HostFacts) -> Iterator[Finding]:
    """The watch of the GPUs, and the target that starts instances at boot."""
    gpu, target = systemd.units.get(GPU_WATCH, UnitFacts()), systemd.units.get(TARGET, UnitFacts())
    has_driver = bool(host.hardware.nvidia_driver or host.hardware.amd_driver)
    if gpu["LoadState"] == "loaded" and has_driver and gpu["ActiveState"] not in ("active", "activating"):
        mend = f"systemctl reset-failed {GPU_WATCH}; systemctl enable --now {GPU_WATCH}"
        yield Finding("gpu-watch-down", GPU_WATCH, f"is {gpu['ActiveState']}: no Xid of the kernel's log is heard", mend, severity="warning")
    enabled = [name for name in systemd.names if systemd.units.get(f"vllmd@{name}.service", UnitFacts())["UnitFileState"] == "enabled"]
    if enabled and target["LoadState"] == "loaded" and target["UnitFileState"] != "enabled":
        yield Finding("target-disabled", TARGET, f"is not enabled: {', '.join(enabled[:4])} will not start at boot", command("systemctl", "enable", TARGET))


def starts(systemd: SystemdFacts, problems: Mapping[str, Problem | None], vllmctl: str) -> Iterator[Finding]:
    """Last of all: what is found above is mended first."""
    for name in systemd.names:
        unit = systemd.units.get(f"vllmd@{name}.service", UnitFacts())
        problem = problems.get(name)
        why = f": {problem.what}" if problem and problem.what else f" ({unit['Result']})"
        if unit["ActiveState"] == "failed":
            limited = ", and the limit of starts is reached" if unit["Result"] == "start-limit-hit" else ""
            yield Finding("start-failed", f"vllmd@{name}.service", f"has failed{limited}{why}", f"{vllmctl} start {name}", (problem.hint if problem else "") or "mend what stands above first", name)
        elif unit["SubState"] == "auto-restart":
            yield Finding("start-repeated", f"vllmd@{name}.service", f"is started again and again ({unit['NRestarts']} times){why}", "", problem.hint if problem else "", name)
