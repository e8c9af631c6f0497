"""What each start of vLLM leaves behind: blocks in /dev/shm, sockets and a file in the temporary directory."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from .output import die


def drop_litter(shm_mb: int) -> None:
    if not shm_mb:
        return
    name = f"fake-engine-{os.getpid()}"
    block = Path("/dev/shm") / f"psm_{name}"
    try:
        with block.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shm_mb << 20)
    except OSError as error:
        block.unlink(missing_ok=True)
        die(f"OSError: {error}: {shm_mb} MB do not fit into /dev/shm", 1)
    folder = Path(tempfile.gettempdir())
    (folder / f"vllm_dist_{name}").write_text("")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / f"{name}-ipc"))
