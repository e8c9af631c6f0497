"""From a bucket to a published model, through the whole of the resolve stage."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from tests import tiny_models
from tests.component.test_source_s3 import environ
from tests.fakes.s3_server import Asked, Reply, S3Server, error, item, listing
from vllmd.config.settings import Model
from vllmd.core.model import ResolvedModel
from vllmd.errors import ModelInvalid
from vllmd.models import demo
from vllmd.models.progress import Progress
from vllmd.models.resolve import resolve

pytestmark = [pytest.mark.component, pytest.mark.usefixtures("environ")]

__all__ = ["environ"]


class Bucket:
    """What a directory has, as objects; ETags change with the bytes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, asked: Asked) -> Reply:
        if "list-type=2" in asked.target:
            names = sorted(path.relative_to(self._directory).as_posix() for path in self._directory.rglob("*") if path.is_file())
            return listing(*(self._item(name) for name in names))
        name = unquote(asked.path).removeprefix("/models/p/Tiny/")
        if asked.headers.get("if-match") != self._etag(name):
            return error(412, "PreconditionFailed")
        body = (self._directory / name).read_bytes()
        first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
        headers = {"ETag": self._etag(name), "Content-Range": f"bytes {first}-{last}/{len(body)}"}
        return Reply(206, body[int(first) : int(last) + 1], headers)

    def _item(self, name: str) -> str:
        return item(f"p/Tiny/{quote(name)}", (self._directory / name).stat().st_size, self._etag(name))

    def _etag(self, name: str) -> str:
        return f'"{hashlib.sha1((self._directory / name).read_bytes()).hexdigest()}-2"'


def resolved(url: str, store: Path) -> tuple[ResolvedModel, list[Progress]]:
    said: list[Progress] = []
    settings = Model(r2_bucket="models", r2_models_prefix="p", r2_endpoint_url=url)
    return resolve(tiny_models.request(store, sources=("r2",)), settings, dict(os.environ), said.append), said


def test_published_once_then_asked_for_one_listing_only(tmp_path: Path) -> None:
    directory = demo.make(tmp_path / "uploaded")
    (directory / "chat template é+.txt").write_text("x")
    (directory / "empty.txt").write_text("")
    with S3Server(Bucket(directory)) as server:
        model, said = resolved(server.url, tmp_path / "store")
        assert model.via == "r2"
        for path in directory.iterdir():
            assert (model.directory / path.name).read_bytes() == path.read_bytes()
        assert any("will be downloaded" in line.text and "s3://models/p/Tiny/" in line.text for line in said)
        assert all(asked.access_key == "AKIATESTING" for asked in server.asked)
        server.asked.clear()
        again, _ = resolved(server.url, tmp_path / "store")
        assert again.directory == model.directory
        assert ["list-type=2" in asked.target for asked in server.asked] == [True]


def test_a_new_upload_is_a_new_version(tmp_path: Path) -> None:
    directory = demo.make(tmp_path / "uploaded")
    with S3Server(Bucket(directory)) as server:
        before, _ = resolved(server.url, tmp_path / "store")
        (directory / "notes.txt").write_text("second")
        server.asked.clear()
        after, _ = resolved(server.url, tmp_path / "store")
    assert after.directory != before.directory
    assert (after.directory / "notes.txt").read_text() == "second"
    assert [asked.path for asked in server.asked] == ["/models", "/models/p/Tiny/notes.txt"], "what another version has is not fetched again"


def test_exclusion_of_everything_is_named_as_the_reason(tmp_path: Path) -> None:
    with S3Server(Bucket(demo.make(tmp_path / "uploaded"))) as server:
        settings = Model(r2_bucket="models", r2_models_prefix="p", r2_endpoint_url=server.url, exclude=("*",))
        with pytest.raises(ModelInvalid, match="no file that an engine reads") as caught:
            resolve(tiny_models.request(tmp_path / "store", sources=("r2",)), settings, dict(os.environ), lambda _said: None)
    assert "model.exclude" in caught.value.hint


class Summed(Bucket):
    """Objects have a SHA-256, as the one who uploaded them computed it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.sums = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in directory.iterdir()}

    def __call__(self, asked: Asked) -> Reply:
        if asked.method != "HEAD":
            return super().__call__(asked)
        sha256 = base64.b64encode(self.sums[unquote(asked.path).removeprefix("/models/p/Tiny/")]).decode()
        return Reply(200, b"", {"x-amz-checksum-sha256": sha256, "x-amz-checksum-type": "FULL_OBJECT"})

    def _item(self, name: str) -> str:
        more = "<ChecksumAlgorithm>SHA256</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
        return item(f"p/Tiny/{quote(name)}", (self._directory / name).stat().st_size, self._etag(name), more)


def test_a_checksum_of_the_store_is_held_against_the_bytes(tmp_path: Path) -> None:
    directory = demo.make(tmp_path / "uploaded")
    bucket = Summed(directory)
    shard = directory / "model-00002-of-00002.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with S3Server(bucket) as server, pytest.raises(ModelInvalid) as caught:
        resolved(server.url, tmp_path / "store")
    assert shard.name in caught.value.what
    shard.write_bytes(good)
    with S3Server(bucket) as server:
        model, _ = resolved(server.url, tmp_path / "store")
    assert (model.directory / shard.name).read_bytes() == good


def test_a_revision_that_the_store_cannot_know_is_warned_of(tmp_path: Path) -> None:
    said: list[Progress] = []
    with S3Server(Bucket(demo.make(tmp_path / "uploaded"))) as server:
        settings = Model(r2_bucket="models", r2_models_prefix="p", r2_endpoint_url=server.url)
        resolve(tiny_models.request(tmp_path / "store", revision="v1", sources=("r2",)), settings, dict(os.environ), said.append)
    assert [event.text for event in said if event.level == "warning"] == ["s3://models/p/Tiny/ knows no revisions: what lies there is taken for v1"]
