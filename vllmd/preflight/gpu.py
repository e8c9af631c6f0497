"""The GPU check, from preflight's side: the probe child under a deadline, its facts judged.

Hard, whatever the settings: a driver that does not answer or has no device, a device that is lost or needs a reset, an
engine that was not built for the GPU. Without any driver the check is skipped, with a warning.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import vllmd
from vllmd.preflight import child, gates
from vllmd.preflight.fit import misfits
from vllmd.preflight.gates import Limits, Wanted
from vllmd.preflight.report import Gpu

_PASSED_ON = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "LC_", "CUDA_", "NVIDIA_", "NVML_")
_CUDA_NO_DEVICE = 100


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """What is to be checked. `python` is the engine's own interpreter ('' unknown), for `require_torch`; `cuda` and
    `archs` what the engine was built for ('' and () unknown)."""

    wanted: Wanted = "all"
    limits: Limits = field(default_factory=Limits)
    timeout_s: float = 45.0
    require_torch: bool = False
    python: str = ""
    cuda: str = ""
    archs: tuple[str, ...] = ()

    @property
    def is_wanted(self) -> bool:
        return self.wanted not in ("none", 0, ())


@dataclass(frozen=True, slots=True)
class Findings:
    """What the probe child said. `cuda_result` None: no libcuda. `hung_in` names the stage that met the deadline."""

    source: str = "skipped"
    gpus: tuple[Gpu, ...] = ()
    cuda_result: int | None = None
    cuda_devices: int = 0
    cuda_driver: int = 0
    hung_in: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuResult:
    """`failures` refuse the start; `hint` is what to do about the first."""

    source: str = "skipped"
    gpus: tuple[Gpu, ...] = ()
    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    hint: str = ""


def check(request: GpuRequest, memory: gates.Memory = "free") -> GpuResult:
    """Everything about the GPUs, within the request's deadline (twice it with torch)."""
    if not request.is_wanted:
        return GpuResult()
    result = judge(request, read(request.timeout_s), memory)
    if request.require_torch and not result.failures:
        failure = torch_failure(request.python, request.timeout_s)
        if failure:
            return replace(result, failures=(failure,), hint="Install a CUDA build of the engine, or unset VLLM_REQUIRE_TORCH.")
    return result


def read(timeout_s: float) -> Findings:
    """Ask the driver, in a child that is left behind when it hangs."""
    # -P: a file in the current directory must not pose as one of our modules.
    outcome = child.run([sys.executable, "-P", "-m", "vllmd.gpu.probe"], timeout_s=timeout_s, environ=child_environ())
    found = parse(outcome.output, timed_out=outcome.timed_out)
    if outcome.status:
        found = replace(found, notes=(*found.notes, f"the GPU probe ended with status {outcome.status}"))
    return found


def child_environ() -> dict[str, str]:
    """Of a child of ours that asks the driver: where the libraries are, and where our modules are."""
    return _environ() | {"PYTHONPATH": os.pathsep.join([_package_home(), *filter(None, sys.path)])}


def _package_home() -> str:
    return str(Path(vllmd.__file__).parent.parent)


def _environ() -> dict[str, str]:
    """Without CUDA_VISIBLE_DEVICES: it hides GPUs from libcuda, so that none would seem to be there."""
    return {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON) and k != "CUDA_VISIBLE_DEVICES"}


def parse(output: str, *, timed_out: bool) -> Findings:
    """The child's lines as facts. Lines that make no sense are passed over."""
    found, stage, done = Findings(), "start", False
    for line in objects(output):
        stage = str(line.get("stage", stage))
        done = done or bool(line.get("done"))
        if isinstance(cuda := line.get("cuda"), dict):
            numbers = [_integer(cuda.get(key)) or 0 for key in ("result", "devices", "driver")]
            found = replace(found, cuda_result=numbers[0], cuda_devices=numbers[1], cuda_driver=numbers[2])
        if isinstance(gpus := line.get("gpus"), list):
            found = replace(found, source=str(line.get("source")), gpus=tuple(_gpu(each) for each in gpus if isinstance(each, dict)))
        if note := line.get("note"):
            found = replace(found, notes=(*found.notes, str(note)[:200]))
    return replace(found, hung_in=stage) if timed_out and not done else found


def objects(output: str) -> Iterator[Mapping[str, Any]]:
    for line in output.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


_INTEGERS = ("index", "memory_total_mib", "memory_free_mib", "temperature_c", "utilization_pct", "pstate")


def _gpu(words: Mapping[str, Any]) -> Gpu:
    values: dict[str, Any] = {}
    for each in fields(Gpu):
        value = words.get(each.name)
        if each.name in _INTEGERS:
            values[each.name] = _integer(value)
        elif isinstance(value, str):
            values[each.name] = value[:128]
    return Gpu(**(values | {"index": values["index"] or 0}))


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def judge(request: GpuRequest, found: Findings, memory: gates.Memory = "free") -> GpuResult:
    """What the facts mean. Pure."""
    failures, hint = driver_failures(found, request.timeout_s)
    if failures:
        return GpuResult(found.source, found.gpus, failures, hint=hint)
    if found.source == "skipped":
        return _without_figures(request, found)
    checked = gates.check(found.gpus, request.wanted, request.limits, memory)
    built = misfits(request.cuda, request.archs, checked.gpus, found.cuda_driver)
    certain = [each for each in built if each.is_certain]
    failures = (*checked.failures, *(each.what for each in certain))
    if not checked.gpus and not failures:
        failures = ("there is no GPU",)
    warnings = (
        *(f"GPU {gpu.index} {gpu.name}: {text}" for gpu in checked.gpus for text in gpu.warnings),
        *checked.warnings,
        *(f"{each.what}: {each.hint}" for each in built if not each.is_certain),
    )
    return GpuResult(found.source, checked.gpus, failures, warnings, _hint(checked.gpus, certain[0].hint if certain else ""))


def driver_failures(found: Findings, timeout_s: float) -> tuple[tuple[str, ...], str]:
    """What is wrong with the driver itself, and what to do."""
    if found.hung_in:
        what = f"the GPU driver did not answer within {timeout_s:g} s (stuck in {found.hung_in})"
        return (what,), "`journalctl -k -g NVRM` says why; a wedged driver mostly needs a reboot."
    if found.cuda_result == _CUDA_NO_DEVICE or (found.cuda_result == 0 and found.cuda_devices == 0):
        hint = "`nvidia-smi` and the modes of /dev/nvidia* show why; for an engine without GPU set `gpus: none` or VLLM_SKIP_GPU_CHECK=1."
        return ("there is an NVIDIA driver, and it has no device",), hint
    if found.cuda_result:
        what = f"the NVIDIA driver cannot be used: cuInit answers {found.cuda_result}"
        return (what,), "After an update of the driver the host must be rebooted; `journalctl -k -g NVRM` says more."
    return (), ""


def _without_figures(request: GpuRequest, found: Findings) -> GpuResult:
    if request.cuda and found.cuda_result is None:  # vLLM would say "Failed to infer device type" after 12 s
        failure = f"the engine was built for CUDA {request.cuda}, and this host has no NVIDIA driver"
        return GpuResult(failures=(failure,), hint="`vllmctl engine install --cpu` installs the build that fits, or install the driver.")
    why = "; ".join(found.notes) or "no driver was found"
    if request.wanted != "all":
        failure = f"GPUs are wanted, and none can be seen: {why}"
        return GpuResult(failures=(failure,), hint="Install the NVIDIA driver, or set `gpus: all` or `gpus: none`.")
    gated = ", the thresholds of gpu_fail_on too" if request.limits.fail_on else ""
    return GpuResult(warnings=(f"the GPU check is skipped{gated}: {why}",))


def _hint(gpus: tuple[Gpu, ...], otherwise: str) -> str:
    lost = next((gpu for gpu in gpus if gpu.lost), None)
    if lost is None:
        return otherwise or "`nvidia-smi` shows what uses the GPU; the thresholds are gpu_fail_on, gpu_min_free, max_gpu_temp_c, max_gpu_util_pct."
    if lost.lost == "reset_required":
        return f"Stop what uses it and `nvidia-smi --gpu-reset -i {lost.index}`, or reboot."
    return "`journalctl -k -g NVRM` says why; the host must be rebooted."


def torch_failure(python: str, timeout_s: float) -> str:
    """'' when the engine's own Python imports torch and sees CUDA, else what is wrong."""
    if not python:
        return "VLLM_REQUIRE_TORCH is set, and the engine's Python is not known"
    script = "import torch; print('cuda' if torch.cuda.is_available() else 'no CUDA')"
    environ = _environ() | {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES",) if k in os.environ}
    try:
        outcome = child.run([python, "-I", "-c", script], timeout_s=timeout_s, environ=environ, owned=True)
    except OSError as error:
        return f"the engine's Python {python} cannot be executed: {error.strerror}"
    if outcome.timed_out:
        return f"`import torch` by {python} did not end within {timeout_s:g} s"
    answer = outcome.output.strip()
    if outcome.status:
        return f"{python} cannot import torch"
    return "" if answer.endswith("cuda") else f"torch in {python} sees no CUDA device"
