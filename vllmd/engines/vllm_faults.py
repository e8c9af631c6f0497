"""What vLLM's own words mean when it has failed. Texts of 0.32, of torch 2.13 and of NCCL; the order is that of weight.

vLLM's last lines hide the cause ("See root cause above"): every line that says no level, or an error's, is looked at, and
the first that fits counts. Texts that a client's request can provoke count at the start only.
"""

from __future__ import annotations

import math
import re

from vllmd.core.faults import Advice, Facts, Signature, Signs

_UTILIZATION = "serve.gpu_memory_utilization"
_MODEL_LEN = "serve.max_model_len"
_MARGIN = 0.02
_MOST = 0.97
"""Above this share of a GPU there is no room for what is not in the budget (graphs, NCCL, other libraries)."""


def _down(value: float) -> float:
    return math.floor(value * 100) / 100


def _up(value: float) -> float:
    return math.ceil(round(value * 100, 6)) / 100


def _memory_taken(match: re.Match[str], _facts: Facts) -> Advice:
    """'Free memory on device cuda:0 (10.1/79.15 GiB) on startup is less than desired GPU memory utilization (0.92, 72.8 GiB)'."""
    free, total, wanted, budget = (float(match[name]) for name in ("free", "total", "wanted", "budget"))
    fits = _down(free / total) - 0.01 if total else 0.0
    taken = f"{total - free:.1f} of {total:.1f} GiB are taken, {budget:.1f} GiB ({wanted:g} of it) are wanted"
    if fits < 0.1:
        return f"{taken}: end what holds them (`vllmctl gpu` names it)", 0
    return f"{taken}: end what holds them (`vllmctl gpu` names it), or set {_UTILIZATION} to {fits:.2f} or less", 0


def _kv_too_small(match: re.Match[str], facts: Facts) -> Advice:
    """'To serve at least one request with the model's max seq len (40960), (5.6 GiB KV cache is needed, ...'."""
    needed, available = float(match["needed"]), float(match["available"])
    ways = [f"set {_MODEL_LEN} to {match['fits']} or less"] if match["fits"] else [f"lower {_MODEL_LEN} (now {match['length']})"]
    more = _raised(facts, needed - available)
    ways += [f"raise {_UTILIZATION} to {more:.2f}"] if more else []
    ways.append("spread the model over more GPUs (serve.tensor_parallel_size)")
    return f"{needed - available:.2f} GiB are missing for one request of full length: {', or '.join(ways)}", 0


def _raised(facts: Facts, missing_gib: float) -> float:
    """The share of memory that has so much more room; 0 where that is more than a GPU should give, or unknown."""
    if not facts.gpu_total_gib or not facts.memory_fraction:
        return 0.0
    share = _up(facts.memory_fraction + missing_gib / facts.gpu_total_gib)
    return share if share <= _MOST else 0.0


def _no_kv(_match: re.Match[str], facts: Facts) -> Advice:
    share = facts.memory_fraction
    raised = f"raise {_UTILIZATION} (now {share:g}, at most {_MOST})" if 0 < share < _MOST else ""
    ways = [raised] if raised else []
    return "the weights leave nothing for the KV cache: " + ", or ".join([*ways, "raise serve.tensor_parallel_size", "serve a quantized model"]), 0


def _too_many_dummies(match: re.Match[str], facts: Facts) -> Advice:
    half = max(1, int(match["requests"]) // 2)
    return f"set engine.args max-num-seqs to {half} or less, or {_UTILIZATION} to {max(0.1, _down(facts.memory_fraction or 0.9) - 0.05):.2f}", 0


_AMOUNT = {"bytes": 1 / (1 << 30), "KiB": 1 / (1 << 20), "MiB": 1 / 1024, "GiB": 1.0, "TiB": 1024.0}


def _gib(number: str, unit: str) -> float:
    return float(number) * _AMOUNT.get(unit, 0.0)


_CAPACITY = re.compile(r"total capacity of (?P<total>[\d.]+) (?P<tu>\w+) of which (?P<free>[\d.]+) (?P<fu>\w+) is free")
_OWN = re.compile(r"this process has (?P<own>[\d.]+) (?P<ou>\w+) memory in use")


def _allocation_failed(match: re.Match[str], facts: Facts) -> Advice:
    """torch: 'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.20 GiB is free. ...'."""
    tried = _gib(match["tried"], match["unit"])
    room = _CAPACITY.search(match.string)
    if room is None or not tried:
        return "", 0
    total, free = _gib(room["total"], room["tu"]), _gib(room["free"], room["fu"])
    own = _OWN.search(match.string)
    foreign = total - free - _gib(own["own"], own["ou"]) if own else 0.0
    missing = f"{max(tried - free, 0):.2f} GiB are missing"
    if foreign > 0.05 * total:
        return f"{missing}, and others hold {foreign:.1f} GiB of that GPU: `vllmctl gpu` names them", 75
    share = _down((facts.memory_fraction or 0.92) - max(tried - free, 0) / total - _MARGIN) if total else 0.0
    if not facts.serving and "loading" in facts.phase:
        return f"{missing} for the weights alone: raise serve.tensor_parallel_size, or serve a quantized model", 0
    return (f"{missing}: set {_UTILIZATION} to {share:.2f} or less, or lower engine.args max-num-seqs" if share >= 0.3 else ""), 0


def _no_figures(_match: re.Match[str], _facts: Facts) -> Advice:
    """CUDA itself names no size and no owner, and says so first of all where another program holds nearly everything: may pass."""
    return "", 75


def _too_long(match: re.Match[str], _facts: Facts) -> Advice:
    return f"set {_MODEL_LEN} to {match['most'].partition('.')[0]} or less (it is {match['given']})", 0


def _heads(match: re.Match[str], _facts: Facts) -> Advice:
    heads, size = int(match["heads"]), int(match["size"])
    fits = max(n for n in range(1, min(size, heads) + 1) if heads % n == 0)
    return f"set serve.tensor_parallel_size to {fits} (it must divide {heads}, and is {size})", 0


def _world(match: re.Match[str], _facts: Facts) -> Advice:
    return f"set serve.tensor_parallel_size times serve.pipeline_parallel_size to {match['gpus']} or less (it is {match['size']}), or give the instance more GPUs", 0


def _half(_match: re.Match[str], _facts: Facts) -> Advice:
    return "set engine.args `dtype: half`: this GPU has no bfloat16", 0


def _trust(_match: re.Match[str], _facts: Facts) -> Advice:
    return "the model brings code of its own: set engine.args `trust-remote-code: true` if you trust it", 78


def _row(pattern: str, code: str, when: str = "any", advise: object = None) -> Signature:
    return Signature(re.compile(pattern), code, when, advise)  # type: ignore[arg-type]


_STORAGE = r"(?:Input/output error|Stale file handle|Transport endpoint is not connected|os error (?:5|107|110|112|116)\b)"


def _unreadable(_match: re.Match[str], _facts: Facts) -> Advice:
    """A network file system that comes back, or a disk: not the model's bytes."""
    return "its storage fails: `journalctl -k -p err`, and the server where it is a network's", 74


_N = r"[\d.]+"
SIGNATURES: tuple[Signature, ...] = (
    # The GPU and its driver: what follows from them is noise.
    _row(r"GPU is lost|GPU has fallen off the bus|CUDA error: (?:an uncorrectable ECC|.*(?:device is busy or unavailable|unknown error.*GPU.*lost))", "gpu_lost"),
    _row(r"(?:driver on your system is too old|CUDA driver version is insufficient|Driver/library version mismatch|forward compatibility was attempted)", "driver_mismatch"),
    _row(r"no kernel image is available for execution on the device", "library_missing"),
    _row(r"No CUDA GPUs are available|CUDA_ERROR_NO_DEVICE|no CUDA-capable device is detected", "gpu_lost", "start"),
    # Memory.
    _row(
        rf"(?:Free memory on device \S+|Available memory on node \S+) \((?P<free>{_N})/(?P<total>{_N}) GiB\) on startup is less than "
        rf"(?:desired [GC]PU memory utilization|the engine's budget after excluding external process's weights) \((?P<wanted>{_N}), (?P<budget>{_N}) GiB\)",
        "gpu_memory_taken", "start", _memory_taken,
    ),
    _row(
        rf"max seq len \((?P<length>\d+)\), \((?P<needed>{_N}) GiB KV cache is needed, which is larger than the available KV cache memory "
        rf"\((?P<available>{_N}) GiB\)(?:.*estimated maximum model length is (?P<fits>\d+))?",
        "cuda_out_of_memory", "start", _kv_too_small,
    ),
    _row(r"No available memory for the cache blocks", "cuda_out_of_memory", "start", _no_kv),
    _row(r"less than requested memory for kv|Externally held weights on device .* exceed", "cuda_out_of_memory", "start"),
    _row(r"CUDA out of memory occurred when warming up \w+ with (?P<requests>\d+) dummy requests", "cuda_out_of_memory", "start", _too_many_dummies),
    _row(r"(?:CUDA|HIP) out of memory\. Tried to allocate (?P<tried>[\d.]+) (?P<unit>\w+)", "cuda_out_of_memory", "start", _allocation_failed),
    _row(r"(?:CUDA|HIP) out of memory\. Tried to allocate (?P<tried>[\d.]+) (?P<unit>\w+)", "cuda_out_of_memory_serving", "serving", _allocation_failed),
    _row(r"(?:CUDA|HIP) out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED", "cuda_out_of_memory", "start", _no_figures),
    _row(r"(?:CUDA|HIP) out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED", "cuda_out_of_memory_serving", "serving"),
    _row(r"^Error in memory profiling|AssertionError: Error in memory profiling", "gpu_memory_taken", "start"),
    _row(r"DefaultCPUAllocator: can't allocate memory|^MemoryError\b|Cannot allocate memory", "host_out_of_memory"),
    # What was configured. argparse ends with these words, at the first look at the command line.
    _row(r"^vllm(?: \w+)?: error: ", "bad_flag", "start"),
    _row(r"User-specified max_model_len \((?P<given>\d+)\) is greater than the derived max_model_len \(\w+=(?P<most>\d+)", "bad_flag", "start", _too_long),
    _row(r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<size>\d+)\)", "bad_flag", "start", _heads),
    _row(r"World size \((?P<size>\d+)\) is larger than the number of available GPUs \((?P<gpus>\d+)\)", "bad_flag", "start", _world),
    _row(r"Bfloat16 is only supported on GPUs with compute capability", "bad_flag", "start", _half),
    # The model.
    _row(r"set the option `?trust_remote_code=True`?|trust_remote_code=True.*to remove this error", "bad_model", "start", _trust),
    _row(r"Model architectures .* are not supported for now|is not a valid JSON file|Can't load the configuration of|does not recognize this architecture", "bad_model", "start"),
    _row(rf"SafetensorError: .*{_STORAGE}", "bad_model", "start", _unreadable),
    _row(r"SafetensorError: |Weight files referenced in index but missing|Cannot find any model weights|HFValidationError: Repo id must be", "bad_model", "start"),
    _row(r"(?:Following weights were not initialized|There is no module or parameter named|size mismatch for|exceeds dimension size|shape mismatch.*loaded weight)", "bad_model", "start"),
    _row(r"Error no file named|Can't load tokenizer|Unrecognized model in", "bad_model", "start"),
    _row(r"for (?:ModelConfig|VllmConfig|EngineArgs|\w*Config)$|^  Value error, ", "bad_flag", "start"),
    # The rest.
    _row(r"^OSError: \[Errno 98\]|\[Errno 98\] (?:error while attempting to bind|Address already in use)", "port_taken", "start"),
    _row(r"corrupted compilation artifact|Compile cache file corrupted", "compile_cache_poisoned", "start"),
    _row(r"(?:compile_cache|inductor|triton)\S*\.(?:so|cubin|py|json)\S*: (?:invalid ELF header|file too short)", "compile_cache_poisoned", "start"),
    _row(r"^_pickle\.UnpicklingError|^torch\._inductor\.exc\.InductorError: .*(?:UnpicklingError|EOFError|JSONDecodeError)", "compile_cache_poisoned", "start"),
    _row(r"No space left on device|\[Errno 28\]", "disk_full"),
    _row(r"cannot open shared object file|undefined symbol: |^ImportError: lib\S+|version `\S+' not found", "library_missing", "start"),
    _row(r"^ModuleNotFoundError: |^PackageNotFoundError: |importlib.metadata.PackageNotFoundError", "library_missing", "start"),
    _row(r"(?:Connection reset by peer|Connection closed by peer|remote process exited|connection closed by remote peer|Socket Timeout).*(?:\[\d{1,3}\.|gloo|NCCL|TCPStore)|gloo.*Connection closed by peer", "peer_lost"),
    _row(r"DistNetworkError|DistStoreError|Timed out .{0,40}waiting for clients", "peer_lost"),
    _row(r"NCCL error|ncclSystemError|ncclRemoteError|ncclInternalError|ncclUnhandledCudaError|Watchdog caught collective operation timeout|DistBackendError", "nccl_failed"),
    _row(r"RPC call to \w+ timed out", "worker_hung"),
    _row(r"CUDA error: |CUDA_ERROR_|HIP error: |cudaErrorIllegalAddress|illegal memory access", "cuda_error"),
)

ECHOES = tuple(
    re.compile(pattern)
    for pattern in (
        r"[Ss]ee root cause above|[Ss]ee stack trace|stack trace above for the root cause|for root cause",
        r"EngineDeadError|^RuntimeError: (?:Executor failed\.|cancelled$)|^CancelledError|^KeyboardInterrupt|^SystemExit",
        r"^ConnectionResetError|^BrokenPipeError",
    )
)

QUOTES = (re.compile(r"Error with model "),)
"""'Error with model error=ErrorInfo(message='The model `any text of a client` does not exist.', ...': logged as an error of the server."""

FRONT = re.compile(r"\(api_?server", re.IGNORECASE)
"""'(APIServer pid=7) ', '(ApiServer_0 pid=7) ' where there are several."""

SIGNS = Signs(SIGNATURES, ECHOES, QUOTES, FRONT)
