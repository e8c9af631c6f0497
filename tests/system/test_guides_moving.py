"""The guides that bring people over from elsewhere, word for word, on a host where vllmd is installed: no network, and no hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.container import wait_for
from tests.system.guides import CURL, blocks, followed, serving
from tests.system.host import FAKE_ENGINE, Host
from vllmd.models import demo

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

COMMIT = "c" * 40
VLLM = f'#!/bin/sh\nexec {FAKE_ENGINE} "$@"\n'
ASK = """
import json, sys, urllib.request as r
headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {sys.argv[3]}"} if sys.argv[3] else {})
body = json.dumps({"model": sys.argv[2], "prompt": "x", "max_tokens": 4}).encode()
print(r.urlopen(r.Request(f"http://127.0.0.1:{sys.argv[1]}/v1/completions", body, headers), timeout=20).status)
"""


def ask(host: Host, model: str, key: str, port: int = 8000) -> int:
    """What a client is answered, who changed nothing; 0 where nobody answers, or no."""
    done = host.run("python3", "-c", ASK, str(port), model, key, check=False)
    return int(done.out) if done.status == 0 else 0


def hub_cache(host: Host, folder: str, model: Path) -> None:
    """As the hub's libraries leave it: a snapshot of links to blobs."""
    repository = host.container.path(folder) / "models--Qwen--Qwen3-0.6B"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    for file in sorted(model.iterdir()):
        shutil.copy(file, repository / "blobs" / f"{file.name}.sum")
        (repository / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/{file.name}.sum")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return demo.make(tmp_path / "model")


@pytest.fixture
def settled(host: Host) -> Iterator[Host]:
    """With the vLLM that people have already; what a guide leaves is taken away again."""
    for place in ("/opt/vllm/bin/vllm", "/usr/local/bin/vllm"):
        host.container.write(place, VLLM, 0o755)
    yield host
    host.shell(
        "systemctl disable --quiet --now llm.service ollama.service vllmd@qwen vllmd@qwen3 2>/dev/null || :; systemctl reset-failed || :; userdel llm 2>/dev/null || :"
        "; rm -rf /opt/vllm /usr/local/bin/vllm /usr/local/bin/curl /srv/* /root/.cache/huggingface /etc/credstore/vllmd.* /etc/systemd/system/llm.service"
        " /root/.cache/vllmd /etc/systemd/system/ollama.service /etc/vllmd/qwen* /etc/vllmd/.generations/qwen* /var/lib/vllmd/models/hub /var/lib/vllmd/instances/qwen* /var/lib/vllmd/public/qwen*"
        "; systemctl daemon-reload"
    )


def test_from_a_plain_unit_and_back(settled: Host, model: Path) -> None:
    host, guide, key = settled, "from-a-plain-unit.md", "sk-of-our-clients"
    host.run("useradd", "--system", "llm")
    hub_cache(host, "/srv/hf/hub", model)
    [unit] = blocks(guide, language="ini")
    host.container.write("/etc/systemd/system/llm.service", unit)
    host.run("systemctl", "enable", "--now", "llm.service")
    wait_for(lambda: ask(host, "qwen", key) == 200, 20, "the plain unit")
    *prepared, switched = blocks(guide)
    followed(host, prepared)
    assert host.run("systemctl", "is-active", "llm.service").out.strip() == "active", "it serves until the last step"
    refused = host.run("vllmctl", "start", "qwen", check=False)
    assert refused.status != 0
    assert "llm.service" in refused.out + refused.err
    followed(host, [switched])
    assert "127.0.0.1:8000" in serving(host, "qwen")
    assert (ask(host, "qwen", key), ask(host, "qwen", "")) == (200, 0)
    argv = host.container.processes("vllmd")
    assert any("--max-model-len 4096" in line and "--tool-call-parser hermes" in line and "/srv/hf/hub/models--Qwen--Qwen3-0.6B" in line for line in argv.values()), argv
    followed(host, blocks(guide, "back"))
    wait_for(lambda: ask(host, "qwen", key) == 200, 20, "the plain unit again")
    assert host.unit("qwen")["ActiveState"] == "inactive"


def test_from_the_flox_chain(settled: Host, model: Path) -> None:
    host, guide = settled, "from-the-flox-chain.md"
    shutil.copytree(model, host.container.path("/srv/models") / "Qwen3-0.6B")
    [chain], [origin] = blocks(guide, "chain"), blocks(guide, "origin")
    exports = "".join(line + "\n" for line in chain.splitlines() if line.startswith("export"))
    followed(host, [chain])
    assert host.run("find", "/var/cache/vllmd", "-user", "root").out == "", "the chain runs as root, and the service must be able to write there later"
    listed = followed(host, [exports + origin])
    for key in ("model.id", "model.dir", "serve.port", "serve.served_model_name", "serve.max_model_len"):
        assert f"\n{key} " in listed, "the keys that the guide's file then has"
    assert "sk-vllm" not in listed
    followed(host, blocks(guide))
    assert ask(host, "qwen", "sk-vllm-local-dev") == 200
    assert any("/srv/models/Qwen3-0.6B --" in line for line in host.container.processes("vllmd").values())


def test_from_docker_with_what_its_volume_holds(settled: Host, model: Path) -> None:
    """There is no docker here: its own blocks are left out, and its volume is made as the container leaves it."""
    host, guide, key = settled, "from-docker.md", "sk-of-our-clients"
    hub_cache(host, "/root/.cache/huggingface/hub", model)
    assert blocks(guide, "docker")
    followed(host, blocks(guide))
    assert "0.0.0.0:8000" in serving(host, "qwen")
    assert (ask(host, "qwen", key), ask(host, "qwen", "")) == (200, 0)
    assert any("/var/lib/vllmd/models/hub/models--Qwen--Qwen3-0.6B" in line for line in host.container.processes("vllmd").values()), "nothing was downloaded"
    assert host.container.path("/root/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/refs/main").read_text() == COMMIT, "the container could go on"


def test_from_ollama_on_its_port_with_its_name_of_the_model(settled: Host, model: Path) -> None:
    host = settled
    hub_cache(host, "/var/lib/vllmd/models/hub", model)
    host.container.write("/usr/local/bin/curl", CURL, 0o755)
    host.container.write("/etc/systemd/system/ollama.service", "[Service]\nExecStart=python3 -m http.server --bind 127.0.0.1 11434\n[Install]\nWantedBy=multi-user.target\n")
    host.run("systemctl", "enable", "--now", "ollama.service")
    assert '"qwen3:0.6b"' in followed(host, blocks("from-ollama.md"))
    assert host.run("systemctl", "is-active", "ollama.service", check=False).out.strip() == "inactive"
