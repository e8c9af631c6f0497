"""Starting tests/fakes/listener.py and vllm-preflight for a test, and ending all of it afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tests import procs

ROOT = Path(__file__).parent.parent
LISTENER = ROOT / "tests/fakes/listener.py"
NOBODY = 65534
VLLM = ("--", "vllm", "serve", "some/model")
MARK = "VLLMD_TEST_HOLDING"
_marks = count()
COMMAND = "import os, sys; from vllmd.preflight.command import main; sys.exit(main(sys.argv[1:], dict(os.environ)))"
COMMAND_AS_NOBODY = """
import os, sys
from vllmd.preflight.command import main
# Only now: the interpreter may lie where only root reads.
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sys.exit(main(sys.argv[1:], dict(os.environ)))
"""


@dataclass(frozen=True)
class Held:
    pid: int
    children: tuple[int, ...]


@contextlib.contextmanager
def holding(host: str, port: int, *words: str, before: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Iterator[Held]:
    """A process that holds host:port until the end. `words` are its options, `before` a command that executes it."""
    argv = [*before, sys.executable, str(LISTENER), host, str(port), *words]
    mark = f"{os.getpid()}-{next(_marks)}"
    environ = {**os.environ, **(env or {}), MARK: mark}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environ, start_new_session=True) as child:
        assert child.stdout is not None
        held = None
        try:
            said = json.loads(child.stdout.readline() or "{}")
            assert said, f"{argv} ended early"
            held = Held(said["pid"], tuple(said["children"]))
            yield held
        finally:
            procs.kill_all({child.pid, *(each.pid for each in procs.with_environ(MARK, mark)), *([held.pid, *held.children] if held else [])})


@dataclass(frozen=True)
class Told:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        lines = self.out.splitlines()
        assert len(lines) == 1, f"one line of JSON, not {self.out!r}; {self.err}"
        told: dict[str, Any] = json.loads(lines[0])
        return told


def preflight(
    port: int, *argv: str, lock: Path, before: Sequence[str] = (), env: Mapping[str, str] | None = None, as_nobody: bool = False
) -> Told:
    """vllm-preflight for 127.0.0.1:port without GPU check, JSON unless a command is given."""
    script = COMMAND_AS_NOBODY if as_nobody else COMMAND
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(lock.parent),
        "PYTHONPATH": str(ROOT),
        "VLLM_PORT": str(port),
        "VLLM_SKIP_GPU_CHECK": "1",
        "VLLM_PREFLIGHT_LOCKFILE": str(lock),
        "VLLM_PREFLIGHT_JSON": "0" if argv else "1",
        "VLLM_TERM_GRACE": "0.5",
        "VLLM_PORT_FREE_POLL": "0.02",
        **(env or {}),
    }
    done = subprocess.run(
        [*before, sys.executable, "-c", script, *argv], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Told(done.returncode, done.stdout, done.stderr)
