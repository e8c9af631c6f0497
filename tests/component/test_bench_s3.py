"""What the benchmark of downloads measures with: its models are whole, its store is one, its bars are judged as they are meant."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import measured, static_s3, weights
from bench.place import BenchError
from bench.table import Figure
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.models.remote import Listing
from vllmd.models.sources import Context, Offered
from vllmd.models.sources.s3 import S3
from vllmd.models.validate import Checks, validate

pytestmark = pytest.mark.component


@pytest.mark.parametrize("sparse", [True, False])
def test_a_made_model_is_whole_and_of_its_size(tmp_path: Path, sparse: bool) -> None:
    size = 3_000_001
    directory = weights.make(tmp_path / "model", shards=3, shard_bytes=size, tensors=7, sparse=sparse)
    validate(directory, Checks())
    shards = sorted(directory.glob("*.safetensors"))
    assert [path.stat().st_size for path in shards] == [size] * 3
    assert len({path.read_bytes()[-1000:] for path in shards}) == 1 if sparse else len({path.read_bytes() for path in shards}) == 3


def test_its_store_is_listed_by_the_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "bench")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "bench")
    directory = weights.make(tmp_path / static_s3.BUCKET / "model", shards=2, shard_bytes=1_000_000, tensors=3, sparse=True)
    (tmp_path / static_s3.BUCKET / "other").write_text("not below the prefix")
    with static_s3.listing(tmp_path) as port:
        settings = Model(id="bench/model", r2_bucket=static_s3.BUCKET, r2_endpoint_url=f"http://127.0.0.1:{port}", r2_object_prefix="model", r2_region="x")
        found = S3().find(ModelRequest("model", "bench/model", "", "", ("r2",), tmp_path), Context(settings, {}))
    assert isinstance(found, Offered)
    assert _sizes(found.listing) == {path.name: path.stat().st_size for path in directory.iterdir()}


def _sizes(listing: Listing) -> dict[str, int]:
    return {file.name: file.size for file in listing.files}


def test_cost_of_a_command(tmp_path: Path) -> None:
    hungry = "data = bytearray(b'x') * (64 << 20); import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    found = measured.cost([sys.executable, "-S", "-c", hungry], {}, tmp_path)
    assert found.cpu_s >= 0.3
    assert found.seconds >= 0.3
    assert 64 <= found.memory_mib < 200


def test_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"ended with 3: .*no such bucket"):
        measured.cost([sys.executable, "-S", "-c", "import sys; print('no such bucket'); sys.exit(3)"], {}, tmp_path)


def test_bars_that_are_the_least() -> None:
    assert Figure("speed", [1.0, 1.2, 1.3], "x", 1.15, at_least=True).cells()[4:6] == (">= 1.15 x", "ok")
    assert Figure("speed", [1.0, 1.1, 1.3], "x", 1.15, at_least=True).verdict == "UNDER"
    assert Figure("time", [1.0, 1.1, 1.3], "s", 1.15).verdict == "ok"
