"""Contexts for the engine's unit tests: real settings from an environment and a mapping, an installation that is only described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllmd.config import layers
from vllmd.config.paths import root_paths
from vllmd.core.plan import Installed
from vllmd.engines.protocol import GUARD_FILE, Access, Context
from vllmd.engines.vllm_tuning import Tuning

_KNOWN = """
    --host --port --uds --model --served-model-name --tensor-parallel-size -tp --pipeline-parallel-size -pp --data-parallel-size -dp
    --data-parallel-size-local --api-key --config --shutdown-timeout --enable-prefix-caching --no-enable-prefix-caching --kv-cache-dtype --max-model-len
    --max-num-batched-tokens --max-num-seqs --override-generation-config --gpu-memory-utilization --enforce-eager --no-enforce-eager --dtype
    --headless --compilation-config -cc --middleware --lora-modules --disable-uvicorn-access-log --no-disable-uvicorn-access-log --runner --convert
    --grpc --grpc-port --nnodes --model-impl --portable --optimization-level
"""
FLAGS = frozenset(_KNOWN.split())


def installed(**changes: Any) -> Installed:
    return replace(
        Installed(
            "/opt/vllmd/engines/vllm-0.32.0-cpu/bin/vllm",
            "0.32.0",
            "cpu",
            "/opt/vllmd/engines/vllm-0.32.0-cpu/bin/python3",
            FLAGS,
        ),
        **changes,
    )


def context(
    root: Path, settings: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None, **engine: Any
) -> Context:
    """`settings` by key, as on the command line (`serve.port`)."""
    loaded = layers.load(
        root_paths(root),
        None,
        environ or {},
        {"model": "/models/demo", **(settings or {})},
        lambda _name: Tuning,
        read_files=False,
    )
    return Context(loaded.config, root_paths(root), "demo", installed(**engine), environ or {})


def guarded(root: Path, *arguments: Any, client_keys: tuple[str, ...] = (), **engine: Any) -> Context:
    """As `context`, of an instance that `vllmd run` supervises."""
    where = context(root, *arguments, **engine)
    access = Access(str(where.paths.instance_runtime("demo") / GUARD_FILE), "internal-key", client_keys)
    return replace(where, access=access)
