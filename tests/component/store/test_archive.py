"""`vllmctl store export|import`: one tar between two stores, by file and by pipe, and every way in which a tar can lie."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests import procs, publishing, tiny_models
from tests.component.daemons import quick, stop
from vllmd import ctl
from vllmd.config.paths import root_paths
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.errors import ModelInvalid
from vllmd.models import contents as manifests
from vllmd.models import demo
from vllmd.models.contents import Contents, Entry
from vllmd.models.identity import label
from vllmd.models.published import directories, mark_damaged
from vllmd.models.resolve import resolve_report

pytestmark = pytest.mark.component

MANIFEST = ".vllmd-manifest.json"
WEIGHTS = "model.safetensors"


class Host:
    """A store of its own, and vllmctl for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root_paths(root).models
        self.store.mkdir(parents=True)

    def command(self, *arguments: object) -> list[str]:
        program = "import sys; from vllmd.ctl import main; sys.exit(main())"
        return [sys.executable, "-c", program, "--root", str(self.root), "store", *map(str, arguments)]

    def run(self, *arguments: object, **more: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.command(*arguments), **{"capture_output": True, "timeout": 60, "check": False, **({} if "input" in more else {"stdin": subprocess.DEVNULL}), **more})

    def resolved(self, model_id: str, revision: str = "") -> dict[str, Any]:
        """What `vllmd resolve` would print."""
        asked = tiny_models.request(self.store, model_id, revision=revision)
        return resolve_report(asked, Model(offline=True), {}, lambda _progress: None)

    def is_clean(self) -> bool:
        """Nothing published, nothing staged."""
        staged = self.store / ".staging"
        return directories(self.store) == [] and not (staged.is_dir() and any(staged.iterdir()))


@pytest.fixture
def here(tmp_path: Path) -> Host:
    return Host(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Host:
    return Host(tmp_path / "there")


def test_model_goes_from_one_store_to_another_by_file(here: Host, there: Host, tmp_path: Path) -> None:
    published = publishing.publish_version(here.store, 1)
    archive = tmp_path / "model.tar"
    exported = here.run("export", "acme/Tiny", "-o", archive)
    assert (exported.returncode, exported.stdout) == (0, b"")
    imported = there.run("import", archive)
    assert imported.returncode == 0, imported.stderr
    found = there.resolved("acme/Tiny")
    assert (found["ok"], found["via"], found["manifest_sha256"]) == (True, "local", published.name)
    contents = manifests.read(Path(found["directory"]))
    assert (contents.source, contents.origin) == ("import", publishing.ORIGIN)
    assert {entry.pin for entry in contents.files.values()} == {""}
    assert publishing.wrong(there.store, tiny_models.request(there.store)) == []
    assert list((there.store / ".staging").iterdir()) == []


def test_archive_comes_through_a_pipe_and_the_second_import_does_nothing(here: Host, there: Host) -> None:
    published = publishing.publish_version(here.store, 1, size=3_000_000)
    for said in (b"Imported acme/Tiny", b"is in the store already"):
        with subprocess.Popen(here.command("export", "acme/Tiny"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
            result = there.run("import", "-", stdin=writer.stdout)
            assert writer.stdout is not None
            assert writer.stderr is not None
            writer.stdout.close()
            assert b"Exported" in writer.stderr.read()
        assert (writer.returncode, result.returncode) == (0, 0)
        assert said in result.stdout + result.stderr
        assert [path.name for path in directories(there.store)] == [published.name]


def test_any_tar_reads_it_and_the_same_model_gives_the_same_bytes(here: Host, tmp_path: Path) -> None:
    publishing.publish_version(here.store, 1)
    first, second = here.run("export", "acme/Tiny").stdout, here.run("export", "acme/Tiny", "-o", "-").stdout
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        names = tar.getnames()
        assert names == [f"{label(tiny_models.request(here.store))}/{name}" for name in (MANIFEST, *sorted(publishing.content(1)))]
        tar.extractall(tmp_path, filter="data")
    for name, data in publishing.content(1).items():
        assert (tmp_path / label(tiny_models.request(here.store)) / name).read_bytes() == data


def test_hub_cache_and_own_directory_are_exported_with_a_manifest_made_now(here: Host, there: Host, tmp_path: Path) -> None:
    tiny_models.snapshot(here.store / "hub", "org/Cached", "c" * 40, main=True)
    demo.make(here.store / "Mine")
    archive = tmp_path / "model.tar"
    assert here.run("export", "org/Cached", "-o", archive).returncode == 0
    assert there.run("import", archive).returncode == 0
    found = there.resolved("org/Cached")
    assert found["via"] == "local"
    assert manifests.read(Path(found["directory"])).revision == "c" * 40
    assert here.run("export", "Mine", "--as", "me/Mine@v1", "-o", archive).returncode == 0
    assert there.run("import", archive).returncode == 0
    assert there.resolved("me/Mine", "v1")["ok"]
    assert not there.resolved("me/Mine")["ok"]


def test_name_longer_than_old_tars_have_and_any_letters_arrive(here: Host, there: Host, tmp_path: Path) -> None:
    directory = demo.make(here.store / "Mine")
    odd = f"{'sub' * 30}/{'x' * 120} größe 模型.txt"
    (directory / odd).parent.mkdir()
    (directory / odd).write_text("text")
    assert here.run("export", "Mine", "-o", tmp_path / "model.tar").returncode == 0
    assert there.run("import", tmp_path / "model.tar").returncode == 0
    assert (there.store / "Mine" / odd).read_text() == "text"


def test_damaged_model_is_not_exported(here: Host, tmp_path: Path) -> None:
    directory = publishing.publish_version(here.store, 1)
    weights = directory / WEIGHTS
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = here.run("export", "acme/Tiny", "-o", tmp_path / "model.tar")
    assert result.returncode == 65
    assert f"{weights}: is not what its manifest says".encode() in result.stderr
    mark_damaged(directory, [WEIGHTS])
    assert here.run("export", "acme/Tiny", "-o", tmp_path / "model.tar").returncode == 65
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_output_that_cannot_be_written_is_said_and_nothing_is_left(here: Host, tmp_path: Path) -> None:
    publishing.publish_version(here.store, 1)
    assert here.run("export", "acme/Tiny", "-o", tmp_path / "missing" / "model.tar").returncode == 74
    with open("/dev/full", "wb") as full:
        result = here.run("export", "acme/Tiny", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 74
    assert b"No space left" in result.stderr
    assert here.run("export", "acme/Tiny", "-o", "/dev/full").returncode == 74
    assert b"Traceback" not in result.stderr


def test_output_that_is_a_directory_is_the_command_lines_fault(here: Host, tmp_path: Path) -> None:
    refused = here.run("export", "acme/Tiny", "-o", tmp_path)
    assert refused.returncode == 64
    assert b"is a directory" in refused.stderr
    assert b"-o FILE" in refused.stderr


def test_reader_that_goes_away_is_a_failure(here: Host) -> None:
    publishing.publish_version(here.store, 1, size=3_000_000)
    with subprocess.Popen(here.command("export", "acme/Tiny"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.read(10)
        writer.stdout.close()
        said = writer.stderr.read()
    assert writer.returncode == 74
    assert b"went away" in said


def test_what_is_exported_stays_until_it_is_written(here: Host) -> None:
    directory = publishing.publish_version(here.store, 1, size=3_000_000)
    with subprocess.Popen(here.command("export", "acme/Tiny"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
        assert writer.stdout is not None
        writer.stdout.read(10)
        refused = here.run("rm", "acme/Tiny", "--yes")
        assert refused.returncode == 75
        assert f"(pid {writer.pid})".encode() in refused.stderr
        writer.stdout.read()
    assert writer.returncode == 0
    assert directory.is_dir()


def test_imported_model_is_served_and_cannot_be_removed_meanwhile(here: Host) -> None:
    demo.make(here.store / "Mine")
    archive = here.run("export", "Mine", "--as", "acme/Tiny").stdout
    instance = quick(config={"model": {"path": "", "id": "acme/Tiny", "offline": True}})
    there = Host(instance.root)
    assert there.run("import", "-", input=archive).returncode == 0
    with instance:
        instance.wait_ready()
        [item] = json.loads(there.run("list", "--json").stdout)["items"]
        assert item["used_by"] == ["demo"]
        refused = there.run("rm", "acme/Tiny", "--yes", "--force")
        assert (refused.returncode, b"in use by demo" in refused.stderr) == (75, True)
        stop(instance)
        refused = there.run("rm", "acme/Tiny", "--yes")
        assert (refused.returncode, b"kept for a rollback of demo" in refused.stderr) == (64, True)
        assert there.run("rm", "acme/Tiny", "--yes", "--force").returncode == 0


# Hostile, and broken on the way.


def described(content: Mapping[str, bytes], **changes: Any) -> Contents:
    contents = publishing.described(ModelRequest("Tiny", "acme/Tiny", "", "", (), Path("/none")), content)
    return replace(contents, **changes)


def tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(f"top/{name}")
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def manifest(contents: Contents) -> tuple[tarfile.TarInfo, bytes]:
    return member(MANIFEST, json.dumps({"schema": 1, **asdict(contents)}).encode())


FILES = publishing.content(1)


def whole(**changes: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [manifest(described(FILES, **changes)), *(member(name, data) for name, data in sorted(FILES.items()))]


def renamed(name: str) -> bytes:
    """An archive whose manifest and files agree on a name that leaves the directory."""
    files = {name: b"evil", **FILES}
    return tar([manifest(described(files)), *(member(each, data) for each, data in files.items())])


def swapped(name: str, info: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """The archive with another member under the name of a file."""
    return tar([info if each[0].name == f"top/{name}" else each for each in whole()])


def bare(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=kind, linkname=target)


def entries(**changes: Any) -> dict[str, Entry]:
    files = dict(described(FILES).files)
    files[WEIGHTS] = replace(files[WEIGHTS], **changes)
    return files


def with_bad_checksum(data: bytes) -> bytes:
    """Of the second member's header."""
    at = data.index(b"top/LICENSE")
    return data[:at] + b"tap" + data[at + 3 :]


def raw_size(size: int) -> bytes:
    """A header that promises more than there is."""
    info = tarfile.TarInfo(f"top/{MANIFEST}")
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "noise": lambda: b"\x17" * 5000,
    "zeros": lambda: bytes(10240),
    "no manifest": lambda: tar(whole()[1:]),
    "manifest last": lambda: tar([*whole()[1:], whole()[0]]),
    "manifest of 2^60 bytes": lambda: raw_size(1 << 60),
    "manifest of negative size": lambda: raw_size(-5),
    "manifest is a link": lambda: tar([bare(MANIFEST, tarfile.SYMTYPE, "/etc/passwd"), *whole()[1:]]),
    "manifest is no JSON": lambda: tar([member(MANIFEST, b"{"), *whole()[1:]]),
    "manifest nested too deep": lambda: tar([member(MANIFEST, b"[" * 100_000)]),
    "manifest of another schema": lambda: tar([member(MANIFEST, b'{"schema": 2}')]),
    "no files": lambda: tar([manifest(described({}))]),
    "absolute name": lambda: renamed("/etc/cron.d/evil"),
    "name with ..": lambda: renamed("../../../evil"),
    "name with .. inside": lambda: renamed("sub/../../evil"),
    "backslash": lambda: renamed("..\\evil"),
    "control characters": lambda: renamed("ev\x1b[2Jil"),
    "two names that are one without case": lambda: renamed("CONFIG.json"),
    "a file that is a directory too": lambda: renamed("config.json/evil"),
    "a file of ours": lambda: renamed(".complete"),
    "the manifest itself as a file": lambda: renamed(MANIFEST),
    "identity that leaves the store": lambda: tar(whole(identity="../../evil")),
    "identity that is absolute": lambda: tar(whole(identity="/etc")),
    "identity that is empty": lambda: tar(whole(identity="")),
    "revision that leaves": lambda: tar(whole(identity="acme/Tiny@../../x")),
    "origin with escapes": lambda: tar(whole(origin="\x1b]0;evil\x07")),
    "size of 2^55": lambda: tar(whole(files=entries(size=1 << 55))),
    "negative size": lambda: tar(whole(files=entries(size=-1))),
    "sum in capitals": lambda: tar(whole(files=entries(sha256="A" * 64))),
    "symlink": lambda: swapped(WEIGHTS, bare(WEIGHTS, tarfile.SYMTYPE, "/etc/passwd")),
    "hard link": lambda: swapped(WEIGHTS, bare(WEIGHTS, tarfile.LNKTYPE, "top/config.json")),
    "directory": lambda: swapped(WEIGHTS, bare(WEIGHTS, tarfile.DIRTYPE)),
    "device": lambda: swapped(WEIGHTS, bare(WEIGHTS, tarfile.CHRTYPE)),
    "fifo": lambda: swapped(WEIGHTS, bare(WEIGHTS, tarfile.FIFOTYPE)),
    "file that nobody named": lambda: tar([*whole(), member("evil.py", b"import os")]),
    "file outside the top": lambda: tar([*whole()[:-1], (tarfile.TarInfo("other/tokenizer.json"), FILES["tokenizer.json"])]),
    "the same file twice": lambda: tar([*whole()[:-1], whole()[-2], whole()[-1]]),
    "another size": lambda: swapped(WEIGHTS, member(WEIGHTS, FILES[WEIGHTS] + b"x")),
    "other bytes": lambda: swapped(WEIGHTS, member(WEIGHTS, FILES[WEIGHTS][:-1] + b"\xff")),
    "right sha256, wrong blake3": lambda: tar(whole(files=entries(blake3="0" * 64))),
    "a file is missing": lambda: tar(whole()[:-1]),
    "bad checksum in a header": lambda: with_bad_checksum(tar(whole())),
    "not a model": lambda: tar([manifest(described({"a.txt": b"a"})), member("a.txt", b"a")]),
    "weights that are no safetensors": lambda: tar(
        [manifest(described({**FILES, WEIGHTS: b"\xff" * 100})), *(member(name, data) for name, data in sorted({**FILES, WEIGHTS: b"\xff" * 100}.items()))]
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archive_is_65_and_leaves_nothing(there: Host, kind: str) -> None:
    archive = there.root / "hostile.tar"
    archive.write_bytes(HOSTILE[kind]())
    before = tiny_models.tree(there.root.parent)
    with pytest.raises(ModelInvalid) as refused:
        ctl.run(["--root", str(there.root), "store", "import", str(archive)])
    assert refused.value.what.isprintable()
    assert refused.value.hint
    assert there.is_clean()
    after = {path: what for path, what in tiny_models.tree(there.root.parent).items() if "/.locks" not in path and not path.endswith(("/.staging", "/models"))}
    assert after == {path: what for path, what in before.items() if not path.endswith("/models")}


def test_archive_cut_at_any_block_is_65_and_what_was_published_stays(there: Host) -> None:
    published = publishing.publish_version(there.store, 2)
    data = tar(whole())
    end = data.rindex(b"{}" + bytes(510)) + 2
    archive = there.root / "cut.tar"
    for length in (*range(0, end, 512), end - 1):
        archive.write_bytes(data[:length])
        with pytest.raises(ModelInvalid, match=r"ends |truncated|does not begin"):
            ctl.run(["--root", str(there.root), "store", "import", str(archive)])
        assert [path.name for path in directories(there.store)] == [published.name]
    assert there.resolved("acme/Tiny")["manifest_sha256"] == published.name


def test_another_version_than_was_asked_is_refused(here: Host, there: Host, tmp_path: Path) -> None:
    published = publishing.publish_version(here.store, 1)
    here.run("export", "acme/Tiny", "-o", tmp_path / "model.tar")
    assert there.run("import", tmp_path / "model.tar", "--version", "0" * 12).returncode == 65
    assert there.is_clean()
    assert there.run("import", tmp_path / "model.tar", "--version", published.name[:12]).returncode == 0


def test_compressed_archive_says_how(there: Host) -> None:
    import gzip

    result = there.run("import", "-", input=gzip.compress(tar(whole())))
    assert result.returncode == 65
    assert b"gzip -dc FILE | vllmctl store import -" in result.stderr


def test_file_that_is_not_there_is_the_command_lines_fault(there: Host, tmp_path: Path) -> None:
    assert there.run("import", tmp_path / "none.tar").returncode == 64
    assert there.run("import", tmp_path).returncode == 64


def test_model_that_does_not_fit_is_74_before_the_first_byte(there: Host) -> None:
    result = there.run("import", "-", input=tar(whole(files=entries(size=1 << 48)))[:4096])
    assert result.returncode == 74, result.stderr
    assert b"281.5 TB" in result.stderr
    assert there.is_clean()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_import_that_is_ended_leaves_no_half_model(here: Host, there: Host, number: signal.Signals) -> None:
    publishing.publish_version(here.store, 1, size=3_000_000)
    data = here.run("export", "acme/Tiny").stdout
    with subprocess.Popen(there.command("import", "-"), stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as importer:
        assert importer.stdin is not None
        importer.stdin.write(data[:2_500_000])
        importer.stdin.flush()
        staging = there.store / ".staging"
        procs.wait_until("it writes", lambda: any(path.stat().st_size > 1_000_000 for path in staging.glob("import.*/files/*")))
        importer.send_signal(number)
        importer.stdin.close()
        importer.wait(20)
    assert directories(there.store) == []
    if number != signal.SIGKILL:
        assert there.is_clean()
    assert there.run("import", "-", input=data).returncode == 0
    assert list(staging.iterdir()) == []


def test_import_says_a_waiting_resolver_how_far_it_is(here: Host, there: Host) -> None:
    publishing.publish_version(here.store, 1, size=3_000_000)
    data = here.run("export", "acme/Tiny").stdout
    with subprocess.Popen(there.command("import", "-"), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as importer:
        assert importer.stdin is not None
        importer.stdin.write(data[:2_500_000])
        importer.stdin.flush()
        locks = there.store / ".locks"
        procs.wait_until("it says so", lambda: any(b"imported" in path.read_bytes() for path in locks.glob("*.lock")))
        importer.stdin.write(data[2_500_000:])
        importer.stdin.close()
        assert importer.wait(20) == 0


def test_import_needs_little_memory_whatever_the_model_is(here: Host, there: Host, tmp_path: Path) -> None:
    directory = demo.make(here.store / "Mine")
    with (directory / "extra.bin.txt").open("wb") as file:
        file.truncate(300 << 20)
    assert here.run("export", "Mine", "-o", tmp_path / "model.tar").returncode == 0
    # Not ru_maxrss: that of a child begins with what its parent, all of pytest, had when it forked.
    program = "import re; from vllmd.ctl import main; assert main() == 0; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    argv = there.command("import", tmp_path / "model.tar")
    done = subprocess.run([*argv[:2], program, *argv[3:]], capture_output=True, text=True, check=True, timeout=60, stdin=subprocess.DEVNULL)
    assert int(done.stdout.split()[-1]) < 100 << 10, "KiB"
