"""Verifies a model's bytes, after its headers: against the sums it brings, and (verify: sha256) against its manifest.

One flipped byte in the tensors is noticed by no engine: the server becomes ready and serves nonsense. It is slower than
all other checks, so the daemon lets the engine load meanwhile, and says READY only when this is done too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.core.plan import ModelRequest, ResolvedModel
from vllmd.models import manifest, sums, weights
from vllmd.models.hashing import Digest, hash_files
from vllmd.models.identity import label
from vllmd.models.inventory import Inventory, ModelFile, invalid, is_snapshot, take
from vllmd.models.ioerrors import explained
from vllmd.models.manifest import Manifest, Record
from vllmd.models.wire import Progress

CORRUPT_HINT = "Its bytes changed on the disk or on the way: fetch the model again."


@dataclass(frozen=True, slots=True)
class _Known:
    """What the bytes are compared with. `sha256` are sums by others, `before` our own manifest (None: first time)."""

    sha256: Mapping[str, str]
    before: Manifest | None
    remembered: Mapping[str, Record]
    checked: Mapping[str, sums.Checked]

    def is_done(self, file: ModelFile) -> bool:
        """Whether the very file, unchanged, was verified before."""
        expected = self.sha256.get(file.name, "")
        record = self.remembered.get(file.name)
        if record is not None and record.is_of(file):
            return expected in ("", record.sha256)
        line = self.checked.get(file.name)
        return bool(expected) and line == sums.Checked(file.mtime_ns // 10**9, file.size, expected)


def verify(model: ResolvedModel, request: ModelRequest, settings: Model, report: Callable[[Progress], None]) -> str:
    """The manifest's SHA-256, or '' where nothing is asked to be hashed. ModelInvalid names the file that differs."""
    with explained(f"read {model.directory}"):
        brought = {} if settings.skip_integrity_check else sums.read(model.directory)
        if settings.verify == "sha256":
            return _verify_all(model, request, settings, brought, report)
        if brought:
            _verify_sums(model, request, settings, brought, report)
        return ""


def _verify_sums(
    model: ResolvedModel, request: ModelRequest, settings: Model, brought: dict[str, str], report: Callable[[Progress], None]
) -> None:
    warn = _warner(model, report)
    path = manifest.path_of(request.store, label(request), ".sums")
    remembered = manifest.load(path, model.directory, warn) if settings.cache_integrity_hash else None
    inventory = take(model.directory)
    known = _Known(brought, None, remembered.files if remembered else {}, _checked(model, settings))
    files = [file for name, file in inventory.files.items() if name in brought]
    digests = _hash(model, inventory, {file: frozenset({"sha256"}) for file in files if not known.is_done(file)}, report)
    _compare(inventory, brought, None, digests)
    if settings.cache_integrity_hash and digests:
        records = {file.name: _record(file, Digest(sha256=brought[file.name])) for file in files}
        manifest.save(path, _manifest(model, records), warn)


def _verify_all(
    model: ResolvedModel, request: ModelRequest, settings: Model, brought: dict[str, str], report: Callable[[Progress], None]
) -> str:
    warn = _warner(model, report)
    path = manifest.path_of(request.store, label(request))
    before = manifest.load(path, model.directory, warn)
    inventory = take(model.directory)
    expected = _blob_names(inventory) | brought
    remembered = before.files if before and settings.cache_integrity_hash else {}
    known = _Known(expected, before, remembered, {})
    wanted = {file: _algorithms(known, file) for file in inventory.files.values() if not known.is_done(file)}
    digests = _hash(model, inventory, wanted, report)
    _compare(inventory, expected, (before, path) if before else None, digests)
    old = before.files if before else {}
    records = {name: _merged(file, digests.get(name), old.get(name)) for name, file in inventory.files.items()}
    after = _manifest(model, records)
    if before is None:
        warn(f"first verification of {model.directory}: its bytes are what they must be from now on ({path})")
    if before != after:
        manifest.save(path, after, warn)
    return after.sha256


def _algorithms(known: _Known, file: ModelFile) -> frozenset[str]:
    """BLAKE3 is twice as fast, so SHA-256 is computed only where there is nothing else to compare with."""
    is_new = known.before is None or file.name not in known.before.files
    return frozenset({"blake3", "sha256"} if is_new or file.name in known.sha256 else {"blake3"})


def _hash(
    model: ResolvedModel, inventory: Inventory, wanted: dict[ModelFile, frozenset[str]], report: Callable[[Progress], None]
) -> dict[str, Digest]:
    def said(done: int, total: int) -> None:
        report(Progress("verify", model.via, done, total, f"verifying {done / 1e9:.1f} of {total / 1e9:.1f} GB"))

    digests = hash_files(inventory.directory, wanted, said)
    if take(inventory.directory).files != inventory.files:
        raise invalid(inventory.directory, "was changed while it was verified", "Wait until it is complete, then start again.")
    return digests


def _compare(
    inventory: Inventory, expected: Mapping[str, str], before: tuple[Manifest, Path] | None, digests: Mapping[str, Digest]
) -> None:
    missing = sorted(name for name in expected if name not in inventory.files)
    if missing:
        reason = f"{len(missing)} files are missing: {weights.first_five(missing)}"
        raise invalid(inventory.directory / sums.SUMS_FILE, reason, code="model_incomplete")
    wrong = sorted(name for name, digest in digests.items() if digest.sha256 and digest.sha256 != expected.get(name, digest.sha256))
    if wrong:
        reason = f"its SHA-256 is {digests[wrong[0]].sha256} and not {expected[wrong[0]]}"
        raise invalid(inventory.directory / wrong[0], reason, CORRUPT_HINT, "model_corrupt")
    if before:
        _compare_manifest(inventory, *before, digests)


def _compare_manifest(inventory: Inventory, before: Manifest, path: Path, digests: Mapping[str, Digest]) -> None:
    changed = [name for name, digest in digests.items() if name in before.files and digest.blake3 != before.files[name].blake3]
    differing = sorted({*changed, *(before.files.keys() ^ inventory.files.keys())})
    if differing:
        place = inventory.directory / differing[0]
        kind = "differs from" if differing[0] in changed else "is missing from" if place.exists() else "is in"
        hint = f"If you changed the model on purpose: rm {path}. {CORRUPT_HINT}"
        reason = f"{kind} the manifest {path} ({len(differing)} differences: {weights.first_five(differing)})"
        raise invalid(place, reason, hint, "model_changed")


def _blob_names(inventory: Inventory) -> dict[str, str]:
    """A hub cache names a large file's blob by its SHA-256: a download that is wrong is seen even the first time."""
    if not is_snapshot(inventory.directory):
        return {}
    links = {name: inventory.directory / name for name in inventory.files if (inventory.directory / name).is_symlink()}
    targets = {name: link.readlink().name for name, link in links.items()}
    return {name: target for name, target in targets.items() if re.fullmatch("[0-9a-f]{64}", target)}


def _checked(model: ResolvedModel, settings: Model) -> Mapping[str, sums.Checked]:
    return sums.read_cache(model.directory) if settings.cache_integrity_hash else {}


def _merged(file: ModelFile, digest: Digest | None, old: Record | None) -> Record:
    sha256 = (digest.sha256 if digest else "") or (old.sha256 if old else "")
    return _record(file, Digest(sha256, digest.blake3 if digest else old.blake3 if old else ""))


def _record(file: ModelFile, digest: Digest) -> Record:
    return Record(file.size, file.mtime_ns, file.ctime_ns, file.inode, digest.sha256, digest.blake3)


def _manifest(model: ResolvedModel, records: dict[str, Record]) -> Manifest:
    return Manifest(model.identity, str(model.directory), model.via, model.revision, records)


def _warner(model: ResolvedModel, report: Callable[[Progress], None]) -> Callable[[str], None]:
    return lambda text: report(Progress("verify", model.via, text=text))
