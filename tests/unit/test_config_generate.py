"""One row per setting: the shipped files say what the rows say, and what they show works."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllmd.config import generate, layers
from vllmd.config.paths import root_paths
from vllmd.config.rows import table
from vllmd.engines.vllm_tuning import Tuning

pytestmark = pytest.mark.unit

SOURCE = Path(__file__).resolve().parents[2]
ROWS = table(Tuning)


@pytest.mark.parametrize("name", list(generate.FILES))
def test_shipped_files_are_what_the_rows_make(name: str) -> None:
    shipped = (SOURCE / name).read_text(encoding="utf-8")
    assert shipped == generate.FILES[name](Tuning), "run: python -m vllmd.config.generate"


def load(tmp_path: Path, host: str, instance: str) -> layers.Loaded:
    paths = root_paths(tmp_path)
    paths.config.mkdir(exist_ok=True)
    for name, text in (("vllmd.yaml", host), ("demo.yaml", instance)):
        (paths.config / name).write_text(text)
        (paths.config / name).chmod(0o640)
    return layers.load(paths, "demo", {}, {}, lambda _name: Tuning)


def test_the_shipped_files_load_as_they_are(tmp_path: Path) -> None:
    loaded = load(tmp_path, (SOURCE / "etc/vllmd.yaml").read_text(), (SOURCE / "etc/demo.yaml.example").read_text())
    assert loaded.warnings == ()
    assert loaded.config.model.id
    recommended = {key for key, origin in loaded.origins.items() if origin.place.endswith("vllmd.yaml")}
    assert recommended == set(generate.RECOMMENDED)
    for key, value in generate.RECOMMENDED.items():
        assert ROWS[key].of(loaded.config) == value


def test_the_examples_of_the_page_work(tmp_path: Path) -> None:
    host, instance, drop_in = (re.sub("(?m)^    ", "", block) for block in re.findall(r"(?m)(?:^    .*\n)+", generate.MAN_PAGE_END))
    (tmp_path / "etc/demo.d").mkdir(parents=True)
    (tmp_path / "etc/demo.d/60-night.yaml").write_text(drop_in)
    loaded = load(tmp_path, host, instance)
    assert loaded.warnings == ()
    assert (loaded.config.gpus, loaded.config.start.stall_timeout_s, loaded.config.model.r2_bucket) == (2, 1200, "models")


def test_every_line_of_the_host_file_is_the_default_when_its_mark_is_removed(tmp_path: Path) -> None:
    active = [line for line in generate.host_example(Tuning).splitlines() if not re.match(r"  [a-z_]+:", line)]
    text = "\n".join(re.sub(r"^#(?=[a-z]|  )", "", line) for line in active)
    loaded = load(tmp_path, text, "")
    given = [key for key, origin in loaded.origins.items() if origin.place.endswith("vllmd.yaml")]
    assert set(given) == {key for key, row in ROWS.items() if row.default is not None}
    for row in ROWS.values():
        assert row.of(loaded.config) == row.default, row.key


def test_every_commented_line_of_the_instance_file_works(tmp_path: Path) -> None:
    text = generate.instance_example(Tuning)
    text = re.sub(r"(?m)^model: .*$", "", text, count=1)
    text = "\n".join(re.sub(r"^(\s*)# (?=(\w+:|  \w+:))", r"\1", line) for line in text.splitlines())
    loaded = load(tmp_path, "", text)
    assert loaded.config.model.revision == "main"
    assert loaded.config.serve.served_model_name == "qwen3"
    assert loaded.config.engine.args == {"enforce-eager": True, "dtype": "float32"}


def test_the_man_page_names_every_key_and_variable() -> None:
    text = generate.man_page(Tuning)
    for row in ROWS.values():
        assert f"| `{row.key}` | `{row.setting.env}`" in text
        assert all(f"`{alias}`" in text for alias in row.setting.aliases)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in text.splitlines() if line.startswith("| "))


def test_every_row_says_what_it_accepts() -> None:
    for row in ROWS.values():
        assert row.form != "value", row.key
        assert row.setting.help.endswith((".", "?")) or len(row.setting.help) > 10, row.key


def schema_accepts(schema: dict[str, Any], value: Any) -> bool:
    """The few words of JSON schema that we use."""
    kinds: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "array": list, "object": dict, "null": type(None)}
    checks: dict[str, Callable[[Any], bool]] = {
        "type": lambda want: any(isinstance(value, kinds[k]) and not (isinstance(value, bool) and k != "boolean") for k in ([want] if isinstance(want, str) else want)),
        "enum": lambda want: value in want,
        "anyOf": lambda want: any(schema_accepts(one, value) for one in want),
        "minimum": lambda want: value >= want,
        "maximum": lambda want: value <= want,
        "exclusiveMinimum": lambda want: value > want,
        "pattern": lambda want: re.search(want, value) is not None,
        "items": lambda want: not isinstance(value, list) or all(schema_accepts(want, item) for item in value),
    }
    return all(checks[word](want) for word, want in schema.items() if word in checks)


def test_the_schema_has_every_key_and_accepts_its_default() -> None:
    schema = json.loads(json.dumps(generate.json_schema(Tuning)))
    for row in ROWS.values():
        section, _, name = row.key.rpartition(".")
        part = schema["properties"]
        if section:
            part = part[section]["anyOf"][0]["properties"] if section == "model" else part[section]["properties"]
        default = json.loads(json.dumps(row.default))
        assert schema_accepts(part[name], default), row.key
        assert part[name].get("default") == default
    assert not schema_accepts(schema["properties"]["serve"]["properties"]["port"], 70000)
