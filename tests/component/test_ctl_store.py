"""`vllmctl store`: what it lists, who it says uses a model, and what it removes and what never: real directories and locks."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests import procs, publishing, tiny_models
from tests.needs import need
from vllmd import ctl as vllmctl
from vllmd.commandline import guarded
from vllmd.config.paths import Paths, root_paths
from vllmd.core.plan import ModelRequest
from vllmd.models import catalog, demo, discard
from vllmd.models.identity import label
from vllmd.models.inuse import Flocks
from vllmd.models.lock import DIRECTORY as LOCKS
from vllmd.models.published import damaged, mark_damaged
from vllmd.models.retention import InUse, Removed

pytestmark = pytest.mark.component

COMMIT = "c" * 40
DAY_S = 86400


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return root_paths(tmp_path / "root")


@pytest.fixture
def store(paths: Paths) -> Path:
    paths.models.mkdir(parents=True)
    return paths.models


Run = Callable[..., subprocess.CompletedProcess[str]]


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


# list


def test_store_that_is_not_there_or_empty_says_what_to_do(ctl: Run, paths: Paths) -> None:
    absent = ctl("list")
    assert (absent.returncode, absent.stderr) == (0, "")
    assert "does not exist yet" in absent.stdout
    paths.models.mkdir(parents=True)
    assert "holds no models; `vllmd resolve NAME`" in ctl("list").stdout
    assert items(ctl) == []


def test_each_kind_is_listed_with_what_it_is(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    publishing.publish_version(store, 2, asked=tiny_models.request(store, revision="v1"))
    tiny_models.snapshot(store / "hub", "org/Cached", COMMIT, main=True)
    demo.make(store / "Mine")
    cut_off(store)
    found = {item["identity"]: item for item in items(ctl)}
    assert {name: item["kind"] for name, item in found.items()} == {
        "acme/Tiny": "published",
        "acme/Tiny@v1": "published",
        "org/Cached": "hub-cache",
        "Mine": "local",
        "acme/Cut": "unfinished",
    }
    tiny = found["acme/Tiny"]
    assert (tiny["version"], tiny["current"], tiny["directory"]) == (directory.name, True, str(directory))
    assert tiny["bytes"] == sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert found["org/Cached"]["revision"] == COMMIT
    text = ctl("list").stdout
    assert "acme/Tiny     published" in text
    assert directory.name[:12] in text
    assert COMMIT[:12] in text
    assert COMMIT not in text
    assert "5 entries, " in text


def test_columns_are_aligned(ctl: Run, store: Path) -> None:
    publishing.publish_version(store, 1)
    demo.make(store / "A-name-that-is-longer-than-the-others-in-the-list")
    lines = ctl("list").stdout.splitlines()[:3]
    assert len({line.index(word) for line, word in zip(lines, ("KIND", "local", "published"), strict=True)}) == 1


def test_files_of_a_hub_cache_are_counted_once_and_links_not_at_all(ctl: Run, store: Path) -> None:
    """Every snapshot links to the same blobs: naive sums say a multiple."""
    first = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    second = first.with_name("d" * 40)
    second.mkdir()
    for link in first.iterdir():
        (second / link.name).symlink_to(link.readlink())
    [item] = items(ctl)
    assert item["bytes"] == sum(path.stat().st_size for path in (first.parent.parent / "blobs").iterdir())


def test_what_versions_share_is_counted_once_in_the_total(ctl: Run, store: Path) -> None:
    one = publishing.publish_version(store, 1, size=100_000)
    two = publishing.publish_version(store, 2)
    (two / "copy").hardlink_to(one / "model.safetensors")
    found = listed(ctl)
    shared = sum(path.stat().st_size for path in one.rglob("*") if path.is_file() and path.stat().st_nlink > 1)
    assert shared > 100_000
    assert [item["shared_bytes"] for item in found["items"]] == [shared, shared]
    assert found["bytes"] == sum(item["bytes"] for item in found["items"]) - shared
    assert "more if they shared no files" in ctl("list").stdout


def test_a_thousand_entries_are_listed_in_a_second(paths: Paths, store: Path) -> None:
    for number in range(1000):
        directory = store / ".published" / f"org-M{number}.{number:012x}" / f"{number:064x}"
        directory.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", ".complete", ".vllmd-manifest.json"):
            (directory / name).write_text("{}")
        (store / f"org-M{number}.{number:012x}").symlink_to(directory.relative_to(store))
    with subprocess.Popen(program(paths, "list"), stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        assert len(listing.stdout.read().splitlines()) == 1003
        _, status, usage = os.wait4(listing.pid, 0)
        listing.returncode = os.waitstatus_to_exitcode(status)
    # Of the processor: the machine may be busy. All of it takes 0.5 s on a calm one.
    assert usage.ru_utime + usage.ru_stime < 1.5


def test_users_are_instances_by_name_and_others_by_process(ctl: Run, paths: Paths, store: Path) -> None:
    first, second = publishing.publish_version(store, 1), publishing.publish_version(store, 2)
    with instance(paths, "demo", first, holds=True), holding(HOLD, second) as other:
        used = {item["version"]: item["used_by"] for item in items(ctl)}
        described = procs.read(other.pid)
        assert described is not None
        assert used[first.name] == ["demo"]
        assert used[second.name] == [f"{described.comm} (pid {other.pid})"]
        assert "used by demo" in ctl("list").stdout
    assert {tuple(item["used_by"]) for item in items(ctl)} == {()}


def test_status_of_a_supervisor_that_is_dead_is_no_user(ctl: Run, paths: Paths, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    with instance(paths, "demo", directory, holds=False):
        assert items(ctl)[0]["used_by"] == ["demo"]
    assert items(ctl)[0]["used_by"] == []


def test_user_whom_the_kernel_does_not_name_is_a_user_all_the_same(ctl: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From within a container, or of another host, only the lock itself is seen."""
    directory = publishing.publish_version(store, 1)
    snapshot = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    monkeypatch.setattr(Flocks, "read", lambda: Flocks({}))
    with holding(HOLD, directory), holding(HOLD, snapshot):
        assert [item["used_by"] for item in items(ctl)] == [["another process"]] * 2
        for name in ("acme/Tiny", "org/Cached"):
            refused = ctl("rm", name, "--yes")
            assert refused.returncode == 75
            assert "in use by another process" in refused.stderr


def test_listing_bears_versions_that_come_and_go(ctl: Run, store: Path) -> None:
    program = "from tests import publishing\nstore = Path(sys.argv[1])\npublishing.publish_version(store, 0)\nprint('held', flush=True)\n"
    program += "for number in range(1, 100000): publishing.publish_version(store, number, keep=1)"
    with holding(program, store):
        for _ in range(100):
            assert len(items(ctl, "published")) <= 3


def test_listing_disturbs_nobody_and_changes_nothing(ctl: Run, store: Path) -> None:
    publishing.publish_version(store, 1)
    demo.make(store / "Mine")
    before = tiny_models.tree(store)
    ctl("list")
    assert tiny_models.tree(store) == before


def test_damage_and_pins_are_shown(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    mark_damaged(directory, ["model.safetensors"])
    assert ctl("pin", "acme/Tiny").returncode == 0
    [item] = items(ctl)
    assert (item["damaged"], item["pinned"]) == (["model.safetensors"], True)
    assert "current, pinned, DAMAGED: model.safetensors" in ctl("list").stdout


@pytest.mark.parametrize("content", [b"", b"{}", b'{"schema": 1, "files": {"../../etc/passwd": {}}}', b"[" * 10000])
def test_manifest_that_says_nonsense_is_shown_as_damage_and_its_version_can_go(ctl: Run, store: Path, content: bytes) -> None:
    directory = publishing.publish_version(store, 1)
    manifest = directory / ".vllmd-manifest.json"
    manifest.unlink()
    manifest.write_bytes(content)
    [item] = items(ctl)
    assert item["damaged"] == [".vllmd-manifest.json"]
    assert ctl("rm", item["name"], "--yes").returncode == 0
    assert items(ctl) == []


def test_other_directory_and_the_configured_one(ctl: Run, paths: Paths, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    publishing.publish_version(other, 1)
    assert items(ctl) == []
    assert "acme/Tiny" in ctl("list", "--dir", str(other)).stdout
    paths.config.mkdir(parents=True)
    (paths.config / "vllmd.yaml").write_text(f"model:\n  dir: {other}\n")
    assert [item["id"] for item in items(ctl)] == ["acme/Tiny"]


def test_store_that_may_not_be_read_is_77_with_a_way_out(paths: Paths, store: Path, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    publishing.publish_version(store, 1)
    let_in(tmp_path)
    store.chmod(0o700)
    result = as_nobody(f"vllmctl --root {paths.config.parent} store list")
    assert result.returncode == 77, result.stderr
    assert str(store) in result.stderr
    assert "sudo vllmctl store" in result.stderr
    assert "Traceback" not in result.stderr


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


def test_own_directory_that_may_not_be_read_hides_nothing_else(paths: Paths, store: Path, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    publishing.publish_version(store, 1)
    demo.make(store / "Secret").chmod(0o700)
    let_in(tmp_path)
    result = as_nobody(f"vllmctl --root {paths.config.parent} store list")
    assert result.returncode == 0, result.stderr
    assert "acme/Tiny" in result.stdout
    assert "not readable" in result.stdout


# rm


def test_model_is_removed_with_all_its_versions_and_names(ctl: Run, store: Path) -> None:
    for number in (1, 2):
        publishing.publish_version(store, number)
    result = ctl("rm", "acme/Tiny", "--yes")
    assert (result.returncode, result.stdout.count("Removed acme/Tiny, version ")) == (0, 2)
    assert "kB freed" in result.stdout
    assert items(ctl) == []
    assert [path.name for path in store.iterdir() if not path.name.startswith(".")] == []
    assert list((store / ".published").iterdir()) == list((store / ".trash").iterdir()) == []


def test_one_version_is_removed(ctl: Run, store: Path) -> None:
    one, two = publishing.publish_version(store, 1), publishing.publish_version(store, 2)
    assert ctl("rm", "acme/Tiny", "--version", one.name[:12], "--yes").returncode == 0
    assert [item["version"] for item in items(ctl)] == [two.name]
    assert ctl("rm", "acme/Tiny", "--version", one.name[:12], "--yes").returncode == 66
    assert ctl("rm", "acme/Tiny", "--version", "../..", "--yes").returncode == 64


def test_hub_cache_is_removed_by_its_id_or_directory(ctl: Run, store: Path) -> None:
    for name, called in (("org/One", "org/One"), ("org/Two", "models--org--Two")):
        snapshot = tiny_models.snapshot(store / "hub", name, COMMIT, main=True)
        size = sum(path.stat().st_size for path in snapshot.parents[1].rglob("*") if path.is_file() and not path.is_symlink())
        result = ctl("rm", called, "--yes")
        assert (result.returncode, result.stderr) == (0, "")
        assert f"Removed {name} in the hub cache: {size / 1e3:.1f} kB freed" in result.stdout
    assert list((store / "hub").iterdir()) == list((store / ".trash").iterdir()) == []


def test_freed_is_what_no_other_version_has(ctl: Run, store: Path) -> None:
    one, two = publishing.publish_version(store, 1, size=1_000_000), publishing.publish_version(store, 2)
    (two / "copy").hardlink_to(one / "model.safetensors")
    result = ctl("rm", "acme/Tiny", "--version", one.name, "--yes")
    freed = float(result.stdout.partition(": ")[2].split()[0])
    assert " kB freed" in result.stdout
    assert freed < 10


@pytest.mark.parametrize(
    "name",
    ["../victim", "hub/../../victim", "/etc", "*", "", ".", "..", "hub", ".published", ".staging/../../victim", "acme/Tin?", "acme/Tiny/", "ACME/TINY", "-"],
)
def test_only_what_the_list_shows_can_be_removed(ctl: Run, store: Path, name: str) -> None:
    """A delete command of another tool put the name into a path of rm -rf, and `../x` went."""
    victim = store.parent / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    publishing.publish_version(store, 1)
    tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    before = tiny_models.tree(store.parent)
    result = ctl("rm", "--yes", "--", name)
    assert result.returncode == 66, result.stderr
    assert "is not in the store" in result.stderr
    assert "vllmctl store list shows what is" in result.stderr
    assert tiny_models.tree(store.parent) == before


def test_own_directory_is_never_removed(ctl: Run, store: Path, tmp_path: Path) -> None:
    demo.make(store / "Mine")
    (store / "Elsewhere").symlink_to(demo.make(tmp_path / "elsewhere"))
    before = tiny_models.tree(tmp_path)
    for name in ("Mine", "Elsewhere"):
        result = ctl("rm", name, "--yes", "--force")
        assert result.returncode == 64
        assert "is a directory of your own" in result.stderr
    assert tiny_models.tree(tmp_path) == before


def test_what_is_in_use_stays_and_it_is_said_by_whom(ctl: Run, paths: Paths, store: Path) -> None:
    one, two = publishing.publish_version(store, 1), publishing.publish_version(store, 2)
    with instance(paths, "demo", one, holds=True):
        result = ctl("rm", "acme/Tiny", "--yes", "--force")
        assert result.returncode == 75
        assert f"version {one.name[:12]} is in use by demo" in result.stderr
        assert "vllmctl stop demo" in result.stderr
        assert two.is_dir(), "all or nothing"
    assert ctl("rm", "acme/Tiny", "--yes").returncode == 0


def test_snapshot_in_use_keeps_its_hub_cache(ctl: Run, store: Path) -> None:
    snapshot = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    with holding(HOLD, snapshot) as other:
        result = ctl("rm", "org/Cached", "--yes")
        assert result.returncode == 75
        assert f"(pid {other.pid})" in result.stderr
    assert snapshot.is_dir()


def test_snapshot_that_is_taken_into_use_after_the_look_stays(store: Path) -> None:
    snapshot = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    [item] = catalog.take(store).items
    with holding(HOLD, snapshot):
        assert isinstance(discard.remove_hub(store, item), InUse)
    assert snapshot.is_dir()
    assert isinstance(discard.remove_hub(store, item), Removed)


def test_download_that_runs_is_not_removed(ctl: Run, store: Path) -> None:
    directory = cut_off(store)
    lock = "from vllmd.models.lock import locked\nlock = locked(Path(sys.argv[1]), sys.argv[2], 0, print)\nlock.__enter__()"
    hashed = label(tiny_models.request(store, "acme/Cut")).rpartition(".")[2]
    with holding(lock, store, hashed) as other:
        assert f"(pid {other.pid})" in items(ctl)[0]["used_by"][0]
        assert ctl("rm", "acme/Cut", "--yes").returncode == 75
        assert "nothing to remove" in ctl("gc").stdout
        assert directory.is_dir()
    assert ctl("rm", "acme/Cut", "--yes").returncode == 0
    assert list((store / ".staging").iterdir()) == []


def test_pinned_version_goes_by_force_only(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    assert ctl("pin", "acme/Tiny").returncode == 0
    refused = ctl("rm", "acme/Tiny", "--yes")
    assert (refused.returncode, directory.is_dir()) == (64, True)
    assert "is pinned" in refused.stderr
    assert f"vllmctl store unpin acme/Tiny --version {directory.name[:12]}" in refused.stderr
    assert ctl("rm", "acme/Tiny", "--yes", "--force").returncode == 0
    assert list((store / ".pins").iterdir()) == []


def test_nobody_to_ask_removes_nothing(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    result = ctl("rm", "acme/Tiny")
    assert (result.returncode, directory.is_dir()) == (64, True)
    assert "--yes" in result.stderr


@pytest.mark.parametrize(("answer", "stays"), [(b"y\n", False), (b"n\n", True), (b"\n", True), (b"\x04", True)])
def test_person_at_a_terminal_is_asked(paths: Paths, store: Path, answer: bytes, stays: bool) -> None:
    directory = publishing.publish_version(store, 1)
    master, slave = pty.openpty()
    try:
        os.write(master, answer)
        result = subprocess.run(program(paths, "rm", "acme/Tiny"), stdin=slave, capture_output=True, text=True, check=False, timeout=60)
    finally:
        os.close(master)
        os.close(slave)
    assert (result.returncode, directory.is_dir()) == (0, stays)
    assert f"acme/Tiny, version {directory.name[:12]}: " in result.stderr
    assert "Remove? [y/N]" in result.stderr


# gc


def test_surplus_goes_and_what_is_current_pinned_or_used_stays(ctl: Run, store: Path) -> None:
    versions = [publishing.publish_version(store, number, keep=9) for number in range(1, 7)]
    assert ctl("pin", "acme/Tiny", "--version", versions[0].name).returncode == 0
    with holding(HOLD, versions[1]):
        dry = ctl("gc", "--dry-run", "--keep", "2")
        assert (dry.returncode, dry.stdout.count("would remove")) == (0, 2)
        assert all(path.is_dir() for path in versions)
        result = ctl("gc", "--keep", "2")
        assert (result.returncode, result.stdout.count("Removed")) == (0, 2)
        assert f"{versions[1].name[:12]} stays: it is in use by " in result.stdout
    assert [path.is_dir() for path in versions] == [True, True, False, False, True, True]
    assert ctl("gc", "--keep", "1").stdout.count("Removed") == 2
    assert [path.is_dir() for path in versions] == [True, False, False, False, False, True]
    assert ctl("gc", "--keep", "1").stdout == "nothing to remove\n"


def test_old_downloads_and_rubbish_go_young_ones_stay(ctl: Run, store: Path) -> None:
    old, young = cut_off(store, "acme/Old", 8 * DAY_S), cut_off(store, "acme/Young", 6 * DAY_S)
    publishing.publish_version(store, 1)
    (store / ".trash").mkdir(exist_ok=True)
    (store / ".trash" / "0123").mkdir()
    (store / ".trash" / "0123" / "weights").write_bytes(b"x" * 5000)
    gone = store / ".manifests" / "gone.json"
    gone.parent.mkdir()
    gone.write_text(json.dumps({"schema": 1, "directory": str(store / "Gone")}))
    kept = gone.with_name("kept.json")
    kept.write_text(json.dumps({"schema": 1, "directory": str(store)}))
    (store / ".published" / "bare.0123456789ab").mkdir()
    result = ctl("gc")
    assert result.returncode == 0, result.stderr
    assert "the download of acme-Old." in result.stdout
    assert "an interrupted removal left: 5.0 kB freed" in result.stdout
    assert (old.exists(), young.exists(), gone.exists(), kept.exists()) == (False, True, False, True)
    assert list((store / ".trash").iterdir()) == []
    assert len(list((store / ".published").iterdir())) == 1
    assert ctl("gc").stdout == "nothing to remove\n"


def test_one_thing_that_cannot_be_removed_does_not_keep_the_others(ctl: Run, store: Path) -> None:
    versions = [publishing.publish_version(store, number, keep=9) for number in (1, 2)]
    stuck = store / ".trash" / "0000"
    stuck.mkdir(parents=True)
    subprocess.run(["chattr", "+i", stuck], check=False, capture_output=True)
    try:
        need("i" in subprocess.run(["lsattr", "-d", stuck], check=False, capture_output=True, text=True).stdout.partition(" ")[0], "chattr +i")
        result = ctl("gc", "--keep", "1")
        assert result.returncode == 77
        assert str(stuck) in result.stderr
        assert [path.is_dir() for path in versions] == [False, True]
    finally:
        subprocess.run(["chattr", "-i", stuck], check=False, capture_output=True)


def test_keep_is_a_number_of_at_least_one(ctl: Run, store: Path) -> None:
    publishing.publish_version(store, 1)
    for value in ("0", "-1", "many"):
        assert ctl("gc", "--keep", value).returncode == 64
    assert len(items(ctl)) == 1


# pin


def test_pins_outlive_publications_until_they_are_taken_back(ctl: Run, store: Path) -> None:
    first = publishing.publish_version(store, 1)
    assert ctl("pin", "acme/Tiny").stdout == f"acme/Tiny, version {first.name[:12]} is pinned\n"
    for number in range(2, 6):
        publishing.publish_version(store, number)
    assert first.is_dir()
    assert "already" in ctl("pin", "acme/Tiny", "--version", first.name[:12]).stdout
    assert ctl("unpin", "acme/Tiny").stdout == f"acme/Tiny, version {first.name[:12]} is no longer pinned\n"
    assert ctl("unpin", "acme/Tiny").returncode == 66
    publishing.publish_version(store, 6)
    assert not first.exists()


def test_what_is_not_published_cannot_be_pinned(ctl: Run, store: Path) -> None:
    demo.make(store / "Mine")
    assert ctl("pin", "Mine").returncode == 64
    assert ctl("pin", "Nothing").returncode == 66


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("pin", "acme/Tiny"), ".pins"),
        (("rm", "acme/Tiny", "--yes"), ".published"),
        (("gc", "--keep", "1"), ".published"),
        (("import", "../model.tar"), ".staging"),
    ],
)
def test_root_has_no_more_rights_in_a_store_than_its_owner(ctl: Run, store: Path, tmp_path: Path, arguments: tuple[str, ...], place: str) -> None:
    """The owner could put a link into the way of each change: it must not lead to what only root may write."""
    need(os.geteuid() == 0, "root")
    for number in (1, 2):
        publishing.publish_version(store, number, keep=9)
    archive = store.parent / "model.tar"
    assert ctl("export", "acme/Tiny", "--as", "acme/Copy", "-o", str(archive)).returncode == 0
    let_in(tmp_path)
    (store / place).mkdir(exist_ok=True)
    give(store)
    for path in ((store / place), *(store / place).rglob("*")):
        os.chown(path, 0, 0, follow_symlinks=False)
    before = sorted(store.rglob("*.safetensors"))
    refused = ctl(*(str(archive) if each.endswith(".tar") else each for each in arguments))
    assert refused.returncode == 77, refused.stderr
    assert "Traceback" not in refused.stderr
    assert sorted(store.rglob("*.safetensors")) == before


def give(store: Path) -> None:
    for path in (store, *store.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)


def test_root_leaves_nothing_that_the_owner_of_the_store_cannot_write(ctl: Run, store: Path, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    let_in(tmp_path)
    for number in (1, 2, 3):
        publishing.publish_version(store, number, keep=9)
    give(store)
    archive = store.parent / "model.tar"
    for arguments in (("pin", "acme/Tiny"), ("gc", "--keep", "2"), ("export", "acme/Tiny", "--as", "acme/Copy", "-o", str(archive)), ("import", str(archive))):
        assert ctl(*arguments).returncode == 0
    [damaged_file] = list(store.glob("acme-Copy.*/model.safetensors"))
    damaged_file.chmod(0o644)
    with damaged_file.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert ctl("verify", "acme/Copy").returncode == 65
    assert [str(path) for path in (store, *store.rglob("*")) if path.lstat().st_uid != 65534] == []


# verify


def flip(path: Path) -> None:
    """One bit, as a failing disk would: neither size nor time change."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_whole_version_is_verified_and_the_speed_said(ctl: Run, store: Path) -> None:
    publishing.publish_version(store, 1, size=1_000_000)
    result = ctl("verify", "acme/Tiny")
    assert result.returncode == 0, result.stderr
    assert "5 files, 1.0 MB verified, " in result.stdout
    assert "GB/s" in result.stdout


def test_flipped_bit_is_65_names_the_file_and_marks_the_version(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    other = publishing.publish_version(store, 2)
    flip(directory / "model.safetensors")
    result = ctl("verify", "--all")
    assert result.returncode == 65
    assert f"{directory}/model.safetensors" in result.stderr
    assert "BLAKE3" in result.stderr
    assert (set(damaged(directory)), set(damaged(other))) == ({"model.safetensors"}, set())
    flip(directory / "model.safetensors")
    again = ctl("verify", "--all")
    assert again.returncode == 0
    assert "every byte of it is right now" in again.stdout
    assert damaged(directory) == frozenset()


@pytest.mark.parametrize("how", ["missing", "short", "link", "fifo"])
def test_file_that_is_not_what_it_was_is_named(ctl: Run, store: Path, how: str) -> None:
    directory = publishing.publish_version(store, 1)
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    match how:
        case "short":
            path.write_bytes(data[:-1])
        case "link":
            path.symlink_to("/etc/passwd")
        case "fifo":
            os.mkfifo(path)
    result = ctl("verify", "acme/Tiny")
    assert result.returncode == 65
    assert "model.safetensors" in result.stderr
    assert damaged(directory) == {"model.safetensors"}


def test_blobs_of_a_hub_cache_are_verified_by_their_names(ctl: Run, store: Path) -> None:
    import hashlib

    snapshot = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT, main=True)
    link = snapshot / "model-00001-of-00002.safetensors"
    blob = link.resolve()
    good = blob.with_name(hashlib.sha256(blob.read_bytes()).hexdigest())
    blob.rename(good)
    assert "1 file, " in ctl("verify", "org/Cached").stdout
    flip(good)
    result = ctl("verify", "org/Cached")
    assert result.returncode == 65
    assert str(good) in result.stderr
    assert "vllmctl store rm org/Cached" in result.stderr


def test_own_directory_without_sums_says_so(ctl: Run, store: Path) -> None:
    demo.make(store / "Mine")
    assert ctl("verify", "Mine").stdout == "Mine: no sums speak for it\n"
    assert "nothing in" in ctl("verify", "--all").stdout
    assert "nothing in" in ctl("verify").stdout


def test_own_directory_is_verified_by_what_an_earlier_start_saw(ctl: Run, store: Path) -> None:
    from vllmd.config.settings import Model
    from vllmd.core.plan import ResolvedModel
    from vllmd.models.verify import verify

    directory = demo.make(store / "Mine")
    asked = ModelRequest("Mine", "", "", "", (), store)
    verify(ResolvedModel("Mine", directory, "local"), asked, Model(verify="sha256"), lambda _progress: None)
    assert "7 files, " in ctl("verify", "Mine").stdout
    flip(directory / "model-00001-of-00002.safetensors")
    assert ctl("verify", "Mine").returncode == 65
    assert (store / LOCKS).exists() is False, "nothing was written for it"


@pytest.mark.parametrize("arguments", [["verify", "--all", "x"], ["frob"], [], ["rm"], ["list", "x"]])
def test_wrong_command_line_is_64(ctl: Run, arguments: list[str]) -> None:
    result = ctl(*arguments)
    assert (result.returncode, result.stdout) == (64, "")
    assert len(result.stderr.splitlines()) == 2
