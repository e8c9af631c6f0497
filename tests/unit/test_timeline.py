"""The picture of a start: drawn from what was recorded, and every phase has a name and a place in it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import timeline
from tools.timeline import PICTURES, Recording, Span, Start, read, svg
from vllmd.engines.vllm_logs import PHASES

pytestmark = pytest.mark.unit

SVG = "{http://www.w3.org/2000/svg}"


def drawn(recording: Recording) -> Any:
    return ElementTree.fromstring(svg(recording))


def test_the_picture_is_what_was_recorded() -> None:
    assert (PICTURES / "start.svg").read_text() == svg(read((PICTURES / "start.json").read_text())), "run: python -m tools.timeline"


def test_the_recording_is_of_a_start_with_and_one_without_a_download() -> None:
    first, second = read((PICTURES / "start.json").read_text()).starts
    assert "fetch" in {span.name for span in first.spans}
    assert "verify" in {span.name for span in second.spans}
    assert "fetch" not in {span.name for span in second.spans}


def test_every_phase_of_the_engine_has_a_name() -> None:
    assert set(PHASES) <= set(timeline.NAMES)


@given(st.lists(st.floats(0, 5000), min_size=1, max_size=9), st.floats(0.01, 1))
def test_all_of_a_start_is_within_the_picture(lengths: list[float], rest: float) -> None:
    spans, at = [], 0.0
    for name, length in zip(timeline.NAMES, lengths, strict=False):
        spans.append(Span(name, at, at + length))
        at += length
    root = drawn(Recording("here", (Start("one", tuple(spans), at + rest), Start("two", tuple(spans[:1]), spans[0].end + rest))))
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert all(timeline.NAMES[span.name][0] in texts for span in spans)
    for bar in root.iter(f"{SVG}rect"):
        if "x" in bar.attrib:
            assert float(bar.attrib["x"]) + float(bar.attrib["width"]) <= timeline.WIDTH
            assert float(bar.attrib["y"]) + float(bar.attrib["height"]) <= float(root.attrib["height"])
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.attrib["y"]) < float(root.attrib["height"])
        assert 0 < float(text.attrib["x"]) < timeline.WIDTH
