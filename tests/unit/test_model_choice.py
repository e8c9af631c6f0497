"""`vllmctl model`: flags as settings, the file that remembers, and what it refuses. No driver is asked here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllmd import ctl
from vllmd.config.paths import Paths, root_paths
from vllmd.config.settings import Model
from vllmd.core.tiers import Card
from vllmd.ctl import follow, model_file, model_hardware, model_set
from vllmd.ctl import unit as units
from vllmd.ctl.model_file import Chosen
from vllmd.ctl.model_hardware import Equipment
from vllmd.ctl.unit import UnitState
from vllmd.engines import record
from vllmd.errors import ConfigError, Status, TryLater, UsageError, VllmdError
from vllmd.models.identity import label, request_from

pytestmark = pytest.mark.unit

A100 = tuple(Card(index, f"GPU-{index}", "A100", capability="8.0", memory_mib=81920) for index in range(2))


@pytest.fixture(autouse=True)
def equipment(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, *A100)
    monkeypatch.setenv("PATH", "/nowhere")


def has(monkeypatch: pytest.MonkeyPatch, *cards: Card, notes: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(model_hardware, "look", lambda *_: Equipment(cards, 64 * 1024, notes))


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = root_paths(tmp_path)
    found.config.mkdir()
    return found


def run(paths: Paths, *words: str) -> int:
    return ctl.run(["--root", str(paths.config.parent), "model", *words])


def drop_in(paths: Paths, name: str = "demo") -> dict[str, Any]:
    return dict(yaml.safe_load(model_file.path(paths, name).read_text()))


# -- the file


def test_what_was_chosen_is_remembered_and_chosen_again_for_the_hardware_of_now(paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(paths, "set", "demo", "qwen3-8b", "--", "--max-num-seqs", "16") == 0
    assert drop_in(paths)["gpus"] == 1
    remembered = model_file.read(paths, "demo")
    assert remembered == Chosen("qwen3-8b", is_preset=True, tier="nvidia-older", flags=("--max-num-seqs", "16"), exists=True)
    has(monkeypatch, Card(0, "GPU-9", "B200", capability="10.0", memory_mib=183359))
    assert run(paths, "set", "demo") == 0
    assert model_file.read(paths, "demo").tier == "nvidia-blackwell"
    assert drop_in(paths)["engine"]["args"]["max-num-seqs"] == 16
    assert run(paths, "set", "demo", "--", "--max-num-seqs", "4") == 0
    assert drop_in(paths)["engine"]["args"]["max-num-seqs"] == 4
    assert "no engine is installed yet: vllmctl engine install" in capsys.readouterr().out


def test_an_instance_that_is_new_gets_a_file_with_a_port_of_its_own(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    (paths.config / "other.yaml").write_text("serve: {port: 8000}\n")
    (paths.config / "broken.yaml").write_text("serve: [")
    assert run(paths, "set", "demo", "qwen3-8b") == 0
    assert yaml.safe_load((paths.config / "demo.yaml").read_text()) == {"serve": {"port": 8001}}
    assert f"{paths.config}/demo.yaml was made" in capsys.readouterr().out
    with pytest.raises(UsageError, match="there is no instance demos") as refused:
        run(paths, "set", "demos", "qwen3-8b")
    assert "did you mean demo?" in refused.value.hint
    assert run(paths, "set", "demos", "qwen3-8b", "--new") == 0


def test_what_a_person_wrote_there_is_put_aside_and_told(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    run(paths, "set", "demo", "qwen3-8b")
    mine = model_file.path(paths, "demo")
    for number, content in enumerate((mine.read_text().replace("max_model_len: 32768", "max_model_len: 1000"), "# by hand\nmodel: a/b\n", "port: [", "serve: {max_model_len: 7}\n" + mine.read_text()), 1):
        mine.write_text(content)
        assert model_file.read(paths, "demo").is_edited
        capsys.readouterr()
        run(paths, "set", "demo", "qwen3-8b")
        kept = mine.with_name(f"50-model.yaml.by-hand-{number}")
        assert kept.read_text() == content
        assert f"was changed by hand: what stood there is {kept} now" in capsys.readouterr().out
        assert not model_file.read(paths, "demo").is_edited
    capsys.readouterr()
    run(paths, "set", "demo", "qwen3-8b")
    assert "by hand" not in capsys.readouterr().out


def test_a_write_that_fails_changes_nothing(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    run(paths, "set", "demo", "qwen3-8b")
    before = {path: path.read_bytes() for path in paths.config.rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(VllmdError, match="No space left") as failed:
        run(paths, "set", "demo", "qwen3-0.6b")
    assert failed.value.status is Status.IOERR
    assert {path: path.read_bytes() for path in paths.config.rglob("*") if path.is_file()} == before


def test_it_has_the_mode_of_the_instance_s_file(paths: Paths) -> None:
    (paths.config / "demo.yaml").write_text("serve: {port: 8001}\n")
    (paths.config / "demo.yaml").chmod(0o640)
    previous = os.umask(0o077)
    try:
        run(paths, "set", "demo", "qwen3-8b")
    finally:
        os.umask(previous)
    mine = model_file.path(paths, "demo")
    assert (mine.stat().st_mode & 0o777, mine.parent.stat().st_mode & 0o777) == (0o640, paths.config.stat().st_mode & 0o777)


# -- what would be in force


def test_values_of_other_files_that_stay_are_told(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    (paths.config / "demo.yaml").write_text("model: old/model\nserve: {max_model_len: 10}\nengine: {args: {quantization: old}}\n")
    (paths.config / "demo.d").mkdir()
    (paths.config / "demo.d/60-mine.yaml").write_text("serve: {max_model_len: 99}\n")
    run(paths, "set", "demo", "qwen3-8b")
    told = capsys.readouterr().out
    assert f"serve.max_model_len is what {paths.config}/demo.d/60-mine.yaml:1 says" in told
    assert f"engine.args.quantization of {paths.config}/demo.yaml:3 stays in force" in told


@pytest.mark.parametrize("file", ["60-mine.yaml", "zz-rollback.yaml"])
def test_a_choice_without_effect_is_refused(file: str, paths: Paths) -> None:
    (paths.config / "demo.yaml").write_text("serve: {port: 8001}\n")
    (paths.config / "demo.d").mkdir()
    (paths.config / "demo.d" / file).write_text("\nmodel: other/model\n")
    for words in (["set", "demo", "qwen3-8b"], ["clear", "demo"]):
        with pytest.raises(VllmdError, match=f"{paths.config}/demo.d/{file}:2: .* no effect") as refused:
            run(paths, *words)
        assert "remove" in refused.value.hint
    assert not model_file.path(paths, "demo").exists()


def test_what_a_start_would_refuse_is_not_written(paths: Paths) -> None:
    (paths.config / "demo.yaml").write_text("serve: {prot: 8001}\n")
    with pytest.raises(ConfigError, match=f"{paths.config}/demo.yaml:1: serve.prot: unknown key"):
        run(paths, "set", "demo", "qwen3-8b")
    (paths.config / "demo.yaml").write_text("serve: {port: 8001}\n")
    with pytest.raises(ConfigError, match=f"{paths.config}/demo.d/50-model.yaml:.*max_model_len"):
        run(paths, "set", "demo", "qwen3-8b", "--", "--max-model-len", "many")
    assert not model_file.path(paths, "demo").exists()


# -- which model


@pytest.mark.parametrize(
    ("choice", "model"),
    [("Qwen/Qwen3-8B", {"id": "Qwen/Qwen3-8B"}), ("Qwen/Qwen3-8B@main", {"id": "Qwen/Qwen3-8B", "revision": "main"}), ("/srv/model", {"path": "/srv/model"})],
)
def test_any_model_on_one_gpu_unless_told_otherwise(choice: str, model: dict[str, str], paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    run(paths, "set", "demo", choice)
    assert drop_in(paths) == {"model": model, "gpus": 1, "serve": {"tensor_parallel_size": 1}}
    assert "--gpus N divides it" in capsys.readouterr().out
    run(paths, "set", "demo", choice, "--gpus", "2")
    assert drop_in(paths) == {"model": model, "gpus": 2, "serve": {"tensor_parallel_size": 2}}
    assert "--gpus N" not in capsys.readouterr().out


def test_gpus_that_the_instance_s_file_divides_are_left_as_they_are(paths: Paths) -> None:
    (paths.config / "demo.yaml").write_text("gpus: 2\nserve: {pipeline_parallel_size: 2}\n")
    run(paths, "set", "demo", "a/b")
    assert drop_in(paths) == {"model": {"id": "a/b"}}


@pytest.mark.parametrize(
    ("choice", "status", "words"),
    [("qwen3-8", 64, "did you mean qwen3-8b?"), ("nonsense", 64, "lists them"), ("a/b/c", 64, "there is no preset"), ("~nobody-is-called-so/x", 64, "there is no such user"), ("gemma4-26b-a4b", 78, "No configuration for gemma4-26b-a4b on nvidia-older hardware")],
)
def test_what_is_neither_is_refused(choice: str, status: int, words: str, paths: Paths) -> None:
    with pytest.raises(VllmdError) as refused:
        run(paths, "set", "demo", choice)
    assert refused.value.status == status
    assert words in refused.value.what + refused.value.hint
    assert list(paths.config.iterdir()) == []


def test_without_a_choice_and_without_one_before_it_says_how(paths: Paths) -> None:
    with pytest.raises(UsageError, match="nothing was chosen for demo yet") as refused:
        run(paths, "set", "demo")
    assert "model presets demo" in refused.value.hint


def test_a_broken_preset_is_told_when_it_is_chosen_and_takes_no_other_away(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    (paths.config / "presets").mkdir()
    (paths.config / "presets/qwen3-8b.yaml").write_text("tiers: {cpu: {modle: x/y}}\n")
    with pytest.raises(ConfigError, match=r"presets/qwen3-8b.yaml:1: tiers.cpu.modle: unknown key"):
        run(paths, "set", "demo", "qwen3-8b")
    assert run(paths, "presets") == 0
    shown = capsys.readouterr()
    assert "presets/qwen3-8b.yaml:1" in shown.err
    assert "qwen3-8b" not in shown.out
    assert "qwen36-27b" in shown.out


def test_what_does_not_fit_can_be_forced(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, Card(0, "GPU-0", "RTX 4090", capability="8.9", memory_mib=24564))
    with pytest.raises(ConfigError, match="it needs 44 GiB, and 1 x RTX 4090 has 23 GiB"):
        run(paths, "set", "demo", "llama-33-70b")
    run(paths, "set", "demo", "llama-33-70b", "--force")
    assert drop_in(paths)["serve"]["max_model_len"] == 8192


# -- show, clear


def test_clear_takes_the_model_of_the_instance_s_own_file_away_too_and_remembers_the_choice(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    (paths.config / "demo.yaml").write_text("model: {id: old/model, revision: main}\n")
    assert run(paths, "show", "demo") == 0
    assert "old/model" in capsys.readouterr().out
    run(paths, "set", "demo", "qwen3-8b")
    assert run(paths, "clear", "demo") == 0
    capsys.readouterr()
    assert run(paths, "show", "demo") == 3
    assert "No model selected. Run: vllmctl --root" in capsys.readouterr().out
    assert run(paths, "show", "demo", "--json") == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["preset"], said["cleared"]) == (None, "qwen3-8b", True)
    assert run(paths, "set", "demo") == 0
    assert model_file.read(paths, "demo").choice == "qwen3-8b"
    assert run(paths, "show", "demo", "--json") == 0
    for words in (["show", "absent"], ["clear", "absent"]):
        with pytest.raises(UsageError, match="there is no instance absent"):
            run(paths, *words)


# -- the restart


@pytest.mark.parametrize(("active", "is_restarted"), [("active", True), ("activating", True), ("inactive", False), ("failed", False)])
def test_an_instance_that_runs_is_restarted(active: str, is_restarted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(units, "runs", lambda _scope: True)
    monkeypatch.setattr(units.Systemd, "show", lambda _self, _name: UnitState(active=active))
    monkeypatch.setattr(follow, "bring_up", lambda _paths, verb, name, **_: asked.append(f"{verb} {name}"))
    paths = Paths("user", tmp_path, tmp_path, tmp_path, tmp_path, tmp_path)
    assert model_set.restarted(paths, "demo") is is_restarted
    assert asked == (["restart demo"] if is_restarted else [])
    assert ("start it: vllmctl --user start demo" in capsys.readouterr().out) is not is_restarted


def test_a_restart_that_fails_names_the_way_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: Any, **__: Any) -> int:
        raise TryLater("x", "demo did not start", "look")

    monkeypatch.setattr(units, "runs", lambda _scope: True)
    monkeypatch.setattr(units.Systemd, "show", lambda _self, _name: UnitState(active="active"))
    monkeypatch.setattr(follow, "bring_up", failing)
    with pytest.raises(TryLater) as failed:
        model_set.restarted(Paths("user", tmp_path, tmp_path, tmp_path, tmp_path, tmp_path), "demo")
    assert failed.value.hint == "look; the configuration that was ready before: vllmctl --user rollback demo"


def test_numbers_with_a_point_stay_what_they_are(paths: Paths) -> None:
    (paths.config / "presets").mkdir()
    text = 'tiers: {nvidia-older: {model: a/b, min_gib: 1, serve: {gpu_memory_utilization: 0.9}, args: {x: 1.10, y: "0.5"}}}\n'
    (paths.config / "presets/mine.yaml").write_text(text)
    run(paths, "set", "demo", "mine")
    assert drop_in(paths)["serve"]["gpu_memory_utilization"] == 0.9
    assert drop_in(paths)["engine"]["args"] == {"x": "1.10", "y": "0.5"}


# -- what a preset wants beside its model


def gemma(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    has(monkeypatch, Card(0, "GPU-0", "H200", capability="9.0", memory_mib=143771))
    run(paths, "set", "demo", "gemma4-31b")
    return dict(drop_in(paths)["engine"]["args"])


def test_a_chat_template_and_a_draft_model_are_used_where_they_are(paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = gemma(paths, monkeypatch)
    assert not {"chat-template", "speculative-config"} & set(args)
    told = capsys.readouterr().out
    assert "the chat template tool_chat_template_gemma4.jinja is not here: the model's own is used" in told
    assert f"VLLM_MODEL=gemma-4-31B-it-assistant VLLM_MODEL_ORG=google VLLM_MODELS_DIR={paths.models} VLLM_MODEL_ENV_FILE=/tmp/draft.env vllm-resolve-model" in told
    (paths.config / "presets").mkdir()
    template = paths.config / "presets/tool_chat_template_gemma4.jinja"
    template.write_text("{{ messages }}")
    draft = paths.models / label(request_from(Model(id="google/gemma-4-31B-it-assistant", name="gemma-4-31B-it-assistant"), paths.models))
    draft.mkdir(parents=True)
    (draft / "config.json").write_text("{}")
    args = gemma(paths, monkeypatch)
    assert args["chat-template"] == str(template)
    assert args["speculative-config"] == {"method": "mtp", "model": str(draft), "num_speculative_tokens": 4}
    assert "note     the chat" not in capsys.readouterr().out


def test_a_template_of_the_engine_s_own_environment_goes_before_ours(paths: Paths) -> None:
    run(paths, "set", "demo", "llama-33-70b")
    assert drop_in(paths)["engine"]["args"]["chat-template"].endswith("share/chat-templates/llama3-json-tools.jinja")
    theirs = paths.engines / "vllm-1/lib/python3.12/site-packages/vllm/examples/tool_chat_template_llama3.2_json.jinja"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("")
    (paths.config / "demo.yaml").write_text(f"engine: {{executable: {paths.engines}/vllm-1/bin/vllm}}\n")
    (paths.engines / "vllm-1/bin").mkdir()
    (paths.engines / "vllm-1/bin/vllm").write_text("#!/bin/sh\n")
    (paths.engines / "vllm-1/bin/vllm").chmod(0o755)
    run(paths, "set", "demo", "llama-33-70b")
    assert drop_in(paths)["engine"]["args"]["chat-template"] == str(theirs)


def test_a_card_without_a_driver_is_told_before_the_processor_is_chosen(paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    has(monkeypatch, notes=("an NVIDIA card is there, and no driver answers",))
    run(paths, "set", "demo", "qwen3-0.6b")
    assert "note     an NVIDIA card is there, and no driver answers" in capsys.readouterr().out


def test_the_number_of_gpus_in_the_instance_s_file_holds_unless_another_one_is_given(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    (paths.config / "demo.yaml").write_text("gpus: 1\n")
    run(paths, "set", "demo", "qwen36-35b-a3b")
    assert (drop_in(paths)["gpus"], drop_in(paths)["serve"]["max_model_len"]) == (1, 131072)
    capsys.readouterr()
    run(paths, "presets", "demo", "--json")
    [row] = [each for each in json.loads(capsys.readouterr().out)["presets"] if each["id"] == "qwen36-35b-a3b"]
    assert (row["gpus"], row["max_model_len"]) == (1, 131072), "it is shown as it would be set"
    run(paths, "set", "demo", "qwen36-35b-a3b", "--gpus", "2")
    assert (drop_in(paths)["gpus"], drop_in(paths)["serve"]["max_model_len"]) == (2, 262144)
    (paths.config / "demo.yaml").write_text("gpus: 3\n")
    with pytest.raises(ConfigError, match="3 GPUs are wanted, and there are 2 alike"):
        run(paths, "set", "demo", "qwen36-35b-a3b", "--force")


def test_the_choice_of_gpus_is_remembered_only_for_the_same_choice(paths: Paths) -> None:
    run(paths, "set", "demo", "qwen36-35b-a3b", "--gpus", "1")
    run(paths, "set", "demo")
    assert drop_in(paths)["gpus"] == 1
    run(paths, "set", "demo", "qwen36-35b-a3b")
    assert drop_in(paths)["gpus"] == 2


def test_an_engine_that_was_built_for_something_else_is_told(paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    directory = paths.engines / "vllm-1"
    (directory / "bin").mkdir(parents=True)
    (directory / "bin/vllm").write_text("#!/bin/sh\n")
    (directory / "bin/vllm").chmod(0o755)
    (paths.engines / record.CURRENT).symlink_to(directory.name)
    known = tuple(f"--{name}" for name in ("model", "host", "port", "uds", "served-model-name", "middleware", "dtype", "gpu-memory-utilization", "max-model-len"))
    for variant, is_told in (("cpu", True), ("cuda", False)):
        record.write(directory, record.Record("0.32.0", variant, known, ()))
        try:
            run(paths, "set", "demo", "a/b")
        except VllmdError as error:
            pytest.fail(f"{error.what}")
        assert ("is a build for cpu: vllmctl engine install --cuda" in capsys.readouterr().out) is is_told
    has(monkeypatch)
    with pytest.raises(ConfigError, match="2 GPUs are wanted, and there is none"):
        run(paths, "set", "demo", "a/b", "--gpus", "2")
