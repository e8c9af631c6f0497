"""What the API server knows: the requests in flight, and the counters that EngineCore's messages move."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from .modes import Modes

DEAD = "dead"
FINISHED = "finished"
TOKEN = "token"


@dataclass
class Counters:
    running: int = 0
    waiting: int = 0
    steps: int = 0
    generated: int = 0
    prompted: int = 0
    succeeded: int = 0


@dataclass
class Served:
    """The link to EngineCore. `stopping`: no new requests; `dead`: EngineCore is gone; `ready`: it can take requests."""

    core: socket.socket
    modes: Modes
    on_change: Callable[[str], None]
    counters: Counters = field(default_factory=Counters)
    open: dict[str, queue.SimpleQueue[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: count[int] = field(default_factory=lambda: count(1))
    stopping: bool = False
    dead: bool = False
    ready_at: float = float("inf")

    def add(self, tokens: int, prompt_tokens: int) -> tuple[str, queue.SimpleQueue[str]]:
        """Hand a request to EngineCore; its queue then gets TOKEN for each token and FINISHED or DEAD at the end."""
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self.lock:
            name = f"{next(self.numbers):016x}"
            self.open[name] = answers
        self.counters.prompted += prompt_tokens
        self.send({"id": name, "tokens": tokens})
        return name, answers

    def drop(self, name: str) -> None:
        with self.lock:
            self.open.pop(name, None)
        self.send({"id": name, "tokens": 0})

    def send(self, message: dict[str, object]) -> None:
        with suppress(OSError):
            self.core.send(json.dumps(message).encode())

    def listen_to_core(self) -> None:
        """Runs in a thread until EngineCore is gone."""
        with suppress(OSError):
            while message := self.core.recv(1 << 20):
                self.apply(json.loads(message))
        self.dead = True
        for answers in self.waiting_for_answers():
            answers.put(DEAD)
        self.on_change("core-dead")

    def waiting_for_answers(self) -> list[queue.SimpleQueue[str]]:
        with self.lock:
            return list(self.open.values())

    def apply(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            return self.on_change("core-ready")
        for name in message["tokens"]:
            self.put(name, TOKEN)
        for name in message["finished"]:
            self.put(name, FINISHED)
        return self.count(message)

    def put(self, name: str, word: str) -> None:
        with self.lock:
            answers = self.open.get(name)
        if answers is not None:
            answers.put(word)

    def count(self, message: dict[str, Any]) -> None:
        self.counters.running, self.counters.waiting = message["running"], message["waiting"]
        if self.modes.heartbeat != "frozen" and message["tokens"]:
            self.counters.steps += 1
            self.counters.generated += len(message["tokens"])
            self.counters.succeeded += len(message["finished"])

    def metrics(self, model: str) -> str:
        """The names that a supervisor reads, in vLLM's exposition."""
        now, labels = self.counters, f'engine="0",model_name="{model}"'
        ghost = int(time.monotonic() * 100) if self.modes.heartbeat == "ghost" else 0
        lines = [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{{{labels}}} {float(now.running)}",
            f"vllm:num_requests_waiting{{{labels}}} {float(now.waiting)}",
            f"vllm:kv_cache_usage_perc{{{labels}}} 0.0",
            f"vllm:num_preemptions_total{{{labels}}} 0.0",
            f"vllm:prompt_tokens_total{{{labels}}} {float(now.prompted)}",
            f"vllm:generation_tokens_total{{{labels}}} {float(now.generated + ghost)}",
            f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{model}"}} {float(now.succeeded)}',
            f'vllm:iteration_tokens_total_bucket{{engine="0",le="+Inf",model_name="{model}"}} {float(now.steps + ghost)}',
            f"vllm:iteration_tokens_total_count{{{labels}}} {float(now.steps + ghost)}",
            f"vllm:iteration_tokens_total_sum{{{labels}}} {float(now.prompted + now.generated + ghost)}",
            f"vllm:iteration_tokens_total_created{{{labels}}} 1.795225302e+09",
            f"process_start_time_seconds {time.time():.1f}",
        ]
        return "\n".join(lines) + "\n"
