"""What every request handler shares: the model's name and limits, the key, the modes, the way to EngineCore."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .middleware import Stack
from .modes import Modes
from .output import Output
from .state import Served

ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
CLOSED = "cannot schedule new futures after shutdown"


class Refused(Exception):
    """An answer that is an error, in the shape of OpenAI's API."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclass
class Site:
    name: str
    model: str
    max_len: int
    api_keys: tuple[str, ...]
    middleware: Stack
    task: str
    modes: Modes
    served: Served
    output: Output

    def card(self) -> dict[str, Any]:
        """/v1/models."""
        entry = {"id": self.name, "object": "model", "created": 1795225266, "owned_by": "vllm", "root": self.model}
        return {"object": "list", "data": [{**entry, "parent": None, "max_model_len": self.max_len, "permission": []}]}

    @property
    def completions(self) -> str:
        """The mode of inference by now."""
        mode = self.modes.completions
        return mode.word if time.monotonic() - self.served.ready_at >= mode.after_s else "ok"

    def stand_still(self) -> None:
        """As an event loop that is blocked: nobody is answered any more."""
        mode = self.modes.front
        if mode.word != "ok" and time.monotonic() - self.served.ready_at >= mode.after_s:
            while mode.word == "busy":
                pass
            self.rest(None)

    def rest(self, seconds: float | None) -> None:
        """None: for ever; the process ends around it."""
        if seconds != 0:
            threading.Event().wait(seconds)

    def refuse_if_broken(self) -> None:
        if self.served.dead:
            raise Refused(500, ENGINE_DEAD, "InternalServerError")
        if self.served.stopping:
            raise Refused(500, CLOSED, "InternalServerError")
        match self.completions:
            case "400":
                raise Refused(400, "As of transformers v4.44, default chat template is no longer allowed")
            case "500":
                raise Refused(500, "list index out of range", "InternalServerError")
            case "hang":
                self.rest(None)


def read_config(model: str) -> dict[str, Any]:
    """The model's config.json; {} where there is none that can be read (a hub id, a bad file)."""
    with suppress(OSError, ValueError):
        return dict(json.loads((Path(model) / "config.json").read_text()))
    return {}


def task_of(model: str, wanted: str, runner: str | None) -> str:
    """`auto` as vLLM decides: the sentence-transformers layout embeds, a sequence classifier scores."""
    if wanted != "auto":
        return wanted
    architectures = str(read_config(model).get("architectures", ""))
    if "SequenceClassification" in architectures:
        return "score"
    if "Whisper" in architectures:
        return "transcribe"
    pools = (Path(model) / "modules.json").exists() or "ForCausalLM" not in architectures + "ForCausalLM" * (not architectures)
    return "embed" if pools or runner == "pooling" else "generate"
