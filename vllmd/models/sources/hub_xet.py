"""The hub's Xet protocol, spoken by its own client in a child process that is killed when it stands still.

What it brings is put among the stage's unfinished files, complete: models/download only hashes it, and fetches anew what is
wrong. Whatever goes wrong here costs nothing but time, since plain HTTP serves every file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllmd.config.settings import Model
from vllmd.models.progress import Progress
from vllmd.models.remote import Listing, RemoteFile, Transport
from vllmd.models.sources.hub_transport import HubTransport
from vllmd.models.stage import Stage
from vllmd.models.transfer import tls
from vllmd.models.transfer.journal import Kept
from vllmd.models.transfer.ranges import Ranges
from vllmd.system import credentials

MIN_RATE = 1024
"""Bytes/s over the stall time; less is as good as nothing."""
LOOK_S = 0.2
REPORT_S = 0.5
MAX_LINE_BYTES = 65536
HTTP_S = 30.0

Report = Callable[[Progress], None]
Log = Callable[[str], None]


def prefetch(
    listing: Listing, transport: Transport, stage: Stage, settings: Model, environ: Mapping[str, str], report: Report, log: Log
) -> None:
    """Fetch by Xet what the stage has nothing of. Never raises for what the network or the other side does."""
    if not settings.hf_xet or not isinstance(transport, HubTransport):
        return
    files = {file.name: file for file in listing.files if "sha256" in file.sums and file.size and file.name not in stage.kept}
    if not files:
        return
    if importlib.util.find_spec("hf_xet") is None:
        _tell(report, log, "hf_xet is not installed; going on by plain HTTP")
        return
    home = stage.directory / "xet"
    run = _Run(stage, files, settings.fetch_stall_s, report, log)
    try:
        with _child(_order(transport, files, stage), home, environ) as child:
            why = run.watch(child)
    except subprocess.TimeoutExpired:
        why = "its client does not end"
    except OSError as error:
        why = str(error.strerror or error)
    finally:
        shutil.rmtree(home, ignore_errors=True)
        run.drop_rest()
    if why:
        _tell(report, log, f"Xet: {transport.place.clean(why)}; going on by plain HTTP")


def _tell(report: Report, log: Log, text: str) -> None:
    log(text)
    report(Progress("fetch", "hf-hub", text=text, level="warning"))


def _order(transport: HubTransport, files: Mapping[str, RemoteFile], stage: Stage) -> bytes:
    """One line for the child's stdin, since it holds the token."""
    wanted = [{"name": name, "url": transport.url(file), "size": file.size, "path": str(stage.part_path(name))} for name, file in files.items()]
    return json.dumps({"endpoint": transport.place.endpoint, "token": transport.place.token, "files": wanted}).encode() + b"\n"


@contextlib.contextmanager
def _child(order: bytes, home: Path, environ: Mapping[str, str]) -> Any:
    """Its stdin stays open: it ends when that ends, so it outlives nobody."""
    home.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-P", "-m", "vllmd.models.sources.hub_xet"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environ(home, environ))
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(order)
            child.stdin.flush()
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _environ(home: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Without a secret: the token comes with the order, and nobody else's is its affair."""
    others = ("HF_TOKEN", "HUGGING_FACE", "HF_HUB_OFFLINE", "HF_DEBUG", "AWS_", credentials.DIRECTORY)
    kept = {name: value for name, value in environ.items() if not name.startswith(others) and not credentials.is_secret(name)}
    bundle = next((environ[name] for name in tls.BUNDLES if environ.get(name)), "")
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return kept | quiet | {"HF_HOME": str(home), "HF_XET_CACHE": str(home / "cache")} | ({"SSL_CERT_FILE": bundle} if bundle else {})


@dataclass(slots=True)
class _Run:
    """The parent's view. `waiting`: what has not come yet."""

    stage: Stage
    waiting: dict[str, RemoteFile]
    stall_s: float
    report: Report
    log: Log
    arrived: int = 0
    total: int = 0
    _buffer: bytearray = field(default_factory=bytearray)
    _why: str = ""

    def watch(self, child: subprocess.Popen[bytes]) -> str:
        """Until the child is done, or stands still. Why it did not bring everything; '' if it did, or had nothing to say."""
        assert child.stdout is not None
        self.total = sum(file.size for file in self.waiting.values())
        since, before, reported = time.monotonic(), 0, 0.0
        while True:
            if select.select([child.stdout], [], [], LOOK_S)[0]:
                data = os.read(child.stdout.fileno(), 4096)
                if not data:
                    code = child.wait(HTTP_S)
                    return self._why or (f"its client ended with {code}" if code else "")
                self._heard(data)
            now, there = time.monotonic(), self._there()
            if there - before >= MIN_RATE * self.stall_s:
                since, before = now, there
            if now - since >= self.stall_s:
                return f"it stands still for {self.stall_s:g} s, at {there} of {self.total} bytes"
            if now - reported >= REPORT_S:
                reported = now
                self.report(Progress("fetch", "hf-hub", there, self.total, text="by Xet"))

    def _there(self) -> int:
        total = self.arrived
        for name, file in self.waiting.items():
            with contextlib.suppress(OSError):
                total += min(self.stage.part_path(name).lstat().st_blocks * 512, file.size)
        return total

    def _heard(self, data: bytes) -> None:
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest[:MAX_LINE_BYTES])
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
                said = json.loads(line)
                if said.get("failed"):
                    self._why = str(said["failed"])
                elif said.get("done") in self.waiting:
                    self._place(str(said["done"]))

    def _place(self, name: str) -> None:
        """Complete, unhashed: as if an earlier attempt had fetched it."""
        file, path = self.waiting[name], self.stage.part_path(name)
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
            return
        del self.waiting[name]
        self.arrived += file.size
        mark = self.stage.marks[name]
        self.stage.journal.began(name, mark, file.size)
        self.stage.journal.part(name, 0, file.size)
        self.stage.kept[name] = Kept(mark, file.size, Ranges([(0, file.size)]))
        self.log(f"{name}: here by Xet, {file.size} bytes")

    def drop_rest(self) -> None:
        for name in self.waiting:
            with contextlib.suppress(OSError):
                self.stage.part_path(name).unlink()


def main() -> int:
    """The child: an order on stdin, a line on stdout for each file that has come."""
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for file in order["files"]:
            if _fetch(file, order["endpoint"], order["token"]):
                _say({"done": file["name"]})
    except Exception as error:
        _say({"failed": f"{type(error).__name__}: {error}"[:500]})
        return 1
    return 0


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: an interpreter that ends while a thread holds its lock aborts
        pass
    os._exit(1)


def _say(what: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _fetch(file: dict[str, Any], endpoint: str, token: str) -> bool:
    """Whether it came; False where the hub does not have it in Xet, or sends for a key to another host: that one would be told the
    token."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.file_download import xet_get
    from huggingface_hub.utils._headers import build_hf_headers

    data = get_hf_file_metadata(file["url"], token=token or False, endpoint=endpoint, timeout=HTTP_S).xet_file_data
    if data is None or urlsplit(data.refresh_route)[:2] != urlsplit(endpoint)[:2]:
        return False
    headers = build_hf_headers(token=token or False, library_name="vllmd")
    xet_get(incomplete_path=Path(file["path"]), xet_file_data=data, headers=headers, expected_size=file["size"])
    return True


if __name__ == "__main__":
    os._exit(main())  # without waiting for threads of hf_xet
