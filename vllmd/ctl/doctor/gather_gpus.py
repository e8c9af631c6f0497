"""What the driver says, by children of its own: health, leases and quarantine, and whether the engines fit."""

from __future__ import annotations

from vllmd.config.paths import Paths
from vllmd.ctl import gpu_facts
from vllmd.ctl.gpu_facts import Host
from vllmd.preflight import gpu
from vllmd.preflight.gpu import Findings


def look(paths: Paths, timeout_s: float) -> Host:
    return gpu_facts.look(paths, timeout_s)


def cuda(timeout_s: float) -> Findings:
    return gpu.read(timeout_s)
