"""The GPU check's child process: `python -m vllmd.gpu.probe` prints what the driver says as JSON lines, and ends.

A call into a wedged driver can block for ever, and nothing in the process can end it: so it happens here, and preflight
waits with a deadline. Each stage is announced before it is entered; the last announcement names the call that hung.

    {"stage": "libcuda"}  {"cuda": {"result": 0, "devices": 2, "driver": 13000}}
    {"stage": "nvml"}     {"source": "nvml", "driver_version": "...", "gpus": [...]}
    {"done": true}

The cascade: libcuda (is there a driver, has it devices), then the figures by NVML, else by nvidia-smi, else by sysfs (AMD),
else skipped.
With --memory libcuda is left out, and who has the memory, and MIG devices, are looked up too: what the gates around a launch want.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_NVML_LOST = {15: "lost", 16: "reset_required"}
_PSTATE_UNKNOWN = 32
_RECOVERY_ACTION = 230
"""NVML_FI_DEV_GET_GPU_RECOVERY_ACTION; older bindings have no name for it."""
_RECOVERY = {1: "reset_required", 2: "reboot_required", 4: "reset_required"}


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def main() -> int:
    if "--memory" not in sys.argv:
        say(stage="libcuda")
        say(cuda=read_cuda())
    for stage, read in (("nvml", read_nvml), ("nvidia-smi", read_nvidia_smi), ("sysfs", read_sysfs)):
        say(stage=stage)
        found = read()
        if "gpus" in found:
            say(source=stage, **found)
            break
        say(note=found.get("note", ""))
    say(done=True)
    return 0


def read_cuda() -> dict[str, int] | None:
    """cuInit and the device count; None when there is no libcuda. `result` is CUDA's own code (100: no device)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    result = cuda.cuInit(0)
    if result == 0:
        result = cuda.cuDeviceGetCount(ctypes.byref(count))
        cuda.cuDriverGetVersion(ctypes.byref(version))
    return {"result": result, "devices": count.value, "driver": version.value}


def read_nvml() -> dict[str, Any]:
    """The figures by NVML; only a note when it cannot be used."""
    try:
        import pynvml
    except ImportError as error:
        return {"note": f"NVML: {error}"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"note": f"NVML: {error}"}
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        gpus = [_nvml_gpu(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return {"note": f"NVML: {error}"}
    return {"driver_version": driver, "gpus": gpus}


def _nvml_gpu(nvml: Any, index: int, driver: str) -> dict[str, Any]:
    """One device. A figure that it does not have (NOT_SUPPORTED on many cards) is left out."""
    gpu: dict[str, Any] = {"index": index, "driver_version": driver}

    def ask(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except nvml.NVMLError as error:
            if error.value in _NVML_LOST:
                gpu["lost"] = _NVML_LOST[error.value]
        except (AttributeError, TypeError):  # an older binding
            pass
        return None

    handle = ask(lambda: nvml.nvmlDeviceGetHandleByIndex(index))
    if handle is not None:
        gpu["name"] = _text(ask(lambda: nvml.nvmlDeviceGetName(handle)))
        gpu["uuid"] = _text(ask(lambda: nvml.nvmlDeviceGetUUID(handle)))
        memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        gpu["memory_total_mib"] = memory and memory.total >> 20
        gpu["memory_free_mib"] = memory and memory.free >> 20
        gpu["temperature_c"] = ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        rates = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        gpu["utilization_pct"] = rates and rates.gpu
        pstate = ask(lambda: nvml.nvmlDeviceGetPerformanceState(handle))
        gpu["pstate"] = None if pstate == _PSTATE_UNKNOWN else pstate
        gpu["clocks_event_reasons_active"] = _hex(ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
        capability = ask(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
        gpu["compute_capability"] = "{}.{}".format(*capability) if capability else ""
        action = ask(lambda: _recovery_action(nvml, handle))
        if action in _RECOVERY:
            gpu.setdefault("lost", _RECOVERY[action])
        if "--memory" in sys.argv and "lost" not in gpu:
            gpu["processes"] = _processes(nvml, handle, ask)
            gpu["mig"] = _slices(nvml, handle, ask)
    return {key: value for key, value in gpu.items() if value is not None}


_PROCESSES = 256
"""More than this have no place in a message."""


def _processes(nvml: Any, handle: Any, ask: Callable[[Callable[[], Any]], Any]) -> list[dict[str, Any]]:
    """Whoever has memory of it, for computing or for drawing; `used_mib` is missing where the driver does not say it."""
    found: dict[int, dict[str, Any]] = {}
    for read in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for each in ask(lambda read=read: getattr(nvml, read)(handle)) or ():  # type: ignore[misc]
            found[each.pid] = {"pid": each.pid} | ({"used_mib": each.usedGpuMemory >> 20} if each.usedGpuMemory else {})
    return list(found.values())[:_PROCESSES]


def _slices(nvml: Any, handle: Any, ask: Callable[[Callable[[], Any]], Any]) -> list[dict[str, Any]]:
    """Its MIG devices; none where the mode is off, which is an error of the driver's to ask for."""
    mode = ask(lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    found = []
    for index in range(ask(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0) if mode else ():
        part = ask(lambda index=index: nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))  # type: ignore[misc]
        if part is not None and (uuid := _text(ask(lambda part=part: nvml.nvmlDeviceGetUUID(part)))):  # type: ignore[misc]
            memory = ask(lambda part=part: nvml.nvmlDeviceGetMemoryInfo(part))  # type: ignore[misc]
            figures = {"memory_total_mib": memory.total >> 20, "memory_free_mib": memory.free >> 20} if memory else {}
            found.append({"uuid": uuid, **figures})
    return found


def _recovery_action(nvml: Any, handle: Any) -> int:
    value = nvml.nvmlDeviceGetFieldValues(handle, [_RECOVERY_ACTION])[0]
    return int(value.value.uiVal) if value.nvmlReturn == 0 else 0


def _hex(reasons: Any) -> str:
    return f"0x{reasons:016x}" if isinstance(reasons, int) else ""


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")


_GRAPHICS_MIB = 4096
"""A processor's own graphics have less than this, and serve no model."""


def read_sysfs() -> dict[str, Any]:
    from vllmd.gpu import amd

    gpus = [gpu for gpu in amd.read() if (gpu.get("memory_total_mib") or 0) >= _GRAPHICS_MIB]
    return {"driver_version": "", "gpus": gpus} if gpus else {}


_SMI_FIELDS = {
    "index": "index",
    "name": "name",
    "uuid": "uuid",
    "memory.total": "memory_total_mib",
    "memory.free": "memory_free_mib",
    "temperature.gpu": "temperature_c",
    "utilization.gpu": "utilization_pct",
    "pstate": "pstate",
    "driver_version": "driver_version",
    "compute_cap": "compute_capability",
}
_SMI_CLOCKS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_NUMBERS = ("index", "memory_total_mib", "memory_free_mib", "temperature_c", "utilization_pct", "pstate")


def read_nvidia_smi() -> dict[str, Any]:
    """The figures by nvidia-smi. An older one fails on a field that it does not know: then with fewer fields."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"note": "nvidia-smi is not on PATH"}
    note = ""
    for fields in _smi_queries():
        query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            return {"note": f"nvidia-smi: {error}"}
        if answer.returncode == 0:
            gpus = [gpu for line in answer.stdout.splitlines() if (gpu := _smi_gpu(line, list(fields.values())))]
            return {"driver_version": str(gpus[0].get("driver_version", "")) if gpus else "", "gpus": gpus}
        note = f"nvidia-smi exited {answer.returncode}: {(answer.stdout + answer.stderr).strip()[:200]}"
    return {"note": note}


def _smi_queries() -> list[dict[str, str]]:
    base = {name: key for name, key in _SMI_FIELDS.items() if name != "compute_cap"}
    return [_SMI_FIELDS | {clocks: "clocks_event_reasons_active"} for clocks in _SMI_CLOCKS] + [_SMI_FIELDS, base]


def _smi_gpu(line: str, keys: list[str]) -> dict[str, Any]:
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(keys):
        return {}
    gpu: dict[str, Any] = {}
    for key, value in zip(keys, values, strict=True):
        if "is lost" in value.lower():
            gpu["lost"] = "lost"
        elif "requires reset" in value.lower():
            gpu["lost"] = "reset_required"
        elif value.startswith("["):  # [N/A], [Not Supported], [Unknown Error]
            continue
        elif key in _NUMBERS:
            with contextlib.suppress(ValueError):
                gpu[key] = int(float(value.removeprefix("P")))
        else:
            gpu[key] = value if re.fullmatch(r"[\x20-\x7e]{1,128}", value) else ""
    return gpu if "index" in gpu else {}


if __name__ == "__main__":
    sys.exit(main())
