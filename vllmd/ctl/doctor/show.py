"""The findings for people, a line each, and for programs, as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vllmd import __version__
from vllmd.config.values import printable
from vllmd.ctl.doctor.examine import Report
from vllmd.ctl.doctor.finding import Finding


def lines(report: Report) -> Iterator[str]:
    for each in report.findings:
        yield _on_one_line(_line(each))
    for unseen in report.unseen:
        yield _on_one_line(f"not looked at: {unseen.what}: {unseen.why}")
    errors = sum(each.severity == "error" for each in report.findings)
    if report.findings:
        yield f"{errors} errors, {len(report.findings) - errors} warnings in {report.took_s:.1f} s. Mend them in this order, then: vllmctl doctor"
    else:
        yield f"nothing found ({len(report.instances)} instances, {report.took_s:.1f} s)"


def _line(each: Finding) -> str:
    asks = f" (it reads {each.asks} from its input)" if each.asks else ""
    note = f" [{each.note}]" if each.note else ""
    return f"{each.severity}: {each.where}: {each.what}" + (f"; run{asks}: {each.mend}" if each.mend else "") + note


def _on_one_line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def as_dict(report: Report) -> dict[str, Any]:
    return {
        "schema": 1,
        "version": __version__,
        "instances": list(report.instances),
        "findings": [asdict(each) for each in report.findings],
        "unseen": [asdict(each) for each in report.unseen],
        "took_s": round(report.took_s, 3),
    }
