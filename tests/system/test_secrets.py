"""Secrets planted in the real unit: not in its processes, the journal, what it answers and leaves, nor in a file that all may read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.secret_search import Allowed, Place, files, plant, processes, search
from tests.system.host import FAKE_ENGINE, Host

pytestmark = pytest.mark.system

NAMES = ("api-key", "hf-token", "s3-secret", "in-file")
ALLOWED = (
    Allowed("/etc/credstore/vllmd.*", "where the administrator put it: root's, 0600"),
    Allowed("/run/credentials/vllmd@*", "systemd's copy for the service: a file system of its own, 0400"),
    Allowed("/etc/vllmd/*.yaml", "where the administrator wrote a key into the configuration, 0640 root:vllmd"),
)


@pytest.fixture
def planted(host: Host) -> Iterator[dict[str, str]]:
    secrets = plant(*NAMES)
    write = host.container.write
    write("/etc/credstore/vllmd.hf-token", secrets["hf-token"], 0o600)
    write("/etc/credstore/vllmd.s3-credentials", f"[default]\naws_access_key_id = AKID\naws_secret_access_key = {secrets['s3-secret']}\n", 0o600)
    yield secrets
    host.shell("rm -rf /etc/credstore/vllmd.*")


def keyed(host: Host, name: str, planted: dict[str, str]) -> str:
    host.container.write(f"/etc/credstore/vllmd.{name}.api-key", planted["api-key"] + "\n", 0o600)
    host.shell(f"chgrp vllmd /etc/vllmd/{name}.yaml && chmod 0640 /etc/vllmd/{name}.yaml")
    return name


def places(host: Host, name: str) -> Iterator[Place]:
    """Also the private /tmp and /dev/shm of the unit, as its main process sees them."""
    root = str(host.container.path("")).rstrip("/")
    yield from processes(host.container.processes("vllmd"), host.container.path("/proc"))
    tops = [host.container.path(top) for top in ("/etc", "/run", "/var", "/tmp", "/dev/shm", "/opt")]
    yield from files(tops, root=root)
    main = host.unit(name).main_pid
    if main:
        view = f"{root}/proc/{main}/root"
        yield from files([host.container.path(f"/proc/{main}/root{top}") for top in ("/tmp", "/dev/shm", "/run/credentials")], root=view)
    host.run("journalctl", "--sync")
    for form in ("export", "json"):
        yield f"journal as {form}", host.run("journalctl", "-o", form, "--all", "--no-pager", timeout_s=120).out.encode()
    for command in (("vllmctl", "status", name), ("vllmctl", "status", name, "--json"), ("vllmctl", "incidents", name), ("systemctl", "status", f"vllmd@{name}"), ("systemctl", "show", f"vllmd@{name}"), ("vllmd", "check", name)):
        done = host.run(*command, check=False)
        yield " ".join(command), (done.out + done.err).encode()
    for path in ("/status", "/metrics"):
        script = f"import socket; s=socket.socket(socket.AF_UNIX); s.connect('/run/vllmd/i/{name}/control.sock'); s.sendall(b'GET {path} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); d=b''\nwhile p := s.recv(65536): d += p\nprint(d.decode())"
        done = host.run("python3", "-c", script, check=False)
        yield f"control.sock {path}", done.out.encode()


def test_an_instance_that_serves_keeps_its_secrets(host: Host, planted: dict[str, str]) -> None:
    name = keyed(host, host.instance("keeps", serve={"api_key": planted["in-file"]}), planted)
    host.start(name)
    found = dict(places(host, name))
    assert any(where.startswith("/run/credentials/") for where in found), "the search sees the unit's credentials"
    assert f"/run/vllmd/i/{name}/guard.json" in found, "the search sees what the engine's guard knows: sums"
    assert search(planted, found.items(), ALLOWED) == []
    host.stop(name)
    assert search(planted, places(host, name), ALLOWED) == []


def test_an_engine_that_prints_its_secrets_and_dies_leaves_them_nowhere(host: Host, planted: dict[str, str]) -> None:
    name = host.instance("prints", env={"FAKE_EXIT": "1@2", "FAKE_START_S": 5}, serve={"api_key": planted["in-file"]}, engine={"executable": "/usr/local/bin/talkative"})
    keyed(host, name, planted)
    secrets = f"/run/credentials/vllmd@{name}.service"
    shown = f"sed -n p {secrets}/*; printf '\\000\\377'; sed 's/^/ValueError: bad key /; s/$/!/' {secrets}/* >&2; sed -n p /etc/vllmd/{name}.yaml"
    host.container.write("/usr/local/bin/talkative", f'#!/bin/sh\n{shown}\nexec {FAKE_ENGINE} "$@"\n', 0o755)
    host.start(name, check=False)
    found = dict(places(host, name))
    assert b"bad key" in found["journal as export"], "it did print"
    assert any("/incidents/" in where for where in found), "there is evidence"
    assert search(planted, found.items(), ALLOWED) == []


def test_a_download_that_fails_tells_no_secret(host: Host, planted: dict[str, str]) -> None:
    nowhere = "http://127.0.0.1:9"
    model = {"id": "acme/None", "sources": ["r2", "hf-hub"], "r2_bucket": "models", "r2_endpoint_url": nowhere, "hf_endpoint": nowhere, "source_timeout_s": 3, "source_retry_s": 1}
    name = keyed(host, host.instance("fails", model=model), planted)
    host.start(name, check=False)
    found = dict(places(host, name))
    assert host.state(name, "last")["status"] == 66
    assert search(planted, found.items(), ALLOWED) == []


def test_an_encrypted_credential_is_the_key_and_lies_nowhere_in_clear(host: Host, planted: dict[str, str]) -> None:
    dropin = "LoadCredentialEncrypted=api-key:vllmd.%i.api-key"
    name = host.instance("sealed", dropin=dropin)
    seal = f"mkdir -p /etc/credstore.encrypted && cat | systemd-creds encrypt --with-key=host --name=api-key - /etc/credstore.encrypted/vllmd.{name}.api-key"
    host.container.write("/root/key", planted["api-key"], 0o600)
    host.shell(f"{seal} </root/key; rm /root/key")
    host.start(name)
    ask = f"import urllib.request as r; q=r.Request('http://127.0.0.1:{host.port(name)}/v1/models', headers={{'Authorization': 'Bearer {planted['api-key']}'}}); print(r.urlopen(q).status)"
    assert host.run("python3", "-c", ask).out == "200\n"
    refused = ask.replace("Bearer planted", "Bearer other")
    assert "401" in host.run("python3", "-c", refused, check=False).err
    assert search(planted, places(host, name), ALLOWED) == []
    host.stop(name)


# Root and the service's account


def as_service(host: Host, script: str) -> None:
    host.run("runuser", "-u", "vllmd", "--", "sh", "-ec", script)


def test_root_s_commands_follow_no_link_and_wait_for_no_fifo_of_the_service(host: Host) -> None:
    name = host.instance("links")
    host.container.write("/root/private.json", '{"state": "planted-by-root", "error": {"what": "planted-by-root"}}', 0o600)
    as_service(
        host,
        f"mkdir -p /var/lib/vllmd/instances/{name} && cd /var/lib/vllmd/instances/{name} && ln -sf /root/private.json last.json && ln -sfn /root incidents",
    )
    for command in (("vllmctl", "status", name), ("vllmctl", "status", name, "--json"), ("vllmctl", "incidents", name), ("vllmctl", "status")):
        done = host.run(*command, check=False, timeout_s=20)
        assert "planted-by-root" not in done.out + done.err, command
        assert done.status != 124, command
    as_service(host, f"cd /var/lib/vllmd/instances/{name} && rm last.json && mkfifo last.json")
    assert host.run("vllmctl", "status", check=False, timeout_s=20).status == 0


def test_the_service_cannot_lead_systemd_out_of_its_runtime_directory(host: Host) -> None:
    """Who could put a link to /home in the place of /run/vllmd/i was given the home of whom an instance was named after."""
    name = host.instance("victim")
    host.shell(f"mkdir -p /srv/homes/{name} && touch /srv/homes/{name}/kept")
    done = host.run("runuser", "-u", "vllmd", "--", "sh", "-c", "mv /run/vllmd/i /run/vllmd/was || rm -rf /run/vllmd/i; ln -sfn /srv/homes /run/vllmd/i", check=False)
    host.start(name)
    host.stop(name)
    assert host.run("stat", "-c", "%U", f"/srv/homes/{name}", f"/srv/homes/{name}/kept").out == "root\nroot\n", done
    assert host.run("stat", "-c", "%F %U", "/run/vllmd/i").out == "directory root\n"
    host.shell(f"rm -rf /srv/homes; rm -f /run/vllmd/i/{name}")


def test_tmpfiles_follows_no_link_of_the_service(host: Host) -> None:
    host.shell("mkdir -p /srv/target && chmod 0700 /srv/target")
    as_service(host, "rmdir /run/vllmd/locks 2>/dev/null || mv /run/vllmd/locks /run/vllmd/was; ln -s /srv/target /run/vllmd/locks")
    host.run("systemd-tmpfiles", "--create", check=False)
    assert host.run("stat", "-c", "%U %a", "/srv/target").out == "root 700\n"
    as_service(host, "rm /run/vllmd/locks")
    host.run("systemd-tmpfiles", "--create")
    host.shell("rm -rf /srv/target /run/vllmd/was")


def test_what_root_executes_is_root_s_and_only_root_may_write_it(host: Host) -> None:
    """The commands, and every file of their environment, with all directories above; the units' own lines run as the service."""
    found = host.shell("for c in vllmd vllmctl vllm-preflight vllm-resolve-model vllm-serve; do readlink -f $(command -v $c); done").out.split()
    lines = host.run("systemctl", "cat", f"vllmd@{host.instance('cat')}", "vllmd-gpu").out.splitlines()
    executed = [line for line in lines if line.startswith("Exec")]
    assert executed
    as_root = [line for line in executed if line.partition("=")[2][:1] in "+!"]
    assert as_root == ["ExecStartPost=+-/usr/local/bin/vllmctl generations %i --keep"], "it reads what the service wrote as hostile, and copies root's own files alone"
    places = " ".join([*found, "/usr/local/lib/vllmd", "/usr/local/lib/systemd", "/usr/local/lib/tmpfiles.d", "/usr/local/lib/sysusers.d", "/etc/vllmd", "/opt/vllmd/engines"])
    wrong = f"for p in {places}; do [ -e $p ] || continue; find $p ! -type l \\( ! -user root -o -perm /022 \\) -print; q=$p; while [ $q != / ]; do q=$(dirname $q); find $q -maxdepth 0 \\( ! -user root -o -perm -002 \\) -print; done; done"
    assert host.shell(wrong).out == ""
    units = {line for line in lines if line.startswith("User=")}
    assert units == {"User=vllmd"}


def test_the_exposure_of_the_units_is_2_or_better(host: Host) -> None:
    for unit in ("vllmd@.service", "vllmd-gpu.service"):
        done = host.run("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", f"/usr/local/lib/systemd/system/{unit}")
        print(done.out.splitlines()[-1])


def test_one_instance_that_stops_takes_no_memory_from_another(host: Host) -> None:
    """RemoveIPC= with a user that units share: only the last of them takes what is left."""
    one, two = host.instance("one"), host.instance("two")
    host.start(one)
    host.start(two)
    as_service(host, "ipcmk -M 4096 -p 0600 >/dev/null")
    host.stop(one)
    assert "vllmd" in host.run("ipcs", "-m").out
    assert host.health(two) == 200
    host.stop(two)


