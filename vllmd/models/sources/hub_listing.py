"""What a hub says of a repository at a revision -> Listing, pinned to the commit that the revision is just now."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.errors import ModelInvalid
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.sources import hub_client, hub_errors
from vllmd.models.sources.hub_errors import Place

MAX_FILES = 50_000
"""The hub cuts longer listings."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Listed:
    """`is_gated`: files are given only to accounts that accepted a licence, though the listing is public."""

    listing: Listing
    is_gated: bool


def listed(place: Place, environ: Mapping[str, str]) -> Listed:
    """ModelNotFound where there is no such repository or revision; PermissionMissing, SourceUnavailable, ConfigError;
    ModelInvalid for a listing that no model has."""
    with hub_client.opened(place, environ) as api:
        info = api.model_info(place.repository, revision=place.revision or "main", files_metadata=True, timeout=hub_client.TIMEOUT_S)
    commit, siblings = info.sha, info.siblings
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise hub_errors.unreadable(place, "it names no commit")
    if _COMMIT.fullmatch(place.revision.lower()) and commit != place.revision.lower():
        raise hub_errors.unreadable(place, f"it lists commit {commit} instead of {place.revision}")
    if not isinstance(siblings, list):
        raise hub_errors.unreadable(place, "it has no list of files")
    if len(siblings) > MAX_FILES:
        raise ModelInvalid("model_unsafe", f"{place.url} lists {len(siblings)} files; more than {MAX_FILES} are no model", "Does model.id name a model?")
    files = tuple(_file(sibling, place) for sibling in siblings)
    return Listed(Listing(files, place.url, commit), bool(info.gated))


def _file(sibling: Any, place: Place) -> RemoteFile:
    """A hub gives sizes and sums since it was asked for them; a mirror that does not is of no use: nothing could be verified."""
    name, size, sha256 = sibling.rfilename, sibling.size, ""
    if sibling.lfs is not None:
        size, sha256 = sibling.lfs.size, sibling.lfs.sha256
    if not isinstance(name, str) or not name:
        raise hub_errors.unreadable(place, "a file without a name")
    if not isinstance(size, int) or isinstance(size, bool):
        raise hub_errors.unreadable(place, f"no size of {place.clean(name)!r}")
    if sibling.lfs is not None:
        return _summed(name, size, "sha256", sha256, _SHA256, place)
    return _summed(name, size, "git-sha1", sibling.blob_id, _COMMIT, place)


def _summed(name: str, size: int, algorithm: str, value: Any, form: re.Pattern[str], place: Place) -> RemoteFile:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise hub_errors.unreadable(place, f"no {algorithm} of {place.clean(name)!r}")
    return RemoteFile(name, size, value, {algorithm: value}, name)
