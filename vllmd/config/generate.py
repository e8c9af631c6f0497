"""What is made from the rows: the man page, the shipped files in etc/ and the JSON schema for editors.

`python -m vllmd.config.generate [DIRECTORY]` writes them into a source tree; a test fails when they differ from the rows.
"""

from __future__ import annotations

import json
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllmd.config.rows import SECTIONS, Row, table

# The shipped engine, by name: configuration does not import engines, and no running path comes here.
SHIPPED_TUNING = "vllmd.engines.vllm_tuning:Tuning"

RECOMMENDED: Mapping[str, object] = {
    # The built-in default refuses nothing, as the commands do that people use today. A host that is set up anew should.
    "preflight.gpu_fail_on": ("temperature", "memory"),
}

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_NOT_TEXT = re.compile(r"(?i)true|false|yes|no|on|off|null|[0-9]+([.][0-9]*)?")


def yaml_text(value: object) -> str:
    """A value as a person writes it in the file; None is nothing (the engine decides)."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "[" + ", ".join(yaml_text(item) for item in value) + "]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and not _NOT_TEXT.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)


def _grouped(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {"": []}
    for row in rows.values():
        groups.setdefault(row.key.rpartition(".")[0], []).append(row)
    return groups


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _variables(row: Row) -> str:
    return " ".join(f"`{name}`" for name in (row.setting.env, *row.setting.aliases))


def _man_row(row: Row) -> str:
    default = yaml_text(row.default)
    unit = f" ({row.setting.unit})" if row.setting.unit else ""
    notes = "" if row.setting.restart else " Applies at once on reload."
    notes += " Secret: never printed." if row.setting.secret else ""
    shown = f"`{default}`" if default not in ("", '""') else "unset"
    return f"| `{row.key}` | {_variables(row)} | {_cell(row.form)}{unit} | {_cell(shown)} | {_cell(row.setting.help + notes)} |"


def man_page_table(tuning: type[Any]) -> str:
    """One markdown table for each section."""
    parts = []
    for section, rows in _grouped(table(tuning)).items():
        title = f"## {section}\n\n{_first_line(SECTIONS[section])}" if section else "## At the top"
        head = "| key | environment | value | default | meaning |\n|---|---|---|---|---|"
        parts.append("\n".join([f"{title}\n", head, *(_man_row(row) for row in rows)]))
    return "\n\n".join(parts)


MAN_PAGE = """\
# vllmd.yaml(5): configuration of vllmd

<!-- Made by `python -m vllmd.config.generate` from the rows in vllmd/config/settings.py. -->

## Files, and which one wins

Each layer wins over those before it, value by value:

1. built-in defaults
2. `/etc/vllmd/vllmd.yaml`: what all instances of the host share
3. `/etc/vllmd/NAME.yaml`: the instance, `vllmd@NAME.service`
4. `/etc/vllmd/NAME.d/*.yaml`: drop-ins, in order of name
5. environment variables (for the service: `Environment=` in a drop-in of the unit); an empty one counts as not set
6. the command line

`--user` reads `$XDG_CONFIG_HOME/vllmd`, `--root DIR` reads `DIR/etc` instead of `/etc/vllmd`.
`vllmd check NAME` validates everything and changes nothing; `vllmd check --show-origin NAME` says where each value came from.

`engine.args` and `engine.env` are merged name by name; `null` takes a name away that a lower layer gave. Everything else
is replaced. A layer that names another model takes back the id, directory and revision that lower layers gave.
An unknown key, a key given twice and a bad value are errors that name file, line and key. Anchors work; tags do not.
Only decimal numbers are numbers: `0700` and `22:30` stay text.

`model: ORG/NAME` is short for `model: {id: ORG/NAME}`, `model: /a/directory` for `model: {path: /a/directory}`.
In the environment a list is text with commas, and a mapping is a JSON object.
Where two names of one variable are given, both must say the same.

"""


MAN_PAGE_END = """
## Notes

Editors check these files, and complete keys, with the JSON schema `/usr/share/doc/vllmd/vllmd.schema.json`: `# yaml-language-server: $schema=PATH` as the first line.

## Examples

/etc/vllmd/vllmd.yaml, for all instances of the host:

    model: {sources: [local, r2], r2_bucket: models}
    metrics: {textfile: /run/vllmd/metrics}
    watch: {observe: [canary]}

/etc/vllmd/chat.yaml, one instance on two GPUs:

    model: Qwen/Qwen3-32B
    gpus: 2
    serve:
      host: 0.0.0.0
      port: 8000
      served_model_name: chat
      tensor_parallel_size: 2
      max_model_len: 32768
    engine:
      version: 0.32.0
      args:
        enable-auto-tool-choice: true
        tool-call-parser: hermes
      env: {NCCL_DEBUG: WARN}

/etc/vllmd/chat.d/60-night.yaml, a drop-in:

    start: {stall_timeout_s: 1200}
"""


def man_page(tuning: type[Any]) -> str:
    return MAN_PAGE + man_page_table(tuning) + "\n" + MAN_PAGE_END


HOST_HEAD = """\
# /etc/vllmd/vllmd.yaml: what all instances of this host share; /etc/vllmd/NAME.yaml is an instance, and wins.
# Every setting is here with its default: remove the '#' of its section and its line to change it. See vllmd.yaml(5).
# `vllmd check` validates the result.
"""


def _example_row(row: Row) -> list[str]:
    unit = f" [{row.setting.unit}]" if row.setting.unit else ""
    indent = "  " if row.key.rpartition(".")[0] else ""
    recommended = RECOMMENDED.get(row.key)
    lines = [f"#{indent}# {row.setting.help}{unit} {row.setting.env}" if indent else f"# {row.setting.help}{unit} {row.setting.env}"]
    lines.append(f"#{indent}{row.name}: {yaml_text(row.default)}".rstrip())
    return lines if recommended is None else [*lines, f"{indent}{row.name}: {yaml_text(recommended)}"]


def host_example(tuning: type[Any]) -> str:
    """etc/vllmd.yaml: every setting, commented out, with its default; what is recommended is active."""
    lines = [HOST_HEAD.rstrip()]
    for section, rows in _grouped(table(tuning)).items():
        active = any(row.key in RECOMMENDED for row in rows)
        title = [f"# {_first_line(SECTIONS[section])}", f"{'' if active else '#'}{section}:"] if section else []
        lines += ["", *title, *(line for row in rows for line in _example_row(row))]
    return "\n".join(lines) + "\n"


INSTANCE = """\
# /etc/vllmd/NAME.yaml: one served model. Try it with `vllmd check NAME`, then: systemctl enable --now vllmd@NAME
# Only `model` is needed; the other lines show what is often set. Every setting: vllmd.yaml(5).

model: Qwen/Qwen3-0.6B         # a hub id; or a directory: /srv/models/mine
# model: {{id: Qwen/Qwen3-0.6B, revision: main, sources: [local, hf-cache, hf-hub]}}

serve:
  host: {host}              # 0.0.0.0 opens it to the network: read about keys first
  port: {port}
  # served_model_name: qwen3     # the name that clients use
  # max_model_len: 4096          # passed to the engine only when set

# gpus: {gpus}                    # or a number, or a list of indices or ids: [0, 1]

# engine:
#   args: {{enforce-eager: true, dtype: float32}}    # flags of the engine itself
#   env: {{VLLM_CPU_KVCACHE_SPACE: 1}}
"""


def instance_example(tuning: type[Any]) -> str:
    """etc/demo.yaml.example."""
    rows = table(tuning)
    return INSTANCE.format(**{name: yaml_text(rows[key].default) for name, key in (("host", "serve.host"), ("port", "serve.port"), ("gpus", "gpus"))})


def _json_default(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _schema_of(row: Row) -> dict[str, Any]:
    schema = dict(getattr(row.setting.parse, "schema", {}))
    nullable = {"anyOf": [schema, {"type": "null"}]} if schema else {}
    unit = f" ({row.setting.unit})" if row.setting.unit else ""
    default = {} if row.default is None else {"default": _json_default(row.default)}
    return {"description": f"{row.setting.help}{unit} {row.setting.env}", **nullable, **default}


def _section_schema(section: str, rows: list[Row]) -> dict[str, Any]:
    properties = {row.name: _schema_of(row) for row in rows}
    described = {"description": _first_line(SECTIONS[section])}
    whole = {"type": ["object", "null"], "additionalProperties": False, "properties": properties}
    return {**described, **whole} if section != "model" else {**described, "anyOf": [whole, {"type": "string"}]}


def json_schema(tuning: type[Any]) -> dict[str, Any]:
    """JSON schema of vllmd.yaml, NAME.yaml and drop-ins."""
    groups = _grouped(table(tuning))
    properties = {row.name: _schema_of(row) for row in groups.pop("")}
    properties |= {section: _section_schema(section, rows) for section, rows in groups.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vllmd.yaml",
        "description": "Configuration of vllmd: vllmd.yaml, NAME.yaml and the drop-ins NAME.d/*.yaml.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _schema_text(tuning: type[Any]) -> str:
    return json.dumps(json_schema(tuning), indent=2, ensure_ascii=False) + "\n"


FILES: Mapping[str, Callable[[type[Any]], str]] = {
    "docs/vllmd.yaml.5.md": man_page,
    "docs/vllmd.schema.json": _schema_text,
    "etc/vllmd.yaml": host_example,
    "etc/demo.yaml.example": instance_example,
}


def main(directory: Path, tuning: type[Any]) -> None:
    for name, make in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make(tuning), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), pkgutil.resolve_name(SHIPPED_TUNING))
