"""`vllmd check`: the configuration, validated, and the plan that it makes, printed. and whether it will fit into memory. No side effects, under 0.3 s."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from vllmd import configured, stages
from vllmd.config import show
from vllmd.config.layers import instance_names
from vllmd.config.paths import Paths
from vllmd.config.redact import redact_argv, redact_text
from vllmd.config.values import printable
from vllmd.configured import Prepared
from vllmd.core.plan import Plan
from vllmd.engines.protocol import Context, Sizing
from vllmd.errors import ConfigError, VllmdError
from vllmd.models.whereabouts import whereabouts
from vllmd.preflight import sizing_show
from vllmd.preflight.sizing import Instance, Sized, of_instance


def check_one(
    name: str, paths: Paths, environ: Mapping[str, str], overrides: Mapping[str, object], *, as_json: bool, show_origin: bool
) -> int:
    prepared = configured.prepare(name, paths, environ, overrides)
    plan, memory = None, None
    if configured.model_request(prepared.config, paths).selected:
        where = stages.context(prepared)
        plan = stages.plan(prepared, where)
        memory = _memory(plan, prepared, where)
    if as_json:
        sizing = None if memory is None else {"verdict": "unknown", "what": memory} if isinstance(memory, str) else sizing_show.as_dict(memory)
        document = {"schema": 1, "instance": name, "plan": describe(plan, prepared), "sizing": sizing}
        print(json.dumps(document | ({"settings": show.as_dict(prepared.loaded)} if show_origin else {}), indent=1))
        return 0
    print(_text(plan, prepared))
    if memory is not None:
        print("\n".join(_memory_text(memory)))
    if show_origin:
        print()
        print(show.origin_table(prepared.loaded))
    return 0


def _memory(plan: Plan, prepared: Prepared, where: Context) -> Sized | str | None:
    """Whether it will fit; None of an engine that does not say what it needs."""
    if not isinstance(prepared.engine, Sizing):
        return None
    wanted, config = prepared.engine.sizing(where), prepared.config
    return of_instance(Instance(prepared.instance, prepared.paths, plan.model, config.model, prepared.environ, config.gpus, wanted))


def _memory_text(memory: Sized | str) -> Iterator[str]:
    if isinstance(memory, str):
        yield f"  {'memory':<14} {_on_one_line(memory)}"
        return
    yield from (f"  {label:<14} {_on_one_line(value)}" for label, value in sizing_show.rows(memory))
    label = "memory"
    for line in (*(f"note: {note}" for note in memory.notes), *sizing_show.verdict(memory)):
        yield f"  {label:<14} {_on_one_line(line)}"
        label = ""


def check_all(paths: Paths, environ: Mapping[str, str], overrides: Mapping[str, object]) -> int:
    """Every instance that has a file; the first bad one's status is the command's."""
    names = instance_names(paths)
    if not names:
        raise ConfigError("no_instance", f"no instance is configured in {paths.config}", f"write {paths.config}/NAME.yaml")
    status = 0
    for name in names:
        try:
            prepared = configured.prepare(name, paths, environ, overrides)
            if configured.model_request(prepared.config, paths).selected:
                stages.plan(prepared, stages.context(prepared))
            print(f"{name}: valid")
        except VllmdError as error:
            status = status or int(error.status)
            sys.stderr.write(printable(f"{name}: {error.what}\n  hint: {error.hint}\n"))
    return status


def describe(plan: Plan | None, prepared: Prepared) -> dict[str, Any] | None:
    """The plan as JSON; secrets are redacted in argv and environment."""
    if plan is None:
        return None
    paths, command = prepared.paths, plan.command
    return {
        "engine": {
            "name": plan.engine,
            "executable": plan.installed.executable,
            "version": plan.installed.version,
            "variant": plan.installed.variant,
            "installed_as": plan.installed.name,
            "chosen_by": plan.installed.chosen,
            "built_for": f"CUDA {plan.installed.cuda}" if plan.installed.cuda else f"ROCm {plan.installed.rocm}" if plan.installed.rocm else "",
            "archs": list(plan.installed.archs),
            "flags_known": len(plan.installed.flags),
        },
        "model": {
            "identity": plan.model.identity,
            "sources": list(plan.model.sources),
            "store": str(plan.model.store),
            "whereabouts": whereabouts(plan.model, prepared.config.model, prepared.environ),
        },
        "served_name": plan.served_name,
        "task": plan.task,
        "endpoints": [str(endpoint) for endpoint in plan.endpoints],
        "gpus": plan.gpus if not isinstance(plan.gpus, tuple) else list(plan.gpus),
        "argv": list(redact_argv(command.argv, command.secrets)),
        "environment": {name: redact_text(value, command.secrets) for name, value in sorted(command.env.items())},
        "private_files": sorted(command.private_files),
        "deadlines": {
            "stall_s": plan.deadlines.stall_s,
            "start_s": plan.deadlines.start_s,
            "shutdown_s": plan.deadlines.shutdown_s,
            "stop_s": plan.deadlines.stop_s,
            "proof_s": plan.deadlines.proof_s,
        },
        "paths": {
            "configuration": str(paths.instance_config(plan.instance)),
            "state": str(paths.instance_state(plan.instance)),
            "runtime": str(paths.instance_runtime(plan.instance)),
            "cache": str(paths.cache),
        },
        "warnings": list(plan.warnings),
    }


def _text(plan: Plan | None, prepared: Prepared) -> str:
    document = describe(plan, prepared)
    if document is None:
        return f"{prepared.instance}: valid, no model selected ({prepared.paths.vllmctl} model set {prepared.instance} PRESET|MODEL)"
    engine, model, bounds = document["engine"], document["model"], document["deadlines"]
    rows = [
        ("model", f"{model['identity']} (from {', '.join(model['sources'])}), served as {document['served_name']}"),
        ("now", model["whereabouts"]),
        ("endpoint", ", ".join(document["endpoints"])),
        ("engine", f"{engine['name']} {engine['version'] or 'of unknown version'}, {engine['executable']}{_chosen_by(engine)}"),
        ("gpus", str(document["gpus"])),
        ("task", document["task"]),
        (
            "deadlines",
            f"start {bounds['start_s']:g} s, without progress {bounds['stall_s']:g} s, "
            f"drain {bounds['shutdown_s']:g} s, whole stop {bounds['stop_s']:g} s",
        ),
        *((name, path) for name, path in document["paths"].items()),
        ("argv", shlex.join(document["argv"])),
        *(("environment", f"{name}={value}") for name, value in document["environment"].items()),
        *(("private file", path) for path in document["private_files"]),
        *(("warning", text) for text in document["warnings"]),
    ]
    return "\n".join([f"{prepared.instance}: valid", *(f"  {label:<14} {_on_one_line(value)}" for label, value in rows)])


def _chosen_by(engine: dict[str, Any]) -> str:
    by = {"current": "chosen by vllmctl engine", "PATH": "found on PATH"}.get(engine["chosen_by"], engine["chosen_by"])
    facts = [f"by {by}" if by.startswith("engine.") else by, engine["built_for"], " ".join(engine["archs"])]
    return f" ({', '.join(filter(None, facts))})" if any(facts) else ""


def _on_one_line(value: str) -> str:
    return printable(value).replace("\n", "\\n")
