"""No secret in what is printed: command lines, text, environments, and the configuration itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.config import layers, redact, show
from vllmd.config.paths import root_paths
from vllmd.engines.vllm_tuning import Tuning

pytestmark = pytest.mark.unit

FLAGS = ["--api-key", "--token", "--access-token", "--api-token", "--auth", "--authorization", "--password", "--secret", "--jwt", "--bearer", "--hf-token", "--API_KEY"]
HEADERS = ["Authorization", "Proxy-Authorization", "Cookie", "Set-Cookie", "X-API-Key", "Api-Key", "X-My-Bearer", "x-auth-token", "MyApiKey"]


@pytest.mark.parametrize("flag", FLAGS)
def test_values_of_secret_flags_are_hidden_in_both_forms(flag: str) -> None:
    assert redact.redact_argv(["x", flag, "s3", "--port", "1"]) == ("x", flag, "<redacted>", "--port", "1")
    assert redact.redact_argv(["x", f"{flag}=s3", "--port", "1"]) == ("x", f"{flag}=<redacted>", "--port", "1")
    for text in (f"run {flag} p4ss --port 1", f"run {flag}=p4ss --port 1", f"run {flag} 'p4 ss' --port 1"):
        shown = redact.redact_text(text)
        assert "p4" not in shown
        assert "ss'" not in shown
        assert shown.endswith("--port 1")


def test_a_flag_that_takes_several_keys_hides_all() -> None:
    assert redact.redact_argv(["--api-key", "a", "b", "--port", "1"])[1:] == ("<redacted>", "<redacted>", "--port", "1")


@pytest.mark.parametrize("header", HEADERS)
def test_values_of_secret_headers_are_hidden(header: str) -> None:
    assert redact.redact_argv(["-H", f"{header}: Bearer abc"]) == ("-H", f"{header}: <redacted>")
    assert redact.redact_argv([f"--header={header}: abc"]) == (f"--header={header}: <redacted>",)


def test_what_is_no_secret_stays() -> None:
    argv = ["vllm", "serve", "/m", "--tokenizer", "/t", "--max-num-batched-tokens", "5", "--tokenizer-mode=auto", "--host", "a:b"]
    assert redact.redact_argv(argv) == tuple(argv)
    text = "Avg generation throughput: 5 tokens/s, bearer of news, keys: 3, http://h:80/x author: me"
    assert redact.redact_text(text) == text


@pytest.mark.parametrize(
    "text",
    ["Authorization: Bearer s3cretvalue", "got 'X-API-Key': 's3cretvalue'", "https://user:s3cretvalue@host/x", "Bearer s3cretvalue", "hf_s3cretvalues3cretvalue", "x-auth-token: s3cretvalue", "args: {'api_key': ['s3cretvalue'], 'port': 1}", "password=s3cretvalue", "GET https://cdn/x?X-Amz-Signature=s3cretvalue&a=1", "/x?token=s3cretvalue"],
)
def test_secrets_are_hidden_by_where_they_stand(text: str) -> None:
    assert "s3cretvalue" not in redact.redact_text(text)
    assert "<redacted>" in redact.redact_text(text)


@given(st.text(st.characters(exclude_characters="\0"), min_size=4, max_size=30).filter(lambda text: text.strip() and text not in "<redacted>"), st.text(max_size=10), st.text(max_size=10))
def test_a_known_secret_never_survives(secret: str, before: str, after: str) -> None:
    assert secret not in redact.redact_text(before + secret + after, [secret]).replace("<redacted>", "\0")
    assert json.dumps(secret)[1:-1] not in redact.redact_text(json.dumps({"k": secret}), [secret]).replace("<redacted>", "\0")


def test_a_secret_that_is_no_utf8_is_hidden() -> None:
    assert redact.redact_text("a abcd\udcff b", ["abcd\udcff"]) == "a <redacted> b"


@pytest.mark.parametrize("unit", ["a", "-", "--", "a-", "token", "api_key", "https://", "a:", "'", "x-", "bearer "])
def test_a_hostile_line_costs_milliseconds(unit: str) -> None:
    line = unit * (16384 // len(unit))
    before = time.process_time()
    redact.redact_text(line, ["hunter2222"])
    redact.redact_argv([line], ["hunter2222"])
    assert time.process_time() - before < 0.5


def test_a_very_short_secret_does_not_shred_the_text() -> None:
    assert redact.redact_text("a cat, key=a", ["a"]) == "<redacted> cat, key=<redacted>"


def test_an_overlapping_secret_is_hidden_whole() -> None:
    assert redact.redact_text("x abcdefgh y", ["abcd", "abcdefgh"]) == "x <redacted> y"


def test_environments_hide_by_name_and_by_value() -> None:
    environ = {"VLLM_API_KEY": "k", "HF_TOKEN": "t", "AWS_SECRET_ACCESS_KEY": "s", "SSL_KEY_FILE": "/k", "TOKENIZERS_PARALLELISM": "0", "X": "has hunter2", "HF_HUB_TOKEN_PATH": "/p"}
    assert redact.redact_environment(environ, ["hunter2"]) == {
        **environ,
        "VLLM_API_KEY": "<redacted>",
        "HF_TOKEN": "<redacted>",
        "AWS_SECRET_ACCESS_KEY": "<redacted>",
        "X": "has <redacted>",
    }


def test_the_shown_configuration_has_every_value_and_no_secret(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    paths.config.mkdir()
    (paths.config / "a.yaml").write_text(
        "model: Q/A\nserve: {api_key: hunter2222}\nengine:\n  args: {x: 'uses hunter2222', hf-token: zzzzzz}\n  env: {MY_TOKEN: yyyyyy, P: a}\n"
    )
    loaded = layers.load(paths, "a", {"HF_TOKEN": "hf_1", "VLLM_PORT": "81"}, {"log.level": "debug"}, lambda _name: Tuning)
    printed = show.origin_table(loaded)
    data = show.as_dict(loaded)
    for text in (printed, json.dumps(data), repr(loaded.origins)):
        for secret in ("hunter2222", "zzzzzz", "yyyyyy", "hf_1"):
            assert secret not in text
    assert data["config"]["serve"]["port"] == 81
    assert data["config"]["serve"]["api_key"] == "<redacted>"
    assert data["config"]["gpus"] == "all"
    assert data["origins"]["serve.port"] == "VLLM_PORT (environment)"
    assert set(data["config"]["serve"]) >= {"host", "max_model_len"}
    rows = {line.split()[0]: line for line in printed.splitlines()}
    assert rows["serve.port"].split() == ["serve.port", "81", "VLLM_PORT", "(environment)"]
    assert rows["engine.env.P"].endswith("a.yaml:5")
    assert rows["log.level"].endswith("command line")
    assert rows["stop.kill_timeout_s"].split() == ["stop.kill_timeout_s", "15.0", "s", "built-in"]
    assert "built-in" not in show.origin_table(loaded, only_set=True)
    assert set(show.secrets(loaded.config)) == {"hunter2222", "hf_1", "yyyyyy", "zzzzzz"}
