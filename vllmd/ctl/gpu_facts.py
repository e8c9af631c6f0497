"""What `vllmctl gpu` knows: the host service's word, else the driver's by a child of its own; leases; the quarantine.

vllmctl may run as root, and all of this may have been written by the service's user: it is parsed as hostile input, printed
escaped, and decides nothing but what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllmd.config.paths import Paths
from vllmd.core.xids import HINTS
from vllmd.ctl import files
from vllmd.gpu import client, leases, quarantine
from vllmd.gpu.leases import Holder
from vllmd.gpu.quarantine import Record

DRIVER_TIMEOUT_S = 45.0
_GPUS = 1024
_TEXT = 200
_REMAPPED = ("correctable", "uncorrectable", "pending", "failed")


def todo(record: Record) -> str:
    """What lifts it."""
    return record.hint or HINTS[record.cls]


@dataclass(frozen=True, slots=True)
class Seen:
    """One GPU. What is not known is None or ''."""

    index: int
    uuid: str = ""
    name: str = ""
    lost: str = ""
    total_mib: int | None = None
    free_mib: int | None = None
    temperature_c: int | None = None
    utilization_pct: int | None = None
    ecc_uncorrected: int | None = None
    ecc_corrected: int | None = None
    remapped: Mapping[str, int] = field(default_factory=dict)
    recovery_action: int | None = None
    """What the driver itself asks for; 0 or None for nothing."""
    verdict_class: str = ""
    verdict: str = ""
    hint: str = ""
    processes: tuple[tuple[int, int | None, str], ...] = ()
    """(pid, MiB, unit)"""
    slices: tuple[str, ...] = ()
    slice_mib: tuple[int | None, ...] = ()
    """The memory of each."""
    capability: str = ""
    """NVIDIA's compute capability; `architecture` is AMD's name of what programs are compiled for."""
    architecture: str = ""
    holders: tuple[Holder, ...] = ()
    quarantine: Record | None = None

    @property
    def label(self) -> str:
        return f"{self.index} {self.name} ({self.uuid[:12]})" if self.uuid else f"{self.index} {self.name}".rstrip()

    @property
    def is_usable(self) -> bool:
        return not self.lost and self.quarantine is None and self.verdict_class in ("", "ok", "warn", "suspect")


@dataclass(frozen=True, slots=True)
class Host:
    """`source`: nvml, sysfs, none. `stuck_in`: the driver call that hangs."""

    gpus: tuple[Seen, ...] = ()
    source: str = "none"
    driver: str = ""
    stuck_in: str = ""
    note: str = ""


def look(paths: Paths, timeout_s: float | None = None) -> Host:
    """Blocks for `timeout_s` at most, or the driver's 45 s."""
    return seen_in(client.read_once(paths, DRIVER_TIMEOUT_S if timeout_s is None else timeout_s), paths)


def seen_in(said: Mapping[str, Any], paths: Paths) -> Host:
    """Of a GPU document that is there already."""
    held, banned = leases.holders(paths), quarantine.read(paths, also=_text(said, "boot_id"))
    rows = said.get("gpus")
    gpus = tuple(_seen(each, held, banned) for each in (rows if isinstance(rows, list) else [])[:_GPUS] if isinstance(each, dict))
    known = {each.uuid for each in gpus}
    gone = tuple(Seen(-1, uuid, lost="not seen", quarantine=banned[uuid], holders=held.get(uuid, ())) for uuid in banned if uuid not in known)
    return Host(gpus + gone, _text(said, "source") or "none", _text(said, "driver_version"), _text(said, "stuck_in"), _text(said, "note"))


def _seen(words: Mapping[str, Any], held: Mapping[str, tuple[Holder, ...]], banned: Mapping[str, Record]) -> Seen:
    uuid = _text(words, "uuid")
    parts = tuple(_text(each, "uuid") for each in _objects(words, "mig"))
    return Seen(
        index=_number(words, "index") or 0,
        uuid=uuid,
        name=_text(words, "name"),
        lost=_text(words, "lost"),
        total_mib=_number(words, "memory_total_mib"),
        free_mib=_number(words, "memory_free_mib"),
        temperature_c=_number(words, "temperature_c"),
        utilization_pct=_number(words, "utilization_pct"),
        ecc_uncorrected=_number(_object(words, "ecc"), "uncorrected"),
        ecc_corrected=_number(_object(words, "ecc"), "corrected"),
        remapped={key: int(value) for key in _REMAPPED if isinstance(value := _object(words, "remapped").get(key), int) and value},
        recovery_action=_number(words, "recovery_action"),
        verdict_class=_text(_object(words, "verdict"), "class"),
        verdict=_text(_object(words, "verdict"), "what"),
        hint=_text(_object(words, "verdict"), "hint"),
        processes=tuple((_number(each, "pid") or 0, _number(each, "used_mib"), _text(each, "unit")) for each in _objects(words, "processes")),
        slices=parts,
        slice_mib=tuple(_number(each, "memory_total_mib") for each in _objects(words, "mig")),
        capability=_text(words, "compute_capability"),
        architecture=_text(words, "architecture"),
        holders=tuple(holder for name in parts or (uuid,) for holder in held.get(name, ())),
        quarantine=banned.get(uuid),
    )


def _object(words: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = words.get(key)
    return value if isinstance(value, dict) else {}


def _objects(words: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = words.get(key)
    return [each for each in value[:_GPUS] if isinstance(each, dict)] if isinstance(value, list) else []


def _text(words: Mapping[str, Any], key: str) -> str:
    """One line that may be printed, whoever wrote it."""
    return "".join(char if char.isprintable() else "?" for char in files.text(words, key)[:_TEXT])


def _number(words: Mapping[str, Any], key: str) -> int | None:
    value = words.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62 else None
