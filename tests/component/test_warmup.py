"""The pass over every byte while the engine imports: what it compares with, what it does where something differs, and its bounds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny_models
from tests.component.daemons import ends, hold, quick, stop
from tests.component.test_resolve_verify import SHARD2, flip, write_sums
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.errors import ModelInvalid, VllmdError
from vllmd.models import demo, hashing, publish, warmup, wire
from vllmd.models.contents import Contents, Entry
from vllmd.models.hashing import Digest, Manner, hash_files
from vllmd.models.identity import label
from vllmd.models.inventory import ModelFile, take
from vllmd.models.lock import private_directory
from vllmd.models.progress import Progress
from vllmd.models.resolve import resolve
from vllmd.models.verify import verify

pytestmark = pytest.mark.component

AUTO = tiny_models.settings()


def published(store: Path, asked: ModelRequest) -> Path:
    """The tiny model, as a fetch publishes it."""
    stage = demo.make(private_directory(private_directory(store, ".staging"), "files"))
    files = take(stage).files.values()
    sums = hash_files(stage, {file: frozenset({"sha256", "blake3"}) for file in files}, lambda done, total: None)
    entries = {file.name: Entry(file.size, sums[file.name].sha256, sums[file.name].blake3) for file in files}
    contents = Contents(asked.identity, "r2", "s3://b/m", "", "2026-01-01T00:00:00Z", entries)
    return publish.publish(store, asked, stage, contents, 2, lambda text: None)


class Start:
    """What a start does with the model before READY."""

    def __init__(self, store: Path) -> None:
        self.request = tiny_models.request(store)
        self.told: list[Progress] = []

    def __call__(self, settings: Model = AUTO) -> str:
        self.told.clear()
        model = resolve(self.request, settings, {}, self.told.append)
        return verify(model, self.request, settings, self.told.append)

    @property
    def kept(self) -> list[Progress]:
        return [event for event in self.told if event.level]

    @property
    def read_bytes(self) -> int:
        return max((event.done_bytes for event in self.told), default=0)

    @property
    def manifest(self) -> Path:
        return self.request.store / ".manifests" / f"{label(self.request)}.json"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return demo.make(tmp_path / "Tiny")


def test_published_version_that_is_sound_is_read_as_a_whole(start: Start, tmp_path: Path) -> None:
    directory = published(tmp_path, start.request)
    assert start() == directory.name
    assert start.read_bytes == take(directory).bytes
    assert not start.kept
    start(tiny_models.settings(warm_up="off"))
    assert start.read_bytes == 0


def test_flipped_byte_in_a_published_version_ends_the_child_and_marks_the_file(start: Start, tmp_path: Path) -> None:
    directory = published(tmp_path, start.request)
    flip(directory / SHARD2)
    child = subprocess.Popen([sys.executable, "-m", "vllmd.models.fetch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(wire.encode_request(start.request, AUTO))
        child.stdin.flush()
        events = [wire.decode_event(line) for line in child.stdout]
        assert child.wait(20) == 65
    assert any(isinstance(event, wire.Resolved) for event in events)
    failed = events[-1]
    assert isinstance(failed, wire.Failed)
    assert f"{SHARD2}: its BLAKE3 is " in failed.error.what
    assert publish.damaged(directory) == {SHARD2}
    with pytest.raises(VllmdError, match="was found damaged"):
        start()


def test_published_version_without_leave_to_mark_it_is_refused_all_the_same(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_directory: Path, _names: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("vllmd.models.verify_version.mark_damaged", refuse)
    directory = published(tmp_path, start.request)
    flip(directory / SHARD2)
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: its BLAKE3 is "):
        start()
    assert "cannot be remembered" in start.kept[0].text


def test_own_directory_is_remembered_at_the_first_start_and_compared_at_the_second(start: Start, own: Path) -> None:
    before = tiny_models.tree(own)
    start()
    record = json.loads(start.manifest.read_text())["files"][SHARD2]
    assert len(record["blake3"]) == 64
    assert record["sha256"] == ""
    assert tiny_models.tree(own) == before
    start()
    assert not start.kept
    flip(own / SHARD2)
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: differs from the manifest") as caught:
        start()
    assert f"rm {start.manifest}" in caught.value.hint
    start.manifest.unlink()
    start()


def test_own_directory_that_was_changed_on_purpose_is_taken_anew_with_a_notice(start: Start, own: Path) -> None:
    start()
    content = bytearray((own / SHARD2).read_bytes())
    content[-100] ^= 1
    (own / SHARD2).write_bytes(content)
    (own / "README.md").write_text("new")
    start()
    assert [event.level for event in start.kept] == ["warning"]
    assert "2 differences: README.md, " + SHARD2 in start.kept[0].text
    start()
    assert not start.kept
    (own / SHARD2).touch()
    start()
    assert not start.kept


def test_every_byte_on_request_is_stricter_and_completes_what_a_pass_remembered(start: Start, own: Path) -> None:
    full = tiny_models.settings(verify="sha256")
    start()
    start(full)
    record = json.loads(start.manifest.read_text())["files"][SHARD2]
    assert record["sha256"] == hashlib.sha256((own / SHARD2).read_bytes()).hexdigest()
    name = start(full)
    start()
    assert start(full) == name
    content = bytearray((own / SHARD2).read_bytes())
    content[-100] ^= 1
    (own / SHARD2).write_bytes(content)
    with pytest.raises(ModelInvalid, match="differs from the manifest"):
        start(full)


def test_sums_of_others_are_compared_at_the_first_start_too(start: Start, own: Path) -> None:
    write_sums(own)
    flip(own / SHARD2)
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: its SHA-256 is "):
        start()
    flip(own / SHARD2)
    start()
    start()
    (own / "sha256sums.txt").write_text(f"{'0' * 64}  {SHARD2}\n")
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: its SHA-256 is "):
        start()


@pytest.mark.parametrize("warm_up", ["auto", "off"])
def test_manifest_sha256_is_another_name_of_the_sums(start: Start, own: Path, warm_up: str) -> None:
    write_sums(own)
    sums = own / "sha256sums.txt"
    (own / "manifest.sha256").write_text("# meta: model=acme/Tiny\n" + sums.read_text())
    sums.unlink()
    start(tiny_models.settings(warm_up=warm_up, require_sums=True))
    flip(own / SHARD2)
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: (its SHA-256 is|differs from)"):
        start(tiny_models.settings(warm_up=warm_up))


def test_two_files_of_sums_that_disagree_are_refused(start: Start, own: Path) -> None:
    write_sums(own)
    (own / "manifest.sha256").write_text(f"{'0' * 64} *{SHARD2}\n")
    with pytest.raises(ModelInvalid, match="another sum"):
        start()


def test_weights_without_a_sum_are_refused_on_request(start: Start, own: Path) -> None:
    with pytest.raises(ModelInvalid, match="no sum speaks for model-00001") as caught:
        start(tiny_models.settings(require_sums=True))
    assert caught.value.code == "sums_missing"
    write_sums(own)
    start(tiny_models.settings(require_sums=True))


def test_what_was_verified_is_only_read_on_request(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = published(tmp_path, start.request)
    remembering = tiny_models.settings(cache_integrity_hash=True)
    start(remembering)
    made: list[str] = []
    new = hashing._new

    def noted(algorithm: str, cores: int) -> object:
        made.append(algorithm)
        return new(algorithm, cores)

    monkeypatch.setattr(hashing, "_new", noted)
    assert start(remembering) == directory.name
    assert made == []
    assert start.read_bytes == take(directory).bytes
    (directory / SHARD2).touch()
    start(remembering)
    assert made == ["blake3"]


GB = 10**9


@pytest.mark.parametrize(
    ("mode", "network", "size", "free", "must", "wanted"),
    [
        ("auto", "", 3 * GB, 10 * GB, False, (True, False)),
        ("auto", "", 10 * GB, 10 * GB, False, (False, True)),
        ("auto", "NFS", 3 * GB, 10 * GB, False, (False, False)),
        ("on", "NFS", 3 * GB, 10 * GB, False, (True, False)),
        ("on", "", 30 * GB, 10 * GB, False, (True, True)),
        ("off", "", 3 * GB, 10 * GB, False, (False, False)),
        ("off", "", 30 * GB, 10 * GB, True, (True, True)),
        ("auto", "Lustre", 3 * GB, 10 * GB, True, (True, False)),
    ],
)
def test_where_and_how_a_model_is_read(mode: str, network: str, size: int, free: int, must: bool, wanted: tuple[bool, bool]) -> None:
    decision = warmup.decide(mode, network, size, free, must=must)
    assert (decision.reads, decision.drops) == wanted
    assert bool(decision.why) == (mode == "auto" and not decision.reads)


def test_memory_that_is_free_is_the_least_of_machine_and_control_groups(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 100 kB\nMemAvailable:    8000 kB\n",
        "proc/self/cgroup": "0::/a.slice/b.service\n",
        "sys/fs/cgroup/a.slice/memory.max": "max\n",
        "sys/fs/cgroup/a.slice/b.service/memory.max": "max\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert warmup.free_bytes(tmp_path) == 8000 << 10
    group = tmp_path / "sys/fs/cgroup/a.slice"
    (group / "memory.high").write_text("5000000\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 400000\nactive_file 100000\n")
    assert warmup.free_bytes(tmp_path) == 2_500_000


def test_this_machine_is_read_from() -> None:
    assert warmup.network_of(Path("/dev/shm")) == ""
    assert warmup.NETWORK.keys() >= {0x6969, 0xFF534D42, 0x65735546}
    assert warmup.free_bytes() > 100 << 20


def test_model_larger_than_memory_is_said_and_only_its_headers_count(start: Start, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "free_bytes", lambda: 1000)
    start()
    assert "not verified, as 1.0 kB of memory are free" in start.kept[0].text
    assert start.read_bytes == 0
    start(tiny_models.settings(warm_up="on"))
    assert start.read_bytes == take(own).bytes


def noise(directory: Path, size: int) -> ModelFile:
    (directory / "x.bin").write_bytes(os.urandom(size))
    return take(directory).files["x.bin"]


@pytest.mark.parametrize("polite_s", [0.0, 0.01, 60.0])
def test_any_way_of_reading_gives_the_same_sums(tmp_path: Path, polite_s: float) -> None:
    for number, size in enumerate((0, 1, hashing.CHUNK_BYTES, 5 * hashing.CHUNK_BYTES + 7, 60 << 20)):
        (tmp_path / str(number)).write_bytes(os.urandom(1000) * (size // 1000) + bytes(size % 1000))
    wanted = {file: frozenset({"sha256", "blake3"}) for file in take(tmp_path).files.values()}
    seen: dict[str, Digest] = {}
    found = hash_files(tmp_path, wanted, lambda done, total: None, Manner(drops=True, polite_s=polite_s, judge=seen.__setitem__))
    from blake3 import blake3

    assert seen == found
    for file in wanted:
        content = (tmp_path / file.name).read_bytes()
        assert found[file.name] == Digest(hashlib.sha256(content).hexdigest(), blake3(content).hexdigest())


def test_polite_threads_hand_over_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nice: list[int] = []
    step = hashing._step

    def slow(*arguments: object) -> None:
        nice.append(os.getpriority(os.PRIO_PROCESS, 0))
        time.sleep(0.05)
        step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hashing, "_step", slow)
    monkeypatch.setattr(hashing, "REPORT_S", 0.05)
    file = noise(tmp_path, 10 * hashing.CHUNK_BYTES)
    hash_files(tmp_path, {file: frozenset({"blake3"})}, lambda done, total: None, Manner(polite_s=0.2))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert nice[0] == 19
    assert nice[-1] == own
    assert len(nice) == 10


def test_file_that_shrinks_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = noise(tmp_path, 4 * hashing.CHUNK_BYTES)
    step = hashing._step

    def shrinking(*arguments: object) -> None:
        step(*arguments)  # type: ignore[arg-type]
        os.truncate(tmp_path / "x.bin", hashing.CHUNK_BYTES)

    monkeypatch.setattr(hashing, "_step", shrinking)
    with pytest.raises(ModelInvalid, match=r"x\.bin: became shorter while it was read: \d+ of \d+ bytes"):
        hash_files(tmp_path, {file: frozenset({"blake3"})}, lambda done, total: None)


def test_what_is_dropped_does_not_stay_in_memory(tmp_path: Path) -> None:
    file = noise(tmp_path, 32 << 20)
    descriptor = os.open(tmp_path / "x.bin", os.O_RDONLY)
    os.fsync(descriptor)
    hash_files(tmp_path, {file: frozenset()}, lambda done, total: None)
    assert resident(descriptor, file.size) > 0.9
    hash_files(tmp_path, {file: frozenset({"blake3"})}, lambda done, total: None, Manner(drops=True))
    assert resident(descriptor, file.size) < 0.2
    os.close(descriptor)


def resident(descriptor: int, size: int) -> float:
    """The part of a file that is in the page cache."""
    import ctypes
    import mmap

    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        libc = ctypes.CDLL(None, use_errno=True)
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        first = ctypes.c_char.from_buffer(mapped)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages) == 0
        del first
        return sum(page & 1 for page in pages) / len(pages)


def test_child_ends_at_once_when_its_daemon_does_during_the_pass(start: Start, own: Path) -> None:
    with (own / "extra.safetensors.big").open("wb") as file:
        file.truncate(20 << 30)  # a hole: minutes of hashing, no disk
    settings = tiny_models.settings(verify="sha256")
    child = subprocess.Popen([sys.executable, "-m", "vllmd.models.fetch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(wire.encode_request(start.request, settings))
        child.stdin.flush()
        for line in child.stdout:
            event = wire.decode_event(line)
            if isinstance(event, Progress) and event.done_bytes and event.bytes_per_s and event.eta_s > 0:
                break
        began = time.monotonic()
        child.stdin.close()
        child.wait(10)
        assert time.monotonic() - began < 5  # not to the end of the download


def test_ready_waits_for_the_pass_and_a_flipped_byte_is_no_ready() -> None:
    instance = quick()
    gate = hold(instance, "verify")
    with instance:
        instance.wait_state("proven")
        assert "READY" not in {name for message in instance.notify.messages for name in message.fields}
        gate.touch()
        instance.wait_ready()
        stop(instance)
        flip(sorted((instance.root / "model-generate").glob("*.safetensors"))[-1])
        instance.start()
        error = ends(instance, 65, "model_changed", ready=False)
        assert "safetensors" in error["what"]


