"""`vllmctl gpu` for people, one line for each GPU with what is wrong below it; and for programs, as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from typing import Any

from vllmd.ctl.gpu_facts import Host, Seen, todo

_HEAD = ("GPU", "NAME", "UUID", "STATE", "OWNER", "MEMORY", "TEMP", "ERRORS")


def table(host: Host) -> Iterator[str]:
    if host.stuck_in:
        yield f"the GPU driver does not answer (stuck in {host.stuck_in}): `journalctl -k -g NVRM`; it mostly needs a reboot"
    if not host.gpus:
        yield f"no GPU{f': {host.note}' if host.note else ''}"
        return
    rows = [_HEAD, *(_row(each) for each in host.gpus)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row, each in zip(rows, (None, *host.gpus), strict=True):
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        if each is not None:
            yield from (f"     {line}" for line in _remarks(each))
    if host.driver:
        yield f"driver {host.driver}, by {host.source}"


def _row(seen: Seen) -> tuple[str, ...]:
    return (
        str(seen.index) if seen.index >= 0 else "?",
        seen.name or "?",
        seen.uuid[:12] or "?",
        state(seen),
        _owner(seen),
        f"{seen.total_mib - seen.free_mib}/{seen.total_mib} MiB" if seen.total_mib is not None and seen.free_mib is not None else "?",
        f"{seen.temperature_c} °C" if seen.temperature_c is not None else "?",
        _errors(seen),
    )


def state(seen: Seen) -> str:
    """One word: lost, quarantined, the driver's verdict, leased, in use (by somebody without a lease) or free."""
    if seen.lost:
        return seen.lost.replace("_", " ")
    if seen.quarantine is not None:
        return "quarantined"
    if seen.verdict_class not in ("", "ok"):
        return seen.verdict_class
    return "leased" if seen.holders else "in use" if seen.processes else "free"


def _owner(seen: Seen) -> str:
    """Who has leased it; without a lease, whose processes are on it."""
    named = [each.instance or each.unit or f"pid {each.pid}" for each in seen.holders]
    named = named or [unit or f"pid {pid}" for pid, _, unit in seen.processes]
    distinct = list(dict.fromkeys(named))
    return ", ".join(distinct[:3]) + (f", {len(distinct) - 3} more" if len(distinct) > 3 else "") or "-"


def _errors(seen: Seen) -> str:
    found = []
    if seen.ecc_uncorrected:
        found.append(f"{seen.ecc_uncorrected} uncorrected")
    if seen.ecc_corrected:
        found.append(f"{seen.ecc_corrected} corrected")
    if seen.remapped:
        found.append("remapped rows " + ", ".join(f"{key} {value}" for key, value in seen.remapped.items()))
    return ", ".join(found) or "-"


def _remarks(seen: Seen) -> Iterator[str]:
    record = seen.quarantine
    if record is not None:
        yield f"quarantined since {_moment(record.first_at)}, class {record.cls}, seen {record.count} times: {record.what}".replace("seen 1 times", "seen once")
        yield todo(record)
    if seen.verdict and seen.verdict_class not in ("", "ok") and (record is None or record.what not in seen.verdict):
        yield seen.verdict + (f": {seen.hint}" if seen.hint else "")
    owners = {each.unit for each in seen.holders if each.unit}
    for pid, used, unit in seen.processes if seen.holders else ():
        if unit and unit not in owners:
            yield f"also used by pid {pid} of {unit}" + (f", {used} MiB" if used else "")


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M}" if at else "an unknown time"


def as_dict(host: Host) -> dict[str, Any]:
    gpus = [{**asdict(each), "processes": [dict(zip(("pid", "used_mib", "unit"), row, strict=True)) for row in each.processes], "state": state(each), "usable": each.is_usable} for each in host.gpus]
    return {"schema": 1, "source": host.source, "driver_version": host.driver, "stuck_in": host.stuck_in, "note": host.note, "gpus": gpus}
