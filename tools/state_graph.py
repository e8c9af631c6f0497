"""Draws the lifecycle's table as the graph and the matrix in docs/ARCHITECTURE.md: `python -m tools.state_graph` rewrites both."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vllmd.core import events as ev
from vllmd.core.lifecycle import TABLE, Life, State, classify, step

PAGE = Path(__file__).parent.parent / "docs" / "ARCHITECTURE.md"
FAILURE = ev.Failure("code", "what", "hint", 70)
ENDING = {"StageFailed", "EngineExited", "VerdictReached", "StartExpired", "Faulted"}


def samples(event: type) -> list[ev.Event]:
    if event is ev.Begun:
        return [ev.Begun(selected=True), ev.Begun(selected=False)]
    if event is ev.StopRequested:
        return [ev.StopRequested("signal")]
    names = getattr(event, "__dataclass_fields__", {})
    return [event(FAILURE) if "failure" in names else event()]


def edges() -> dict[tuple[str, str], list[str]]:
    """(from, to) -> names of the events, in the order of the table."""
    found: dict[tuple[str, str], list[str]] = {}
    for state, event in TABLE:
        for sample in samples(event):
            for verified in (False, True):
                after, _ = step(Life(state, verified=verified), sample)
                if after.state is state:
                    continue
                label = event.__name__ + (" (no model)" if sample == ev.Begun(selected=False) else "")
                label += " (verified)" if isinstance(sample, ev.ProofPassed) and verified else ""
                names = found.setdefault((str(state), str(after.state)), [])
                if label not in names:
                    names.append(label)
    return found


def graph() -> str:
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.CREATED}"]
    for (before, after), names in edges().items():
        plain = [name for name in names if name not in ENDING]
        failing = ["a bug of ours"] if names == ["Faulted"] else ["any failure"]
        label = ", ".join(plain + (failing if len(plain) < len(names) else []))
        lines.append(f"    {before} --> {after}: {label}")
    return "\n".join([*lines, f"    {State.STOPPED} --> [*]", "```"])


def matrix() -> str:
    """One row an event, one column a state: handled, ignored, or a bug of ours."""
    mark = {"handled": "**#**", "ignored": "·", "bug": "!"}
    head = "| event | " + " | ".join(map(str, State)) + " |"
    rows = [f"| {event.__name__} | " + " | ".join(mark[classify(state, event)] for state in State) + " |" for event in ev.EVENTS]
    return "\n".join([head, "|---|" + ":-:|" * len(State), *rows])


def rewritten(page: str) -> str:
    for name, text in (("graph", graph()), ("matrix", matrix())):
        pattern = re.compile(f"(<!-- {name}: generated -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)  # type: ignore[misc]
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
