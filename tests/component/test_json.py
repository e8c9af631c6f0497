"""What `--json` prints is what docs/json.md says: real commands, over a real daemon, a real failure and the driver's stub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests import procs, publishing
from tests.component.daemons import quick
from tests.component.gpu_hosts import GpuHost, uuid
from tests.harness import MARK
from tests.json_docs import differences
from vllmd.config.paths import root_paths
from vllmd.core.xids import HINTS
from vllmd.gpu import quarantine
from vllmd.gpu.quarantine import Record

pytestmark = pytest.mark.component

CTL = "import sys; from vllmd.ctl import main; sys.exit(main())"
COMMANDS = {
    "vllmctl status [NAME] --json": ["status"],
    "vllmctl health NAME --json": ["health", "qwen3"],
    "vllmctl top --json": ["top"],
    "vllmctl gpu --json": ["gpu"],
    "vllmctl api-key list NAME --json": ["api-key", "list", "qwen3"],
    "vllmctl incidents NAME --json": ["incidents", "mistral"],
    "vllmctl generations NAME --json": ["generations", "qwen3"],
    "vllmctl backup list --json": ["backup", "list"],
    "vllmctl engine list --json": ["engine", "list"],
    "vllmctl cache list --json": ["cache", "list"],
    "vllmctl store list --json": ["store", "list"],
    "vllmctl model presets [NAME] --json": ["model", "presets", "qwen3"],
    "vllmctl model show NAME --json": ["model", "show", "qwen3"],
    "vllmctl pause NAME --json": ["pause", "qwen3", "--why", "a test"],
}
NOT_EMPTY = ("instances", "gpus", "keys", "items", "engines", "backups")


def said(host: GpuHost, *words: str) -> Any:
    argv = [sys.executable, "-c", CTL, "--root", str(host.root), *words]
    env = {"PATH": os.environ["PATH"], "HOME": str(host.root), MARK: str(host.root), **host.stub.environ()}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout) if "--json" in words else done.stdout


def test_every_object_is_as_it_is_documented() -> None:
    with (
        GpuHost(2) as host,
        host.instance("qwen3", {"gpus": ["0"]}) as ready,
        quick(name="mistral", root=host.root, fake={"FAKE_EXIT": "1@0.1", "FAKE_ERROR": "torch.OutOfMemoryError: CUDA out of memory"}) as broken,
    ):
        ready.wait_ready()
        host.memory(0, 60000, (ready.engine_process("VLLM::Worker").pid, 59000))
        broken.wait_exit()
        paths = root_paths(host.root)
        quarantine.add(paths, Record(uuid(1), "reset", 119, "Xid 119: the GSP does not answer", HINTS["reset"]))
        paths.models.mkdir(parents=True, exist_ok=True)
        publishing.publish_version(paths.models, 1)
        said(host, "backup", "create")
        procs.wait_until("the load", lambda: ready.status_json()["load"])
        procs.wait_until("a generation", lambda: list(ready.state.glob("generations/*.json")))
        found = {heading: said(host, *words, "--json") for heading, words in COMMANDS.items()}
        procs.wait_until("paused", lambda: ready.status_json()["paused"])
        document = ready.status_json()
        chosen = said(host, "model", "set", "fresh", "org/tiny", "--no-restart", "--force", "--json")
        cleared = said(host, "model", "clear", "fresh", "--no-restart", "--json")
        resumed = said(host, "resume", "qwen3", "--json")
        host.memory(0)
        ready.signal(signal.SIGTERM)
        assert ready.wait_exit() == 0
    wrong = {heading: differences(heading, value) for heading, value in found.items()}
    wrong["status.json"] = differences("status.json", document)
    wrong["model set"] = differences("vllmctl model set NAME --json", chosen)
    wrong["model clear"] = differences("vllmctl model set NAME --json", cleared)
    wrong["resume"] = differences("vllmctl pause NAME --json", resumed)
    assert not any(wrong.values()), json.dumps({key: value for key, value in wrong.items() if value}, indent=1)
    empty = [heading for heading, value in found.items() if any(value.get(key) == [] for key in NOT_EMPTY)]
    assert not empty, "a list without an element shows nothing"
