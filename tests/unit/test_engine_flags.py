"""Whatever way a flag is spelled, it is the same flag; and what is typed wrong is said before vLLM is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine_contexts import FLAGS, context, installed
from vllmd.engines import vllm_flags
from vllmd.engines.protocol import SettingRefused
from vllmd.engines.vllm import Vllm
from vllmd.engines.vllm_check import pass_through

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("spelling", "flag"),
    [
        ("-tp", "--tensor-parallel-size"),
        ("-tp=2", "--tensor-parallel-size"),
        ("--tensor_parallel_size", "--tensor-parallel-size"),
        ("--tensor-parallel_size=4", "--tensor-parallel-size"),
        ("--tensor-par", "--tensor-parallel-size"),
        ("--hos", "--host"),
        ("--served", "--served-model-name"),
        ("--no-enable-prefix-caching", "--enable-prefix-caching"),
        ("--no_enforce_eager", "--enforce-eager"),
        ("--compilation-config.mode", "--compilation-config"),
        ("--model-impl", "--model-impl"),
        ("--portable", "--portable"),
        ("--max", "--max"),  # ambiguous: argparse refuses it
        ("-O3", "--optimization-level"),
    ],
)
def test_a_flag_has_one_name_however_it_is_spelled(spelling: str, flag: str) -> None:
    assert vllm_flags.canonical(spelling, FLAGS) == flag


@pytest.mark.parametrize(
    "key",
    [
        "port",
        "tensor-parallel-size",
        "tensor_parallel_size",
        "-tp",
        "--api-key",
        "shutdown-timeout",
        "config",
        "uds",
        "served-model-nam",
    ],
)
def test_an_owned_flag_in_args_is_refused_and_names_its_setting(tmp_path: Path, key: str) -> None:
    where = context(tmp_path, {"engine.args": {key: "1"}})
    with pytest.raises(SettingRefused, match="is set by vllmd, from ") as caught:
        Vllm().check(where)
    assert caught.value.key == f"engine.args.{key}"
    assert caught.value.status == 78


def test_an_owned_flag_is_dropped_with_a_warning_when_flags_are_not_strict(tmp_path: Path) -> None:
    where = context(tmp_path, {"engine.args": {"port": 9, "dtype": "half"}, "engine.strict_flags": "false"})
    assert any("engine.args.port" in warning for warning in Vllm().check(where))
    argv = Vllm().command(where, "/m").argv
    assert "9" not in argv
    assert argv[argv.index("--dtype") + 1] == "half"


@pytest.mark.parametrize(
    "argv", [["--port", "9"], ["--port=9"], ["-tp", "2"], ["--tensor_parallel_size=2"], ["--host", "::"], ["--no-host"]]
)
def test_an_owned_flag_after_the_dashes_is_refused(tmp_path: Path, argv: list[str]) -> None:
    with pytest.raises(SettingRefused, match=r"the command line.* set by vllmd"):
        pass_through(argv, context(tmp_path))


def test_owned_flags_are_removed_together_with_their_values() -> None:
    argv = [
        "--dtype",
        "half",
        "--served-model-name",
        "a",
        "b",
        "--port=9",
        "--enforce-eager",
        "kept",
        "--host=x",
        "kept",
        "-tp",
        "2",
        "--max-model-len",
        "9",
    ]
    assert vllm_flags.without_owned(argv, installed()) == [
        "--dtype",
        "half",
        "--enforce-eager",
        "kept",
        "kept",
        "--max-model-len",
        "9",
    ]


def test_an_unknown_flag_gets_a_suggestion_before_anything_is_run(tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match=r"vLLM 0\.32\.0 has no flag --enforce-eagre") as caught:
        Vllm().check(context(tmp_path, {"engine.args": {"enforce-eagre": True}}))
    assert caught.value.hint == "did you mean --enforce-eager?"


@pytest.mark.parametrize("key", ["load-format", "load_format", "--load-format"])
def test_a_format_that_loads_pickles_needs_leave(tmp_path: Path, key: str) -> None:
    known = FLAGS | {"--load-format"}
    with pytest.raises(SettingRefused) as caught:
        Vllm().check(context(tmp_path, {"engine.args": {key: "pt"}}, flags=known))
    assert caught.value.code == "load_format_pickle"
    Vllm().check(context(tmp_path, {"engine.args": {key: "pt"}, "model.allow_pickle": True}, flags=known))
    Vllm().check(context(tmp_path, {"engine.args": {key: "safetensors"}}, flags=known))


def test_flags_of_an_unrecorded_engine_are_not_checked_and_that_is_said(tmp_path: Path) -> None:
    where = context(tmp_path, {"engine.args": {"whatever": True}}, flags=frozenset())
    assert any("flags are not known" in warning for warning in Vllm().check(where))
    assert "--shutdown-timeout" not in Vllm().command(where, "/m").argv


def test_an_older_version_is_used_without_what_it_lacks(tmp_path: Path) -> None:
    where = context(tmp_path, version="0.9.0", flags=FLAGS - {"--shutdown-timeout"})
    assert any("no --shutdown-timeout" in warning for warning in Vllm().check(where))
    assert "--shutdown-timeout" not in Vllm().command(where, "/m").argv


@pytest.mark.parametrize(
    ("value", "arguments"),
    [
        (True, ["--x"]),
        (3, ["--x", "3"]),
        ("-1", ["--x=-1"]),
        ({"a": 1}, ["--x", '{"a": 1}']),
        (["a", "b"], ["--x", "a", "b"]),
        (["-a", "b"], ["--x=-a", "--x", "b"]),
        ([], []),
    ],
)
def test_values_become_arguments(value: Any, arguments: list[str]) -> None:
    assert vllm_flags.render("x", value, installed()) == arguments


def test_false_is_the_negative_flag_or_nothing_where_there_is_none() -> None:
    assert vllm_flags.render("enforce_eager", False, installed()) == ["--no-enforce-eager"]
    assert vllm_flags.render("headless", False, installed()) == []


def test_a_flag_that_takes_one_value_at_a_time_is_repeated() -> None:
    assert vllm_flags.render("middleware", ["a.b", "c.d"], installed()) == [
        "--middleware",
        "a.b",
        "--middleware",
        "c.d",
    ]


def test_a_flag_and_its_setting_at_once_are_an_error(tmp_path: Path) -> None:
    Vllm().check(context(tmp_path, {"engine.args": {"max-model-len": 10}}))
    with pytest.raises(SettingRefused, match=r"serve\.max_model_len is set too"):
        Vllm().check(context(tmp_path, {"engine.args": {"max_model_len": 10}, "serve.max_model_len": "20"}))


def test_one_flag_in_two_spellings_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match="same flag"):
        Vllm().check(context(tmp_path, {"engine.args": {"enforce-eager": True, "no_enforce_eager": True}}))


def test_a_json_flag_may_be_given_in_parts(tmp_path: Path) -> None:
    where = context(tmp_path, {"engine.args": {"compilation-config.mode": 0, "compilation-config.level": 1}})
    Vllm().check(where)
    assert "--compilation-config.mode" in Vllm().command(where, "/m").argv
