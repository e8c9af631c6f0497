"""One row per setting: the fields of these dataclasses are the rows, and the only place where a default is written.

The parser, the command line, `vllmd check`, the man page, the example file and the JSON schema are made from them.
A row's YAML key is `<section>.<field>` (its section is the attribute of `Config`). Values are parsed at the door
(config/layers.py) by the row's parser and never checked again.
"""

# ruff: noqa: FBT003 - a row's default stands first, and some are booleans

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from vllmd.config import parsers as p
from vllmd.config.detectors import DETECTORS


@dataclass(frozen=True, slots=True)
class Setting:
    """What a row says besides its default.

    `parse` takes what YAML or the environment gave and returns the typed value, or raises ValueError with a reason.
    `env` is the environment name; `aliases` maps other accepted names to a function that turns their text into this
    setting's. `unit` is for people ('s', 'MiB', '%'). `restart` says whether a change needs a restart of the instance.
    """

    parse: Callable[[object], Any]
    env: str
    help: str
    unit: str = ""
    aliases: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    restart: bool = True
    secret: bool = False


def setting(
    default: Any,
    parse: Callable[[object], Any],
    env: str,
    help: str,  # noqa: A002 - the field's standard term, as in argparse
    **more: Any,
) -> Any:
    return field(default=default, metadata={"setting": Setting(parse=parse, env=env, help=help, **more)})


def _same(text: str) -> str:
    return text


SOURCES = p.KNOWN_SOURCES
"""Default order of lookup; `flox` and `s3` are accepted as other names of bundled and r2."""


@dataclass(frozen=True, slots=True)
class Model:
    """Which model, and where it may come from. A plain `model: X` in YAML is an id, or a directory if it begins with / or ~."""

    name: str = setting("", p.model_name, "VLLM_MODEL", "The model's short name; empty with no id: no model selected.")
    org: str = setting("", p.model_name, "VLLM_MODEL_ORG", "The organisation; with the name it makes the id.")
    id: str = setting("", p.model_id, "VLLM_MODEL_ID", "The model's full id, ORG/NAME.")
    revision: str = setting("", p.revision, "VLLM_MODEL_REVISION", "Revision (branch, tag or commit); part of the identity.")
    path: str = setting("", p.absolute_path, "VLLMD_MODEL_PATH", "A directory of your own that holds the model, used in place, read-only.")
    sources: tuple[str, ...] = setting(SOURCES, p.sources, "VLLM_MODEL_SOURCES", "Sources in order of lookup; the first hit wins.")
    dir: str = setting("", p.absolute_path, "VLLM_MODELS_DIR", "The model store; empty: models/ in vllmd's state directory.")
    env_file: str = setting("", p.absolute_path, "VLLM_MODEL_ENV_FILE", "Where vllm-resolve-model writes, and vllm-serve reads, the resolved model.")
    env_file_trusted: bool = setting(
        False, p.boolean, "VLLM_ENV_FILE_TRUSTED", "Let a shell read the env file (it must belong to root or the caller, and be writable by nobody else)."
    )
    lock_timeout_s: float = setting(300.0, p.seconds(low=0), "VLLM_RESOLVE_LOCK_TIMEOUT", "How long to wait for another resolution of the same model.", unit="s")
    skip_tokenizer_check: bool = setting(False, p.boolean, "VLLM_SKIP_TOKENIZER_CHECK", "Accept a model without tokenizer files.")
    skip_integrity_check: bool = setting(False, p.boolean, "VLLM_SKIP_INTEGRITY_CHECK", "Skip the integrity checks of weights (headers, sizes, sums).")
    cache_integrity_hash: bool = setting(False, p.boolean, "VLLM_CACHE_INTEGRITY_HASH", "Remember sums that were checked, by modification time and size.")
    verify: str = setting("headers", p.choice("headers", "sha256"), "VLLMD_VERIFY", "What must be verified before READY: the headers, or every byte against the manifest.")
    warm_up: str = setting("auto", p.choice("auto", "on", "off"), "VLLMD_WARM_UP", "Read and verify every byte of the model while the engine imports; auto: unless it lies on a network file system, or is larger than the free memory (on: then it is read without filling the page cache).")
    offline: bool = setting(False, p.boolean, "VLLMD_OFFLINE", "Ask no network source, not even whether there is something newer.")
    source_timeout_s: float = setting(3600.0, p.seconds(low=0), "VLLMD_SOURCE_TIMEOUT_S", "How long sources that cannot be reached are asked again within one start; a download that moves is never cut.", unit="s")
    source_retry_s: float = setting(10.0, p.seconds(above=0), "VLLMD_SOURCE_RETRY_S", "The first pause before they are asked again; it doubles, up to 5 min.", unit="s")
    fetch_stall_s: float = setting(30.0, p.seconds(above=0), "VLLMD_FETCH_STALL_S", "A connection without a byte for this long is given up and made anew.", unit="s")
    fetch_connections: int = setting(8, p.integer(low=1, high=64), "VLLMD_FETCH_CONNECTIONS", "Connections of one download.")
    exclude: tuple[str, ...] = setting((), p.listing, "VLLMD_EXCLUDE", "Files that are not fetched: shell patterns over their names, as *.Q8_0.gguf.")
    keep: int = setting(2, p.integer(low=1), "VLLMD_KEEP", "Published versions of a model that are kept; what is in use or pinned is never removed.")
    allow_pickle: bool = setting(False, p.boolean, "VLLMD_ALLOW_PICKLE", "Accept weights in pickle files (*.bin, *.pt, *.pth): loading them can run code that they bring.")
    require_revision: str = setting("no", p.choice("no", "any", "commit"), "VLLMD_REQUIRE_REVISION", "Whether a model from the hub must name a revision: any, or a commit (40 hex digits), which nobody can move.")
    require_sums: bool = setting(False, p.boolean, "VLLMD_REQUIRE_SUMS", "Refuse a model whose weights no sum speaks for (sha256sums.txt, manifest.sha256, the hub's, the store's).")
    keep_logs: bool = setting(False, p.boolean, "VLLM_KEEP_LOGS", "Keep logs of fetches that succeeded.")
    r2_bucket: str = setting("", p.text, "R2_BUCKET", "Bucket of the r2 source (any S3-compatible store).")
    r2_models_prefix: str = setting("", p.text, "R2_MODELS_PREFIX", "Key prefix under which models lie in the bucket.")
    r2_endpoint_url: str = setting("", p.text, "R2_ENDPOINT_URL", "Endpoint of the store.")
    r2_object_prefix: str = setting("", p.text, "R2_MODEL_OBJECT_PREFIX", "Whole key prefix of this model; replaces prefix and name.")
    r2_region: str = setting("", p.text, "R2_REGION", "Region of the store; empty: what the usual AWS configuration says, else auto.")
    hf_endpoint: str = setting("", p.text, "HF_ENDPOINT", "Endpoint of the hub, or of a mirror; empty: https://huggingface.co.")
    hf_xet: bool = setting(False, p.boolean, "VLLMD_HF_XET", "Fetch by the hub's Xet protocol where a file has it; a transfer that stalls or fails goes on by plain HTTP.")
    hf_token: str = setting("", p.text, "HF_TOKEN", "Token for gated models on the hub.", secret=True)
    flox_env: str = setting("", p.absolute_path, "FLOX_ENV", "Flox environment; its share/models is a bundled source.")
    flox_env_cache: str = setting("", p.absolute_path, "FLOX_ENV_CACHE", "Flox cache directory; where the env file is derived.")
    flox_env_project: str = setting("", p.absolute_path, "FLOX_ENV_PROJECT", "Flox project directory; where vllm-serve looks for config.yaml.")


@dataclass(frozen=True, slots=True)
class Serve:
    """Where and under which name the model is served: true for every engine."""

    host: str = setting("127.0.0.1", p.host, "VLLM_HOST", "Address or host name to serve on.")
    port: int = setting(8000, p.integer(low=1, high=65535), "VLLM_PORT", "TCP port to serve on.")
    listen: str = setting("tcp", p.choice("tcp", "uds"), "VLLMD_LISTEN", "Serve on TCP, or on a unix socket in the runtime directory (sock/NAME.sock).")
    served_model_name: str = setting("", p.one_line, "VLLM_SERVED_MODEL_NAME", "Name that clients use; empty: the model's name.")
    task: str = setting(
        "auto", p.choice("auto", "generate", "embed", "score", "transcribe", "none"), "VLLMD_TASK", "What the model is for; decides the proof of life before READY."
    )
    api_key: str = setting("", p.one_line, "VLLM_API_KEY", "A key of your own that clients may send, beside those of `vllmctl api-key` (better: a systemd credential named api-key).", secret=True)
    auth: str = setting("key", p.choice("key", "none"), "VLLMD_AUTH", "Whether clients must send a key; without one of your own the first start makes one (`vllmctl api-key show NAME`).")
    open_paths: tuple[str, ...] = setting(("/health", "/metrics"), p.url_paths, "VLLMD_OPEN_PATHS", "Paths that need no key; each exactly as it stands.", restart=False)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine, and what is passed to it as it is."""

    name: str = setting("vllm", p.word, "VLLMD_ENGINE", "The engine plug-in.")
    executable: str = setting("", p.absolute_path, "VLLMD_ENGINE_EXECUTABLE", "The engine's program; empty: the one `vllmctl engine` chose, else vllm on PATH.")
    version: str = setting("", p.one_line, "VLLMD_ENGINE_VERSION", "Pins the instance to one of the engines that `vllmctl engine` installed: a version, or a directory's name from `vllmctl engine list`; empty: the chosen one.")
    args: Mapping[str, Any] = setting(p.EMPTY, p.mapping, "VLLMD_ENGINE_ARGS", "Flags for the engine: true is --x, false --no-x, a list repeats, a mapping is JSON.")
    env: Mapping[str, str] = setting(p.EMPTY, p.env_mapping, "VLLMD_ENGINE_ENV", "Environment variables for the engine.")
    config_file: str = setting("", p.absolute_path, "VLLM_CONFIG_FILE", "YAML file for the engine's own --config.")
    strict_flags: bool = setting(True, p.boolean, "VLLM_STRICT_FLAGS", "Whether a flag that vllmd owns is an error elsewhere; false: a warning, and vllmd's wins.")
    logging_level: str = setting("", p.choice("", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), "VLLM_LOGGING_LEVEL", "The engine's log level; empty: INFO.")


@dataclass(frozen=True, slots=True)
class Preflight:
    """Checks before anything heavy happens."""

    owner_regex: str = setting("", p.regex, "VLLM_OWNER_REGEX", "Python regular expression for 'this listener is a vLLM', on command line or executable.")
    process_signatures: tuple[str, ...] = setting((), p.listing, "VLLM_PROCESS_SIGNATURES", "More substrings for the owner test.")
    dry_run: bool = setting(False, p.boolean01, "VLLM_DRY_RUN", "Say what would be stopped, and stop nothing.")
    gpu_warn_pct: float = setting(50.0, p.number(low=0, high=100), "VLLM_GPU_WARN_PCT", "Warn when more of a GPU's memory than this is in use.", unit="%")
    gpu_fail_on: tuple[str, ...] = setting(
        (), p.subset("temperature", "memory", "utilization"), "VLLM_GPU_FAIL_ON", "Which thresholds refuse the start: temperature, memory, utilization."
    )
    gpu_min_free: str = setting(
        "auto", p.mib_or_auto, "VLLMD_GPU_MIN_FREE", "Free memory each GPU needs: MiB, or auto (what the engine will ask for).", unit="MiB", aliases={"VLLM_MIN_FREE_GPU_GB": p.gib_to_mib}
    )
    max_gpu_temp_c: float = setting(85.0, p.number(low=1), "VLLM_MAX_GPU_TEMP_C", "Highest temperature of a GPU at start.", unit="°C")
    max_gpu_util_pct: float = setting(95.0, p.number(low=0, high=100), "VLLM_MAX_GPU_UTIL_PCT", "Highest utilization of a GPU at start.", unit="%")
    skip_gpu_check: bool = setting(False, p.boolean01, "VLLM_SKIP_GPU_CHECK", "Skip the GPU check.")
    require_torch: bool = setting(False, p.boolean01, "VLLM_REQUIRE_TORCH", "Require that the engine's Python imports torch and sees CUDA.")
    gpu_timeout_s: float = setting(45.0, p.seconds(low=1), "VLLMD_GPU_TIMEOUT_S", "Deadline of the GPU check; a wedged driver can block for ever.", unit="s")
    gpu_wait_s: float = setting(30.0, p.seconds(low=0), "VLLMD_GPU_WAIT_S", "How long a start waits for GPUs that another instance holds, and for memory that is being given back.", unit="s")
    allow_kill_other_uid: bool = setting(
        False, p.boolean01, "VLLM_ALLOW_KILL_OTHER_UID", "Let vllm-preflight stop another user's vLLM.", aliases={"VLLM_ALLOW_OTHER_UID_KILL": _same}
    )
    reclaim: str = setting("own", p.choice("own", "stray"), "VLLMD_RECLAIM", "Whom `vllmd run` may end: leftovers of its own instance, or also strays of its user in no unit.")
    lock_file: str = setting("", p.absolute_path, "VLLM_PREFLIGHT_LOCKFILE", "Lock file of the port; empty: preflight.PORT.lock in the runtime directory.")
    term_grace_s: float = setting(3.0, p.seconds(low=0), "VLLM_TERM_GRACE", "Time between SIGTERM and SIGKILL of what holds the port.", unit="s", aliases={"VLLM_STOP_TIMEOUT": _same})
    port_free_timeout_s: float = setting(10.0, p.seconds(low=0), "VLLM_PORT_FREE_TIMEOUT", "How long the port may take to become free after that.", unit="s")
    port_free_poll_s: float = setting(0.5, p.seconds(above=0), "VLLM_PORT_FREE_POLL", "Interval of looking whether it is free.", unit="s")
    json: bool = setting(False, p.boolean01, "VLLM_PREFLIGHT_JSON", "Print the report as one line of JSON.")


@dataclass(frozen=True, slots=True)
class Start:
    """When a start has failed, and when it has succeeded."""

    stall_timeout_s: float = setting(600.0, p.seconds(above=0), "VLLMD_STALL_TIMEOUT_S", "A start without progress for this long has failed.", unit="s")
    start_timeout_s: float = setting(2100.0, p.seconds(above=0), "VLLMD_START_TIMEOUT_S", "A start longer than this, from spawn to ready, has failed whatever moves.", unit="s")
    proof: str = setting("full", p.choice("full", "health"), "VLLMD_PROOF", "Proof of life before READY: a real request of the model's task, or /health alone.")
    proof_timeout_s: float = setting(300.0, p.seconds(above=0), "VLLMD_PROOF_TIMEOUT_S", "Deadline of one request of the proof of life (the first may compile).", unit="s")
    keep_generations: int = setting(5, p.integer(low=2, high=100), "VLLMD_KEEP_GENERATIONS", "Configurations that reached READY which are kept (`vllmctl generations`); the model versions of the newest two are never removed.")
    probe_interval_s: float = setting(0.05, p.seconds(above=0), "VLLMD_PROBE_INTERVAL_S", "Interval of asking /health while starting.", unit="s")


@dataclass(frozen=True, slots=True)
class Stop:
    """How long a stop may take: shutdown_timeout_s + 10 s, then everything is killed."""

    shutdown_timeout_s: float = setting(30.0, p.seconds(low=0), "VLLMD_SHUTDOWN_TIMEOUT_S", "Time that requests in flight get to finish.", unit="s")
    start_grace_s: float = setting(2.0, p.seconds(low=0), "VLLMD_START_GRACE_S", "Grace after SIGTERM while the engine starts (vLLM loses that signal), then it is killed.", unit="s")
    kill_timeout_s: float = setting(15.0, p.seconds(above=0), "VLLMD_KILL_TIMEOUT_S", "How long killed processes may take to disappear before they count as unkillable.", unit="s")
    gpu_release_timeout_s: float = setting(30.0, p.seconds(low=0), "VLLMD_GPU_RELEASE_TIMEOUT_S", "How long GPU memory may take to come back after the kill.", unit="s")


@dataclass(frozen=True, slots=True)
class Watch:
    """The watch over a ready engine."""

    interval_s: float = setting(5.0, p.seconds(above=0), "VLLMD_WATCH_INTERVAL_S", "Interval of asking /health of a ready engine.", unit="s", restart=False)
    request_timeout_s: float = setting(5.0, p.seconds(above=0), "VLLMD_WATCH_TIMEOUT_S", "Deadline of that question; a slow answer never ends an instance.", unit="s", restart=False)
    failures: int = setting(3, p.integer(low=1), "VLLMD_WATCH_FAILURES", "Explicit refusals (503, or nobody listening), or failed proofs of life, in a row that end the instance.", restart=False)
    heartbeat_interval_s: float = setting(1.0, p.seconds(above=0), "VLLMD_HEARTBEAT_INTERVAL_S", "Interval of reading the heartbeat while there is work; else it is interval_s.", unit="s", restart=False)
    hang_timeout_s: float = setting(60.0, p.seconds(low=0), "VLLMD_HANG_TIMEOUT_S", "An engine with work whose heartbeat stands still for this long is hung; so is a server that answers nothing for this long and uses no CPU. 0: never.", unit="s", restart=False)
    first_request_timeout_s: float = setting(300.0, p.seconds(above=0), "VLLMD_FIRST_REQUEST_TIMEOUT_S", "The same, until the engine has been seen moving: a first request may compile.", unit="s", restart=False)
    silent_timeout_s: float = setting(600.0, p.seconds(above=0), "VLLMD_SILENT_TIMEOUT_S", "A server that answers nothing for this long is hung, though it uses the CPU.", unit="s", restart=False)
    canary_interval_s: float = setting(300.0, p.seconds(low=0), "VLLMD_CANARY_INTERVAL_S", "An engine idle for this long is asked for one proof of life; never a busy one. 0: never.", unit="s", restart=False)
    canary_timeout_s: float = setting(60.0, p.seconds(above=0), "VLLMD_CANARY_TIMEOUT_S", "Deadline of that proof of life.", unit="s", restart=False)
    keep_incidents: int = setting(10, p.integer(low=1, high=100), "VLLMD_KEEP_INCIDENTS", "Incidents that are kept (`vllmctl incidents`); the first of a series of the same failure stays beside them.", restart=False)
    observe: tuple[str, ...] = setting((), p.subset(*DETECTORS), "VLLMD_WATCH_OBSERVE", "Detectors whose verdicts end nothing: they are only counted, and journalled.", restart=False)


@dataclass(frozen=True, slots=True)
class GpuWatch:
    """The watch over the host's GPUs: by vllmd-gpu.service, which reads vllmd.yaml, else by each instance itself."""

    interval_s: float = setting(5.0, p.seconds(above=0), "VLLMD_GPU_WATCH_INTERVAL_S", "Interval of asking the driver about every GPU.", unit="s", restart=False)
    call_timeout_s: float = setting(15.0, p.seconds(above=0), "VLLMD_GPU_WATCH_CALL_TIMEOUT_S", "A driver call that has not returned after this long is stuck.", unit="s", restart=False)
    suspect_xids: int = setting(3, p.integer(low=1), "VLLMD_GPU_WATCH_SUSPECT_XIDS", "As many errors of applications within an hour on one GPU, of at least two processes, make it suspect.", restart=False)
    remapped_rows_warn: int = setting(512, p.integer(low=1), "VLLMD_GPU_WATCH_REMAPPED_ROWS_WARN", "Warn from this many rows that were remapped because of uncorrectable errors.", restart=False)
    retired_pages_fail: int = setting(63, p.integer(low=1), "VLLMD_GPU_WATCH_RETIRED_PAGES_FAIL", "An older GPU with as many retired pages must be replaced.", restart=False)
    nvlink_crc_per_s: float = setting(100.0, p.number(low=0), "VLLMD_GPU_WATCH_NVLINK_CRC_PER_S", "Warn of more checksum errors than this on a GPU's NVLinks.", unit="1/s", restart=False)


@dataclass(frozen=True, slots=True)
class Log:
    """The engine's lines in the journal."""

    lines_per_s: int = setting(1000, p.integer(low=1), "VLLMD_LOG_LINES_PER_S", "Engine lines passed on per second; the rest is counted.", unit="lines/s", restart=False)
    line_max_bytes: int = setting(16384, p.integer(low=256), "VLLMD_LOG_LINE_MAX_BYTES", "A longer line is cut.", unit="bytes", restart=False)
    level: str = setting("info", p.choice("debug", "info", "warning", "error"), "VLLMD_LOG_LEVEL", "The supervisor's own level.", restart=False)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Our own figures for Prometheus, beside GET /metrics on control.sock."""

    listen: str = setting("", p.listen_address, "VLLMD_METRICS_LISTEN", "Where GET /metrics is answered to Prometheus: ADDRESS:PORT, or the path of a unix socket; empty: nowhere. Whoever can connect can read it.", restart=False)
    textfile: str = setting("", p.absolute_path, "VLLMD_METRICS_TEXTFILE", "The directory of node_exporter's textfile collector: vllmd-NAME.prom is kept there while the instance runs; empty: no file.", restart=False)
    interval_s: float = setting(15.0, p.seconds(low=0.1), "VLLMD_METRICS_INTERVAL_S", "Interval of writing that file.", unit="s", restart=False)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a person can set, parsed. `tuning` is the engine plug-in's own dataclass, whose rows also stand under `serve:`."""

    model: Model
    serve: Serve
    engine: EngineChoice
    preflight: Preflight
    start: Start
    stop: Stop
    watch: Watch
    gpu_watch: GpuWatch
    log: Log
    metrics: Metrics
    tuning: Any
    gpus: str | int | tuple[str, ...] = setting("all", p.gpus, "VLLMD_GPUS", "GPUs of the instance: all, none, a number, or a list of indices, UUIDs or MIG ids.", aliases={"VLLM_GPU_DEVICES": p.as_gpu_list})
    gpus_shared: bool = setting(False, p.boolean, "VLLMD_GPUS_SHARED", "Whether other instances that say so too may use the same GPUs at the same time (lower serve.gpu_memory_utilization in each).")


def rows(section: type[Any], prefix: str) -> list[tuple[str, str, Any, Setting]]:
    """(key, field name, default, Setting) of each row of a section's dataclass."""
    found = []
    for item in fields(section):
        row = item.metadata.get("setting")
        if row is not None:
            assert item.default is not MISSING
            found.append((f"{prefix}.{item.name}" if prefix else item.name, item.name, item.default, row))
    return found
