"""What `vllmctl top` shows: the instances as their status.json has them, what systemd knows of their units, and the GPUs.

A look must cost nearly nothing: twenty files are only read again when they were replaced, and what asks other processes (systemd,
the GPU service) comes from elsewhere, now and then.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllmd.config.paths import Paths
from vllmd.ctl import files, gpu_facts, gpu_show
from vllmd.ctl.cells import clean
from vllmd.ctl.status import SERVING, UNKNOWN, model_of, true_state
from vllmd.ctl.unit import UnitState

_TEXT = 400
WORDLESS = frozenset({"stopped", "failed", "restarting", "inactive"})
"""States in which there is no supervisor whose figures would be of now."""


@dataclass(frozen=True, slots=True)
class Row:
    """An instance. None is what is not known; times are seconds since 1970."""

    name: str
    state: str
    since: float | None = None
    phase: str = ""
    fraction: float | None = None
    progress: str = ""
    running: int | None = None
    waiting: int | None = None
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    kv_cache_ratio: float | None = None
    gpus: tuple[str, ...] = ()
    gpu_used_mib: int | None = None
    gpu_total_mib: int | None = None
    restarts: int | None = None
    error: str = ""
    hint: str = ""
    event: str = ""
    event_at: float | None = None
    event_text: str = ""
    event_priority: int = 6
    model: str = ""
    endpoint: str = ""
    paused_until: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU. `state`: as `vllmctl gpu` has it."""

    index: int
    uuid: str = ""
    name: str = ""
    used_mib: int | None = None
    total_mib: int | None = None
    temperature_c: int | None = None
    utilization_pct: int | None = None
    state: str = "free"
    owners: tuple[str, ...] = ()
    is_usable: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """`gpu_note`: why there are no GPUs, or what is wrong with the driver. `note`: what could not be found out."""

    at: float
    host: str = ""
    rows: tuple[Row, ...] = ()
    cards: tuple[Card, ...] = ()
    gpu_note: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "at": self.at,
            "host": self.host,
            "instances": [asdict(row) for row in self.rows],
            "gpus": [asdict(card) for card in self.cards],
            "gpu_note": self.gpu_note,
            "note": self.note,
        }


Stamp = tuple[int, int]


@dataclass(slots=True)
class Gatherer:
    """`units`, `host` and `dead` are filled in by others: see top_screen and `once`."""

    paths: Paths
    names: Sequence[str] = ()
    units: Mapping[str, UnitState] = field(default_factory=dict)
    dead: frozenset[str] = frozenset()
    """Where no systemd says so: names whose supervisor does not answer."""
    host: gpu_facts.Host = field(default_factory=gpu_facts.Host)
    note: str = ""
    _read: dict[str, tuple[Stamp, dict[str, Any]]] = field(default_factory=dict)

    def facts(self, at: float) -> Facts:
        cards = tuple(map(_card, self.host.gpus))
        stuck = f"the driver does not answer (stuck in {self.host.stuck_in})" if self.host.stuck_in else ""
        return Facts(at, clean(socket.gethostname()), tuple(self._row(name, cards) for name in self.names), cards, stuck or self.host.note, self.note)

    def state(self, name: str) -> str:
        return files.text(self._status(name), "state")

    def _row(self, name: str, cards: Sequence[Card]) -> Row:
        said, unit = self._status(name), self.units.get(name)
        state = "failed" if name in self.dead else true_state(said, unit)
        state = UNKNOWN if state == "stopped" and not said and unit is None and files.is_refused(self.paths, name) else state
        ended = self._file(name, "last.json") if state not in SERVING else {}
        problem = files.problem(said) or (None if state in SERVING else files.problem(ended))
        state = "failed" if state == "stopped" and problem is not None else state
        return row_of(name, state, said, problem, unit, cards)

    def _status(self, name: str) -> dict[str, Any]:
        return self._file(name, "status.json")

    def _file(self, name: str, file: str) -> dict[str, Any]:
        """Supervisors replace a file, so that another content is another inode."""
        is_status = file == "status.json"
        base, parts = (self.paths.runtime, ("i", name, file)) if is_status else (self.paths.state, ("instances", name, file))
        try:
            found = os.lstat(base.joinpath(*parts))
        except OSError:
            return {}
        stamp = (found.st_ino, found.st_mtime_ns)
        before = self._read.get(f"{name}/{file}")
        if before is not None and before[0] == stamp:
            return before[1]
        document = files.read(base, *parts)
        self._read[f"{name}/{file}"] = (stamp, document)
        return document


def row_of(name: str, state: str, said: Mapping[str, Any], problem: files.Problem | None, unit: UnitState | None, cards: Sequence[Card]) -> Row:
    lives = state not in WORDLESS
    now: Mapping[str, Any] = said if lives else {}
    uuids = tuple(clean(each[:64]) for each in now.get("gpus") or () if isinstance(each, str)) if isinstance(now.get("gpus"), list) else ()
    mine = [card for card in cards if card.uuid in uuids]
    measured = [(card.used_mib, card.total_mib) for card in mine if card.used_mib is not None and card.total_mib is not None]
    since = files.moment(now, "since")
    at = files.moment(_object(said, "last_event"), "at")
    fraction = files.number(now, "progress", "fraction")
    return Row(
        name=clean(name),
        state=_text(state),
        since=since.timestamp() if since else None,
        phase="" if state in SERVING else _text(files.text(now, "phase")),
        fraction=None if fraction is None else max(0.0, min(1.0, fraction)),
        progress=_text(files.text(now, "progress", "text")),
        running=_count(now, "running"),
        waiting=_count(now, "waiting"),
        tokens_per_s=files.number(now, "load", "tokens_per_s"),
        prompt_tokens_per_s=files.number(now, "load", "prompt_tokens_per_s"),
        kv_cache_ratio=files.number(now, "load", "kv_cache_ratio"),
        gpus=uuids,
        gpu_used_mib=sum(used for used, _ in measured) if measured else None,
        gpu_total_mib=sum(total for _, total in measured) if measured else None,
        restarts=unit.restarts if unit else None,
        error=_text(problem.what) if problem else "",
        hint=_text(problem.hint) if problem else "",
        event=_text(files.text(said, "last_event", "event")),
        event_at=at.timestamp() if at else None,
        event_text=_text(files.text(said, "last_event", "text")),
        event_priority=int(files.number(said, "last_event", "priority") or 6),
        model=_text(model_of(said)),
        endpoint=_text(files.text(now, "endpoint")),
        paused_until=_text(files.text(now, "paused", "until")),
        warnings=tuple(_text(str(each)) for each in now["warnings"][:8]) if isinstance(now.get("warnings"), list) else (),
    )


def _card(seen: gpu_facts.Seen) -> Card:
    owners = [each.instance or each.unit or f"pid {each.pid}" for each in seen.holders] or [unit or f"pid {pid}" for pid, _, unit in seen.processes]
    return Card(
        index=seen.index,
        uuid=seen.uuid,
        name=seen.name,
        used_mib=seen.total_mib - seen.free_mib if seen.total_mib is not None and seen.free_mib is not None else None,
        total_mib=seen.total_mib,
        temperature_c=seen.temperature_c,
        utilization_pct=seen.utilization_pct,
        state=_text(gpu_show.state(seen)),
        owners=tuple(dict.fromkeys(map(_text, owners))),
        is_usable=seen.is_usable,
    )


def _object(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _text(text: str) -> str:
    return clean(text[:_TEXT])


def _count(record: Mapping[str, Any], key: str) -> int | None:
    value = files.number(record, "load", key)
    return round(value) if value is not None and abs(value) < 1e15 else None
