"""The sampler, a child process: `python -m vllmd.gpu.sampler` asks the driver about every GPU, again and again.

A call into a wedged driver can block for ever, and nothing in the process can end it: so it happens here, and whoever
started it (gpu/sampling.py) watches from outside. What is being asked is written into shared memory (--stage-fd) before the
call is entered: a line for each call would cost the watcher a wake-up each. Without it, as by hand, it is a line too.

    {"stage": "nvmlDeviceGetTemperature GPU-..."}    {"xid": {"uuid", "pci", "xid", "at"}}    {"snapshot": {...}}

A line on stdin asks for a snapshot at once; its end ends the process. When the driver goes (unloaded, replaced), the
process executes itself anew, with pauses: only so a new library is loaded, and nothing keeps the old one busy.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllmd.gpu import amd
from vllmd.gpu.nvml import Announce, Gone, Nvml
from vllmd.system.host import boot_id

STAGE_BYTES = 256
STAGE = struct.Struct("<d")
"""Since when (monotonic; 0: no call is in progress), then the call's name, to a zero byte."""
BACK_OFF = 12
"""Intervals between two attempts to find a driver, at most."""
_EVENT_WAIT_MS = 5000
_XID_EVENT = 0x8
_PR_SET_PDEATHSIG = 1


class Output:
    """Lines of one JSON object; two threads write them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def say(self, **words: Any) -> None:
        data = json.dumps(words, separators=(",", ":")).encode() + b"\n"
        try:
            with self._lock:
                while data:
                    data = data[os.write(1, data) :]
        except BrokenPipeError:
            os._exit(0)


def announcer(fd: int, output: Output) -> Announce:
    if fd < 0:
        return lambda stage: output.say(stage=stage) if stage else None
    shared = mmap.mmap(fd, STAGE_BYTES)

    def announce(stage: str) -> None:
        if stage:
            name = stage.encode()[: STAGE_BYTES - STAGE.size - 1] + b"\0"
            shared[STAGE.size : STAGE.size + len(name)] = name
            STAGE.pack_into(shared, 0, time.monotonic())
        else:
            STAGE.pack_into(shared, 0, 0.0)

    return announce


def document(source: str, **words: Any) -> dict[str, Any]:
    return {"schema": 1, "boot_id": boot_id(), "source": source, "driver_version": "", "at": time.time(), "stuck_in": "", "gpus": [], **words}


class Sampler:
    def __init__(self, options: argparse.Namespace, output: Output, announce: Announce) -> None:
        self._options = options
        self._output = output
        self._announce = announce

    def run(self) -> None:
        """Returns when the driver has gone, or stdin has ended (SystemExit)."""
        note = ""
        try:
            nvml = self._driver()
            if nvml.cards:
                self._watch(nvml)
            else:
                note = "the driver has no GPU"
        except Gone as gone:
            note = str(gone)
        except ImportError as error:
            note = f"pynvml: {error}"
        self._without(note)

    def _driver(self) -> Nvml:
        self._announce("import pynvml")
        import pynvml

        try:
            return Nvml(pynvml, self._announce)
        except pynvml.NVMLError as error:
            raise Gone(f"NVML: {error}") from None

    def _watch(self, nvml: Nvml) -> None:
        if not self._options.once:
            self._listen(nvml)
        for _ in self._turns():
            gpus = nvml.gpus()
            self._output.say(snapshot=document("nvml", driver_version=nvml.driver_version, gpus=gpus))
            if not nvml.count_is_the_same():
                raise Gone("another number of GPUs")

    def _without(self, note: str) -> None:
        """AMD's, or none; until it is time to look for a driver again."""
        attempts = max(1, min(BACK_OFF, 2**self._options.attempt))
        for turn in self._turns():
            self._announce("sysfs")
            gpus = amd.read(self._options.drm)
            self._announce("")
            self._output.say(snapshot=document("sysfs" if gpus else "none", gpus=gpus, note=note))
            if turn >= attempts and not gpus:
                return

    def _turns(self) -> Iterator[int]:
        """Each interval, and when stdin asks for it."""
        turn, due = 0, time.monotonic()
        while True:
            yield turn
            if self._options.once:
                raise SystemExit(0)
            turn += 1
            due = max(due + self._options.interval, time.monotonic())
            if _asked(due - time.monotonic()):
                due = time.monotonic()

    # -- events

    def _listen(self, nvml: Nvml) -> None:
        """A thread of its own waits for them; where the driver has none, there are none."""
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            events = nvml.call("nvmlEventSetCreate", "")
            names = {}
            for card in nvml.cards:
                if card.handle is not None:
                    with contextlib.suppress(pynvml.NVMLError):
                        nvml.call("nvmlDeviceRegisterEvents", card.words["uuid"], card.handle, _XID_EVENT, events)
                        names[_address(card.handle)] = {key: card.words[key] for key in ("uuid", "pci")}
            if names:
                threading.Thread(target=self._wait, args=(pynvml, events, names), daemon=True).start()

    def _wait(self, lib: Any, events: Any, names: dict[int, dict[str, Any]]) -> None:
        """That this call waits is its purpose: it is not announced. Xid 0 is none."""
        while True:
            try:
                event = lib.nvmlEventSetWait(events, _EVENT_WAIT_MS)
            except lib.NVMLError as error:
                if error.value != lib.NVML_ERROR_TIMEOUT:
                    time.sleep(self._options.interval)
                continue
            gpu = names.get(_address(event.device), {})
            if event.eventType == _XID_EVENT and event.eventData and gpu:
                self._output.say(xid={**gpu, "xid": int(event.eventData), "at": time.time()})


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _asked(timeout_s: float) -> bool:
    """Whether stdin asked for a snapshot; False after the time. Its end ends the process."""
    ready, _, _ = select.select([0], [], [], max(0.0, timeout_s))
    if ready and not os.read(0, 4096):
        raise SystemExit(0)
    return bool(ready)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllmd.gpu.sampler", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--interval", type=float, default=5.0)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--stage-fd", type=int, default=-1)
    parser.add_argument("--drm", type=Path, default=amd.DRM)
    parser.add_argument("--attempt", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # no sampler outlives who reads it
    options = _parsed(argv)
    output = Output()
    Sampler(options, output, announcer(options.stage_fd, output)).run()
    again = ["--interval", str(options.interval), "--stage-fd", str(options.stage_fd), "--drm", str(options.drm), "--attempt", str(options.attempt + 1)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "vllmd.gpu.sampler", *again])


if __name__ == "__main__":
    main(sys.argv[1:])
