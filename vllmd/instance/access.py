"""Who may ask the engine, while it runs: the file that its guard reads, kept as keys.json and the configuration say.

The supervisor's own requests carry a key of this launch, which is written nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vllmd.config.settings import Serve
from vllmd.configured import Prepared
from vllmd.core.keyring import Key, Ring
from vllmd.engines.given_keys import api_keys
from vllmd.engines.guard import vllmd_guard
from vllmd.engines.protocol import GUARD_FILE, Context, Guarding
from vllmd.errors import VllmdError
from vllmd.instance import keys
from vllmd.instance.keys import Held
from vllmd.system.control import Reply
from vllmd.system.files import read_small, storage_error, write_atomic
from vllmd.system.journal import Journal
from vllmd.system.peer import Peer
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread

_COUNT_FILES_MAX = 256
_COUNT_BYTES = 256


class Access:
    """`given` are the keys that a person gave in the configuration. An engine that is not guarded knows the keys of its start only."""

    def __init__(self, prepared: Prepared, given: tuple[str, ...], journal: Journal | Stderr, *, is_guarded: bool) -> None:
        self._is_guarded = is_guarded
        self._paths = prepared.paths
        self._instance = prepared.instance
        self._journal = journal
        self._serve = prepared.config.serve
        self._directory = prepared.paths.instance_runtime(prepared.instance)
        self._own = keys.new_key("internal")
        self._given = tuple(Key("given", value) for value in given)
        self._held = Held(Ring())
        self._error = ""
        self._refresh: asyncio.Task[None] | None = None
        self._again = False

    @property
    def internal_key(self) -> str:
        return self._own.value

    @property
    def client_keys(self) -> tuple[str, ...]:
        return self._held.ring.values

    @property
    def count(self) -> int:
        """Keys that clients may send."""
        return len(self._held.ring.keys) + len(self._given)

    async def begin(self) -> None:
        """Makes the first key where there is none, and the guard's file. VllmdError."""
        self._held = await in_thread(lambda: keys.ensure(self._paths, self._instance, wanted=not self._given))
        if self._held.is_new:
            how = f"{self._paths.vllmctl} api-key show {self._instance}"
            self._journal.event("key-made", f"clients need an API key, and there was none: one was made ({how} shows it)", priority=5, hint=how)
        counts = self._directory / vllmd_guard.COUNTS
        try:
            shutil.rmtree(counts, ignore_errors=True)  # of an earlier supervisor that was killed
            counts.mkdir(mode=0o700)
            self._write()
        except OSError as error:
            raise storage_error(error, f"write {self._directory / GUARD_FILE}") from error

    def apply(self, serve: Serve) -> None:
        """A configuration that was read again; the keys are looked at as well."""
        self._serve = serve
        if self._is_guarded:
            self._look()

    def _look(self) -> None:
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._take())
        else:
            self._again = True

    async def _take(self) -> None:
        while True:
            self._again = False
            try:
                held = await in_thread(lambda: keys.read(self._paths, self._instance))
                self._install(held)
                self._error = ""
            except (VllmdError, OSError) as error:
                self._error = error.what if isinstance(error, VllmdError) else str(error)
                hint = error.hint if isinstance(error, VllmdError) else ""
                self._journal.event("keys-refused", f"the keys stay as they were: {self._error}", priority=3, hint=hint)
            if not self._again:
                return

    def _install(self, held: Held) -> None:
        before, self._held = self._held, held
        try:
            self._write()
        except OSError:
            self._held = before
            raise
        if held.mark != before.mark:
            names = ", ".join(key.name for key in held.ring.keys) or "none"
            self._journal.event("keys-taken", f"API keys in force: {names}", priority=5)

    def _write(self) -> None:
        """In the runtime directory, which is memory: it cannot block."""
        if not self._is_guarded:
            return
        everyone = (self._own, *self._given, *self._held.ring.keys)
        write_atomic(self._directory / GUARD_FILE, keys.guard_document(everyone, self._serve.open_paths), mode=0o600, fsync=False)

    # The control socket.

    def post(self, _body: bytes, _peer: Peer) -> Reply:
        """POST /keys: vllmctl has changed keys.json. GET /keys says when it is in force."""
        if not self._is_guarded:
            return 409, "application/json", json.dumps({"error": "this vLLM has no --middleware, and takes keys at its start only: restart it"}).encode()
        self._look()
        return 202, "application/json", b"{}"

    def document(self) -> tuple[str, bytes]:
        return "application/json", json.dumps({"mark": self._held.mark, "error": self._error}).encode()

    # Metrics.

    def refusals(self) -> Mapping[str, int]:
        """Over all processes of the engine, by reason."""
        found: Counter[str] = Counter(dict.fromkeys(vllmd_guard.REASONS, 0))
        with contextlib.suppress(OSError):
            for path in list((self._directory / vllmd_guard.COUNTS).iterdir())[:_COUNT_FILES_MAX]:
                found.update(_counts(path))
        return found

    def close(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
        with contextlib.suppress(OSError):
            (self._directory / GUARD_FILE).unlink(missing_ok=True)
        shutil.rmtree(self._directory / vllmd_guard.COUNTS, ignore_errors=True)


class NoAccess:
    """Of an instance that wants no key, or whose engine cannot want one."""

    internal_key = ""
    client_keys: tuple[str, ...] = ()
    count = 0

    def apply(self, serve: Serve) -> None:
        """Nothing holds here."""

    def post(self, _body: bytes, _peer: Peer) -> Reply:
        return 409, "application/json", json.dumps({"error": "this instance asks for no key"}).encode()

    def document(self) -> tuple[str, bytes]:
        return "application/json", json.dumps({"mark": "", "error": "this instance asks for no key"}).encode()

    def refusals(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        """Nothing to remove."""


def _counts(path: Path) -> Mapping[str, int]:
    """Written by the engine; what it is not is nothing."""
    try:
        words = read_small(path, _COUNT_BYTES).split()
        return dict(zip(vllmd_guard.REASONS, (max(int(word), 0) for word in words), strict=False))
    except (OSError, ValueError):
        return {}


async def opened(prepared: Prepared, context: Context, journal: Journal | Stderr) -> tuple[Access | NoAccess, Context]:
    """The keys, where the engine can want one, and the context that has them. VllmdError."""
    engine = prepared.engine
    if not isinstance(engine, Guarding):
        journal.event("starting", f"the engine {engine.name} asks for no key, whatever serve.auth says", priority=4)
        return NoAccess(), context
    given = api_keys(prepared.config.serve.api_key, prepared.environ)
    access = Access(prepared, given, journal, is_guarded=engine.guards(context))
    try:
        await access.begin()
    except BaseException:
        access.close()
        raise
    held = replace(context.access, internal_key=access.internal_key, client_keys=access.client_keys)
    return access, replace(context, access=held)
