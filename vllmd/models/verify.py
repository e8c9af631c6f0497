"""Verifies a model's bytes, after its headers: against the sums it brings, and against its manifest.

One flipped byte in the tensors is noticed by no engine: the server becomes ready and serves nonsense. It is slower than
all other checks, so the daemon lets the engine load meanwhile, and says READY only when this is done too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.models import manifest, sums, warmup, weights
from vllmd.models.hashing import Digest, Manner
from vllmd.models.identity import label
from vllmd.models.inventory import Inventory, ModelFile, invalid, is_snapshot, take
from vllmd.models.ioerrors import explained
from vllmd.models.manifest import Manifest, Record
from vllmd.models.progress import Progress
from vllmd.models.published import manifest_of
from vllmd.models.reading import read
from vllmd.models.verify_version import verify_version
from vllmd.models.warmup import POLITE_S, Decision

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
        if file.name in self.remembered and self.remembered[file.name].is_of(file):
            record = self.remembered[file.name]
            is_full = bool(record.sha256)
            return is_full and self.sha256.get(file.name, "") in ("", record.sha256)
        return self.is_listed(file)

    def remembers(self, file: ModelFile) -> bool:
        """Whether its BLAKE3 is known of the very file, unchanged, and nobody says another SHA-256 than was seen with it."""
        record = self.remembered.get(file.name)
        if record is None or not record.blake3 or not record.is_of(file):
            return False
        return self.sha256.get(file.name, "") in ("", record.sha256)

    def is_listed(self, file: ModelFile) -> bool:
        """Whether the existing tools checked it."""
        expected = self.sha256.get(file.name, "")
        return bool(expected) and self.checked.get(file.name) == sums.Checked(file.mtime_ns // 10**9, file.size, expected)


def verify(model: ResolvedModel, request: ModelRequest, settings: Model, report: Callable[[Progress], None]) -> str:
    """The manifest's SHA-256, or '' where nothing is known to be whole. ModelInvalid names the file that differs."""
    with explained(f"read {model.directory}"):
        contents = manifest_of(model.directory)
        must = settings.verify == "sha256"
        decision = _decision(model, settings, report, must=must)
        if contents is not None:
            return verify_version(model, contents, request, settings, decision, report) if decision.reads else ""
        brought = {} if settings.skip_integrity_check else sums.read(model.directory)
        if settings.require_sums and not settings.skip_integrity_check:
            _require_sums(model, brought)
        if must:
            return _verify_all(model, request, settings, brought, decision, report)
        if decision.reads:
            return _verify_remembered(model, request, settings, brought, decision, report)
        if brought:
            _verify_sums(model, request, settings, brought, decision, report)
        return ""


def _decision(model: ResolvedModel, settings: Model, report: Callable[[Progress], None], *, must: bool) -> Decision:
    mode = "off" if settings.skip_integrity_check else settings.warm_up
    decision = warmup.decide(mode, warmup.network_of(model.directory), model.bytes, warmup.free_bytes(), must=must)
    if decision.why:
        report(Progress("verify", model.via, text=f"{model.directory}: {decision.why}", level="info"))
    return decision


def _require_sums(model: ResolvedModel, brought: Mapping[str, str]) -> None:
    inventory = take(model.directory)
    spoken = brought.keys() | _blob_names(inventory).keys()
    bare = sorted(name for name in inventory.files if weights.is_weight(name) and name not in spoken)
    if bare:
        hint = "Put a sha256sums.txt beside them (sha256sum * >sha256sums.txt), or unset model.require_sums."
        raise invalid(model.directory, f"no sum speaks for {weights.first_five(bare)}", hint, "sums_missing")


def _verify_remembered(
    model: ResolvedModel, request: ModelRequest, settings: Model, brought: dict[str, str], decision: Decision, report: Callable[[Progress], None]
) -> str:
    """Against what the bytes were when they were first seen. A file that has other times or another size was changed on purpose
    and is taken anew, with a notice; one that has the same and other bytes is damaged."""
    tell = _warner(model, report, "info")
    path = manifest.path_of(request.store, label(request))
    before = manifest.load(path, model.directory, tell)
    inventory = take(model.directory)
    expected = _blob_names(inventory) | brought
    old = before.files if before else {}
    known = _Known(expected, before, old if settings.cache_integrity_hash else {}, _checked(model, settings))
    untouched = {name for name, record in old.items() if name in inventory.files and _is_untouched(record, inventory.files[name])}

    def wanted(file: ModelFile) -> frozenset[str]:
        if known.remembers(file):
            return frozenset()
        record = old[file.name] if file.name in untouched else None
        is_spoken_for = file.name not in expected or known.is_listed(file) or (record is not None and record.sha256 == expected[file.name])
        return frozenset({"blake3"} if is_spoken_for else {"blake3", "sha256"})

    def judge(name: str, digest: Digest) -> None:
        _compare_sum(inventory, expected, name, digest)
        if digest.blake3 and name in untouched and digest.blake3 != old[name].blake3:
            hint = f"{CORRUPT_HINT} If you changed it on purpose, with its times put back: rm {path}."
            raise invalid(inventory.directory / name, f"differs from the manifest {path}, and nobody wrote to it", hint, "model_changed")

    _require_listed(inventory, expected)
    digests = read(inventory, {file: wanted(file) for file in inventory.files.values()}, model.via, report, Manner(decision.drops, POLITE_S, judge))
    records = {name: _merged(file, digests[name], old.get(name), brought) for name, file in inventory.files.items()}
    after = _manifest(model, records)
    changed = sorted(name for name in old.keys() | records.keys() if _content(old.get(name)) != _content(records.get(name)))
    if before is not None and changed:
        what = f"{model.directory} was changed since the last start ({len(changed)} differences: {weights.first_five(changed)})"
        _warner(model, report, "warning")(f"{what}: its bytes are what they must be from now on")
    if before != after:
        manifest.save(path, after, tell)
    return ""


def _is_untouched(record: Record, file: ModelFile) -> bool:
    """The change time is left out: permissions and hard links change it, and so does a damage with the times put back."""
    return bool(record.blake3) and (record.size, record.mtime_ns, record.inode) == (file.size, file.mtime_ns, file.inode)


def _content(record: Record | None) -> tuple[int, str] | None:
    return (record.size, record.blake3) if record else None


def _verify_sums(
    model: ResolvedModel, request: ModelRequest, settings: Model, brought: dict[str, str], decision: Decision, report: Callable[[Progress], None]
) -> None:
    warn = _warner(model, report)
    path = manifest.path_of(request.store, label(request), ".sums")
    remembered = manifest.load(path, model.directory, warn) if settings.cache_integrity_hash else None
    inventory = take(model.directory)
    known = _Known(brought, None, remembered.files if remembered else {}, _checked(model, settings))
    files = [file for name, file in inventory.files.items() if name in brought]
    _require_listed(inventory, brought)
    wanted = {file: frozenset({"sha256"}) for file in files if not known.is_done(file)}
    digests = _read(model, inventory, wanted, brought, decision, report)
    if settings.cache_integrity_hash and digests:
        records = {file.name: _record(file, Digest(sha256=brought[file.name])) for file in files}
        manifest.save(path, _manifest(model, records), warn)


def _verify_all(
    model: ResolvedModel, request: ModelRequest, settings: Model, brought: dict[str, str], decision: Decision, report: Callable[[Progress], None]
) -> str:
    warn = _warner(model, report)
    path = manifest.path_of(request.store, label(request))
    before = manifest.load(path, model.directory, warn)
    inventory = take(model.directory)
    expected = _blob_names(inventory) | brought
    remembered = before.files if before and settings.cache_integrity_hash else {}
    known = _Known(expected, before, remembered, {})
    wanted = {file: _algorithms(known, file) for file in inventory.files.values() if not known.is_done(file)}
    _require_listed(inventory, expected)
    digests = _read(model, inventory, wanted, expected, decision, report)
    if before:
        _compare_manifest(inventory, before, path, digests)
    old = before.files if before else {}
    records = {name: _merged(file, digests.get(name), old.get(name), {}) for name, file in inventory.files.items()}
    after = _manifest(model, records)
    if before is None:
        warn(f"first verification of {model.directory}: its bytes are what they must be from now on ({path})")
    if before != after:
        manifest.save(path, after, warn)
    return after.sha256


def _algorithms(known: _Known, file: ModelFile) -> frozenset[str]:
    """BLAKE3 is twice as fast, so SHA-256 is computed only where there is nothing else to compare with."""
    record = known.before.files.get(file.name) if known.before else None
    is_whole = record is not None and bool(record.sha256) and bool(record.blake3)
    return frozenset({"blake3"} if is_whole and file.name not in known.sha256 else {"blake3", "sha256"})


def _read(
    model: ResolvedModel,
    inventory: Inventory,
    wanted: Mapping[ModelFile, frozenset[str]],
    expected: Mapping[str, str],
    decision: Decision,
    report: Callable[[Progress], None],
) -> dict[str, Digest]:
    def judge(name: str, digest: Digest) -> None:
        _compare_sum(inventory, expected, name, digest)

    return read(inventory, wanted, model.via, report, Manner(decision.drops, POLITE_S, judge))


def _require_listed(inventory: Inventory, expected: Mapping[str, str]) -> None:
    missing = sorted(name for name in expected if name not in inventory.files)
    if missing:
        reason = f"{len(missing)} files are missing: {weights.first_five(missing)}"
        raise invalid(inventory.directory / sums.SUMS_FILE, reason, code="model_incomplete")


def _compare_sum(inventory: Inventory, expected: Mapping[str, str], name: str, digest: Digest) -> None:
    if digest.sha256 and digest.sha256 != expected.get(name, digest.sha256):
        reason = f"its SHA-256 is {digest.sha256} and not {expected[name]}"
        raise invalid(inventory.directory / name, reason, CORRUPT_HINT, "model_corrupt")


def _compare_manifest(inventory: Inventory, before: Manifest, path: Path, digests: Mapping[str, Digest]) -> None:
    changed = [name for name, digest in digests.items() if name in before.files and before.files[name].blake3 not in ("", digest.blake3)]
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


def _merged(file: ModelFile, digest: Digest | None, old: Record | None, brought: Mapping[str, str]) -> Record:
    """What was computed now, and what is still true of what was known: SHA-256 as long as BLAKE3 is the same."""
    if digest is None or not digest.blake3:
        return _record(file, Digest(old.sha256, old.blake3) if old else Digest())
    is_same = old is not None and old.blake3 == digest.blake3
    sha256 = digest.sha256 or (old.sha256 if old is not None and is_same else "") or brought.get(file.name, "")
    return _record(file, Digest(sha256, digest.blake3))


def _record(file: ModelFile, digest: Digest) -> Record:
    return Record(file.size, file.mtime_ns, file.ctime_ns, file.inode, digest.sha256, digest.blake3)


def _manifest(model: ResolvedModel, records: dict[str, Record]) -> Manifest:
    return Manifest(model.identity, str(model.directory), model.via, model.revision, records)


def _warner(model: ResolvedModel, report: Callable[[Progress], None], level: str = "") -> Callable[[str], None]:
    return lambda text: report(Progress("verify", model.via, text=text, level=level))
