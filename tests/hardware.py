"""Hosts as drivers and the kernel really show them: figures of NVML, of /sys for AMD, and the memory of the host.

    HOSTS["two-a100"].build(folder) -> the environment for a process that is to see that host, and Python that it executes first

The NVIDIA ones are the real binding above the stub of the driver's library, the AMD one is a tree of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.nvml import Stub

GIB = 1 << 20  # in kB, as /proc/meminfo has it


@dataclass(frozen=True, slots=True)
class Gpu:
    """`mib` 0: the driver says NOT_SUPPORTED, since the memory is the host's."""

    name: str
    capability: str
    mib: int
    slices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Instinct:
    """An AMD card: name, PCI device id, GiB, and what the compute driver calls it ('' where there is no /sys/class/kfd)."""

    name: str
    device: str
    gib: int
    target: str


@dataclass(frozen=True, slots=True)
class Recorded:
    gpus: tuple[Gpu, ...] = ()
    amd: tuple[Instinct, ...] = ()
    host_gib: int = 256

    def build(self, folder: Path) -> tuple[dict[str, str], str]:
        """The environment, and the Python."""
        stub = Stub(folder, len(self.gpus))
        stub.set(init=None if self.gpus else 9)
        for index, gpu in enumerate(self.gpus):
            memory = f"{gpu.mib} {gpu.mib - 600} 600" if gpu.mib else None
            stub.gpu(index, name=gpu.name, capability=gpu.capability.replace(".", " "), memory=memory)
            stub.slices(index, *((f"MIG-{index}{number}111111-2222-3333-4444-555566667777", mib, mib - 20) for number, mib in enumerate(gpu.slices)))
        for index, card in enumerate(self.amd):
            _instinct(folder, index, card)
        meminfo = folder / "meminfo"
        meminfo.write_text(f"MemTotal:       {self.host_gib * GIB} kB\nMemFree:         8191900 kB\n")
        return stub.environ(), _PATCH.format(meminfo=str(meminfo), drm=str(folder / "drm"))


_PATCH = """
import dataclasses, pathlib
from vllmd.ctl import model_hardware
from vllmd.gpu import sampling
from vllmd.system.hardware import Hardware
model_hardware.MEMINFO = pathlib.Path({meminfo!r})
model_hardware.look_at_bus = lambda: Hardware("x86_64")
command = sampling.command
sampling.command = lambda options, *more: command(dataclasses.replace(options, drm={drm!r}), *more)
"""


def _instinct(folder: Path, index: int, card: Instinct) -> None:
    bus = 0xC1 + index
    device = folder / "devices" / f"0000:{bus:02x}:00.0"
    words = {
        "vendor": "0x1002", "device": card.device, "unique_id": f"9c1f2b3a4d5e6f7{index}", "product_name": card.name,
        "mem_info_vram_total": str(card.gib << 30), "mem_info_vram_used": "297795584", "gpu_busy_percent": "0",
    }  # fmt: skip
    device.mkdir(parents=True)
    for name, text in words.items():
        (device / name).write_text(f"{text}\n")
    drm = folder / "drm" / f"card{index + 1}"
    drm.mkdir(parents=True)
    (drm / "device").symlink_to(device)
    if card.target:
        node = folder / "kfd" / str(index + 2)
        node.mkdir(parents=True)
        (node / "properties").write_text(f"cpu_cores_count 0\nsimd_count 1216\nvendor_id 4098\ndevice_id 29857\nlocation_id {bus << 8}\ndomain 0\ngfx_target_version {card.target}\n")


def several(count: int, *which: str | int) -> tuple[Gpu, ...]:
    name, capability, mib = which
    return (Gpu(str(name), str(capability), int(mib)),) * count


HOSTS: Mapping[str, Recorded] = {
    "no-gpu": Recorded(host_gib=62),
    "one-4090": Recorded(several(1, "NVIDIA GeForce RTX 4090", "8.9", 24564), host_gib=62),
    "two-a100": Recorded(several(2, "NVIDIA A100-SXM4-80GB", "8.0", 81920)),
    "three-a100": Recorded(several(3, "NVIDIA A100-SXM4-40GB", "8.0", 40960)),
    "eight-h200": Recorded(several(8, "NVIDIA H200", "9.0", 143771), host_gib=2015),
    "gb10": Recorded((Gpu("NVIDIA GB10", "12.1", 0),), host_gib=119),
    "b200": Recorded(several(1, "NVIDIA B200", "10.0", 183359), host_gib=2015),
    "mixed": Recorded((*several(2, "NVIDIA GeForce RTX 3090", "8.6", 24576), Gpu("NVIDIA GeForce RTX 5090", "12.0", 32607)), host_gib=125),
    "mig": Recorded((Gpu("NVIDIA A100-SXM4-80GB", "8.0", 81920, slices=(40192, 19968, 19968)),)),
    "mi300x": Recorded(amd=(Instinct("AMD Instinct MI300X", "0x74a1", 192, "90402"),), host_gib=1511),
    "mi300x-without-kfd": Recorded(amd=(Instinct("AMD Instinct MI300X", "0x74a1", 192, ""),), host_gib=1511),
    "mi210": Recorded(amd=(Instinct("AMD Instinct MI210", "0x740f", 64, "90010"),)),
    "four-t4": Recorded(several(4, "Tesla T4", "7.5", 15360), host_gib=180),
    "v100": Recorded(several(1, "Tesla V100-SXM2-32GB", "7.0", 32768)),
}
