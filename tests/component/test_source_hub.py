"""The hub source with the real huggingface_hub against a hub of ours: what is found, at which commit, and the token's ways."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.fakes.hub import FakeHub
from vllmd.config.settings import Model
from vllmd.errors import ConfigError, PermissionMissing
from vllmd.models import demo
from vllmd.models.download import Limits, download
from vllmd.models.sources import Context, NotFound, Offered, Skipped
from vllmd.models.sources.hf_cache import HubCache
from vllmd.models.sources.hf_hub import Hub
from vllmd.models.stage import Stage

pytestmark = [pytest.mark.component, pytest.mark.usefixtures("bare_home")]

TOKEN = "hf_good"
FILES = {"config.json": b"{}", "a b+%25#?.txt": b"odd name", "sub/x.json": b"[]", "model.safetensors": bytes(range(256)) * 400}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub({"acme/Tiny": FILES}, token=TOKEN) as made:
        yield made


def find(hub: FakeHub, model_id: str = "acme/Tiny", revision: str = "", **settings: Any) -> Any:
    context = Context(Model(**{"hf_endpoint": hub.url, **settings}), dict(os.environ))
    return Hub().find(tiny_models.request(Path("/nowhere"), model_id, revision=revision), context)


def fetch(offered: Offered, store: Path) -> Path:
    stage = Stage.open(store, "m", offered.listing)
    limits = Limits(connections=2, stall_s=10, attempts=2, back_off_s=0.01)
    download(offered.listing, offered.transport, stage, limits, dict(os.environ), lambda _: None, lambda _: None)
    return stage.files


def test_the_listing_is_pinned_to_the_commit_and_has_the_hubs_sums(hub: FakeHub) -> None:
    offered = find(hub)
    commit, files = hub.commit("acme/Tiny"), {file.name: file for file in offered.listing.files}
    assert (offered.listing.revision, offered.listing.origin) == (commit, f"{hub.url}/acme/Tiny")
    assert files.keys() == FILES.keys()
    weights = files["model.safetensors"]
    sha256 = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert (weights.size, weights.pin, dict(weights.sums)) == (102400, sha256, {"sha256": sha256})
    assert dict(files["config.json"].sums) == {"git-sha1": hashlib.sha1(b"blob 2\0{}").hexdigest()}
    assert files["config.json"].pin == files["config.json"].sums["git-sha1"]


def test_all_bytes_come_and_the_token_stays_at_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    files = fetch(find(hub, hf_token=TOKEN), tmp_path)
    assert {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()} == FILES
    assert hub.tokens_seen("hub") == {f"Bearer {TOKEN}"}
    assert hub.sent_bytes["cdn"] == 102400
    assert hub.tokens_seen("cdn") == set()


def test_a_push_after_the_listing_changes_nothing(hub: FakeHub, tmp_path: Path) -> None:
    offered = find(hub)
    hub.push("acme/Tiny", {"config.json": b"{1}"})
    assert (fetch(offered, tmp_path) / "config.json").read_bytes() == b"{}"
    assert find(hub).listing.revision != offered.listing.revision


def test_an_older_commit_a_branch_with_a_slash_and_a_missing_one(hub: FakeHub) -> None:
    first = hub.commit("acme/Tiny")
    hub.refs["acme/Tiny"]["refs/pr/1"] = first
    hub.push("acme/Tiny", {"config.json": b"{1}"})
    assert find(hub, revision=first).listing.revision == first
    assert find(hub, revision="refs/pr/1").listing.revision == first
    finding = find(hub, revision="v9")
    assert isinstance(finding, NotFound)
    assert "no revision 'v9'" in finding.reason


@pytest.mark.parametrize("model_id", ["Tiny", "", "a/b/c", "../x", "acme/..", "acme/a--b"])
def test_what_is_no_name_of_a_hub_is_asked_of_none(hub: FakeHub, model_id: str) -> None:
    assert isinstance(find(hub, model_id), NotFound)
    assert hub.asked == []


def test_offline_asks_nobody(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(hub, offline=True) == Skipped("offline")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert find(hub) == Skipped(f"{name} is set")
    assert hub.asked == []


def test_the_policy_for_revisions_holds_for_the_hub_and_for_its_caches(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.commit("acme/Tiny")
    for policy, revision in (("any", ""), ("commit", ""), ("commit", "main"), ("commit", commit[:12])):
        with pytest.raises(ConfigError, match="require_revision"):
            find(hub, revision=revision, require_revision=policy)
        cached = Context(Model(require_revision=policy), {})
        with pytest.raises(ConfigError, match="require_revision"):
            HubCache().find(tiny_models.request(tmp_path, revision=revision), cached)
    assert hub.asked == []
    assert isinstance(find(hub, revision="main", require_revision="any"), Offered)
    assert isinstance(find(hub, revision=commit, require_revision="commit"), Offered)


def test_where_the_token_is_looked_for(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "home/.cache/huggingface/token"
    stored.parent.mkdir(parents=True)
    credentials = tmp_path / "credentials"
    credentials.mkdir()

    def sent(**settings: Any) -> str:
        hub.asked.clear()
        hub.token = ""
        with pytest.raises(PermissionMissing) if settings or stored.exists() else contextlib.nullcontext():
            find(hub, **settings)
        return hub.asked[0].authorization

    assert sent() == ""
    stored.write_text("hf_home\n")
    assert sent() == "Bearer hf_home"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    (tmp_path / "h").mkdir()
    (tmp_path / "h/token").write_text("hf_hfhome")
    assert sent() == "Bearer hf_hfhome"
    (tmp_path / "t").symlink_to(stored)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "t"))
    assert sent() == "Bearer hf_home"
    assert sent(hf_token="hf_setting") == "Bearer hf_setting"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert sent(hf_token="hf_setting") == "Bearer hf_setting"
    (credentials / "hf-token").write_text("hf_credential\n")
    assert sent(hf_token="hf_setting") == "Bearer hf_credential"


def test_a_token_that_no_header_takes_is_refused_unseen(hub: FakeHub) -> None:
    for bad in ("hf_secret\nHost: evil", "hf_secret two", "hf_sécret", "hf_secret" * 1000):
        with pytest.raises(ConfigError) as caught:
            find(hub, hf_token=bad)
        assert "cret" not in caught.value.what + caught.value.hint
    assert hub.asked == []


def test_the_real_client_downloads_from_this_hub(tmp_path: Path) -> None:
    model = demo.make(tmp_path / "model")
    code = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download('acme/Tiny', endpoint=sys.argv[1], local_dir=sys.argv[2], token='hf_good'))"
    with FakeHub({"acme/Tiny": model}) as hub:
        env = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        subprocess.run([sys.executable, "-c", code, hub.url, str(tmp_path / "out")], env=env, check=True, timeout=60, capture_output=True)
        assert hub.sent_bytes["cdn"] > 0
    for path in model.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_nothing_is_written_to_home_and_no_telemetry_is_sent(hub: FakeHub, tmp_path: Path) -> None:
    code = (
        "import os; from tests import tiny_models; from pathlib import Path; from vllmd.config.settings import Model\n"
        "from vllmd.models.sources import Context; from vllmd.models.sources.hf_hub import Hub; import sys\n"
        "print(Hub().find(tiny_models.request(Path('/nowhere')), Context(Model(hf_endpoint=sys.argv[1]), dict(os.environ))).listing.revision)"
    )
    done = subprocess.run([sys.executable, "-c", code, hub.url], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == hub.commit("acme/Tiny")
    assert done.stderr == ""
    assert list((tmp_path / "home").iterdir()) == []
    assert [asked.path for asked in hub.asked] == ["/api/models/acme/Tiny/revision/main"]
