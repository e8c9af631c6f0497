"""The layers: which one wins for every setting, where each value came from, and what a mistake looks like."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from vllmd.config import layers
from vllmd.config import parsers as p
from vllmd.config.layers import Loaded
from vllmd.config.paths import Paths, root_paths, user_paths
from vllmd.config.rows import Row, table
from vllmd.config.settings import setting
from vllmd.errors import ConfigError, PermissionMissing, UsageError, VllmdError

pytestmark = pytest.mark.unit


@dataclass(frozen=True, slots=True)
class Tuning:
    """An engine's own rows, as a plug-in has them."""

    max_model_len: int | None = setting(None, p.integer(low=1), "VLLM_MAX_MODEL_LEN", "Longest context.")
    tensor_parallel_size: int = setting(1, p.integer(low=1), "VLLM_TENSOR_PARALLEL_SIZE", "GPUs.")


ROWS = table(Tuning)


class Host:
    """A configuration directory, and `load` on it."""

    def __init__(self, root: Path) -> None:
        self.paths: Paths = root_paths(root)
        self.paths.config.mkdir()

    def write(self, name: str, text: str) -> Path:
        path = self.paths.config / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o640)
        return path

    def load(self, environ: Mapping[str, str] | None = None, **overrides: object) -> Loaded:
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        return layers.load(self.paths, "a", environ or {}, given, lambda _name: Tuning)

    def failure(self, text: str, environ: Mapping[str, str] | None = None, **overrides: object) -> VllmdError:
        path = self.write("a.yaml", text)
        with pytest.raises(VllmdError) as caught:
            self.load(environ, **overrides)
        error = caught.value
        assert "\n" not in error.what + error.hint
        assert error.hint
        error.what = error.what.replace(str(path), "a.yaml")
        return error


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


LAYERS = ["vllmd.yaml", "a.yaml", "a.d/10-x.yaml", "a.d/20-y.yaml", "environment", "command line"]


@pytest.mark.parametrize("top", range(len(LAYERS)))
def test_the_highest_layer_wins_and_is_named(host: Host, top: int) -> None:
    host.write("a.yaml", "")
    environ: dict[str, str] = {}
    overrides: dict[str, object] = {}
    for number, layer in enumerate(LAYERS[: top + 1]):
        if layer == "environment":
            environ["VLLM_PORT"] = str(9000 + number)
        elif layer == "command line":
            overrides["serve__port"] = 9000 + number
        else:
            host.write(layer, f"# a comment\nserve:\n  port: {9000 + number}\n")
    loaded = host.load(environ, **overrides)
    expected = {"environment": "VLLM_PORT (environment)", "command line": "command line"}
    assert loaded.config.serve.port == 9000 + top
    assert str(loaded.origins["serve.port"]) == expected.get(LAYERS[top], f"{host.paths.config / LAYERS[top]}:3")


SAMPLES: Mapping[str, str] = {
    "model.name": "m",
    "model.org": "o",
    "model.id": "o/m",
    "model.sources": "local",
    "serve.host": "::1",
    "serve.listen": "uds",
    "serve.task": "embed",
    "serve.auth": "none",
    "serve.open_paths": "/health,/ping",
    "engine.args": '{"x": 1}',
    "engine.env": '{"X": "1"}',
    "engine.logging_level": "DEBUG",
    "preflight.gpu_fail_on": "memory",
    "preflight.gpu_min_free": "7",
    "preflight.reclaim": "stray",
    "start.proof": "health",
    "log.level": "error",
    "metrics.listen": "127.0.0.1:9108",
    "watch.observe": "hang",
    "log.line_max_bytes": "512",
    "model.verify": "sha256",
    "model.warm_up": "off",
    "model.fetch_connections": "7",
    "model.require_revision": "commit",
    "gpus": "3",
}


def _sample(row: Row) -> str:
    """Text that the row accepts and that is not its default."""
    if row.key in SAMPLES:
        return SAMPLES[row.key]
    if isinstance(row.default, bool):
        return "0" if row.default else "1"
    if isinstance(row.default, int | float) or row.default is None:
        return "77" if row.default != 77 else "78"
    return "/some/where" if row.form == "absolute path" else "word"


@pytest.mark.parametrize("key", list(ROWS))
def test_every_setting_is_read_from_its_variable_and_an_empty_one_is_unset(host: Host, key: str) -> None:
    row = ROWS[key]
    host.write("a.yaml", "")
    loaded = host.load({row.setting.env: _sample(row)})
    assert row.of(loaded.config) == row.setting.parse(_sample(row)) != row.default
    assert str(loaded.origins[key]) == f"{row.setting.env} (environment)"
    empty = host.load({row.setting.env: ""})
    assert row.of(empty.config) == row.default
    assert str(empty.origins[key]) == "built-in"


@pytest.mark.parametrize("key", [key for key in ROWS if key not in ("model.name", "model.org")])
def test_every_setting_is_read_from_yaml_and_from_the_command_line(host: Host, key: str) -> None:
    row = ROWS[key]
    value = _sample(row)
    section, _, name = key.rpartition(".")
    host.write("a.yaml", f"{section}:\n  {name}: '{value}'\n" if section else f"{name}: '{value}'\n")
    loaded = host.load()
    assert row.of(loaded.config) == row.setting.parse(value)
    assert loaded.origins[key].line == (2 if section else 1)
    over = layers.load(host.paths, None, {}, {key: value}, lambda _name: Tuning)
    assert row.of(over.config) == row.setting.parse(value)


def test_no_two_settings_share_a_variable() -> None:
    names = [name for row in ROWS.values() for name in (row.setting.env, *row.setting.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("alias", "text", "key", "value"),
    [
        ("VLLM_STOP_TIMEOUT", "15", "preflight.term_grace_s", 15.0),
        ("VLLM_ALLOW_OTHER_UID_KILL", "1", "preflight.allow_kill_other_uid", True),
        ("VLLM_MIN_FREE_GPU_GB", "1.5", "preflight.gpu_min_free", "1536"),
        ("VLLM_GPU_DEVICES", "1", "gpus", ("1",)),
        ("VLLM_GPU_DEVICES", "0,GPU-aa", "gpus", ("0", "GPU-aa")),
        ("VLLM_GPU_DEVICES", "all", "gpus", "all"),
    ],
)
def test_names_of_the_newer_commands_are_accepted(host: Host, alias: str, text: str, key: str, value: object) -> None:
    host.write("a.yaml", "")
    loaded = host.load({alias: text})
    assert ROWS[key].of(loaded.config) == value
    assert loaded.origins[key].place == alias


def test_two_names_of_one_setting_may_agree_but_not_differ(host: Host) -> None:
    host.write("a.yaml", "")
    assert host.load({"VLLM_TERM_GRACE": "4", "VLLM_STOP_TIMEOUT": "4.0"}).config.preflight.term_grace_s == 4
    error = host.failure("", {"VLLM_TERM_GRACE": "3", "VLLM_STOP_TIMEOUT": "15"})
    assert isinstance(error, ConfigError)
    assert error.code == "alias_conflict"
    assert "VLLM_TERM_GRACE" in error.what
    assert "VLLM_STOP_TIMEOUT" in error.what


def test_a_service_link_of_kubernetes_is_called_by_its_name(host: Host) -> None:
    error = host.failure("", {"VLLM_PORT": "tcp://10.0.0.1:8000"})
    assert error.code == "service_link"
    assert "VLLM_PORT" in error.what
    assert "enableServiceLinks" in error.hint


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("serve:\n  prot: 1", "a.yaml:2: serve.prot: unknown key", "serve.port"),
        ("port: 1", "a.yaml:1: port: unknown key", "serve.port"),
        ("\nserv:\n  port: 1", "a.yaml:2: serv: unknown key", "serve?"),
        ("serve:\n  max-model-len: 1", "a.yaml:2: serve.max-model-len: unknown key", "serve.max_model_len"),
        ("serve:\n  reclaim: own", "a.yaml:2: serve.reclaim: unknown key", "preflight.reclaim"),
        ("serve:\n  quantization: awq", "a.yaml:2: serve.quantization: unknown key", "engine.args"),
        ("'': 1", "a.yaml:1: : unknown key", "vllmd.yaml(5)"),
        ("serve:\n  host: x\n  port: 99999", "a.yaml:3: serve.port: must be at least 1 and at most 65535, not 99999", "TCP port"),
        ("serve: 8000", "a.yaml:1: serve: must hold settings", "indented"),
        ("model: [a]", "a.yaml:1: model.id: must be text, not a list", "ORG/NAME"),
        ("model: {name: a/b}", "a.yaml:1: model.name: must be a name without '/'", "short name"),
        ("model: ./here", "a.yaml:1: model.path: must be an absolute path", "directory"),
        ("model: {revision: 12e1}\nserve: {port: 1}\nserve: {}", "a.yaml:3: serve: is given twice", "one of the two"),
        ("model: {revision: 123}", "a.yaml:1: model.revision: must be text, and YAML reads 123 as a number: write it in quotes", "evision"),
        ("engine:\n  env:\n    A: yes", "a.yaml:2: engine.env: A: YAML reads this as True", "nvironment"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(host: Host, text: str, what: str, hint: str) -> None:
    error = host.failure(text)
    assert error.what.startswith(what)
    assert hint in error.hint
    assert error.status == 78


def test_an_engine_that_is_unknown_is_named_with_file_and_line(host: Host) -> None:
    def tuning_for(name: str) -> type[Any]:
        raise ConfigError("engine_unknown", f"engine.name: there is no engine {name!r}", "did you mean vllm?")

    path = host.write("a.yaml", "\nengine: {name: vlm}\n")
    with pytest.raises(ConfigError) as caught:
        layers.load(host.paths, "a", {}, {}, tuning_for)
    assert caught.value.what == f"{path}:2: engine.name: there is no engine 'vlm'"


def test_a_mistake_in_the_environment_or_on_the_command_line_is_named(host: Host) -> None:
    error = host.failure("", {"VLLM_DRY_RUN": "true"})
    assert error.what == "VLLM_DRY_RUN (environment): preflight.dry_run: must be 0 or 1, not 'true'"
    assert error.status == 78
    wrong = host.failure("", serve__port="x")
    assert isinstance(wrong, UsageError)
    assert wrong.what.startswith("command line: serve.port: ")
    assert "serve.port" in host.failure("", serve__prot="1").hint


def test_no_secret_stands_in_an_error(host: Host) -> None:
    host.write("vllmd.yaml", "")
    for error in (host.failure("serve: {api_key: 123456}"), host.failure("", {"VLLM_API_KEY": "hunter2\nhunter3"})):
        assert "hunter2" not in error.what + error.hint
        assert "123456" not in error.what + error.hint


def test_unknown_sources_and_misspelt_variables_are_warnings(host: Host) -> None:
    host.write("a.yaml", "model:\n  sources: [local, ipfs]\n")
    loaded = host.load({"VLLMD_STAL_TIMEOUT_S": "1", "VLLMD_LAUNCH_ID": "x", "VLLM_USE_V1": "1"})
    assert loaded.config.model.sources == ("local",)
    assert len(loaded.warnings) == 2
    assert loaded.warnings[0].endswith("a.yaml:2: model.sources: unknown source 'ipfs' skipped")
    assert "did you mean VLLMD_STALL_TIMEOUT_S?" in loaded.warnings[1]


def test_files_that_the_wrong_people_may_touch_are_warnings(host: Host) -> None:
    host.write("a.yaml", "serve: {api_key: abcdef}").chmod(0o646)
    warnings = host.load().warnings
    assert any("may write it" in warning for warning in warnings)
    assert any("may read this secret" in warning for warning in warnings)
    host.write("a.yaml", "serve: {api_key: abcdef}").chmod(0o640)
    assert host.load().warnings == ()


def model(loaded: Loaded) -> tuple[str, str, str, str, str]:
    m = loaded.config.model
    return (m.org, m.name, m.id, m.revision, m.path)


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        ("model: Q/A", "", ("Q", "A", "Q/A", "", "")),
        ("model: gpt2", "", ("", "gpt2", "gpt2", "", "")),
        ("model: /m/a", "", ("", "", "", "", "/m/a")),
        ("model: {name: A, org: Q}", "", ("Q", "A", "Q/A", "", "")),
        ("model: {name: label, id: Q/A}", "", ("Q", "label", "Q/A", "", "")),
        ("model: {id: Q/A, revision: r}", "model: Q/B", ("Q", "B", "Q/B", "", "")),
        ("model: {id: Q/A, revision: r}", "model: Q/A", ("Q", "A", "Q/A", "r", "")),
        ("model: {id: Q/A, revision: r}", "model: {name: B}", ("Q", "B", "Q/B", "", "")),
        ("model: {id: Q/A, revision: r}", "model: {name: A}", ("Q", "A", "Q/A", "r", "")),
        ("model: {name: A, org: Q, revision: r}", "model: {id: Q/A}", ("Q", "A", "Q/A", "r", "")),
        ("model: {id: Q/A, revision: r}", "model: {org: Z}", ("Z", "A", "Z/A", "", "")),
        ("model: {id: Q/A, revision: r}", "model: {revision: s}", ("Q", "A", "Q/A", "s", "")),
        ("model: {id: Q/A, revision: r}", "model: /m/a", ("", "", "", "", "/m/a")),
        ("model: {name: l, id: Q/A, revision: r}", "model: {name: l, id: Q/B}", ("Q", "l", "Q/B", "", "")),
        ("model: /m/a", "model: Q/B", ("Q", "B", "Q/B", "", "")),
        ("model: Q/A", "model: ''", ("", "", "", "", "")),
        ("model: Q/A", "model:", ("Q", "A", "Q/A", "", "")),
    ],
)
def test_a_layer_that_names_another_model_takes_back_the_old_one(host: Host, lower: str, upper: str, expected: tuple[str, ...]) -> None:
    host.write("a.yaml", lower)
    host.write("a.d/50-model.yaml", upper)
    assert model(host.load()) == expected


def test_the_model_may_be_named_on_the_command_line_and_in_the_environment_as_today(host: Host) -> None:
    host.write("a.yaml", "model: Q/A")
    assert model(host.load(model="/m/x")) == ("", "", "", "", "/m/x")
    assert model(host.load({"VLLM_MODEL": "B", "VLLM_MODEL_ORG": "o"})) == ("o", "B", "o/B", "", "")
    assert model(host.load({"VLLM_MODEL": "B", "VLLM_MODEL_ID": "other/C"}))[1:3] == ("B", "other/C")


def test_engine_arguments_are_merged_by_name_and_null_takes_one_away(host: Host) -> None:
    host.write("vllmd.yaml", "engine:\n  args: {a: 1, b: 2, c: [1, {d: 3}]}\n")
    host.write("a.yaml", "engine:\n  args:\n    a: ~\n    b: 3\n  env: {X: 1}\n")
    loaded = host.load({"VLLMD_ENGINE_ARGS": '{"e": true}'})
    assert loaded.config.engine.args == {"b": 3, "c": (1, {"d": 3}), "e": True}
    origins = {name: str(loaded.origins[f"engine.args.{name}"]) for name in "bce"}
    assert origins == {
        "b": f"{host.paths.config}/a.yaml:4",
        "c": f"{host.paths.config}/vllmd.yaml:2",
        "e": "VLLMD_ENGINE_ARGS (environment)",
    }
    assert "engine.args.a" not in loaded.origins
    assert loaded.config.engine.env == {"X": "1"}


def test_null_and_empty_sections_give_nothing(host: Host) -> None:
    host.write("vllmd.yaml", "serve: {port: 9000}")
    host.write("a.yaml", "serve:\nwatch: {}\nlog: {level: }\n")
    loaded = host.load()
    assert (loaded.config.serve.port, loaded.config.log.level) == (9000, "info")


def test_the_engine_that_the_layers_name_brings_its_rows(host: Host) -> None:
    host.write("a.yaml", "engine: {name: other}\nserve: {depth: 3}\n")
    asked: list[str] = []

    @dataclass(frozen=True, slots=True)
    class Other:
        depth: int = setting(0, p.integer(low=0), "OTHER_DEPTH", "Depth.")

    def tuning_for(name: str) -> type[Any]:
        asked.append(name)
        return Other

    assert layers.load(host.paths, "a", {}, {}, tuning_for).config.tuning == Other(3)
    layers.load(host.paths, "a", {"VLLMD_ENGINE": "third"}, {}, tuning_for)
    layers.load(host.paths, "a", {"VLLMD_ENGINE": "third"}, {"engine.name": "fourth"}, tuning_for)
    assert asked == ["other", "third", "fourth"]


def test_drop_ins_are_plain_yaml_files_in_order_of_name(host: Host) -> None:
    host.write("a.yaml", "")
    for name, port in (("20-b.yaml", 2), ("10-a.yaml", 1), (".30-hidden.yaml", 3), ("40.yaml~", 4), ("50.yml", 5)):
        host.write(f"a.d/{name}", f"serve: {{port: {port}}}")
    loaded = host.load()
    assert loaded.config.serve.port == 2
    assert [path.name for path in loaded.files] == ["a.yaml", "10-a.yaml", "20-b.yaml"]
    assert loaded.warnings == (f"{host.paths.config}/a.d/50.yml: not read, a drop-in's name ends in .yaml",)


@pytest.mark.parametrize("kind", ["file", "loop", "dangling"])
def test_drop_ins_that_cannot_be_read_are_no_silence(host: Host, kind: str) -> None:
    host.write("a.yaml", "")
    directory = host.paths.config / "a.d"
    if kind == "file":
        directory.touch()
    elif kind == "loop":
        directory.symlink_to(directory)
    else:
        directory.mkdir()
        (directory / "10-a.yaml").symlink_to("/nowhere/to/be/found")
    with pytest.raises(ConfigError, match=r"/a\.d(/10-a\.yaml)?(:| is a link)") as caught:
        host.load()
    assert caught.value.hint


def test_a_name_that_ends_in_yml_is_recognised(host: Host) -> None:
    host.write("a.yml", "")
    with pytest.raises(ConfigError) as caught:
        host.load()
    assert caught.value.hint == f"mv {host.paths.config}/a.yml {host.paths.config}/a.yaml"


def test_a_link_that_leads_nowhere_is_told_from_no_file(host: Host) -> None:
    (host.paths.config / "a.yaml").symlink_to("/nowhere/to/be/found")
    with pytest.raises(ConfigError, match="is a link that leads nowhere"):
        host.load()


def test_an_absent_instance_says_how_to_make_it_and_what_was_meant(host: Host) -> None:
    host.write("qwen3.yaml", "")
    with pytest.raises(ConfigError) as caught:
        layers.load(host.paths, "qwen", {}, {}, lambda _name: Tuning)
    assert caught.value.code == "no_instance"
    assert str(host.paths.config / "qwen.yaml") in caught.value.what
    assert "qwen3" in caught.value.hint
    assert "model:" in caught.value.hint
    loaded = layers.load(host.paths, "qwen", {"VLLM_PORT": "5"}, {}, lambda _name: Tuning, require_file=False)
    assert loaded.config.serve.port == 5


def test_commands_configured_by_environment_alone_read_no_file(host: Host) -> None:
    host.write("vllmd.yaml", "serve: {port: 9}\nnonsense: 1\n")
    loaded = layers.load(host.paths, None, {}, {}, lambda _name: Tuning, read_files=False)
    assert loaded.config.serve.port == 8000
    assert loaded.files == ()


@pytest.mark.parametrize("name", ["vllmd", "presets", "a.d", "A", "-a", ".a", "", "a/b", "..", "a" * 49, "ä", "a\n", "a b"])
def test_names_that_can_be_no_instance(host: Host, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        layers.load(host.paths, name, {}, {}, lambda _name: Tuning)
    assert caught.value.code == "bad_instance_name"


def test_instances_are_listed(host: Host) -> None:
    for name in ("b.yaml", "a.yaml", "vllmd.yaml", "presets.yaml", "X.yaml", "c.txt"):
        host.write(name, "")
    assert layers.instance_names(host.paths) == ["a", "b"]


def test_a_directory_that_may_not_be_read_is_not_an_empty_one(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(PermissionMissing, match="Permission denied"):
        layers.instance_names(host.paths)


@pytest.mark.parametrize(("environ", "home"), [({"HOME": "/h"}, "/h"), ({"HOME": ""}, None), ({}, None), ({"HOME": "h"}, None)])
def test_directories_of_a_user_are_absolute_whatever_the_environment(environ: dict[str, str], home: str | None) -> None:
    home = home or pwd.getpwuid(os.geteuid()).pw_dir
    paths = user_paths({**environ, "XDG_CONFIG_HOME": "relative", "XDG_STATE_HOME": "/s"})
    assert (paths.config, paths.state) == (Path(home, ".config/vllmd"), Path("/s/vllmd"))


def test_a_fifo_in_place_of_a_file_does_not_block(host: Host) -> None:
    os.mkfifo(host.paths.config / "a.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        host.load()


def test_what_was_loaded_cannot_be_changed(host: Host) -> None:
    host.write("a.yaml", "engine: {args: {a: {b: 1}}}")
    loaded = host.load()
    with pytest.raises(TypeError):
        loaded.origins["x"] = None  # type: ignore[index]
    with pytest.raises(TypeError):
        loaded.config.engine.args["a"]["b"] = 2
    with pytest.raises(AttributeError):
        loaded.config.serve.port = 1  # type: ignore[misc]
