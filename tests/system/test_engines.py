"""Engines under a real systemd: root switches and removes, the service's sandboxed user runs and holds them."""

from __future__ import annotations

import json

import pytest

from tests.system.host import FAKE_ENGINE, Host

pytestmark = pytest.mark.system

ENGINES = "/opt/vllmd/engines"


def engine(host: Host, version: str) -> str:
    name = f"vllm-{version}-cpu"
    record = json.dumps({"schema": 1, "version": version, "variant": "cpu"})
    host.shell(f"mkdir -p {ENGINES}/{name}/bin; printf '#!/bin/sh\\nexec {FAKE_ENGINE} \"$@\"\\n' >{ENGINES}/{name}/bin/vllm; chmod 755 {ENGINES}/{name}/bin/vllm")
    host.container.write(f"{ENGINES}/{name}/vllmd-engine.json", record)
    return name


def test_an_engine_and_its_cache_are_kept_while_the_sandboxed_service_uses_them(host: Host) -> None:
    old, new = engine(host, "1.0"), engine(host, "2.0")
    host.run("vllmctl", "engine", "use", old)
    name = host.instance("engines", engine={"executable": ""})
    host.start(name)
    assert host.state(name)["engine"]["executable"] == f"{ENGINES}/{old}/bin/vllm"
    said = host.run("vllmctl", "engine", "use", new).err
    assert f"until they are restarted: {name}" in said
    assert f"{new} is chosen now" in host.run("vllmctl", "status", name).out
    refused = host.run("vllmctl", "engine", "remove", old, check=False)
    assert (refused.status, f"instance {name}" in refused.err) == (75, True)
    (cache,) = [each for each in json.loads(host.run("vllmctl", "cache", "list", "--json").out)["caches"] if each["engine"] == old]
    assert cache["in_use"]
    assert host.run("vllmctl", "cache", "clear", cache["name"], check=False).status == 75
    owner = host.shell(f"stat -c %U /var/cache/vllmd/compiled/{cache['name']}").out.strip()
    assert owner == "vllmd"

    host.run("systemctl", "restart", f"vllmd@{name}")
    assert host.state(name)["engine"]["version"] == "2.0"
    host.run("vllmctl", "engine", "rollback")
    host.run("systemctl", "restart", f"vllmd@{name}")
    assert host.state(name)["engine"]["version"] == "1.0"
    host.stop(name)
    host.run("vllmctl", "engine", "remove", new)
    assert host.run("vllmctl", "cache", "clear", "--unused").status == 0
    left = host.shell("ls /var/cache/vllmd/compiled").out.split()
    assert cache["name"] in left
    assert not [each for each in left if each.startswith(new)]
    host.shell(f"rm -rf {ENGINES}/{old} {ENGINES}/current {ENGINES}/previous")
