"""Two real starts of a model of a gigabyte, one that fetches it and one that has it: what docs/start.md shows as a picture. Only where a
picture is asked for, since they take minutes; with the fake engine always.

    VLLMD_PICTURES=docs/pictures .venv/bin/pytest tests/engine/test_start_picture.py && python -m tools.timeline
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import procs, synthetic_models
from tests.engine.server import Kind
from tests.engine.test_daemon_real import READY_S, instance
from tests.fakes.hub import FakeHub
from tests.harness import Instance, merged
from tools.timeline import NAMES, Recording, Span, Start
from vllmd.models import demo

pytestmark = pytest.mark.timeout(500)

LOOK_S = 0.02
PHASE = re.compile(r'^vllmd_start_phase_seconds\{.*phase="([^"]+)".*\} (\S+)$', re.MULTILINE)
SHAPE = {"vocab_size": 320, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
"""A Qwen3-0.6B with a small vocabulary, so that the tokenizer of the tiny model fits."""
SMALL = {"vocab_size": 320, "num_hidden_layers": 2}


@pytest.fixture
def hub(kind: Kind, tmp_path: Path) -> Iterator[FakeHub]:
    if kind.name == "real" and not os.environ.get("VLLMD_PICTURES"):
        pytest.skip("no picture is asked for (VLLMD_PICTURES)")
    model = demo.make(tmp_path / "pushed")
    for path in model.glob("*.safetensors*"):
        path.unlink()
    synthetic_models.write(model, synthetic_models.config("qwen3", **(SHAPE if kind.name == "real" else SMALL)), shards=4)
    with FakeHub({"acme/Model": model}) as hub:
        yield hub


def recorded(served: Instance, title: str) -> Start:
    """One start, seen from outside: status.json until the model is looked for, then the supervisor's own figures, and the life of the
    child that resolves and verifies. A phase can be shorter than status.json is written."""
    (served.runtime / "status.json").unlink(missing_ok=True)  # of the start before
    began = time.monotonic()
    served.start()
    seen, child, verified = {"created": 0.0}, 0, 0.0
    while (state := _state(served)) != "ready":
        at = time.monotonic() - began
        assert at < READY_S, served.describe()
        seen.setdefault(state, round(at, 3))
        if not child and state == "resolving":
            child = next((each.pid for each in procs.processes() if each.ppid == served.pid and "vllmd.models" in each.cmdline), 0)
        elif child and not verified and not procs.is_alive(child):
            verified = at
        time.sleep(LOOK_S)
    ready = time.monotonic() - began
    took = {name: float(value) for name, value in PHASE.findall(served.control("/metrics")[1])}
    spans = _chained(took, ready)
    looked = [(name, seen[name]) for name in ("created", "checking") if name in seen]
    before = [Span(name, at, end) for (name, at), end in zip(looked, [*(at for _, at in looked[1:]), spans[0].begin], strict=True)]
    spawn = next(span for span in spans if span.name == "spawn")
    beside = [Span("verify", spawn.begin, round(verified, 3))] if verified > spawn.begin else []
    at = spans.index(spawn) + 1
    return Start(title, (*before, *(span for span in (*spans[:at], *beside, *spans[at:]) if span.name != "verify" or span in beside)), round(ready, 3))


def _chained(took: dict[str, float], ready: float) -> list[Span]:
    """One after the other, the last of them up to READY."""
    at, spans = ready - sum(took.values()), []
    for name, seconds in took.items():
        spans.append(Span(name, round(at, 3), round(at + seconds, 3)))
        at += seconds
    return spans


def _state(served: Instance) -> str:
    with contextlib.suppress(OSError, ValueError):
        return str(served.status_json()["state"])
    return "created"


def test_phases_follow_each_other_up_to_ready(kind: Kind, hub: FakeHub, tmp_path: Path) -> None:
    with contextlib.closing(instance(kind)) as served:
        args = {"dtype": "bfloat16", "max-model-len": 2048} if kind.name == "real" else {}
        model = {"path": "", "id": "acme/Model", "sources": ["hf-hub"], "hf_endpoint": hub.url}
        served.config = merged(served.config, {"model": model, "engine": {"args": args}})
        served.write_config()
        starts = []
        for title in ("The first start fetches the model", "The next start has it"):
            starts.append(recorded(served, title))
            size = sum(path.stat().st_size for path in Path(served.status()["model"]["directory"]).glob("*.safetensors"))
            served.signal(signal.SIGTERM)
            assert served.wait_exit(60) == 0
        version = served.status_json()["engine"]["version"]
    made = Recording(
        f"Recorded with vLLM {version} (CPU build, --enforce-eager), {size / 1e9:.2f} GB of weights from a hub on the same host, {os.cpu_count()} cores shared with other work, no GPU",
        tuple(starts),
    )
    for start in made.starts:
        names = [span.name for span in start.spans]
        assert set(names) <= set(NAMES), names
        assert [name for name in ("spawn", "loading-weights", "proof") if name in names] == ["spawn", "loading-weights", "proof"]
        own = [span for span in start.spans if span.name != "verify"]
        assert all(one.end == pytest.approx(other.begin, abs=0.01) for one, other in itertools.pairwise(own))
        assert max(span.end for span in start.spans) <= start.ready + 0.1
    assert "fetch" in {span.name for span in starts[0].spans}
    assert "fetch" not in {span.name for span in starts[1].spans}
    folder = Path(os.environ.get("VLLMD_PICTURES") or tmp_path) if kind.name == "real" else tmp_path
    (folder / "start.json").write_text(json.dumps(made.as_dict(), indent=1) + "\n")
