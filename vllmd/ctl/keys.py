"""`vllmctl api-key show|list|add|rotate|revoke NAME`: the keys that clients of an instance send.

A key is printed whole where a program reads it (a pipe, a file), and masked on a terminal, which is seen by others and
kept in its scrollback: --reveal prints it there too. An engine that runs takes a change without a restart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from vllmd.commandline import Parser
from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.core import keyring
from vllmd.core.keyring import DEFAULT, Key, Ring
from vllmd.ctl import control
from vllmd.ctl import unit as units
from vllmd.ctl.pause import seconds
from vllmd.errors import ConfigError, PermissionMissing, TryLater, UsageError, VllmdError
from vllmd.instance import keys
from vllmd.instance.keys import Held
from vllmd.system import journal
from vllmd.system.journal import Journal

TAKEN_S = 10.0
_LOOK_S = 0.05
_LONGEST_OVERLAP_S = 366 * 86400


def main(argv: Sequence[str], paths: Paths) -> int:
    """One command line; VllmdError."""
    options = _parser().parse_args(argv)
    name = units.instance_name(options.name)
    if not paths.instance_config(name).exists() and not (paths.instance_state(name) / keys.FILE).exists():
        raise UsageError("no_instance", f"there is no instance {name} ({paths.instance_config(name)})", f"{paths.vllmctl} status")
    try:
        return int(options.perform(paths, name, options))
    except PermissionMissing as error:
        if os.geteuid() == 0:
            raise
        raise PermissionMissing(error.code, error.what, "sudo, or as the user that the instance runs as") from None


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl api-key", description="The API keys of an instance. They hold beside serve.api_key and the credential api-key.")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    show = _verb(verbs, "show", "print a key: masked on a terminal, whole in a pipe", _show, reveal=True)
    show.add_argument("key", metavar="KEY", nargs="?", default=DEFAULT, help=f"its name (default: {DEFAULT}, which is in credentials.json)")
    listed = _verb(verbs, "list", "the keys, masked, with the times at which they were made and end", _list)
    listed.add_argument("--json", action="store_true", help="one JSON object, for programs")
    add = _verb(verbs, "add", "make one more key, for a client of its own", _add, reveal=True)
    add.add_argument("key", metavar="KEY", help="its name")
    rotate = _verb(verbs, "rotate", "replace a key by a new one; the old one holds for a while, as KEY.old", _rotate, reveal=True)
    rotate.add_argument("key", metavar="KEY", nargs="?", default=DEFAULT, help=f"its name (default: {DEFAULT})")
    rotate.add_argument("--overlap", metavar="TIME", default="1d", help="how long the old one holds: 0, 90, 10min, 1h, 2d (default 1d); `revoke` ends it sooner")
    revoke = _verb(verbs, "revoke", "refuse a key from now on", _revoke)
    revoke.add_argument("key", metavar="KEY", help="its name")
    return top


def _verb(
    verbs: argparse._SubParsersAction[Parser], word: str, text: str, perform: Callable[[Paths, str, argparse.Namespace], int], *, reveal: bool = False
) -> Parser:
    verb = verbs.add_parser(word, help=text, description=text.capitalize())
    verb.add_argument("name", metavar="NAME", help="the instance")
    if reveal:
        verb.add_argument("--reveal", action="store_true", help="print it whole on a terminal, too")
    verb.set_defaults(perform=perform)
    return verb


def _show(paths: Paths, name: str, options: argparse.Namespace) -> int:
    ring = _in_force(keys.read(paths, name).ring)
    key = ring.get(options.key)
    if key is None and not ring.keys:
        raise ConfigError("no_key", f"{name} has no key yet", f"its first start makes one, and so does: {paths.vllmctl} api-key add {name} {DEFAULT}")
    if key is None:
        raise ConfigError("no_key", f"{name} has no key {options.key}", f"{paths.vllmctl} api-key list {name}")
    _print(key, f"{paths.vllmctl} api-key show {name} {key.name}", reveal=options.reveal)
    return 0


def _list(paths: Paths, name: str, options: argparse.Namespace) -> int:
    ring, now = keys.read(paths, name).ring, time.time()
    if options.json:
        shown = [
            {"name": key.name, "key": keyring.masked(key.value), "made": key.made or "", "until": None if key.until is None else _time(key.until), "holds": key.until is None or now < key.until}
            for key in ring.keys
        ]
        sys.stdout.write(json.dumps({"schema": 1, "instance": name, "keys": shown}) + "\n")
        return 0
    rows = [("NAME", "KEY", "MADE", "HOLDS UNTIL"), *((key.name, keyring.masked(key.value), printable(key.made)[:40].replace("\n", " ") or "-", _until(key, now)) for key in ring.keys)]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    for first, second, third, last in rows:
        sys.stdout.write(f"{first:<{wide[0]}}  {second:<{wide[1]}}  {third:<{wide[2]}}  {last}\n")
    return 0


def _until(key: Key, now: float) -> str:
    if key.until is None:
        return "revoked"
    return _time(key.until) if now < key.until else "ended"


def _add(paths: Paths, name: str, options: argparse.Namespace) -> int:
    new = keys.new_key(options.key)
    held = _change(paths, name, lambda ring: keyring.add(ring, new))
    _told(paths, name, held, f"API key {new.name} was made")
    _print(new, f"{paths.vllmctl} api-key show {name} {new.name}", reveal=options.reveal)
    return 0


def _rotate(paths: Paths, name: str, options: argparse.Namespace) -> int:
    overlap_s = 0.0 if options.overlap.strip() in ("0", "none") else seconds(options.overlap)
    if overlap_s > _LONGEST_OVERLAP_S:
        raise UsageError("overlap", "an overlap lasts a year at most", "`add` makes a key that holds until it is revoked")
    new, until = keys.new_key(options.key), time.time() + overlap_s if overlap_s else None
    held = _change(paths, name, lambda ring: keyring.rotate(ring, new, until))
    old = f"the old one holds until {_time(until)}" if until else "the old one is refused"
    _told(paths, name, held, f"API key {new.name} was replaced; {old}")
    _print(new, f"{paths.vllmctl} api-key show {name} {new.name}", reveal=options.reveal)
    return 0


def _revoke(paths: Paths, name: str, options: argparse.Namespace) -> int:
    held = _change(paths, name, lambda ring: keyring.revoke(ring, options.key), hint=f"{paths.vllmctl} api-key rotate {name} --overlap 0" if options.key == DEFAULT else "")
    _told(paths, name, held, f"API key {options.key} was revoked")
    return 0


def _change(paths: Paths, name: str, decide: Callable[[Ring], Ring], hint: str = "") -> Held:
    try:
        return keys.change(paths, name, decide)
    except keyring.Refused as error:
        raise UsageError("key_refused", f"{name}: {error}", hint or f"{paths.vllmctl} api-key list {name}") from None


def _in_force(ring: Ring) -> Ring:
    return keyring.without_ended(ring, time.time())


def _print(key: Key, how: str, *, reveal: bool) -> None:
    if reveal or not sys.stdout.isatty():
        sys.stdout.write(f"{key.value}\n")
    else:
        sys.stdout.write(f"{keyring.masked(key.value)}  ({how} --reveal)\n")


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# What runs, and who hears of it.


def _told(paths: Paths, name: str, held: Held, what: str) -> None:
    """On stderr, since stdout is the key; and in the journal, also where nothing runs."""
    who = os.environ.get("SUDO_USER") or f"uid {os.getuid()}"
    if paths.scope != "root" and journal.SOCKET.exists():
        # Root's word about another unit: `journalctl -u` and `vllmctl events` show it among the unit's own.
        of_unit = "OBJECT_SYSTEMD_USER_UNIT" if paths.scope == "user" else "OBJECT_SYSTEMD_UNIT"
        book = Journal({"VLLMD_INSTANCE": name, of_unit: units.unit(name)})
        book.event("keys-changed", f"{what} (by {who})", priority=5, uid=os.getuid())
        book.close()
    # The running instance's own words: of the service's account, on root's terminal.
    sys.stderr.write(printable(f"{what}. {_taken(paths, name, held.mark)}") + "\n")


def _taken(paths: Paths, name: str, mark: str) -> str:
    """Waits until the running engine goes by it; a sentence. TryLater where it does not: then the old keys are in force still."""
    try:
        status, text = control.ask(paths, name, "POST", "/keys", {})
    except VllmdError as error:
        if error.code == "not_running":
            return "It holds from the next start on."
        raise TryLater("keys_not_taken", f"the keys are written, but {error.what}", error.hint) from None
    if status != 202:
        return f"It is not in force: {control.decoded(text).get('error') or text}."
    end = time.monotonic() + TAKEN_S
    said = ""
    while time.monotonic() < end:
        document = control.decoded(control.ask(paths, name, "GET", "/keys")[1])
        if document.get("mark") == mark:
            return "It is in force."
        said = str(document.get("error") or "")
        time.sleep(_LOOK_S)
    raise TryLater("keys_not_taken", f"the keys are written, but the running {name} does not go by them: {said or 'no answer'}", f"{paths.vllmctl} restart {name}")
