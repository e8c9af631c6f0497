"""A virtual machine whose power can be cut: emulated, one disk with Debian and the project (read-only), one for what is
to be lost or kept. Or one with Debian's systemd as its init and every cgroup controller, which is forgotten as a whole.

Killing it loses exactly what its kernel had not been told to put on the disk: the second disk is written around the
host's page cache. The tree is the containers' own; its Python runs the checkout's modules.
"""

from __future__ import annotations

import compileall
import contextlib
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import blake3
import h11
import yaml

from tests.system.tree import CHECKOUT, _cached, _run, debian_tree

BOOT_DEADLINE_S = 240.0
INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp; mount -t tmpfs run /run
mount /dev/nvme1n1 /mnt && PYTHONPATH=/project:/site exec python3 -m {program}
"""
COMMAND = """#!/bin/sh
PYTHONPATH=/project:/site exec python3 -m {module} "$@"
"""
GUEST_UNIT = """[Unit]
After=multi-user.target
[Service]
Type=oneshot
Environment=PYTHONPATH=/project:/site
ExecStart=python3 -m {program}
StandardOutput=file:/dev/ttyS0
StandardError=file:/dev/ttyS0
"""


def can_run() -> bool:
    return platform.machine() == "x86_64" and all(map(shutil.which, ("qemu-system-x86_64", "apt-get", "dpkg-deb", "mkfs.ext4")))


def kernel() -> Path:
    """Debian's kernel for clouds: ext4 and nvme are built in, so that it needs no initramfs."""
    return next(_cached("kernel", "linux-image-cloud-amd64", _fetch_kernel).glob("boot/vmlinuz-*"))


def _fetch_kernel(into: Path) -> None:
    depends = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True, check=True).stdout
    package = next(line.split()[-1] for line in depends.splitlines() if "Depends: linux-image" in line)
    with tempfile.TemporaryDirectory() as scratch:
        _run(["sh", "-c", f"cd {scratch} && apt-get download -qq {package} && dpkg-deb -x {package}_*.deb tree"])
        shutil.copytree(Path(scratch, "tree/boot"), into / "boot")


def system_disk(into: Path, program: str) -> Path:
    """An image with Debian, the checkout's modules and what they import; its init is `program`, a module of the checkout."""
    with _tree(into) as root:
        (root / "guest-init").write_text(INIT.format(program=program))
        (root / "guest-init").chmod(0o755)
        return _image(into, root)


def installed_disk(into: Path, program: str) -> Path:
    """An image whose init is systemd, with vllmd and its units installed; `program` runs once it is up, as root, on the console."""
    with _tree(into) as root:
        compileall.compile_dir(root / "project", quiet=2)  # emulated, every start would take seconds longer
        compileall.compile_dir(root / "site", quiet=2)
        for command, module in (("vllmd", "vllmd.cli"), ("vllmctl", "vllmd.ctl")):
            (root / "usr/local/bin" / command).write_text(COMMAND.format(module=module))
            (root / "usr/local/bin" / command).chmod(0o755)
        places = {"*.service": "etc/systemd/system", "*.target": "etc/systemd/system", "sysusers.d/*": "usr/lib/sysusers.d", "tmpfiles.d/*": "usr/lib/tmpfiles.d"}
        for pattern, place in places.items():
            for unit in (CHECKOUT / "units").glob(pattern):
                (root / place / unit.name).write_text(unit.read_text().replace("@BINDIR@", "/usr/local/bin"))
        (root / "etc/systemd/system/guest.service").write_text(GUEST_UNIT.format(program=program))
        (root / "etc/systemd/system/multi-user.target.wants/guest.service").symlink_to("../guest.service")
        return _image(into, root)


@contextlib.contextmanager
def _tree(into: Path) -> Iterator[Path]:
    root = into / "root"
    _run(["cp", "-a", "--reflink=auto", str(debian_tree()), str(root)])  # not copytree: it would read /dev/console
    try:
        for package in ("vllmd", "tests"):
            shutil.copytree(CHECKOUT / package, root / "project" / package, ignore=shutil.ignore_patterns("__pycache__"))
        for module in (blake3, h11, yaml):
            shutil.copytree(Path(str(module.__file__)).parent, root / "site" / module.__name__, ignore=shutil.ignore_patterns("__pycache__"))
        yield root
    finally:
        shutil.rmtree(root)


def _image(into: Path, root: Path) -> Path:
    image = into / "system.img"
    _run(["mkfs.ext4", "-q", "-O", "^has_journal", "-d", str(root), str(image), "800M"])
    return image


def blank_disk(path: Path, megabytes: int) -> Path:
    _run(["mkfs.ext4", "-q", str(path), f"{megabytes}M"])
    return path


@contextlib.contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """The disk as the next boot finds it: mounting replays the journal."""
    with tempfile.TemporaryDirectory() as place:
        _run(["mount", "-o", "loop", str(image), place])
        try:
            yield Path(place)
        finally:
            _run(["umount", place])


class Machine:
    """Runs from `with` to `cut_power`. `said` is what it wrote on its console. Without a second disk, what it writes on the
    first is forgotten, and its init is systemd."""

    def __init__(self, system: Path, disk: Path | None, console: Path, memory_mb: int = 512) -> None:
        self._console = console
        init = "ro init=/guest-init" if disk else "rw init=/sbin/init systemd.show_status=0"
        append = f"console=ttyS0 root=/dev/nvme0n1 {init} devtmpfs.mount=1 quiet panic=1"
        self._argv = ["qemu-system-x86_64", "-accel", "tcg", "-m", str(memory_mb), "-nographic", "-no-reboot", "-net", "none", "-kernel", str(kernel()), "-append", append]
        self._argv += ["-drive", f"file={system},format=raw,if=none,id=a,{'readonly=on' if disk else 'snapshot=on'}", "-device", "nvme,drive=a,serial=a"]
        if disk:
            self._argv += ["-drive", f"file={disk},format=raw,if=none,id=b,cache=none", "-device", "nvme,drive=b,serial=b"]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_power()

    def said(self) -> str:
        return self._console.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + BOOT_DEADLINE_S
        while text not in self.said():
            assert self._process.poll() is None, f"the machine ended: {self.said()[-2000:]}"
            assert time.monotonic() < deadline, f"it never said {text!r}: {self.said()[-2000:]}"
            time.sleep(0.02)

    def cut_power(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
