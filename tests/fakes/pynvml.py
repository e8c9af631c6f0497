"""A stand-in for the NVML binding, put before it on the module path: its GPUs are what NVML_FAKE says, as JSON.

    @/path                  the same, read anew from this file by each process
    {"error": 9}            nvmlInit fails with this code
    {"hang": true}          nvmlDeviceGetCount never returns
    {"gpus": [{...}]}       figures by name; a number in "fails" is the code of every call on that GPU
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML_TEMPERATURE_GPU = 0
_GIVEN = os.environ.get("NVML_FAKE", "{}")
_STATE = json.loads(Path(_GIVEN[1:]).read_text() if _GIVEN.startswith("@") else _GIVEN)


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


def nvmlInit() -> None:
    if "error" in _STATE:
        raise NVMLError(_STATE["error"])


def nvmlSystemGetDriverVersion() -> bytes:
    return b"570.86.15"


def nvmlDeviceGetCount() -> int:
    while _STATE.get("hang"):
        time.sleep(1)
    return len(_STATE.get("gpus", []))


def nvmlDeviceGetHandleByIndex(index: int) -> Any:
    return _STATE["gpus"][index]


def _figure(gpu: Any, name: str) -> Any:
    if "fails" in gpu:
        raise NVMLError(gpu["fails"])
    if name not in gpu:
        raise NVMLError(3)
    return gpu[name]


def nvmlDeviceGetName(gpu: Any) -> str:
    return str(_figure(gpu, "name"))


def nvmlDeviceGetUUID(gpu: Any) -> str:
    return str(_figure(gpu, "uuid"))


def nvmlDeviceGetMemoryInfo(gpu: Any) -> Any:
    return SimpleNamespace(total=_figure(gpu, "total_mib") << 20, free=_figure(gpu, "free_mib") << 20)


def nvmlDeviceGetTemperature(gpu: Any, _sensor: int) -> Any:
    return _figure(gpu, "temperature")


def nvmlDeviceGetUtilizationRates(gpu: Any) -> Any:
    return SimpleNamespace(gpu=_figure(gpu, "utilization"))


def nvmlDeviceGetPerformanceState(gpu: Any) -> Any:
    return _figure(gpu, "pstate")


def nvmlDeviceGetCurrentClocksThrottleReasons(gpu: Any) -> Any:
    return _figure(gpu, "clocks")


def nvmlDeviceGetCudaComputeCapability(gpu: Any) -> Any:
    return tuple(_figure(gpu, "capability"))


def nvmlDeviceGetFieldValues(gpu: Any, fields: list[int]) -> list[Any]:
    assert fields == [230]
    return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=_figure(gpu, "recovery")))]


def nvmlDeviceGetComputeRunningProcesses(gpu: Any) -> list[Any]:
    return [SimpleNamespace(pid=int(pid), usedGpuMemory=mib << 20) for pid, mib in _figure(gpu, "processes").items()]


def nvmlDeviceGetMigMode(gpu: Any) -> list[int]:
    _figure(gpu, "mig")
    return [1, 1]


def nvmlDeviceGetMaxMigDeviceCount(gpu: Any) -> int:
    return len(_figure(gpu, "mig"))


def nvmlDeviceGetMigDeviceHandleByIndex(gpu: Any, index: int) -> Any:
    return _figure(gpu, "mig")[index]
