"""Keys on the disk and over the life of an instance: made, lost, changed by root below a directory of somebody else's."""

from __future__ import annotations

import json
import os
import signal
import socketserver
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.component.daemons import quick, stop
from tests.needs import need
from tests.procs import wait_until
from vllmd.config.paths import Paths, root_paths
from vllmd.core.keyring import DEFAULT, Ring, add, document
from vllmd.errors import ConfigError, StorageFailed, VllmdError
from vllmd.instance import keys
from vllmd.system.folder import Folder

pytestmark = pytest.mark.component

BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}
NOBODY = 65534


def vllmctl(root: Path, *words: str) -> tuple[int, str, str]:
    argv = [str(Path(sys.executable).parent / "vllmctl"), "--root", str(root), "api-key", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def public(root: Path, name: str = "demo") -> str:
    return str(json.loads((root / "lib/public" / name / "credentials.json").read_text())["apiKey"])


# The life of an instance


def test_the_first_start_makes_a_key_and_the_next_ones_keep_it() -> None:
    with quick() as instance:
        instance.wait_ready()
        key = instance.key()
        assert len(key) == 22
        assert [instance.ask("/v1/completions", BODY, key=each)[0] for each in ("", key)] == [401, 200]
        assert [instance.ask("/tokenize", {"prompt": "x"}, key=each)[0] for each in ("", key)] == [401, 200]
        assert instance.log().count("there was none: one was made") == 1
        assert stat.S_IMODE((instance.state / "keys.json").stat().st_mode) == 0o600
        path = instance.root / "lib/public/demo/credentials.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert json.loads(path.read_text()) == {"apiKey": key}
        assert (instance.root / "lib/public/credentials.json").resolve() == path
        stop(instance)
        assert key not in instance.log()
        instance.start()
        instance.wait_state("ready")
        assert instance.key() == key
        stop(instance)
        (instance.state / "keys.json").unlink()
        instance.start()
        instance.wait_state("ready")
        assert instance.key() != key
        assert instance.ask("/v1/completions", BODY, key=key)[0] == 401
        stop(instance)


def test_credentials_that_were_lost_or_led_elsewhere_are_written_again(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    made = keys.ensure(paths, "demo", wanted=True)
    file, elsewhere = paths.state / "public/demo/credentials.json", tmp_path / "elsewhere"

    def lead_elsewhere() -> None:
        file.unlink()
        file.symlink_to(elsewhere)

    for spoil in (file.unlink, lambda: file.chmod(0o644), lambda: file.write_text("{}"), lead_elsewhere):
        spoil()
        assert keys.ensure(paths, "demo", wanted=True).ring == made.ring
        assert public(tmp_path) == made.ring.values[0]
        assert stat.S_IMODE(file.lstat().st_mode) == 0o640
        assert not elsewhere.exists()


def test_a_change_is_in_force_when_the_command_returns() -> None:
    with quick() as instance:
        instance.wait_ready()
        old = instance.key()
        code, new, said = vllmctl(instance.root, "rotate", "demo")
        assert (code, public(instance.root)) == (0, new)
        assert "It is in force" in said
        assert new not in said
        assert [instance.ask("/v1/completions", BODY, key=key)[0] for key in (old, new)] == [200, 200]
        assert vllmctl(instance.root, "revoke", "demo", "default.old")[0] == 0
        assert [instance.ask("/v1/completions", BODY, key=key)[0] for key in (old, new)] == [401, 200]
        assert vllmctl(instance.root, "revoke", "demo", DEFAULT)[0] == 64
        code, web, _ = vllmctl(instance.root, "add", "demo", "web")
        assert instance.ask("/v1/completions", BODY, key=web)[0] == 200
        assert public(instance.root) == new
        assert "vllmd_api_keys{name=\"demo\"} 2.0" in instance.control("/metrics")[1]
        assert "API keys in force: default, web" in instance.log()
        stop(instance)
        assert not {old, new, web} & set(instance.log().split())


def test_a_change_while_nothing_runs_holds_from_the_next_start(tmp_path: Path) -> None:
    with quick() as instance:
        instance.wait_ready()
        stop(instance)
        code, new, said = vllmctl(instance.root, "rotate", "demo", "--overlap", "0")
        assert (code, "next start" in said) == (0, True)
        instance.start()
        instance.wait_state("ready")
        assert instance.ask("/v1/completions", BODY, key=new)[0] == 200
        stop(instance)


def test_an_overlap_ends_by_itself() -> None:
    with quick() as instance:
        instance.wait_ready()
        old = instance.key()
        assert vllmctl(instance.root, "rotate", "demo", "--overlap", "1s")[0] == 0
        wait_until("the old key is refused", lambda: instance.ask("/v1/completions", BODY, key=old)[0] == 401)
        assert instance.ask("/v1/completions", BODY)[0] == 200
        assert "ended" in vllmctl(instance.root, "list", "demo")[1]
        assert vllmctl(instance.root, "show", "demo", "default.old")[0] == 78
        stop(instance)


def test_a_file_that_is_broken_changes_nothing_while_it_runs_and_ends_the_next_start() -> None:
    with quick() as instance:
        instance.wait_ready()
        key, file = instance.key(), instance.state / "keys.json"
        file.write_text('{"schema": 1, "keys": [{"name": "default", "key": "secret-in-a-broken-file"')
        instance.signal(signal.SIGHUP)
        wait_until("it is said", lambda: "the keys stay as they were" in instance.log())
        assert instance.ask("/v1/completions", BODY, key=key)[0] == 200
        code, _, said = vllmctl(instance.root, "rotate", "demo")
        assert code == 78
        assert str(file) in said
        instance.signal(signal.SIGTERM)
        instance.wait_exit()
        instance.start()
        assert instance.wait_exit() == 78
        error = instance.last_json()["error"]
        assert error["code"] == "keys_invalid"
        assert "rm " in error["hint"]
        assert "secret-in-a-broken-file" not in instance.log() + json.dumps(error) + said


def test_open_paths_and_keys_apply_on_reload() -> None:
    with quick() as instance:
        instance.wait_ready()
        assert [instance.ask(path, key="")[0] for path in ("/health", "/version")] == [200, 401]
        instance.config["serve"]["open_paths"] = ["/version"]
        instance.write_config()
        instance.signal(signal.SIGHUP)
        wait_until("the open path", lambda: instance.ask("/version", key="")[0] == 200)
        assert [instance.ask(path, key="")[0] for path in ("/health", "/metrics")] == [401, 401]
        assert instance.status()["needs_restart"] == []
        scraped = 'vllmd_engine_scrape_outcome{name="demo",outcome="ok"} 1.0'
        wait_until("the heartbeat goes on, with the key of ours", lambda: scraped in instance.control("/metrics")[1])
        assert "heartbeat" not in "".join(line for line in instance.log().splitlines() if "WARN" in line)
        stop(instance)


def test_without_an_open_path_the_engine_is_started_and_watched_all_the_same() -> None:
    with quick(config={"serve": {"open_paths": []}, "watch": {"canary_interval_s": 0.3}}) as instance:
        instance.wait_ready()
        assert [instance.ask(path, key="")[0] for path in ("/health", "/metrics", "/v1/models")] == [401] * 3
        wait_until("a proof of life while idle", lambda: 'vllmd_canaries_total{name="demo",outcome="ok"} 0.0' not in instance.control("/metrics")[1])
        assert 'vllmd_canaries_total{name="demo",outcome="refused"} 0.0' in instance.control("/metrics")[1]
        stop(instance)


def test_auth_none_makes_no_key_and_asks_for_none() -> None:
    with quick(config={"serve": {"auth": "none"}}) as instance:
        instance.wait_ready()
        assert instance.key() == ""
        assert instance.ask("/v1/completions", BODY, key="")[0] == 200
        assert not (instance.state / "keys.json").exists()
        assert "0.0" in next(line for line in instance.control("/metrics")[1].splitlines() if line.startswith("vllmd_api_keys"))
        code, _, said = vllmctl(instance.root, "add", "demo", "web")
        assert (code, "asks for no key" in said) == (0, True)
        stop(instance)


def test_a_guard_file_that_is_lost_closes_the_engine_and_a_reload_brings_it_back() -> None:
    with quick(config={"watch": {"canary_interval_s": 0}}) as instance:
        instance.wait_ready()
        (instance.runtime / "guard.json").unlink()
        assert instance.ask("/v1/completions", BODY)[0] == 503
        assert instance.ask("/health", key="")[0] == 200
        wait_until("it is said", lambda: "the keys cannot be read" in instance.log())
        instance.signal(signal.SIGHUP)
        wait_until("it is there again", lambda: instance.ask("/v1/completions", BODY)[0] == 200)
        stop(instance)


# On the disk, below a directory of somebody else's


@pytest.fixture
def theirs(tmp_path: Path) -> Paths:
    need(os.geteuid() == 0, "root, who writes below a directory of another user")
    paths = root_paths(tmp_path)
    (paths.state / "instances").mkdir(parents=True)
    for path in (paths.state, paths.state / "instances"):
        os.chown(path, NOBODY, NOBODY)
    return paths


def test_what_root_makes_belongs_to_the_owner_of_the_directory(theirs: Paths) -> None:
    keys.ensure(theirs, "demo", wanted=True)
    for name in ("instances/demo", "instances/demo/keys.json", "public", "public/demo", "public/demo/credentials.json"):
        about = (theirs.state / name).lstat()
        assert (about.st_uid, about.st_gid) == (NOBODY, NOBODY), name


def test_credentials_have_the_group_of_their_directory(theirs: Paths) -> None:
    directory = theirs.state / "public/demo"
    directory.mkdir(parents=True)
    os.chown(directory, NOBODY, 12345)
    keys.ensure(theirs, "demo", wanted=True)
    about = (directory / "credentials.json").stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (NOBODY, 12345, 0o640)


@pytest.mark.parametrize("name", ["instances", "instances/demo", "public", "public/demo"])
def test_a_link_in_the_way_is_not_followed(theirs: Paths, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    place = theirs.state / name
    if place.is_dir():
        place.rmdir()
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target)
    with pytest.raises(StorageFailed):
        keys.ensure(theirs, "demo", wanted=True)
    assert list(target.rglob("*")) == []
    assert target.stat().st_uid == 0


@pytest.mark.parametrize("name", ["instances/demo/keys.json", "public/demo/credentials.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "hard link"])
def test_what_stands_in_the_place_of_a_file_is_never_written_through(theirs: Paths, tmp_path: Path, name: str, kind: str) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:x")
    secret.chmod(0o600)
    place = theirs.state / name
    place.parent.mkdir(parents=True)
    match kind:
        case "link":
            place.symlink_to(secret)
        case "fifo":
            os.mkfifo(place)
        case "hard link":
            place.hardlink_to(secret)
        case _:
            place.mkdir()
    try:
        keys.ensure(theirs, "demo", wanted=True)
    except VllmdError:
        pass
    else:
        assert place.is_file()
        assert not place.is_symlink()
    assert (secret.read_text(), secret.stat().st_uid, stat.S_IMODE(secret.stat().st_mode)) == ("root:x", 0, 0o600)


def test_keys_are_not_read_through_a_link(theirs: Paths, tmp_path: Path) -> None:
    """Else root would publish what another file holds."""
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(document(Ring((keys.new_key(DEFAULT),))))
    (theirs.state / "instances/demo").mkdir()
    (theirs.state / "instances/demo/keys.json").symlink_to(elsewhere)
    with pytest.raises(StorageFailed):
        keys.read(theirs, "demo")
    with pytest.raises(StorageFailed):
        keys.ensure(theirs, "demo", wanted=True)
    assert not (theirs.state / "public").exists()


def test_nothing_is_lost_when_many_change_the_keys_at_once(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    keys.ensure(paths, "demo", wanted=True)

    def make(number: int) -> None:
        keys.change(paths, "demo", lambda ring: add(ring, keys.new_key(f"k{number}")))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    ring = keys.read(paths, "demo").ring
    assert {key.name for key in ring.keys} == {DEFAULT, *(f"k{number}" for number in range(20))}
    assert {path.name for path in (paths.state / "instances/demo").iterdir()} == {"keys.json"}


def test_a_refused_change_writes_nothing(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)

    def refuse(_ring: Ring) -> Ring:
        raise ConfigError("no", "not this one")

    with pytest.raises(ConfigError, match="not this one"):
        keys.change(paths, "demo", refuse)
    assert keys.read(paths, "demo").ring == Ring()
    assert not (paths.state / "public").exists()


def test_the_link_of_the_first_instance_stays(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    first, second = (keys.ensure(paths, name, wanted=True).ring.values[0] for name in ("one", "two"))
    assert json.loads((paths.state / "public/credentials.json").read_text()) == {"apiKey": first}
    assert public(tmp_path, "two") == second


def test_a_file_of_the_wrong_mode_is_made_private_again(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    keys.ensure(paths, "demo", wanted=True)
    file = paths.state / "instances/demo/keys.json"
    file.chmod(0o644)
    keys.ensure(paths, "demo", wanted=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Folder.open(tmp_path) as folder:
        folder.write("a", "old", 0o600)

        def fail(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            folder.write("a", "new", 0o600)
        assert folder.read("a", 10) == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


# On a terminal


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
