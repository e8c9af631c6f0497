"""The first process of the machine whose power is cut: fetches and publishes one version after another, for ever.

A version's number is its revision. `PUBLISHED n SHA` on the console is the claim that is held against what the disk says
after the cut. Odd and even versions share a file, by hard link.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.models import demo
from vllmd.models.identity import label
from vllmd.models.obtain import Errand, obtain
from vllmd.models.progress import Progress
from vllmd.models.publish import current
from vllmd.models.remote import Listing, RemoteFile, Request
from vllmd.models.sources import Offered

STORE = Path("/mnt/models")
REQUEST = ModelRequest("Tiny", "acme/Tiny", "", "", ("r2",), STORE)
PAYLOAD_BYTES = 3 << 20
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def version(number: int) -> Path:
    """The files of a version, made anew: the same number gives the same bytes."""
    directory = demo.make(Path(f"/tmp/{number}"), seed=number)
    (directory / "payload.dat").write_bytes(random.Random(number).randbytes(PAYLOAD_BYTES))
    (directory / "shared.dat").write_bytes(random.Random(-1).randbytes(1 << 20))
    return directory


class Files(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content = Path("/tmp", self.path[1:]).read_bytes()
        begin, _, end = self.headers.get("Range", f"bytes=0-{len(content) - 1}").removeprefix("bytes=").partition("-")
        piece = content[int(begin) : int(end) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(piece)))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {begin}-{int(begin) + len(piece) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        return


class Server:
    """The transport of a version."""

    def __init__(self, port: int, number: int) -> None:
        self._base = f"http://127.0.0.1:{port}/{number}"

    def request(self, file: RemoteFile, begin: int, end: int) -> Request:
        return Request(f"{self._base}/{file.name}", {"Range": f"bytes={begin}-{end - 1}"} if end > begin else {})

    def refused(self, file: RemoteFile, status: int, body: bytes) -> None:
        return None


def listing(directory: Path, number: int) -> Listing:
    files = []
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        files.append(RemoteFile(path.name, len(content), sums={"sha256": hashlib.sha256(content).hexdigest()}))
    return Listing(tuple(files), "http://guest/Tiny", str(number))


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def main() -> None:
    loopback_up()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    STORE.mkdir(exist_ok=True)
    before = current(STORE, REQUEST)
    say(f"MOUNTED {before[1].revision if before else 'none'}")
    number = int(before[1].revision) if before else 0
    while True:
        number += 1
        directory = version(number)
        say(f"BEGUN {number}")
        errand = Errand("r2", REQUEST, Model(), os.environ, lambda progress: tell(progress), lambda text: None)
        offered = Offered(listing(directory, number), Server(server.server_port, number))
        model = obtain(errand, offered)
        say(f"PUBLISHED {number} {model.manifest_sha256}")


def tell(progress: Progress) -> None:
    if progress.level:
        say(f"SAID {progress.text}")


def say(text: str) -> None:
    print(f"GUEST {text} .", flush=True)


LABEL = label(REQUEST)

if __name__ == "__main__":
    main()
