"""What the verbs of `vllmd` do, once the command line is parsed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from vllmd import configured
from vllmd.commandline import two_lines
from vllmd.config.layers import check_instance_name
from vllmd.config.paths import SYSTEM, Paths
from vllmd.config.settings import Config
from vllmd.config.values import printable
from vllmd.core.model import ModelRequest
from vllmd.errors import ConfigError, VllmdError
from vllmd.models.progress import Progress


def _environ() -> Mapping[str, str]:
    """The environment without what speaks to systemd: no child may notify in our name."""
    return {name: value for name, value in os.environ.items() if name not in {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}}


def run(options: argparse.Namespace, paths: Paths) -> int:
    """The daemon. Whatever ends it is said three times: in the journal, in last.json, in STATUS=."""
    import asyncio

    from vllmd.config.redact import knower
    from vllmd.daemon import Daemon
    from vllmd.engines.caches import trusted
    from vllmd.instance import record
    from vllmd.system import credentials
    from vllmd.system.journal import open_journal
    from vllmd.system.notify import Notifier
    from vllmd.system.priority import prefer_us

    check_instance_name(options.name)  # before anything is written under that name
    notifier = Notifier.from_environ(os.environ)
    environ = _environ()
    journal = open_journal(os.environ, {"VLLMD_INSTANCE": options.name})
    journal.redact = knower(credentials.secrets(environ))  # also what is wrong with a configuration may quote one
    prefer_us()
    try:
        prepared = configured.prepare(options.name, trusted(paths), environ, options.overrides)
        return asyncio.run(Daemon(prepared, notifier, journal).run())
    except VllmdError as error:
        failure, more = record.failure_of(error), error.more
    except Exception as error:
        failure, more = record.unexpected(error, journal), {}
    finally:
        journal.close()
    notifier.status(journal.redact(f"Failed: {failure.what}" + (f" ({failure.hint})" if failure.hint else "")))
    journal.event("failed", failure.what, priority=3, code=failure.code, hint=failure.hint, exit_status=failure.status)
    if failure.code != "instance_locked":  # then last.json is the running supervisor's to write
        record.write_last(paths.instance_state(options.name), options.name, failure.status, failure, redact=journal.redact, **more)
    journal.close()
    return failure.status


def gpu_watch(options: argparse.Namespace, paths: Paths) -> int:
    """The host unit's service. Its settings are those of vllmd.yaml: gpu_watch, and of watch only `observe`."""
    import asyncio

    from vllmd.config import layers
    from vllmd.engines import registry
    from vllmd.gpu.host import Host
    from vllmd.gpu.watch import Sources
    from vllmd.system.journal import open_journal
    from vllmd.system.notify import Notifier

    loaded = layers.load(paths, None, _environ(), options.overrides, lambda name: registry.get(name).tuning)
    sources = Sources(drm=options.drm) if options.kmsg is None else Sources(kmsg=options.kmsg, drm=options.drm)
    notifier = Notifier.from_environ(os.environ)
    journal = open_journal(os.environ, {})
    config = loaded.config
    try:
        asyncio.run(Host(paths, config.gpu_watch, config.watch.observe, notifier=notifier, journal=journal, sources=sources, metrics=config.metrics).run())
    except VllmdError as error:
        notifier.status(f"Failed: {error.what}")
        raise
    finally:
        journal.close()
    return 0


def check(options: argparse.Namespace, paths: Paths) -> int:
    from vllmd.check import check_all, check_one

    if options.name is None:
        return check_all(paths, _environ(), options.overrides)
    return check_one(
        options.name, paths, _environ(), options.overrides, as_json=options.json, show_origin=options.show_origin
    )


def preflight(options: argparse.Namespace, paths: Paths) -> int:
    from vllmd import stages
    from vllmd.instance.checking import preflight_request
    from vllmd.preflight import run as preflights

    prepared = configured.prepare(options.name, paths, _environ(), options.overrides)
    where = stages.context(prepared)
    request = preflight_request(prepared.engine, where, stages.plan(prepared, where), dry_run=options.dry_run)
    report = preflights.run(request)
    print(json.dumps(report.as_dict()))
    return report.code


@contextlib.contextmanager
def _said(name: str) -> Iterator[Callable[[Progress], None]]:
    """Sentences as lines on stderr; bytes on their way as a bar on a terminal, else each tenth as a line."""
    with contextlib.ExitStack() as bar:
        show: list[Callable[[Progress], None]] = []

        def say(event: Progress) -> None:
            if event.total_bytes:
                show[:] = show or [_bar(bar, name)]
                show[0](event)
            elif event.text:
                print(printable(event.text), file=sys.stderr, flush=True)

        yield say


def _bar(within: contextlib.ExitStack, name: str) -> Callable[[Progress], None]:
    from vllmd.ctl.progress import Shown, progress

    show = within.enter_context(progress(name))
    return lambda event: show(Shown(event.phase, event.fraction, event.text))


def _request(prepared: configured.Prepared) -> ModelRequest:
    request = configured.model_request(prepared.config, prepared.paths)
    if not request.selected:
        raise ConfigError("no_model", f"{prepared.instance} has no model selected", f"{prepared.paths.vllmctl} model set {prepared.instance} PRESET|MODEL")
    return request


def resolve(options: argparse.Namespace, paths: Paths) -> int:
    """What the sources say goes to stderr, the result, good or bad, as one JSON object to stdout."""
    from vllmd.models.resolve import resolve_report

    prepared = configured.prepare(options.name, paths, _environ(), options.overrides)
    with _said(options.name) as say:
        report = resolve_report(_request(prepared), prepared.config.model, prepared.environ, say)
    print(json.dumps(report))
    if not report["ok"]:
        sys.stderr.write(two_lines("vllmd", report["error"]["what"], report["error"]["hint"]))
    return int(report["status"])


def serve(options: argparse.Namespace, paths: Paths) -> int:
    from vllmd import stages
    from vllmd.engines.caches import trusted
    from vllmd.engines.protocol import Access
    from vllmd.engines.serve_command import serve_instance
    from vllmd.models import resolve as resolver

    prepared = configured.prepare(options.name, trusted(paths), _environ(), options.overrides)
    where = stages.context(prepared)
    stages.plan(prepared, where)
    with _said(options.name) as say:
        model = resolver.resolve(_request(prepared), prepared.config.model, prepared.environ, say)
        model = resolver.verified(model, _request(prepared), prepared.config.model, say)
    where = replace(where, access=Access())  # nobody stays to keep the guard's file: the engine is told the given keys itself
    return serve_instance(where, prepared.engine, model.directory, options.rest, print_cmd=options.print_cmd, dry_run=options.dry_run)


def env_files(config: Config) -> list[Path]:
    """Where vllm-serve looks for the resolved model: where vllm-resolve-model writes it, then today's older name."""
    from vllmd.models.command import env_file
    from vllmd.models.identity import slug

    request = configured.model_request(config, SYSTEM)
    found = env_file(config.model, request)
    return [found] if config.model.env_file else [found, found.with_name(f"vllm-model.{slug(request.key)}.env")]
