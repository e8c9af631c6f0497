"""A running instance and its engine: pinned, switched under it, not removed under it; its cache in its own place."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.component.daemons import quick, stop
from tests.harness import Instance
from tests.procs import wait_until
from vllmd import ctl
from vllmd.config.paths import root_paths
from vllmd.ctl import cache as ctl_cache
from vllmd.ctl import engine as ctl_engine
from vllmd.engines import choice, record
from vllmd.errors import TryLater, UsageError

pytestmark = pytest.mark.component

OWN = "vllm-0.32.0-fake"


def with_another(instance: Instance, **engine: str) -> Path:
    """The instance follows the choice (or what `engine` says), and another engine stands beside the one that it runs."""
    del instance.config["engine"]["executable"]
    instance.config["engine"] |= engine
    instance.write_config()
    engines = instance.root / "engines"
    shutil.copytree(engines / OWN, engines / "vllm-0.33.0-fake")
    known = json.loads((engines / OWN / record.RECORD).read_text())
    (engines / "vllm-0.33.0-fake" / record.RECORD).write_text(json.dumps(known | {"version": "0.33.0"}))
    return engines


def test_an_engine_is_switched_under_a_running_instance_which_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    instance = quick()
    engines = with_another(instance)
    paths = root_paths(instance.root)
    with instance:
        instance.wait_ready()
        assert instance.status()["engine"]["chosen"] == "current"
        assert ctl_engine.main(["use", "vllm-0.33.0-fake"], paths) == 0
        assert "until they are restarted: demo" in capsys.readouterr().err
        assert instance.engine_process("vllm") is not None
        ctl.run(["status", "demo", "--root", str(instance.root)])
        assert "vllm-0.33.0-fake is chosen now: it is taken at the next start" in capsys.readouterr().out
        instance.signal(signal.SIGHUP)
        wait_until("the restart to be asked for", lambda: instance.status()["needs_restart"] == ["engine"])
        with pytest.raises(TryLater, match=r"run by instance demo"):
            ctl_engine.main(["remove", OWN], paths)
        ctl_engine.main(["list"], paths)
        assert "run by demo" in capsys.readouterr().out
        stop(instance)
        instance.start()
        instance.wait_ready()
        assert instance.status()["engine"]["version"] == "0.33.0"
        assert ctl_engine.main(["remove", OWN], paths) == 0
        stop(instance)
    assert choice.previous_name(engines) == ""


def test_a_pinned_instance_keeps_its_engine(capsys: pytest.CaptureFixture[str]) -> None:
    instance = quick()
    with_another(instance, version="0.33.0")
    with instance:
        instance.wait_ready()
        said = instance.status()["engine"]
        assert (said["version"], said["chosen"]) == ("0.33.0", "engine.version")
        ctl.run(["status", "demo", "--root", str(instance.root)])
        assert "is chosen now" not in capsys.readouterr().out
        with pytest.raises(UsageError, match="engine of demo"):
            ctl_engine.main(["remove", "vllm-0.33.0-fake"], root_paths(instance.root))
        stop(instance)


def test_the_cache_of_a_running_instance_is_its_own_and_stays(capsys: pytest.CaptureFixture[str]) -> None:
    instance = quick()
    paths = root_paths(instance.root)
    with instance:
        instance.wait_ready()
        ctl_cache.main(["list", "--json"], paths)
        (row,) = json.loads(capsys.readouterr().out)["caches"]
        assert row["name"].startswith(f"{OWN}+{os.uname().machine}-")
        assert (row["in_use"], row["instance"], row["why_unused"]) == (True, "demo", "")
        with pytest.raises(TryLater, match="in use by a running instance"):
            ctl_cache.main(["clear", row["name"]], paths)
        stop(instance)
        assert ctl_cache.main(["clear", row["name"]], paths) == 0
        assert not list((instance.root / "cache/compiled").iterdir())
