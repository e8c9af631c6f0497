"""AMD's GPUs over a sysfs made of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_service import GpuService
from vllmd.gpu import amd

pytestmark = pytest.mark.component

FULL = {
    "vendor": "0x1002\n", "device": "0x74a1\n", "unique_id": "9c1f2b3a4d5e6f70\n", "product_name": "AMD Instinct MI300X\n", "mem_info_vram_total": "206141652992\n",
    "mem_info_vram_used": "297795584\n", "gpu_busy_percent": "7\n", "hwmon/hwmon3/temp1_input": "", "hwmon/hwmon3/temp2_input": "44000\n",
    "hwmon/hwmon3/power1_average": "137000000\n", "ras/umc_err_count": "ue: 1\nce: 5\n", "ras/gfx_err_count": "ue: 0\nce: 2\n", "ras/features": "feature mask: 0x1\n",
    "ras/gpu_vram_bad_pages": "0x00000000 : 0x00001000 : R\n0x00000001 : 0x00001000 : P\n", "current_link_width": "16\n", "max_link_width": "16\n",
}  # fmt: skip


def card(root: Path, number: int, pci: str, **changes: str | None) -> None:
    device = root / "devices" / pci
    for name, content in {**FULL, **{key.replace("__", "/"): value for key, value in changes.items()}}.items():
        if content is not None:
            (device / name).parent.mkdir(parents=True, exist_ok=True)
            (device / name).write_text(content)
    (root / "drm" / f"card{number}").mkdir(parents=True)
    (root / "drm" / f"card{number}" / "device").symlink_to(device)
    (root / "drm" / f"card{number}-DP-1").mkdir()


def test_the_same_document_as_far_as_sysfs_goes(tmp_path: Path) -> None:
    card(tmp_path, 1, "0000:c1:00.0")
    [gpu] = amd.read(tmp_path / "drm")
    assert gpu.items() >= {
        "index": 0, "uuid": "GPU-9c1f2b3a4d5e6f70", "pci": "0000:c1:00.0", "name": "AMD Instinct MI300X", "memory_total_mib": 196592, "memory_used_mib": 284,
        "memory_free_mib": 196308, "temperature_c": 44, "power_w": 137.0, "utilization_pct": 7, "ecc": {"corrected": 7, "uncorrected": 1}, "retired_pages": 2,
        "pcie": {"width": 16, "max_width": 16}, "lost": "", "processes": [], "mig": [],
    }.items()  # fmt: skip


def test_cards_of_others_and_without_memory_are_none(tmp_path: Path) -> None:
    card(tmp_path, 0, "0000:01:00.0", vendor="0x10de\n")
    card(tmp_path, 1, "0000:02:00.0", mem_info_vram_total=None)
    card(tmp_path, 10, "0000:04:00.0", unique_id=None)
    card(tmp_path, 2, "0000:03:00.0")
    assert [(gpu["index"], gpu["uuid"]) for gpu in amd.read(tmp_path / "drm")] == [(0, "GPU-9c1f2b3a4d5e6f70"), (1, "GPU-pci-0000-04-00-0")]
    assert amd.read(tmp_path / "absent") == []


def test_files_that_are_missing_or_strange_are_left_out(tmp_path: Path) -> None:
    strange = {"mem_info_vram_used": "-1\n", "gpu_busy_percent": "\xff\n", "product_name": "\x1b[31m\n", "current_link_width": "x" * 100_000, "ras__umc_err_count": "ue: x\n"}
    card(tmp_path, 0, "0000:01:00.0", **strange, hwmon__hwmon3__temp2_input=None, hwmon__hwmon3__power1_average=None)
    [gpu] = amd.read(tmp_path / "drm")
    assert gpu["name"] == "AMD GPU 0x74a1"
    assert not {"memory_used_mib", "memory_free_mib", "utilization_pct", "temperature_c", "power_w"} & set(gpu)
    assert gpu["ecc"] == {"corrected": 2, "uncorrected": 0}


def test_the_service_serves_them(tmp_path: Path) -> None:
    card(tmp_path, 1, "0000:c1:00.0")
    with GpuService(env={"LD_LIBRARY_PATH": "/nowhere"}, drm=str(tmp_path / "drm")) as service:
        listener = service.listen()
        document = listener.snapshot(lambda found: bool(found["gpus"]))
        assert (document["source"], document["gpus"][0]["name"]) == ("sysfs", "AMD Instinct MI300X")
        (tmp_path / "devices/0000:c1:00.0/ras/umc_err_count").write_text("ue: 9\nce: 5\n")
        assert listener.finding(detector="gpu_ecc")[1]["uuid"] == "GPU-9c1f2b3a4d5e6f70"
