"""The resolve stage's progress, shown and told; the stage itself is a child (resolving)."""

from __future__ import annotations

from collections.abc import Callable

from vllmd.config.settings import Model
from vllmd.configured import Prepared
from vllmd.core import events as ev
from vllmd.core.lifecycle import State
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.instance.board import Board
from vllmd.instance.clockwork import Clockwork
from vllmd.instance.resolving import child_environ, resolve
from vllmd.models import wire
from vllmd.models.amounts import size
from vllmd.models.progress import Progress
from vllmd.models.whereabouts import WORDS
from vllmd.system.journal import Journal
from vllmd.system.sink import LEVELS
from vllmd.system.terminal import Stderr

ALLOWED_S = 120
"""From one word of the child's to the next, while nothing else has a clock."""


class Resolution:
    """`moved` hears that bytes of the model are verified beside the start."""

    def __init__(
        self,
        board: Board,
        clockwork: Clockwork,
        journal: Journal | Stderr,
        *,
        post: Callable[[ev.Event], None],
        state: Callable[[], State],
        moved: Callable[[], None],
    ) -> None:
        self._board = board
        self._clockwork = clockwork
        self._journal = journal
        self._post = post
        self._state = state
        self._moved = moved
        self.model: ResolvedModel | None = None

    async def run(self, request: ModelRequest, settings: Model, prepared: Prepared) -> None:
        """VllmdError where no source has the model."""
        self._board.phase("resolve")
        self._clockwork.allow(settings.lock_timeout_s + 60)
        await resolve(wire.encode_request(request, settings), child_environ(prepared.environ, settings), self._heard)

    def _heard(self, event: Progress | wire.Resolved | wire.Verified) -> None:
        if self._state() is State.RESOLVING:  # after that the clocks of the start hold
            self._clockwork.allow(ALLOWED_S)
        match event:
            case Progress():
                self._progress(event)
            case wire.Resolved(model):
                self._resolved(model)
            case wire.Verified():
                self._post(ev.ModelVerified())

    def _progress(self, progress: Progress) -> None:
        if progress.level:
            self._journal.event("model-progress", progress.text, priority=LEVELS[progress.level])
        state = self._state()
        if state is State.RESOLVING or (state is State.PROVEN and progress.total_bytes):
            if progress.total_bytes:
                self._board.transfer(progress.phase, progress, progress.text)
            else:
                self._board.progress(None, progress.text)
        if progress.done_bytes:
            self._moved()

    def _resolved(self, model: ResolvedModel) -> None:
        self.model = model
        known = self._board.document["model"] or {}
        self._board.set(model={**known, "directory": str(model.directory), "via": model.via})
        what = f"model {model.identity} is {WORDS[model.via]}: {model.directory} ({size(model.bytes)}, via {model.via})"
        self._journal.event("model-resolved", what, priority=6)
        self._post(ev.ModelResolved())
