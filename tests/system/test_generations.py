"""Generations under the real unit: root keeps the files, the service the records, and a rollback brings a broken instance back."""

from __future__ import annotations

import json

import pytest

from tests.system.host import Host

pytestmark = pytest.mark.system


def test_a_configuration_that_does_not_start_is_undone_by_a_rollback(host: Host) -> None:
    name = host.instance("gens")
    good = host.container.path(f"/etc/vllmd/{name}.yaml").read_text()
    host.start(name)
    folder = f"/etc/vllmd/.generations/{name}"
    (kept,) = host.run("ls", folder).out.split()
    assert host.run("stat", "-c", "%U %a", "/etc/vllmd/.generations", folder, f"{folder}/{kept}").out.split("\n")[:3] == ["root 700"] * 3
    records = f"/var/lib/vllmd/instances/{name}/generations"
    assert host.run("stat", "-c", "%U", f"{records}/00001.json").out.strip() == "vllmd"
    assert json.loads(host.run("cat", f"{records}/00001.json").out)["configuration"] == kept, "what was kept is what the supervisor read"
    host.container.write(f"/etc/vllmd/{name}.yaml", json.dumps({**json.loads(good), "engine": {"executable": "/nowhere/vllm"}}))
    assert host.run("vllmctl", "restart", name, check=False).status != 0
    done = host.run("vllmctl", "rollback", name, "--yes")
    assert "is ready after" in done.out
    assert host.container.path(f"/etc/vllmd/{name}.yaml").read_text() == good
    assert host.health(name) == 200
    listed = json.loads(host.run("vllmctl", "generations", name, "--json").out)
    assert [(each["number"], each["starts"], each["current"], each["kept"]) for each in listed["items"]] == [(1, 2, True, True)]
    back = host.run("vllmctl", "rollback", name, "before", "--yes", check=False)
    assert back.status != 0
    assert f"vllmctl rollback {name} before" in back.err, "how to go back is said"
    host.run("vllmctl", "rollback", name, "1", "--yes")
    assert host.health(name) == 200


def test_the_service_cannot_write_what_root_would_bring_back(host: Host) -> None:
    name = host.instance("planted")
    host.start(name)
    before = host.container.path(f"/etc/vllmd/{name}.yaml").read_text()
    tried = host.run("runuser", "-u", "vllmd", "--", "sh", "-c", "ls /etc/vllmd/.generations; touch /etc/vllmd/.generations/x", check=False)
    assert tried.status != 0
    folder = f"/var/lib/vllmd/instances/{name}/generations"
    forged = {**json.loads(host.run("cat", f"{folder}/00001.json").out), "configuration": "../../../var/lib/vllmd/evil"}
    host.container.write("/tmp/forged.json", json.dumps(forged))
    host.container.write("/tmp/evil.yaml", "engine: {executable: /tmp/evil}")
    host.shell("chmod a+r /tmp/forged.json /tmp/evil.yaml; runuser -u vllmd -- mkdir /var/lib/vllmd/evil")
    host.run("runuser", "-u", "vllmd", "--", "cp", "/tmp/evil.yaml", f"/var/lib/vllmd/evil/{name}.yaml")
    host.run("runuser", "-u", "vllmd", "--", "cp", "/tmp/forged.json", f"{folder}/00002.json")
    done = host.run("vllmctl", "rollback", name, "2", "--yes", check=False)
    assert done.status == 78
    assert host.container.path(f"/etc/vllmd/{name}.yaml").read_text() == before
