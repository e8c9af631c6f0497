"""`vllmd run` with a model that is fetched: from a hub that behaves, that fails for a while, that never ends, that lies."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import procs
from tests.fakes.hub import Asked, FakeHub, Reply
from tests.harness import Config, Instance, merged
from vllmd.models import demo
from vllmd.models.identity import hash12

pytestmark = pytest.mark.component

ID = "acme/Tiny"
LABEL = f"acme-Tiny.{hash12(ID)}"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub({ID: demo.make(tmp_path / "source")}) as hub:
        yield hub


def fetching(hub: FakeHub, **model: Any) -> Config:
    return {"model": {"path": "", "id": ID, "sources": ["local", "hf-hub"], "hf_endpoint": hub.url, "source_retry_s": 0.3, **model}}


def served(instance: Instance) -> Path:
    """What the link leads to."""
    return (instance.root / "lib/models" / LABEL).resolve(strict=True)


def progress_of(instance: Instance) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(instance.status_json()["progress"])
    return {}


def stalling(hub: FakeHub, after_bytes: int) -> Any:
    """The script of a hub whose second shard never ends; `.sent` is set when a client waits for the rest."""
    content = (hub.models[ID])[SHARD]

    def script(asked: Asked) -> Reply | None:
        if asked.server != "cdn" or asked.method != "GET":
            return None
        whole = hub._cdn_file(asked)
        body = whole.body if isinstance(whole.body, bytes) else b"".join(whole.body)
        if len(body) != len(content):
            return None
        script.sent.set()  # type: ignore[attr-defined]
        headers = {**whole.headers, "Content-Length": str(len(body))}
        return Reply(whole.status, hub.stalled(body[:after_bytes]), headers)

    script.sent = threading.Event()  # type: ignore[attr-defined]
    return script


def test_model_is_fetched_published_and_served_and_the_next_start_asks_nobody(hub: FakeHub) -> None:
    with Instance(config=fetching(hub)) as instance:
        instance.wait_ready()
        said = instance.log()
        assert f"{ID} will be downloaded: " in said
        assert f"published {served(instance)}" in said
        assert instance.status()["model"]["via"] == "hf-hub"
        assert str(served(instance)) in instance.engine_process("main").cmdline
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        asked = len(hub.asked)
        instance.start().wait_ready()
        assert instance.status()["model"]["via"] == "local"
        assert len(hub.asked) == asked


def test_what_is_newer_at_the_source_is_served_after_the_next_start(hub: FakeHub, tmp_path: Path) -> None:
    with Instance(config=fetching(hub, sources=["hf-hub", "local"])) as instance:
        instance.wait_ready()
        first = served(instance)
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        asked = len(hub.asked)
        instance.start().wait_ready()
        assert served(instance) == first
        assert len(hub.asked) == asked + 1, "one listing, and nothing else"
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        hub.push(ID, demo.make(tmp_path / "newer", seed=8))
        instance.start().wait_ready()
        assert served(instance) != first
        assert first.is_dir(), "the version before is kept"
        shared = [name for name in ("tokenizer.json", "config.json") if (first / name).samefile(served(instance) / name)]
        assert shared == ["tokenizer.json", "config.json"]


def test_outage_is_waited_for_within_one_start(hub: FakeHub) -> None:
    down = threading.Event()
    down.set()
    hub.script = lambda asked: Reply(503, b"down") if down.is_set() else None
    with Instance(config=fetching(hub)) as instance:
        procs.wait_until("it says that it asks again", lambda: "asking again in" in instance.log(), 20)
        assert instance.status()["state"] == "resolving"
        assert "asking again in" in instance.status()["progress"]["text"]
        down.clear()
        instance.wait_ready()


def test_outage_that_lasts_is_no_model(hub: FakeHub) -> None:
    hub.script = lambda asked: Reply(503, b"down")
    with Instance(config=fetching(hub, source_timeout_s=1)) as instance:
        assert instance.wait_exit() == 66
        assert "hf-hub" in instance.last_json()["error"]["what"]


def test_stop_ends_a_download_at_once_and_the_next_start_goes_on_where_it_was(hub: FakeHub) -> None:
    size = len(hub.models[ID][SHARD])
    hub.script = stalling(hub, size // 2)
    with Instance(config=fetching(hub)) as instance:
        assert hub.script.sent.wait(20)  # type: ignore[attr-defined]
        procs.wait_until("bytes are counted", lambda: progress_of(instance).get("done_bytes"), 20)
        progress = progress_of(instance)
        assert progress["total_bytes"] > progress["done_bytes"] > 0
        assert 0 < progress["fraction"] < 1
        status, metrics = instance.control("/metrics")
        assert status == 200
        assert 'vllmd_transfer_done_bytes{name="demo",phase="fetch"}' in metrics
        assert "Downloading the model" in "".join(message.get("STATUS") for message in instance.notify.messages)
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit(5) == 0
        hub.script = lambda asked: None
        sent = dict(hub.sent_bytes)
        instance.start().wait_ready()
        assert served(instance).is_dir()
        again = hub.sent_bytes["cdn"] - sent["cdn"]
        assert again <= size, "the shard that was whole is not fetched again"


def test_download_ends_with_its_daemon(hub: FakeHub) -> None:
    hub.script = stalling(hub, 1000)
    with Instance(config=fetching(hub)) as instance:
        assert hub.script.sent.wait(20)  # type: ignore[attr-defined]
        children = [process for process in instance._marked() if "vllmd.models.fetch" in process.cmdline]
        assert children
        instance.signal(signal.SIGKILL)
        instance.wait_exit()
        procs.wait_until("the child is gone", lambda: not any(procs.is_alive(child.pid) for child in children), 10)


@pytest.mark.parametrize(
    ("reply", "status", "text"),
    [
        (Reply(401, b'{"error":"Invalid credentials"}', {"X-Error-Message": "Invalid credentials in Authorization header"}), 66, "hf-hub"),
        (Reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}), 66, "hf-hub"),
        (Reply(200, b"<html>sign in</html>", {"Content-Type": "text/html"}), 66, "hf-hub"),
    ],
)
def test_refusal_leaves_the_model_before_it_in_service(hub: FakeHub, reply: Reply, status: int, text: str) -> None:
    """With the hub first in order, the published model is what is served when the hub refuses."""
    with Instance(config=fetching(hub, sources=["hf-hub", "local"], source_timeout_s=0)) as instance:
        instance.wait_ready()
        before = served(instance)
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        hub.script = lambda asked: reply
        instance.start().wait_ready()
        assert instance.status()["model"]["via"] == "local"
        assert served(instance) == before
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        instance.config = merged(instance.config, {"model": {"sources": ["hf-hub"]}})
        instance.write_config()
        instance.start()
        assert instance.wait_exit() == status
        assert text in instance.last_json()["error"]["what"]
        assert served(instance) == before


def test_wrong_bytes_are_never_published_and_what_was_is_served(hub: FakeHub, tmp_path: Path) -> None:
    with Instance(config=fetching(hub, sources=["hf-hub", "local"])) as instance:
        instance.wait_ready()
        before = served(instance)
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        hub.push(ID, demo.make(tmp_path / "newer", seed=9))

        def flipped(asked: Asked) -> Reply | None:
            if asked.server != "cdn" or asked.method != "GET":
                return None
            whole = hub._cdn_file(asked)
            assert isinstance(whole.body, bytes)
            return Reply(whole.status, whole.body[:-1] + bytes([whole.body[-1] ^ 1]), whole.headers)

        hub.script = flipped
        instance.start().wait_ready()
        assert served(instance) == before
        assert instance.status()["model"]["via"] == "local"
        assert list((instance.root / "lib/models/.staging").glob("*.log")), "the log of the fetch is kept"


def test_two_instances_of_one_model_fetch_it_once(hub: FakeHub) -> None:
    with Instance("one", config=fetching(hub)) as one, Instance("two", config=fetching(hub), root=one.root) as two:
        one.wait_ready()
        two.wait_ready()
        assert hub.sent_bytes["cdn"] == sum(len(content) for name, content in hub.models[ID].items() if name.endswith(".safetensors"))
        assert one.status()["model"]["directory"] == two.status()["model"]["directory"]


def test_flipped_byte_ends_the_start_and_the_next_one_fetches_the_file_anew(hub: FakeHub) -> None:
    with Instance(config=fetching(hub, verify="sha256")) as instance:
        instance.wait_ready()
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        shard = served(instance) / SHARD
        good = shard.read_bytes()
        shard.chmod(0o644)
        with shard.open("r+b") as file:
            file.seek(-1, 2)
            file.write(bytes([good[-1] ^ 1]))
        instance.start()
        assert instance.wait_exit() == 65
        assert SHARD in instance.last_json()["error"]["what"]
        sent = hub.sent_bytes["cdn"]
        instance.start().wait_ready()
        assert (served(instance) / SHARD).read_bytes() == good
        assert hub.sent_bytes["cdn"] - sent == len(good), "only the damaged file"
