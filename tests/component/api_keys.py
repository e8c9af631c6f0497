"""`vllmctl api-key` below a directory of the test's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def vllmctl(root: Path, *words: str) -> tuple[int, str, str]:
    argv = [str(Path(sys.executable).parent / "vllmctl"), "--root", str(root), "api-key", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def public(root: Path, name: str = "demo") -> str:
    return str(json.loads((root / "lib/public" / name / "credentials.json").read_text())["apiKey"])
