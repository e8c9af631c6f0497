"""The Hugging Face Hub, or a mirror of it: https://HOST/ORG/NAME at a revision.

huggingface_hub asks for the listing; the bytes are moved by models/download.

    hub_revision   whether this revision may be used at all
    hub_token      where the token lies, and whether it may be sent
    hub_client     huggingface_hub with bounds, its exceptions translated
    hub_listing    the repository at a revision -> Listing at its commit
    hub_transport  Listing -> requests for pieces
    hub_errors     what the hub or its library says -> our errors
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.errors import ConfigError, ModelNotFound, SourceUnavailable
from vllmd.models.sources import Context, Finding, NotFound, Offered, Skipped, hub_revision
from vllmd.models.sources.endpoint import parsed

ENDPOINT = "https://huggingface.co"
_ID = re.compile(r"[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}")
_TRUE = ("1", "ON", "YES", "TRUE")


class Hub:
    name = "hf-hub"
    label = "Hugging Face Hub"

    def find(self, request: ModelRequest, context: Context) -> Finding:
        offline = _offline(context.settings, context.environ)
        if offline:
            return Skipped(offline)
        if not _ID.fullmatch(request.id) or set(request.id.split("/")) & {".", ".."}:
            return NotFound(f"a hub has models as ORG/NAME, not as {request.key!r}: set model.org (VLLM_MODEL_ORG) or model.id (VLLM_MODEL_ID)")
        hub_revision.require(request, context.settings)
        try:
            return _offered(request, context)
        except ModelNotFound as error:
            if isinstance(error, SourceUnavailable):
                raise
            return NotFound(f"{error.what}. {error.hint}")


def _offered(request: ModelRequest, context: Context) -> Offered:
    # Imported here: they are of no use to the many who stay offline.
    from vllmd.models.sources import hub_listing, hub_token, hub_transport
    from vllmd.models.sources.hub_errors import Place

    endpoint = endpoint_url(context.settings.hf_endpoint)
    token = hub_token.find(context.settings, context.environ)
    is_withheld = bool(token.value) and hub_token.is_clear_text(endpoint)
    sent = "" if is_withheld else token.value
    place = Place(endpoint, request.id, request.revision, token.origin, is_withheld=is_withheld, token=sent)
    found = hub_listing.listed(place, context.environ)
    place = replace(place, is_gated=found.is_gated)
    return Offered(found.listing, hub_transport.HubTransport(place, found.listing.revision))


def _offline(settings: Model, environ: Mapping[str, str]) -> str:
    """Why no hub is asked; '' if it is."""
    if settings.offline:
        return "offline"
    name = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if environ.get(name, "").upper() in _TRUE), "")
    return f"{name} is set" if name else ""


def endpoint_url(text: str) -> str:
    """The endpoint, https where nothing is said. ConfigError, which does not show it: it may hold a password."""
    url = parsed(text)
    if url is None:
        hint = "As https://HOST or https://HOST:PORT/PATH, without user, password or query; a token has its own place (HF_TOKEN)."
        raise ConfigError("hub_endpoint", "model.hf_endpoint (HF_ENDPOINT) is no endpoint of a hub", hint)
    return url or ENDPOINT
