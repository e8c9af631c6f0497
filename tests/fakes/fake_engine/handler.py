"""vLLM's HTTP routes, as far as anything here asks them."""

from __future__ import annotations

import json
import math
import queue
import select
import socket
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from .serving import ENGINE_DEAD, Refused, Site
from .shapes import Shape, pooled
from .state import DEAD, FINISHED

Json = dict[str, Any]
GENERATE = ("/v1/completions", "/v1/chat/completions", "/invocations")
POOL = {"embed": ("/v1/embeddings",), "score": ("/score", "/v1/score", "/rerank", "/v1/rerank"), "transcribe": ("/v1/audio/transcriptions",)}
GUARDED = ("/v1", "/v2", "/inference", "/cohere")


class Handler(BaseHTTPRequestHandler):
    """`site` is set on a subclass by main: one class per server."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer leaves in one segment
    site: Site

    def version_string(self) -> str:
        return "uvicorn"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def address_string(self) -> str:
        return f"{self.client_address[0]}:{self.client_address[1]}" if self.client_address else ""

    def do_GET(self) -> None:
        pausing = {"/is_paused": lambda: self.reply({"is_paused": True})} if self.site.modes.paused == "yes" else {}
        self.route({**pausing, "/health": self.health, "/ping": self.health, "/metrics": self.metrics, **self.plain_pages()})

    def do_POST(self) -> None:
        routes: dict[str, Callable[[], None]] = {"/tokenize": self.tokenize, "/detokenize": lambda: self.reply({"prompt": "hello"})}
        task = self.site.task
        for path in GENERATE if task == "generate" else POOL[task]:
            routes[path] = self.generate if task == "generate" else self.pool
        self.route(routes)

    def plain_pages(self) -> dict[str, Callable[[], None]]:
        pages: dict[str, Json] = {"/version": {"version": "0.32.0"}, "/load": {"server_load": 0}, "/v1/models": self.site.card()}
        return {path: lambda page=page: self.reply(page) for path, page in pages.items()}  # type: ignore[misc]

    def route(self, routes: dict[str, Callable[[], None]]) -> None:
        self.site.stand_still()
        path = self.path.partition("?")[0]
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        refused = self.site.middleware.answer(self.command, self.path, self.headers.items())
        if refused is not None:
            return self.reply(refused.body, refused.status)
        try:
            if path.startswith(GUARDED) and not self.allowed():
                return self.reply({"error": "Unauthorized"}, 401)
            if path not in routes:
                return self.reply({"detail": "Not Found"}, 404)
            return routes[path]()
        except Refused as error:
            detail = {"message": str(error), "type": error.kind, "param": None, "code": error.status}
            return self.reply({"error": detail}, error.status)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            return None

    def allowed(self) -> bool:
        keys = self.site.api_keys
        return not keys or self.headers.get("authorization") in [f"Bearer {key}" for key in keys]

    def reply(self, body: Json | str | bytes | None, status: int = 200, kind: str = "application/json") -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else (body or b"")
        data = data.encode() if isinstance(data, str) else data
        self.site.output.access(self.address_string(), self.requestline, f"{status} {HTTPStatus(status).phrase}")
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if data:
            self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(data)

    def parsed(self) -> Json:
        try:
            body = json.loads(self.body or b"{}")
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if body.get("model", self.site.name) != self.site.name:
            raise Refused(404, f"The model `{body['model']}` does not exist. Valid aliases: {self.site.name}.", "NotFoundError")
        return dict(body)

    # The open routes.

    def health(self) -> None:
        modes, served = self.site.modes, self.site.served
        delay = modes.health_delay_s
        self.site.rest(None if math.isinf(delay) else delay)
        late = time.monotonic() - served.ready_at >= modes.health.after_s
        self.reply(None, 503 if served.dead else int(modes.health.word) if late else 200)

    def tokenize(self) -> None:
        tokens = list(str(self.parsed().get("prompt", "")).encode())
        self.reply({"count": len(tokens), "max_model_len": self.site.max_len, "tokens": tokens, "token_strs": None})

    def metrics(self) -> None:
        kind = "text/plain; version=1.0.0; charset=utf-8"
        text = self.site.served.metrics(self.site.name)
        match self.site.modes.metrics:
            case "huge":
                self.reply(text + "# filler\n" * (64_000_000 // 9), kind=kind)
            case "garbage":
                self.reply(b'vllm:num_requests_running{engine="0"} NaNsense\n\xff\xfe{{{}} 1 2 3\n' + text[:90].encode(), kind=kind)
            case "slow":
                self.trickle(text.encode())
            case "500":
                self.reply("Internal Server Error", 500, "text/plain; charset=utf-8")
            case "hang":
                self.site.rest(None)
            case "absent":
                self.reply("# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total 1.5\n", kind=kind)
            case _:
                self.reply(text, kind=kind)

    def trickle(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            self.site.rest(0.1)

    # Inference.

    def admit(self) -> Json:
        body = self.parsed()
        self.site.refuse_if_broken()
        if int(body.get("max_tokens") or 0) > self.site.max_len:
            raise Refused(400, f"max_tokens={body['max_tokens']} cannot be greater than max_model_len={self.site.max_len}.")
        return body

    def generate(self) -> None:
        body = self.admit()
        chat = "messages" in body
        if not chat and not body.get("prompt"):
            raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)")
        prompt = len(json.dumps(body.get("messages") or body.get("prompt"))) // 4 + 1
        wanted = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        shape = Shape(chat, self.site.name, prompt)
        answers = self.answers(wanted, prompt)
        if body.get("stream"):
            self.stream(shape, answers, usage=bool((body.get("stream_options") or {}).get("include_usage")))
        else:
            count = 0 if self.site.completions == "empty" else sum(1 for _ in answers)
            self.reply(shape.whole(count))

    def pool(self) -> None:
        body = self.admit()
        for _ in self.answers(1, 4):
            pass
        texts = body.get("input", body.get("text_2", body.get("documents", "")))
        count = len(texts) if isinstance(texts, list) else 1
        self.reply(pooled(self.site.task, self.site.name, count, empty=self.site.completions == "empty", packed=body.get("encoding_format") == "base64"))

    def answers(self, tokens: int, prompt: int) -> Iterator[int]:
        """Yields for each token; Refused when EngineCore dies; aborts the request when the client has gone."""
        rank = self.headers.get("x-data-parallel-rank")
        name, answers = self.site.served.add(tokens, prompt, None if rank is None else int(rank))
        try:
            for index in range(tokens + 1):
                word = self.wait(answers)
                if word == DEAD:
                    raise Refused(500, ENGINE_DEAD, "InternalServerError")
                if word == FINISHED:
                    return
                yield index
        finally:
            self.site.served.drop(name)

    def wait(self, answers: queue.SimpleQueue[str]) -> str:
        while True:
            try:
                return answers.get(timeout=0.1)
            except queue.Empty:
                if self.client_left():
                    raise BrokenPipeError from None

    def client_left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def stream(self, shape: Shape, answers: Iterator[int], *, usage: bool) -> None:
        self.site.output.access(self.address_string(), self.requestline, "200 OK")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.flush()  # at once, also while the request still waits
        count = 0
        try:
            if shape.chat:
                self.event(shape.chunk({"role": "assistant", "content": ""}))
            for _ in answers:
                count += 1
                self.event(shape.chunk({"content": " fake"}))
            self.event(shape.chunk({"content": ""}, "length"))
            if usage:
                self.event(shape.base(choices=[], usage=shape.usage(count)))
        except Refused as error:
            self.event({"error": {"message": str(error), "type": error.kind, "param": None, "code": error.status}})
        self.chunked(b"data: [DONE]\n\n")
        self.chunked(b"")

    def event(self, value: Json) -> None:
        self.chunked(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunked(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()
