"""What vLLM is executed with: argv, private file, environment, GPUs."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.engine_contexts import context
from vllmd.config.settings import Model, rows
from vllmd.core.plan import Endpoint
from vllmd.engines import caches, environment
from vllmd.engines.protocol import SettingRefused
from vllmd.engines.vllm import Vllm
from vllmd.engines.vllm_tuning import Tuning
from vllmd.errors import ConfigError, PermissionMissing

pytestmark = pytest.mark.unit

SECRET = "sk-very-secret-0123"


def test_identity_of_the_server_always_stands_on_the_command_line(tmp_path: Path) -> None:
    argv = list(Vllm().command(context(tmp_path, {"serve.port": "8123"}), "/models/demo").argv)
    assert argv[1:3] == ["serve", "/models/demo"]
    for flag, value in {
        "--host": "127.0.0.1",
        "--port": "8123",
        "--served-model-name": "demo",
        "--tensor-parallel-size": "1",
        "--pipeline-parallel-size": "1",
    }.items():
        assert argv[argv.index(flag) + 1] == value
    assert argv[argv.index("--shutdown-timeout") + 1] == "30"
    assert "--disable-uvicorn-access-log" in argv


def test_tuning_is_passed_only_when_set(tmp_path: Path) -> None:
    bare = Vllm().command(context(tmp_path), "/m").argv
    assert not {
        "--max-model-len",
        "--kv-cache-dtype",
        "--enable-prefix-caching",
        "--no-enable-prefix-caching",
        "--gpu-memory-utilization",
    } & set(bare)
    settings = {
        "serve.max_model_len": "4096",
        "serve.prefix_caching": "false",
        "serve.max_tokens": "7",
        "serve.kv_cache_dtype": "fp8",
    }
    argv = list(Vllm().command(context(tmp_path, settings), "/m").argv)
    assert argv[argv.index("--max-model-len") + 1] == "4096"
    assert argv[argv.index("--override-generation-config") + 1] == '{"max_new_tokens": 7}'
    assert "--no-enable-prefix-caching" in argv


def test_a_person_may_have_the_access_log(tmp_path: Path) -> None:
    argv = Vllm().command(context(tmp_path, {"engine.args": {"disable-uvicorn-access-log": False}}), "/m").argv
    assert "--disable-uvicorn-access-log" not in argv
    assert "--no-disable-uvicorn-access-log" in argv


def test_a_unix_socket_replaces_host_and_port(tmp_path: Path) -> None:
    where = context(Path("/r"), {"serve.listen": "uds"})
    assert Vllm().endpoints(where) == (Endpoint("uds", path="/r/run/sock/demo.sock"),)
    argv = Vllm().command(where, "/m").argv
    assert "--port" not in argv
    assert argv[argv.index("--uds") + 1] == "/r/run/sock/demo.sock"


def test_a_socket_name_that_no_kernel_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        Vllm().check(context(Path("/" + "long" * 30), {"serve.listen": "uds"}))


@pytest.mark.parametrize("source", ["setting", "credential"])
def test_the_key_is_in_a_private_file_and_nowhere_else(tmp_path: Path, source: str) -> None:
    (tmp_path / "api-key").write_text(SECRET + "\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)} if source == "credential" else {"VLLM_API_KEY": SECRET}
    where = context(tmp_path, environ=environ)
    command = Vllm().command(where, "/m")
    path = command.argv[command.argv.index("--config") + 1]
    assert path == str(tmp_path / "run/i/demo/engine-config.yaml")
    assert yaml.safe_load(command.private_files[path]) == {"api-key": [SECRET]}
    assert not any(SECRET in text for text in (*command.argv, *command.env.values()))
    assert command.secrets == (SECRET,)
    assert Vllm().proofs(where, "generate")[0].headers == {"Authorization": f"Bearer {SECRET}"}


@pytest.mark.parametrize("key", ["-starts-with-a-dash", "has space", "Schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Vllm().check(context(tmp_path, environ={"VLLM_API_KEY": key}))
    assert key not in caught.value.what + caught.value.hint


def test_the_users_configuration_file_is_passed_as_it_is_without_a_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dtype: half\n")
    command = Vllm().command(context(tmp_path, {"engine.config_file": str(tmp_path / "c.yaml")}), "/m")
    assert command.argv[command.argv.index("--config") + 1] == str(tmp_path / "c.yaml")
    assert command.private_files == {}


def test_the_users_configuration_file_is_merged_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dtype: half\ncompilation-config: {mode: 0}\n")
    command = Vllm().command(
        context(tmp_path, {"engine.config_file": str(tmp_path / "c.yaml")}, {"VLLM_API_KEY": SECRET}), "/m"
    )
    (content,) = command.private_files.values()
    assert yaml.safe_load(content) == {"dtype": "half", "compilation-config": {"mode": 0}, "api-key": [SECRET]}


@pytest.mark.parametrize("entry", ["port: 9", "tensor_parallel_size: 2", "api-key: x", "no-such-flag: 1"])
def test_what_the_file_may_not_say_is_refused_with_its_line(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"# comment\ndtype: half\n{entry}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3: "):
        Vllm().check(context(tmp_path, {"engine.config_file": str(file)}))


def test_without_strict_flags_the_file_loses_what_vllmd_owns(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dtype: half\nport: 9\n")
    where = context(tmp_path, {"engine.config_file": str(tmp_path / "c.yaml"), "engine.strict_flags": "false"})
    assert any("c.yaml:2" in warning for warning in Vllm().check(where))
    (content,) = Vllm().command(where, "/m").private_files.values()
    assert yaml.safe_load(content) == {"dtype": "half"}


def test_a_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no /nowhere\.yaml"):
        Vllm().check(context(tmp_path, {"engine.config_file": "/nowhere.yaml"}))


def test_the_environment_is_built_not_inherited(tmp_path: Path) -> None:
    environ = {
        "PATH": "/bin", "HOME": "/home/x", "LC_ALL": "C", "HTTPS_PROXY": "http://proxy", "NCCL_DEBUG": "INFO", "HF_HOME": "/hf", "VLLM_CPU_KVCACHE_SPACE": "4",
        "HF_TOKEN": SECRET, "HF_HUB_TOKEN": SECRET, "VLLM_S3_SECRET_KEY": SECRET, "VLLM_PORT": "8001", "VLLM_HOST": "0.0.0.0", "VLLM_MODEL": "x", "NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1", "LISTEN_FDS": "1",
        "PYTHONPATH": "/p", "LD_PRELOAD": "/l", "PYTHONHOME": "/p", "MY_OWN": "1", "VLLMD_PROOF": "full", "VLLM_GPU_WARN_PCT": "50", "AWS_SECRET_ACCESS_KEY": SECRET,
    }  # fmt: skip
    env = Vllm().command(context(tmp_path, {"model": "/m"}, environ), "/m").env
    assert env["PATH"] == "/opt/vllmd/engines/vllm-0.32.0-cpu/bin:/bin"
    assert (
        env["HOME"],
        env["LC_ALL"],
        env["HTTPS_PROXY"],
        env["NCCL_DEBUG"],
        env["HF_HOME"],
        env["VLLM_CPU_KVCACHE_SPACE"],
    ) == ("/home/x", "C", "http://proxy", "INFO", "/hf", "4")
    dropped = {
        name
        for name in environ
        if name not in ("PATH", "HOME", "LC_ALL", "HTTPS_PROXY", "NCCL_DEBUG", "HF_HOME", "VLLM_CPU_KVCACHE_SPACE")
    }
    assert not dropped & set(env)
    assert SECRET not in env.values()
    assert (env["PYTHONUNBUFFERED"], env["HF_HUB_OFFLINE"], env["VLLM_LOGGING_LEVEL"]) == ("1", "1", "INFO")
    assert env["VLLM_CACHE_ROOT"] == str(caches.place(context(tmp_path)) / "vllm")


def test_a_variable_about_tokens_of_text_is_no_secret(tmp_path: Path) -> None:
    environ = {"VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD": "256"}
    assert (
        Vllm().command(context(tmp_path, environ=environ), "/m").env["VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD"]
        == "256"
    )


def test_engine_env_wins_and_may_not_hold_what_is_never_passed(tmp_path: Path) -> None:
    where = context(
        tmp_path, {"engine.env": {"OMP_NUM_THREADS": "3", "VLLM_CACHE_ROOT": "/c"}}, {"OMP_NUM_THREADS": "8"}
    )
    env = Vllm().command(where, "/m").env
    assert (env["OMP_NUM_THREADS"], env["VLLM_CACHE_ROOT"]) == ("3", "/c")
    for name in ("PYTHONPATH", "NOTIFY_SOCKET", "WATCHDOG_PID", "VLLM_API_KEY"):
        with pytest.raises(SettingRefused, match=f"engine.env.{name}: never reaches"):
            Vllm().check(context(tmp_path, {"engine.env": {name: "x"}}))


@pytest.mark.parametrize("home", ["", "/", "/nonexistent"])
def test_a_home_that_is_none_becomes_the_cache(tmp_path: Path, home: str) -> None:
    assert Vllm().command(context(tmp_path, environ={"HOME": home}), "/m").env["HOME"] == str(tmp_path / "cache")


@given(st.dictionaries(st.text(st.characters(codec="ascii", exclude_characters="\0="), min_size=1), st.text()))
def test_no_setting_of_ours_ever_reaches_the_engine(environ: dict[str, str]) -> None:
    ours = environment.our_names(Tuning)
    named = environ | {row.env: "x" for _, _, _, row in (*rows(Model, ""), *rows(Tuning, ""))}
    built = environment.build(named, ours=ours, given={}, defaults={}, fixed={})
    assert not ours & set(built)
    assert not any(environment.is_never_passed(name) for name in built)


@pytest.mark.parametrize(
    ("gpus", "inherited", "visible"),
    [
        ("all", "3", "3"),
        ("none", "3", ""),
        ("2", "", "0,1"),
        ("2", "5,6,7", "5,6"),
        ("GPU-aa,GPU-bb", "", "GPU-aa,GPU-bb"),
    ],
)
def test_the_engine_sees_only_the_instances_gpus(tmp_path: Path, gpus: str, inherited: str, visible: str) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": inherited} if inherited else {}
    assert Vllm().command(context(tmp_path, {"gpus": gpus}, environ), "/m").env["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"gpus": "2"}, False),
        ({"gpus": "2", "serve.tensor_parallel_size": "2"}, True),
        ({"gpus": "0,1,2,3", "serve.tensor_parallel_size": "2", "serve.pipeline_parallel_size": "2"}, True),
        ({"gpus": "4", "serve.tensor_parallel_size": "2", "serve.data_parallel_size": "2"}, True),
        ({"gpus": "4", "serve.tensor_parallel_size": "8", "engine.args": {"nnodes": 2}}, True),
        ({"gpus": "all", "serve.tensor_parallel_size": "8"}, True),
    ],
)
def test_parallel_sizes_must_fit_the_gpus(tmp_path: Path, settings: dict[str, Any], fits: bool) -> None:
    if fits:
        Vllm().check(context(tmp_path, settings))
        return
    with pytest.raises(SettingRefused, match="2 GPUs, but tensor 1 x pipeline 1 x data 1 = 1"):
        Vllm().check(context(tmp_path, settings))


def test_the_memory_that_will_be_asked_for(tmp_path: Path) -> None:
    assert Vllm().memory_fraction(context(tmp_path)) == 0.92
    assert Vllm().memory_fraction(context(tmp_path, {"serve.gpu_memory_utilization": "0.5"})) == 0.5
    assert Vllm().memory_fraction(context(tmp_path, {"engine.args": {"gpu_memory_utilization": 0.6}})) == 0.6


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.touch()
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_chosen_engine_comes_before_the_path_and_after_the_setting(tmp_path: Path) -> None:
    on_path = executable(tmp_path / "bin/vllm")
    environ = {"PATH": str(on_path.parent)}
    where = context(tmp_path)
    assert Vllm().installed(where.config, where.paths, environ).executable == str(on_path)
    chosen = executable(tmp_path / "engines/vllm-1/bin/vllm")
    (tmp_path / "engines/current").symlink_to("vllm-1")
    assert Vllm().installed(where.config, where.paths, environ).executable == str(chosen)
    own = executable(tmp_path / "own/bin/vllm")
    where = context(tmp_path, {"engine.executable": str(own)})
    assert Vllm().installed(where.config, where.paths, environ).executable == str(own)


def test_a_program_that_cannot_be_executed_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "vllm").touch(mode=0o644)
    for path, reason in ((tmp_path / "vllm", "is not executable"), (tmp_path, "there is no program")):
        where = context(tmp_path, {"engine.executable": str(path)})
        with pytest.raises(SettingRefused, match=rf"^engine\.executable: .*{reason}"):
            Vllm().installed(where.config, where.paths, {})


def test_engines_that_may_not_be_seen_are_not_reported_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What root installed under a tight umask: on some Pythons pathlib raises, on others it says there is none."""

    def refused(path: Path) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refused)
    where = context(tmp_path)
    with pytest.raises(PermissionMissing, match=r"current/bin/vllm: Permission denied"):
        Vllm().installed(where.config, where.paths, {"PATH": "/nowhere"})


@pytest.mark.parametrize("key", ["api-key=s3cr3t", "--api-key s3cr3t", "dtype half", "", "--"])
def test_a_key_that_holds_its_value_too_is_refused_without_being_shown(tmp_path: Path, key: str) -> None:
    with pytest.raises(SettingRefused, match="more than the name of a flag") as caught:
        Vllm().check(context(tmp_path, {"engine.args": {key: "true"}}))
    assert "s3cr3t" not in caught.value.what + caught.value.hint


def test_no_engine_at_all_says_what_to_run(tmp_path: Path) -> None:
    where = context(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Vllm().installed(where.config, where.paths, {"PATH": "/nowhere"})
    assert (caught.value.code, caught.value.status) == ("engine_missing", 78)
    assert "vllmctl engine install" in caught.value.hint
