"""A start with the real vLLM, by vllmd and bare, in turns: how much of it passes outside of the engine."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import group, idle, killing, processes
from bench.place import MARK, BenchError, Place, wait_for
from bench.table import Figure, compared
from vllmd.engines import record

BAR_S = 0.7
PAIRS = 5
START_TIMEOUT_S = 300.0
ASK_S = 0.05
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How vllmd executed the engine: a bare start does exactly the same."""

    argv: list[str]
    env: dict[str, str]
    cwd: str


@dataclass(frozen=True, slots=True)
class Bare:
    """`left`: processes that outlive the SIGKILL of the main one; `kernel_s`: to free its memory and then theirs."""

    total_s: float
    left: int
    kernel_s: float


@dataclass(frozen=True, slots=True)
class Supervised:
    """Seconds of one start by vllmd. `total_s`: to the first token that we got after READY=1; `proof_s`: from 200 on
    /health to READY=1, the engine's work on a token included; `cpu_s`: the supervisor's own until then."""

    total_s: float
    before_spawn_s: float
    proof_s: float
    cpu_s: float
    killed: killing.Killed


def run() -> list[Figure]:
    engines = idle.engines().resolve()
    if not (engines / record.CURRENT / "bin/vllm").exists():
        return [Figure("time of a start spent outside the engine", bar=BAR_S, missing="no real vLLM: make setup")]
    with Place(cgroup=group.available(), config=_config(engines), engines=engines) as place:
        recipe = _warm_up(place)
        bare: list[Bare] = []
        supervised: list[Supervised] = []
        for number in range(PAIRS):
            say(f"pair {number + 1} of {PAIRS}")
            for turn in ("bare", "vllmd") if number % 2 else ("vllmd", "bare"):
                if turn == "vllmd":
                    supervised.append(_supervised(place))
                else:
                    bare.append(_bare(place, recipe))
    return _figures(bare, supervised)


def _figures(bare: list[Bare], supervised: list[Supervised]) -> list[Figure]:
    outside = [ours.total_s - theirs.total_s for ours, theirs in zip(supervised, bare, strict=True)]
    pairs = " ".join(f"{each:+.2f}" for each in outside)
    orphans = f"bare: {min(each.left for each in bare)} processes left after {killing.ORPHAN_S:g} s"
    kernel = compared("the kernel alone, main process then the rest", [each.kernel_s for each in bare])
    totals = [each.total_s for each in supervised]
    return [
        Figure("real vLLM: time of a start outside the engine (paired)", outside, bar=BAR_S, against=f"the pairs: {pairs}"),
        Figure("  the whole start by vllmd, to one token after READY=1", totals, against=compared("bare `vllm serve`, to one token", [each.total_s for each in bare])),
        Figure("  of it before the engine's process", [each.before_spawn_s for each in supervised], against="exec of `vllmd run` to fork"),
        Figure("  of it from 200 on /health to READY=1", [each.proof_s for each in supervised], against="the engine's work on the first token included"),
        Figure("  the supervisor's own CPU time until then", [each.cpu_s for each in supervised]),
        Figure("real vLLM: SIGKILL of its main process to nothing left", [each.killed.empty_s for each in supervised], bar=killing.EMPTY_BAR_S, against=f"{orphans}; {kernel}"),
        Figure("  to the supervisor's exit", [each.killed.exit_s for each in supervised], bar=killing.EXIT_BAR_S),
    ]


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _config(engines: Path) -> dict[str, Any]:
    known = record.read((engines / record.CURRENT).resolve())
    if known is None or known.variant != "cpu":
        return {"gpus": 1}
    return {"gpus": "none", "engine": {"args": {"dtype": "float32", "enforce-eager": True}, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}}


def _warm_up(place: Place) -> Recipe:
    """A first start, which reads everything from the disk; what vllmd executed is read from /proc."""
    say("warming up")
    place.start()
    place.ready_at(START_TIMEOUT_S)
    pid = int(place.launch()["pid"])
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    env = dict(word.split("=", 1) for word in words if "=" in word)
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    recipe = Recipe(argv, {name: value for name, value in env.items() if name != "VLLMD_LAUNCH_ID"}, os.readlink(f"/proc/{pid}/cwd"))  # noqa: PTH115
    place.stop()
    return recipe


def _supervised(place: Place) -> Supervised:
    boot_clock = time.clock_gettime(time.CLOCK_BOOTTIME)
    began = place.start()
    place.ready_at(START_TIMEOUT_S)
    if not _one_token(place.port):
        raise BenchError("READY=1, and no token")
    total = time.monotonic() - began
    cpu = processes.cpu_ns(place.pid) / 1e9
    before = int(place.launch()["start_time"]) / TICKS - boot_clock
    return Supervised(total, before, _phase(place.metrics(), "proof"), cpu, killing.kill(place))


def _phase(metrics: str, name: str) -> float:
    """Seconds, as the daemon itself counts them."""
    found = re.search(rf'^vllmd_start_phase_seconds{{phase="{name}"}} (\S+)$', metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _bare(place: Place, recipe: Recipe) -> Bare:
    """Without vllmd, to the first token; then what is left when its main process is killed."""
    with (place.root / "bare.log").open("wb") as log:
        began = time.monotonic()
        child = subprocess.Popen(recipe.argv, env=recipe.env, cwd=recipe.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    family: list[int] = []
    try:
        while not _one_token(place.port):
            if child.poll() is not None or time.monotonic() - began > START_TIMEOUT_S:
                raise BenchError(f"the bare vLLM did not come up\n{(place.root / 'bare.log').read_text()[-2000:]}")
            time.sleep(ASK_S)
        seconds = time.monotonic() - began
        family = processes.marked(MARK, str(place.root))
        blocks = set().union(*map(processes.shared_memory, family))
        kernel = processes.kill_and_wait([child.pid])
        time.sleep(killing.ORPHAN_S)
        left = [pid for pid in family if processes.is_alive(pid)]
        kernel += processes.kill_and_wait(left)
        for block in blocks:
            block.unlink(missing_ok=True)
        return Bare(seconds, len(left), kernel)
    finally:
        child.kill()
        processes.end(processes.marked(MARK, str(place.root)))
        child.wait()
        wait_for("a free port", lambda: not _listens(place.port), 10)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=1)) as connection:
        connection.connect()
        return True
    return False


def _one_token(port: int) -> bool:
    """Whether one token could be had."""
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 1})
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status == 200 and bool(json.loads(answer.read())["choices"])
    return False
