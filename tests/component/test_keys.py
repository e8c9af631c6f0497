"""Keys on the disk and over the life of an instance: made, lost, changed by root below a directory of somebody else's."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path

import pytest

from tests.component.api_keys import public, vllmctl
from tests.component.daemons import quick, stop
from tests.procs import wait_until
from vllmd.config.paths import root_paths
from vllmd.core.keyring import DEFAULT
from vllmd.instance import keys

pytestmark = pytest.mark.component

BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}


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
