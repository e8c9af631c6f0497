"""From the engine's first 200 on /health to READY=1, beside the loop around curl that people put into ExecStartPost=."""

from __future__ import annotations

import random
import shutil
import subprocess
import time

from bench import group
from bench.place import Place
from bench.table import Figure, compared

BAR_S = 0.15
STARTS = 60
LOOPS = 15
SEED = 7
LOADING_S = (0.3, 1.3)
"""How long the engine loads: at random, so that it never falls in with anybody's interval."""


def run() -> list[Figure]:
    source = random.Random(SEED)
    answered, listening, proved, loops = [], [], [], []
    with Place(cgroup=group.available()) as place:
        for number in range(STARTS):
            started = _start(place, source.uniform(*LOADING_S), proof="health")
            answered.append(started[0])
            listening.append(started[1])
            if number % (STARTS // LOOPS) == 0:  # side by side, in the same minutes
                proved.append(_start(place, source.uniform(*LOADING_S), proof="full")[0])
                loops.append(_loop(place, source.uniform(*LOADING_S)))
    curl = compared("until curl -fs; do sleep 1; done, from listen()", loops) if all(loops) else "curl is not installed"
    return [
        Figure("first 200 on /health to READY=1, completion off", answered, bar=BAR_S, judged="p99", against=curl),
        Figure("  from the engine's listen(): also the wait for our next look", listening, against="start.probe_interval_s: 0.05"),
        Figure("  from the first 200, with one real token before READY=1", proved, against="an engine that answers at once"),
    ]


def _start(place: Place, loading_s: float, *, proof: str) -> tuple[float, float]:
    """(from the first 200, from listen()) to READY=1."""
    place.engine_env["BENCH_DELAY_S"] = f"{loading_s:.4f}"
    place.write_config({"start": {"proof": proof}})
    place.start()
    ready = place.ready_at()
    healthy, listening = place.stamp("healthy"), place.stamp("listening")
    place.stop()
    return ready - healthy, ready - listening


def _loop(place: Place, loading_s: float) -> float:
    """0.0 without curl."""
    if not shutil.which("curl"):
        return 0.0
    script = f"until curl -fs -o /dev/null http://127.0.0.1:{place.port}/health; do sleep 1; done"
    with place.alone(env={"BENCH_DELAY_S": f"{loading_s:.4f}"}):
        subprocess.run(["/bin/sh", "-c", script], timeout=30, check=True)
        return time.monotonic() - place.stamp("listening")
