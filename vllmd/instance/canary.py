"""One proof of life asked of an idle engine, and what its answer is worth."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from vllmd.core.liveness import ALONE, Reply
from vllmd.core.plan import Endpoint
from vllmd.engines.protocol import Beating, Engine, ProofRequest
from vllmd.instance.probing import JSON, judge, names_model
from vllmd.system.http import Answer, request


@dataclass(frozen=True, slots=True)
class Answered:
    """`detail` for people, where it is no proof."""

    reply: Reply
    detail: str = ""


async def ask(endpoint: Endpoint, engine: Engine, proofs: Sequence[ProofRequest], rank: str, timeout_s: float) -> Answered:
    """The first proof whose route exists decides; all of them together have the time. `rank`: of several, else ALONE."""
    try:
        async with asyncio.timeout(timeout_s):
            for proof in proofs:
                addressed = engine.addressed(proof, rank) if rank != ALONE and isinstance(engine, Beating) else proof
                answer = await _send(endpoint, addressed, timeout_s + 1)
                if answer.outcome != "answered" or answer.status != 404 or names_model(answer):
                    return _worth(answer, proof)
    except TimeoutError:
        return Answered("timeout")
    return Answered("refused", "none of its routes exists")


async def _send(endpoint: Endpoint, proof: ProofRequest, timeout_s: float) -> Answer:
    body = proof.body if isinstance(proof.body, bytes) else json.dumps(proof.body).encode()
    return await request(endpoint, proof.method, proof.path, body=body, headers={**JSON, **proof.headers}, timeout_s=timeout_s)


def _worth(answer: Answer, proof: ProofRequest) -> Answered:
    complaint = judge(answer, proof)
    if not complaint:
        return Answered("ok")
    if answer.outcome == "answered" and 400 <= answer.status < 500:
        return Answered("refused", f"{proof.describe}: {complaint}")
    return Answered("failed" if answer.outcome in ("answered", "invalid") else "void", f"{proof.describe}: {complaint}")
