"""`vllmctl start` ends with a request that works, keys and all; `health` and status.json tell what a real engine works at."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import procs
from tests.component.daemons import quick
from tests.harness import Instance
from tests.json_docs import differences
from tests.needs import need
from vllmd import ctl
from vllmd.config.paths import root_paths
from vllmd.ctl.unit import UnitState

pytestmark = pytest.mark.component


class Systemd:
    """One that starts the daemon of a test; what `vllmctl start` asks of it."""

    prefix = "vllmctl"

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._is_active = False

    def show(self, _name: str) -> UnitState:
        return UnitState(load="loaded", active="active" if self._is_active else "inactive")

    def submit(self, verb: str, _name: str) -> None:
        if verb == "restart":
            return  # --no-wait: nobody looks what became of it
        if verb == "stop":
            self._instance.signal(signal.SIGTERM)
            assert self._instance.wait_exit() == 0
        else:
            self._instance.start()
            self._instance.wait_ready()
        self._is_active = verb == "start"


def typed(command: str) -> str:
    """In a shell that finds vllmctl."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True, env={"PATH": path, "LANG": "C.UTF-8"}).stdout


@pytest.mark.parametrize("listen", ["tcp", "uds"])
def test_start_ends_with_a_curl_that_works(listen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    instance = quick(config={"serve": {"listen": listen}})
    try:
        monkeypatch.setattr("vllmd.ctl.unit.need_systemd", lambda _paths: Systemd(instance))
        assert ctl.run(["--root", str(instance.root), "start", "demo"]) == 0
        told = capsys.readouterr().out.splitlines()
        assert "demo is ready after" in told[-2]
        assert told[-1].startswith("try: curl ")
        assert "choices" in json.loads(typed(told[-1].removeprefix("try: ") + " -sS"))
        assert "error" in json.loads(typed(told[-1].removeprefix("try: ").replace("Bearer ", "Bearer x") + " -sS")), "without the key it is refused"
        systemd = Systemd(instance)
        monkeypatch.setattr("vllmd.ctl.unit.need_systemd", lambda _paths: systemd)
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        assert ctl.run(["--root", str(instance.root), "start", "demo", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert differences("vllmctl start NAME --json", said) == []
        assert (said["schema"], said["instance"], said["unit"], said["state"]) == (1, "demo", "active", "ready")
        assert said["example"].startswith("curl ")
        for words, unit in ((("start", "demo"), "active"), (("restart", "demo", "--no-wait"), "queued"), (("stop", "demo"), "inactive"), (("stop", "demo"), "inactive")):
            assert ctl.run(["--root", str(instance.root), *words, "--json"]) == 0
            told = json.loads(capsys.readouterr().out)
            assert (differences("vllmctl start NAME --json", told), told["unit"]) == ([], unit)
    finally:
        instance.close()


def test_health_of_a_real_instance_from_loading_to_its_death(capsys: pytest.CaptureFixture[str]) -> None:
    with quick({"FAKE_START_S": "6"}) as instance:
        arguments = ["--root", str(instance.root), "health", "demo"]
        instance.wait_state("starting")
        assert ctl.run(arguments) == 2
        instance.wait_ready()
        assert ctl.run(arguments) == 0
        instance.kill_engine("vllm")
        instance.wait_exit()
        assert ctl.run(arguments) == 1
        assert "engine" in capsys.readouterr().out.splitlines()[-2]


def test_load_and_last_event_are_told_while_they_are_of_now() -> None:
    with quick({"FAKE_TOKEN_S": "0.05"}, {"watch": {"heartbeat_interval_s": 0.1}}) as instance:
        instance.wait_ready()
        idle = procs.wait_until("a load", lambda: instance.status_json()["load"])
        assert (idle["running"], idle["waiting"]) == (0, 0)
        link = instance.connection(60)
        link.request("POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 120}), {"content-type": "application/json"})
        procs.wait_until("tokens", lambda: (load := instance.status_json()["load"]) and load["running"] == 1 and load["tokens_per_s"] > 0)
        link.getresponse().read()
        link.close()
        procs.wait_until("idle again", lambda: instance.status_json()["load"]["running"] == 0)
        assert instance.status_json()["last_event"]["event"] in ("engine-ready", "generation")
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        ended = instance.status_json()
        assert ended["load"] is None
        assert ended["last_event"]["text"]


def test_somebody_who_may_not_look_is_told_so_and_not_that_nothing_runs(tmp_path: Path) -> None:
    """root without the right to pass over the modes of files: like anybody else, in a checkout that is root's."""
    need(condition=os.geteuid() == 0 and shutil.which("setpriv") is not None, what="root and setpriv")
    paths = root_paths(tmp_path)
    paths.instance_runtime("demo").mkdir(parents=True)
    paths.config.mkdir()
    paths.instance_config("demo").write_text("model: a/b\n")
    status = paths.instance_runtime("demo") / "status.json"
    status.write_text('{"state": "ready"}')
    status.chmod(0o600)
    os.chown(status, 65534, 65534)

    def said(*words: str) -> tuple[int, str]:
        argv = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--", sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", "--root", str(tmp_path), *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    assert said("status", "demo") == (77, f"vllmctl: you may not read {status}\n  hint: sudo vllmctl --root {tmp_path} status demo\n")
    assert json.loads(said("status", "--json")[1])["instances"][0]["state"] == "unknown"
    assert json.loads(said("top", "--json")[1])["instances"][0]["state"] == "unknown"
    assert said("health", "demo")[0] == 77
    paths.config.chmod(0o700)
    os.chown(paths.config, 65534, 65534)
    for words in (["status", "demo"], ["model", "show", "demo"], ["model", "set", "demo", "a/b"], ["model", "clear", "demo"], ["model", "presets", "demo"], ["health", "demo"]):
        assert said(*words)[0] == 77, words
    status.unlink()
    paths.instance_runtime("demo").rmdir()
    assert said("status") == (77, f"vllmctl: you may not read {paths.config}\n  hint: sudo vllmctl --root {tmp_path} status\n")
