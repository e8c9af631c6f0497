"""A model is chosen, started, switched and cleared: the real command, the real supervisor, the fake engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.component.daemons import quick, stop
from tests.harness import Instance
from vllmd.models import demo

pytestmark = pytest.mark.component

PRESET = """
title: Tiny
tiers:
  cpu:
    model: test/small
    min_gib: 1
    context: {1: 256}
    args: {enforce-eager: true}
"""


def model(instance: Instance, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [str(Path(sys.executable).parent / "vllmctl"), "--root", str(instance.root), "model", *words]
    environ = {"PATH": os.environ["PATH"], "HOME": str(instance.root), "LD_LIBRARY_PATH": "/nowhere"}
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60, check=False)


def chosen(instance: Instance, *words: str) -> str:
    done = model(instance, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def again(instance: Instance) -> Any:
    """What a restart of the unit does."""
    stop(instance)
    instance.start()
    return instance.wait_ready()


def argv(instance: Instance) -> list[str]:
    return instance.engine_process("main").cmdline.split()


def answers(instance: Instance, name: str) -> bool:
    status, body = instance.ask("/v1/completions", {"model": name, "prompt": "Hello", "max_tokens": 1})
    return status == 200 and json.loads(body)["model"] == name


def without_model() -> Instance:
    """With a store of two models, and a preset of the administrator's own."""
    made = quick()
    made.config = {**{key: value for key, value in made.config.items() if key != "model"}, "serve": {"port": made.port}}
    made.write_config()
    for name, seed in (("small", 1), ("other", 2)):
        demo.make(made.root / f"lib/models/{name}", seed=seed)
    (made.root / "etc/presets").mkdir()
    (made.root / "etc/presets/tiny.yaml").write_text(PRESET)
    return made


def test_set_start_switch_and_clear() -> None:
    with without_model() as instance:
        ready = instance.wait_ready()
        assert ready.get("STATUS") == (
            f"No model selected. Run: vllmctl --root {instance.root} model set demo PRESET|MODEL (vllmctl --root {instance.root} model presets shows what fits)"
        )
        assert instance.engine() == []

        told = chosen(instance, "set", "demo", "tiny", "--", "--max-num-seqs", "3")
        assert "run by hand: end it and run it again" in told
        assert again(instance).get("STATUS").startswith("Serving small at")
        assert {"--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "3"} <= set(argv(instance))
        assert answers(instance, "small")

        chosen(instance, "set", "demo", "test/other")
        assert answers(instance, "small"), "what runs is left alone until it is restarted"
        assert again(instance).get("STATUS").startswith("Serving other at")
        assert answers(instance, "other")
        assert not {"--max-model-len", "--max-num-seqs", "--enforce-eager"} & set(argv(instance)), "nothing is left of the preset"

        chosen(instance, "clear", "demo")
        assert again(instance).get("STATUS").startswith("No model selected. Run: vllmctl")
        assert instance.status()["state"] == "unconfigured"
        assert instance.engine() == []

        chosen(instance, "set", "demo", "tiny")
        again(instance)
        assert answers(instance, "small")
        stop(instance)


def test_what_the_engine_does_not_know_is_refused_before_anything_is_written() -> None:
    with without_model() as instance:
        instance.wait_ready()
        refused = model(instance, "set", "demo", "tiny", "--", "--max-nim-seqs", "3")
        assert refused.returncode == 78
        assert f"{instance.root}/etc/demo.d/50-model.yaml" in refused.stderr
        assert "did you mean --max-num-seqs?" in refused.stderr
        assert not (instance.root / "etc/demo.d/50-model.yaml").exists()
        stop(instance)


def test_a_broken_preset_takes_no_other_away() -> None:
    with without_model() as instance:
        instance.wait_ready()
        (instance.root / "etc/presets/broken.yaml").write_text("title: x\ntiers:\n  cpu: {model: nonsense, min_gib: 1}\n")
        done = model(instance, "presets", "demo")
        assert done.returncode == 0
        assert f"{instance.root}/etc/presets/broken.yaml:3: tiers.cpu.model: must be ORG/NAME, not 'nonsense'" in done.stderr
        assert "tiny" in done.stdout
        chosen(instance, "set", "demo", "tiny")
        stop(instance)
