"""`vllm-serve` as people use it today: environment in, one exec out, statuses 2 and 1."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.unit.engine_contexts import FLAGS, context
from vllmd.config.paths import root_paths
from vllmd.engines import record, serve_command
from vllmd.engines.vllm import Vllm

pytestmark = pytest.mark.unit

Serve = Callable[..., int]


class Executed(BaseException):
    """Stands for the moment in which this process would have become another."""

    def __init__(self, program: str, argv: Any, env: dict[str, str]) -> None:
        super().__init__(program)
        self.program, self.argv, self.env = program, list(argv), env


@pytest.fixture(autouse=True)
def no_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    def execve(program: str, argv: Any, env: dict[str, str]) -> NoReturn:
        raise Executed(program, argv, env)

    monkeypatch.setattr(os, "execve", execve)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    engine = tmp_path / "engines/vllm-0.32.0-cpu"
    (engine / "bin").mkdir(parents=True)
    (engine / "bin/vllm").touch(mode=0o755)
    record.write(engine, record.Record("0.32.0", "cpu", tuple(FLAGS)))
    (tmp_path / "engines/current").symlink_to(engine.name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model.env").write_text(
        f"export _VLLM_RESOLVED_MODEL={tmp_path}/model\n_VLLM_MODEL_IDENTITY=org/demo\nHF_HUB_OFFLINE=1\n"
    )
    return {
        "PATH": "/bin", "HOME": "/home/x", "VLLM_MODEL_ID": "org/demo", "VLLM_MODEL_ENV_FILE": str(tmp_path / "model.env"), "VLLM_TENSOR_PARALLEL_SIZE": "1",
        "VLLM_PIPELINE_PARALLEL_SIZE": "1", "VLLM_MAX_MODEL_LEN": "4096", "VLLM_MAX_NUM_BATCHED_TOKENS": "2048", "VLLM_KV_CACHE_DTYPE": "auto",
        "VLLM_SERVED_MODEL_NAME": "demo", "VLLM_PORT": "8123",
    }  # fmt: skip


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    def run(environ: dict[str, str], *argv: str, **more: Any) -> int:
        return serve_command.main(argv, environ, paths=root_paths(tmp_path), **more)

    return run


def test_it_becomes_vllm_for_the_resolved_model(serve: Serve, environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(Executed) as caught:
        serve(environ, "--dtype", "half", "--", "--max-num-seqs", "4")
    argv = caught.value.argv
    assert argv[1:3] == ["serve", f"{tmp_path}/model"]
    expected = {
        "--host": "127.0.0.1",
        "--port": "8123",
        "--max-model-len": "4096",
        "--kv-cache-dtype": "auto",
        "--served-model-name": "demo",
        "--dtype": "half",
        "--max-num-seqs": "4",
    }
    for flag, value in expected.items():
        assert argv[argv.index(flag) + 1] == value
    assert "VLLM_PORT" not in caught.value.env
    assert caught.value.env["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("name", serve_command.REQUIRED)
def test_a_required_variable_that_is_missing_is_2(
    serve: Serve, environ: dict[str, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (None, "", " "):
        changed = {key: text for key, text in environ.items() if key != name} | (
            {name: value} if value is not None else {}
        )
        assert serve(changed) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_TENSOR_PARALLEL_SIZE", "0"),
        ("VLLM_MAX_MODEL_LEN", "1.5"),
        ("VLLM_KV_CACHE_DTYPE", "a b"),
        ("VLLM_PORT", "tcp://1:2"),
        ("VLLM_MAX_TOKENS", "-1"),
        ("VLLM_PREFIX_CACHING", "perhaps"),
        ("VLLM_STRICT_FLAGS", "2"),
    ],
)
def test_a_wrong_variable_is_2(
    serve: Serve, environ: dict[str, str], name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(environ | {name: value}) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "_VLLM_RESOLVED_MODEL=",
        "_VLLM_RESOLVED_MODEL=$(id)",
        "_VLLM_RESOLVED_MODEL=/m\n_VLLM_MODEL_IDENTITY=org/other",
        "_VLLM_RESOLVED_MODEL=--trust-remote-code",
        '_VLLM_RESOLVED_MODEL="a\\nb"',
        "_VLLM_RESOLVED_MODEL=/nowhere/to/be/found",
        "not a line",
    ],
)
def test_an_env_file_that_does_not_fit_is_1(serve: Serve, environ: dict[str, str], content: str) -> None:
    Path(environ["VLLM_MODEL_ENV_FILE"]).write_text(content)
    assert serve(environ) == 1


def test_a_missing_env_file_is_1(serve: Serve, environ: dict[str, str]) -> None:
    assert serve(environ | {"VLLM_MODEL_ENV_FILE": "/nowhere"}) == 1


def test_the_revision_is_part_of_the_identity(serve: Serve, environ: dict[str, str]) -> None:
    assert serve(environ | {"VLLM_MODEL_REVISION": "v2"}) == 1


def test_the_env_file_is_looked_for_in_floxs_cache(serve: Serve, environ: dict[str, str], tmp_path: Path) -> None:
    derived = {key: value for key, value in environ.items() if key != "VLLM_MODEL_ENV_FILE"}
    assert serve(derived) == 2
    assert serve(derived | {"FLOX_ENV_CACHE": str(tmp_path / "nowhere")}) == 2
    derived["FLOX_ENV_CACHE"] = str(tmp_path)
    assert serve(derived, env_files=lambda _config: [tmp_path / "absent.env"]) == 1
    with pytest.raises(Executed):
        serve(derived, env_files=lambda _config: [tmp_path / "absent.env", tmp_path / "model.env"])


def test_the_env_file_may_not_choose_anything_but_the_model(serve: Serve, environ: dict[str, str]) -> None:
    with open(environ["VLLM_MODEL_ENV_FILE"], "a") as file:
        file.write("PATH=/evil\nLD_PRELOAD=/evil.so\nHF_HOME=/hf\n")
    with pytest.raises(Executed) as caught:
        serve(environ)
    assert "/evil" not in caught.value.env["PATH"]
    assert "LD_PRELOAD" not in caught.value.env
    assert caught.value.env["HF_HOME"] == "/hf"


def test_a_model_by_its_id_keeps_the_hubs_token(serve: Serve, environ: dict[str, str]) -> None:
    Path(environ["VLLM_MODEL_ENV_FILE"]).write_text("_VLLM_RESOLVED_MODEL=org/demo\n")
    with pytest.raises(Executed) as caught:
        serve(environ | {"HF_TOKEN": "hf_x"})
    assert (caught.value.env["HF_TOKEN"], caught.value.env["HF_HUB_OFFLINE"]) == ("hf_x", "0")


def test_dry_run_prints_and_executes_nothing(
    serve: Serve, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(environ, "--dry-run", "--chat-template", "a b") == 1  # not a flag of this vLLM
    capsys.readouterr()
    assert serve(environ, "--dry-run", "--dtype", "a b") == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("CMD: "))
    assert shlex.split(line)[-2:] == ["--dtype", "a b"]


def test_print_cmd_prints_and_executes(
    serve: Serve, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Executed):
        serve(environ, "--print-cmd")
    assert "CMD: " in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--port", "9"], ["--", "-tp", "2"], ["--served_model_name=x"]])
def test_an_owned_flag_is_1_or_dropped_with_a_warning(
    serve: Serve, environ: dict[str, str], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(environ, *argv) == 1
    assert "is set by vllmd" in capsys.readouterr().err
    with pytest.raises(Executed) as caught:
        serve(environ | {"VLLM_STRICT_FLAGS": "0"}, *argv)
    assert "WARN: the command line" in capsys.readouterr().err
    assert caught.value.argv[-1] not in ("9", "2", "--served_model_name=x")


def test_the_key_is_not_on_the_command_line_and_not_printed(
    serve: Serve, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Executed) as caught:
        serve(environ | {"VLLM_API_KEY": "sk-secret"}, "--print-cmd")
    assert not any("sk-secret" in argument for argument in caught.value.argv)
    assert caught.value.env["VLLM_API_KEY"] == "sk-secret"
    assert "sk-secret" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--hf-token", "sk-secret"], ["--hf-token=sk-secret"]])
def test_a_secret_that_was_typed_is_not_printed(
    serve: Serve, environ: dict[str, str], argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engines/vllm-0.32.0-cpu"
    record.write(engine, record.Record("0.32.0", "cpu", (*FLAGS, "--hf-token")))
    assert serve(environ, "--dry-run", *argv) == 0
    said = capsys.readouterr().err
    assert "--hf-token" in said
    assert "sk-secret" not in said


def test_a_word_that_is_no_flag_is_refused(
    serve: Serve, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(environ, "org/demo") == 1
    assert "'org/demo' is no flag" in capsys.readouterr().err


def test_a_served_name_is_never_a_flag(serve: Serve, environ: dict[str, str]) -> None:
    with pytest.raises(Executed) as caught:
        serve(environ | {"VLLM_SERVED_MODEL_NAME": "--trust-remote-code"})
    assert "--served-model-name=--trust-remote-code" in caught.value.argv


def test_a_key_that_cannot_be_sent_is_2(
    serve: Serve, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(environ | {"VLLM_API_KEY": "s3cr3t key"}) == 2
    assert "s3cr3t" not in capsys.readouterr().err


def test_prefix_caching_off_adds_nothing_here(serve: Serve, environ: dict[str, str]) -> None:
    with pytest.raises(Executed) as off:
        serve(environ | {"VLLM_PREFIX_CACHING": "no"})
    with pytest.raises(Executed) as on:
        serve(environ | {"VLLM_PREFIX_CACHING": "YES"})
    assert "--no-enable-prefix-caching" not in off.value.argv
    assert "--enable-prefix-caching" in on.value.argv


def test_floxs_configuration_file_is_used_when_none_is_named(
    serve: Serve, environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("dtype: half\n")
    with pytest.raises(Executed) as caught:
        serve(environ | {"FLOX_ENV_PROJECT": str(tmp_path)})
    assert caught.value.argv[caught.value.argv.index("--config") + 1] == str(tmp_path / "config.yaml")


def test_help_and_version_need_nothing(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve({}, "--help") == 0
    assert serve({}, "--version") == 0
    out = capsys.readouterr().out
    assert "usage: vllm-serve" in out
    assert "vllm-serve 0" in out


def test_an_instance_is_served_with_its_key_in_a_private_file(tmp_path: Path) -> None:
    where = context(tmp_path, environ={"VLLM_API_KEY": "sk-secret"})
    with pytest.raises(Executed) as caught:
        serve_command.serve_instance(where, Vllm(), Path("/m"), ["--max-num-seqs", "2"])
    private = tmp_path / "run/i/demo/engine-config.yaml"
    assert private.stat().st_mode & 0o777 == 0o600
    assert "sk-secret" in private.read_text()
    assert "sk-secret" not in repr((caught.value.argv, caught.value.env))
    assert caught.value.argv[-2:] == ["--max-num-seqs", "2"]
