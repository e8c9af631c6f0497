"""What vLLM's output and answers mean: phases of a real log, tasks of models, proofs of life."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.engine_contexts import context
from vllmd.engines.vllm import Vllm
from vllmd.engines.vllm_logs import PHASES, read_line
from vllmd.engines.vllm_proof import proofs

pytestmark = pytest.mark.unit

RECORDED = Path(__file__).parent / "data/vllm-0.32.0-start.log"


def test_a_recorded_start_goes_through_the_phases_in_order() -> None:
    facts = [read_line(line) for line in RECORDED.read_text(encoding="utf-8").split("\n")]
    seen = list(dict.fromkeys(fact.phase for fact in facts if fact.phase))
    assert seen == [
        "configuring",
        "starting-engine",
        "loading-weights",
        "compiling",
        "allocating-kv-cache",
        "starting-server",
    ]
    assert [PHASES.index(phase) for phase in seen] == sorted(PHASES.index(phase) for phase in seen)


def test_levels_of_a_recorded_start() -> None:
    levels = {read_line(line).priority for line in RECORDED.read_text(encoding="utf-8").split("\n")}
    assert levels == {4, 6}


@pytest.mark.parametrize(
    ("line", "priority", "phase", "fraction"),
    [
        ("(EngineCore pid=7) ERROR 11-21 01:46:36 [core.py:906] failed", 3, "", None),
        ("(Worker_TP0 pid=7) CRITICAL 11-21 01:46:36 [a.py:1] x", 2, "", None),
        ("DEBUG 11-21 01:46:36 [a.py:1] x", 7, "", None),
        ("INFO:     Application startup complete.", 6, "starting-server", None),
        ("ERROR:    [Errno 98] error while attempting to bind", 3, "", None),
        ("Traceback (most recent call last):", 3, "", None),
        ("RuntimeError: Engine core initialization failed. See root cause above", 3, "", None),
        ("/x/y.py:138: FutureWarning: deprecated", 4, "", None),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00]", 6, "loading-weights", 0.5),
        (
            "\rLoading safetensors checkpoint shards:   0% Completed\rLoading safetensors checkpoint shards: 100% Completed | 2/2",
            6,
            "loading-weights",
            1.0,
        ),
        ("Capturing CUDA graphs (decode, FULL):  25%|##  | 8/35", 6, "capturing-graphs", 0.25),
        ("(EngineCore pid=7) INFO 11-21 01:46:21 [x.py:1] cache usage: 99%", 6, "", None),
    ],
)
def test_one_line(line: str, priority: int, phase: str, fraction: float | None) -> None:
    fact = read_line(line)
    assert (fact.priority, fact.phase, fact.fraction) == (priority, phase, fraction)


@given(st.text())
def test_any_line_is_read(line: str) -> None:
    fact = read_line(line)
    assert 0 <= fact.priority <= 7
    assert fact.fraction is None or 0 <= fact.fraction <= 1


@given(st.integers())
def test_a_percentage_beyond_all_is_all(percent: int) -> None:
    fraction = read_line(f"Loading safetensors checkpoint shards: {percent}% Completed").fraction
    assert fraction is None or 0 <= fraction <= 1


def model(directory: Path, architecture: str, *, pooling: bool = False) -> Path:
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if pooling:
        (directory / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling"}]))
    return directory


@pytest.mark.parametrize(
    ("architecture", "pooling", "args", "task"),
    [
        ("Qwen3ForCausalLM", False, {}, "generate"),
        ("Qwen3ForCausalLM", True, {}, "embed"),
        ("Qwen3ForCausalLM", False, {"runner": "pooling"}, "embed"),
        ("Qwen3ForCausalLM", False, {"convert": "classify"}, "score"),
        ("BertModel", False, {}, "embed"),
        ("BertForSequenceClassification", False, {}, "score"),
        ("BertForSequenceClassification", False, {"runner": "pooling"}, "score"),
        ("WhisperForConditionalGeneration", False, {}, "transcribe"),
        ("LlavaForConditionalGeneration", False, {}, "generate"),
        ("Qwen3ForCausalLM", False, {"headless": True}, "joined"),
        ("Qwen3ForCausalLM", False, {"headless": False}, "generate"),
        ("SomethingNew", False, {}, "generate"),
    ],
)
def test_the_task_of_a_model(tmp_path: Path, architecture: str, pooling: bool, args: dict[str, Any], task: str) -> None:
    where = context(tmp_path, {"engine.args": args} if args else None)
    assert Vllm().task(where, model(tmp_path, architecture, pooling=pooling)) == task


def test_a_task_that_is_set_is_believed(tmp_path: Path) -> None:
    assert Vllm().task(context(tmp_path, {"serve.task": "score"}), model(tmp_path, "Qwen3ForCausalLM")) == "score"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"architectures": 5}', '{"architectures": [7]}', "[" * 100_000])
def test_a_config_that_is_no_config_is_taken_for_a_generating_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert Vllm().task(context(tmp_path), tmp_path) == "generate"


TOKEN = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 1}}
VECTOR = {"data": [{"embedding": [0.1, -2.0]}]}


@pytest.mark.parametrize(
    ("task", "body"),
    [
        ("generate", TOKEN),
        ("embed", VECTOR),
        ("score", {"data": [{"score": 0.5}]}),
        ("transcribe", {"text": ""}),
        ("none", {"data": [{"id": "demo"}]}),
    ],
)
def test_an_answer_that_proves_life(task: str, body: Any) -> None:
    assert proofs(task, "demo", {})[0].accept(body) == ""


@pytest.mark.parametrize(
    ("task", "body"),
    [
        ("generate", {"choices": []}),
        ("generate", {"choices": [{"text": "x", "finish_reason": None}]}),
        ("generate", {**TOKEN, "usage": {"completion_tokens": 0}}),
        ("embed", {"data": [{"embedding": []}]}),
        ("embed", {"data": [{"embedding": [None, 0.1]}]}),  # NaN weights
        ("embed", {"data": [{"embedding": [float("nan")]}]}),
        ("score", {"data": [{"score": None}]}),
        ("transcribe", {}),
        ("none", {"data": []}),
    ],
)
def test_an_answer_that_proves_nothing(task: str, body: Any) -> None:
    assert proofs(task, "demo", {})[0].accept(body) != ""


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["data", "choices", "usage", "text"]), inner),
    )
)
def test_no_answer_breaks_a_proof(body: Any) -> None:
    for task in ("generate", "embed", "score", "transcribe", "none"):
        for request in proofs(task, "demo", {"Authorization": "Bearer key"}):
            assert isinstance(request.accept(body), str)


def test_a_headless_node_cannot_be_asked() -> None:
    assert proofs("joined", "demo", {}) == ()


def test_speech_is_proved_with_a_sound_file() -> None:
    (request,) = proofs("transcribe", "demo", {"Authorization": "Bearer k"})
    sound = request.body[request.body.index(b"RIFF") :]
    with wave.open(io.BytesIO(sound)) as read:
        assert (read.getframerate(), read.getnframes()) == (16000, 16000)
    assert request.headers["Content-Type"].partition("boundary=")[2].encode() in request.body
    assert request.headers["Authorization"] == "Bearer k"
