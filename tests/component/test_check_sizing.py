"""What `vllmd check` says of memory: for a model that is here, against what the host's GPU service tells, and in no time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import synthetic_models
from tests.fakes.hub import FakeHub
from vllmd import ctl
from vllmd.check import check_one
from vllmd.config.paths import Paths, root_paths
from vllmd.core.sizing import Wanted
from vllmd.core.sizing_verdict import Device
from vllmd.core.tiers import Card
from vllmd.ctl import model_fit, model_hardware
from vllmd.ctl.doctor import jobs
from vllmd.ctl.model_hardware import Equipment
from vllmd.engines import record
from vllmd.gpu import ask
from vllmd.preflight import sizing

pytestmark = pytest.mark.component

GIB = 1 << 30
LLAMA_8B = synthetic_models.config(
    "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    max_position_embeddings=131072,
)  # fmt: skip


class Check:
    """One instance in an own root, with an engine that is only described; `told` is what gpu.sock says (None: nobody answers)."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: Paths = root_paths(root)
        self.told: dict[str, Any] | None = None
        self.asked: list[float] = []
        self._capsys = capsys
        self.variant = "cuda"
        program = root / "engines/vllm/bin/vllm"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        self.program = program
        monkeypatch.setattr(ask, "ask", self._ask)
        plain = record.describe
        monkeypatch.setattr(record, "describe", lambda *given: __import__("dataclasses").replace(plain(*given), variant=self.variant))

    def _ask(self, _paths: Paths, timeout_s: float) -> dict[str, Any] | None:
        self.asked.append(timeout_s)
        return self.told

    def __call__(self, model: str, **settings: Any) -> dict[str, Any]:
        self.paths.config.mkdir(exist_ok=True)
        serve, engine = settings.pop("serve", {}), {"executable": str(self.program), **settings.pop("engine", {})}
        (self.paths.config / "demo.yaml").write_text(json.dumps({"model": model, "serve": serve, "engine": engine, **settings}))
        assert check_one("demo", self.paths, {"PATH": os.environ["PATH"]}, {}, as_json=True, show_origin=False) == 0
        document: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return document["sizing"]  # type: ignore[no-any-return]

    def text(self) -> str:
        check_one("demo", self.paths, {"PATH": os.environ["PATH"]}, {}, as_json=False, show_origin=False)
        return self._capsys.readouterr().out


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    return Check(tmp_path / "root", capsys, monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(synthetic_models.write(tmp_path / "model", LLAMA_8B, shards=4))


def gpu(index: int, gib: float, used_gib: float = 0.5, **more: Any) -> dict[str, Any]:
    total = int(gib * 1024)
    return {"index": index, "uuid": f"GPU-{index:08x}-1111", "name": "NVIDIA H100", "lost": "", "memory_total_mib": total, "memory_free_mib": total - int(used_gib * 1024), **more}


def test_settings_decide_and_what_to_change_is_said(check: Check, model: str) -> None:
    check.told = {"gpus": [gpu(0, 24), gpu(1, 24)]}
    found = check(model)
    assert (found["verdict"], found["kv_cache_bytes"]) == ("too_long", 16 * GIB)
    assert found["advice"][0].startswith("set serve.max_model_len: ")
    assert any("this host has" not in line and "tensor_parallel_size: 2" in line for line in found["advice"])
    text = check.text()
    assert "memory         does not fit: one request of 131072 tokens takes 16.00 GiB" in text
    length = int(found["advice"][0].rpartition(" ")[2])
    assert check(model, serve={"max_model_len": length})["verdict"] == "fits"
    assert check(model, serve={"tensor_parallel_size": 2})["verdict"] == "fits"
    assert check(model, engine={"args": {"max-model-len": "8k", "enforce-eager": True}})["max_model_len"] == 8000
    assert check(model, engine={"args": {"kv-cache-dtype": "fp8"}})["kv_cache_bytes"] == 8 * GIB
    assert set(check.asked) == {0.1}


NODE = "Node 0 MemTotal: {0} kB\nNode 0 MemFree: {1} kB\nNode 0 Active(file): 10 kB\nNode 0 Inactive(file): 20 kB\nNode 0 SReclaimable: 30 kB\n"


def test_the_memory_of_processors_is_what_the_engine_takes_it_for(tmp_path: Path) -> None:
    """vLLM's cpu_resource_utils.get_memory_node_info: a worker's node, and no more than its container has."""
    proc, system = tmp_path / "proc", tmp_path / "sys"
    group = system / "fs/cgroup"
    for folder in (proc, group, *(system / f"devices/system/node/node{number}" for number in (0, 2, 10))):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert sizing.host_memory(proc=proc, system=system) == Device("this host", 9000 << 10, 8000 << 10, is_cpu=True), "no NUMA"
    for number, total in ((0, 0), (2, 4000), (10, 5000)):
        (system / f"devices/system/node/node{number}/meminfo").write_text(NODE.format(total, 100))
    assert sizing.host_memory(proc=proc, system=system) == Device("a NUMA node of this host", 4000 << 10, 160 << 10, is_cpu=True), "a node may have no memory"
    assert sizing.host_memory(is_cpu=False, proc=proc, system=system).total == 9000 << 10, "a GPU that shares it has all of it"
    (group / "memory.max").write_text("max\n")
    assert sizing.host_memory(proc=proc, system=system).total == 4000 << 10
    (group / "memory.max").write_text("200000\n")
    (group / "memory.current").write_text("150000\n")
    found = sizing.host_memory(proc=proc, system=system)
    assert (found.total, found.free) == (200000, 50000)


def test_the_chosen_gpus_count(check: Check, model: str) -> None:
    part = {"uuid": "MIG-77", "memory_total_mib": 20 << 10, "memory_free_mib": 20 << 10}
    check.told = {"gpus": [gpu(0, 24), gpu(1, 80), gpu(2, 80, mig=[part])]}
    few = {"max_model_len": 8192}
    assert check(model, serve=few)["device"]["total_bytes"] == 80 * GIB, "any one: the engine may have the best"
    assert check(model, serve=few, gpus=[0])["device"]["total_bytes"] == 24 * GIB
    assert check(model, serve=few, gpus=["MIG-77"])["device"]["total_bytes"] == 20 * GIB
    assert check(model, serve={**few, "tensor_parallel_size": 2}, gpus=["0", "GPU-00000001"])["device"]["total_bytes"] == 24 * GIB


def test_memory_that_it_has_itself_is_not_missing(check: Check, model: str) -> None:
    check.told = {"gpus": [gpu(0, 80, used_gib=70)]}
    assert check(model, serve={"max_model_len": 8192})["verdict"] == "busy"
    runtime = check.paths.instance_runtime("demo")
    runtime.mkdir(parents=True)
    (runtime / "status.json").write_text(json.dumps({"pid": os.getpid()}))
    assert check(model, serve={"max_model_len": 8192})["verdict"] == "fits"


def test_without_the_gpu_service_only_the_need_is_said(check: Check, model: str) -> None:
    found = check(model, serve={"max_model_len": 8192})
    assert (found["verdict"], found["device"]) == ("unknown", None)
    assert "a GPU of 24 GiB would do" in check.text()


def test_a_cpu_engine_has_its_space_and_asks_no_gpu(check: Check, model: str) -> None:
    check.variant = "cpu"
    found = check(model, gpus="none", serve={"max_model_len": 32768}, engine={"env": {"VLLM_CPU_KVCACHE_SPACE": 2}})
    assert found["verdict"] == "too_long"
    assert found["advice"] == ["set serve.max_model_len: 16128", "or set VLLM_CPU_KVCACHE_SPACE: 5 in engine.env (GiB), if the host has it"]
    assert check.asked == []


def test_a_model_that_is_not_here_is_not_fetched(check: Check) -> None:
    found = check("acme/Nothing")
    assert found["verdict"] == "unknown"
    assert "nothing is fetched for this: `vllmctl model plan acme/Nothing`" in found["what"]
    assert not (check.paths.models / ".staging").exists()


def test_a_damaged_model_is_no_failure_of_the_check(check: Check, model: str) -> None:
    (Path(model) / "model-00001-of-00004.safetensors").write_bytes(b"\xff" * 99)
    assert "its header claims" in check(model)["what"]
    (Path(model) / "config.json").write_text("{")
    assert "is no JSON" in check(model)["what"]


def test_long_headers_are_left_to_the_plan(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = synthetic_models.config("qwen3_moe", num_experts=64, num_experts_per_tok=2, moe_intermediate_size=256, num_hidden_layers=12)
    model = str(synthetic_models.write(tmp_path / "experts", words))
    exact = check(model)
    monkeypatch.setattr(sizing, "QUICK_HEADER_BYTES", 1000)
    quick = check(model)
    assert (exact["exact"], quick["exact"]) == (True, False)
    assert quick["weights_bytes"] == pytest.approx(exact["weights_bytes"], rel=0.01)
    assert quick["kv_cache_bytes"] == exact["kv_cache_bytes"]
    assert "from the sizes of its files" in check.text()


def test_nothing_slow_is_imported_for_it() -> None:
    """Each of these takes longer than the whole check may."""
    slow = ("asyncio", "h11", "ssl", "huggingface_hub", "botocore", "subprocess", "concurrent.futures", "pynvml")
    code = f"import sys; from vllmd import check; from vllmd.engines import vllm_sizing; print([name for name in {slow!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_is_asked_of_a_wish_is_asked_of_every_gpu() -> None:
    document = {"gpus": [gpu(0, 80), gpu(1, 40, used_gib=30), {"index": 2, "lost": "gone"}, "nonsense", {"index": "x", "memory_total_mib": -5, "name": "\x1b[1m"}]}
    found = sizing.devices(document)
    assert [device.total >> 30 for device in found[:2]] == [80, 40]
    assert "\x1b" not in found[2].name
    least = sizing.smallest(found[:2], 2)
    assert least is not None
    assert (least.total >> 30, least.free >> 30) == (40, 10)
    assert sizing.smallest([], 1) is None
    assert Wanted().gpus == 1


# -- what `model set` says of a model of one's own


class Chooser:
    """`model set demo MODEL` in the root of `check`, whose engine is the host's; what it said."""

    def __init__(self, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = check.paths.config.parent
        check.paths.config.mkdir(exist_ok=True)
        self._check = check
        self.host()
        self.cards: tuple[Card, ...] = ()
        monkeypatch.setattr(model_hardware, "look", lambda *_: Equipment(self.cards, 64 << 10))
        monkeypatch.setattr(jobs, "_REAP_S", 10.0)
        monkeypatch.setenv("HOME", str(self._root))

    def host(self, **model: Any) -> None:
        (self._check.paths.config / "vllmd.yaml").write_text(json.dumps({"engine": {"executable": str(self._check.program)}, "model": model}))

    def __call__(self, *words: str) -> tuple[list[str], float]:
        began = time.monotonic()
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert ctl.run(["--root", str(self._root), "model", "set", "demo", *words, "--no-restart", "--json"]) == 0
        return [note for note in json.loads(output.getvalue())["notes"] if "fit" in note or note.startswith("- ")], time.monotonic() - began


@pytest.fixture
def choose(check: Check, monkeypatch: pytest.MonkeyPatch) -> Chooser:
    return Chooser(check, monkeypatch)


def test_a_model_of_ones_own_that_will_not_fit_is_told_and_chosen(choose: Chooser, model: str) -> None:
    choose.cards = tuple(Card(index, f"GPU-{index}", "A10", capability="8.6", memory_mib=24 << 10) for index in range(2))
    told, _ = choose(model)
    assert told[0].startswith("it will probably not fit: one request of 131072 tokens takes 16.00 GiB")
    assert any(line.startswith("- set serve.max_model_len: ") for line in told)
    assert any("tensor_parallel_size: 2 (" in line and "this host has" not in line for line in told)
    assert choose(model, "--force")[0] == []
    assert choose(model, "--gpus", "2")[0] == []
    choose.cards = (Card(0, "GPU-0", "H100", capability="9.0", memory_mib=80 << 10),)
    assert choose(model)[0] == []


def test_what_is_at_the_hub_is_looked_at_there_with_the_settings_that_hold(choose: Chooser, check: Check, tmp_path: Path) -> None:
    middle = synthetic_models.write(tmp_path / "middle", synthetic_models.config("llama", num_hidden_layers=6, vocab_size=8000, max_position_embeddings=131072))
    choose.cards = (Card(0, "GPU-0", "A2", capability="8.6", memory_mib=900),)
    with FakeHub({"acme/Middle": middle}) as hub:
        choose.host(hf_endpoint=hub.url)
        assert choose("acme/Middle")[0][0].startswith("it will probably not fit: the weights")
        (check.paths.config / "demo.d/60-mine.yaml").write_text(json.dumps({"serve": {"max_model_len": 512}, "engine": {"args": {"enforce-eager": True, "max-num-batched-tokens": 512, "max-num-seqs": 4}}}))
        assert choose("acme/Middle")[0] == []


def test_a_network_that_swallows_everything_holds_nobody_up(choose: Chooser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_fit, "DEADLINE_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        choose.host(hf_endpoint=endpoint)
        told, took_s = choose("acme/Middle")
        assert told[0].startswith("whether it will fit is not known (no answer within 2 s): vllmctl --root ")
        assert told[0].endswith(" model plan acme/Middle")
        assert took_s < 8
        monkeypatch.setattr(model_fit, "DEADLINE_S", 60.0)
        choose.host(hf_endpoint=endpoint, offline=True)
        assert "its headers cannot be read now" in choose("acme/Middle")[0][0]
