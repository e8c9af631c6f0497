"""Flags of vLLM on `vllmctl model set`'s command line: as settings, refused, or told to be secrets; and files that are in its way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllmd import ctl
from vllmd.config.paths import Paths, root_paths
from vllmd.core.tiers import Card
from vllmd.ctl import model_file, model_flags, model_hardware
from vllmd.ctl.model_hardware import Equipment
from vllmd.errors import UsageError, VllmdError

pytestmark = pytest.mark.unit


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setattr(model_hardware, "look", lambda *_: Equipment((Card(0, "GPU-0", "A100", capability="8.0", memory_mib=81920),), 64 * 1024))
    monkeypatch.setenv("PATH", "/nowhere")
    found = root_paths(tmp_path)
    found.config.mkdir()
    return found


def run(paths: Paths, *words: str) -> int:
    return ctl.run(["--root", str(paths.config.parent), "model", *words])


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--enforce-eager", {"engine": {"args": {"enforce-eager": True}}}),
        ("--no-enforce-eager", {"engine": {"args": {"enforce-eager": False}}}),
        ("--max_num_seqs 8", {"engine": {"args": {"max-num-seqs": 8}}}),
        ("--max-num-seqs=8", {"engine": {"args": {"max-num-seqs": 8}}}),
        ("--max-model-len 8192 --kv-cache-dtype fp8", {"serve": {"max_model_len": 8192, "kv_cache_dtype": "fp8"}}),
        ("--enable-prefix-caching", {"serve": {"prefix_caching": True}}),
        ("--no-enable-prefix-caching", {"serve": {"prefix_caching": False}}),
        ('--speculative-config {"method":"mtp"}', {"engine": {"args": {"speculative-config": {"method": "mtp"}}}}),
        ("--speculative-config.method mtp", {"engine": {"args": {"speculative-config.method": "mtp"}}}),
        ("--allowed-origins a b", {"engine": {"args": {"allowed-origins": ["a", "b"]}}}),
        ("-O3", {"engine": {"args": {"optimization-level": 3}}}),
        ("--seed -1", {"engine": {"args": {"seed": -1}}}),
        ("", {}),
    ],
)
def test_flags_become_settings(words: str, settings: dict[str, Any]) -> None:
    assert model_flags.settings(words.split()) == settings


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--port 9000", "is set by serve.port"), ("-tp 2", "follows from the GPUs"), ("--tensor_parallel_size=2", "follows from the GPUs"), ("--model a/b", "is set by model"),
        ("word", "is no flag"), ("-x", "is no flag of vLLM"), ("--", "is no flag of vLLM"), ("--=3", "is no flag of vLLM"), ("--no-", "is no flag of vLLM"), ("--\x1b[31m", "is no flag of vLLM"), ("--no-enforce-eager 1", "takes no value"), ("--x {bad", "is not JSON"), ("--api-key secret", "is set by serve.api_key"),
        ("--x " + "[" * 100_000, "is not JSON"),
    ],
)  # fmt: skip
def test_flags_that_belong_elsewhere_are_refused(words: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        model_flags.settings(words.split())
    assert refused.value.hint


# -- what is in the way of the files


@pytest.mark.parametrize("verb", ["set", "show", "clear"])
def test_no_verb_waits_for_what_is_no_file(verb: str, paths: Paths) -> None:
    run(paths, "set", "demo", "qwen3-8b")
    model_file.path(paths, "demo").unlink()
    os.mkfifo(model_file.path(paths, "demo"))
    with pytest.raises(VllmdError, match="not a regular file"):
        run(paths, verb, "demo", *(["qwen3-8b"] if verb == "set" else []))


def test_new_instances_that_are_made_at_once_have_ports_of_their_own(paths: Paths) -> None:
    """What was free when it was looked at is looked at again where nobody else writes."""
    names = [f"{letter * 4}" for letter in "aimqz"]
    children = []
    for name in names:
        pid = os.fork()
        if not pid:
            os._exit(run(paths, "set", name, "qwen3-8b"))
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(names)
    assert sorted(yaml.safe_load((paths.config / f"{name}.yaml").read_text())["serve"]["port"] for name in names) == list(range(8000, 8000 + len(names)))


def test_a_lock_that_somebody_holds_for_ever_holds_up_nobody(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "_PATIENCE_S", 0.1)
    with model_file.alone(paths):
        assert run(paths, "set", "demo", "qwen3-8b") == 0


@pytest.mark.parametrize("words", [("--hf-token", "hf_abcdefghijklmnopqrst"), ("--some-api-key=hf_abcdefghijklmnopqrst",), ("--max-num-seqs", "3", "--hf-overrides", '{"token": "hf_abcdefghijklmnopqrst"}')])
def test_a_secret_in_a_flag_is_told_and_shown_nowhere(words: tuple[str, ...], paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    run(paths, "set", "demo", "qwen3-8b", "--", *words)
    run(paths, "set", "demo", "qwen3-8b", "--json", "--", *words)
    run(paths, "show", "demo")
    run(paths, "show", "demo", "--json")
    said = capsys.readouterr().out
    flag = words[-2 if len(words) > 1 else 0].partition("=")[0]
    assert f"{flag} is a secret, and stands in that file" in said
    assert "hf_abcdefghijklmnopqrst" not in said
