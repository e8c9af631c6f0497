"""The preflight stage, seen from the daemon, and the hold on the port from the spawn until the listener is ours."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from vllmd.core.plan import Plan
from vllmd.engines.protocol import Context, Engine
from vllmd.errors import PortRefused, Status
from vllmd.preflight import lock, ports
from vllmd.preflight.child import kill_running
from vllmd.preflight.claims import LaunchRecord, Own, Policy, Stray
from vllmd.preflight.report import Report
from vllmd.preflight.run import PreflightRequest, run
from vllmd.system import launch
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread


def preflight_request(engine: Engine, context: Context, plan: Plan, *, dry_run: bool) -> PreflightRequest:
    """`dry_run` stands for the command line: a daemon that only says what it would stop could never start."""
    installed, config = plan.installed, context.config
    return PreflightRequest(
        endpoints=plan.endpoints,
        settings=replace(config.preflight, dry_run=dry_run),
        policy=_policy(context),
        gpus=config.gpus,
        memory_fraction=engine.memory_fraction(context),
        python=installed.python,
        cuda=installed.cuda,
        archs=installed.archs,
        lock_path=_lock_path(context, plan),
        remove_stale=not dry_run,
        gpu_release_timeout_s=config.stop.gpu_release_timeout_s,
    )


def _policy(context: Context) -> Policy:
    """Only what is left of this very instance may be ended; strays of our user in no unit where that is configured."""
    found = launch.read(context.paths.instance_state(context.instance))
    launches: tuple[LaunchRecord, ...] = ()
    if found is not None:
        launches = (
            LaunchRecord(found.launch_id, found.boot_id, found.pid, found.start_time, found.cgroup, found.uid),
        )
    own = Own(launches)
    return Stray(own) if context.config.preflight.reclaim == "stray" else own


def _lock_path(context: Context, plan: Plan) -> Path | None:
    port = next((each.port for each in plan.endpoints if each.kind == "tcp"), 0)
    if not port:
        return None
    if context.config.preflight.lock_file:
        return Path(context.config.preflight.lock_file)
    return lock.default_path(port, context.paths.runtime, context.environ, os.geteuid())


async def check_host(engine: Engine, context: Context, plan: Plan, journal: Journal | Stderr) -> Report:
    """Runs preflight, and says what it found; its failure as the VllmdError of its status."""
    try:
        report = await in_thread(lambda: run(preflight_request(engine, context, plan, dry_run=False)))
    finally:
        kill_running()  # after a stop in the middle; else there are none
    for warning in report.warnings:
        journal.event("", warning, priority=4)
    if not report.ok:
        raise report.as_error()
    text = f"the host is fit: port {report.action}, {len(report.gpus)} GPUs ({report.gpu_check_source})"
    journal.event("preflight-passed", text, priority=6)
    return report


class PortHold:
    """The port's lock, from before the spawn until our engine listens: no other start of ours can come between."""

    def __init__(self, context: Context, plan: Plan) -> None:
        self._path = _lock_path(context, plan)
        self._plan = plan
        self._lock: lock.Lock | None = None

    async def take(self) -> None:
        """TryLater when another start holds it; PortRefused when the port was taken since preflight."""
        if self._path is not None:
            self._lock = lock.take(self._path)
        await in_thread(self._check_bind)

    def _check_bind(self) -> None:
        for endpoint in self._plan.endpoints:
            if endpoint.kind == "tcp" and not ports.bind_probe(endpoint.host, endpoint.port).is_free:
                what = f"port {endpoint.port} was taken while the model was being resolved"
                raise PortRefused("port_taken_meanwhile", what, "the next start says by whom", status=Status.PORT_STILL_HELD)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
