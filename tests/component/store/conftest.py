"""A store, and vllmctl for it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.component.store.stores import Run
from vllmd import ctl as vllmctl
from vllmd.commandline import guarded
from vllmd.config.paths import Paths, root_paths


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return root_paths(tmp_path / "root")


@pytest.fixture
def store(paths: Paths) -> Path:
    paths.models.mkdir(parents=True)
    return paths.models


@pytest.fixture
def ctl(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Run:
    """vllmctl --root ROOT store ..., in this process (100 times as fast); nobody is at a terminal."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = ["--root", str(paths.config.parent), "store", *arguments]
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, open(os.devnull) as nobody, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "stdin", nobody)
            status = guarded("vllmctl", vllmctl.run, argv)
        return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())

    return run
