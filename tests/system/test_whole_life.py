"""The life of a host, from an empty Debian to a purge, without network: what its administrator types, in that order.

On both Debians, with an engine that `vllmctl engine install` takes from a directory of wheels: on one of them the real vLLM,
on the other wheels that become the fake one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine_wheels import engine_wheels
from tests.needs import need
from tests.system import real_wheels
from tests.system.container import Container, wait_for
from tests.system.host import FAKE_ENGINE, MODEL, Host
from tests.system.tree import SUITES, debian_tree

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

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
LET_IN = """
import json, sys, urllib.error, urllib.request as r
for path in sys.argv[1:]:
    for key in ("", "a" * 22):
        for body in (None, b"{}"):
            headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
            try:
                status = r.urlopen(r.Request(f"http://127.0.0.1:8000{path}", body, headers), timeout=60).status
            except urllib.error.HTTPError as error:
                status = error.code
            if status != 401:
                print("POST" if body else "GET", path, "with a wrong key" if key else "without a key", status)
"""
STREAMS = """
import http.client, json, os, sys, threading, time, urllib.request as r
def one(ask):
    try:
        answer = r.urlopen(ask, timeout=60)
    except OSError as error:
        time.sleep(0.2)
        return f"refused: {error}"
    try:
        return "whole" if answer.read().decode().split()[-2:] == ["data:", "[DONE]"] else "cut"
    except (OSError, http.client.HTTPException) as error:
        return f"cut: {error}"
def many():
    ask = r.Request("http://127.0.0.1:8000/v1/completions", sys.argv[2].encode(), {"Content-Type": "application/json", "Authorization": f"Bearer {sys.argv[1]}"})
    while not os.path.exists("/root/enough"):
        print(one(ask), flush=True)
for _ in range(2):
    threading.Thread(target=many).start()
"""
"""Two clients, each with one stream after the other: whenever something happens to the engine, at least one is in flight."""
QUESTION = {"model": "demo", "prompt": "x", "max_tokens": 4, "ignore_eos": True}
OPEN = {"/health", "/metrics"}
DISK_BYTES = 6e9


@dataclass(frozen=True, slots=True)
class Engine:
    """`torch` is what the record of the installed engine must say; `tokens` make a stream of about a second."""

    is_real: bool
    wheels: Path
    torch: str
    tokens: int
    settings: Mapping[str, Any]
    start_s: float
    install_s: float


def fake(wheels: Path) -> Engine:
    engine_wheels(wheels, "0.32.0", FAKE_ENGINE)
    return Engine(False, wheels, "2.0+cpu", 20, {"engine": {"env": {"FAKE_TOKEN_S": "0.05"}}}, 90, 200)


def real() -> Engine:
    wheels = real_wheels.real_wheels()
    torch = next(wheels.glob("torch-*.whl")).name.split("-")[1]
    run = {"args": {"dtype": "float32", "enforce-eager": True}, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
    return Engine(True, wheels, torch, 200, {"gpus": "none", "engine": run}, 400, 900)


@dataclass
class Life:
    host: Host
    engine: Engine

    def apt(self, *words: str) -> str:
        done = self.host.run("apt-get", "-qq", "-y", "-o", "Dpkg::Use-Pty=0", *words, env={"DEBIAN_FRONTEND": "noninteractive"}, timeout_s=200)
        return done.out + done.err

    def ask(self, path: str, key: str = "", body: object = None) -> tuple[int, str]:
        status, _, text = self.host.run("python3", "-c", ASK, path, key, json.dumps(body) if body else "", timeout_s=150).out.partition(" ")
        return int(status), text

    def let_in(self, paths: Collection[str]) -> list[str]:
        """Where one gets past the guard without the key."""
        return self.host.run("python3", "-c", LET_IN, *paths, timeout_s=150).out.splitlines()

    def key(self) -> str:
        return self.host.run("vllmctl", "api-key", "show", "life").out.strip()

    def completes(self) -> None:
        status, text = self.ask("/v1/completions", self.key(), QUESTION)
        assert status == 200, text
        assert json.loads(text)["usage"]["completion_tokens"] == 4

    def begin_streams(self) -> None:
        self.host.shell("rm -f /root/enough /root/streams.log")
        self.host.container.write("/root/streams.py", STREAMS)
        body = {**QUESTION, "max_tokens": self.engine.tokens, "stream": True}
        self.host.run("systemd-run", "--quiet", "--unit=streams", "-p", "StandardOutput=file:/root/streams.log", "python3", "/root/streams.py", self.key(), json.dumps(body))
        self.wait_for_streams()

    def streams(self) -> list[str]:
        """How each ended: whole, refused (before its answer began) or cut."""
        return self.host.run("cat", "/root/streams.log", check=False).out.splitlines()

    def wait_for_streams(self) -> None:
        """Until some that began after this have ended."""
        before = self.streams().count("whole")
        wait_for(lambda: self.streams().count("whole") >= before + 4, 200, "streams", 0.2)

    def end_streams(self) -> list[str]:
        self.wait_for_streams()
        self.host.container.write("/root/enough", "")
        wait_for(lambda: self.host.run("systemctl", "is-active", "--quiet", "streams", check=False).status != 0, 200, "the end of the last streams", 0.2)
        return self.streams()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """What is written in the container. Removed at once: pytest would keep the real engine's several GB three times."""
    need(shutil.disk_usage(tmp_path).free > DISK_BYTES, f"{DISK_BYTES / 1e9:.0f} GB of free disk")
    place = tmp_path / "disk"
    place.mkdir()
    yield place
    shutil.rmtree(place)


CASES = [pytest.param(name, marks=[pytest.mark.engine], id=f"{name}-real") if name == real_wheels.release() else pytest.param(name, id=f"{name}-fake") for name in SUITES]


@pytest.mark.parametrize("release", CASES)
def test_from_an_empty_debian_to_a_purge_and_back(release: str, staged: Path, packages: Path, tmp_path: Path, disk: Path) -> None:
    (tmp_path / "wheels").mkdir()
    engine = real() if release == real_wheels.release() else fake(tmp_path / "wheels")
    binds = {"/mnt/checkout": staged, "/mnt/packages": packages, "/mnt/wheels": engine.wheels}
    with Container(debian_tree(release), binds, disk) as container:
        life = Life(Host(container), engine)
        install(life)
        serve(life)
        upgrade(life)
        key = life.key()
    # The machine is switched off and on.
    with Container(debian_tree(release), binds, disk) as container:
        life = Life(Host(container), engine)
        life.host.wait_unit("life", engine.start_s, ActiveState="active")
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
    life.host.run("vllmctl", "engine", "install", "--cpu", "--wheels", "/mnt/wheels", timeout_s=life.engine.install_s)
    installed = json.loads(life.host.container.path("/opt/vllmd/engines/vllm-0.32.0-cpu/vllmd-engine.json").read_text())
    assert installed["torch"] == life.engine.torch


def serve(life: Life) -> None:
    host = life.host
    program = host.shell("ls -d /usr/lib/vllmd/[0-9]*").out.split()[-1]
    host.run("runuser", "-u", "vllmd", "--", f"{program}/bin/python3", "-I", "-m", "vllmd.models.demo", MODEL)
    host.container.write("/etc/vllmd/life.yaml", json.dumps({"model": MODEL, "serve": {"port": 8000}, **life.engine.settings}))
    start(life)


def start(life: Life) -> None:
    host = life.host
    done = host.run("systemctl", "enable", "--now", "vllmd@life", check=False, timeout_s=life.engine.start_s)
    assert done.status == 0, host.log("life")
    life.completes()
    paths = {*ROUTES, *known_routes(life)} - OPEN
    assert life.let_in(paths) == []


def known_routes(life: Life) -> set[str]:
    """Those that the real engine lists, with something in the place of each parameter; test_keys_real has those it does not list."""
    if not life.engine.is_real:
        return set()
    paths = json.loads(life.ask("/openapi.json", life.key())[1])["paths"]
    assert "/v1/chat/completions" in paths
    return {"/".join("x" if part.startswith("{") else part for part in path.split("/")) for path in paths}


def upgrade(life: Life) -> None:
    """As it is shipped: the instance goes on with its own program. And as many will set it: it is restarted once it has answered."""
    host = life.host
    main = host.unit("life").main_pid
    life.begin_streams()
    life.apt("install", f"/mnt/packages/vllmd_{NEW}_amd64.deb")
    assert set(life.end_streams()) == {"whole"}
    assert host.unit("life").main_pid == main
    host.shell("sed -i s/^RESTART_ON_UPGRADE=.*/RESTART_ON_UPGRADE=yes/ /etc/default/vllmd")
    life.begin_streams()
    life.apt("install", "--reinstall", f"/mnt/packages/vllmd_{NEW}_amd64.deb")
    wait_for(lambda: host.unit("life").main_pid not in (0, main) and host.unit("life")["ActiveState"] == "active", life.engine.start_s, "the restart", 0.2)
    ends = {end.partition(":")[0] for end in life.end_streams()}
    assert ends == {"whole", "refused"}, "those in flight end, and until it is ready again nobody is let in"
    life.completes()
