"""The API key, and what else the engine must not get: where it stands, and where it never does."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import procs
from tests.component.daemons import assert_nothing_left, ends, quick, stop
from tests.harness import MARK, Instance, flags
from vllmd.engines import record

pytestmark = pytest.mark.component

KEY = "sk-this-key-must-be-seen-nowhere"
PRIVATE = "engine-config.yaml"
VLLMCTL = Path(sys.executable).parent / "vllmctl"


def without_middleware(instance: Instance) -> Instance:
    """An engine of a version that has no --middleware: it is told the keys itself, in a private file."""
    directory = instance.root / "engines/vllm-0.32.0-fake"
    names, alone = flags()
    record.write(directory, record.Record("0.32.0", "cpu", tuple(name for name in names if name != "--middleware"), alone))
    return instance


def keyed(how: str, fake: dict[str, str] | None = None) -> Instance:
    """An instance whose key is given in its file, its environment, or as a systemd credential."""
    instance = quick(fake, {"serve": {"api_key": KEY}} if how == "file" else None)
    if how == "environment":
        instance.env["VLLM_API_KEY"] = KEY
    if how == "credential":
        (instance.root / "credentials").mkdir()
        (instance.root / "credentials/api-key").write_text(f"{KEY}\n")
        instance.env["CREDENTIALS_DIRECTORY"] = str(instance.root / "credentials")
    return instance


@pytest.mark.parametrize("how", ["file", "environment", "credential"])
def test_the_api_key_guards_the_engine_and_is_seen_nowhere(how: str) -> None:
    with keyed(how) as instance:
        instance.wait_ready()
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}
        assert instance.ask("/v1/completions", body)[0] == 401
        assert instance.ask("/v1/completions", body, key=KEY)[0] == 200
        assert instance.ask("/tokenize", {"prompt": "Hello"})[0] == 401
        assert not (instance.runtime / PRIVATE).exists(), "vLLM itself is told no key"
        assert instance.key() == "", "with a key of one's own none is made"
        guard = instance.runtime / "guard.json"
        assert stat.S_IMODE(guard.stat().st_mode) == 0o600
        assert not list(seen_in_files(instance, how))
        assert not list(seen_in_processes(instance, how))
        assert KEY not in instance.control("/status")[1] + instance.control("/metrics")[1]
        stop(instance)
        assert not guard.exists()
        assert not list(seen_in_files(instance, how))


def seen_in_processes(instance: Instance, how: str) -> Iterator[str]:
    """Command lines of all processes; environments of the engine's, and of ours where we were not given it there."""
    for process in procs.processes():
        if KEY in process.cmdline:
            yield f"command line of {process.comm}"
    of_engine = set(instance.engine_pids())
    for process in procs.with_environ(MARK, str(instance.root)):
        if process.pid in of_engine or how == "file":
            raw = Path(f"/proc/{process.pid}/environ").read_bytes()
            if KEY.encode() in raw or b"CREDENTIALS_DIRECTORY" in raw:
                yield f"environment of {process.comm}"


def seen_in_files(instance: Instance, how: str) -> Iterator[str]:
    """Everything in the root, the log among it, save where we ourselves wrote it."""
    given = {"file": "etc/demo.yaml", "credential": "credentials/api-key"}.get(how, "")
    for path in instance.root.rglob("*"):
        is_given = path == instance.root / given or (how == "file" and path.match("etc/.generations/demo/*/demo.yaml"))  # the same, put aside
        if path.is_file() and not is_given and KEY.encode() in path.read_bytes():
            yield str(path)


def test_a_key_that_the_engine_itself_prints_is_taken_out() -> None:
    with keyed("file", {"FAKE_EXIT_READY": "1@3", "FAKE_ERROR": f"ValueError: bad key {KEY} given"}) as instance:
        error = ends(instance, 70, "engine_exited", ready=True)
        assert "bad key" in error["what"]
        assert not list(seen_in_files(instance, "file"))


def test_secrets_of_flags_and_of_our_own_environment_are_taken_out_as_well() -> None:
    """The engine's command knows none of them by name: a flag that is passed through, and the hub's token that the download uses."""
    flag, token = "a-token-in-a-flag-0815", "a-token-of-the-hub-4711"
    fake = {"FAKE_EXIT_READY": "1@3", "FAKE_ERROR": f"ValueError: neither {flag} nor {token}"}
    with quick(fake, {"engine": {"args": {"hf-token": flag}}}, env={"HF_TOKEN": token}) as instance:
        assert "neither" in ends(instance, 70, "engine_exited", ready=True)["what"]
        for path in [*instance.state.rglob("*"), *instance.root.glob("demo.*")]:
            content = path.read_bytes() if path.is_file() else b""
            assert flag.encode() not in content, path
            assert token.encode() not in content, path


def test_a_vllm_without_middleware_is_told_the_keys_in_a_private_file() -> None:
    with without_middleware(keyed("credential")) as instance:
        instance.wait_ready()
        assert "keys guard /v1" in instance.log()
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}
        assert [instance.ask("/v1/completions", body, key=key)[0] for key in ("", KEY)] == [401, 200]
        private = instance.runtime / PRIVATE
        assert KEY in private.read_text()
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
        assert not list(seen_in_processes(instance, "credential"))
        assert not (instance.runtime / "guard.json").exists()
        done = subprocess.run([VLLMCTL, "--root", instance.root, "api-key", "add", "demo", "web"], capture_output=True, text=True, check=True)
        assert "not in force" in done.stderr
        assert "restart" in done.stderr
        web = done.stdout.strip()
        assert instance.ask("/v1/completions", body, key=web)[0] == 401
        stop(instance)
        assert not list(seen_in_files(instance, "credential"))
        instance.start()
        instance.wait_state("ready")
        assert [instance.ask("/v1/completions", body, key=key)[0] for key in (KEY, web, "")] == [200, 200, 401]
        stop(instance)


def test_a_private_file_of_a_killed_supervisor_is_replaced_and_removed() -> None:
    with without_middleware(keyed("file")) as instance:
        instance.wait_ready()
        instance.signal(9)
        instance.wait_exit()
        private = instance.runtime / PRIVATE
        assert private.exists()
        private.chmod(0o644)
        instance.start()
        instance.wait_ready()
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
        stop(instance)


def test_a_link_in_the_place_of_the_private_file_is_not_followed() -> None:
    instance = without_middleware(keyed("file"))
    target = instance.root / "target"
    instance.runtime.mkdir(parents=True)
    (instance.runtime / PRIVATE).symlink_to(target)
    with instance:
        instance.wait_ready()
        assert not target.exists()
        stop(instance)


# The environment

BENT = {
    "PYTHONHOME": "",
    "LD_PRELOAD": "",
    "LISTEN_FDS": "1",
    "LISTEN_PID": "1",
    "WATCHDOG_USEC": "9000000",
    "VLLM_PORT": "",
    "VLLM_HOST": "127.0.0.1",
    "VLLM_OWNER_REGEX": "x",
    "VLLMD_STALL_TIMEOUT_S": "500",
    "HF_TOKEN": "hf_secret",
    "AWS_SECRET_ACCESS_KEY": "aws",
    "SOMETHING_ELSE": "1",
    "INVOCATION_ID": "0" * 32,
}
ALLOWED = {
    "LC_TIME": "C",
    "NCCL_DEBUG": "INFO",
    "CUDA_CACHE_MAXSIZE": "1",
    "https_proxy": "http://127.0.0.1:1",
    "VLLM_USE_V1": "1",
}


def dumped(instance: Instance) -> dict[str, Any]:
    return dict(json.loads((instance.root / "dump").read_text()))


def test_the_engine_gets_what_is_allowed_and_nothing_else() -> None:
    instance = quick()
    instance.config["engine"]["env"] |= {"FAKE_DUMP": str(instance.root / "dump"), "MY_OWN": "yes"}
    instance.write_config()
    instance.env |= {"PYTHONPATH": "/nowhere"} | {name: value for name, value in BENT.items() if value} | ALLOWED
    with instance:
        instance.wait_ready()
        environ = dumped(instance)["environ"]
        assert Path(environ["PYTHONPATH"]).name == "guard", "ours, with one module in it; none that was inherited"
        assert not {name for name in (*BENT, "NOTIFY_SOCKET") if name in environ}
        assert {name: environ.get(name) for name in ALLOWED} == ALLOWED
        assert environ["MY_OWN"] == "yes"
        assert environ["PYTHONUNBUFFERED"] == "1"
        assert environ["HF_HUB_OFFLINE"] == "1"
        assert environ["VLLM_CACHE_ROOT"].startswith(str(instance.root / "cache/compiled/vllm-0.32.0-fake+"))
        assert str(instance.root / "engines/vllm-0.32.0-fake/bin") in environ["PATH"].split(":")
        stop(instance)


def test_the_engine_is_a_clean_process() -> None:
    """A session of its own, no descriptor of ours, signals as the kernel made them."""
    instance = quick()
    instance.config["engine"]["env"] |= {"FAKE_DUMP": str(instance.root / "dump")}
    instance.write_config()
    with instance:
        instance.wait_ready()
        engine = instance.engine_process("vllm")
        assert engine.sid == engine.pid
        of_daemon = {inode(path) for path in descriptors(instance.pid)}
        of_engine = {inode(path) for path in descriptors(engine.pid)}
        shared = of_daemon & of_engine - {"/dev/null"}
        assert not [name for name in shared if name.startswith("socket:") or str(instance.root) in name], shared
        of_fake = {signal.SIGPIPE, signal.SIGXFSZ}  # its own Python ignores these
        assert not signals(engine.pid, "SigIgn") - of_fake
        assert not signals(engine.pid, "SigBlk")
        assert dumped(instance)["cwd"] == str(instance.root / "cache")
        stop(instance)
        assert_nothing_left(instance)


def signals(pid: int, field: str) -> set[int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")), 16)
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}


def descriptors(pid: int) -> list[Path]:
    return [Path(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]  # noqa: PTH208


def inode(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
