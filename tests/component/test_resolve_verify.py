"""Every byte: sums that a model brings, its manifest, and what is remembered of both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny_models
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.errors import ModelInvalid
from vllmd.models import demo, hashing, reading, sums
from vllmd.models.identity import label
from vllmd.models.progress import Progress
from vllmd.models.resolve import resolve, verified

pytestmark = pytest.mark.component

SHARD2 = "model-00002-of-00002.safetensors"
HEADERS = tiny_models.settings(warm_up="off")
FULL = tiny_models.settings(verify="sha256")
REMEMBERING = tiny_models.settings(verify="sha256", cache_integrity_hash=True)
REMEMBERING_SUMS = tiny_models.settings(warm_up="off", cache_integrity_hash=True)


class Check:
    """Resolves and verifies acme/Tiny in a store; remembers what was told and which files were hashed."""

    def __init__(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.request: ModelRequest = tiny_models.request(store)
        self.told: list[Progress] = []
        self.hashed: dict[str, frozenset[str]] = {}
        monkeypatch.setattr(reading, "hash_files", self._hash_files)

    def _hash_files(self, directory: Path, wanted: Any, report: Callable[[int, int], None], manner: hashing.Manner) -> Any:
        self.hashed = {file.name: algorithms for file, algorithms in wanted.items()}
        return hashing.hash_files(directory, wanted, report, manner)

    def __call__(self, settings: Model) -> str:
        self.hashed = {}
        model = resolve(self.request, settings, {}, self.told.append)
        return verified(model, self.request, settings, self.told.append).manifest_sha256

    @property
    def manifest(self) -> Path:
        return self.request.store / ".manifests" / f"{label(self.request)}.json"

    @property
    def text(self) -> str:
        return "\n".join(event.text for event in self.told)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    return Check(tmp_path, monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return demo.make(tmp_path / "Tiny")


def flip(path: Path) -> None:
    """One byte of the tensors, the times put back: what no header and no `ls -l` shows."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_sums(model: Path, form: str = "{sum}  {name}", **changes: str) -> None:
    lines = [
        form.format(sum=changes.get(path.stem) or hashlib.sha256(path.read_bytes()).hexdigest(), name=path.name)
        for path in sorted(model.glob("*.safetensors"))
    ]
    (model / "sha256sums.txt").write_text("\n".join(lines) + "\n")


def test_nothing_is_hashed_unless_asked(check: Check, model: Path) -> None:
    assert check(HEADERS) == ""
    assert not check.hashed
    assert not check.manifest.exists()


def test_first_time_makes_the_manifest_beside_the_store(check: Check, model: Path) -> None:
    before = tiny_models.tree(model)
    name = check(FULL)
    document = json.loads(check.manifest.read_text())
    record = document["files"][SHARD2]
    content = (model / SHARD2).read_bytes()
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert (record["size"], record["inode"]) == (len(content), (model / SHARD2).stat().st_ino)
    assert len(record["blake3"]) == 64
    assert (document["source"], document["directory"]) == ("local", str(model))
    assert tiny_models.tree(model) == before
    assert check(FULL) == name


def test_flipped_byte_is_noticed_at_the_next_start(check: Check, model: Path) -> None:
    check(FULL)
    flip(model / SHARD2)
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: differs from the manifest") as caught:
        check(FULL)
    assert f"rm {check.manifest}" in caught.value.hint
    with pytest.raises(ModelInvalid):
        check(REMEMBERING)


def test_every_byte_is_read_each_time_unless_remembering(check: Check, model: Path) -> None:
    check(FULL)
    check(FULL)
    assert check.hashed[SHARD2] == {"blake3"}
    check(REMEMBERING)
    assert not check.hashed
    (model / SHARD2).touch()
    name = check(REMEMBERING)
    assert list(check.hashed) == [SHARD2]
    assert check(REMEMBERING) == name
    assert not check.hashed


@pytest.mark.parametrize("change", ["add", "remove"])
def test_file_that_came_or_went_is_a_difference(check: Check, model: Path, change: str) -> None:
    check(FULL)
    if change == "add":
        (model / "modeling.py").write_text("evil")
    else:
        (model / "generation_config.json").unlink()
    with pytest.raises(ModelInvalid, match="1 differences"):
        check(FULL)


def test_removed_manifest_accepts_the_model_anew(check: Check, model: Path) -> None:
    check(FULL)
    flip(model / SHARD2)
    check.manifest.unlink()
    check(FULL)
    assert "first verification" in check.text


def test_damaged_manifest_is_made_anew_with_a_warning(check: Check, model: Path) -> None:
    check(FULL)
    for damage in ("", "{", "[]", '{"schema":1}', "[" * 100_000, '{"schema":1,"files":{"a":3}}', "\0"):
        check.manifest.write_text(damage)
        check.told.clear()
        assert check(FULL)
        assert f"{check.manifest} is damaged" in check.text


@given(st.binary(max_size=300))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_manifest_cut_anywhere_is_no_traceback(check: Check, model: Path, noise: bytes) -> None:
    check(FULL)
    whole = check.manifest.read_bytes()
    check.manifest.write_bytes(whole[: len(noise) * 7 % len(whole)] + noise)
    assert check(FULL)


def test_manifest_that_is_a_link_is_not_followed(check: Check, model: Path, tmp_path: Path) -> None:
    check(FULL)
    check.manifest.rename(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    check.manifest.symlink_to(tmp_path / "victim")
    assert check(FULL)
    assert (tmp_path / "victim").read_bytes() == before
    assert not check.manifest.is_symlink()


def test_manifest_of_another_directory_is_not_this_ones(check: Check, model: Path, tmp_path: Path) -> None:
    name = check(FULL)
    other = demo.make(tmp_path / "other", shards=3)
    model.rename(tmp_path / "moved")
    (tmp_path / "Tiny").symlink_to(other)
    assert check(FULL) != name


def test_place_for_the_manifest_that_cannot_be_written_is_only_said(check: Check, model: Path, tmp_path: Path) -> None:
    (tmp_path / ".manifests").write_text("in the way")
    assert check(FULL)
    assert "cannot be remembered" in check.text


@pytest.mark.parametrize("form", ["{sum}  {name}", "{sum} *{name}", "{sum}  ./{name}", "{sum}  {name}\r\n"])
def test_sums_that_the_model_brings_are_always_checked(check: Check, model: Path, form: str) -> None:
    write_sums(model, form)
    assert check(HEADERS) == ""
    assert check.hashed[SHARD2] == {"sha256"}
    flip(model / SHARD2)
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: its SHA-256 is "):
        check(HEADERS)
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: its SHA-256 is "):
        check(FULL)
    assert check(tiny_models.settings(skip_integrity_check=True)) == ""


def test_file_that_the_sums_name_must_be_there(check: Check, model: Path) -> None:
    (model / "sha256sums.txt").write_text(f"{'0' * 64}  absent.safetensors\n")
    with pytest.raises(ModelInvalid, match=r"1 files are missing: absent\.safetensors"):
        check(HEADERS)


@pytest.mark.parametrize("text", ["", "\n\n", "abc", f"{'0' * 63}  x", f"{'0' * 64}  ../x", f"{'0' * 64}  /etc/passwd", f"{'0' * 64} x"])
def test_sums_that_say_nonsense_are_refused(check: Check, model: Path, text: str) -> None:
    (model / "sha256sums.txt").write_text(text)
    with pytest.raises(ModelInvalid, match=r"sha256sums\.txt"):
        check(HEADERS)


def test_checked_sums_are_remembered_on_request_beside_the_store(check: Check, model: Path) -> None:
    write_sums(model)
    before = tiny_models.tree(model)
    remembering = REMEMBERING_SUMS
    check(remembering)
    assert check.hashed
    check(remembering)
    assert not check.hashed
    assert tiny_models.tree(model) == before
    check(HEADERS)
    assert check.hashed
    flip(model / SHARD2)
    with pytest.raises(ModelInvalid):
        check(remembering)


@pytest.mark.parametrize("remembering", [REMEMBERING_SUMS, REMEMBERING])
def test_remembered_sum_that_is_not_the_expected_one_any_more(check: Check, model: Path, remembering: Model) -> None:
    write_sums(model)
    check(remembering)
    (model / "sha256sums.txt").write_text(f"{'0' * 64}  {SHARD2}\n")
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: its SHA-256 is "):
        check(remembering)


def test_cache_of_the_existing_tools_is_believed_on_request(check: Check, model: Path) -> None:
    write_sums(model)
    lines = ["# schema=2"]
    for path in model.glob("*.safetensors"):
        lines.append(f"{path.name} {int(path.stat().st_mtime)} {path.stat().st_size} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    (model / ".vllm-integrity-cache").write_text("\n".join(lines) + "\n")
    check(REMEMBERING_SUMS)
    assert not check.hashed
    (model / ".vllm-integrity-cache").write_text("\n".join(["# schema=1", *lines[1:]]))
    check(REMEMBERING_SUMS)
    assert check.hashed


@given(st.text(max_size=300))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cache_of_sums_is_read_without_a_traceback(tmp_path: Path, noise: str) -> None:
    (tmp_path / sums.CACHE_FILE).write_text("# schema=2\n" + noise, encoding="utf-8")
    sums.read_cache(tmp_path)


def test_blob_of_a_hub_cache_must_have_the_sum_that_names_it(check: Check, tmp_path: Path) -> None:
    snapshot = tiny_models.snapshot(tmp_path / "hub", "acme/Tiny", "c1", main=True)
    link = snapshot / SHARD2
    blob = link.resolve()
    right = blob.with_name(hashlib.sha256(blob.read_bytes()).hexdigest())
    blob.rename(right)
    link.unlink()
    link.symlink_to(f"../../blobs/{right.name}")
    check(FULL)
    check.manifest.unlink()
    flip(right)
    with pytest.raises(ModelInvalid, match=f"{SHARD2}: its SHA-256 is "):
        check(FULL)


def test_progress_counts_bytes_up_to_the_total(check: Check, model: Path) -> None:
    check(FULL)
    last = [event for event in check.told if event.phase == "verify" and event.total_bytes][-1]
    assert last.done_bytes == last.total_bytes == sum(path.stat().st_size for path in model.iterdir())


def test_model_that_changes_while_it_is_verified(check: Check, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(directory: Path, wanted: Any, report: Callable[[int, int], None], manner: hashing.Manner) -> Any:
        (directory / "late.json").write_text("{}")
        return hashing.hash_files(directory, wanted, report, manner)

    monkeypatch.setattr(reading, "hash_files", changing)
    with pytest.raises(ModelInvalid, match="was changed while it was verified"):
        check(FULL)


def test_failing_disk_ends_the_hashing_at_once(tmp_path: Path, model: Path) -> None:
    from vllmd.models.inventory import take

    wanted = {file: frozenset({"sha256"}) for file in take(model).files.values()}
    (model / SHARD2).unlink()
    with pytest.raises(ModelInvalid, match=SHARD2):
        hashing.hash_files(model, wanted, lambda done, total: None)
