"""What the host itself says: kernel, clock, journal, devices, the account."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import time
from pathlib import Path

import vllmd
from vllmd.config.paths import Paths
from vllmd.ctl.doctor.facts import Clock, HostFacts, Service
from vllmd.system import cgroupnames, hardware
from vllmd.system.hardware import Hardware

USER = "vllmd"
_STA_UNSYNC = 0x40
_STATUS_OFFSET = 40
"""Of `status` in struct timex: an int, padding, and four longs stand before it."""
_NODES = ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm", "kfd", "dri/renderD*", "infiniband/uverbs*")
_JOURNAL = Path("/var/log/journal")
_PLACES = ("etc", "run", "usr/local/lib", "usr/lib")


def look(paths: Paths) -> HostFacts:
    found = hardware.look()
    devices = _devices(Path("/dev"))
    return HostFacts(
        release=os.uname().release,
        container=_text(Path("/run/systemd/container")),
        unified=bool(cgroupnames.unified_mount().point),
        controllers=frozenset(_text(Path(cgroupnames.unified_mount().point or "/sys/fs/cgroup", "cgroup.controllers")).split()),
        overcommit=_number(Path("/proc/sys/vm/overcommit_memory")),
        clock=_clock(paths),
        storage=journal_storage(Path("/")),
        has_journal_directory=_JOURNAL.is_dir(),
        hardware=found,
        devices=devices,
        missing_devices=_missing(found, devices),
        unprivileged_port=_number(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")) or 0,
        service=service(paths),
    )


def service(paths: Paths) -> Service | None:
    """The system's instances have an account of their own; others run as whoever asks."""
    if paths.scope != "system":
        return Service(pwd.getpwuid(os.geteuid()).pw_name, os.geteuid(), frozenset(os.getgroups()))
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        return None
    return Service(USER, entry.pw_uid, frozenset(os.getgrouplist(USER, entry.pw_gid)))


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _devices(dev: Path) -> tuple[str, ...]:
    return tuple(str(each) for pattern in _NODES for each in sorted(dev.glob(pattern)))


def _missing(found: Hardware, devices: tuple[str, ...]) -> tuple[str, ...]:
    """Something privileged must make them after a boot: in the unit the setuid nvidia-modprobe may not."""
    if not found.nvidia_driver:
        return ()
    wanted = ["/dev/nvidiactl", "/dev/nvidia-uvm", *(["/dev/nvidia0"] if found.has("nvidia") else [])]
    return tuple(each for each in wanted if each not in devices)


def _clock(paths: Paths) -> Clock:
    return Clock(
        now=time.time(),
        unsynchronised=_unsynchronised(),
        has_ntp=any(Path("/", place, "systemd/ntp-units.d").glob("*.list") for place in ("usr/lib", "lib", "etc")),
        newest=_newest(paths),
        built_at=Path(vllmd.__file__).stat().st_mtime,
    )


def _unsynchronised() -> bool | None:
    """What the kernel was last told by whoever keeps the time. None where it does not say."""
    content = ctypes.create_string_buffer(512)
    try:
        result = ctypes.CDLL(None, use_errno=True).adjtimex(content)
    except (OSError, AttributeError):
        return None
    if result < 0:
        return None
    return bool(int.from_bytes(content.raw[_STATUS_OFFSET : _STATUS_OFFSET + 4], "little") & _STA_UNSYNC)


def _newest(paths: Paths) -> tuple[str, float]:
    found = [("", 0.0)]
    for path in (*paths.config.glob("*.yaml"), *paths.config.glob("*.d/*.yaml"), *paths.state.glob("instances/*/last.json")):
        try:
            found.append((str(path), path.lstat().st_mtime))
        except OSError:
            continue
    return max(found, key=lambda each: each[1])


def journal_storage(root: Path) -> str:
    """Storage= of journald.conf and its drop-ins: of one name the first directory's counts, among names the last."""
    files = [next((each for place in _PLACES if (each := root / place / "systemd/journald.conf").is_file()), root / "etc/systemd/journald.conf")]
    dropins: dict[str, Path] = {}
    for place in reversed(_PLACES):
        dropins |= {each.name: each for each in (root / place / "systemd/journald.conf.d").glob("*.conf")}
    value = "auto"
    for path in (*files, *(dropins[name] for name in sorted(dropins))):
        for line in _text(path).splitlines():
            key, equals, given = line.partition("=")
            if equals and key.strip() == "Storage":
                value = given.strip() or "auto"
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None
