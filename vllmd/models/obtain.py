"""From what a source offers to a published version, under the identity's lock:

    checked -> up to date? -> room? -> fetched into the stage, sums and all -> validated -> published by one rename

Whatever fails leaves what was published as it was, and in the stage what the next attempt can use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.errors import VllmdError
from vllmd.models import amounts, publish, space, sums, weights
from vllmd.models.beat import beating
from vllmd.models.contents import Contents, Entry, is_listed
from vllmd.models.download import Limits, download
from vllmd.models.fetchlog import FetchLog
from vllmd.models.hashing import Digest
from vllmd.models.identity import label
from vllmd.models.inventory import invalid
from vllmd.models.ioerrors import explained
from vllmd.models.listing import checked, refuse_pickles, selected
from vllmd.models.progress import Progress
from vllmd.models.remote import Listing, Transport, known_sums
from vllmd.models.retention import empty_trash
from vllmd.models.sources import Offered
from vllmd.models.stage import Stage
from vllmd.models.validate import checks_of, validate


@dataclass(frozen=True, slots=True)
class Errand:
    """What is to be brought, and whom to tell. `waiting` is shown to those who wait for the identity's lock."""

    source: str
    request: ModelRequest
    settings: Model
    environ: Mapping[str, str]
    report: Callable[[Progress], None]
    waiting: Callable[[str], None]

    def say(self, text: str, level: str = "info") -> None:
        self.report(Progress("fetch", self.source, text=text, level=level))


def obtain(errand: Errand, offered: Offered) -> ResolvedModel:
    """The published version that holds what is offered. SourceUnavailable where it is worth asking again; ModelInvalid,
    StorageFailed, PermissionMissing."""
    listing = selected(checked(offered.listing), errand.settings.exclude)
    if not listing.files:
        raise invalid(listing.origin, "has no file that an engine reads", _excluding(errand.settings), "model_incomplete")
    if not errand.settings.allow_pickle:
        refuse_pickles(listing)
    with explained(f"look into {errand.request.store}"):
        present = publish.current(errand.request.store, errand.request)
    if present is not None:
        directory, contents = present
        if is_listed(contents, listing) and not publish.damaged(directory):
            validate(directory, checks_of(errand.settings))
            errand.say(f"{errand.request.identity} is as {listing.origin} has it", level="")
            return _resolved(errand, directory, contents)
    return _fetched(errand, offered, listing)


def _excluding(settings: Model) -> str:
    return f"model.exclude (VLLMD_EXCLUDE) leaves out what matches {', '.join(settings.exclude)[:200]}: is that meant?" if settings.exclude else ""


def _fetched(errand: Errand, offered: Offered, listing: Listing) -> ResolvedModel:
    began = time.monotonic()
    store, settings = errand.request.store, errand.settings
    with explained(f"prepare the stage in {store}"):
        empty_trash(store, errand.say)
        stage = Stage.open(store, label(errand.request), listing)
        publish.check_place(store, errand.request, stage.directory)
        adopted = _adopt(stage, store, listing)
        missing = stage.remaining_bytes(listing)
        space.check(stage.directory, missing, len(listing.files))
    _announce(errand, listing, missing, adopted)
    log = FetchLog(stage.directory.with_name(f"{stage.directory.name}.log"))
    log.line(f"fetching {errand.request.identity} from {listing.origin}, {len(listing.files)} files, {listing.bytes} bytes, {missing} missing")
    try:
        contents = _filled(errand, offered, listing, stage, log)
        with beating(lambda: errand.say("writing to the disk", level="")):
            errand.waiting("publishing")
            directory = publish.publish(store, errand.request, stage.files, contents, settings.keep, errand.say)
        with explained(f"remove {stage.directory}"):
            stage.remove()
    except VllmdError as error:
        log.line(f"failed: {error.what}")
        log.close(keep=True)
        error.hint = f"{error.hint} Log of the fetch: {log.path}".strip()
        raise
    log.line(f"published {directory}")
    log.close(keep=settings.keep_logs)
    seconds = time.monotonic() - began
    errand.say(f"fetched {amounts.size(missing)} in {amounts.duration(seconds)}, published {directory}")
    return _resolved(errand, directory, contents)


def _adopt(stage: Stage, store: Path, listing: Listing) -> int:
    """Bytes that need not be fetched, since another published version has the same files."""
    found = publish.reusable(store, listing)
    have = stage.have()
    total = 0
    for file in listing.files:
        if file.name in found and file.name not in have:
            path, entry = found[file.name]
            if stage.adopt(file.name, path, Digest(entry.sha256, entry.blake3), file.pin):
                total += file.size
    return total


def _announce(errand: Errand, listing: Listing, missing: int, adopted: int) -> None:
    kept = listing.bytes - missing - adopted
    notes = [f"{amounts.size(adopted)} are shared with other versions"] if adopted else []
    notes += [f"{amounts.size(kept)} are here from an earlier attempt"] if kept > 0 else []
    what = f"{errand.request.identity} will be downloaded: {amounts.size(missing)} of {amounts.files(len(listing.files))} from {_place(listing)}"
    errand.say(what + (f" ({', '.join(notes)})" if notes else ""))
    if errand.request.revision and not listing.revision:
        errand.say(f"{listing.origin} knows no revisions: what lies there is taken for {errand.request.revision}", level="warning")


def _place(listing: Listing) -> str:
    return f"{listing.origin} at {listing.revision[:12]}" if listing.revision else listing.origin


def _filled(errand: Errand, offered: Offered, listing: Listing, stage: Stage, log: FetchLog) -> Contents:
    """The stage holds the whole model, verified and valid."""
    settings = errand.settings
    limits = Limits(connections=settings.fetch_connections, stall_s=settings.fetch_stall_s)

    def moved(progress: Progress) -> None:
        if not progress.total_bytes:
            errand.report(replace(progress, source=errand.source))
        else:
            text = amounts.progress(progress.done_bytes, progress.total_bytes, progress.bytes_per_s, progress.eta_s)
            errand.report(replace(progress, source=errand.source, text=text))
            errand.waiting(f"{amounts.size(progress.done_bytes)} of {amounts.size(progress.total_bytes)}")

    if settings.hf_xet and errand.source == "hf-hub":
        from vllmd.models.sources import hub_xet

        hub_xet.prefetch(listing, offered.transport, stage, settings, errand.environ, moved, log.line)
    digests = download(listing, offered.transport, stage, limits, errand.environ, moved, log.line)
    validate(stage.files, checks_of(settings))
    brought = sums.read(stage.files)
    _compare(listing, brought, digests)
    if settings.require_sums:
        _require_sums(listing, offered.transport, brought)
    files = {file.name: Entry(file.size, digests[file.name].sha256, digests[file.name].blake3, file.pin) for file in listing.files}
    created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return Contents(errand.request.identity, errand.source, listing.origin, listing.revision, created, files)


def _compare(listing: Listing, brought: Mapping[str, str], digests: Mapping[str, Digest]) -> None:
    missing = sorted(name for name in brought if name not in digests)
    if missing:
        reason = f"its sums name {len(missing)} files that it does not have: {weights.first_five(missing)}"
        raise invalid(listing.origin, reason, code="model_incomplete")
    for name, sha256 in sorted(brought.items()):
        if digests[name].sha256 != sha256:
            reason = f"{name} has the SHA-256 {digests[name].sha256}, and its own sums say {sha256}"
            raise invalid(listing.origin, reason, "The source itself is wrong: upload the file there again.", "model_corrupt")


def _require_sums(listing: Listing, transport: Transport, brought: Mapping[str, str]) -> None:
    unspoken = [file for file in listing.files if weights.is_weight(file.name) and file.name not in brought]
    bare = sorted(file.name for file in unspoken if not known_sums(transport, file))
    if bare:
        hint = "Put a sha256sums.txt beside them (sha256sum * >sha256sums.txt), or unset model.require_sums."
        raise invalid(listing.origin, f"no sum speaks for {weights.first_five(bare)}", hint, "sums_missing")


def _resolved(errand: Errand, directory: Path, contents: Contents) -> ResolvedModel:
    return ResolvedModel(
        identity=errand.request.identity,
        directory=directory,
        via=errand.source,
        revision=contents.revision or errand.request.revision,
        bytes=contents.bytes,
        manifest_sha256=contents.sha256,
    )
