"""Xet by the real client, against stores that hang or fail: everything comes by plain HTTP all the same."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.fakes.hub import Asked, FakeHub, Reply
from vllmd.config.settings import Model
from vllmd.models.download import Limits, download
from vllmd.models.progress import Progress
from vllmd.models.sources import Context, Offered, hub_xet
from vllmd.models.sources.hf_hub import Hub
from vllmd.models.stage import Stage

pytestmark = pytest.mark.component

TOKEN = "hf_good"
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4000}


@pytest.fixture(autouse=True)
def environ(bare_home: Path) -> Path:
    if importlib.util.find_spec("hf_xet") is None:  # importing it here would leave its log file open
        pytest.skip("hf_xet is not installed")
    return bare_home


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub({"acme/Tiny": FILES}, token=TOKEN) as made:
        made.xet_url = made.cdn_url
        yield made


class Fetch:
    def __init__(self, hub: FakeHub, store: Path, stall_s: float = 30, *, is_on: bool = True) -> None:
        self.settings = Model(hf_endpoint=hub.url, hf_token=TOKEN, hf_xet=is_on, fetch_stall_s=stall_s)
        offered = Hub().find(tiny_models.request(store), Context(self.settings, dict(os.environ)))
        assert isinstance(offered, Offered)
        self.offered, self.stage = offered, Stage.open(store, "m", offered.listing)
        self.said: list[Progress] = []
        self.log: list[str] = []

    def xet(self) -> str:
        hub_xet.prefetch(self.offered.listing, self.offered.transport, self.stage, self.settings, dict(os.environ), self.said.append, self.log.append)
        return " ".join(progress.text for progress in self.said if progress.level)

    def plain(self) -> None:
        limits = Limits(connections=2, stall_s=10, attempts=2, back_off_s=0.01)
        download(self.offered.listing, self.offered.transport, self.stage, limits, dict(os.environ), self.said.append, self.log.append)
        for name, content in FILES.items():
            assert (self.stage.files / name).read_bytes() == content


def test_a_store_that_hangs_is_given_up_and_plain_http_brings_it(hub: FakeHub, tmp_path: Path) -> None:
    hub.script = lambda asked: Reply(200, hub.stalled()) if asked.server == "cdn" and "X-Amz-" not in asked.target else None
    fetch = Fetch(hub, tmp_path, stall_s=6)
    began = time.monotonic()
    assert "stands still for 6 s" in fetch.xet()
    assert time.monotonic() - began < 30
    cas = [asked for asked in hub.asked if asked.server == "cdn"]
    assert cas  # the real client was there, with the store's key and not with the token
    assert {asked.authorization for asked in cas} <= {"Bearer xet_key", ""}
    fetch.plain()
    assert not (fetch.stage.directory / "xet").exists()
    assert list((tmp_path / "home").iterdir()) == []


def test_a_store_that_fails_is_told_and_plain_http_brings_it(hub: FakeHub, tmp_path: Path) -> None:
    hub.script = lambda asked: Reply(403, b"no") if asked.server == "cdn" and "X-Amz-" not in asked.target else None
    fetch = Fetch(hub, tmp_path)
    said = fetch.xet()
    assert "going on by plain HTTP" in said
    assert TOKEN not in said
    fetch.plain()


def test_a_key_from_another_host_is_not_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    def elsewhere(asked: Asked) -> Reply | None:
        if asked.method != "HEAD":
            return None
        link = f'<{hub.cdn_url}/api/models/acme/Tiny/xet-read-token/x>; rel="xet-auth"'
        return Reply(200, b"", {"X-Xet-Hash": "a" * 64, "Link": link, "ETag": '"x"', "X-Repo-Commit": "a" * 40})

    hub.script = elsewhere
    assert Fetch(hub, tmp_path).xet() == ""
    assert hub.tokens_seen("cdn") == set()


def test_what_the_child_brings_is_hashed_and_wrong_bytes_are_fetched_anew(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = FILES["model.safetensors"]
    for brought in (content, b"x" * len(content)):
        store = tmp_path / brought[:1].hex()
        store.mkdir()
        (tmp_path / "brought").write_bytes(brought)
        code = (
            "import json, shutil, sys\n"
            "for file in json.loads(sys.stdin.readline())['files']:\n"
            f"    shutil.copy({str(tmp_path / 'brought')!r}, file['path']); print(json.dumps({{'done': file['name']}}))\n"
        )
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\nexec /usr/bin/env python3 -c \"$(cat {tmp_path / 'code'})\"\n")
        (tmp_path / "code").write_text(code)
        script.chmod(0o755)
        fetch = Fetch(hub, store)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(script))
            assert fetch.xet() == ""
        hub.sent_bytes["cdn"] = 0
        fetch.plain()
        assert hub.sent_bytes["cdn"] == (0 if brought == content else len(content))


def test_switched_off_it_starts_nothing(hub: FakeHub, tmp_path: Path) -> None:
    fetch = Fetch(hub, tmp_path, is_on=False)
    assert fetch.xet() == ""
    assert [asked.method for asked in hub.asked] == ["GET"]
