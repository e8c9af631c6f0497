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
    """Of one data-parallel rank. `cached`: the share of the KV cache in use."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    generated: int = 0
    prompted: int = 0
    succeeded: int = 0
    cached: float = 0.0


@dataclass
class Served:
    """The link to EngineCore. `stopping`: no new requests; `dead`: EngineCore is gone; `ready`: it can take requests."""

    core: socket.socket
    modes: Modes
    on_change: Callable[[str], None]
    ranks: int = 1
    counters: dict[int, Counters] = field(default_factory=dict)
    open: dict[str, queue.SimpleQueue[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: count[int] = field(default_factory=lambda: count(1))
    stopping: bool = False
    dead: bool = False
    ready_at: float = float("inf")

    def __post_init__(self) -> None:
        self.counters = {rank: Counters() for rank in range(self.ranks)}

    def add(self, tokens: int, prompt_tokens: int, rank: int | None = None) -> tuple[str, queue.SimpleQueue[str]]:
        """Hand a request to EngineCore; its queue then gets TOKEN for each token and FINISHED or DEAD at the end."""
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self.lock:
            number = next(self.numbers)
            name = f"{number:016x}"
            self.open[name] = answers
        rank = number % self.ranks if rank is None else rank
        self.send({"id": name, "tokens": tokens, "prompt": prompt_tokens, "rank": rank})
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
        now = self.counters[message["rank"]]
        now.running, now.waiting = message["running"], message["waiting"]
        if self.modes.heartbeat == "frozen":
            return
        now.cached = message["cached"]
        if message["tokens"]:  # as vLLM: a step without output is no iteration
            now.steps += 1
            now.generated += len(message["tokens"])
            now.succeeded += len(message["finished"])
            now.prompted += message["prompted"]

    def metrics(self, model: str) -> str:
        """The names that a supervisor reads, in vLLM's exposition."""
        lines = [line for rank in self.counters for line in self.figures(rank, model)]
        return "\n".join([*lines, f"process_start_time_seconds {time.time():.1f}"]) + "\n"

    def figures(self, rank: int, model: str) -> list[str]:
        now, labels = self.counters[rank], f'engine="{rank}",model_name="{model}"'
        ghost = int(time.monotonic() * 100) if self.modes.heartbeat == "ghost" else 0
        return [
            f'vllm:engine_sleep_state{{{labels},sleep_state="awake"}} {float(self.modes.metrics != "sleeping")}',
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{{{labels}}} {float(now.running)}",
            f"vllm:num_requests_waiting{{{labels}}} {float(now.waiting)}",
            f"vllm:kv_cache_usage_perc{{{labels}}} {now.cached}",
            f"vllm:num_preemptions_total{{{labels}}} 0.0",
            f"vllm:prompt_tokens_total{{{labels}}} {float(now.prompted)}",
            f"vllm:generation_tokens_total{{{labels}}} {float(now.generated + ghost)}",
            f'vllm:request_success_total{{engine="{rank}",finished_reason="length",model_name="{model}"}} {float(now.succeeded)}',
            f'vllm:iteration_tokens_total_bucket{{engine="{rank}",le="+Inf",model_name="{model}"}} {float(now.steps + ghost)}',
            f"vllm:iteration_tokens_total_count{{{labels}}} {float(now.steps + ghost)}",
            f"vllm:iteration_tokens_total_sum{{{labels}}} {float(now.prompted + now.generated + ghost)}",
            f"vllm:iteration_tokens_total_created{{{labels}}} 1.795225302e+09",
        ]
