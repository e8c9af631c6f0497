"""The plan: everything decided before anything is done. Frozen values, made from the configuration, printed by `vllmd check`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vllmd.core.model import ModelRequest

MODEL_PLACEHOLDER = "<model>"
"""Stands in a plan's argv where the resolved, verified directory will stand."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine answers: TCP, or a unix socket."""

    kind: Literal["tcp", "uds"]
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.kind == "uds":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def reachable_host(self) -> str:
        """The address to connect to: a wildcard is reached over the loopback of its family."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)


@dataclass(frozen=True, slots=True)
class Command:
    """What is executed for an engine.

    `private_files` (absolute path -> content) are written 0600 before the exec and removed after the end: secrets
    that must stand on no argv. `secrets` are the values that redaction removes from anything printed.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    private_files: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Installed:
    """What is known of an engine that is installed, without running it.

    `flags` are the long options it knows (empty: unknown, so not checked); `python` its own interpreter, or ''.
    `cuda` its CUDA version ('' on CPU builds), `archs` the compute capabilities it was built for; `rocm` AMD's version.
    `name` is its directory's name where `vllmctl engine` installed it, else ''. `chosen` says by what it was chosen:
    'current' (`vllmctl engine`), 'engine.version', 'engine.executable' or 'PATH'.
    """

    executable: str
    version: str = ""
    variant: str = ""
    python: str = ""
    flags: frozenset[str] = frozenset()
    cuda: str = ""
    archs: tuple[str, ...] = ()
    name: str = ""
    rocm: str = ""
    chosen: str = ""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Every bound of an instance's life, in seconds."""

    stall_s: float
    start_s: float
    shutdown_s: float
    start_grace_s: float
    kill_s: float
    proof_s: float
    gpu_release_s: float = 0.0

    @property
    def drain_s(self) -> float:
        """From SIGTERM to the kill: vLLM can hang for ever at 'Waiting for connections to close'."""
        return self.shutdown_s + 10.0

    @property
    def stop_s(self) -> float:
        """The longest that a whole stop can take."""
        return self.drain_s + self.kill_s + self.gpu_release_s


@dataclass(frozen=True, slots=True)
class Plan:
    """One instance's start, decided. `command.argv` holds MODEL_PLACEHOLDER until the model is resolved."""

    instance: str
    engine: str
    installed: Installed
    model: ModelRequest
    served_name: str
    task: str
    endpoints: tuple[Endpoint, ...]
    command: Command
    deadlines: Deadlines
    gpus: str | int | tuple[str, ...]
    warnings: tuple[str, ...] = ()
