"""A second engine in two screens: a plug-in, and the server that it runs. It proves that nothing outside engines/ knows vLLM.

python mini_engine.py --port P [--delay S]      serves /alive, and POST /echo which answers what it was sent
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from vllmd.config import parsers as p
from vllmd.config.paths import Paths
from vllmd.config.settings import Config, setting
from vllmd.core.plan import Command, Endpoint, Installed
from vllmd.engines.protocol import Context, LogFact, ProofRequest


@dataclass(frozen=True, slots=True)
class Tuning:
    delay_s: float = setting(0.0, p.number(low=0), "MINI_DELAY_S", "How long it pretends to load.", unit="s")


class Mini:
    name = "mini"
    tuning = Tuning
    health_path = "/alive"
    phases: Sequence[str] = ("stretching", "humming")
    artifact = "huggingface"

    def installed(self, config: Config, paths: Paths, environ: Mapping[str, str]) -> Installed:
        return Installed(sys.executable, version="1", python=sys.executable)

    def check(self, context: Context) -> list[str]:
        return []

    def endpoints(self, context: Context) -> tuple[Endpoint, ...]:
        return (Endpoint("tcp", context.config.serve.host, context.config.serve.port),)

    def command(self, context: Context, model: str) -> Command:
        port, delay = str(context.config.serve.port), str(context.config.tuning.delay_s)
        argv = (context.installed.executable, __file__, "--port", port, "--delay", delay, "--model", model)
        return Command(
            argv, {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), **context.config.engine.env}
        )

    def task(self, context: Context, model: Path) -> str:
        return "generate"

    def proofs(self, context: Context, task: str) -> tuple[ProofRequest, ...]:
        return (
            ProofRequest(
                "POST", "/echo", {"say": "ah"}, lambda body: "" if body == {"say": "ah"} else "no echo", {}, "an echo"
            ),
        )

    def example(self, context: Context, model: Path) -> tuple[str, object] | None:
        return "/echo", {"say": "hello"}

    def memory_fraction(self, context: Context) -> float:
        return 0.0

    def read_line(self, line: str) -> LogFact:
        return LogFact(6, next((phase for phase in self.phases if phase in line), ""))


class _Server(BaseHTTPRequestHandler):
    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer(b"ok") if self.path == "/alive" else self.send_error(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self._answer(json.dumps(json.loads(body)).encode()) if self.path == "/echo" else self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    print("stretching", flush=True)
    time.sleep(options.delay)
    print("humming", flush=True)
    HTTPServer(("127.0.0.1", options.port), _Server).serve_forever()
