"""The host: kernel, systemd, clock, journal, memory. Pure."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from vllmd.ctl.doctor.facts import Clock, HostFacts, SystemdFacts
from vllmd.ctl.doctor.finding import Finding, Unseen, command

OLDEST_SYSTEMD = 252
OLDEST_KERNEL = (5, 14)
"""cgroup.kill came with it."""
_DAY_S = 86400.0
_NEEDED = ("memory", "pids", "cpu")
_JOURNALD = "/etc/systemd/journald.conf.d"


def check(host: HostFacts, systemd: SystemdFacts | None) -> Iterator[Finding | Unseen]:
    yield from _versions(host, systemd)
    yield from _account(host)
    yield from _clock(host.clock, host.container)
    yield from _journal(host)
    if not host.container and host.overcommit == 2:
        mend = "echo vm.overcommit_memory=0 >/etc/sysctl.d/90-vllmd.conf && sysctl -p /etc/sysctl.d/90-vllmd.conf"
        yield Finding("overcommit", "vm.overcommit_memory", "is 2: mapping a whole model can be refused although memory is free", mend)


def _versions(host: HostFacts, systemd: SystemdFacts | None) -> Iterator[Finding | Unseen]:
    found = tuple(map(int, re.findall(r"\d+", host.release)[:2]))
    if found and found < OLDEST_KERNEL:
        yield Finding("kernel-old", f"Linux {host.release}", "is older than 5.14: processes of an engine cannot be ended all at once", note="install a newer kernel of your distribution, and reboot", severity="warning")
    if systemd is not None and 0 < systemd.version < OLDEST_SYSTEMD:
        yield Finding("systemd-old", f"systemd {systemd.version}", f"is older than {OLDEST_SYSTEMD}, for which the units are written", note="upgrade the distribution")
    if not host.unified:
        mend = 'sed -i -E \'s/^(GRUB_CMDLINE_LINUX=")/\\1systemd.unified_cgroup_hierarchy=1 /\' /etc/default/grub && update-grub && systemctl reboot'
        yield Finding("cgroup-v1", "/sys/fs/cgroup", "is not the unified hierarchy (cgroup2), so nothing can be delegated", mend)
    elif host.container:
        yield Unseen("controllers of the control groups", f"this is a container ({host.container}); its host decides")
    elif missing := [each for each in _NEEDED if each not in host.controllers]:
        yield Finding("cgroup-controllers", "/sys/fs/cgroup/cgroup.controllers", f"lacks {', '.join(missing)}: limits of units (MemoryMax=, TasksMax=) are not enforced", note="is cgroup_disable= on the kernel's command line, or are they mounted as version 1?", severity="warning")


def _account(host: HostFacts) -> Iterator[Finding]:
    if host.service is None:
        yield Finding("account-missing", "/etc/passwd", "there is no user vllmd, as which instances run", "systemd-sysusers && systemd-tmpfiles --create")


def _clock(clock: Clock, container: str) -> Iterator[Finding | Unseen]:
    path, changed = clock.newest
    ahead = changed - clock.now
    if container:
        yield Unseen("whether the clock is synchronised", f"this is a container ({container}); its host keeps the time")
    elif clock.unsynchronised:
        mend = "timedatectl set-ntp true" if clock.has_ntp else "apt-get install -y systemd-timesyncd && timedatectl set-ntp true"
        yield Finding("clock-unsynchronised", "the clock", "is not synchronised: certificates, tokens and signatures can be refused", mend, severity="warning")
    if clock.built_at - clock.now > _DAY_S:
        yield Finding("clock-behind", "the clock", f"says {_day(clock.now)}, and this program was made on {_day(clock.built_at)}", "timedatectl set-ntp true")
    elif ahead > _DAY_S:
        note = "if the clock is what is wrong: timedatectl set-ntp true" if not container else "if the clock is what is wrong, set that of the container's host"
        yield Finding("clock-file-ahead", path, f"was changed {ahead / _DAY_S:.0f} days in the future: the clock was, or is, wrong", command("touch", path), note, severity="warning")


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at))


def _journal(host: HostFacts) -> Iterator[Finding]:
    keep = f"mkdir -p {_JOURNALD} && printf '[Journal]\\nStorage=persistent\\n' >{_JOURNALD}/zz-vllmd.conf && systemctl restart systemd-journald.service && journalctl --flush"
    if host.storage == "none":
        yield Finding("journal-none", "journald.conf", "Storage=none: nothing that an instance says is kept", keep)
    elif host.storage == "volatile":
        yield Finding("journal-volatile", "journald.conf", "Storage=volatile: what an instance said is gone after a reboot", keep, severity="warning")
    elif host.storage == "auto" and not host.has_journal_directory:
        mend = "mkdir -p /var/log/journal && systemd-tmpfiles --create --prefix /var/log/journal && journalctl --flush"
        yield Finding("journal-volatile", "/var/log/journal", "does not exist: what an instance said is gone after a reboot", mend, severity="warning")
