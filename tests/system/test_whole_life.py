"""The life of a host, from an empty Debian to a purge, without network: what its administrator types, in that order.

On both Debians, with an engine that `vllmctl engine install` takes from a directory of wheels (it becomes the fake vLLM; the
real one serves in test_real_engine).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine_wheels import engine_wheels
from tests.system.container import Container, wait_for
from tests.system.host import FAKE_ENGINE, MODEL, Host
from tests.system.tree import SUITES, debian_tree

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

OLD, NEW = "0.1.0-1", "0.1.1-1"
ROUTES = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/tokenize", "/invocations", "/version", "/docs", "/openapi.json", "/nowhere", "/")
ASK = """
import json, sys, urllib.error, urllib.request as r
path, key, body = sys.argv[1], sys.argv[2], sys.argv[3]
headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
try:
    with r.urlopen(r.Request(f"http://127.0.0.1:8000{path}", body.encode() or None, headers), timeout=60) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""
QUESTION = {"model": "demo", "prompt": "x", "max_tokens": 4}


class Life:
    def __init__(self, host: Host) -> None:
        self.host = host

    def apt(self, *words: str) -> str:
        done = self.host.run("apt-get", "-qq", "-y", "-o", "Dpkg::Use-Pty=0", *words, env={"DEBIAN_FRONTEND": "noninteractive"}, timeout_s=120)
        return done.out + done.err

    def ask(self, path: str, key: str = "", body: object = None) -> tuple[int, str]:
        status, _, text = self.host.run("python3", "-c", ASK, path, key, json.dumps(body) if body else "", timeout_s=90).out.partition(" ")
        return int(status), text

    def key(self) -> str:
        return self.host.run("vllmctl", "api-key", "show", "life").out.strip()

    def completes(self) -> None:
        status, text = self.ask("/v1/completions", self.key(), QUESTION)
        assert status == 200, text
        assert json.loads(text)["usage"]["completion_tokens"] == 4

    def begin_stream(self) -> None:
        body = {**QUESTION, "max_tokens": 100, "stream": True, "ignore_eos": True}
        self.host.container.write("/root/ask.py", ASK.replace("answer.read().decode()", "*answer.read().decode().split()[-2:]"))
        self.host.run("systemd-run", "--quiet", "--unit=stream", "-p", "StandardOutput=file:/root/stream.log", "python3", "/root/ask.py", "/v1/completions", self.key(), json.dumps(body))
        wait_for(lambda: "num_requests_running" in (text := self.ask("/metrics")[1]) and any(line.startswith("vllm:num_requests_running") and float(line.split()[-1]) for line in text.splitlines()), 20, "the stream")

    def end_stream(self) -> None:
        wait_for(lambda: self.host.run("systemctl", "is-active", "--quiet", "stream", check=False).status != 0, 60, "the end of the stream")
        assert self.host.run("cat", "/root/stream.log").out.split() == ["200", "data:", "[DONE]"]


@pytest.mark.parametrize("release", list(SUITES))
def test_from_an_empty_debian_to_a_purge_and_back(release: str, staged: Path, packages: Path, tmp_path: Path) -> None:
    wheels, disk = tmp_path / "wheels", tmp_path / "disk"
    wheels.mkdir()
    disk.mkdir()
    engine_wheels(wheels, "0.32.0", FAKE_ENGINE)
    binds = {"/mnt/checkout": staged, "/mnt/packages": packages, "/mnt/wheels": wheels}
    with Container(debian_tree(release), binds, disk) as container:
        life = Life(Host(container))
        install(life)
        serve(life)
        upgrade(life)
        key = life.key()
    # The machine is switched off and on.
    with Container(debian_tree(release), binds, disk) as container:
        life = Life(Host(container))
        life.host.wait_unit("life", 60, ActiveState="active")
        assert life.key() == key
        life.completes()
        backup = life.host.run("vllmctl", "backup", "create").out.strip()
        life.apt("purge", "vllmd")
        assert container.processes("vllmd") == {}
        assert life.host.shell("ls -d /etc/vllmd /var/lib/vllmd/instances", check=False).out == ""
        install(life)
        life.host.run("vllmctl", "backup", "restore", "--force", backup)
        start(life)
        assert life.key() == key


def install(life: Life) -> None:
    life.apt("install", f"/mnt/packages/vllmd_{OLD}_amd64.deb")
    life.host.run("vllmctl", "engine", "install", "--cpu", "--wheels", "/mnt/wheels", timeout_s=200)


def serve(life: Life) -> None:
    host = life.host
    program = host.shell("ls -d /usr/lib/vllmd/[0-9]*").out.split()[-1]
    host.run("runuser", "-u", "vllmd", "--", f"{program}/bin/python3", "-I", "-m", "vllmd.models.demo", MODEL)
    host.container.write("/etc/vllmd/life.yaml", json.dumps({"model": MODEL, "serve": {"port": 8000}, "engine": {"env": {"FAKE_TOKEN_S": "0.05"}}}))
    start(life)


def start(life: Life) -> None:
    host = life.host
    done = host.run("systemctl", "enable", "--now", "vllmd@life", check=False, timeout_s=90)
    assert done.status == 0, host.log("life")
    life.completes()
    for path in ROUTES:
        assert life.ask(path)[0] == 401, path
        assert life.ask(path, "a" * 22, QUESTION)[0] == 401, path


def upgrade(life: Life) -> None:
    """As it is shipped: the instance goes on with its own program. And as many will set it: it is restarted once it has answered."""
    host = life.host
    main = host.unit("life").main_pid
    life.begin_stream()
    life.apt("install", f"/mnt/packages/vllmd_{NEW}_amd64.deb")
    life.end_stream()
    assert host.unit("life").main_pid == main
    host.shell("sed -i s/^RESTART_ON_UPGRADE=.*/RESTART_ON_UPGRADE=yes/ /etc/default/vllmd")
    life.begin_stream()
    life.apt("install", "--reinstall", f"/mnt/packages/vllmd_{NEW}_amd64.deb")
    life.end_stream()
    wait_for(lambda: host.unit("life").main_pid not in (0, main) and host.unit("life")["ActiveState"] == "active", 60, "the restart")
    life.completes()
