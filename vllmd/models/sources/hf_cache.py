"""Hub caches on this host: the store's own first, then wherever the hub's libraries would look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllmd.core.model import ModelRequest
from vllmd.models.sources import Candidate, Context, Finding, Found, NotFound, hub, hub_revision


class HubCache:
    name = "hf-cache"
    label = "hub caches"

    def find(self, request: ModelRequest, context: Context) -> Finding:
        hub_revision.require(request, context.settings)
        found: list[Candidate] = []
        notes: list[str] = []
        for root, is_chosen in roots(request.store, context.environ).items():
            try:
                found += hub.candidates(root, request)
                notes.append(f"not in {root}")
            except PermissionError as error:
                # Under ProtectHome= even the default place in HOME cannot be read, and nobody asked for it.
                if is_chosen:
                    raise
                notes.append(f"{root} cannot be read ({error.strerror})")
        return Found(tuple(found)) if found else NotFound(", ".join(notes))


def roots(store: Path, environ: Mapping[str, str]) -> dict[Path, bool]:
    """Hub caches in order; the value says whether a person chose the place (else it is only where libraries would look)."""
    chosen = [store / "hub"]
    chosen += [Path(environ[name]) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if environ.get(name)]
    if environ.get("HF_HOME"):
        chosen.append(Path(environ["HF_HOME"], "hub"))
    guessed = [Path(environ[name], tail) for name, tail in _GUESSES if environ.get(name)]
    found: dict[Path, bool] = {}
    for root in [*chosen, *guessed]:
        if root.is_absolute():
            found.setdefault(root, root in chosen)
    return found


_GUESSES = (("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub"))
