"""The GPUs as NVML tells of them: one document for each look (docs/gpu.md). Only in the sampler's process: any call here may
block for ever in a wedged driver, so each is announced before it is entered.

`lib` is the binding (pynvml). A figure that a card does not have (NOT_SUPPORTED: ECC on a GeForce) is left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vllmd.core.gpu_conditions import clock_reasons
from vllmd.core.gpu_findings import canonical_pci
from vllmd.system import cgroupnames, procfs

LOST = {15: "lost", 16: "reset_required"}
GONE = {1, 9, 12, 18}
"""Not initialized, driver not loaded, library not found, library and driver differ: of the whole host."""
RECOVERY_ACTION, NVLINK_CRC = 230, 38
"""Field 230 has no name in older bindings; 38 counts the checksum errors of all NVLinks together."""
_FABRIC = {1: "not started", 2: "in progress", 3: "completed"}
_PROCESSES = 256

Announce = Callable[[str], None]


class Gone(Exception):
    """The driver is not there (any more)."""


@dataclass(slots=True)
class _Card:
    """What does not change. `handle` is None for a GPU that could not even be opened."""

    index: int
    handle: Any
    words: dict[str, Any] = field(default_factory=dict)
    max_bus: dict[str, Any] = field(default_factory=dict)


class Nvml:
    """From init on. `announce('')` says that no call is in progress."""

    def __init__(self, lib: Any, announce: Announce) -> None:
        self._lib = lib
        self._announce = announce
        self._failed = ""
        self._unknown: set[tuple[str, int]] = set()
        self.call("nvmlInit", "")
        self.driver_version = _text(self.call("nvmlSystemGetDriverVersion", ""))
        self.cards = [self._card(index) for index in range(self.call("nvmlDeviceGetCount", ""))]

    def call(self, name: str, whose: str, *args: Any) -> Any:
        """NVMLError of the binding; Gone where the whole driver is."""
        self._announce(f"{name} {whose}".rstrip())
        try:
            return getattr(self._lib, name)(*args)
        except self._lib.NVMLError as error:
            if error.value in GONE:
                raise Gone(f"{name}: {error}") from None
            raise
        finally:
            self._announce("")

    def _card(self, index: int) -> _Card:
        words: dict[str, Any] = {"index": index}
        handle = self._ask(words, str(index), "nvmlDeviceGetHandleByIndex", index)
        card = _Card(index, handle, words)
        if handle is not None:
            words["uuid"] = uuid = _text(self._ask(words, str(index), "nvmlDeviceGetUUID", handle))
            words["name"] = _text(self._ask(words, uuid, "nvmlDeviceGetName", handle))
            bus = self._ask(words, uuid, "nvmlDeviceGetPciInfo", handle)
            words["pci"] = canonical_pci(_text(bus.busId)) if bus else ""
            capability = self._ask(words, uuid, "nvmlDeviceGetCudaComputeCapability", handle)
            words["compute_capability"] = "{}.{}".format(*capability) if capability else ""
            for key, name in (("max_gen", "nvmlDeviceGetMaxPcieLinkGeneration"), ("max_width", "nvmlDeviceGetMaxPcieLinkWidth")):
                card.max_bus[key] = self._ask(words, uuid, name, handle)
        return card

    def _ask(self, gpu: dict[str, Any], whose: str, name: str, *args: Any) -> Any:
        """None where there is no answer; `lost` is set where that is why."""
        try:
            return self.call(name, whose, *args)
        except self._lib.NVMLError as error:
            if error.value in LOST:
                gpu["lost"] = LOST[error.value]
        except (AttributeError, TypeError):  # an older binding
            pass
        return None

    # -- one look

    def count_is_the_same(self) -> bool:
        return bool(self.call("nvmlDeviceGetCount", "") == len(self.cards))

    def gpus(self) -> list[dict[str, Any]]:
        return [self._look(card) for card in self.cards]

    def _look(self, card: _Card) -> dict[str, Any]:
        gpu: dict[str, Any] = {**card.words, "lost": "" if card.handle is not None else card.words.get("lost", "")}
        if card.handle is None:
            return gpu
        for part in (self._memory, self._load, self._health, self._links, self._owners, self._slices):
            part(gpu, card)
            if gpu["lost"]:  # each further call of a lost GPU may take long, and answers the same
                break
        return {key: value for key, value in gpu.items() if value is not None}

    def _memory(self, gpu: dict[str, Any], card: _Card) -> None:
        version = getattr(self._lib, "nvmlMemory_v2", None)
        memory = self._ask(gpu, gpu["uuid"], "nvmlDeviceGetMemoryInfo", card.handle, *([version] if version else []))
        if memory is None and not gpu["lost"]:
            memory = self._ask(gpu, gpu["uuid"], "nvmlDeviceGetMemoryInfo", card.handle)
        if memory is not None:
            gpu |= {f"memory_{key}_mib": getattr(memory, key) >> 20 for key in ("total", "used", "free")}

    def _load(self, gpu: dict[str, Any], card: _Card) -> None:
        uuid = gpu["uuid"]
        gpu["temperature_c"] = self._ask(gpu, uuid, "nvmlDeviceGetTemperature", card.handle, self._lib.NVML_TEMPERATURE_GPU)
        rates = self._ask(gpu, uuid, "nvmlDeviceGetUtilizationRates", card.handle)
        gpu["utilization_pct"] = rates and rates.gpu
        milliwatts = self._ask(gpu, uuid, "nvmlDeviceGetPowerUsage", card.handle)
        gpu["power_w"] = None if milliwatts is None else milliwatts / 1000
        mask = self._ask(gpu, uuid, "nvmlDeviceGetCurrentClocksThrottleReasons", card.handle)
        gpu["clock_reasons"] = None if mask is None else clock_reasons(mask)

    def _health(self, gpu: dict[str, Any], card: _Card) -> None:
        uuid = gpu["uuid"]
        counts = {
            name: self._ask(gpu, uuid, "nvmlDeviceGetTotalEccErrors", card.handle, kind, 0) for kind, name in enumerate(("corrected", "uncorrected"))
        }
        gpu["ecc"] = {name: count for name, count in counts.items() if count is not None}
        rows = self._ask(gpu, uuid, "nvmlDeviceGetRemappedRows", card.handle)
        if rows is not None:
            gpu["remapped"] = {"correctable": rows[0], "uncorrectable": rows[1], "pending": bool(rows[2]), "failed": bool(rows[3])}
        else:
            pages = [self._ask(gpu, uuid, "nvmlDeviceGetRetiredPages", card.handle, cause) for cause in (0, 1)]
            gpu["retired_pages"] = sum(len(each) for each in pages if each is not None) if pages != [None, None] else None
        fields = self._ask(gpu, uuid, "nvmlDeviceGetFieldValues", card.handle, [RECOVERY_ACTION, NVLINK_CRC])
        known = {each.fieldId: each for each in fields or () if each.nvmlReturn == 0}
        gpu["recovery_action"] = int(known[RECOVERY_ACTION].value.uiVal) if RECOVERY_ACTION in known else None
        gpu["nvlink"] = {"crc_errors": int(known[NVLINK_CRC].value.ullVal)} if NVLINK_CRC in known else {}

    def _links(self, gpu: dict[str, Any], card: _Card) -> None:
        uuid = gpu["uuid"]
        bus = {key: self._ask(gpu, uuid, name, card.handle) for key, name in (("gen", "nvmlDeviceGetCurrPcieLinkGeneration"), ("width", "nvmlDeviceGetCurrPcieLinkWidth"))}
        gpu["pcie"] = {key: value for key, value in {**bus, **card.max_bus}.items() if value is not None}
        gpu["fabric"] = self._fabric(gpu, card)

    def _fabric(self, gpu: dict[str, Any], card: _Card) -> str:
        """'' where there is none."""
        make = getattr(self._lib, "c_nvmlGpuFabricInfo_v2_t", None)
        if make is None or (asked := make()) is None:
            return ""
        if self._ask(gpu, gpu["uuid"], "nvmlDeviceGetGpuFabricInfoV", card.handle, ctypes.byref(asked)) is None:
            return ""
        failed = asked.state == 3 and asked.status != 0
        return f"failed with {asked.status}" if failed else _FABRIC.get(asked.state, "")

    def _owners(self, gpu: dict[str, Any], card: _Card) -> None:
        """Whoever has memory of it; `used_mib` is missing where the driver does not say it."""
        found: dict[int, dict[str, Any]] = {}
        for name in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            for each in self._ask(gpu, gpu["uuid"], name, card.handle) or ():
                if len(found) < _PROCESSES:
                    used = {"used_mib": each.usedGpuMemory >> 20} if each.usedGpuMemory else {}
                    found[each.pid] = {"pid": each.pid, **used, "unit": cgroupnames.unit_of(procfs.cgroup(each.pid))}
        gpu["processes"] = list(found.values())

    def _slices(self, gpu: dict[str, Any], card: _Card) -> None:
        gpu["mig"] = list(self._each_slice(gpu, card))

    def _each_slice(self, gpu: dict[str, Any], card: _Card) -> Iterator[dict[str, Any]]:
        mode = self._ask(gpu, gpu["uuid"], "nvmlDeviceGetMigMode", card.handle)
        count = self._ask(gpu, gpu["uuid"], "nvmlDeviceGetMaxMigDeviceCount", card.handle) if mode and mode[0] else 0
        for index in range(count or 0):
            part = self._ask(gpu, gpu["uuid"], "nvmlDeviceGetMigDeviceHandleByIndex", card.handle, index)
            uuid = _text(self._ask(gpu, gpu["uuid"], "nvmlDeviceGetUUID", part)) if part is not None else ""
            if uuid:
                memory = self._ask(gpu, uuid, "nvmlDeviceGetMemoryInfo", part)
                figures = {"memory_total_mib": memory.total >> 20, "memory_free_mib": memory.free >> 20} if memory else {}
                yield {"uuid": uuid, **figures}


def _text(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
    return text[:128] if text.isprintable() else ""
