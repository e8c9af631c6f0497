"""Caches of compiled code: one directory for each engine on each hardware, so that none is fed what another one compiled.

    <cache>/compiled/vllm-0.32.0-cuda+nvidia-2335x2+580.95.05/
        vllmd-cache.json     what it is for, and when it was used last
        vllm/ inductor/ triton/ cuda/ flashinfer/ ...

The name comes from what /sys tells (system/hardware), so `vllmd check` shows it, and no driver is asked. After an upgrade of
driver or engine a new directory is begun; going back finds the old one warm. `vllmctl cache` lists and clears them.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vllmd.config.paths import Paths, user_paths
from vllmd.core.plan import Installed
from vllmd.engines.protocol import Context
from vllmd.system.files import read_small, write_atomic
from vllmd.system.hardware import Hardware, of_this_host
from vllmd.system.owner import controller

FOLDER = "compiled"
NOTE = "vllmd-cache.json"
_LIMIT_BYTES = 1 << 16
_WEIRD = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, slots=True)
class Note:
    """What a cache is for. `engine` and `hardware` are the two parts of its name; `program` the engine's."""

    engine: str = ""
    hardware: str = ""
    program: str = ""
    instance: str = ""
    used_at: str = ""


def folder(paths: Paths) -> Path:
    return paths.cache / FOLDER


def trusted(paths: Paths) -> Paths:
    """What a cache holds is executed. root therefore takes none that another account could have filled, as /var/cache/vllmd of the
    service's, but its own; the service's would also be full of files of root's afterwards, which it cannot replace."""
    if os.geteuid() == 0 and controller(paths.cache) != 0:
        return replace(paths, cache=user_paths().cache)
    return paths


def place(context: Context, hardware: Hardware | None = None) -> Path:
    """The instance's cache: the same for `check`, `serve` and `run`."""
    return folder(context.paths) / name(context, hardware or of_this_host())


def name(context: Context, hardware: Hardware) -> str:
    return f"{engine_part(context.installed)}+{hardware_part(context, hardware)}"


def engine_part(installed: Installed) -> str:
    """The name of the engine's directory; a program from elsewhere is told by its path."""
    if installed.name:
        return _WEIRD.sub("-", installed.name)
    return _WEIRD.sub("-", f"vllm-{installed.version or 'unknown'}-{_short(installed.executable)}")


def hardware_part(context: Context, hardware: Hardware) -> str:
    """GPUs by model and number, with their driver; the instructions of the processor for an engine that uses no GPU."""
    gpus = context.config.gpus
    vendor = "amd" if context.installed.rocm else "nvidia"
    if context.installed.variant == "cpu" or gpus in ("none", 0, ()) or not hardware.has(vendor):
        return processor(hardware)
    models = [gpu.device for gpu in hardware.gpus if gpu.vendor == vendor]
    count = gpus if isinstance(gpus, int) else len(gpus) if isinstance(gpus, tuple) else len(models)
    driver = hardware.amd_driver if vendor == "amd" else hardware.nvidia_driver
    return f"{vendor}-{'_'.join(sorted(set(models))) or 'gpu'}x{count}+{_WEIRD.sub('-', driver) or 'no-driver'}"


def processor(hardware: Hardware) -> str:
    """Compilers take what this very processor can: the same code ends in SIGILL on a host that can less."""
    return f"{_WEIRD.sub('-', hardware.machine)}-{_short(' '.join(hardware.code_flags))}"


def _short(text: str) -> str:
    """Eight letters that tell a handful of texts apart; hashlib takes longer to import than a check has."""
    return f"{zlib.crc32(os.fsencode(text)):08x}"


def variables(cache: Path) -> dict[str, str]:
    """Where each compiler keeps what it made. Names of vLLM 0.32, torch, Triton, CUDA, FlashInfer, TVM and DeepGEMM."""
    return {
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TORCH_EXTENSIONS_DIR": str(cache / "torch-extensions"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "CUDA_CACHE_PATH": str(cache / "cuda"),
        "FLASHINFER_WORKSPACE_BASE": str(cache / "flashinfer"),
        "TVM_FFI_CACHE_DIR": str(cache / "tvm-ffi"),
        "DG_JIT_CACHE_DIR": str(cache / "deep-gemm"),
        "NUMBA_CACHE_DIR": str(cache / "numba"),
    }


def compiled(cache: Path) -> tuple[Path, ...]:
    """Those whose content can break a start; the others are only read under names made of their content."""
    return cache / "vllm/torch_compile_cache", cache / "inductor", cache / "triton", cache / "flashinfer"


def begin(context: Context, hardware: Hardware | None = None) -> str:
    """Makes the instance's cache, and notes that it is used now; why it cannot be made ('' when it was). The engine then
    compiles what it needs into memory, or says itself that it cannot."""
    hardware = hardware or of_this_host()
    cache = place(context, hardware)
    installed, now = context.installed, datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    note = Note(engine_part(installed), hardware_part(context, hardware), installed.executable, context.instance, now)
    try:
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomic(cache / NOTE, json.dumps({"schema": 1, **asdict(note)}, indent=1) + "\n", fsync=False)
    except OSError as error:
        return f"the cache {cache} cannot be used: {error.strerror}"
    return ""


@dataclass(frozen=True, slots=True)
class Cache:
    """One of those that there are. `bytes` on disk."""

    name: str
    directory: Path
    note: Note
    bytes: int


def listed(directory: Path) -> Iterator[Cache]:
    """In order of name; PermissionError where this user may not look."""
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return
    for each in names:
        if not each.startswith("."):
            yield Cache(each, directory / each, read_note(directory / each), disk_bytes(directory / each))


def read_note(cache: Path) -> Note:
    """Empty where there is none that can be understood."""
    try:
        value = json.loads(read_small(cache / NOTE, _LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return Note()
    if not isinstance(value, dict):
        return Note()
    return Note(*(text if isinstance(text := value.get(key), str) else "" for key in ("engine", "hardware", "program", "instance", "used_at")))


def disk_bytes(directory: Path) -> int:
    """What its files take, links not followed. What vanishes meanwhile counts nothing."""
    total = 0
    for folder_name, _, names in os.walk(directory, onerror=None):
        for each in names:
            try:
                total += os.lstat(os.path.join(folder_name, each)).st_blocks * 512  # noqa: PTH118 - many of them
            except OSError:
                continue
    return total
