"""Models that are fetched by the real unit: in its sandbox, as its user, with secrets from systemd, within systemd's timeouts."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.component.hostile import Bucket
from tests.component.test_source_s3_tls import certificate
from tests.fakes.hub import Asked, FakeHub, Reply
from tests.fakes.s3_server import S3Server
from tests.system.container import wait_for
from tests.system.host import Host
from tests.system.network import network_of
from vllmd.models import demo
from vllmd.models.identity import hash12
from vllmd.system.messages import message_id

pytestmark = pytest.mark.system

__all__ = ["certificate"]

ID = "acme/Tiny"
LABEL = f"acme-Tiny.{hash12(ID)}"
STORE = "/var/lib/vllmd/models"
TOKEN = "hf_neverShowThisToken0123456789"
S3_SECRET = "neverShowThisSecretKey0123456789abcdef+/"
FETCHED = f"{STORE}/.published {STORE}/.staging {STORE}/.locks {STORE}/{LABEL}"
LARGE = 100_000
"""Bytes of a reply, from which on it is one of the two shards."""
SHARD = "model-00002-of-00002.safetensors"
EXPECTED = ("its flags are not known", "the GPU check is skipped")
"""Warnings about a fake engine on a host without GPUs."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.make(tmp_path_factory.mktemp("fetch") / "source")


@pytest.fixture
def hub(host: Host, source: Path) -> Iterator[FakeHub]:
    """In the container's network. What a test fetched and its secrets are removed."""
    with network_of(host.container):
        hub = FakeHub({ID: source}, token=TOKEN)
    try:
        with hub:
            yield hub
            host.shell("systemctl stop 'vllmd@*.service'")
    finally:
        host.shell(f"rm -rf {FETCHED} /etc/credstore/vllmd.*")


def fetching(hub: FakeHub, **more: Any) -> dict[str, Any]:
    return {"id": ID, "sources": ["local", "hf-hub"], "hf_endpoint": hub.url, "source_retry_s": 0.3, **more}


def begin(host: Host, name: str) -> None:
    """`systemctl start`, for somebody who does not wait."""
    host.run("systemctl", "start", "--no-block", f"vllmd@{name}")


def trickling(hub: FakeHub, released: threading.Event) -> Callable[[Asked], Reply | None]:
    """Shards come at about 20 kB/s until they are released."""

    def parts(body: bytes) -> Iterator[bytes]:
        for at in range(0, len(body), 1024):
            if not released.is_set():
                released.wait(0.05)
            yield body[at : at + 1024]

    return _bodies(hub, parts)


def stalling(hub: FakeHub) -> Callable[[Asked], Reply | None]:
    """The second shard comes up to its half, and no further."""
    second = len(hub.models[ID][SHARD])
    return _bodies(hub, lambda body: hub.stalled(body[: second // 2]) if len(body) == second else iter([body]))


def _bodies(hub: FakeHub, parts: Callable[[bytes], Iterator[bytes]]) -> Callable[[Asked], Reply | None]:
    def script(asked: Asked) -> Reply | None:
        if asked.server != "cdn" or asked.method != "GET":
            return None
        whole = hub._cdn_file(asked)
        if not isinstance(whole.body, bytes) or len(whole.body) < LARGE:
            return None
        return Reply(whole.status, parts(whole.body), {**whole.headers, "Content-Length": str(len(whole.body))})

    return script


def owners(host: Host) -> set[str]:
    return set(host.shell(f"find {FETCHED} -printf '%u:%g\\n'").out.split())


def messages(host: Host, name: str, event: str) -> list[str]:
    return [entry["MESSAGE"] for entry in host.entries(name) if entry.get("MESSAGE_ID") == message_id(event)]


def downloading(host: Host, name: str) -> str:
    """STATUS= as soon as it tells of bytes and their rate."""
    wanted = re.compile(r"Downloading the model \d+%, [\d.]+ \w+ of [\d.]+ \w+, [\d.]+ \w+/s")

    def look() -> str:
        found = wanted.search(status_text(host, name))
        return found[0] if found else ""

    return wait_for(look, 30, "STATUS= of a download")


def status_text(host: Host, name: str) -> str:
    """STATUS=; '' before there is any."""
    return host.unit(name).values.get("StatusText", "")


def test_download_is_shown_while_systemctl_waits_and_the_next_start_asks_nobody(host: Host, hub: FakeHub) -> None:
    released = threading.Event()
    hub.script = trickling(hub, released)
    name = host.instance("fetches", model=fetching(hub))
    try:
        began = host.shell("date +%s").out.strip()
        begin(host, name)
        assert downloading(host, name)
        assert host.unit(name)["SubState"] == "start", "READY only when the model serves"
    finally:
        released.set()
    host.wait_unit(name, 30, ActiveState="active", NRestarts="0")
    assert host.health(name) == 200
    first, *_, last = messages(host, name, "model-progress")
    assert first.startswith(f"{ID} will be downloaded: ")
    assert last.startswith("fetched ")
    assert owners(host) == {"vllmd:vllmd"}
    asked = len(hub.asked)
    host.stop(name)
    host.start(name)
    assert len(hub.asked) == asked
    complaints = host.run("journalctl", "-o", "cat", "-p", "warning", f"--since=@{began}", "-u", f"vllmd@{name}").out.splitlines()
    assert [line for line in complaints if not any(known in line for known in EXPECTED)] == [], "nothing misses HOME, or writes where it may not"


def test_gated_model_comes_with_the_credential_and_the_token_is_shown_nowhere(host: Host, hub: FakeHub) -> None:
    hub.gated.add(ID)
    name = host.instance("gated", model=fetching(hub))
    assert host.start(name, check=False).status != 0
    assert host.unit(name).status == ("exit-code", 77)
    assert host.unit(name)["SubState"] == "failed", "a person must act first"
    for said in (host.run("systemctl", "status", f"vllmd@{name}", check=False).out, host.run("vllmctl", "status", name, check=False).out):
        assert f"{hub.url}/{ID}" in said, "the page of the licence"
        assert "/etc/credstore/vllmd.hf-token" in said
    host.container.write("/etc/credstore/vllmd.hf-token", f"{TOKEN}\n", 0o600)
    released = threading.Event()
    hub.script = trickling(hub, released)
    try:
        begin(host, name)
        downloading(host, name)
        assert_shown_nowhere(host, name, TOKEN)
    finally:
        released.set()
    host.wait_unit(name, 30, ActiveState="active")
    assert hub.tokens_seen("hub") == {f"Bearer {TOKEN}"}
    assert hub.tokens_seen("cdn") == set()
    assert host.engine(name)
    assert_shown_nowhere(host, name, TOKEN)


def assert_shown_nowhere(host: Host, name: str, secret: str) -> None:
    """Not in what processes of the service were given, nor in the journal, nor in any file of ours, logs of fetches among them."""
    assert host.container.processes("vllmd")
    for pid in host.container.processes("vllmd"):
        for file in ("cmdline", "environ"):
            assert secret.encode() not in host.container.path(f"/proc/{pid}/{file}").read_bytes()
    assert secret not in host.run("journalctl", "-o", "export", "--all").out
    assert secret not in host.run("systemctl", "show", f"vllmd@{name}").out
    # /run/credentials is where systemd puts it for the service, and nobody else can read it.
    assert host.shell(f"grep -rlF '{secret}' /run/vllmd /var/lib/vllmd /var/cache/vllmd /tmp /var/tmp || :").out == ""


def test_bucket_is_read_with_the_credential(host: Host, hub: FakeHub, source: Path) -> None:
    bucket = Bucket()
    bucket.set({path.name: path.read_bytes() for path in source.iterdir()})
    host.container.write("/etc/credstore/vllmd.s3-credentials", f"[default]\naws_access_key_id = AKIATESTING\naws_secret_access_key = {S3_SECRET}\n", 0o600)
    with network_of(host.container):
        server = S3Server(bucket)
    with server:
        model = {"id": ID, "sources": ["r2"], "r2_bucket": "models", "r2_models_prefix": "p", "r2_endpoint_url": server.url}
        name = host.instance("bucket", model=model)
        host.start(name)
        assert host.health(name) == 200
        assert {asked.access_key for asked in server.asked} == {"AKIATESTING"}
        assert_shown_nowhere(host, name, S3_SECRET)


def test_stop_ends_a_download_that_stands_still_and_the_next_start_goes_on(host: Host, hub: FakeHub) -> None:
    hub.script = stalling(hub)
    name = host.instance("stalled", model=fetching(hub))
    first, half = (len(hub.models[ID][file]) for file in ("model-00001-of-00002.safetensors", SHARD))
    half //= 2
    begin(host, name)
    wait_for(lambda: hub.sent_bytes["cdn"] >= first + half, 30, "one shard and a half are sent")
    wait_for(lambda: fetched_bytes(host, name) >= first + half - 1024, 20, "they are counted")
    began = time.monotonic()
    host.stop(name)
    assert time.monotonic() - began < 3
    assert host.container.processes("vllmd") == {}
    hub.script = lambda asked: None
    sent = hub.sent_bytes["cdn"]
    host.start(name)
    assert hub.sent_bytes["cdn"] - sent <= 2 * half, "the shard that was whole is not fetched again"


def fetched_bytes(host: Host, name: str) -> int:
    return int(host.state(name)["progress"]["done_bytes"])


def test_outage_is_waited_for_far_beyond_the_timeout_of_the_unit(host: Host, hub: FakeHub) -> None:
    _outlast(host, hub, seconds=8)


@pytest.mark.soak
def test_outage_is_waited_for_beyond_what_its_first_word_to_systemd_allowed(host: Host, hub: FakeHub) -> None:
    """Without a word during the wait, systemd would end the start after 75 s."""
    _outlast(host, hub, seconds=90, lock_timeout_s=0)


def _outlast(host: Host, hub: FakeHub, *, seconds: float, **model: Any) -> None:
    down = threading.Event()
    down.set()
    hub.script = lambda asked: Reply(503, b"down") if down.is_set() else None
    name = host.instance("waits", model=fetching(hub, **model), dropin="TimeoutStartSec=3")
    begin(host, name)
    began = time.monotonic()
    activation = wait_for(lambda: host.unit(name)["InvocationID"], 10, "an activation")
    wait_for(lambda: "asking again in" in status_text(host, name), 20, "STATUS= says that it asks again")
    wait_for(lambda: time.monotonic() - began >= seconds, seconds + 1, "the timeout of the unit has passed", 0.5)
    assert host.unit(name)["SubState"] == "start", host.log(name)
    down.clear()
    unit = host.wait_unit(name, 30 + 2 * seconds, ActiveState="active")  # pauses have grown as long as the outage was
    assert (unit["NRestarts"], unit["InvocationID"]) == ("0", activation)


def test_vllmctl_shows_the_download_and_keeps_what_is_served(host: Host, hub: FakeHub) -> None:
    released, asked_for = threading.Event(), threading.Event()
    trickle = trickling(hub, released)

    def script(asked: Asked) -> Reply | None:
        reply = trickle(asked)
        if reply is not None:
            asked_for.set()
        return reply

    def release() -> None:
        """Some seconds after the first bytes, however long the machine took until then: the progress is looked at meanwhile."""
        asked_for.wait(60)
        released.wait(5)
        released.set()

    hub.script = script
    name = host.instance("chosen", model=fetching(hub))
    releasing = threading.Thread(target=release)
    releasing.start()
    try:
        done = host.run("vllmctl", "start", name)
    finally:
        asked_for.set()
        released.set()
        releasing.join()
    assert re.search(rf"^{name}: fetch \d+% [\d.]+ \w+ of [\d.]+ \w+", done.err, re.MULTILINE), done.err
    assert [item["used_by"] for item in listed(host) if item["identity"] == ID] == [[name]]
    refused = host.run("vllmctl", "store", "rm", "--yes", ID, check=False)
    assert refused.status == 75
    assert name in refused.err
    host.stop(name)
    host.run("vllmctl", "store", "rm", "--yes", "--force", ID)  # other tests' generations may go back to it
    assert [item for item in listed(host) if item["identity"] == ID] == []


def listed(host: Host) -> list[dict[str, Any]]:
    items = json.loads(host.run("vllmctl", "store", "list", "--json").out)["items"]
    assert isinstance(items, list)
    return items


def test_model_that_root_imports_is_the_service_s_own(host: Host, hub: FakeHub, tmp_path: Path) -> None:
    """Served without a network, and removed by the service itself when newer ones come."""
    name = host.instance("moved", model=fetching(hub))
    host.start(name)
    host.stop(name)
    try:
        host.run("vllmctl", "store", "export", ID, "-o", "/root/tiny.tar")
        host.run("vllmctl", "store", "rm", "--yes", "--force", ID)  # other tests' generations may go back to it
        host.run("vllmctl", "store", "import", "/root/tiny.tar")
    finally:
        host.shell("rm -f /root/tiny.tar")
    assert owners(host) == {"vllmd:vllmd"}
    imported = host.run("readlink", "-f", f"{STORE}/{LABEL}").out.strip()
    asked = len(hub.asked)
    host.start(name)
    assert len(hub.asked) == asked
    host.stop(name)
    host.shell(f"rm -rf {STORE}/.kept")  # of other tests' instances, which could go back to the same version
    for seed in (8, 9):  # the two newest generations keep theirs
        hub.push(ID, demo.make(tmp_path / f"newer-{seed}", seed=seed))
        host.instance(name, model=fetching(hub, sources=["hf-hub"], keep=1))
        host.start(name)
        host.stop(name)
    assert host.run("readlink", "-f", f"{STORE}/{LABEL}").out.strip() != imported
    assert host.run("test", "-e", imported, check=False).status == 1, host.log(name)


def test_full_disk_is_said_with_both_sizes_and_tried_again(host: Host, hub: FakeHub) -> None:
    small = "/srv/small"
    host.shell(f"mkdir -p {small} && mount -t tmpfs -o size=16m tmpfs {small} && chown vllmd: {small}")
    try:
        name = host.instance("full", model=fetching(hub, dir=small), dropin=f"ReadWritePaths={small}\nRestartSec=600")
        assert host.start(name, check=False).status != 0
        unit = host.unit(name)
        assert unit.status == ("exit-code", 74), host.log(name)
        assert unit["SubState"] == "auto-restart"
        assert re.search(r"[\d.]+ kB are to be fetched, [\d.]+ MB are free", host.state(name, "last")["error"]["what"])
        assert hub.sent_bytes["cdn"] == 0
        host.stop(name)
    finally:
        host.shell(f"umount {small}; rmdir {small}")


def test_host_without_certificate_authorities_is_told_the_package(host: Host, hub: FakeHub, source: Path, certificate: Path) -> None:
    """A minimal system may have none, and the library's own words lead nowhere."""
    with network_of(host.container):
        secure = FakeHub({ID: source}, certificate=certificate)
    with secure:
        name = host.instance("secure", model=fetching(secure), dropin="TemporaryFileSystem=/etc/ssl:ro")
        begin(host, name)
        said = wait_for(lambda: "asking again" in status_text(host, name) and status_text(host, name), 30, "STATUS= of one who waits")
        assert isinstance(said, str)
        assert "is not trusted" in said
        assert "ca-certificates" in said
        assert secure.asked == []
        host.stop(name)
