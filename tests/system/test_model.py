"""A model is chosen for the real unit: it restarts, says what it serves, and says what to do when it has none."""

from __future__ import annotations

import json

import pytest

from tests.system.host import MODEL, Host

pytestmark = pytest.mark.system


def test_a_choice_restarts_the_unit_and_clearing_leaves_it_up(host: Host) -> None:
    name = host.instance("chosen", model={})
    host.shell("cp -r /var/lib/vllmd/models/demo /var/lib/vllmd/models/second")
    try:
        host.start(name)
        assert host.unit(name)["StatusText"] == f"No model selected. Run: vllmctl model set {name} PRESET|MODEL (vllmctl model presets shows what fits)"
        done = host.run("vllmctl", "model", "set", name, MODEL, "--", "--max-num-seqs", "3")
        assert f"{name} is ready after" in done.out
        assert host.health(name) == 200
        assert host.unit(name)["StatusText"].startswith("Serving demo at")
        assert any("--max-num-seqs 3" in command for command in host.engine(name).values())
        assert host.run("stat", "-c", "%U %a", f"/etc/vllmd/{name}.d", f"/etc/vllmd/{name}.d/50-model.yaml").out.split("\n")[:2] == ["root 755", "root 644"]

        assert "is ready after" in host.run("vllmctl", "model", "set", name, "/var/lib/vllmd/models/second").out
        assert host.unit(name)["StatusText"].startswith("Serving second at")
        assert not any("--max-num-seqs 3" in command for command in host.engine(name).values())

        host.run("vllmctl", "model", "clear", name)
        assert host.unit(name)["ActiveState"] == "active"
        assert host.unit(name)["StatusText"].startswith("No model selected.")
        assert host.engine(name) == {}
        refused = host.run("runuser", "-u", "vllmd", "--", "vllmctl", "model", "set", name, MODEL, check=False)
        assert (refused.status, "sudo vllmctl model set" in refused.err) == (77, True)
    finally:
        host.shell(f"rm -rf /etc/vllmd/{name}.d /var/lib/vllmd/models/second")


def test_presets_come_with_the_installation_and_the_administrator_adds_to_them(host: Host) -> None:
    host.shell("mkdir -p /etc/vllmd/presets")
    host.container.write("/etc/vllmd/presets/ours.yaml", "title: Ours\norder: 1\ntiers:\n  cpu: {model: our/own, min_gib: 1}\n")
    try:
        said = json.loads(host.run("vllmctl", "model", "presets", "--json").out)
        files = {each["id"]: each["file"] for each in said["presets"]}
        assert files["qwen36-27b"] == "/usr/local/share/vllmd/presets/qwen36-27b.yaml"
        assert (said["tier"], said["recommended"], files["ours"]) == ("cpu", "ours", "/etc/vllmd/presets/ours.yaml")
        assert host.run("test", "-f", "/usr/local/share/vllmd/chat-templates/llama3-json-tools.jinja").status == 0
    finally:
        host.shell("rm -r /etc/vllmd/presets")
