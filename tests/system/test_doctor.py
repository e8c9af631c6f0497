"""`vllmctl doctor` on a host with faults: each is found, and the command that is printed mends it, as it is printed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nvml import uuid
from tests.needs import need
from tests.system.container import Done, wait_for
from tests.system.host import FAKE_ENGINE, Host
from tests.system.network import network_of

pytestmark = pytest.mark.system

NAME, OTHER, MASKED, LIMITED = "doc", "gated", "masked", "limited"
GOOD_TOKEN = "hf_" + "g" * 30


def doctor(host: Host, *names: str) -> list[dict[str, Any]]:
    """The findings, in the order in which they are to be mended."""
    done = host.run("vllmctl", "doctor", "--json", *names, check=False, timeout_s=60)
    assert done.status in (0, 1), done.err
    document = json.loads(done.out)
    assert done.status == (1 if document["findings"] else 0)
    return list(document["findings"])


def checks(findings: list[dict[str, Any]]) -> set[str]:
    return {each["check"] for each in findings}


def follow(host: Host, finding: dict[str, Any], answer: str = "") -> Done:
    """As a person would: pastes the command, and types what it asks for."""
    asked = f"printf %s '{answer}' | " if finding["asks"] else ""
    script = f"{asked}sh -c \"$MEND\"" if asked else finding["mend"]
    return host.run("sh", "-c", script, check=False, env={"MEND": finding["mend"]})


class Hub(BaseHTTPRequestHandler):
    """A hub that takes one token."""

    def do_GET(self) -> None:
        is_known = self.headers.get("Authorization") == f"Bearer {GOOD_TOKEN}"
        body = json.dumps({"id": "org/tiny", "sha": "a" * 40, "siblings": [], "gated": False, "private": False}).encode() if is_known else b"{}"
        self.send_response(200 if is_known else 401)
        if not is_known:
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub(host: Host) -> Iterator[int]:
    with network_of(host.container):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def dropin(host: Host, name: str, file: str, *lines: str) -> None:
    host.container.write(f"/etc/systemd/system/vllmd@{name}.service.d/{file}.conf", "[Service]\n" + "".join(f"{line}\n" for line in lines))


def plant(host: Host, port: int, hub_port: int) -> set[str]:
    """Every fault that a container can have at once; the checks that must find them."""
    dropin(host, NAME, "10-family", "# of an old guide", "Delegate=no", "KillMode=process", "Environment=KEPT=1")
    dropin(host, NAME, "20-limits", "LimitMEMLOCK=64K", "TimeoutStartSec=5", "Restart=no")
    host.container.write(f"/etc/vllmd/{OTHER}.yaml", json.dumps({"model": {"id": "org/tiny", "sources": ["hf-hub"], "hf_endpoint": f"http://127.0.0.1:{hub_port}"}, "serve": {"port": port + 7}, "engine": {"executable": FAKE_ENGINE}, "gpus": "none"}))
    host.container.write("/etc/credstore/vllmd.hf-token", "hf_" + "e" * 30, 0o644)
    record = {"schema": 1, "uuid": uuid(7), "class": "replace", "what": "a failed remap", "boot_id": "", "first_at": 1.0, "last_at": 1.0}
    host.container.write(f"/var/lib/vllmd/gpus/{uuid(7)}.json", json.dumps(record))
    host.container.write("/etc/systemd/journald.conf.d/50-quiet.conf", "[Journal]\nStorage=none\n")
    host.shell(
        f"systemctl mask --quiet vllmd@{MASKED}.service; systemctl daemon-reload"
        f"; systemd-run --quiet --unit=squatter python3 -m http.server --bind 127.0.0.1 {port}"
        "; chown root /var/lib/vllmd/models; chmod 0777 /var/lib/vllmd/public; rm -rf /run/vllmd/sock"
        f"; install -d -o vllmd -g vllmd /var/lib/vllmd/instances/{NAME}; install -m 0644 -o vllmd -g vllmd /dev/null /var/lib/vllmd/instances/{NAME}/keys.json"
        f"; chmod 0600 /etc/vllmd/{NAME}.yaml; mkdir -p /opt/vllmd/engines; chmod 0777 /opt/vllmd/engines"
        "; mknod -m 0600 /dev/kfd c 1 3"
        f"; ln -sf /etc/passwd /run/vllmd/locks/preflight.{port}.lock"
        "; touch -d '+20 days' /etc/vllmd/vllmd.yaml"
        "; mount -t tmpfs -o size=64m,mode=0755,uid=$(id -u vllmd),gid=$(id -g vllmd) tmpfs /var/cache/vllmd"
        "; runuser -u vllmd -- mkdir -p '/var/cache/vllmd/compiled/vllm-0.1-gone+cpu-other'; runuser -u vllmd -- dd if=/dev/zero of=/var/cache/vllmd/compiled/vllm-0.1-gone+cpu-other/big bs=1M count=60 status=none"
        f"; systemctl --quiet enable vllmd@{NAME}.service 2>/dev/null; systemctl --quiet disable vllmd.target"
    )
    wait_for(lambda: host.run("python3", "-c", f"import socket; socket.create_connection(('127.0.0.1', {port})).close()", check=False).status == 0, 20, "the squatter")
    return {
        "unit-delegate", "unit-kill-mode", "unit-limit-memlock", "unit-timeout-start", "unit-restart", "unit-masked", "target-disabled",
        "directory-owner", "directory-mode", "directory-missing", "keys-mode", "credential-open", "credential-refused", "file-unreadable",
        "engine-writable", "device-permission", "port-taken", "lock-stale", "gpu-quarantined", "journal-none", "disk-full", "clock-file-ahead", "start-failed",
    }  # fmt: skip


@pytest.fixture
def sick(host: Host) -> Iterator[Host]:
    try:
        yield host
    finally:  # vllmd-gpu is wanted by an instance where /dev/kfd is there
        host.shell(
            f"set +e; systemctl stop squatter vllmd-gpu 2>/dev/null; systemctl unmask --quiet vllmd@{MASKED}.service; systemctl --quiet disable vllmd@{NAME}.service 2>/dev/null"
            f"; umount /var/cache/vllmd; rm -rf /dev/kfd /etc/credstore/vllmd.hf-token /var/lib/vllmd/gpus/* /etc/vllmd/{OTHER}.* /etc/systemd/journald.conf.d"
            f" /etc/systemd/system/vllmd@{NAME}.service.d /run/vllmd/locks/preflight.*; systemctl --quiet enable vllmd.target; rm -f /run/let-it-start; systemd-tmpfiles --create; systemctl daemon-reload; systemctl restart systemd-journald; true"
        )


def test_every_planted_fault_is_found_and_mended_by_the_printed_command(sick: Host) -> None:
    host = sick
    for name in (NAME, MASKED, LIMITED):
        host.instance(name)
    before = checks(doctor(host))
    limited = host.instance(LIMITED, dropin="ExecStartPre=/bin/sh -c 'test -e /run/let-it-start'\nStartLimitBurst=1\nRestart=no")
    assert host.start(limited, check=False).status != 0
    host.run("touch", "/run/let-it-start")
    with hub(host) as port:
        planted = plant(host, host.port(NAME), port)
        assert not planted & before, "a healthy host has none of them"
        found = doctor(host)
        assert planted <= checks(found), f"not found: {planted - checks(found)}"
        done: set[str] = set()
        for finding in found:
            if finding["check"] in planted and finding["mend"] not in done:
                done.add(finding["mend"])
                assert finding["mend"], finding
                ended = follow(host, finding, GOOD_TOKEN)
                assert ended.status == 0, f"{finding}: {ended.err}"
        left = [each for each in doctor(host) if each["check"] not in before | {"model-nowhere"}]
    assert left == []
    assert "KEPT=1" in host.shell(f"cat /etc/systemd/system/vllmd@{NAME}.service.d/10-family.conf").out, "the rest of a drop-in stays"


DEVICES = Path("/sys/fs/cgroup/devices")


@contextmanager
def refused(host: Host, device: str) -> Iterator[None]:
    """The container's systemd may load no program that filters devices (cgroup v2), so that DeviceAllow= has no effect there. The older
    controller, where the machine has it, gives its processes the same answer: EPERM, whatever the mode of the file."""
    need((DEVICES / "devices.deny").exists(), "the devices controller of cgroup v1")
    group = DEVICES / f"vllmd-test-{os.getpid()}"
    group.mkdir()
    inside = _leads_to(Path(f"/proc/{host.container.init}/ns/pid"))
    try:
        (group / "devices.deny").write_text(f"{device} rwm")
        _move(group, [path.parent.parent.name for path in Path("/proc").glob("[0-9]*/ns/pid") if _leads_to(path) == inside])
        yield
    finally:
        _move(DEVICES, (group / "cgroup.procs").read_text().split())
        group.rmdir()


def _leads_to(path: Path) -> str:
    with suppress(OSError):
        return str(path.readlink())
    return ""


def _move(group: Path, pids: list[str]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(pid)


def test_a_device_that_the_unit_refuses_is_told_from_one_of_the_wrong_mode(host: Host) -> None:
    host.instance(NAME)
    host.shell("mknod -m 0666 /dev/kfd c 1 7")
    try:
        assert "device-refused" not in checks(doctor(host, NAME))
        with refused(host, "c 1:7"):
            [finding] = [each for each in doctor(host, NAME) if each["where"] == "/dev/kfd"]
            assert finding["check"] == "device-refused"
            assert follow(host, finding).status == 0
            assert "/dev/kfd rw" in host.shell(f"systemctl show --property=DeviceAllow vllmd@{NAME}.service").out
        assert "device-refused" not in checks(doctor(host, NAME))
    finally:
        host.shell("rm -rf /dev/kfd /etc/systemd/system/vllmd@.service.d/90-vllmd-doctor.conf; systemctl stop vllmd-gpu 2>/dev/null; systemctl daemon-reload; true")


def test_another_user_than_root_is_told_what_could_not_be_looked_at(host: Host) -> None:
    host.instance(NAME)
    done = host.run("runuser", "-u", "nobody", "--", "vllmctl", "doctor", check=False)
    assert done.status in (0, 1), done.err
    assert "not looked at: devices, limits and directories from inside the units: that takes root" in done.out
    assert "Traceback" not in done.err
    assert "/etc/vllmd" not in [line.split(": ")[1] for line in done.out.splitlines() if line.startswith("error")]
