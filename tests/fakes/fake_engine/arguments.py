"""vLLM's command line, as far as a supervisor passes it, and the `--config` YAML beneath it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

VALUES = """
    host port uds served-model-name config shutdown-timeout api-key tensor-parallel-size pipeline-parallel-size
    data-parallel-size nnodes node-rank master-addr master-port distributed-executor-backend dtype max-model-len
    max-num-batched-tokens max-num-seqs kv-cache-dtype gpu-memory-utilization quantization compilation-config
    override-generation-config generation-config download-dir load-format revision tokenizer tokenizer-mode runner
    convert chat-template seed max-logprobs uvicorn-log-level middleware limit-mm-per-prompt lora-modules
    kv-cache-memory-bytes cpu-offload-gb block-size allowed-origins root-path ssl-keyfile ssl-certfile response-role
    reasoning-parser tool-call-parser speculative-config hf-overrides hf-token trust-request-chat-template
""".split()  # noqa: SIM905 - one line each would be sixty
SWITCHES = """
    enable-prefix-caching enforce-eager enable-chunked-prefill trust-remote-code async-scheduling enable-lora
    enable-log-requests enable-auto-tool-choice enable-server-load-tracking enable-sleep-mode disable-log-stats
    disable-uvicorn-access-log fail-on-environ-validation enable-request-id-headers enable-expert-parallel
    allow-credentials return-tokens-as-token-ids
""".split()  # noqa: SIM905


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm serve", allow_abbrev=False)
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--headless", action="store_true")
    for name in VALUES:
        if name == "middleware":
            parser.add_argument("--middleware", action="append", default=[])
            continue
        parser.add_argument(f"--{name}", nargs="+" if name in ("served-model-name", "api-key") else None)
    parser.add_argument("-tp", dest="tensor_parallel_size")
    parser.add_argument("-pp", dest="pipeline_parallel_size")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None)
    return parser


def normal(argument: str) -> str:
    """vLLM takes --max_model_len for --max-model-len."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def from_config(path: str) -> list[str]:
    """Top-level `key: value` lines of a YAML file and lists of `- item` lines, as arguments. No deeper nesting."""
    arguments: list[str] = []
    for line in Path(path).read_text().splitlines():
        if line.startswith("- "):
            arguments.append(scalar(line[2:]))
        elif line[:1].isalpha():
            key, _, value = line.partition(":")
            arguments += entry(f"--{key}", scalar(value))
    return arguments


def scalar(text: str) -> str:
    text = text.strip()
    return str(json.loads(text)) if text.startswith('"') else text.strip("'")


def entry(flag: str, value: str) -> list[str]:
    switch = {"true": [flag], "false": [flag.replace("--", "--no-", 1)], "": [flag]}
    return switch.get(value, [flag, value])


def parse(argv: list[str]) -> argparse.Namespace:
    """SystemExit(2) as argparse does; the command line wins over the file."""
    argv = [normal(argument) for argument in argv]
    parser = build_parser()
    known, _ = parser.parse_known_args(argv)
    below = [normal(argument) for argument in from_config(known.config)] if known.config else []
    options = parser.parse_args(argv, parser.parse_args(below))
    options.model = options.model_tag or options.model or ""
    return options


def number(value: Any, default: int) -> int:
    return default if value is None else int(float(value))
