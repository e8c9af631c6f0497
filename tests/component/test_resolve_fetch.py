"""The resolver as the daemon starts it, and vllm-resolve-model as people start it: real processes."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import stat
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests import tiny_models
from vllmd.config import envfile
from vllmd.models import command, demo, wire
from vllmd.models.identity import hash12
from vllmd.models.progress import Progress

pytestmark = pytest.mark.component

ENVIRON = {"PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parents[2])}
FETCH = [sys.executable, "-m", "vllmd.models.fetch"]
SHARD2 = "model-00002-of-00002.safetensors"


def fetch(line: bytes) -> tuple[int, list[wire.Event], bytes]:
    """Run the child as the daemon does: one line in, stdin held open to its end."""
    with subprocess.Popen(FETCH, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRON) as child:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        try:
            child.stdin.write(line)
            child.stdin.flush()
            events = [wire.decode_event(said) for said in child.stdout]
            return child.wait(20), events, child.stderr.read()
        finally:
            child.kill()


def test_resolved_then_verified(tmp_path: Path) -> None:
    directory = demo.make(tmp_path / "Tiny")
    status, events, said = fetch(wire.encode_request(tiny_models.request(tmp_path), tiny_models.settings(verify="sha256")))
    assert (status, said) == (0, b"")
    kinds = [type(event) for event in events if not isinstance(event, Progress)]
    assert kinds == [wire.Resolved, wire.Verified]
    [resolved] = [event for event in events if isinstance(event, wire.Resolved)]
    assert resolved.model.directory == directory
    assert isinstance(events[-1], wire.Verified)
    assert len(events[-1].manifest_sha256) == 64


def test_failure_is_an_event_and_the_exit_status(tmp_path: Path) -> None:
    (demo.make(tmp_path / "Tiny") / SHARD2).unlink()
    status, events, said = fetch(wire.encode_request(tiny_models.request(tmp_path), tiny_models.settings()))
    assert (status, said) == (65, b"")
    assert isinstance(events[-1], wire.Failed)
    assert SHARD2 in events[-1].error.what


def test_bytes_that_are_wrong_fail_after_it_was_resolved(tmp_path: Path) -> None:
    directory = demo.make(tmp_path / "Tiny")
    (directory / "sha256sums.txt").write_text(f"{'0' * 64}  {SHARD2}\n")
    status, events, _ = fetch(wire.encode_request(tiny_models.request(tmp_path), tiny_models.settings()))
    assert status == 65
    assert any(isinstance(event, wire.Resolved) for event in events)
    assert not any(isinstance(event, wire.Verified) for event in events)


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"nonsense\n", b'{"request":{},"settings":{}}\n'])
def test_request_that_is_none_is_a_failure_without_a_traceback(line: bytes) -> None:
    status, events, said = fetch(line)
    assert (status, said) == (64, b"")
    assert isinstance(events[-1], wire.Failed)


def test_ends_when_its_daemon_does(tmp_path: Path) -> None:
    """It waits for a lock, for ever as far as this test is concerned, when the other end of its stdin closes."""
    demo.make(tmp_path / "Tiny")
    asked = tiny_models.request(tmp_path)
    line = wire.encode_request(asked, tiny_models.settings(lock_timeout_s=600))
    from vllmd.models.lock import locked

    with (
        locked(tmp_path, hash12(asked.identity), 0, lambda text: None),
        subprocess.Popen(FETCH, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRON) as child,
    ):
        assert child.stdin
        assert child.stdout
        try:
            child.stdin.write(line)
            child.stdin.flush()
            waiting = wire.decode_event(child.stdout.readline())
            assert isinstance(waiting, Progress)
            assert waiting.phase == "lock"
            assert child.poll() is None
            child.stdin.close()
            assert child.wait(10) == 0
        finally:
            child.kill()


def test_starts_fast_and_imports_nothing_heavy(tmp_path: Path) -> None:
    program = "import sys, vllmd.models.fetch\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], env=ENVIRON, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert not {"blake3", "yaml", "asyncio", "subprocess", "numpy", "concurrent.futures"} & set(loaded)


def environment(store: Path, **more: str) -> dict[str, str]:
    return {
        "VLLM_MODEL": "Tiny",
        "VLLM_MODEL_ORG": "acme",
        "VLLM_MODELS_DIR": str(store),
        "FLOX_ENV_CACHE": str(store.parent / "cache"),
        "VLLMD_OFFLINE": "1",
    } | more


def run(environ: dict[str, str], *argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = command.main(argv, environ)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_command_writes_the_env_file_that_todays_does(store: Path) -> None:
    directory = demo.make(store / "Tiny")
    status, out, err = run(environment(store))
    path = store.parent / f"cache/vllm-model.acme-Tiny.{hash12('acme/Tiny')}.env"
    assert (status, err) == (0, "")
    assert "[model] Checking local directory... OK\n[model] Resolved: acme/Tiny (via local)\n" in out
    assert out.endswith(f"[model] Env file: {path}\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("# ")
    assert envfile.read(path) == {
        "VLLM_MODEL": "Tiny",
        "VLLM_MODEL_ID": "acme/Tiny",
        "VLLM_MODEL_PATH": str(directory),
        "HF_HUB_OFFLINE": "1",
        "_VLLM_RESOLVED_MODEL": str(directory),
        "_VLLM_RESOLVED_VIA": "local",
        "_VLLM_MODEL_IDENTITY": "acme/Tiny",
        "_VLLM_MODEL_DIR": str(directory),
    }


def test_env_file_is_read_the_same_by_a_shell(store: Path) -> None:
    odd = store.parent / "it's $HOME `x` \"q\" \\ é"
    directory = demo.make(odd / "Tiny")
    path = store.parent / "model.env"
    status, _, err = run(environment(odd, VLLM_MODEL_ENV_FILE=str(path)))
    assert (status, err) == (0, "")
    script = f'. {shlex.quote(str(path))}; printf %s "$_VLLM_RESOLVED_MODEL"'
    said = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True, timeout=20).stdout
    assert said == str(directory) == envfile.read(path)["_VLLM_RESOLVED_MODEL"]


def test_hub_snapshot_is_given_by_its_path(store: Path) -> None:
    snapshot = tiny_models.snapshot(store / "hub", "acme/Tiny", "c1", main=True)
    status, _, _ = run(environment(store, VLLM_MODEL_ENV_FILE=str(store / "m.env"), VLLM_MODEL_REVISION="c1"))
    found = envfile.read(store / "m.env")
    assert status == 0
    assert found["HF_HOME"] == str(store)
    assert found["_VLLM_RESOLVED_MODEL"] == found["_VLLM_RESOLVED_SNAPSHOT"] == str(snapshot)
    assert found["_VLLM_MODEL_IDENTITY"] == "acme/Tiny@c1"
    assert found["VLLM_MODEL_REVISION"] == "c1"
    assert "VLLM_MODEL_PATH" not in found


def test_bundled_model_is_via_flox_in_the_file(store: Path) -> None:
    tiny_models.snapshot(store.parent / "env/share/models/hub", "acme/Tiny", "c1", main=True)
    status, _, _ = run(environment(store, FLOX_ENV=str(store.parent / "env"), VLLM_MODEL_ENV_FILE=str(store / "m.env"), VLLM_MODEL_SOURCES="flox"))
    found = envfile.read(store / "m.env")
    assert (status, found["_VLLM_RESOLVED_VIA"], found["HF_HOME"]) == (0, "flox", str(store.parent / "env/share/models"))


def test_provenance_file_is_named_where_there_is_one(store: Path) -> None:
    directory = demo.make(store / "Tiny")
    tiny_models.write_provenance(directory, tiny_models.request(store))
    assert run(environment(store, VLLM_MODEL_ENV_FILE=str(store / "m.env")))[0] == 0
    assert envfile.read(store / "m.env")["_VLLM_MODEL_PROVENANCE_FILE"] == str(directory / ".vllm-model-provenance")


def test_model_with_wrong_sums_is_no_hit_and_the_next_source_is_asked(store: Path) -> None:
    directory = demo.make(store / "Tiny")
    (directory / "sha256sums.txt").write_text(f"{'0' * 64}  {SHARD2}\n")
    assert run(environment(store))[0] == 1
    snapshot = tiny_models.snapshot(store / "hub", "acme/Tiny", "c1", main=True)
    status, out, _ = run(environment(store, VLLM_MODEL_ENV_FILE=str(store / "m.env")))
    assert status == 0
    assert hashlib.sha256((directory / SHARD2).read_bytes()).hexdigest() in out
    assert envfile.read(store / "m.env")["_VLLM_RESOLVED_MODEL"] == str(snapshot)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"VLLM_MODEL": ""}, "VLLM_MODEL is not set"),
        ({"VLLM_MODELS_DIR": ""}, "VLLM_MODELS_DIR is not set"),
        ({"VLLM_MODEL_ORG": ""}, "neither VLLM_MODEL_ID nor VLLM_MODEL_ORG"),
        ({"FLOX_ENV_CACHE": ""}, "neither VLLM_MODEL_ENV_FILE nor FLOX_ENV_CACHE"),
        ({"VLLM_MODEL": "../x"}, "VLLM_MODEL"),
        ({"VLLM_MODEL": "a\nb"}, "VLLM_MODEL"),
        ({"VLLM_RESOLVE_LOCK_TIMEOUT": "soon"}, "VLLM_RESOLVE_LOCK_TIMEOUT"),
        ({"VLLM_MODELS_DIR": "/proc/x"}, "VLLM_MODELS_DIR: cannot create /proc/x"),
        ({}, "no source has acme/Tiny"),
    ],
)
def test_any_failure_is_status_1_with_a_reason_and_no_file(store: Path, changes: dict[str, str], said: str) -> None:
    status, _, err = run(environment(store, **changes))
    assert status == 1
    assert err.startswith("[model] ERROR: ")
    assert said in err
    assert not list(store.parent.rglob("*.env"))


@pytest.mark.parametrize("place", ["/tmp", "/", "/proc/self/model.env"])
def test_env_file_in_a_wrong_place_is_the_variables_fault(store: Path, place: str) -> None:
    demo.make(store / "Tiny")
    status, _, err = run(environment(store, VLLM_MODEL_ENV_FILE=place))
    assert status == 1
    assert f"write {place}: " in err
    assert "Put the model there again" not in err


def test_env_file_that_cannot_be_written_is_said(store: Path) -> None:
    demo.make(store / "Tiny")
    (store.parent / "cache").write_text("in the way")
    status, _, err = run(environment(store))
    assert (status, f"{store.parent}/cache" in err) == (1, True)


def test_arguments_are_refused_and_help_and_version_answered(store: Path) -> None:
    assert run({}, "--help")[0] == 0
    assert run({}, "--version")[1].startswith("vllm-resolve-model ")
    assert run(environment(store), "Tiny")[0] == 1


def test_two_commands_at_once_both_succeed(store: Path) -> None:
    demo.make(store / "Tiny")
    program = "import os,sys\nfrom vllmd.models.command import main\nsys.exit(main([], os.environ))"
    children = [
        subprocess.Popen([sys.executable, "-c", program], env=ENVIRON | environment(store, FLOX_ENV_CACHE=str(store.parent / name)), stdout=subprocess.DEVNULL)
        for name in ("one", "two", "three")
    ]
    try:
        deadline = time.monotonic() + 60
        assert [child.wait(max(deadline - time.monotonic(), 0.1)) for child in children] == [0, 0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
