"""Proof of life per task: the smallest request whose answer shows that the model computes, not merely that HTTP answers.

/health is 200 also for a vLLM whose first completion will kill it, and for one without a tokenizer, where every completion is a 400.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

from vllmd.engines.protocol import ProofRequest

_TEXT = "Hello"
_BOUNDARY = "vllmd-proof-of-life"
_SAMPLE_RATE_HZ = 16000

Builder = Callable[[str, Mapping[str, str]], tuple[ProofRequest, ...]]


def proofs(task: str, served_name: str, headers: Mapping[str, str]) -> tuple[ProofRequest, ...]:
    """The requests for a task, in order of preference; () for one that cannot be asked (a headless node)."""
    builder = _BUILDERS.get(task)
    return builder(served_name, headers) if builder else ()


def example(task: str, model: str, *, chats: bool) -> tuple[str, Any] | None:
    """Path and body of what a person would try first. Without a chat template the chat route answers 400."""
    match task:
        case "generate" if chats:
            return "/v1/chat/completions", {
                "model": model,
                "max_tokens": 32,
                "messages": [{"role": "user", "content": "Hello!"}],
            }
        case "generate":
            return "/v1/completions", {"model": model, "max_tokens": 32, "prompt": "Hello!"}
        case "embed":
            return "/v1/embeddings", {"model": model, "input": "Hello!"}
        case "score":
            return "/score", {"model": model, "text_1": "Hello!", "text_2": "Hello!"}
        case _:
            return None


def _generate(model: str, headers: Mapping[str, str]) -> tuple[ProofRequest, ...]:
    limits = {"model": model, "max_tokens": 1, "temperature": 0}
    chat = {**limits, "messages": [{"role": "user", "content": _TEXT}]}
    return (
        ProofRequest(
            "POST", "/v1/completions", {**limits, "prompt": _TEXT}, _has_token, headers, "one token by /v1/completions"
        ),
        ProofRequest("POST", "/v1/chat/completions", chat, _has_token, headers, "one token by /v1/chat/completions"),
    )


def _embed(model: str, headers: Mapping[str, str]) -> tuple[ProofRequest, ...]:
    body = {"model": model, "input": _TEXT}
    return (
        ProofRequest("POST", "/v1/embeddings", body, _has_vector, headers, "one vector by /v1/embeddings"),
        ProofRequest("POST", "/pooling", body, _has_data, headers, "one vector by /pooling"),
    )


def _score(model: str, headers: Mapping[str, str]) -> tuple[ProofRequest, ...]:
    """A classifier with several labels has no /score (404), and then /classify."""
    pair = {"model": model, "text_1": _TEXT, "text_2": _TEXT}
    body = {"model": model, "input": _TEXT}
    return (
        ProofRequest("POST", "/score", pair, _has_score, headers, "one score by /score"),
        ProofRequest("POST", "/classify", body, _has_data, headers, "one classification by /classify"),
        ProofRequest("POST", "/pooling", body, _has_data, headers, "one vector by /pooling"),
    )


def _transcribe(model: str, headers: Mapping[str, str]) -> tuple[ProofRequest, ...]:
    typed = {**headers, "Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
    path = "/v1/audio/transcriptions"
    return (
        ProofRequest(
            "POST", path, _multipart(model, _silence(seconds=1)), _has_text, typed, f"one second of silence by {path}"
        ),
    )


def _listed(_model: str, headers: Mapping[str, str]) -> tuple[ProofRequest, ...]:
    return (ProofRequest("GET", "/v1/models", None, _has_data, headers, "the model's name by /v1/models"),)


_BUILDERS: Mapping[str, Builder] = {
    "generate": _generate,
    "embed": _embed,
    "score": _score,
    "transcribe": _transcribe,
    "none": _listed,
}


def _silence(*, seconds: int) -> bytes:
    stream = io.BytesIO()
    import wave

    with wave.open(stream, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(_SAMPLE_RATE_HZ)
        out.writeframes(bytes(2 * _SAMPLE_RATE_HZ * seconds))
    return stream.getvalue()


def _multipart(model: str, sound: bytes) -> bytes:
    """A form with the fields model, temperature and file; the body goes out as it is, with the headers' Content-Type."""
    fields = "".join(
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in (("model", model), ("temperature", "0"), ("response_format", "json"))
    )
    file = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="silence.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    return fields.encode() + file.encode() + sound + f"\r\n--{_BOUNDARY}--\r\n".encode()


def _first(body: Any, key: str) -> Any:
    items = body.get(key) if isinstance(body, dict) else None
    return items[0] if isinstance(items, list) and items else None


def _has_token(body: Any) -> str:
    """A token was computed, also when it is the end of the text."""
    choice = _first(body, "choices")
    if not isinstance(choice, dict) or not choice.get("finish_reason"):
        return "the answer holds no finished choice"
    usage = body.get("usage")
    if isinstance(usage, dict) and usage.get("completion_tokens") == 0:
        return "no token was computed"
    return ""


def _has_vector(body: Any) -> str:
    item = _first(body, "data")
    vector = item.get("embedding") if isinstance(item, dict) else None
    if not isinstance(vector, list) or not vector:
        return "the answer holds no vector"
    # NaN weights answer 200 too; JSON has no NaN, so vLLM sends null.
    return "" if all(_is_finite(number) for number in vector) else "the vector holds something that is no finite number"


def _has_score(body: Any) -> str:
    item = _first(body, "data")
    return "" if isinstance(item, dict) and _is_finite(item.get("score")) else "the answer holds no score"


def _has_data(body: Any) -> str:
    return "" if _first(body, "data") is not None else "the answer holds no data"


def _has_text(body: Any) -> str:
    """Silence may well be transcribed as nothing."""
    return "" if isinstance(body, dict) and isinstance(body.get("text"), str) else "the answer holds no text"


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
