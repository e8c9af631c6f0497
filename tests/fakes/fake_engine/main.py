"""The API server: the order of a start, then signals and deaths until the end. One queue of words drives it."""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import HTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any

from . import processes
from .arguments import normal, number, parse
from .handler import Handler
from .litter import drop_litter
from .middleware import Stack
from .modes import Modes, Timed, from_environ
from .output import Output, die, start_fault
from .serving import Site, read_config, task_of
from .state import Served

SHARES = {"imports": 0.25, "setup": 0.15, "end": 0.1}
LONGEST = {"imports": 1.0, "setup": 0.5, "end": 0.5}
"""How a start's time is spent beside the load, which has the rest, and all of what makes a start long. In seconds."""


class Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    request_queue_size = 2048

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""


class ApiServer:
    """One life. `events` carries: sigterm, core-ready, core-dead, and the timed faults."""

    def __init__(self, options: argparse.Namespace, modes: Modes) -> None:
        self.options, self.modes = options, modes
        self.output = Output("APIServer", silent=modes.output == "silent", access_log=not options.disable_uvicorn_access_log)
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.sock: socket.socket | None = None
        self.server: Server | None = None

    def run(self) -> int:
        for number_ in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number_, lambda *_: self.events.put("sigterm"))
        self.output.banner(self.options.model)
        self.output.log(f"non-default args: {{'model_tag': {self.options.model!r}, 'port': {self.options.port}}}", place="api_utils.py:286")
        self.bind()
        self.check_model()
        self.spend("setup")
        self.start_core()
        self.wait_for_core()
        self.spend("end")
        self.listen()
        return self.serve()

    # Starting.

    def spend(self, share: str) -> None:
        time.sleep(share_s(self.modes, share))

    def fail(self, text: str, code: int = 1) -> None:
        time.sleep(self.modes.fail_s)
        die(text, code)

    def bind(self) -> None:
        """Early, and without listening. A stale socket file makes it fail; nobody removes one."""
        if self.modes.bind == "never" or self.options.headless:
            return
        path, host = self.options.uds, self.options.host or "0.0.0.0"
        family = socket.AF_UNIX if path else socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family)
        if not path:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.sock.bind(path or (host, number(self.options.port, 8000)))
        except OSError as error:
            self.fail(f"OSError: {error}")

    def check_model(self) -> None:
        model = self.options.model
        if (model.startswith(("/", ".")) or not model) and not (Path(model) / "config.json").is_file():
            self.fail(f"OSError: Can't load the configuration of '{model}'. Make sure '{model}' is the correct path to a directory")
        self.output.log("Resolved architecture: Qwen3ForCausalLM", place="model.py:733")

    def start_core(self) -> None:
        listener = [self.sock] if self.sock else []
        processes.start_stray(self.modes.stray, listener)
        processes.start_helper(self.modes.helper, self.modes.start_s, listener)
        for _ in range(self.modes.crowd):
            processes.start_stray(self.modes.stray or frozenset({"ignore"}), listener)
        load_s = self.modes.start_s - sum(share_s(self.modes, share) for share in SHARES)
        self.core, link = processes.start(
            self.modes, number(self.options.max_num_seqs, 256), number(self.options.max_num_batched_tokens, 2048), load_s, listener
        )
        self.served = Served(link, self.modes, self.events.put, ranks=number(self.options.data_parallel_size, 1))
        drop_litter(self.modes.shm_mb)
        start_fault(self.modes.output, self.modes.output_mb)
        threading.Thread(target=self.served.listen_to_core, daemon=True).start()

    def wait_for_core(self) -> None:
        """vLLM loses a SIGTERM now: it goes on to ready, or wedges; a second one ends it."""
        self.fail_first()
        signals = 0
        while (event := self.next_event()) != "core-ready":
            if event == "core-dead":
                die("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}", 1)
            signals += 1
            if signals > 1 or self.modes.sigterm_starting == "die":
                self.end(0)
        if signals and self.modes.sigterm_starting == "wedge":
            while self.next_event() != "sigterm":
                pass
            self.end(0)

    def fail_first(self) -> None:
        times, _, file = self.modes.fail_first.partition(":")
        if not file:
            return
        done = int(Path(file).read_text()) if Path(file).exists() else 0
        if done < int(times):
            Path(file).write_text(str(done + 1))
            time.sleep(self.modes.fail_s)
            exit_as_told(self.modes, "1")

    # Serving.

    def site(self) -> Site:
        names, model = self.options.served_model_name, self.options.model
        max_len = number(self.options.max_model_len, read_config(model).get("max_position_embeddings", 4096))
        task = task_of(model, self.modes.task, self.options.runner)
        self.output.log(f"Supported tasks: ['{task}']", place="entry.py:136")
        name = names[0] if isinstance(names, list) else names or model
        return Site(name, model, max_len, tuple(self.options.api_key or ()), Stack(self.options.middleware), task, self.modes, self.served, self.output)

    def listen(self) -> None:
        mode = self.modes.listen.word
        if not self.sock or mode == "never":
            return
        handler = type("SiteHandler", (Handler,), {"site": self.site()})
        self.server = Server(("", 0), handler, bind_and_activate=False)
        self.server.socket = self.sock
        self.output.log(f"Starting vLLM server on http://{self.options.host}:{self.options.port}", place="entry.py:140")
        self.output.plain(f"INFO:     Started server process [{os.getpid()}]\nINFO:     Waiting for application startup.")
        self.output.plain("INFO:     Application startup complete.")
        self.served.ready_at = time.monotonic()
        try:
            self.sock.listen(2048)
        except OSError:
            return  # another vLLM on this port listened first: this one never ends, and never serves
        if mode != "mute":
            threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self) -> int:
        exit_after(self.modes, self.modes.exit_ready)
        for mode in (self.modes.listen, self.modes.core):
            if mode.word in ("close", "exit", "stop"):
                self.post_after(mode.after_s, mode.word)
        if self.modes.bomb:
            self.post_after(self.modes.bomb.after_s, "bomb")
        while True:
            self.handle(self.next_event())

    def post_after(self, seconds: float, event: str) -> None:
        timer = threading.Timer(seconds, self.events.put, [event])
        timer.daemon = True
        timer.start()

    def next_event(self) -> str:
        """Looks up now and then: a signal that comes just before a wait that never ends is handled after it."""
        while True:
            with suppress(queue.Empty):
                return self.events.get(timeout=0.1)

    def handle(self, event: str) -> None:
        match event:
            case "close":
                self.close_listener()
            case "exit" | "stop":
                os.kill(self.core, signal.SIGKILL if event == "exit" else signal.SIGSTOP)
            case "bomb":
                processes.start_bomb(int(self.modes.bomb.word), [self.sock] if self.sock else [])
            case "core-dead":
                self.output.log("AsyncLLM output_handler failed.", "ERROR", "async_llm.py:906")
                time.sleep(self.modes.death_s)
                os._exit(0)
            case "sigterm" if self.modes.sigterm != "ignore":
                self.shut_down()

    def close_listener(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()

    # Stopping.

    def shut_down(self) -> None:
        timeout = number(self.options.shutdown_timeout, 0)
        self.output.log("[shutdown] API server: shutdown triggered", place="launcher.py:254")
        self.output.log(f"[shutdown] API server: stopping engine client mode={'drain' if timeout else 'abort'} timeout={timeout}s")
        self.served.stopping = True
        until = time.monotonic() + timeout / self.modes.speed
        while self.served.open and time.monotonic() < until and not self.served.dead:
            time.sleep(0.01)
        time.sleep(self.modes.stop_s)
        self.close_listener()
        if self.served.open:
            os.kill(self.core, signal.SIGTERM)
            self.output.plain("INFO:     Waiting for connections to close. (CTRL+C to force quit)")
            threading.Event().wait()  # for ever: neither the streams nor more signals end it
        self.end(0)

    def end(self, code: int) -> None:
        """EngineCore first; its socket file stays where it is."""
        with suppress(OSError):
            os.kill(self.core, signal.SIGTERM)
            os.waitpid(self.core, 0)
        self.output.plain(f"INFO:     Finished server process [{os.getpid()}]")
        os._exit(code)


BORN = time.monotonic()


def share_s(modes: Modes, share: str) -> float:
    return min(modes.start_s * SHARES[share], LONGEST[share] / modes.speed)


def exit_after(modes: Modes, exit_: Timed) -> None:
    """By a timer and its signal: a thread would not survive the forks that follow, nor they it."""
    if exit_:
        signal.signal(signal.SIGALRM, lambda *_: exit_as_told(modes, exit_.word))
        signal.setitimer(signal.ITIMER_REAL, max(exit_.after_s, 0.001))


def exit_as_told(modes: Modes, code: str) -> None:
    """Nobody is told, and the children live on."""
    if modes.error:
        Output("EngineCore").log(modes.error, "ERROR", "core.py:1512")
    os._exit(int(code))


def dump(path: str, argv: list[str]) -> None:
    """What a test wants to know of how it was executed."""
    if path:
        cgroup = Path("/proc/self/cgroup").read_text()
        facts = {"argv": argv, "environ": dict(os.environ), "cwd": str(Path.cwd()), "pid": os.getpid(), "cgroup": cgroup, "monotonic": BORN}
        Path(path).write_text(json.dumps(facts))


def main(argv: list[str]) -> int:
    if argv[1:] in (["--version"], ["-v"]):
        sys.stdout.write("0.32.0\n")
        return 0
    try:
        modes = from_environ(os.environ)
    except ValueError as error:
        sys.stderr.write(f"fake engine: {error}\n")
        return 2
    if argv[1:2] != ["serve"]:
        sys.stderr.write("usage: vllm [-h] [-v] {serve} ...\n")
        return 2
    dump(modes.dump, argv)
    with suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write("vllm")
    exit_after(modes, modes.exit)
    time.sleep(share_s(modes, "imports"))  # no handler yet: a SIGTERM ends it with -15
    try:
        options = parse([normal(argument) for argument in argv[2:]])
    except SystemExit as error:
        time.sleep(modes.fail_s)
        return int(error.code or 0)
    return ApiServer(options, modes).run()
