"""Whether a model of one's own will fit, asked before it is chosen: for `model set`, which says it and goes on.

A child under a deadline looks at config.json and headers, wherever the model is: a network that is not there, or that swallows what is
sent, holds nobody up for longer. It never refuses: what is reckoned is an estimate, and the model may come later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from vllmd import configured, stages
from vllmd.config.paths import Paths
from vllmd.configured import Prepared
from vllmd.core.sizing_verdict import Device, Verdict
from vllmd.core.tiers import Group
from vllmd.ctl import model_file, model_plan
from vllmd.ctl.doctor.jobs import Job
from vllmd.engines.protocol import Sizing
from vllmd.errors import VllmdError
from vllmd.models import sources
from vllmd.preflight.sizing import Instance, of_facts

DEADLINE_S = 5.0


def notes(paths: Paths, name: str, text: str, instance_text: str, group: Group | None) -> list[str]:
    """Lines for a person; none where it fits, and none where no engine is there to say what it would take."""
    with model_file.overlay(paths, name, text, instance_text) as there:
        try:
            prepared = configured.prepare(name, there, {key: os.environ[key] for key in ("PATH",) if key in os.environ})
            request = configured.model_request(prepared.config, there)
            asked = _asked(prepared, paths) if isinstance(prepared.engine, Sizing) else None
        except VllmdError:
            return []  # whoever writes the file says what is wrong with it
    if asked is None:
        return []
    found = Job(lambda: _verdict(asked, group, os.environ), DEADLINE_S).outcome()
    if found.value is None:
        why = found.why if found.why.startswith("no answer") else "its headers cannot be read now"
        return [f"whether it will fit is not known ({why}): {paths.vllmctl} model plan {request.path or request.identity}"]
    verdict = found.value
    if verdict.word in ("fits", "unknown"):
        return []
    return [f"it will probably not fit: {verdict.what}", *(f"- {line}" for line in verdict.advice)]


def _asked(prepared: Prepared, paths: Paths) -> Instance:
    assert isinstance(prepared.engine, Sizing)
    config = prepared.config
    request = configured.model_request(config, paths)
    if config.model.offline:
        request = replace(request, sources=tuple(each for each in request.sources if each not in sources.NETWORK))
    return Instance(prepared.instance, paths, request, config.model, os.environ, config.gpus, prepared.engine.sizing(stages.context(prepared)))


def _verdict(asked: Instance, group: Group | None, environ: Mapping[str, str]) -> Verdict:
    facts, _via = model_plan.facts(asked.request, asked.settings, environ)
    device = None if group is None or group.kind == "cpu" else Device(f"{group.name or 'GPU'}", group.each_mib << 20)
    return of_facts(asked, facts, device, group.largest if group else 0).verdict
