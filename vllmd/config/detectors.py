"""The names of all detectors: what may end an instance, and may be told only to observe (watch.observe)."""

from __future__ import annotations

ENGINE = ("health", "hang", "canary", "death")
GPU = ("gpu_xid", "gpu_lost", "gpu_stuck", "gpu_ecc", "gpu_remap", "gpu_thermal", "gpu_power", "gpu_nvlink", "gpu_fabric", "gpu_pcie")
DETECTORS = (*ENGINE, *GPU)
