"""What a failure means: the table, the engine's real words (recorded from vLLM 0.32), and which evidence wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllmd.core.events import Failure
from vllmd.core.faults import CAUSES, QUOTED, Facts, GpuFact, again, decide
from vllmd.core.lifecycle import NO_RESTART
from vllmd.engines.vllm_faults import SIGNATURES, SIGNS
from vllmd.system.messages import MESSAGES

pytestmark = pytest.mark.unit

DATA = Path(__file__).parent / "data/faults"
EXITED = Failure("engine_exited", "the engine ended by itself (exit status 1)", "look", 70)
START = Facts(EXITED, phase="loading-weights", exit="exit status 1", exit_code=1, memory_fraction=0.92, gpu_total_gib=80.0)
SERVING = replace(START, serving=True, phase="ready")

TORCH_OOM = (
    "(Worker pid=7) ERROR 11-21 09:38:09 [multiproc_executor.py:953] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
    "GPU 0 has a total capacity of 79.15 GiB of which 512.00 MiB is free. Including non-PyTorch memory, this process has 78.10 GiB memory in use."
)
FOREIGN_OOM = TORCH_OOM.replace("78.10", "38.10")
TAKEN = (
    "ValueError: Free memory on device cuda:0 (10.1/79.15 GiB) on startup is less than desired GPU memory utilization (0.92, 72.82 GiB). "
    "Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
KV_SMALL = (
    "ValueError: To serve at least one request with the model's max seq len (40960), (5.63 GiB KV cache is needed, which is larger than the "
    "available KV cache memory (3.23 GiB). Based on the available memory, the estimated maximum model length is 23488. Try increasing `gpu_memory_utilization`"
)


def words(*lines: str, facts: Facts = START) -> Failure:
    return decide(replace(facts, lines=lines), SIGNS).failure


def recorded(name: str) -> list[str]:
    return (DATA / f"{name}.log").read_text().split("\n")


@pytest.mark.parametrize(
    ("name", "code", "status", "said", "hint"),
    [
        ("bad_flag", "bad_flag", 78, "unrecognized arguments: --no-such-flag", "vllmd check"),
        ("bad_value", "bad_flag", 78, "invalid choice: 'nonsense'", "vllmd check"),
        ("bad_tp", "bad_flag", 78, "attention heads (4)", "serve.tensor_parallel_size to 4"),
        ("max_len", "bad_flag", 78, "max_model_len (999999)", "serve.max_model_len to 2048"),
        ("bad_arch", "bad_model", 65, "NoSuchForCausalLM", ""),
        ("bad_config", "bad_model", 65, "config.json' is not a valid JSON file", ""),
        ("missing_dir", "bad_model", 65, "/srv/nothing", ""),
        ("missing_shard", "bad_model", 65, "model-00002-of-00002.safetensors", ""),
        ("truncated_shard", "bad_model", 65, "SafetensorError: Error while deserializing header", ""),
        ("wrong_shape", "bad_model", 65, "exceeds dimension size (128)", ""),
        ("port_taken", "port_taken", 75, "Address already in use", "ss -ltnp"),
        ("kv_zero", "cuda_out_of_memory", 78, "No available memory for the cache blocks", "serve.gpu_memory_utilization (now 0.92"),
        ("kv_util", "cuda_out_of_memory", 78, "less than requested memory for kv", ""),
    ],
)
def test_recorded_failures_of_the_real_engine_have_their_cause(name: str, code: str, status: int, said: str, hint: str) -> None:
    lines = recorded(name)
    failure = words(*lines)
    assert (failure.code, failure.status) == (code, status), failure
    assert said in failure.what
    assert hint in failure.hint
    assert "root cause above" not in failure.what
    assert "{" not in failure.what.replace("{'", ""), "a line of source code, its figures not filled in"


def test_a_cause_that_stands_above_hundreds_of_lines_is_found() -> None:
    lines = recorded("truncated_shard")
    assert "See root cause above" in lines[-2]
    filler = [f"(Worker_TP{n % 8} pid=9) ERROR 11-21 09:38:09 [x.py:1]     frame {n}" for n in range(1500)]
    assert words(*lines[:-2], *filler, *lines[-2:]).code == "bad_model"


@pytest.mark.parametrize(
    ("line", "code", "status", "hint"),
    [
        (TAKEN, "gpu_memory_taken", 75, "serve.gpu_memory_utilization to 0.11 or less"),
        (KV_SMALL, "cuda_out_of_memory", 78, "serve.max_model_len to 23488 or less, or raise serve.gpu_memory_utilization to 0.95"),
        (TORCH_OOM, "cuda_out_of_memory", 78, "1.50 GiB are missing for the weights alone"),
        (FOREIGN_OOM, "cuda_out_of_memory", 75, "others hold 40.6 GiB of that GPU"),
        ("RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try", "cuda_out_of_memory", 78, "max-num-seqs to 512"),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", "driver_mismatch", 69, "driver"),
        ("ImportError: libcudart.so.13: cannot open shared object file: No such file or directory", "library_missing", 78, "ldd"),
        ("ImportError: /opt/vllm/_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEi", "library_missing", 78, ""),
        ("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error", "nccl_failed", 70, "topo"),
        ("RuntimeError: vLLM failed to compile the model. The most likely reason for this is that a previous compilation failed, leading to a corrupted compilation artifact.", "compile_cache_poisoned", 70, ""),
        ("OSError: [Errno 28] No space left on device: '/var/cache/vllmd/vllm/x'", "disk_full", 74, "df -h"),
        ("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your T4", "bad_flag", 78, "dtype: half"),
        ("ValueError: World size (8) is larger than the number of available GPUs (4) in this node.", "bad_flag", 78, "to 4 or less"),
        ("RuntimeError: CUDA error: out of memory", "cuda_out_of_memory", 75, ""),
        ("safetensors_rust.SafetensorError: Error while deserializing: I/O error: Stale file handle (os error 116)", "bad_model", 74, "storage"),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", "cuda_error", 70, "CUDA_LAUNCH_BLOCKING"),
    ],
)  # fmt: skip
def test_words_of_gpus_become_causes_with_figures(line: str, code: str, status: int, hint: str) -> None:
    failure = words("(EngineCore pid=3) ERROR 11-21 09:38:09 [core.py:1510] " + line.removeprefix("(Worker pid=7) ERROR 11-21 09:38:09 [multiproc_executor.py:953] "))
    assert (failure.code, failure.status) == (code, status), failure
    assert hint in failure.hint


def test_out_of_memory_while_serving_restarts_and_says_by_how_much() -> None:
    failure = words(TORCH_OOM, facts=SERVING)
    assert (failure.code, failure.status) == ("cuda_out_of_memory_serving", 70)
    assert "serve.gpu_memory_utilization to 0.88 or less" in failure.hint


def test_the_kernels_count_of_kills_beats_all_words() -> None:
    facts = replace(SERVING, lines=[TORCH_OOM], oom_kills=2, signal="SIGKILL", exit="killed by SIGKILL", memory_text="it had 23.9 of 24.0 GiB")
    failure = decide(facts, SIGNS).failure
    assert failure.code == "host_out_of_memory"
    assert "23.9 of 24.0 GiB" in failure.what


def test_a_sigkill_while_the_oom_killer_worked_on_the_host_is_its_doing_and_without_it_nobodys() -> None:
    killed = replace(SERVING, signal="SIGKILL", exit="killed by SIGKILL")
    assert decide(replace(killed, host_oom_kills=1), SIGNS).code == "host_out_of_memory"
    assert decide(killed, SIGNS).failure is killed.failure
    worker = replace(SERVING, failure=Failure("engine_died", "VLLM::Worker is gone", "", 70))
    assert decide(replace(worker, host_oom_kills=1), SIGNS).code == "host_out_of_memory"
    assert decide(replace(SERVING, host_oom_kills=1, exit="exit status 1"), SIGNS).failure is EXITED


def test_a_lost_gpu_beats_what_the_engine_says_of_it() -> None:
    facts = replace(SERVING, lines=["RuntimeError: CUDA error: unspecified launch failure"], gpu=[GpuFact("GPU 0 has fallen off the bus", "reboot", fatal=True)])
    cause = decide(facts, SIGNS)
    assert (cause.code, cause.failure.status, cause.failure.hint) == ("gpu_lost", 69, "reboot")
    assert decide(replace(facts, gpu=[GpuFact("Xid 31 on GPU 0", "", fatal=False)]), SIGNS).code == "gpu_fault"


def test_a_hang_stays_a_hang_unless_the_kernel_knows_better() -> None:
    hung = Failure("engine_hung", "no step for 60 s", "", 75)
    facts = replace(SERVING, failure=hung, lines=[TORCH_OOM])
    assert decide(facts, SIGNS).failure is hung
    assert decide(replace(facts, oom_kills=1), SIGNS).code == "host_out_of_memory"


@pytest.mark.parametrize("level", ["INFO", "WARNING", "DEBUG"])
def test_a_prompt_in_the_log_is_no_cause(level: str) -> None:
    line = f"(APIServer pid=1) {level} 11-21 09:38:09 [logger.py:1] Received request: 'CUDA out of memory. Tried to allocate 2.00 GiB'"
    assert words(line, facts=SERVING) == EXITED


@pytest.mark.parametrize(
    "line",
    [
        "/opt/vllm/site-packages/torchvision/io/image.py:14: UserWarning: Failed to load image Python extension: '/opt/image.so: undefined symbol: _ZN3c10'",
        "(Worker pid=9) /opt/x.py:14: UserWarning: libfoo.so: cannot open shared object file",
        "[rank1]:[W1121 10:11:12.123456789 TCPStore.cpp:125] [c10d] recvValue failed: Connection reset by peer (TCPStore)",
        "[W1121 10:11:12.123456789 socket.cpp:460] [c10d] Connection reset by peer, remote=[127.0.0.1]:2",
    ],
)
def test_a_warning_of_a_library_is_no_cause(line: str) -> None:
    assert words(line) == EXITED
    error = line.replace("/opt/x.py:14: UserWarning", "ImportError").replace("image.py:14: UserWarning", "ImportError").replace("[W", "[E")
    assert words(error) != EXITED


@pytest.mark.parametrize("text", ["GPU is lost", "No space left on device", "CUDA out of memory"])
def test_a_models_name_that_a_client_asked_for_is_no_cause(text: str) -> None:
    line = "(APIServer pid=1) ERROR 11-21 09:38:09 [serving.py:274] "
    name = f"Error with model error=ErrorInfo(message='The model `{text}` does not exist.', type='NotFoundError', param='model', code=404)"
    assert words(line + name, facts=SERVING) == EXITED


@pytest.mark.parametrize("text", ["GPU is lost", "CUDA driver version is insufficient", "no kernel image is available for execution on the device"])
def test_words_alone_forbid_no_restart_of_an_engine_that_has_served(text: str) -> None:
    line = f"(EngineCore pid=1) ERROR 11-21 09:38:09 [x.py:1] {text}"
    at_start, serving = words(line), words(line, facts=SERVING)
    assert at_start.status in NO_RESTART
    assert (serving.code, serving.status) == (at_start.code, 70)


def test_words_of_a_start_count_only_at_the_start() -> None:
    line = "  Value error, something that a client sent"
    assert words(line).code == "bad_flag"
    assert words(line, facts=SERVING) == EXITED


@pytest.mark.parametrize(("signal", "hint"), [("SIGSEGV", "traceback"), ("SIGILL", "float32"), ("SIGBUS", "/dev/shm")])
def test_a_crash_by_a_signal_is_the_engines(signal: str, hint: str) -> None:
    cause = decide(replace(SERVING, signal=signal, exit=f"killed by {signal}"), SIGNS)
    assert (cause.code, cause.failure.status) == ("engine_bug", 70)
    assert cause.failure.what.count(signal) == 1
    assert hint in cause.failure.hint


def test_a_traceback_that_nobody_knows_is_a_bug_of_the_engine() -> None:
    lines = ["Traceback (most recent call last):", '  File "/a/site-packages/vllm/x.py", line 3, in step', "    foo()", "KeyError: 'slot'"]
    cause = decide(replace(SERVING, lines=lines), SIGNS)
    assert cause.code == "engine_bug"
    assert "KeyError: 'slot'" in cause.failure.what
    assert cause.traceback is not None


def test_a_traceback_in_the_log_is_not_why_an_engine_was_killed_or_hangs() -> None:
    lines = ["Traceback (most recent call last):", '  File "/a/site-packages/vllm/x.py", line 3, in step', "    foo()", "KeyError: 'of a request'"]
    killed = replace(SERVING, lines=lines, signal="SIGKILL", exit="killed by SIGKILL")
    hung = replace(SERVING, lines=lines, failure=Failure("engine_hung", "no step for 60 s", "", 75))
    for facts in (killed, hung):
        cause = decide(facts, SIGNS)
        assert cause.failure is facts.failure
        assert cause.traceback is None


def test_a_line_of_any_length_gives_a_sentence_of_bounded_length() -> None:
    failure = words("vllm: error: " + "x" * 100_000)
    assert failure.code == "bad_flag"
    assert len(failure.what) < QUOTED + 200


def test_every_signature_names_a_row_and_every_row_is_whole() -> None:
    assert {each.code for each in SIGNATURES} <= set(CAUSES)
    assert all(row.what and row.hint and row.status in {65, 69, 70, 74, 75, 78} for row in CAUSES.values())


def test_the_third_time_in_a_row_is_said() -> None:
    assert again(EXITED, 2, "yesterday") is EXITED
    third = again(EXITED, 3, "2026-11-21T09:00:00Z")
    assert "3 times in a row since 2026-11-21T09:00:00Z" in third.what
    assert third.hint.startswith("restarts have not helped")


DOCS = Path(__file__).parents[2] / "docs/incidents.md"


def test_every_cause_stands_in_the_documentation_and_in_the_catalog() -> None:
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in DOCS.read_text().splitlines() if line.startswith("| ")}
    final = {65, 69, 78}
    for code, row in CAUSES.items():
        status, restarted = (cell.strip() for cell in rows[code])
        assert (int(status), restarted) == (row.status, "no" if row.status in final else "yes"), code
        assert row.event(code) in MESSAGES


@pytest.mark.parametrize(
    "cry",
    [
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "RuntimeError: Executor failed.",
        "RuntimeError: cancelled",
    ],
)
def test_the_cry_of_those_who_waited_for_a_killed_process_is_no_crash_of_the_engine(cry: str) -> None:
    """A SIGKILL of EngineCore, or of a Worker, was called a bug of the engine: the dead one itself says nothing."""
    died = replace(SERVING, failure=Failure("engine_died", "the engine's process VLLM::Worker (pid 7) died", "look", 70), exit="", exit_code=None)
    raised = ["Traceback (most recent call last):", '  File "/x/site-packages/vllm/v1/engine/core.py", line 1702, in run_busy_loop', "    raise it", cry]
    assert decide(replace(died, lines=raised), SIGNS).failure == died.failure
    real = [*raised[:3], "KeyError: 'blocks'", *raised]
    assert decide(replace(died, lines=real), SIGNS).failure.code == "engine_bug"


REQUEST = "(APIServer pid=7) ERROR 11-21 09:38:09 [serving.py:95] "
HANDLED = [
    REQUEST + "Traceback (most recent call last):",
    REQUEST + '  File "/x/site-packages/vllm/entrypoints/serving.py", line 3, in create',
    REQUEST + "ValueError: No space left on device, CUDA out of memory, NCCL error, says a client",
]


@pytest.mark.parametrize("code", ["engine_died", "engine_unhealthy", "engine_exited"])
@pytest.mark.parametrize("who", ["APIServer", "ApiServer_0"])
def test_what_went_wrong_with_a_request_is_not_why_the_engine_died(code: str, who: str) -> None:
    """The traceback, or the words, of any request in the last half minute became the cause of a killed EngineCore."""
    noticed = Failure(code, "a part of the engine died: VLLM::EngineCore (pid 9)", "look", 70)
    facts = replace(SERVING, failure=noticed, lines=[line.replace("APIServer", who) for line in HANDLED])
    cause = decide(facts, SIGNS)
    assert cause.failure is noticed
    assert cause.traceback is None
    core = ["(EngineCore pid=9) ERROR 11-21 09:38:09 [core.py:1] " + line.removeprefix(REQUEST) for line in HANDLED]
    assert decide(replace(facts, lines=[*core, *facts.lines]), SIGNS).failure.code == "cuda_out_of_memory_serving", "EngineCore's own words count"
    assert decide(replace(facts, lines=[*core[:2], "(EngineCore pid=9) ERROR 11-21 09:38:09 [core.py:1] KeyError: 'slot'", *facts.lines]), SIGNS).failure.code == "engine_bug"


def test_a_server_that_ends_of_its_own_exception_has_that_cause_and_one_whose_core_died_has_not() -> None:
    """What it prints at its own end is not logged."""
    lines = [line.replace(REQUEST, "(APIServer pid=7) ") for line in HANDLED[:2]] + ["(APIServer pid=7) KeyError: 'loop'"]
    assert decide(replace(SERVING, lines=lines), SIGNS).failure.code == "engine_bug"
    died = Failure("engine_died", "a part of the engine died: VLLM::EngineCore (pid 9)", "look", 70)
    assert decide(replace(SERVING, failure=died, lines=lines), SIGNS).failure is died


def test_at_the_start_the_server_has_no_requests_and_its_words_count() -> None:
    assert words(REQUEST + "OSError: [Errno 28] No space left on device").code == "disk_full"
