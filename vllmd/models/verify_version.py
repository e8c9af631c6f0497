"""Verifies a published version against its own manifest. Its sums by others were compared when it was fetched: BLAKE3 will do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.errors import ModelInvalid, VllmdError
from vllmd.models import manifest
from vllmd.models.contents import Contents
from vllmd.models.hashing import Digest, Manner
from vllmd.models.identity import label
from vllmd.models.inventory import Inventory, invalid, take
from vllmd.models.ioerrors import translated
from vllmd.models.manifest import Manifest, Record
from vllmd.models.progress import Progress
from vllmd.models.published import mark_damaged
from vllmd.models.reading import Report, read
from vllmd.models.warmup import POLITE_S, Decision

HINT = "Its bytes changed on the disk. Start again: this file is fetched anew, if a source that has it can be reached."


def verify_version(
    model: ResolvedModel, contents: Contents, request: ModelRequest, settings: Model, decision: Decision, report: Report
) -> str:
    """The manifest's SHA-256. ModelInvalid names the first file that differs; the version is marked: it is not offered until that
    file was fetched anew."""

    def tell(text: str) -> None:
        report(Progress("verify", model.via, text=text, level="warning"))

    inventory = take(model.directory)
    for name, entry in contents.files.items():
        if name not in inventory.files or inventory.files[name].size != entry.size:
            raise _wrong(model.directory, name, f"is missing, or has not the {entry.size} bytes of the manifest", tell)

    def judge(name: str, digest: Digest) -> None:
        if digest.blake3 and digest.blake3 != contents.files[name].blake3:
            raise _wrong(model.directory, name, f"its BLAKE3 is {digest.blake3}, in the manifest {contents.files[name].blake3}", tell)

    path = manifest.path_of(request.store, label(request), ".sums")
    known = manifest.load(path, model.directory, tell) if settings.cache_integrity_hash else None
    remembered = {name: record for name, record in known.files.items() if name in contents.files} if known else {}
    files = [inventory.files[name] for name in contents.files]
    done = {file.name for file in files if file.name in remembered and _is_done(remembered[file.name], inventory, contents, file.name)}
    wanted = {file: frozenset(() if file.name in done else {"blake3"}) for file in files}
    if len(done) < len(files) or settings.warm_up != "off":
        read(inventory, wanted, model.via, report, Manner(decision.drops, POLITE_S, judge))
    if settings.cache_integrity_hash and len(done) < len(files):
        records = {name: _record(inventory, contents, name) for name in contents.files}
        manifest.save(path, Manifest(model.identity, str(model.directory), model.via, model.revision, records), tell)
    return contents.sha256


def _is_done(record: Record, inventory: Inventory, contents: Contents, name: str) -> bool:
    return record.is_of(inventory.files[name]) and record.blake3 == contents.files[name].blake3


def _record(inventory: Inventory, contents: Contents, name: str) -> Record:
    file, entry = inventory.files[name], contents.files[name]
    return Record(file.size, file.mtime_ns, file.ctime_ns, file.inode, entry.sha256, entry.blake3)


def _wrong(directory: Path, name: str, reason: str, tell: Callable[[str], None]) -> ModelInvalid:
    try:
        mark_damaged(directory, [name])
    except (OSError, VllmdError) as error:
        why = translated(error, f"mark {directory} as damaged").what if isinstance(error, OSError) else error.what
        tell(f"{directory / name} is wrong, and that cannot be remembered: {why}")
    return invalid(directory / name, reason, HINT, "model_corrupt")
