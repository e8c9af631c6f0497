"""`vllmctl model presets` on recorded hardware: what somebody who knows these GPUs would choose, and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.component.gpu_hosts import GpuHost
from tests.fakes.nvml import uuid
from tests.hardware import HOSTS, Recorded

pytestmark = pytest.mark.component


@dataclass(frozen=True, slots=True)
class Choice:
    """The first preset that fits, its model, on how many GPUs and with which context; `why` is the specialist's."""

    tier: str
    preset: str
    model: str
    gpus: int
    context: int
    why: str


SPECIALIST = {
    "no-gpu": Choice("cpu", "qwen3-0.6b", "Qwen/Qwen3-0.6B", 0, 8192, "a processor reads every weight for each token: only a tiny model is of use"),
    "one-4090": Choice(
        "nvidia-older", "qwen3-30b-a3b", "cyankiwi/Qwen3-30B-A3B-Instruct-2507-AWQ-4bit", 1, 32768,
        "24 GB hold 4-bit weights of 30 billion parameters (17 GB), of which 3 billion work for each token, and 32768 tokens; Ada has no NVFP4",
    ),
    "two-a100": Choice(
        "nvidia-older", "qwen36-35b-a3b", "cyankiwi/Qwen3.6-35B-A3B-AWQ-4bit", 2, 262144,
        "no FP8 before compute capability 8.9, so 4-bit; one of them would hold half the context",
    ),
    "three-a100": Choice(
        "nvidia-older", "qwen36-35b-a3b", "cyankiwi/Qwen3.6-35B-A3B-AWQ-4bit", 2, 131072,
        "heads do not divide by three: two GPUs serve this one, the third is free for another",
    ),
    "eight-h200": Choice(
        "nvidia-hopper", "qwen36-35b-a3b", "cyankiwi/Qwen3.6-35B-A3B-AWQ-4bit", 1, 262144,
        "one of them holds the whole context; seven more would only wait for each other, and can serve seven other models",
    ),
    "gb10": Choice(
        "nvidia-blackwell", "qwen36-35b-a3b", "RedHatAI/Qwen3.6-35B-A3B-NVFP4", 1, 262144,
        "119 GiB that the host shares: NVFP4 is native, and few active parameters suit its slow memory; the host keeps 15 %",
    ),
    "b200": Choice("nvidia-blackwell", "qwen36-35b-a3b", "RedHatAI/Qwen3.6-35B-A3B-NVFP4", 1, 262144, "compute capability 10.0 is Blackwell too: NVFP4, not the 4-bit form for old GPUs"),
    "mixed": Choice(
        "nvidia-older", "qwen36-35b-a3b", "cyankiwi/Qwen3.6-35B-A3B-AWQ-4bit", 2, 65536,
        "the 5090 alone has 31 GiB, and NVFP4 wants 32; the two 3090 are equal and have 48 together, while 3 different GPUs cannot share a layer",
    ),
    "mig": Choice(
        "nvidia-older", "qwen36-35b-a3b", "cyankiwi/Qwen3.6-35B-A3B-AWQ-4bit", 1, 32768,
        "a process sees one MIG device: the largest, 39 GiB, and not the 80 of the card",
    ),
    "mi300x": Choice("amd", "qwen36-35b-a3b", "Qwen/Qwen3.6-35B-A3B-FP8", 1, 262144, "gfx942 has FP8, and no NVFP4; 192 GiB hold the whole context"),
    "mi300x-without-kfd": Choice("amd", "qwen36-35b-a3b", "Qwen/Qwen3.6-35B-A3B-FP8", 1, 262144, "by its device id, where a container lacks /sys/class/kfd"),
    "four-t4": Choice(
        "nvidia-legacy", "llama-33-70b", "ibnzterrell/Meta-Llama-3.3-70B-Instruct-AWQ-INT4", 4, 8192,
        "Turing has no bfloat16 and no FP8: AWQ in half precision, divided among all four",
    ),
}  # fmt: skip


def model(root: Path, recorded: Recorded, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ, patch = recorded.build(root)
    script = f"{patch}\nimport sys; from vllmd.ctl import main; sys.exit(main())"
    argv = [sys.executable, "-c", script, "--root", str(root), "model", *arguments]
    return subprocess.run(argv, env={"PATH": os.environ["PATH"], "HOME": str(root), **environ}, capture_output=True, text=True, timeout=60, check=False)


def presets(root: Path, recorded: Recorded) -> dict[str, Any]:
    done = model(root, recorded, "presets", "--json")
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("host", SPECIALIST)
def test_the_choice_is_the_specialist_s(host: str, tmp_path: Path) -> None:
    wanted = SPECIALIST[host]
    said = presets(tmp_path, HOSTS[host])
    assert said["recommended"] == wanted.preset, wanted.why
    [row] = [each for each in said["presets"] if each["id"] == wanted.preset]
    assert (row["tier"], row["model"], row["gpus"], row["max_model_len"]) == (wanted.tier, wanted.model, wanted.gpus, wanted.context), wanted.why


def reasons(root: Path, host: str) -> dict[str, str]:
    return {each["id"]: each["why"] for each in presets(root, HOSTS[host])["presets"] if not each["fits"]}


def test_it_says_what_does_not_fit_and_why(tmp_path: Path) -> None:
    why = reasons(tmp_path, "one-4090")
    assert why["llama-33-70b"] == "it needs 44 GiB, and 1 x NVIDIA GeForce RTX 4090 has 23 GiB"
    assert why["gemma4-26b-a4b"] == "No configuration for gemma4-26b-a4b on nvidia-older hardware"
    assert "qwen3-30b-a3b" not in why


def test_different_gpus_are_not_counted_together(tmp_path: Path) -> None:
    why = reasons(tmp_path, "mixed")
    assert why["qwen3-next-80b-a3b"] == "it needs 55 GiB, and 2 x NVIDIA GeForce RTX 3090 have 48 GiB; GPUs that differ cannot be joined"


def test_mig_devices_are_not_counted_together(tmp_path: Path) -> None:
    assert reasons(tmp_path, "mig")["llama-33-70b"] == "it needs 44 GiB, and a MIG device has 39 GiB; MIG devices cannot be joined"


def test_where_nothing_fits_it_says_so(tmp_path: Path) -> None:
    done = model(tmp_path, HOSTS["v100"], "presets")
    assert done.returncode == 3
    assert "it needs compute capability 7.5, and Tesla V100-SXM2-32GB has 7.0" in done.stdout
    assert "No preset fits; any other model: vllmctl" in done.stdout
    (tmp_path / "2").mkdir()
    done = model(tmp_path / "2", HOSTS["mi210"], "presets")
    assert "No configuration for llama-33-70b on amd-older hardware" in done.stdout


def drop_in(root: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((root / "etc/demo.d/50-model.yaml").read_text()))


@pytest.mark.parametrize(
    ("host", "gpus", "size"),
    [("no-gpu", None, 1), ("two-a100", 2, 2), ("eight-h200", 1, 1), ("mixed", [uuid(0), uuid(1)], 2), ("mig", ["MIG-00111111-2222-3333-4444-555566667777"], 1), ("mi300x", 1, 1)],
)
def test_gpus_are_named_where_a_number_could_mean_others(host: str, gpus: Any, size: int, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    done = model(tmp_path, HOSTS[host], "set", "demo", SPECIALIST[host].preset)
    assert done.returncode == 0, done.stderr
    written = drop_in(tmp_path)
    assert (written.get("gpus"), written["serve"]["tensor_parallel_size"]) == (gpus, size)
    assert written["serve"]["max_model_len"] == SPECIALIST[host].context


def test_on_memory_that_the_host_shares_the_host_keeps_some(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    assert model(tmp_path, HOSTS["gb10"], "set", "demo", "qwen36-35b-a3b").returncode == 0
    assert drop_in(tmp_path)["serve"]["gpu_memory_utilization"] == 0.85


def test_the_instance_s_own_gpus_and_a_wanted_number_are_kept_to(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/demo.yaml").write_text("gpus: [2, 3]\n")
    assert model(tmp_path, HOSTS["eight-h200"], "set", "demo", "llama-33-70b", "--gpus", "2").returncode == 0
    assert drop_in(tmp_path)["gpus"] == [uuid(2), uuid(3)]
    refused = model(tmp_path, HOSTS["eight-h200"], "set", "demo", "llama-33-70b", "--gpus", "4")
    assert (refused.returncode, "4 GPUs are wanted, and there are 2 alike" in refused.stderr) == (78, True)
    assert drop_in(tmp_path)["gpus"] == [uuid(2), uuid(3)], "what was refused changed nothing"
    refused = model(tmp_path, HOSTS["eight-h200"], "set", "other", "llama-33-70b", "--gpus", "3")
    assert (refused.returncode, "among 1, 2, 4 or 8 GPUs, not among 3" in refused.stderr) == (78, True)
    assert not (tmp_path / "etc/other.yaml").exists()


def test_a_driver_that_hangs_is_told_and_nothing_is_chosen() -> None:
    with GpuHost() as host:
        host.stub.set(hang="nvmlDeviceGetTemperature")
        script = "import vllmd.ctl.gpu_facts as facts; facts.DRIVER_TIMEOUT_S = 1.5\nimport sys; from vllmd.ctl import main; sys.exit(main())"
        environ = {"PATH": os.environ["PATH"], "HOME": str(host.root), **host.stub.environ()}
        (host.root / "etc").mkdir()
        for verb in (["presets"], ["set", "demo", "qwen3-8b"]):
            done = subprocess.run([sys.executable, "-c", script, "--root", str(host.root), "model", *verb], env=environ, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 69
            assert "stuck in nvmlDeviceGetTemperature" in done.stdout + done.stderr
        assert list((host.root / "etc").iterdir()) == []


def test_a_gpu_that_somebody_has_is_named() -> None:
    with GpuHost(2) as host, host.instance("qwen3", {"gpus": ["0"]}) as instance:
        instance.wait_ready()
        argv = [sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", "--root", str(host.root), "model"]
        environ = {"PATH": os.environ["PATH"], "HOME": str(host.root), **host.stub.environ()}
        done = subprocess.run([*argv, "presets"], env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert "GPU 0 NVIDIA H100 80GB HBM3 is held by qwen3" in done.stdout
        done = subprocess.run([*argv, "presets", "qwen3"], env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert "held by" not in done.stdout, "what the instance itself has is free for its next model"
        instance.kill_engine("vllm")
        host.memory(0)
        instance.wait_exit()
