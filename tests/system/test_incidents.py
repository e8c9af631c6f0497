"""What a failure leaves in the real unit, in its sandbox: the evidence, readable by root, and a journal that explains the cause."""

from __future__ import annotations

import json

import pytest

from tests.system.host import Host
from vllmd.system.messages import MESSAGES

pytestmark = pytest.mark.system


def incident(host: Host, name: str) -> dict[str, object]:
    return dict(json.loads(host.run("vllmctl", "incidents", name, "last", "--json").out))


def test_a_refused_model_is_explained_not_restarted_and_its_evidence_is_kept(host: Host) -> None:
    words = "SafetensorError: Error while deserializing header: incomplete metadata"
    name = host.instance("refused", env={"FAKE_START_S": 5, "FAKE_EXIT": "1@3", "FAKE_ERROR": words})
    host.start(name, check=False)
    said = incident(host, name)
    assert said["code"] == "bad_model"
    assert host.run("systemctl", "show", "-P", "ExecMainStatus", f"vllmd@{name}").out.strip() == "65"
    assert host.run("systemctl", "show", "-P", "NRestarts", f"vllmd@{name}").out.strip() == "0"
    texts = said["texts"]
    assert isinstance(texts, dict)
    assert "VLLM::Worker" in texts["processes.txt"], "gathered before the kill"
    assert "=== /sys/fs/cgroup" in texts["cgroup.txt"]
    (cause,) = [each for each in host.entries(name) if each.get("VLLMD_EVENT") == "cause-bad-model"]
    assert cause["MESSAGE_ID"] == MESSAGES["cause-bad-model"].id
    assert cause["VLLMD_INCIDENT"] == said["id"]
    host.run("journalctl", "--sync")
    shown = host.run("journalctl", "-x", "--no-pager", "-u", f"vllmd@{name}").out
    assert f"Subject: The engine of instance {name} refuses the model" in shown
    assert f"`vllmctl incidents {name} {said['id']}` shows the evidence." in shown
    folder = f"/var/lib/vllmd/instances/{name}/incidents/{said['id']}"
    assert host.run("stat", "-c", "%U %a", folder, f"{folder}/summary.json").out.split("\n")[:2] == ["vllmd 750", "vllmd 640"]


def test_a_crash_in_the_sandbox_leaves_what_each_thread_waits_for(host: Host) -> None:
    name = host.instance("crashes")
    host.start(name)
    pid = host.state(name)["engine"]["pid"]
    host.shell(f"kill -SEGV {pid}")
    host.wait_unit(name, 30, SubState="auto-restart")
    said = incident(host, name)
    texts = said["texts"]
    assert isinstance(texts, dict)
    assert said["code"] == "engine_bug"
    assert "SIGSEGV" in str(said["what"])
    assert "waits in" in texts["waits.txt"]
    assert "vllm:" in texts["metrics.txt"]
    host.stop(name)
