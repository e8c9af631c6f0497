"""The engine of the benchmarks: does nothing but tell when. Installed as `vllm` (see place.py), standard library only.

    vllm serve MODEL --host H --port P ...

Files in $BENCH_STAMPS, each a monotonic time: `born`, its first act; `listening`, from when on /health would be answered;
`healthy`, just before its first 200 on /health leaves. $BENCH_DELAY_S passes before it listens, as vLLM: bound, silent.
$BENCH_CHILD_MB makes it start a child in a session of its own that holds so much memory, as vLLM's EngineCore does;
$BENCH_CROWD so many further ones that ignore SIGTERM.
"""

import time

BORN = time.monotonic()

import os  # noqa: E402 - the stamp comes first
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402

TOKEN = b'{"object":"text_completion","choices":[{"index":0,"text":"a","finish_reason":"length"}],"usage":{"completion_tokens":1}}'


def stamp(name: str, moment: float) -> None:
    path = os.path.join(os.environ["BENCH_STAMPS"], name)  # noqa: PTH118 - pathlib takes 10 ms to import
    with open(path + ".new", "w") as file:
        file.write(repr(moment))
    os.rename(path + ".new", path)  # noqa: PTH104


def start_child(megabytes: int) -> None:
    if not megabytes or os.fork():
        return
    os.setsid()
    held = bytearray(megabytes << 20)
    held[::4096] = bytes(b"x" * len(held[::4096]))  # touched, or it would cost nothing to free
    while True:
        signal.pause()


def start_crowd(count: int) -> None:
    for _ in range(count):
        if os.fork():
            continue
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()


class Metrics:
    """As many bytes as vLLM's, and the same names where somebody looks; $BENCH_RUNNING requests run, and their figures move."""

    def __init__(self) -> None:
        self.beats = 0
        self.running = int(os.environ.get("BENCH_RUNNING", "0"))
        line = 'vllm:some_histogram_{}_seconds_bucket{{engine="0",le="0.{}",model_name="tiny"}} 0.0\n'
        self.filler = "# TYPE vllm:some gauge\n" + "".join(line.format(index // 20, index) for index in range(650))

    def text(self) -> bytes:
        self.beats += self.running
        figures = {"num_requests_running": self.running, "num_requests_waiting": 0, "iteration_tokens_total_count": self.beats}
        lines = [f'vllm:{name}{{engine="0",model_name="tiny"}} {value}.0\n' for name, value in figures.items()]
        return (self.filler + "".join(lines)).encode()


METRICS = Metrics()


def answer(request: bytes) -> bytes:
    body = TOKEN if request.startswith(b"POST") else METRICS.text() if request.startswith(b"GET /metrics") else b""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def read(link: socket.socket) -> bytes:
    """Head and body; both are small."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += link.recv(65536) or b"\r\n\r\n"
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            wanted = int(line.partition(b":")[2])
            while len(body) < wanted and (piece := link.recv(65536)):
                body += piece
    return head


def main(argv: list[str]) -> None:
    stamp("born", BORN)
    start_child(int(os.environ.get("BENCH_CHILD_MB", "0")))
    start_crowd(int(os.environ.get("BENCH_CROWD", "0")))
    host, port = argv[argv.index("--host") + 1], int(argv[argv.index("--port") + 1])
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    time.sleep(float(os.environ.get("BENCH_DELAY_S", "0")))
    stamp("listening", time.monotonic())
    listener.listen(64)
    first = True
    while True:
        link, _ = listener.accept()
        with link:
            request = read(link)
            if first and request.startswith(b"GET /health"):
                stamp("healthy", time.monotonic())
                first = False
            link.sendall(answer(request))


if __name__ == "__main__":
    main(sys.argv)
