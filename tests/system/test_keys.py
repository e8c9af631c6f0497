"""Keys on a host: made by the service, changed by root while it runs, read by who belongs to the group and by nobody else."""

from __future__ import annotations

import json

import pytest

from tests.system.container import wait_for
from tests.system.host import Host

pytestmark = pytest.mark.system

ASK = """
import sys, urllib.error, urllib.request as r
def status(path, key):
    ask = r.Request(f"http://127.0.0.1:{sys.argv[1]}{path}", headers={"Authorization": f"Bearer {key}"} if key else {})
    try: return r.urlopen(ask, timeout=10).status
    except urllib.error.HTTPError as error: return error.code
print(*(status(path, key) for key in sys.argv[2:] for path in ("/v1/models", "/version", "/health")))
"""


def ask(host: Host, name: str, *keys: str) -> str:
    return host.run("python3", "-c", ASK, str(host.port(name)), *keys).out.strip()


def as_user(host: Host, group: str, path: str) -> int:
    return host.run("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--groups", group, "cat", path, check=False).status


def test_keys_of_a_unit(host: Host) -> None:
    name = host.instance("wants-a-key")
    host.start(name)
    state, public = f"/var/lib/vllmd/instances/{name}/keys.json", f"/var/lib/vllmd/public/{name}/credentials.json"
    made = host.run("vllmctl", "api-key", "show", name).out.strip()
    assert json.loads(host.run("cat", public).out) == {"apiKey": made}
    assert host.run("stat", "-c", "%U:%G %a", state, public, f"/run/vllmd/i/{name}/guard.json").out.splitlines() == ["vllmd:vllmd 600", "vllmd:vllmd 640", "vllmd:vllmd 600"]
    assert ask(host, name, "", made) == "401 401 200 200 200 200"

    assert as_user(host, "vllmd", public) == 0
    assert as_user(host, "nogroup", public) != 0
    assert as_user(host, "vllmd", state) != 0
    assert host.run("setpriv", "--reuid", "nobody", "--clear-groups", "--regid", "nogroup", "vllmctl", "api-key", "show", name, check=False).status == 77

    done = host.run("vllmctl", "api-key", "rotate", name, "--overlap", "0")
    new = done.out.strip()
    assert "It is in force" in done.err
    assert ask(host, name, made, new) == "401 401 200 200 200 200"
    assert json.loads(host.run("cat", public).out) == {"apiKey": new}
    assert host.run("stat", "-c", "%U:%G %a", state, public).out.splitlines() == ["vllmd:vllmd 600", "vllmd:vllmd 640"]

    host.run("systemctl", "restart", f"vllmd@{name}")
    assert ask(host, name, new) == "200 200 200"
    assert host.unit(name)["NRestarts"] == "0"
    host.stop(name)

    def told() -> set[str]:
        return {str(entry.get("VLLMD_EVENT")) for entry in host.entries(name)}

    assert wait_for(lambda: {"key-made", "keys-changed", "keys-taken"} <= told(), 10, "what was done, in the journal")
    host.run("journalctl", "--sync")
    written = host.run("journalctl", "-o", "json", "--all").out
    assert made not in written
    assert new not in written
    assert host.run("vllmctl", "api-key", "rotate", name, "--overlap", "1h").status == 0, "also while it does not run"
    wait_for(lambda: [line.split()[4] for line in host.run("vllmctl", "events", name, "-n", "all").out.splitlines()].count("keys-changed:") == 2, 10, "root's changes among the unit's events")
    host.run("rm", "-r", f"/var/lib/vllmd/public/{name}")
