"""A program of the host that uses a model: the sample unit as it is shipped, with a program and an instance put in."""

from __future__ import annotations

import json

import pytest

from tests.system.container import wait_for
from tests.system.host import Host
from tests.system.tree import CHECKOUT

pytestmark = pytest.mark.system

PROGRAM = """#!/usr/bin/python3
import json, os, urllib.request as r
from pathlib import Path
file = Path(os.environ["CREDENTIALS_FILE"])
key = json.loads(file.read_text())["apiKey"]
with r.urlopen(r.Request(os.environ["OPENAI_BASE_URL"] + "/models", headers={"Authorization": f"Bearer {key}"}), timeout=30) as answer:
    status = answer.status
refused = []
for what, do in (("write", lambda: (file.parent / "x").touch()), ("state", lambda: list(Path("/var/lib/vllmd/instances").iterdir())), ("socket", lambda: list(Path("/run/vllmd").iterdir()))):
    try:
        do()
    except OSError:
        refused.append(what)
print(json.dumps({"status": status, "refused": refused, "uid": os.getuid()}))
"""


def ask(host: Host) -> dict[str, object]:
    host.run("systemctl", "start", "client.service")
    wait_for(lambda: host.run("systemctl", "is-active", "--quiet", "client.service", check=False).status != 0, 30, "its end")
    host.run("journalctl", "--sync")
    lines = host.run("journalctl", "-o", "cat", "-u", "client.service", "_TRANSPORT=stdout").out.splitlines()
    found = [line for line in lines if line.startswith('{"status"')]
    assert found, host.run("journalctl", "-u", "client.service").out[-3000:]
    answer: dict[str, object] = json.loads(found[-1])
    return answer


def test_the_sample_client_reads_the_key_and_nothing_else(host: Host) -> None:
    name = host.instance("serves", serve={"auth": "key"})
    host.start(name)
    host.container.write("/usr/local/bin/your-program", PROGRAM, 0o755)
    unit = (CHECKOUT / "share/examples/vllmd-client.service").read_text().replace("qwen3", name).replace(":8000", f":{host.port(name)}")
    host.container.write("/etc/systemd/system/client.service", unit)
    host.run("systemctl", "daemon-reload")
    try:
        for _ in range(2):
            answer = ask(host)
            assert (answer["status"], answer["refused"]) == (200, ["write", "state", "socket"])
            assert answer["uid"] != 0
            host.run("vllmctl", "api-key", "rotate", name, "--overlap", "0")
        # It neither takes the model down nor is taken down by it.
        host.run("systemctl", "restart", f"vllmd@{name}")
        assert ask(host)["status"] == 200
    finally:
        host.shell("rm -f /etc/systemd/system/client.service /usr/local/bin/your-program; systemctl daemon-reload")
        host.stop(name)
