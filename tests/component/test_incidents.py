"""What a failure leaves: evidence gathered before the kill, bounded in time and size, and readable afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import procs
from tests.component.daemons import Tampered, assert_nothing_left, ends, first, quick, stop
from tests.harness import Instance, merged
from tests.needs import need
from vllmd.instance.incident import EXAMINE_S

pytestmark = [pytest.mark.component, pytest.mark.timeout(120)]

KEY = "sk-verysecret-0815-abcdef"
# After a second (the speed is 3), so that a slow machine has told READY by then.
CRASH = {"FAKE_EXIT_READY": "1@3", "FAKE_ERROR": "ValueError: no room"}
PARTS = {"cause.txt", "engine.log", "stacks.txt", "processes.txt", "waits.txt", "cgroup.txt", "kernel.txt", "config.json", "gpu.json", "metrics.txt"}


def incidents(instance: Instance) -> list[Path]:
    folder = instance.state / "incidents"
    return sorted(folder.iterdir()) if folder.exists() else []


def newest(instance: Instance) -> tuple[Path, dict[str, Any]]:
    folder = incidents(instance)[-1]
    return folder, json.loads((folder / "summary.json").read_text())


def ctl(instance: Instance, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = "import sys; from vllmd.ctl import main; sys.exit(main())"
    argv = [sys.executable, "-c", script, "--root", str(instance.root), "incidents", instance.name, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)


def status(instance: Instance) -> str:
    script = "import sys; from vllmd.ctl import main; sys.exit(main())"
    argv = [sys.executable, "-c", script, "--root", str(instance.root), "status", instance.name]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30).stdout


@contextlib.contextmanager
def hung(**more: Any) -> Iterator[Instance]:
    """A ready engine with work whose EngineCore is stopped: a hang, noticed within a second or so."""
    config = merged({"watch": {"hang_timeout_s": 1, "first_request_timeout_s": 1, "heartbeat_interval_s": 0.1}}, more.pop("config", {}))
    with quick({"FAKE_TOKEN_S": "0.05", **more.pop("fake", {})}, config, **more) as instance:
        instance.wait_ready()
        stream = instance.connection()
        with contextlib.closing(stream):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 2000, "stream": True}
            stream.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            stream.getresponse().read(1)
            instance.kill_engine("VLLM::EngineCore", signal.SIGSTOP)
            yield instance


def test_a_crash_leaves_an_incident_that_journal_and_last_json_name() -> None:
    with quick(CRASH) as instance:
        ends(instance, 70, "engine_exited", ready=True)
        folder, summary = newest(instance)
        assert {path.name for path in folder.iterdir()} == PARTS | {"summary.json"}
        assert instance.last_json()["incident"] == folder.name == summary["id"]
        assert f"[vllmctl incidents demo {folder.name}]" in instance.log()
        assert summary["code"] == "engine_exited"
        assert summary["serving"] is True
        assert "ValueError: no room" in (folder / "engine.log").read_text()
        assert "vllm:num_requests_running" in (folder / "metrics.txt").read_text()
        assert json.loads((folder / "config.json").read_text())["config"]["serve"]["port"] == instance.port
        assert f"vllmctl incidents demo {folder.name}" in status(instance)
        assert oct(folder.stat().st_mode & 0o777) == "0o750"
        assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o640"}
        counts = json.loads((instance.state / "causes.json").read_text())
        assert counts["restarts"] == {"engine_exited": 1}
        assert counts["last"][0]["incident"] == folder.name


def test_a_known_cause_is_named_with_its_status_and_not_restarted() -> None:
    with quick({"FAKE_START_S": "30", "FAKE_EXIT": "1@0.5", "FAKE_ERROR": "SafetensorError: Error while deserializing header: incomplete metadata"}) as instance:
        error = ends(instance, 65, "bad_model", ready=False)
        assert "deserializing header" in error["what"]
        assert newest(instance)[1]["noticed"]["code"] == "engine_exited"


@pytest.mark.parametrize("cgroup", [False, True], ids=["processes", "cgroup"])
def test_a_hung_engine_is_looked_at_while_it_still_hangs(cgroup: bool) -> None:
    """Stopped, with threads in the kernel: what it waits for stands in the evidence, and the kill comes after it."""
    with hung(cgroup=cgroup) as instance:
        core = instance.engine_process("VLLM::EngineCore").pid
        assert instance.wait_exit() == 75, instance.describe()
        assert instance.last_json()["error"]["code"] == "engine_hung", instance.last_json()
        folder, summary = newest(instance)
        assert summary["took_s"] < EXAMINE_S
        waits = (folder / "waits.txt").read_text()
        assert f"=== {core} VLLM::EngineCor" in waits
        assert "State: T (stopped)" in waits
        assert summary["heartbeat_age_s"] >= 1, "how long it had stood still when it was found"
        assert "VLLM::Worker" in (folder / "processes.txt").read_text()
        if cgroup:
            assert "cpu.stat" in (folder / "cgroup.txt").read_text()
        assert_nothing_left(instance)


SLOW_PROC = """
import os, pathlib, time
import vllmd.instance.evidence_processes as module
def hang(self, path):
    time.sleep(60)
module.Processes._read = hang
"""


def test_reads_of_proc_that_hang_cost_their_lines_and_five_seconds_at_most() -> None:
    with Tampered.quick(SLOW_PROC, fake=CRASH) as instance:
        ends(instance, 70, "engine_exited", ready=True)
        _, summary = newest(instance)
        assert summary["took_s"] < EXAMINE_S
        notes = {part["name"]: part["note"] for part in summary["parts"]}
        assert "not finished within" in notes["waits.txt"]
        assert "ValueError: no room" in (newest(instance)[0] / "engine.log").read_text()


SLOW_FAMILY = """
import threading, time
import vllmd.system.processfamily as module
real = module.ProcessFamily.pids
def pids(self):
    if threading.current_thread().name == "vllmd-blocking":
        time.sleep(60)
    return real(self)
module.ProcessFamily.pids = pids
import vllmd.instance.incident as incident
decide = incident.faults.decide
incident.faults.decide = lambda *a: time.sleep(60)
"""


def test_steps_that_hang_cost_what_they_would_have_found_and_not_the_incident() -> None:
    """The look for the processes, and the search for the cause (a thousand lines made to cost a regular expression dear)."""
    with Tampered.quick(SLOW_FAMILY, fake=CRASH) as instance:
        ends(instance, 70, "engine_exited", ready=True)
        folder, summary = newest(instance)
        assert summary["took_s"] < EXAMINE_S
        assert "ValueError: no room" in (folder / "engine.log").read_text()


SLOW_CAUSES = """
import threading, time
import vllmd.instance.causes as module
real = module.read
def read(directory):
    if threading.current_thread().name == "vllmd-blocking":
        time.sleep(60)
    return real(directory)
module.read = read
"""


def test_a_record_of_earlier_failures_that_hangs_costs_no_cause() -> None:
    with Tampered.quick(SLOW_CAUSES, fake={"FAKE_START_S": "30", "FAKE_EXIT": "1@0.5", "FAKE_ERROR": "SafetensorError: Error while deserializing header: x"}) as instance:
        ends(instance, 65, "bad_model", ready=False)
        assert newest(instance)[1]["took_s"] < EXAMINE_S


SLOW_WRITE = """
import time
import vllmd.instance.incident_store as module
module.write = lambda *a, **k: time.sleep(60)
"""


def test_a_disk_that_hangs_delays_the_end_by_what_evidence_may_take_and_no_more() -> None:
    with Tampered.quick(SLOW_WRITE, fake=CRASH) as instance:
        instance.wait_state("examining")
        began = time.monotonic()
        ends(instance, 70, "engine_exited", ready=True)
        assert time.monotonic() - began < EXAMINE_S + 3
        assert "did not take it within" in instance.log()
        assert instance.last_json()["incident"] == ""


BROKEN = """
import vllmd.instance.incident as module
def broken(*a, **k):
    raise RuntimeError("a bug in a collector")
module.faults.decide = broken
"""


def test_a_bug_in_the_examination_changes_nothing_of_the_end() -> None:
    with Tampered.quick(BROKEN, fake=CRASH) as instance:
        ends(instance, 70, "engine_exited", ready=True)
        assert "a bug in a collector" in instance.log()


def test_a_stop_during_the_examination_ends_it() -> None:
    with Tampered.quick(SLOW_PROC, fake=CRASH) as instance:
        instance.wait_state("examining")
        instance.signal(signal.SIGTERM)
        began = time.monotonic()
        assert instance.wait_exit() == 70
        assert time.monotonic() - began < 2
        assert_nothing_left(instance)


def test_a_full_disk_prevents_neither_the_end_nor_its_status() -> None:
    need(os.geteuid() == 0, "root")
    instance = Tampered.quick(fake={"FAKE_EXIT_READY": "1@1.5", "FAKE_ERROR": "ValueError: no room"})
    place = instance.root / "lib"
    place.mkdir()
    mount = 'mount -t tmpfs -o size=256k full "$0" && (while ! [ -e "$0/../gate" ]; do sleep 0.02; done; head -c 1M /dev/zero > "$0/filler" 2>/dev/null; touch "$0/../filled") & sleep 0.3; exec "$@"'
    instance.before = ("unshare", "--mount", "--propagation", "private", "sh", "-c", mount, str(place))
    with instance:
        instance.wait_ready()
        (instance.root / "gate").touch()
        procs.wait_until("a full disk", (instance.root / "filled").exists)
        assert instance.wait_exit() == 70, instance.describe()
        assert "Traceback" not in instance.log()
        assert "No space left" in instance.log()
        assert_nothing_left(instance)


def test_the_same_failure_three_times_says_so_and_the_first_evidence_stays() -> None:
    with quick(CRASH, {"watch": {"keep_incidents": 2}}) as instance:
        for life in range(1, 6):
            error = ends(instance, 70, "engine_exited", ready=True)
            assert (f"the same failure, {life} times in a row" in error["what"]) is (life >= 3)
            if life == 1:
                began = newest(instance)[0].name
            if life < 5:
                instance.start()
        assert "restarts have not helped" in error["hint"]
        kept = [path.name for path in incidents(instance)]
        assert len(kept) == 3
        assert kept[0] == began
        assert newest(instance)[1]["first"] == began
        assert newest(instance)[1]["count"] == 5
        listed = ctl(instance)
        assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == sorted(kept, reverse=True)


def test_another_failure_ends_the_series_and_its_evidence_may_go() -> None:
    with quick(CRASH, {"watch": {"keep_incidents": 2}}) as instance:
        for text in ("one", "two words", "three whole words"):
            instance.config["engine"]["env"]["FAKE_ERROR"] = f"ValueError: {text}"
            instance.write_config()
            if text != "one":
                instance.start()
            error = ends(instance, 70, "engine_exited", ready=True)
            assert "in a row" not in error["what"]
        assert len(incidents(instance)) == 2


def test_no_secret_stands_in_the_evidence(tmp_path: Path) -> None:
    """Neither from the engine's lines nor from what others print of it: py-spy shows command lines."""
    (tmp_path / "py-spy").write_text(f"#!/bin/sh\necho 'Process 7: vllm serve --api-key {KEY}'; echo '{KEY}'; echo 'Thread 1 (idle)'\n")
    (tmp_path / "py-spy").chmod(0o755)
    fake = {**CRASH, "FAKE_ERROR": f"ValueError: bad key {KEY} and Authorization: Bearer {KEY}"}
    config = {"serve": {"api_key": KEY}, "engine": {"env": {"MY_TOKEN": KEY + "-2"}}, "model": {"hf_token": "hf_" + "x" * 30}}
    with quick(fake, config, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}) as instance:
        assert instance.wait_exit() == 70, instance.describe()
        folder, _ = newest(instance)
        assert "Thread 1 (idle)" in (folder / "stacks.txt").read_text()
        for path in [*folder.iterdir(), instance.state / "last.json", instance.state / "causes.json"]:
            content = path.read_text()
            assert KEY not in content, path.name
            assert "hf_xxxx" not in content, path.name
        shown = ctl(instance, "last", "--json").stdout
        assert KEY not in shown
        assert "***" in shown or "REDACTED" in shown.upper() or "redacted" in shown


def test_evidence_is_bounded_whatever_the_engine_prints() -> None:
    """Lines of megabytes, a hundred megabytes of them."""
    fake = {"FAKE_OUTPUT": "flood", "FAKE_OUTPUT_MB": "100", "FAKE_EXIT_READY": "1@1"}
    with quick(fake) as instance:
        assert instance.wait_exit(60) == 70, instance.describe()
        folder, summary = newest(instance)
        assert sum(path.stat().st_size for path in folder.iterdir()) < 4 << 20
        assert summary["took_s"] < EXAMINE_S


def test_the_kill_comes_soon_and_takes_what_ignores_every_signal() -> None:
    with quick({**CRASH, "FAKE_CROWD": "200"}, cgroup=True) as instance:
        instance.wait_ready(60)
        error = ends(instance, 70, "engine_exited", ready=True)
        assert error
        folder, summary = newest(instance)
        assert summary["took_s"] < EXAMINE_S
        assert "the 48 largest of" in next(part["note"] for part in summary["parts"] if part["name"] == "waits.txt")
        assert len((folder / "processes.txt").read_text().splitlines()) > 200
        assert first(instance, "STOPPING")


def test_a_poisoned_compile_cache_is_moved_aside_once() -> None:
    words = "RuntimeError: vLLM failed to compile the model. The most likely reason is a corrupted compilation artifact."
    with quick() as instance:
        instance.wait_ready()
        cache = Path(procs.environ_of(instance.launch_json()["pid"])["VLLM_CACHE_ROOT"]) / "torch_compile_cache"
        stop(instance)
        instance.config["engine"]["env"] |= {"FAKE_START_S": "30", "FAKE_EXIT": "1@0.5", "FAKE_ERROR": words}
        instance.write_config()
        cache.mkdir(parents=True)
        (cache / "artifact").write_text("garbage")
        instance.start()
        ends(instance, 70, "compile_cache_poisoned", ready=False)
        moved = list(cache.parent.glob("torch_compile_cache.bad-*"))
        assert [path.name for path in moved] == [f"torch_compile_cache.bad-{newest(instance)[0].name}"]
        assert (moved[0] / "artifact").exists()
        assert not cache.exists()
        # Again: now it cannot have been the cache, and nothing is moved.
        cache.mkdir()
        instance.start()
        error = ends(instance, 70, "compile_cache_poisoned", ready=False)
        assert "moved aside before" in error["hint"]
        assert cache.exists()
        # It becomes ready once: the next time it may be the cache again.
        instance.config["engine"]["env"] |= {"FAKE_START_S": "0.3", "FAKE_EXIT": "", "FAKE_ERROR": ""}
        instance.write_config()
        instance.start()
        instance.wait_ready()
        procs.wait_until("no marker", lambda: not (instance.state / "cache-moved.json").exists())


def test_vllmctl_shows_hostile_evidence_without_harm() -> None:
    """The service's user owns the files: links, fifos, control characters, wrong JSON."""
    with quick(CRASH) as instance:
        ends(instance, 70, "engine_exited", ready=True)
        folder, summary = newest(instance)
        secret = instance.root / "secret.txt"
        secret.write_text("ROOT ONLY\n")
        (folder / "cause.txt").unlink()
        (folder / "cause.txt").symlink_to(secret)
        (folder / "kernel.txt").unlink()
        os.mkfifo(folder / "kernel.txt")
        (folder / "waits.txt").write_text("\x1b[2J\x1b]0;owned\x07 text\n")
        summary |= {"what": "\x1b[31mred\nnext", "count": "many", "parts": 7, "lost": [], "engine": None}
        (folder / "summary.json").write_text(json.dumps(summary))
        other = instance.root / "other.txt"
        other.write_text("ROOT ONLY\n")
        os.link(other, folder / "hard.txt")
        fake = folder.parent / "20990101T000000.000Z-abcdef"
        fake.symlink_to(instance.root)
        for arguments in ((), (folder.name,), (folder.name, "--part", "waits.txt"), (folder.name, "--part", "hard.txt"), (fake.name,), (fake.name, "--json")):
            done = ctl(instance, *arguments)
            assert "ROOT ONLY" not in done.stdout + done.stderr, arguments
            assert "\x1b" not in done.stdout + done.stderr, arguments
            assert "Traceback" not in done.stderr, done.stderr
        (folder / "summary.json").write_text("[]")
        said = json.loads(ctl(instance, folder.name, "--json").stdout)
        assert (said["schema"], said["id"]) == (1, folder.name)
        assert ctl(instance, folder.name, "--part", "../secret.txt").returncode == 64
        assert ctl(instance, "nothing-like-it").returncode == 64


def test_vllmctl_follows_no_link_on_the_way_to_the_incidents() -> None:
    with quick(CRASH) as instance:
        ends(instance, 70, "engine_exited", ready=True)
        folder = instance.state / "incidents"
        folder.rename(instance.root / "elsewhere")
        folder.symlink_to(instance.root / "elsewhere")
        done = ctl(instance)
        assert done.returncode == 74
        assert "may be a link" in done.stderr
