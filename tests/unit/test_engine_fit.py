"""Which engine fits which hardware, and which one an instance is pinned to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.engine_contexts import context
from vllmd.config.paths import Paths, root_paths
from vllmd.ctl import engine as ctl_engine
from vllmd.ctl import engine_fit as ctl_engine_fit
from vllmd.ctl import status as ctl_status
from vllmd.engines import choice, record
from vllmd.engines.protocol import SettingRefused
from vllmd.engines.record import Record
from vllmd.engines.vllm import Vllm
from vllmd.errors import ConfigError, VllmdError
from vllmd.preflight import gpu, variant
from vllmd.preflight.report import Gpu
from vllmd.system.hardware import Hardware, PciGpu

pytestmark = pytest.mark.unit

CPU = Hardware("x86_64", frozenset({"avx2"}))
OLD = Hardware("x86_64", frozenset({"sse4_2"}))
NVIDIA = replace(CPU, gpus=(PciGpu("nvidia", "2335"),), nvidia_driver="580.95.05")
AMD = replace(CPU, gpus=(PciGpu("amd", "74a1"),), amd_driver="6.12")


@pytest.mark.parametrize(
    ("hardware", "best", "refused"),
    [(CPU, "cpu", "cuda rocm"), (NVIDIA, "cuda", "rocm"), (AMD, "rocm", "cuda"), (OLD, "", "cpu cuda rocm"), (replace(OLD, nvidia_driver="580"), "cuda", "cpu rocm"), (Hardware("aarch64", frozenset({"asimd"})), "cpu", "cuda rocm"), (Hardware("x86_64"), "cpu", "cuda rocm")],
)
def test_each_machine_has_its_builds(hardware: Hardware, best: str, refused: str) -> None:
    assert variant.suitable(hardware) == best
    assert {each for each in variant.VARIANTS if variant.unfit(each, hardware)} == set(refused.split())


def test_a_refusal_names_the_build_that_fits() -> None:
    found = variant.unfit("cuda", AMD)
    assert found is not None
    assert "--rocm" in found.hint
    found = variant.unfit("cpu", OLD)
    assert found is not None
    assert found.hint == "no build of vLLM fits this machine"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A host to be described by tests; its driver says what `seen` holds."""
    described: dict[str, object] = {"hardware": NVIDIA, "seen": gpu.Findings("nvml", (Gpu(0, "H200", compute_capability="9.0", driver_version="580.95.05"),), cuda_driver=13000)}
    monkeypatch.setattr(ctl_engine_fit, "of_this_host", lambda: described["hardware"])
    monkeypatch.setattr(ctl_engine, "of_this_host", lambda: described["hardware"])
    monkeypatch.setattr(ctl_engine_fit, "_driver", lambda: described["seen"])
    return described


def engine(engines: Path, name: str, **known: object) -> Record:
    directory = engines / name
    (directory / "bin").mkdir(parents=True)
    (directory / "bin/vllm").write_text("#!/bin/sh\n")
    (directory / "bin/vllm").chmod(0o755)
    built = Record(**{"version": "0.32.0", "variant": "cuda", "torch": "2", "cuda": "13.0", "archs": ("sm_90",), **known})  # type: ignore[arg-type]
    record.write(directory, built)
    return built


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    (tmp_path / "etc").mkdir()
    return root_paths(tmp_path)


def test_an_engine_for_other_gpus_is_not_chosen_and_the_one_that_fits_is_named(paths: Paths, host: dict[str, object]) -> None:
    engine(paths.engines, "blackwell", archs=("sm_100", "sm_120"))
    engine(paths.engines, "hopper")
    with pytest.raises(ConfigError, match=r"not built for GPU 0 H200 \(compute capability 9.0\)") as caught:
        ctl_engine.main(["use", "blackwell"], paths)
    assert "`vllmctl engine use hopper`" in caught.value.hint
    assert caught.value.status == 78
    assert choice.current_name(paths.engines) == ""
    assert ctl_engine.main(["use", "hopper"], paths) == 0
    assert ctl_engine.main(["use", "blackwell", "--anyway"], paths) == 0
    assert ctl_engine.main(["rollback"], paths) == 0
    with pytest.raises(ConfigError, match="not built for"):
        ctl_engine.main(["rollback"], paths)
    assert choice.current_name(paths.engines) == "hopper"


def test_an_engine_that_is_newer_than_the_driver_is_not_chosen(paths: Paths, host: dict[str, object]) -> None:
    engine(paths.engines, "new")
    engine(paths.engines, "old", cuda="12.8")
    host["seen"] = gpu.Findings("nvml", (Gpu(0, "H200", compute_capability="9.0", driver_version="570.86.15"),), cuda_driver=12080)
    with pytest.raises(ConfigError, match=r"built for CUDA 13.0, and the driver 570.86.15 is older") as caught:
        ctl_engine.main(["use", "new"], paths)
    assert "use old" in caught.value.hint
    host["seen"] = gpu.Findings(hung_in="nvml")
    assert ctl_engine.main(["use", "new"], paths) == 0, "a driver that does not answer speaks against no engine"


def test_the_list_says_what_does_not_fit(paths: Paths, host: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    engine(paths.engines, "hopper")
    host["hardware"] = AMD
    ctl_engine.main(["list"], paths)
    assert "does not fit this host: the cuda build needs a GPU of NVIDIA" in capsys.readouterr().out


def test_a_build_for_absent_hardware_is_refused_before_anything_is_made(paths: Paths, host: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    host["hardware"] = CPU
    with pytest.raises(ConfigError, match="needs a GPU of NVIDIA") as caught:
        ctl_engine.main(["install", "--cuda"], paths)
    assert "vllmctl engine install --cpu" in caught.value.hint
    host["hardware"] = OLD
    with pytest.raises(ConfigError, match="no build of vLLM fits"):
        ctl_engine.main(["install"], paths)
    assert not paths.engines.exists()


def test_preflight_refuses_a_cuda_engine_without_a_driver() -> None:
    request = gpu.GpuRequest(cuda="13.0")
    result = gpu.judge(request, gpu.Findings(notes=("nothing",)))
    assert result.failures == ("the engine was built for CUDA 13.0, and this host has no NVIDIA driver",)
    assert "--cpu" in result.hint
    assert gpu.judge(gpu.GpuRequest(), gpu.Findings()).failures == ()


# -- pinned


def pinned_to(paths: Paths, version: str, **more: str) -> str:
    return Vllm().installed(context(paths.engines.parent, {"engine.version": version, **more}).config, paths, {}).name


def test_a_pin_is_a_version_or_a_directory(paths: Paths) -> None:
    engine(paths.engines, "vllm-0.32.0-cpu", variant="cpu", cuda="")
    engine(paths.engines, "vllm-0.31.0-cpu", variant="cpu", cuda="", version="0.31.0")
    choice.choose(paths.engines, "vllm-0.32.0-cpu")
    assert pinned_to(paths, "0.31.0") == "vllm-0.31.0-cpu"
    assert pinned_to(paths, "vllm-0.31.0-cpu") == "vllm-0.31.0-cpu"
    choice.choose(paths.engines, "vllm-0.31.0-cpu")
    assert pinned_to(paths, "0.32.0") == "vllm-0.32.0-cpu"
    assert pinned_to(paths, "") == "vllm-0.31.0-cpu"


def test_of_several_builds_of_a_version_the_chosen_or_the_newest_is_meant(paths: Paths) -> None:
    engine(paths.engines, "vllm-0.32.0-cpu", variant="cpu")
    engine(paths.engines, "vllm-0.32.0-cpu.2", variant="cpu")
    engine(paths.engines, "vllm-0.32.0-cpu.10", variant="cpu")
    assert pinned_to(paths, "0.32.0") == "vllm-0.32.0-cpu.10"
    choice.choose(paths.engines, "vllm-0.32.0-cpu.2")
    assert pinned_to(paths, "0.32.0") == "vllm-0.32.0-cpu.2"
    engine(paths.engines, "vllm-0.31.0-cpu", version="0.31.0")
    choice.choose(paths.engines, "vllm-0.31.0-cpu")
    engine(paths.engines, "vllm-0.32.0-cuda")
    with pytest.raises(SettingRefused, match="several engines are 0"):
        pinned_to(paths, "0.32.0")


@pytest.mark.parametrize(("version", "more", "said"), [("0.30.0", {}, "not installed"), ("current", {}, "not installed"), ("../x", {}, "not installed"), ("0.32.0", {"engine.executable": "/x/vllm"}, "engine.executable is set too")])
def test_a_pin_to_what_is_not_there_is_refused(paths: Paths, version: str, more: dict[str, str], said: str) -> None:
    engine(paths.engines, "vllm-0.32.0-cpu")
    choice.choose(paths.engines, "vllm-0.32.0-cpu")
    with pytest.raises(SettingRefused, match=said) as caught:
        pinned_to(paths, version, **more)
    assert caught.value.key == "engine.version"
    assert caught.value.status == 78


def test_status_says_that_another_engine_is_chosen(paths: Paths) -> None:
    engine(paths.engines, "old")
    engine(paths.engines, "new")
    choice.choose(paths.engines, "old")
    said = {"engine": {"executable": str(paths.engines / "old/bin/vllm"), "chosen": "current"}}
    assert ctl_status.other_engine(said, paths) == ""
    choice.choose(paths.engines, "new")
    assert ctl_status.other_engine(said, paths) == "new"
    said["engine"]["chosen"] = "engine.version"
    assert ctl_status.other_engine(said, paths) == ""


def test_remove_needs_an_engine(paths: Paths) -> None:
    with pytest.raises(VllmdError, match="no engine none"):
        ctl_engine.main(["remove", "none"], paths)
