"""What runs in the machine whose memory ends: an instance under a limit of memory, and an engine that wants more than that.

Each `GUEST RESULT {...} .` on the console is one life, as systemd and the kernel saw it; the test judges.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllmd.models import demo

NAME = "hungry"
UNIT = f"vllmd@{NAME}.service"
HOG = Path("/run/vllmd/hog")
GROUP = Path("/sys/fs/cgroup/system.slice") / r"system-vllmd.slice" / UNIT
DEADLINE_S = 180.0
LIMIT = """[Service]
MemoryMax=320M
Restart={restart}
RestartSec=1
WatchdogSec=0
"""


def run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def shown() -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in run("systemctl", "show", UNIT).splitlines())


def wait(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what + "\n" + run("journalctl", "--no-pager", "-n", "60", "-o", "cat"))
        time.sleep(0.05)


def say(text: str) -> None:
    print(f"GUEST {text} .", flush=True)


def set_up() -> None:
    run("systemd-sysusers")
    run("systemd-tmpfiles", "--create")
    model = demo.make(Path("/var/lib/vllmd/models/demo"))
    run("chown", "-R", "vllmd:", "/var/lib/vllmd")
    engine = {"executable": "/project/tests/fakes/engine.py", "env": {"FAKE_HOG": f"400:{HOG}"}}
    config = {"model": str(model), "serve": {"port": 8000}, "gpus": "none", "engine": engine}
    Path("/etc/vllmd").mkdir(exist_ok=True)
    Path(f"/etc/vllmd/{NAME}.yaml").write_text(json.dumps(config))


def start(restart: str) -> dict[str, str]:
    directory = Path(f"/etc/systemd/system/{UNIT}.d")
    directory.mkdir(exist_ok=True)
    (directory / "limit.conf").write_text(LIMIT.format(restart=restart))
    run("systemctl", "daemon-reload")
    run("systemctl", "start", UNIT)
    unit = shown()
    if unit["ActiveState"] != "active":
        say("NOT READY " + run("journalctl", "--no-pager", "-n", "60", "-o", "cat"))
    return unit


def engine_of(main: str) -> set[str]:
    """Its processes, without the supervisor."""
    group = Path("/sys/fs/cgroup" + shown()["ControlGroup"])
    return {pid for file in group.rglob("cgroup.procs") for pid in file.read_text().split()} - {main}


def left(pids: set[str]) -> list[str]:
    return sorted(pid for pid in pids if Path(f"/proc/{pid}").exists())


def engine_is_killed() -> None:
    """The kernel takes the engine; the supervisor lives, and says why it ends."""
    unit = start("no")
    engine = engine_of(unit["MainPID"])
    began = time.monotonic()
    HOG.touch()
    wait(lambda: shown()["ActiveState"] in ("failed", "inactive"), "the end")
    took = time.monotonic() - began
    HOG.unlink()
    result("engine", unit, engine, took)


def supervisor_is_killed() -> None:
    """The kernel takes the supervisor; systemd takes the rest, and starts it again."""
    unit = start("on-failure")
    engine = engine_of(unit["MainPID"])
    Path(f"/proc/{unit['MainPID']}/oom_score_adj").write_text("1000")
    began = time.monotonic()
    HOG.touch()
    wait(lambda: not Path(f"/proc/{unit['MainPID']}").exists(), "the supervisor's end")
    HOG.unlink()
    wait(lambda: not left(engine), "the engine's end")
    took = time.monotonic() - began
    wait(lambda: shown()["ActiveState"] == "active", "the next start")
    result("supervisor", unit, engine, took)
    run("systemctl", "stop", UNIT)


def result(victim: str, unit: dict[str, str], engine: set[str], took: float) -> None:
    now = shown()
    last = Path(f"/var/lib/vllmd/instances/{NAME}/last.json")
    document = {
        "victim": victim,
        "engine": len(engine),
        "left": left(engine),
        "took_s": round(took, 2),
        "supervisor_again": now["MainPID"] not in ("0", unit["MainPID"]),
        "unit": {key: now[key] for key in ("Result", "ExecMainStatus", "ActiveState", "NRestarts")},
        "error": json.loads(last.read_text())["error"] if last.exists() else None,
        "kernel": [line for line in run("journalctl", "-k", "-o", "cat", "--no-pager").splitlines() if "Killed process" in line or "oom-kill" in line][-6:],
        "groups": [str(path) for path in Path("/sys/fs/cgroup").rglob("engine-*")],
    }
    say(f"RESULT {json.dumps(document)}")


def main() -> None:
    try:
        set_up()
        say("SET UP")
        engine_is_killed()
        run("systemctl", "reset-failed", UNIT)
        supervisor_is_killed()
        say("DONE")
    except Exception as error:  # the console is all that anybody sees of it
        say(f"FAILED {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
