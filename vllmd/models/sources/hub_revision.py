"""Pure: the policy for revisions of what comes from a hub, over the network or by way of its cache."""

from __future__ import annotations

import re

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.errors import ConfigError


def require(request: ModelRequest, settings: Model) -> None:
    """ConfigError where the request's revision is not as fixed as the settings want it. A branch or a tag can be moved to other
    files by whoever owns the repository; a commit cannot."""
    wanted, given = settings.require_revision, request.revision
    if wanted == "commit" and not re.fullmatch(r"[0-9a-fA-F]{40}", given):
        said = f"revision {given!r} is no commit" if given else "no revision is given"
        hint = "Set model.revision (VLLM_MODEL_REVISION) to the commit, 40 hexadecimal digits; the hub shows it under 'Files', 'History'."
        raise ConfigError("revision_required", f"{request.key}: {said}, and model.require_revision wants one", hint)
    if wanted == "any" and not given:
        hint = "Set model.revision (VLLM_MODEL_REVISION) to a commit, a tag or a branch."
        raise ConfigError("revision_required", f"{request.key}: no revision is given, and model.require_revision wants one", hint)
