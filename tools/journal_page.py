"""Writes docs/vllmd-journal.7.md, the page of every kind of journal entry, from the rows of vllmd/system/messages.py and those here:
`python -m tools.journal_page`. Tests compare the levels and fields below with the calls that write the entries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vllmd.system.messages import MESSAGES

PAGE = Path(__file__).parent.parent / "docs" / "vllmd-journal.7.md"
LEVELS = {2: "critical", 3: "error", 4: "warning", 5: "notice", 6: "info"}


class Section(Enum):
    LIFE = "Kinds: the life of an instance"
    CAUSE = "Kinds: why an engine failed"
    HOST = "Kinds: the host's GPUs"


@dataclass(frozen=True, slots=True)
class Row:
    section: Section
    levels: tuple[str, ...]
    fields: tuple[str, ...]


def _rows(section: Section, text: str) -> dict[str, Row]:
    """A line each: kind, levels, fields."""
    parts = [line.split() for line in text.strip().splitlines()]
    return {kind: Row(section, tuple(levels.split(",")), tuple(fields)) for kind, levels, *fields in parts}


_OF_A_CAUSE = ("hint", "code", "incident")
_VERDICT = "hint detector code"
ROWS: dict[str, Row] = {
    **_rows(
        Section.LIFE,
        f"""
        starting warning
        preflight-passed info
        preflight-failed error hint
        model-resolved info
        model-progress warning,info
        model-failed error hint
        model-prepared warning,notice directory
        engine-spawned info pid family
        phase info phase
        engine-ready notice
        unconfigured notice
        generation warning,info hint
        start-stalled error hint
        start-timeout error hint
        engine-exited notice
        engine-unhealthy error {_VERDICT}
        engine-hung error {_VERDICT}
        engine-died error {_VERDICT}
        gpu-verdict error {_VERDICT}
        gpu-trouble warning hint detector gpu xid
        would-act warning,notice {_VERDICT}
        heartbeat-unreadable warning,info
        canary notice
        clock-gap notice
        paused warning uid pid
        resumed notice
        failed critical,error,warning code hint exit_status incident
        stopping info
        stopped info
        unkillable critical hint
        gpu-memory-not-back critical hint
        leftovers-swept warning
        gpu-waiting warning
        reloaded error,notice hint
        reload-needs-restart warning hint
        key-made notice hint
        keys-changed notice uid
        keys-taken notice
        keys-refused error hint
        metrics-unavailable warning hint where
        lines-dropped warning dropped_lines dropped_events
        """,
    ),
    **{kind: Row(Section.CAUSE, ("error",), _OF_A_CAUSE) for kind in MESSAGES if kind.startswith("cause-")},
    **_rows(Section.CAUSE, "cache-moved warning incident\nevidence-incomplete warning incident"),
    **_rows(
        Section.HOST,
        """
        gpu-watching info
        gpu-finding error,warning,notice gpu xid detector cls process hint
        gpu-would-quarantine warning gpu xid detector cls process hint
        gpu-stuck error gpu xid detector cls process hint
        gpu-quarantined error gpu xid cls hint
        gpu-quarantine-failed error gpu xid cls hint
        gpu-released notice gpu xid cls
        gpu-driver-gone warning
        gpu-driver-back notice
        gpu-log-unreadable warning
        """,
    ),
}

HEAD = """\
# vllmd-journal(7): what vllmd says in the journal

<!-- Made by `python -m tools.journal_page` from the rows in vllmd/system/messages.py and there. -->

## Description

Supervisors, and the watch over the host's GPUs, write to the journal themselves, each entry with fields. Every kind of entry has a MESSAGE_ID, which never changes,
and an explanation with what to do, which `journalctl -x` prints and this page has too. Programs match MESSAGE_ID or VLLMD_EVENT, never the text of a message.

The level is PRIORITY: critical is 2, error 3, warning 4, notice 5, info 6. `log.level` of vllmd.yaml(5) says down to which entries are written (info, as shipped). A kind
with several levels takes the one that fits the case. In the foreground (`vllmd run` in a shell or a container) the same stands on standard error.

## How to ask

    vllmctl events qwen3                    what happened to it
    vllmctl events -f --json                of all and of the GPUs, live
    journalctl -u vllmd@qwen3 -t vllmd -x   with explanations
    journalctl -u vllmd@qwen3 -t vllmd-engine
                                            the engine's own lines
    journalctl -u vllmd-gpu -x              the watch over the GPUs
    journalctl VLLMD_EVENT=failed -S today  a kind, of all instances
    journalctl MESSAGE_ID=fd39de1393094ad7a6ef5edef190c153
                                            the same kind
    journalctl VLLMD_LAUNCH=ID              all of one launch
    journalctl -t vllmd -p warning -S -1h   what may need somebody
    journalctl --dump-catalog MESSAGE_ID    the explanation alone

Reading the journal of the system needs root, or the group systemd-journal or adm.

## Fields

Besides those of systemd.journal-fields(7). A field without a value is left out.

| field | meaning |
|---|---|
| `MESSAGE_ID` | of the kind; a message of no kind, such as the curl that `vllmctl start` shows, has none |
| `SYSLOG_IDENTIFIER` | vllmd; of the engine's lines vllmd-engine |
| `VLLMD_INSTANCE` | the instance; the watch over the GPUs has none |
| `VLLMD_EVENT` | the kind's name, as below |
| `VLLMD_LAUNCH` | the launch: one life of one engine, from its spawn on, its lines included |
| `VLLMD_STREAM` | engine, on the engine's lines |
| `VLLMD_PHASE` | the phase of the start that was reached; on the engine's lines, the one that they belong to |
| `VLLMD_HINT` | what to do, mostly with a command |
| `VLLMD_CODE` | the failure: what `error.code` of last.json says |
| `VLLMD_EXIT_STATUS` | the exit status of the supervisor: vllmd(8) |
| `VLLMD_INCIDENT` | the incident: `vllmctl incidents NAME INCIDENT` |
| `VLLMD_DETECTOR` | the detector, as in `watch.observe` |
| `VLLMD_PID` | of `engine-spawned`, the engine's main process; of `paused`, who asked |
| `VLLMD_UID` | the user who asked |
| `VLLMD_FAMILY` | how the engine's processes are kept together: a control group, or what carries the launch's id |
| `VLLMD_DIRECTORY` | the directory that the engine is given |
| `VLLMD_GPU` | UUID of the GPU |
| `VLLMD_XID` | the NVIDIA driver's number of the error |
| `VLLMD_CLS` | class of a finding: app, sympathetic, nvlink, warn, human, ask, reset, reboot, replace |
| `VLLMD_PROCESS` | the process that caused it, with its pid |
| `VLLMD_WHERE` | the address or file of the metrics |
| `VLLMD_DROPPED_LINES` | lines of the engine that are lost |
| `VLLMD_DROPPED_EVENTS` | events of vllmd that are lost |
"""


SHOWN = {"INSTANCE": "NAME", "GPU": "UUID"}


def _plain(text: str) -> str:
    """As a person reads it: journalctl would fill in the names."""
    return re.sub(r"@VLLMD_([A-Z]+)@", lambda found: SHOWN.get(found[1], found[1]), text)


def _sentence(subject: str) -> str:
    return _plain(subject) + "."


def _kind(kind: str) -> str:
    row, message = ROWS[kind], MESSAGES[kind]
    fields = "".join(f", `VLLMD_{name.upper()}`" for name in row.fields)
    told = f"`{message.id}`, {' or '.join(row.levels)}{fields}"
    return f"### {kind}\n\n{_sentence(message.subject)} {_plain(' '.join(message.text.splitlines()))}\n\n{told}\n"


def whole() -> str:
    parts = [HEAD]
    for section in Section:
        parts += [f"## {section.value}\n", *(_kind(kind) for kind, row in ROWS.items() if row.section is section)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(whole())
