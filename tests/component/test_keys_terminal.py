"""Keys on a terminal and from root's hand: what is shown, and what the service could have put in the way."""

from __future__ import annotations

import json
import os
import socketserver
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.component.api_keys import vllmctl
from tests.needs import need
from vllmd.config.paths import root_paths
from vllmd.core.keyring import DEFAULT
from vllmd.errors import StorageFailed
from vllmd.instance import keys

pytestmark = pytest.mark.component

NOBODY = 65534


def test_a_key_is_masked_on_a_terminal_unless_asked_for(tmp_path: Path) -> None:
    value = prepared(tmp_path)
    assert on_terminal(tmp_path, "show", "demo").startswith(f"{value[:4]}********")
    assert value not in on_terminal(tmp_path, "show", "demo")
    assert value in on_terminal(tmp_path, "show", "demo", "--reveal")
    assert value not in on_terminal(tmp_path, "list", "demo")
    assert value not in vllmctl(tmp_path, "list", "demo")[1]
    assert vllmctl(tmp_path, "show", "demo")[1] == value


def prepared(root: Path) -> str:
    (root / "etc").mkdir()
    (root / "etc/demo.yaml").write_text("model: /nowhere\n")
    assert vllmctl(root, "show", "demo")[0] == 78, "no key yet"
    code, value, _ = vllmctl(root, "add", "demo", DEFAULT)
    assert code == 0
    return value


def on_terminal(root: Path, *words: str) -> str:
    """What it writes on a terminal."""
    ours, its = os.openpty()
    argv = [str(Path(sys.executable).parent / "vllmctl"), "--root", str(root), "api-key", *words]
    try:
        subprocess.run(argv, stdin=its, stdout=its, stderr=its, timeout=60, check=True)
        return os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(its)


def test_an_instance_that_is_none_gets_no_keys(tmp_path: Path) -> None:
    code, out, said = vllmctl(tmp_path, "add", "nobody", DEFAULT)
    assert (code, out) == (64, "")
    assert "nobody" in said
    assert not (tmp_path / "lib").exists()


def test_nothing_that_the_service_wrote_reaches_the_terminal_of_root_as_it_is(tmp_path: Path) -> None:
    state = tmp_path / "lib/instances/demo"
    state.mkdir(parents=True)
    (state / "keys.json").write_text(json.dumps({"schema": 1, "keys": [{"name": "default", "key": "a" * 22, "made": "\x1b[2J\nx" + "y" * 999}]}))
    status, said, _ = vllmctl(tmp_path, "list", "demo")
    assert (status, "\x1b" in said, len(said.splitlines())) == (0, False, 2)
    runtime = tmp_path / "run/i/demo"
    runtime.mkdir(parents=True)
    with socketserver.UnixStreamServer(str(runtime / "control.sock"), Forger) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        _, _, said = vllmctl(tmp_path, "add", "demo", "web")
        thread.join(10)
    assert "evil" in said
    assert "\x1b" not in said


class Forger(socketserver.StreamRequestHandler):
    """A supervisor whose words are for a terminal."""

    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            length = int(line.partition(b":")[2]) if line.lower().startswith(b"content-length") else length
        self.rfile.read(length)
        body = json.dumps({"error": "\x1b[31mevil"}).encode()
        self.wfile.write(b"HTTP/1.1 409 x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def test_directories_that_root_makes_can_be_looked_into_whatever_its_umask_is(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    (tmp_path / "lib").mkdir()
    os.chown(tmp_path / "lib", NOBODY, NOBODY)
    before = os.umask(0o077)
    try:
        assert vllmctl(tmp_path, "add", "demo", "default")[0] == 64  # no configuration yet
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/demo.yaml").write_text("")
        assert vllmctl(tmp_path, "add", "demo", "default")[0] == 0
    finally:
        os.umask(before)
    for name in ("public", "public/demo"):
        assert stat.S_IMODE((tmp_path / "lib" / name).stat().st_mode) == 0o755


def test_the_plain_credentials_come_back_when_their_link_was_removed(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    keys.ensure(paths, "demo", wanted=True)
    (paths.state / "public/credentials.json").unlink()
    keys.ensure(paths, "demo", wanted=True)
    assert (paths.state / "public/credentials.json").resolve() == paths.state / "public/demo/credentials.json"


def test_a_state_that_was_moved_to_another_disk_has_keys(tmp_path: Path) -> None:
    """/var/lib/vllmd is a link then. No instance started that wanted a key."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "lib").symlink_to(tmp_path / "disk")
    assert keys.ensure(root_paths(tmp_path), "demo", wanted=True).is_new
    assert (tmp_path / "disk/instances/demo/keys.json").exists()


def test_a_link_that_another_user_could_have_put_there_is_not_followed(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    theirs = tmp_path / "theirs"
    (tmp_path / "roots").mkdir()
    theirs.mkdir()
    (theirs / "lib").symlink_to(tmp_path / "roots")
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(StorageFailed):
        keys.ensure(root_paths(theirs), "demo", wanted=True)
    assert not any((tmp_path / "roots").iterdir())
