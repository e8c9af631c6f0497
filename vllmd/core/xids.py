"""What each Xid means for us, as data: NVIDIA's numbered error reports, from the kernel's log or as NVML events.

The class says what to do; the driver's own verdict (field 230, `RECOVERY`) comes before it. docs/gpu.md explains the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Class = Literal["app", "sympathetic", "reset", "nvlink", "reboot", "replace", "warn", "ask", "human"]
CLASSES: tuple[Class, ...] = get_args(Class)

FALLEN_OFF = 79
CONTEXT_SWITCH_TIMEOUT = 109
"""Of class reset only when it comes again; the first one costs the engine."""
RECOVERY_CHANGED = 154
NVLINK_DOWN = 74

HINTS: dict[Class, str] = {
    "app": "The engine's own work mostly causes it, and its restart repairs it. If it comes back on this GPU alone, suspect the GPU.",
    "sympathetic": "It follows another error: look for the one before it.",
    "reset": "The GPU must be reset with nothing using it: stop the instances on it and vllmd-gpu.service, `nvidia-smi --gpu-reset -i UUID`, start "
    "vllmd-gpu.service, `vllmctl gpu clear UUID`; or reboot the host.",
    "nvlink": "Look at cables, bridges and the fabric manager (`nvidia-smi nvlink -s`); an engine on a single GPU is not touched by it.",
    "reboot": "The host must be rebooted. If it comes back after two reboots, the GPU, its slot or its power must be looked at.",
    "replace": "A person must look: reboot once, run `dcgmi diag -r 3`, and have the GPU replaced if it fails. `vllmctl gpu clear UUID` allows it again.",
    "warn": "Serving goes on. Reset the GPU, or reboot, at the next convenient stop.",
    "ask": "The driver says itself what the GPU needs: `nvidia-smi -q` shows it as GPU Recovery Action.",
    "human": "A person must look; serving goes on.",
}


@dataclass(frozen=True, slots=True)
class Xid:
    cls: Class
    what: str

    @property
    def hint(self) -> str:
        return HINTS[self.cls]


def _all(cls: Class, what: dict[int, str]) -> dict[int, Xid]:
    return {number: Xid(cls, text) for number, text in what.items()}


TABLE: dict[int, Xid] = {
    **_all(
        "app",
        {
            8: "the GPU stopped processing",
            11: "invalid or corrupted push buffer stream",
            13: "exception of the compute engine (an illegal instruction or address of a kernel)",
            25: "invalid or illegal push buffer stream",
            31: "memory page fault of the GPU (an illegal address of a kernel)",
            32: "invalid or corrupted push buffer stream",
            39: "exception of a copy engine",
            40: "exception of a copy engine",
            41: "exception of a copy engine",
            43: "the GPU stopped processing one application's work",
            68: "exception of the video decoder",
            69: "class error of the compute engine",
            70: "exception of a copy engine",
            71: "exception of a copy engine",
            80: "corrupted data sent to the GPU",
            85: "exception of a copy engine",
            94: "contained memory error (ECC): the application that used that memory was ended",
            **dict.fromkeys(range(126, 136), "exception of an engine of the GPU"),
            137: "NVLink fabric access without permission (an illegal peer address)",
        },
    ),
    **_all("sympathetic", {45: "the driver removed an application's work, after another error"}),
    **_all(
        "reset",
        {
            46: "the GPU stopped processing",
            48: "uncorrectable memory error (double-bit ECC)",
            62: "the GPU's microcontroller halted",
            95: "uncontained memory error (ECC)",
            CONTEXT_SWITCH_TIMEOUT: "context switch timeout",
            110: "security fault",
            119: "the GPU's system processor (GSP) does not answer",
            120: "error of the GPU's system processor (GSP)",
            136: "NVLink training failed",
            140: "unrecovered memory error (ECC)",
            155: "NVLink error defined by software",
            156: "a resource of the GPU was retired",
            158: "fatal timeout of the GPU",
        },
    ),
    **_all(
        "nvlink",
        {
            NVLINK_DOWN: "NVLink error",
            **dict.fromkeys(range(144, 151), "NVLink5 error"),
        },
    ),
    **_all("reboot", {FALLEN_OFF: "the GPU has fallen off the bus", 143: "the GPU could not be initialized", 167: "fatal timeout of PCIe"}),
    **_all("replace", {64: "a broken row of memory could not be remapped"}),
    **_all(
        "warn",
        {
            63: "a row of memory was remapped, or is to be at the next reset",
            92: "many corrected memory errors (single-bit ECC)",
            121: "corrected error on the link between processor and GPU (C2C)",
            157: "a resource of the GPU could not be retired",
            160: "a memory channel of the GPU was retired",
            161: "a memory channel of the GPU could not be retired",
            168: "errors in the GPU's protected memory",
        },
    ),
    **_all("ask", {RECOVERY_CHANGED: "the driver changed its mind about what the GPU needs"}),
    **_all("human", {54: "the GPU's auxiliary power is not connected", 78: "a virtual GPU could not be started"}),
}


def of(number: int) -> Xid:
    """One that the table does not know is said, and nothing is done: the driver's own verdict still counts."""
    return TABLE.get(number) or Xid("human", "an error that this version of vllmd does not know")


@dataclass(frozen=True, slots=True)
class Recovery:
    """`fatal`: what runs on the GPU cannot go on."""

    cls: Class
    what: str
    fatal: bool


RECOVERY: dict[int, Recovery] = {
    1: Recovery("reset", "the driver says that the GPU must be reset", fatal=True),
    2: Recovery("reboot", "the driver says that the host must be rebooted", fatal=True),
    3: Recovery("nvlink", "the driver says that traffic between GPUs must end", fatal=True),
    4: Recovery("reset", "the driver says that the GPU should finish its work and be reset", fatal=False),
    7: Recovery("reboot", "the driver says that the system must be rebooted", fatal=True),
}
"""Field 230, NVML_FI_DEV_GET_GPU_RECOVERY_ACTION; 0 is: nothing."""


def recovery(action: int) -> Recovery:
    """Above what is known, a person is needed: no new start on it, but what runs is not ended for a number nobody knows."""
    return RECOVERY.get(action) or Recovery("replace", f"the driver asks for a recovery that vllmd does not know ({action})", fatal=False)
