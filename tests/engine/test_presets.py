"""Every shipped preset, on hardware of every tier, is a configuration that the real vLLM's own flags allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.conftest import engines_directory
from tests.needs import need
from vllmd.config.paths import root_paths
from vllmd.core.preset_choice import Fit, Found, judge, settings
from vllmd.core.tiers import TIERS, Card, groups
from vllmd.ctl import model_file, model_set
from vllmd.ctl.model_file import Chosen
from vllmd.models import presets

pytestmark = pytest.mark.engine

SHARE = Path(__file__).parents[2] / "share"
CARDS = {
    "nvidia-blackwell": Card(0, "GPU-0", "B200", capability="10.0", memory_mib=183359),
    "nvidia-hopper": Card(0, "GPU-0", "H200", capability="9.0", memory_mib=143771),
    "nvidia-older": Card(0, "GPU-0", "A100", capability="8.0", memory_mib=81920),
    "nvidia-legacy": Card(0, "GPU-0", "RTX 8000", capability="7.5", memory_mib=64 * 1024),
    "amd": Card(0, "GPU-0", "MI300X", vendor="amd", architecture="gfx942", memory_mib=196592),
}


@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier != "amd-older"])
def test_flags_are_those_of_the_installed_vllm(tier: str, tmp_path: Path) -> None:
    engines = engines_directory()
    need((engines / "current/bin/vllm").is_file(), f"a real vLLM in {engines} (vllmctl engine install, or make setup)")
    paths = replace(root_paths(tmp_path), engines=engines)
    (paths.config / "demo.d").mkdir(parents=True)
    (paths.config / "demo.yaml").write_text("serve: {port: 8000}\n")
    there = groups([CARDS[tier]] if tier in CARDS else [], 64 * 1024)
    found = [fit for preset in presets.read_from([SHARE / "presets"]).good if isinstance(fit := judge(preset, there), Fit)]
    assert found
    for fit in found:
        chosen = settings(fit, Found("/x.jinja" if fit.variant.templates else "", "/draft" if fit.variant.draft else ""), is_only_group=True, names_gpus=False)
        text = model_file.rendered("demo", Chosen(fit.preset.id, is_preset=True), chosen, "vllmctl")
        notes = model_set.checked(paths, "demo", text, "", chosen)
        assert notes == [], fit.preset.id
