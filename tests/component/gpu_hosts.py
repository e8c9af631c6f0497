"""A host with GPUs for the daemons of this folder: the real NVML binding above the stub of the driver's library."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.component.daemons import quick
from tests.fakes.nvml import Stub, uuid
from tests.harness import Instance, flags, merged
from vllmd.engines import record

__all__ = ["RESERVED_MIB", "TOTAL_MIB", "GpuHost", "uuid"]
TOTAL_MIB = 80000
RESERVED_MIB = 500


class GpuHost:
    """`stub` is the driver; what changes takes effect at the next call into it."""

    def __init__(self, count: int = 1) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="v-"))
        self.stub = Stub(self.root, count)
        for index in range(count):
            self.memory(index)

    def memory(self, index: int = 0, used: int = RESERVED_MIB, *by: tuple[int, int]) -> None:
        """`used` MiB of it, by these processes (pid, MiB)."""
        self.stub.gpu(index, memory=f"{TOTAL_MIB} {TOTAL_MIB - used} {used}")
        self.stub.processes(index, *by)

    def instance(self, name: str = "demo", config: Mapping[str, Any] | None = None, **more: Any) -> Instance:
        """One that wants all GPUs, and waits for them only a moment."""
        wanted = merged({"gpus": "all", "preflight": {"gpu_wait_s": 0.1}}, config or {})
        made = quick(name=name, config=wanted, root=self.root, env=self.stub.environ(), **more)
        self.engine_for("cuda")
        return made

    def engine_for(self, variant: str) -> None:
        """What the fake engine was built for, on record."""
        record.write(self.root / "engines/vllm-0.32.0-fake", record.Record("0.32.0", variant, *flags()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root)
