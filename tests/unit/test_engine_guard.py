"""How vLLM is told to ask our guard, and what it is told where it cannot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.engine_contexts import FLAGS, context, guarded
from vllmd.engines.vllm import Vllm
from vllmd.errors import ConfigError

pytestmark = pytest.mark.unit

GIVEN = {"VLLM_API_KEY": "sk-of-a-person"}


def test_the_guard_is_the_outermost_and_vllm_is_told_no_key(tmp_path: Path) -> None:
    where = guarded(tmp_path, {"engine.args": {"middleware": ["my.One", "my.Two"]}}, GIVEN, client_keys=("made",))
    command = Vllm().command(where, "/m")
    given = [command.argv[at + 1] for at, word in enumerate(command.argv) if word == "--middleware"]
    assert given == ["my.One", "my.Two", "vllmd_guard.Guard"], "the last one is asked first"
    assert command.argv[-2:] == ("--middleware", "vllmd_guard.Guard")
    assert command.private_files == {}
    assert command.env["VLLMD_GUARD_FILE"] == str(tmp_path / "run/i/demo/guard.json")
    assert set(command.secrets) == {"internal-key", "sk-of-a-person", "made"}
    assert not any(secret in text for text in (*command.argv, *command.env.values()) for secret in command.secrets)


def test_the_engine_finds_the_guard_and_nothing_else_of_ours(tmp_path: Path) -> None:
    directory = Path(Vllm().command(guarded(tmp_path), "/m").env["PYTHONPATH"])
    assert importlib.util.spec_from_file_location("vllmd_guard", directory / "vllmd_guard.py")
    assert {path.name for path in directory.iterdir()} <= {"vllmd_guard.py", "__init__.py", "__pycache__"}


def test_our_own_requests_carry_the_key_of_the_launch(tmp_path: Path) -> None:
    where = guarded(tmp_path, {}, GIVEN)
    assert Vllm().headers(where) == {"Authorization": "Bearer internal-key"}
    assert {dict(proof.headers)["Authorization"] for proof in Vllm().proofs(where, "generate")} == {"Bearer internal-key"}
    assert Vllm().headers(context(tmp_path, {"serve.auth": "none"})) == {}


def test_a_version_without_middleware_is_told_all_keys(tmp_path: Path) -> None:
    where = guarded(tmp_path, {}, GIVEN, client_keys=("made",), flags=FLAGS - {"--middleware"})
    command = Vllm().command(where, "/m")
    assert not Vllm().guards(where)
    assert "--middleware" not in command.argv
    assert "PYTHONPATH" not in command.env
    (content,) = command.private_files.values()
    assert yaml.safe_load(content) == {"api-key": ["internal-key", "sk-of-a-person", "made"]}
    assert any("guard /v1" in warning for warning in Vllm().check(where))


def test_a_version_whose_flags_are_not_known_is_guarded(tmp_path: Path) -> None:
    """Should it lack the flag, it does not start, and nothing is open."""
    assert Vllm().guards(guarded(tmp_path, flags=frozenset()))


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"engine.args": {"grpc": True}}, "engine.args.grpc"),
        ({"engine.args": {"grpc_port": 9000}}, "engine.args.grpc-port"),
        ({"engine.env": {"VLLM_USE_RUST_FRONTEND": "1"}}, "engine.env.VLLM_USE_RUST_FRONTEND"),
        ({"engine.config_file": "grpc: true\n"}, "engine.args.grpc"),
    ],
)
def test_a_server_that_asks_no_middleware_is_refused(tmp_path: Path, settings: dict[str, Any], place: str) -> None:
    if "engine.config_file" in settings:
        (tmp_path / "c.yaml").write_text(settings["engine.config_file"])
        settings = {"engine.config_file": str(tmp_path / "c.yaml")}
    with pytest.raises(ConfigError, match="without a key") as caught:
        Vllm().check(guarded(tmp_path, settings))
    assert place in caught.value.what
    Vllm().check(context(tmp_path, {**settings, "serve.auth": "none"}))


def test_an_inherited_rust_front_end_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="VLLM_USE_RUST_FRONTEND"):
        Vllm().check(guarded(tmp_path, {}, {"VLLM_USE_RUST_FRONTEND": "1"}))
    Vllm().check(guarded(tmp_path, {"engine.env": {"VLLM_USE_RUST_FRONTEND": "0"}}, {"VLLM_USE_RUST_FRONTEND": "1"}))
    Vllm().check(guarded(tmp_path, {"engine.args": {"grpc": False}}))


def test_no_key_and_a_key_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Vllm().check(context(tmp_path, {"serve.auth": "none"}, GIVEN))
    assert caught.value.code == "auth_contradiction"
    assert "sk-of" not in caught.value.what + caught.value.hint


def test_an_open_instance_that_others_reach_is_warned_about(tmp_path: Path) -> None:
    said = Vllm().check(context(tmp_path, {"serve.auth": "none", "serve.host": "0.0.0.0"}))
    assert any("whoever reaches 0.0.0.0:8000" in line for line in said)
    for settings in ({"serve.auth": "none"}, {"serve.host": "0.0.0.0"}, {"serve.auth": "none", "serve.host": "0.0.0.0", "serve.listen": "uds"}):
        assert not any("whoever" in line for line in Vllm().check(context(tmp_path, settings)))
