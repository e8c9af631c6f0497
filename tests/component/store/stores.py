"""What the tests of `vllmctl store` share: the command, users of models, owners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import publishing, tiny_models
from vllmd.config.paths import Paths
from vllmd.models.identity import label

COMMIT = "c" * 40
DAY_S = 86400
Run = Callable[..., subprocess.CompletedProcess[str]]


def program(paths: Paths, *arguments: str) -> list[str]:
    """The same as a command."""
    text = "import sys; from vllmd.ctl import main; sys.exit(main())"
    return [sys.executable, "-c", text, "--root", str(paths.config.parent), "store", *arguments]


def listed(ctl: Run) -> dict[str, Any]:
    result = ctl("list", "--json")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def items(ctl: Run, kind: str = "") -> list[dict[str, Any]]:
    return [item for item in listed(ctl)["items"] if kind in ("", item["kind"])]


@contextmanager
def holding(program: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds what the program takes, until the end."""
    text = f"import sys, os\nfrom pathlib import Path\n{program}\nprint('held', flush=True); os.read(0, 1)"
    child = subprocess.Popen([sys.executable, "-c", text, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        yield child
    finally:
        child.kill()
        child.communicate()


HOLD = "from vllmd.models.store import hold\nheld = hold(Path(sys.argv[1]))"


@contextmanager
def instance(paths: Paths, name: str, directory: Path, *, holds: bool) -> Iterator[None]:
    """What a supervisor does that serves the directory: its lock, its status.json, and (if `holds`) the model's lock."""
    program = "from vllmd.config.paths import root_paths\nfrom vllmd.instance.locking import InstanceLock\n"
    program += "InstanceLock(root_paths(Path(sys.argv[1])), sys.argv[2]).__enter__()\n" + (HOLD.replace("argv[1]", "argv[3]") if holds else "")
    with holding(program, paths.config.parent, name, directory):
        status = {"schema": 1, "instance": name, "state": "ready", "model": {"id": "acme/Tiny", "directory": str(directory)}}
        (paths.instance_runtime(name) / "status.json").write_text(json.dumps(status))
        yield


def cut_off(store: Path, model_id: str = "acme/Cut", age_s: float = 0) -> Path:
    """What a download that was cut off left; with its log."""
    asked = tiny_models.request(store, model_id)
    directory = publishing.stage(store, asked, {"model.safetensors": b"half"}).parent
    (store / ".staging" / f"{label(asked)}.log").write_text(f"2026-01-01T00:00:00 fetching {model_id}, 1 files\n")
    for path in (directory, *directory.rglob("*"), store / ".staging" / f"{label(asked)}.log"):
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    return directory


def let_in(tmp_path: Path) -> None:
    """pytest's directories are its user's alone."""
    for path in (tmp_path, *tmp_path.parents):
        if path.name.startswith(("test_", "pytest-")) or Path(tempfile.gettempdir()) in path.parents:
            path.chmod(0o711)


def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
    """Runs vllmctl as a user who may nothing. Once before as root, since that user may not read the interpreter's modules either."""
    program = "import os, sys, traceback\nfrom vllmd.ctl import main\nout = sys.stdout; sys.stdout = open(os.devnull, 'w'); main(); sys.stdout = out\n"
    program += "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nsys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *command.split()[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)


def give(store: Path) -> None:
    for path in (store, *store.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
