"""An engine whose host changed below it is refused at once, with what to do, instead of after vLLM's imports."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine_contexts import context
from vllmd.engines.protocol import Context
from vllmd.engines.vllm import Vllm
from vllmd.errors import ConfigError

pytestmark = pytest.mark.unit

OURS = f"python3.{sys.version_info.minor}"


def _engine(root: Path, made_for: str, python: Path, **more: Any) -> Context:
    """A virtual environment for `made_for`, whose bin/python3 is `python`."""
    directory = root / "engines/vllm-1-cpu"
    (directory / "lib" / made_for / "site-packages").mkdir(parents=True)
    (directory / "bin").mkdir()
    (directory / "bin/python3").symlink_to(python)
    (directory / "pyvenv.cfg").touch()
    return context(root, executable=str(directory / "bin/vllm"), **more)


def _python(root: Path, name: str) -> Path:
    program = root / name
    program.touch()
    return program


def test_an_engine_made_for_another_python_is_refused(tmp_path: Path) -> None:
    """An upgrade of Debian 12 to 13: /usr/bin/python3 is 3.13 now, the packages stand under lib/python3.11."""
    unfit = _engine(tmp_path, "python3.11", _python(tmp_path, "python3.13"), variant="cuda")
    with pytest.raises(ConfigError, match=r"made for python3\.11, and its bin/python3 is python3\.13 now") as caught:
        Vllm().check(unfit)
    assert caught.value.status == 78
    assert "--reinstall" in caught.value.hint


def test_an_engine_whose_python_is_gone_is_refused(tmp_path: Path) -> None:
    unfit = _engine(tmp_path, "python3.11", tmp_path / "python3.11", variant="cuda")
    with pytest.raises(ConfigError, match="its Python is gone: there is no "):
        Vllm().check(unfit)


@pytest.mark.parametrize("name", ["python3.11", "python3", "pypy3.10"])
def test_an_engine_that_fits_or_cannot_be_judged_is_accepted(tmp_path: Path, name: str) -> None:
    Vllm().check(_engine(tmp_path, "python3.11", _python(tmp_path, name), variant="cuda"))


def _no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_the_cpu_build_without_libnuma_is_refused_and_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", _no_library)
    with pytest.raises(ConfigError, match=r"needs libnuma\.so\.1") as caught:
        Vllm().check(_engine(tmp_path, OURS, _python(tmp_path, OURS)))
    assert "libnuma1" in caught.value.hint


@pytest.mark.parametrize("case", ["a GPU build", "a search path of one's own"])
def test_libnuma_is_asked_for_only_where_it_must_be_the_host_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", _no_library)
    more: dict[str, Any] = {"variant": "cuda"}
    if case != "a GPU build":
        more = {"settings": {"engine.env": {"LD_LIBRARY_PATH": "/opt/numa"}}}
    Vllm().check(_engine(tmp_path, OURS, _python(tmp_path, OURS), **more))
