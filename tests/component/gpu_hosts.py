"""A host with GPUs for the daemons of this folder: the NVML binding is a fake that reads its figures from a file."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.component.daemons import quick
from tests.harness import Instance, merged

FAKE = Path(__file__).parent.parent / "fakes/pynvml.py"
TOTAL_MIB = 80000


def uuid(index: int) -> str:
    return f"GPU-{index:08d}-aaaa-bbbb-cccc-dddddddddddd"


class GpuHost:
    """`set(0, free_mib=…)` changes a GPU from the next look on."""

    def __init__(self, count: int = 1) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="v-"))
        self._state = self.root / "nvml.json"
        site = self.root / "nvml"
        site.mkdir()
        (site / "pynvml.py").symlink_to(FAKE)
        self.env = {"PYTHONPATH": str(site), "NVML_FAKE": f"@{self._state}"}
        self._gpus: list[dict[str, Any]] = [
            {"name": "NVIDIA H100", "uuid": uuid(index), "total_mib": TOTAL_MIB, "free_mib": TOTAL_MIB - 500, "temperature": 40, "utilization": 0}
            for index in range(count)
        ]
        self._write()

    def set(self, index: int, **figures: Any) -> None:
        self._gpus[index] |= figures
        self._write()

    def driver(self, **state: Any) -> None:
        """The driver as a whole: hang=True, error=9."""
        self._write(**state)

    def _write(self, **state: Any) -> None:
        new = self._state.with_suffix(".new")
        new.write_text(json.dumps({"gpus": self._gpus, **state}))
        new.replace(self._state)

    def instance(self, name: str = "demo", config: Mapping[str, Any] | None = None, **more: Any) -> Instance:
        """One that wants all GPUs, and waits for them only a moment."""
        wanted = merged({"gpus": "all", "preflight": {"gpu_wait_s": 0.1}}, config or {})
        return quick(name=name, config=wanted, root=self.root, env=self.env, **more)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root)
