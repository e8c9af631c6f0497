"""`vllmctl model plan` over real sockets: what it says of a model that is elsewhere, and that no weights come for it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import synthetic_models, tiny_models
from tests.fakes.hub import Asked, FakeHub, Reply
from tests.tiny_models import tree
from vllmd import ctl
from vllmd.ctl import model_plan
from vllmd.errors import ModelInvalid, ModelNotFound, PermissionMissing, SourceUnavailable, UsageError, VllmdError
from vllmd.gpu import client
from vllmd.models import headers
from vllmd.models.transfer import pieces
from vllmd.system import files

pytestmark = pytest.mark.component

NAME = "acme/Middle"
ON_A100 = ("--gpu-memory", "80")
WORDS = synthetic_models.config("llama", num_hidden_layers=6, vocab_size=8000)


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch, bare_home: Path) -> Path:
    monkeypatch.setattr(pieces, "BACK_OFF_S", 0.01)
    return bare_home


class Plan:
    """Runs the command in an own root; `gpus` is what the driver says."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._capsys = root, capsys
        self.gpus: list[dict[str, Any]] = []
        monkeypatch.setattr(client, "read_once", lambda *_: {"schema": 1, "source": "nvml", "gpus": self.gpus})

    def __call__(self, *words: str) -> tuple[int, str]:
        status = ctl.run(["--root", str(self.root), "model", "plan", *words])
        return status, self._capsys.readouterr().out

    def json(self, *words: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self(*words, "--json")[1])
        return document


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    (tmp_path / "root/lib/models").mkdir(parents=True)
    return Plan(tmp_path / "root", capsys, monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return synthetic_models.write(tmp_path / "model", WORDS, shards=3)


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({NAME: model}) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def gpu(index: int, total_gib: float, name: str = "NVIDIA A100", **more: Any) -> dict[str, Any]:
    mib = int(total_gib * 1024)
    return {"index": index, "uuid": f"GPU-{index:08x}", "name": name, "lost": "", "memory_total_mib": mib, "memory_free_mib": mib - 100, **more}


def figures(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document["sizing"].items() if key not in ("source", "notes")}


def test_of_a_model_of_the_hub_headers_come_and_nothing_else(plan: Plan, hub: FakeHub, model: Path) -> None:
    before = tree(plan.root)
    far, near = plan.json(NAME, *ON_A100), plan.json(str(model), *ON_A100)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert figures(far) == figures(near)
    assert (far["via"], near["via"]) == ("hf-hub", "local")
    assert far["sizing"]["source"] == {"origin": f"{hub.url}/{NAME}", "revision": hub.commit(NAME), "file_bytes": weights, "read_bytes": far["sizing"]["source"]["read_bytes"]}
    assert sum(hub.sent_bytes.values()) < 300_000 < weights / 100
    assert far["sizing"]["source"]["read_bytes"] <= 3 * 65536 + 2000
    asked = [each for each in hub.asked if each.path.endswith(".safetensors") or each.server == "cdn"]
    assert asked
    assert all(each.headers.get("range", "").startswith("bytes=0-") for each in asked)
    assert tree(plan.root) == before


def test_a_header_that_is_longer_than_the_first_look(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = synthetic_models.config("qwen3_moe", num_experts=160, num_experts_per_tok=2, moe_intermediate_size=64, num_hidden_layers=3)
    model = synthetic_models.write(tmp_path / "experts", words)
    assert model.joinpath("model.safetensors").open("rb").read(8)[2] > 1
    with FakeHub({NAME: model}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert figures(plan.json(NAME, *ON_A100)) == figures(plan.json(str(model), *ON_A100))
        ranges = sorted(each.headers["range"] for each in hub.asked if each.server == "cdn")
    assert ranges[0] == "bytes=0-65535"
    assert ranges[1].startswith("bytes=65536-")


def test_of_a_server_that_ignores_ranges_no_more_is_read(plan: Plan, hub: FakeHub, model: Path) -> None:
    def whole(asked: Asked) -> Reply | None:
        if asked.server != "cdn":
            return None
        content = next(path.read_bytes() for path in sorted(model.glob("*.safetensors")))
        parts = (content[begin : begin + 65536] for begin in range(0, len(content), 65536))
        return Reply(200, parts, {"Content-Length": str(len(content))})

    for path in model.glob("*.safetensors"):
        path.unlink()
    hub.push(NAME, synthetic_models.write(model, WORDS | {"vocab_size": 32000}))
    hub.script = whole
    document = plan.json(NAME, "--cpu")
    assert document["sizing"]["source"]["read_bytes"] < 70_000
    assert hub.sent_bytes["cdn"] < document["sizing"]["source"]["file_bytes"] / 2, "the rest stayed in buffers, or was never sent"
    assert document["sizing"]["weights_bytes"] < document["sizing"]["source"]["file_bytes"] * 1.1


def test_a_server_that_fails_now_and_then_is_asked_again(plan: Plan, hub: FakeHub) -> None:
    failed: list[str] = []

    def moody(asked: Asked) -> Reply | None:
        if asked.server == "cdn" and len(failed) < 2:
            failed.append(asked.path)
            return Reply(503)
        return None

    hub.script = moody
    assert plan.json(NAME, "--cpu")["via"] == "hf-hub"
    assert len(failed) == 2
    hub.script = lambda asked: Reply(503) if asked.server == "cdn" else None
    with pytest.raises(SourceUnavailable, match="answered 503"):
        plan(NAME, "--cpu")


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them came within the limit of a read: it went on for ever."""
    monkeypatch.setattr(model_plan, "ANSWER_S", 2.0)
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as link:
            link.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
            while not ended.wait(0.1):
                link.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        server = threading.Thread(target=drip, args=(listener,))
        server.start()
        try:
            with pytest.raises(SourceUnavailable, match="within 2 s: a source answers, but too slowly"):
                plan(NAME, "--source", "hf-hub")
        finally:
            ended.set()
            server.join()


def test_a_gated_model_wants_its_token(plan: Plan, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = {NAME}
    with pytest.raises(PermissionMissing, match="gated"):
        plan(NAME, "--cpu")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert plan(NAME, "--cpu")[0] in (0, 3)
    assert hub.tokens_seen("cdn") == set()


def test_a_bucket_is_read_in_the_same_way(plan: Plan, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {"R2_BUCKET": "plans", "R2_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
            monkeypatch.setenv(name, value)
        s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        s3.create_bucket(Bucket="plans")
        for path in model.iterdir():
            s3.put_object(Bucket="plans", Key=f"Middle/{path.name}", Body=path.read_bytes())
        document = plan.json(NAME, *ON_A100, "--source", "r2")
        for path in model.iterdir():
            s3.delete_object(Bucket="plans", Key=f"Middle/{path.name}")
        s3.close()
    finally:
        server.stop()
    assert document["via"] == "r2"
    assert figures(document) == figures(plan.json(str(model), *ON_A100))
    assert document["sizing"]["source"]["read_bytes"] < 300_000


def test_a_name_in_the_store_and_one_that_is_nowhere(plan: Plan, model: Path) -> None:
    model.rename(plan.root / "lib/models/Middle")
    assert plan.json("Middle", "--cpu")["via"] == "local"
    with pytest.raises(ModelNotFound, match="no source has acme/None") as caught:
        plan("acme/None", "--cpu", "--source", "local", "--source", "hf-cache")
    assert caught.value.status == 66
    with pytest.raises(UsageError, match="no source 'ftp'"):
        plan("Middle", "--source", "ftp")


# -- this host's GPUs


def test_what_does_not_fit_says_what_to_change(plan: Plan, tmp_path: Path) -> None:
    words = synthetic_models.config(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=131072,
    )  # fmt: skip
    big = synthetic_models.write(tmp_path / "big", words, shards=4)
    plan.gpus = [gpu(0, 24, "NVIDIA GeForce RTX 4090")]
    status, out = plan(str(big))
    assert status == 3
    assert "weights   14.96 GiB\n" in out
    assert "16.00 GiB for one request of 131072 tokens (128 KiB a token)" in out
    assert "does not fit: one request of 131072 tokens takes 16.00 GiB of KV cache" in out
    assert "- set serve.max_model_len: " in out
    assert "on each of 2 GPUs; this host has 1)" in out
    length = out.partition("serve.max_model_len: ")[2].split()[0]
    assert plan(str(big), "--max-model-len", length)[0] == 0
    status, out = plan(str(big), "--gpu-memory", "80")
    assert (status, "fits: " in out) == (0, True)


def test_of_mixed_gpus_the_smallest_that_is_needed_counts(plan: Plan, model: Path) -> None:
    plan.gpus = [gpu(0, 24), gpu(1, 80), gpu(2, 80), {**gpu(3, 80), "lost": "fallen off the bus"}]
    one, three = plan.json(str(model))["sizing"], plan.json(str(model), "--gpus", "3")["sizing"]
    assert (one["device"]["total_bytes"] >> 30, one["device"]["count"]) == (80, 3)
    assert three["device"]["total_bytes"] >> 30 == 24
    assert three["verdict"] == "too_large"
    assert "cannot be shared out among 3 GPUs" in three["what"]


def test_a_gpu_without_memory_of_its_own_has_the_hosts(plan: Plan, model: Path) -> None:
    plan.gpus = [{"index": 0, "uuid": "GPU-1", "name": "NVIDIA GB10", "lost": ""}]
    device = plan.json(str(model))["sizing"]["device"]
    total = int(files.read_small(Path("/proc/meminfo"), 1 << 16).split()[1]) * 1024
    assert (device["total_bytes"], device["is_cpu"]) == (total, False)


# -- hostile models


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model-00001-of-00003.safetensors", b"\xff" * 100, "its header claims"),
        ("model-00001-of-00003.safetensors", b"\x05\0\0\0\0\0\0\0{]}{}", "is not JSON"),
        ("model-00001-of-00003.safetensors", b"{}", "its header claims"),
        ("config.json", b"[1]", "no JSON object"),
        ("config.json", b"[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_model_is_said_to_be_none(plan: Plan, hub: FakeHub, model: Path, name: str, content: bytes, reason: str) -> None:
    (model / name).write_bytes(content)
    for place in (str(model), NAME):
        hub.push(NAME, model)
        with pytest.raises(ModelInvalid, match=reason):
            plan(place, "--cpu")


@pytest.mark.parametrize(
    "words",
    ["--gpu-memory nan", "--gpu-memory inf", "--gpu-memory -5", "--gpu-memory 0", "--gpu-memory 1e300", "--gpu-memory x", "--gpus 0", "--gpus 1e3", "--pipeline 100000000000",
     "--max-model-len 32k", "--gpu-memory-utilization nan", "--max-model-len 99999999999999999999"],
)  # fmt: skip
def test_numbers_that_are_none_are_refused_in_two_lines(words: str, plan: Plan, model: Path) -> None:
    flag, value = words.split()
    with pytest.raises(UsageError, match=f"argument {flag}: '{value}' is no number"):
        plan(str(model), f"{flag}={value}")


@pytest.mark.parametrize(("name", "error"), [("a" * 5000, VllmdError), ("~nobody-is-called-so/x", UsageError)])
def test_names_that_no_file_can_have_are_an_error_and_no_traceback(name: str, error: type[VllmdError], plan: Plan) -> None:
    with pytest.raises(error):
        plan(name, "--source", "local")


def test_weights_that_lie_there_twice_count_once(model: Path) -> None:
    once = headers.local(model)
    (model / "consolidated.safetensors").write_bytes((model / "model-00001-of-00003.safetensors").read_bytes())
    assert headers.local(model).tensors == once.tensors
    tiny_models.write_index(model, {"a": "model-00001-of-00003.safetensors"})
    assert len(headers.local(model).tensors) < len(once.tensors)


def test_of_many_gguf_variants_the_largest_is_reckoned_with(model: Path, plan: Plan) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    for name, size in (("m-Q4_K_M.gguf", 1000), ("m-Q8_0.gguf", 2000)):
        (model / name).write_bytes(b"GGUF" + bytes(size))
    sizing = plan.json(str(model), "--cpu")["sizing"]
    assert (sizing["source"]["file_bytes"], sizing["exact"]) == (2004, False)
    assert "2 GGUF variants" in sizing["notes"][0]
