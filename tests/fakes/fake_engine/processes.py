"""The processes below the API server: resource tracker, EngineCore, Worker, and a stray where a test asks for one.

EngineCore takes requests from one end of a packet socket and answers a message for each step. It asks the Worker for every
step, so that stopping either stalls all, and ends when the Worker does. It outlives an API server that is killed: so does
vLLM's (upstream #55510).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .modes import Modes, Timed
from .output import Output

END_OF_LOAD = b"loaded"


def rename(comm: str, cmdline: str = "") -> None:
    """As setproctitle does: the kernel cuts comm to 15 bytes; the command line is overwritten in memory."""
    with suppress(OSError):
        with open("/proc/self/comm", "w") as file:
            file.write(comm)
        overwrite(45, cmdline or comm)


def overwrite(stat_field: int, text: str) -> None:
    """Replace the memory behind /proc/self/cmdline (fields 45 and 46 of stat after the name) or environ (47 and 48)."""
    with open("/proc/self/stat") as file:
        start, end = map(int, file.read().rpartition(")")[2].split()[stat_field : stat_field + 2])
    with open("/proc/self/mem", "wb") as memory:
        memory.seek(start)
        memory.write(text.encode()[: max(0, end - start - 1)].ljust(end - start, b"\0"))


def fork(run: Callable[[], None], close: list[socket.socket]) -> int:
    """A child that runs `run` and nothing of what the parent would have done next."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for sock in close:
            sock.close()
        run()
    finally:
        os._exit(0)


def track_resources(alive: int, held: int) -> None:
    """Ends when the last process that holds the other end of the pipe is gone."""
    rename("python", "python -B -c from multiprocessing.resource_tracker import main;main(31)")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.close(held)
    while os.read(alive, 1):
        pass


@dataclass
class Worker:
    """Loads the weights, then confirms every step."""

    core: socket.socket
    modes: Modes
    share_s: float

    def run(self) -> None:
        rename("VLLM::Worker")
        output = Output("Worker", silent=self.modes.output == "silent")
        output.log("Starting to load model...", place="cpu_model_runner.py:68")
        self.load(output)
        output.log("Loading weights took 0.01 seconds", place="default_loader.py:501")
        self.core.send(END_OF_LOAD)
        start_hog(self.modes.hog)
        while self.core.recv(16):
            self.core.send(b"step")

    def load(self, output: Output) -> None:
        steps = {"strong": 20, "lines": max(1, int(self.share_s / self.modes.line_s))}.get(self.modes.progress, 1)
        for step in range(steps):
            if self.modes.progress == "strong":
                output.shards(step, steps)
            if self.modes.progress == "lines":
                output.log("Still waiting for the engine", place="core_client.py:1")
            self.spend(self.share_s / steps)
        if self.modes.progress == "strong":
            output.shards(steps, steps)

    def spend(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.modes.progress == "cpu" and time.monotonic() < until:
            pass
        time.sleep(max(0.0, until - time.monotonic()))


def start_hog(mode: str) -> None:
    megabytes, _, file = mode.partition(":")
    if file:
        threading.Thread(target=hog, args=(int(megabytes), file), daemon=True).start()


def hog(megabytes: int, file: str) -> None:
    while not Path(file).exists():
        time.sleep(0.05)
    held = [os.urandom(1 << 20) for _ in range(megabytes)]
    while held:
        time.sleep(60)


@dataclass
class Request:
    """`tokens` still to come; `cached` of the prompt's tokens are in the KV cache."""

    tokens: int
    prompt: int
    rank: int
    cached: int = 0
    begun: bool = False


@dataclass
class Core:
    """EngineCore: continuous batching of up to `slots` requests, a token for each in every step. A long prompt goes first, a
    `chunk` in a step, and yields nothing until its last one. One process plays all data-parallel ranks."""

    api: socket.socket
    worker: socket.socket
    modes: Modes
    slots: int
    chunk: int = 2048
    left: dict[str, Request] = field(default_factory=dict)
    orphan: bool = False
    born: float = 0.0

    def run(self) -> None:
        output = Output("EngineCore", silent=self.modes.output == "silent")
        if not self.worker.recv(16):
            os._exit(1)
        output.log("GPU KV cache size: 2,097,152 tokens", place="kv_cache_utils.py:2327")
        output.log("Graph capturing finished in 0 secs, took 0.00 GiB", place="gpu_model_runner.py:5000")
        output.log("init engine (profile, create kv cache, warmup model) took 0.01 s", place="core.py:402")
        self.tell({"ready": True})
        self.born = time.monotonic()
        while True:
            self.turn()

    def turn(self) -> None:
        sources = [self.worker] if self.orphan else [self.worker, self.api]
        readable, _, _ = select.select(sources, [], [], 0 if self.alive() else None)
        if self.worker in readable:
            os._exit(1)  # between steps it only becomes readable by its end
        if self.api in readable:
            self.receive()
        else:
            self.step()

    def receive(self) -> None:
        message = self.api.recv(65536)
        if not message:
            self.orphan = True
            self.left.clear()
            return
        asked = json.loads(message)
        if asked["tokens"]:
            self.left[asked["id"]] = Request(asked["tokens"], asked["prompt"], asked["rank"])
        elif asked["id"] in self.alive():
            self.report(self.left.pop(asked["id"]).rank, [], [])

    def step(self) -> None:
        time.sleep(self.modes.token_s)
        self.worker.send(b"step")
        if not self.worker.recv(16):
            os._exit(1)
        alive = self.alive()
        for rank in sorted({request.rank for request in alive.values()}):
            self.step_rank(rank, [name for name, request in alive.items() if request.rank == rank][: self.slots])

    def alive(self) -> dict[str, Request]:
        """The requests of ranks that still do something."""
        mode = self.modes.dead_rank
        if not mode or time.monotonic() - self.born < mode.after_s:
            return self.left
        return {name: request for name, request in self.left.items() if request.rank != int(mode.word)}

    def step_rank(self, rank: int, running: list[str]) -> None:
        tokens, prompted = [], 0
        for name in running:
            request = self.left[name]
            request.cached = min(request.prompt, request.cached + self.chunk)
            if request.cached == request.prompt:
                prompted += request.prompt * (not request.begun)
                request.begun = True
                request.tokens -= 1
                tokens.append(name)
        finished = [name for name in tokens if not self.left[name].tokens]
        for name in finished:
            del self.left[name]
        self.report(rank, tokens, finished, prompted)

    def report(self, rank: int, tokens: list[str], finished: list[str], prompted: int = 0) -> None:
        left = [request for request in self.left.values() if request.rank == rank]
        still = min(self.slots, len(left))
        cached = sum(request.cached for request in left) / 2_097_152
        self.tell({"rank": rank, "tokens": tokens, "finished": finished, "running": still, "waiting": len(left) - still, "cached": cached, "prompted": prompted})

    def tell(self, message: dict[str, object]) -> None:
        with suppress(OSError):
            self.api.send(json.dumps(message).encode())


def start(modes: Modes, slots: int, chunk: int, share_s: float, listener: list[socket.socket]) -> tuple[int, socket.socket]:
    """The tree of a server that starts: EngineCore's pid, and our end of its socket."""
    alive, held = os.pipe()
    fork(lambda: track_resources(alive, held), listener)
    os.close(alive)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run_core() -> None:
        rename("VLLM::EngineCore")
        output = Output("EngineCore", silent=modes.output == "silent")
        output.log("Initializing a V1 LLM engine (v0.32.0) with config: model='fake'", place="core.py:133")
        above, below = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fork(Worker(below, modes, share_s).run, [above, theirs])
        below.close()
        Core(theirs, above, modes, slots, chunk).run()

    pid = fork(run_core, [ours, *listener])
    theirs.close()
    return pid, ours


def start_helper(mode: Timed, start_s: float, listener: list[socket.socket]) -> None:
    """As a compile helper: it ends by itself, and nothing is wrong."""

    def run() -> None:
        time.sleep(start_s + mode.after_s)
        os._exit(int(mode.word))

    if mode:
        fork(run, listener)


def start_stray(wanted: frozenset[str], listener: list[socket.socket]) -> None:
    """A process that a supervisor must find without its parent, name, session or environment."""
    if wanted:
        pid = fork(lambda: stray(wanted), [] if "port" in wanted else listener)
        if "fork" in wanted:
            os.waitpid(pid, 0)


def stray(wanted: frozenset[str]) -> None:
    if "setsid" in wanted:
        os.setsid()
    if "fork" in wanted and os.fork():
        return
    rename(*(("innocent", "innocent") if "rename" in wanted else ("VLLM::Stray",)))
    if "env" in wanted:
        overwrite(47, "")
    if "ignore" in wanted:
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
    while True:
        signal.pause()


def start_bomb(depth: int, listener: list[socket.socket]) -> None:
    """A fork bomb that ends by itself where nothing limits it: at 2^depth processes."""
    fork(lambda: explode(depth), listener)


def explode(depth: int) -> None:
    """Each one that is killed makes room for another: whoever ends them one by one has to be quicker."""
    rename("bomb")
    for generation in reversed(range(depth)):
        while True:
            with suppress(OSError):
                if not os.fork():
                    return explode(generation)
                break
            time.sleep(0.02)
    while True:
        signal.pause()
