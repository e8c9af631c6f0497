"""Where the files lie that a preset wants beside its model: a chat template, a draft model."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from vllmd.config.paths import Paths
from vllmd.config.settings import Config, Model
from vllmd.core.preset_choice import Found, Variant
from vllmd.engines import choice
from vllmd.errors import UsageError
from vllmd.models import presets
from vllmd.models.identity import label, request_from

IMAGE = Path("/vllm-workspace/examples")
"""vLLM's own container image."""


def absolute(given: str) -> str:
    """A directory as a command line names it. UsageError."""
    expanded = os.path.expanduser(given)  # noqa: PTH111 - pathlib's raises RuntimeError for a user whom nobody knows
    if expanded.startswith("~"):
        raise UsageError("directory_unknown", f"{given!r:.80}: there is no such user, or it has no home", "give the directory from / on")
    try:
        return os.path.abspath(expanded)  # noqa: PTH100 - a link stays the link that was named
    except FileNotFoundError:
        raise UsageError("directory_unknown", f"{given!r:.80}: the directory in which this was typed is gone", "give the directory from / on") from None


def found(paths: Paths, config: Config, variant: Variant) -> tuple[Found, list[str]]:
    """And what a person should know of what is missing."""
    places = [paths.config / presets.FOLDER, *_of_engine(paths, config), IMAGE, presets.shared() / presets.TEMPLATES]
    template = next((path for name in variant.templates for place in places if (path := place / name).is_file()), None)
    told = []
    if template is None and variant.templates:
        told.append(
            f"the chat template {variant.templates[0]} is not here: the model's own is used. To have vLLM's, put examples/{variant.templates[0]} "
            f"of its source into {paths.config / presets.FOLDER} and choose again"
        )
    draft = _draft(paths, config, variant)
    if draft is None and variant.draft:
        org, _, name = variant.draft.model.partition("/")
        told.append(
            f"without the draft model {variant.draft.model}, which makes it faster and is not in the store. To have it, as the service's user: "
            f"VLLM_MODEL={name} VLLM_MODEL_ORG={org} VLLM_MODELS_DIR={shlex.quote(config.model.dir or str(paths.models))} VLLM_MODEL_ENV_FILE=/tmp/draft.env vllm-resolve-model; then choose again"
        )
    return Found(str(template or ""), str(draft or "")), told


def _of_engine(paths: Paths, config: Config) -> list[Path]:
    """Of the engine that the instance runs, if vllmctl installed it."""
    if config.engine.executable:
        root = Path(config.engine.executable).parent.parent
    else:
        name = config.engine.version or choice.current_name(paths.engines)
        root = paths.engines / name if name else paths.engines / "none"
    inside = ("vllm/examples", "vllm/transformers_utils/chat_templates")
    return [root / "share/vllm/examples", *(path / each for path in sorted(root.glob("lib/python3*/site-packages")) for each in inside)]


def _draft(paths: Paths, config: Config, variant: Variant) -> Path | None:
    if variant.draft is None:
        return None
    request = request_from(Model(id=variant.draft.model, name=variant.draft.model.rpartition("/")[2], dir=config.model.dir), paths.models)
    places = (request.store / label(request), request.store / request.name)
    return next((place for place in places if (place / "config.json").is_file()), None)
