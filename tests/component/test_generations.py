"""What reached READY is kept, and one can go back to it: with a supervisor, a fake engine and the real commands."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import publishing
from tests.component.daemons import quick
from tests.harness import Instance
from tests.procs import wait_until
from vllmd.ctl import rollback
from vllmd.errors import VllmdError
from vllmd.instance import generations

pytestmark = pytest.mark.component


CTL = (sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())")


def ctl(instance: Instance, *words: str, status: int = 0) -> str:
    argv = [*CTL, "--root", str(instance.root), *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == status, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def records(instance: Instance) -> list[dict[str, Any]]:
    folder = instance.state / generations.FOLDER
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def served(instance: Instance) -> None:
    """One life: to READY, its generation kept, and stopped."""
    before = records(instance) if (instance.state / generations.FOLDER).exists() else []
    instance.start().wait_ready()
    kept = instance.root / "etc" / generations.FILES_FOLDER / instance.name
    present = generations.sum_of(generations.sums_of(generations.present_files(_paths(instance), instance.name)))
    wait_until("the generation", lambda: records(instance) != before and (kept / present).is_dir() if (instance.state / generations.FOLDER).exists() else False)
    instance.signal(signal.SIGTERM)
    assert instance.wait_exit() == 0


def _paths(instance: Instance) -> Any:
    from vllmd.config.paths import root_paths

    return root_paths(instance.root)


def configure(instance: Instance, **serve: object) -> None:
    instance.config["serve"] = {**instance.config["serve"], **serve}
    instance.write_config()


@pytest.fixture
def instance() -> Any:
    made = quick()
    yield made
    made.close()


def test_each_configuration_that_was_ready_is_one_generation_however_often_it_starts(instance: Instance) -> None:
    served(instance)
    served(instance)
    assert [(each["number"], each["starts"]) for each in records(instance)] == [(1, 2)]
    configure(instance, max_model_len=64)
    served(instance)
    configure(instance, max_model_len=32)  # never ready: no generation
    first, second = records(instance)
    assert (second["number"], second["settings"]["serve.max_model_len"]) == (2, 64)
    listed = json.loads(ctl(instance, "generations", instance.name, "--json"))
    assert [(each["number"], each["changes"], each["kept"], each["current"]) for each in listed["items"]] == [
        (2, ["serve.max_model_len: not set -> 64"], True, False),
        (1, ["the first"], True, False),
    ]
    assert first["engine"]["directory"] == "vllm-0.32.0-fake"
    assert "serve.max_model_len: not set -> 64" in ctl(instance, "generations", instance.name)


def test_rollback_puts_the_files_back_and_can_be_undone(instance: Instance) -> None:
    etc = instance.root / "etc"
    first_text = (etc / f"{instance.name}.yaml").read_text()
    served(instance)
    configure(instance, max_model_len=64)
    drop_in = etc / f"{instance.name}.d/10-more.yaml"
    drop_in.parent.mkdir()
    drop_in.write_text("log: {level: debug}\n")
    served(instance)
    drop_in.write_text("serve: {port: nonsense}\n")
    assert "standard input is no terminal" in ctl(instance, "rollback", instance.name, status=64)
    assert "generation 2" in ctl(instance, "rollback", instance.name, "--yes")
    assert drop_in.read_text() == "log: {level: debug}\n"
    ctl(instance, "rollback", instance.name, "--yes")
    assert (etc / f"{instance.name}.yaml").read_text() == first_text
    assert not drop_in.exists()
    served(instance)
    assert len(records(instance)) == 3  # the newest is what was ready last, also when it was there before
    ctl(instance, "rollback", instance.name, "before", "--yes")
    assert drop_in.exists()
    assert "no generation '9'" in ctl(instance, "rollback", instance.name, "9", "--yes", status=64)


def test_no_secret_stands_in_a_record_nor_in_what_a_rollback_shows(instance: Instance) -> None:
    instance.config["model"]["hf_token"] = "hf_plantedsecret0123456789"
    instance.config["engine"]["env"]["SOME_API_KEY"] = "planted-secret-two"
    instance.write_config()
    served(instance)
    configure(instance, max_model_len=64)
    instance.config["model"]["hf_token"] = "hf_another0plantedsecret"
    instance.write_config()
    served(instance)
    said = ctl(instance, "rollback", instance.name, "1", "--yes") + ctl(instance, "generations", instance.name)
    text = "".join(path.read_text() for path in (instance.state / generations.FOLDER).iterdir()) + said
    assert "planted" not in text
    assert "<redacted>" in said
    assert (instance.root / "etc" / generations.FILES_FOLDER).stat().st_mode & 0o077 == 0


def test_forged_record_brings_nothing_into_the_configuration(instance: Instance) -> None:
    served(instance)
    etc = instance.root / "etc"
    before = (etc / f"{instance.name}.yaml").read_text()
    folder = instance.state / generations.FOLDER
    forged = {**records(instance)[0], "number": 2, "configuration": "../../../lib/evil"}
    planted = instance.root / "lib/evil"
    planted.mkdir()
    (planted / f"{instance.name}.yaml").write_text("engine: {executable: /bin/false}\n")
    (folder / "00002.json").write_text(json.dumps(forged))
    ctl(instance, "rollback", instance.name, "2", "--yes", status=78)
    (folder / "00003.json").write_text(json.dumps({**forged, "configuration": "0" * 64}))
    ctl(instance, "rollback", instance.name, "3", "--yes", status=78)
    (folder / "00004.json").symlink_to("/etc/passwd")
    (folder / "00005.json").write_text("[" * 5000)
    os.mkfifo(folder / "00006.json")
    ctl(instance, "generations", instance.name)
    assert (etc / f"{instance.name}.yaml").read_text() == before


def test_kept_files_that_were_changed_are_refused(instance: Instance) -> None:
    served(instance)
    configure(instance, max_model_len=64)
    served(instance)
    kept = instance.root / "etc" / generations.FILES_FOLDER / instance.name / records(instance)[0]["configuration"]
    (kept / f"{instance.name}.yaml").write_text("serve: {port: 1}\n")
    ctl(instance, "rollback", instance.name, "1", "--yes", status=78)


def serving_a_version(instance: Instance) -> tuple[Path, Path]:
    """The store, and its first version, which a generation has now."""
    store = instance.root / "lib/models"
    store.mkdir(parents=True)
    first = publishing.publish_version(store, 1)
    instance.config["model"] = {"id": "acme/Tiny", "sources": ["local"]}
    del instance.config["engine"]["executable"]
    instance.write_config()
    served(instance)
    return store, first


def test_model_version_and_engine_of_a_generation_come_back(instance: Instance) -> None:
    store, first = serving_a_version(instance)
    second = publishing.publish_version(store, 2, keep=1)
    assert first.is_dir(), "the version of a generation was removed"
    served(instance)
    third = publishing.publish_version(store, 3, keep=1)
    served(instance)
    publishing.publish_version(store, 4, keep=1)
    assert [path.is_dir() for path in (first, second, third)] == [False, True, True]
    assert [each["model"]["version"] for each in records(instance)] == [path.name for path in (first, second, third)]
    said = ctl(instance, "store", "list")
    assert f"kept for a rollback of {instance.name}" in said
    ctl(instance, "rollback", instance.name, "1", "--yes", status=66)
    said = ctl(instance, "rollback", instance.name, "2", "--yes")
    assert f"pinned to version {second.name[:12]}" in said
    served(instance)
    assert records(instance)[-1]["model"]["directory"] == str(second)
    assert records(instance)[-1]["served_name"] == records(instance)[1]["served_name"]
    engines = instance.root / "engines"
    (engines / "vllm-9-fake").symlink_to("vllm-0.32.0-fake")
    (engines / "current").unlink()
    (engines / "current").symlink_to("vllm-9-fake")
    said = ctl(instance, "rollback", instance.name, "3", "--yes")
    assert "the engine is pinned to vllm-0.32.0-fake" in said
    forged = instance.state / generations.FOLDER / "00003.json"
    forged.write_text(forged.read_text().replace('"vllm-0.32.0-fake"', '"../evil"'))
    assert "not installed" in ctl(instance, "rollback", instance.name, "3", "--yes", status=78)


def test_a_version_that_a_rollback_pinned_stays_until_the_instance_is_ready_with_it(instance: Instance) -> None:
    """Of the third generation back: nothing else keeps it, and another instance may fetch a newer one at any moment."""
    store = instance.root / "lib/models"
    store.mkdir(parents=True)
    instance.config["model"] = {"id": "acme/Tiny", "sources": ["local"]}
    instance.write_config()
    first = publishing.publish_version(store, 1)
    served(instance)
    for number in (2, 3):
        publishing.publish_version(store, number, keep=9)
        served(instance)
    ctl(instance, "rollback", instance.name, "1", "--yes", "--no-restart")
    publishing.publish_version(store, 4, keep=1)
    served(instance)
    assert records(instance)[-1]["model"]["directory"] == str(first)


def test_a_generation_with_pins_of_an_earlier_rollback_comes_back_with_all_of_them(instance: Instance) -> None:
    """Its engine had to be pinned, and that replaced the pin of its model: generation 3 came back with the model of generation 2."""
    store, first = serving_a_version(instance)
    publishing.publish_version(store, 2)
    served(instance)
    ctl(instance, "rollback", instance.name, "1", "--yes")
    served(instance)
    assert records(instance)[2]["model"]["directory"] == str(first)
    engines = instance.root / "engines"
    shutil.copytree(engines / "vllm-0.32.0-fake", engines / "vllm-9-fake", symlinks=True)
    (engines / "current").unlink()
    (engines / "current").symlink_to("vllm-9-fake")
    assert "pinned to vllm-0.32.0-fake" in ctl(instance, "rollback", instance.name, "3", "--yes")
    served(instance)
    last = records(instance)[-1]
    assert (last["model"]["directory"], last["engine"]["directory"]) == (str(first), "vllm-0.32.0-fake")


def test_a_rollback_that_was_cut_short_and_repeated_can_still_be_undone(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    etc = instance.root / "etc"
    served(instance)
    configure(instance, max_model_len=64)
    drop_in = etc / f"{instance.name}.d/10-mine.yaml"
    drop_in.parent.mkdir()
    drop_in.write_text("log: {level: debug}\n")  # never ready: nothing else has it
    (etc / f"{instance.name}.d/20-mine.yaml").write_text("log: {level: info}\n")
    mine = (etc / f"{instance.name}.yaml").read_text()
    monkeypatch.setattr(rollback, "write_atomic", fails)
    with pytest.raises(VllmdError):
        rollback.rollback(_paths(instance), instance.name, "1", rollback.Options(asks=False, restarts=False))
    assert not drop_in.exists()
    monkeypatch.undo()
    ctl(instance, "rollback", instance.name, "1", "--yes", "--no-restart")
    ctl(instance, "rollback", instance.name, "before", "--yes", "--no-restart")
    assert (drop_in.read_text(), (etc / f"{instance.name}.yaml").read_text()) == ("log: {level: debug}\n", mine)


def test_what_a_person_changed_after_a_rollback_was_cut_short_is_put_aside_too(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    served(instance)
    configure(instance, max_model_len=64)
    monkeypatch.setattr(rollback, "write_atomic", fails)
    with pytest.raises(VllmdError):
        rollback.rollback(_paths(instance), instance.name, "1", rollback.Options(asks=False, restarts=False))
    monkeypatch.undo()
    configure(instance, max_model_len=96)
    ctl(instance, "rollback", instance.name, "1", "--yes", "--no-restart")
    ctl(instance, "rollback", instance.name, "before", "--yes", "--no-restart")
    assert "96" in (instance.root / f"etc/{instance.name}.yaml").read_text()


def fails(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_only_as_many_are_kept_as_asked(instance: Instance) -> None:
    instance.config["start"] = {"keep_generations": 2}
    for length in (16, 32, 64):
        configure(instance, max_model_len=length)
        served(instance)
    assert [each["number"] for each in records(instance)] == [2, 3]
    kept = instance.root / "etc" / generations.FILES_FOLDER / instance.name
    assert {path.name for path in kept.iterdir()} == {each["configuration"] for each in records(instance)}


def test_state_that_cannot_be_written_costs_the_generation_and_not_the_instance(instance: Instance) -> None:
    instance.state.mkdir(parents=True, exist_ok=True)
    (instance.state / generations.FOLDER).write_text("in the way")
    instance.start().wait_ready()
    wait_until("the complaint", lambda: "could not be kept" in instance.log())
    instance.signal(signal.SIGTERM)
    assert instance.wait_exit() == 0
