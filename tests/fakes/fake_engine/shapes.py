"""The JSON of answers: completions plain and in chunks, vectors, scores."""

from __future__ import annotations

import base64
import struct
import time
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass
class Shape:
    """The two completion APIs differ in names only."""

    chat: bool
    model: str
    prompt_tokens: int

    def base(self, **more: Any) -> Json:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-fake", "object": kind, "created": int(time.time()), "model": self.model, **more}

    def usage(self, tokens: int) -> Json:
        return {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens + tokens, "completion_tokens": tokens}

    def chunk(self, delta: Json, finish: str | None = None) -> Json:
        what = {"delta": delta} if self.chat else {"text": delta["content"]}
        return self.base(choices=[{"index": 0, **what, "logprobs": None, "finish_reason": finish}])

    def whole(self, tokens: int) -> Json:
        text = " fake" * tokens
        what = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choices = [{"index": 0, **what, "logprobs": None, "finish_reason": "length", "stop_reason": None}] if tokens else []
        kind = "chat.completion" if self.chat else "text_completion"
        return self.base(choices=choices, usage=self.usage(tokens)) | {"object": kind}


def pooled(task: str, model: str, count: int, *, empty: bool, packed: bool) -> Json:
    """The answer of a model that gives vectors or scores."""
    usage = {"prompt_tokens": 4 * count, "total_tokens": 4 * count, "completion_tokens": 0}
    if task == "transcribe":
        return {"text": "" if empty else "fake", "usage": usage}
    if task == "score":
        data = [{"index": index, "object": "score", "score": 0.5} for index in range(0 if empty else count)]
        return {"id": "score-fake", "object": "list", "model": model, "data": data, "usage": usage}
    numbers = [] if empty else [0.125] * 64
    vector = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode() if packed else numbers
    data = [{"index": index, "object": "embedding", "embedding": vector} for index in range(count)]
    return {"id": "embd-fake", "object": "list", "created": int(time.time()), "model": model, "data": data, "usage": usage}
