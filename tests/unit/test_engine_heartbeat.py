"""vLLM's metrics read as a heartbeat: the right figures from the right text, and nothing from what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.core.pulse import Rank
from vllmd.engines.protocol import Beating, ProofRequest
from vllmd.engines.vllm import Vllm
from vllmd.engines.vllm_heartbeat import LINE_MAX_BYTES, Reading, addressed

pytestmark = pytest.mark.unit

HEAD = "# HELP vllm:num_requests_running Number of requests in model execution batches.\n# TYPE vllm:num_requests_running gauge\n"


def rank_text(engine: str, beats: float, running: float = 0, waiting: float = 0, more: str = "", model: str = "tiny") -> str:
    labels = f'engine="{engine}",{more}model_name="{model}"'
    return (
        HEAD
        + f"vllm:num_requests_running{{{labels}}} {running}\nvllm:num_requests_waiting{{{labels}}} {waiting}\n"
        + f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}} 77\n'
        + f"vllm:kv_cache_usage_perc{{{labels}}} 0.25\n"
        + f'vllm:request_success_total{{{labels},finished_reason="stop"}} 2.0\n'
        + f'vllm:request_success_total{{{labels},finished_reason="length"}} 3.0\n'
        + f'vllm:request_success_total{{{labels},finished_reason="abort"}} 50.0\n'
        + f'vllm:iteration_tokens_total_bucket{{{labels},le="+Inf"}} 999\n'
        + f"vllm:iteration_tokens_total_count{{{labels}}} {beats}\nvllm:iteration_tokens_total_sum{{{labels}}} 1e9\n"
        + f"vllm:iteration_tokens_total_created{{{labels}}} 1.7e+09\n"
    )


def read(text: str | bytes, *, chunk: int = 1 << 16) -> tuple[str, dict[str, Rank]]:
    data = text if isinstance(text, bytes) else text.encode()
    reading = Reading()
    for start in range(0, len(data), chunk):
        reading.feed(data[start : start + chunk])
    outcome, ranks = reading.result()
    return outcome, dict(ranks)


def test_the_figures_of_one_rank() -> None:
    outcome, ranks = read(rank_text("0", 41, 2, 1))
    assert outcome == "ok"
    told = ranks["0"]
    assert ranks == {"0": Rank(41, 2, 1, 5, told.others, told.generated, told.prompted, told.kv_used)}
    assert told.kv_used == 0.25
    assert 0.25 in ranks["0"].others


def test_ranks_are_kept_apart_and_api_servers_are_added_up() -> None:
    text = rank_text("0", 10, more='pid="7",') + rank_text("0", 5, 1, more='pid="8",') + rank_text("1", 3)
    _, ranks = read(text)
    assert {name: (rank.beats, rank.running) for name, rank in ranks.items()} == {"0": (15, 1), "1": (3, 0)}


@given(st.integers(1, 300))
def test_it_does_not_matter_how_the_text_is_cut(chunk: int) -> None:
    text = rank_text("0", 41, 2, 1) + rank_text("1", 9)
    assert read(text, chunk=chunk) == read(text)


def test_a_model_whose_name_looks_like_labels_is_no_other_rank() -> None:
    _, ranks = read(rank_text("0", 4, model='a\\",engine=\\"9\\"} 8'))
    assert {name: rank.beats for name, rank in ranks.items()} == {"0": 4}


def test_the_last_line_needs_no_end_and_a_timestamp_does_not_matter() -> None:
    assert read('vllm:iteration_tokens_total_count{engine="0"} 7 1700000000')[1]["0"].beats == 7


def test_sleeping_is_told_from_idle() -> None:
    awake = 'vllm:engine_sleep_state{engine="0",model_name="t",sleep_state="awake"} '
    assert read(rank_text("0", 1) + awake + "0.0\n")[0] == "sleeping"
    assert read(rank_text("0", 1) + awake + "1.0\n" + awake.replace("awake", "discard_all") + "0.0\n")[0] == "ok"


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("", "invalid"),
        ("<html>404</html>", "invalid"),
        ("# TYPE python_gc_objects_collected_total counter\npython_gc_objects_collected_total 1\n", "absent"),
        ('# TYPE x gauge\nvllm:num_requests_running{engine="0"} 1\n', "invalid"),
        ('vllm:iteration_tokens_total_count{engine="0"} NaN\n', "invalid"),
        ('vllm:iteration_tokens_total_count{engine="0"} -1\n', "invalid"),
        ('vllm:iteration_tokens_total_count{engine="0"} x\n', "invalid"),
    ],
)
def test_what_cannot_be_read_is_never_idle(text: str, outcome: str) -> None:
    assert read(text) == (outcome, {})


def test_a_line_without_end_costs_no_memory_and_hides_nothing_after_it() -> None:
    reading = Reading()
    reading.feed(b'vllm:iteration_tokens_total_count{engine="0"} 7\n')
    for _ in range(100):
        reading.feed(b"x" * (LINE_MAX_BYTES // 2))
        assert len(reading._rest) <= LINE_MAX_BYTES
    reading.feed(b'\nvllm:num_requests_running{engine="0"} 3\n')
    assert reading.result()[1]["0"].running == 3


@given(st.binary(max_size=2000), st.integers(1, 50))
def test_no_bytes_make_it_fail(data: bytes, chunk: int) -> None:
    assert read(data, chunk=chunk)[0] in ("ok", "absent", "invalid", "sleeping")


def test_vllm_is_an_engine_with_a_heartbeat_and_ranks_that_can_be_addressed() -> None:
    assert isinstance(Vllm(), Beating)
    proof = ProofRequest("POST", "/v1/completions", {}, lambda _body: "", {"Authorization": "Bearer k"}, "a token")
    assert addressed(proof, "3").headers == {"Authorization": "Bearer k", "X-data-parallel-rank": "3"}
    assert addressed(proof, "odd\r\n") == proof
