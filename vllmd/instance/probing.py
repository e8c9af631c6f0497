"""From spawn to proof of life: /health, a listener that is ours, one real request of the model's task, all under the start's clocks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllmd.core.plan import Endpoint
from vllmd.engines.protocol import ProofRequest
from vllmd.errors import EngineFailed, PortRefused, Status, TryLater
from vllmd.preflight.report import Listener
from vllmd.system.http import Answer, request

HEALTH_TIMEOUT_S = 5.0
PROOF_TRIES = 3
"""An engine may answer its very first request with a 5xx while it warms up; three in a row are no accident."""
RETRY_S = 1.0
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked of a starting engine. `listeners` finds who listens on the endpoint, `is_ours` whether it is in our family."""

    endpoint: Endpoint
    health_path: str
    interval_s: float
    proof_timeout_s: float
    listeners: Callable[[Endpoint], Sequence[Listener]]
    is_ours: Callable[[Listener], bool]
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of every request of ours, a key among them."""


async def healthy(probe: Probe, say: Callable[[str], None]) -> float:
    """Waits for 200 on /health from a listener of our own; returns when it came (monotonic). PortRefused if somebody else
    answers. `say` hears what /health does instead: an engine that answers 401 for ever starts for ever."""
    while True:
        answer = await request(probe.endpoint, "GET", probe.health_path, headers=probe.headers, timeout_s=HEALTH_TIMEOUT_S)
        if answer.outcome == "answered" and answer.status == 200:
            seen = time.monotonic()
            check_listener(probe)
            return seen
        say(_instead(probe.health_path, answer))
        await asyncio.sleep(probe.interval_s)


def _instead(path: str, answer: Answer) -> str:
    """'' while nobody listens, as long as the model loads."""
    if answer.outcome == "answered":
        return f"{path} answers {answer.status}"
    return f"{path}: {answer.detail}" if answer.outcome in ("timeout", "invalid") else ""


def check_listener(probe: Probe) -> None:
    """Two vLLMs that load at once both bind one port; the second never listens, and the first answers our probe."""
    found = probe.listeners(probe.endpoint)
    strangers = [listener for listener in found if not probe.is_ours(listener)]
    if strangers and len(strangers) == len(found):
        stranger = strangers[0]
        owner = stranger.unit or (f"pid {stranger.pids[0]}" if stranger.pids else f"uid {stranger.uid}")
        hint = f"systemctl stop {stranger.unit}" if stranger.unit else "give this instance another serve.port"
        what = f"{probe.endpoint} is answered by {owner}, not by our engine"
        raise PortRefused("port_answered_by_other", what, hint, status=Status.PORT_FOREIGN)


async def prove(probe: Probe, proofs: Sequence[ProofRequest], say: Callable[[str], None]) -> str:
    """Sends the proof of life; returns what proved it. EngineFailed when the engine answers and the answer is no life."""
    for proof in proofs:
        answer, complaint = await _try(probe, proof, say)
        if answer.outcome == "answered" and answer.status == 404 and not names_model(answer):
            continue
        if complaint:
            what = f"the engine answers {probe.health_path}, but not {proof.describe}: {complaint}"
            raise EngineFailed("proof_failed", what, "ask it by hand; start.proof: health skips this proof")
        return proof.describe
    return "/health alone"


async def _try(probe: Probe, proof: ProofRequest, say: Callable[[str], None]) -> tuple[Answer, str]:
    body = proof.body if isinstance(proof.body, bytes) else json.dumps(proof.body).encode()
    for attempt in range(1, PROOF_TRIES + 1):
        say(f"asking for {proof.describe}" + (f", try {attempt}" if attempt > 1 else ""))
        answer = await request(
            probe.endpoint, proof.method, proof.path, body=body, headers={**JSON, **proof.headers}, timeout_s=probe.proof_timeout_s
        )
        complaint = judge(answer, proof)
        if answer.outcome == "timeout":
            what = f"no answer to {proof.describe} within {probe.proof_timeout_s:g} s"
            raise TryLater("proof_timeout", what, "a first request that compiles needs a longer start.proof_timeout_s")
        if not complaint or attempt == PROOF_TRIES or not _may_pass(answer):
            break
        await asyncio.sleep(RETRY_S)
    return answer, complaint


def _may_pass(answer: Answer) -> bool:
    """What the engine refuses (4xx) or answers wrongly, it will refuse the next time too."""
    return answer.outcome != "answered" or answer.status >= 500


def judge(answer: Answer, proof: ProofRequest) -> str:
    """'' when the answer proves life, else what is wrong with it."""
    if answer.outcome != "answered":
        return f"the connection was {answer.outcome}"
    if answer.status != 200:
        return f"status {answer.status}: {_excerpt(answer.body)}"
    return proof.accept(_decoded(answer.body))


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace")


def names_model(answer: Answer) -> bool:
    """A 404 that speaks of the model comes from a route that exists."""
    return b"model" in answer.body.lower()


def _excerpt(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:200]
