"""Is this process an engine of the kind we may stop? Decided from facts of the process itself, never of its parents.

Traps this avoids: any Python process with 'vllm' in its command line is not a vLLM (this daemon is one such); a shell
that says 'vllm serve' is not the listener that it started. So argv is read as argv, not as text, and vllmd itself never
passes, whatever pattern a user sets.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """A process as /proc shows it. `uid` None and texts '' where it cannot be known."""

    pid: int
    ppid: int = 0
    uid: int | None = None
    start_time: int = 0
    comm: str = ""
    argv: tuple[str, ...] = ()
    exe: str = ""
    cgroup: str = ""
    launch_id: str = ""


@dataclass(frozen=True, slots=True)
class OwnerRules:
    """What a user set: `regex` replaces the built-in test, `signatures` are substrings that count too."""

    regex: str = ""
    signatures: tuple[str, ...] = ()


def is_engine(process: ProcessFacts, rules: OwnerRules) -> bool:
    """Whether the process is a vLLM, by its own command line or name."""
    if is_supervisor(process):
        return False
    text = " ".join(process.argv)
    if any(signature and signature.lower() in text.lower() for signature in rules.signatures):
        return True
    if rules.regex:
        return any(re.search(rules.regex, each, re.IGNORECASE) for each in (text, process.exe))
    return is_renamed(process) or _serves(process.argv)


def is_renamed(process: ProcessFacts) -> bool:
    """vLLM's workers write a title over their argv: VLLM::EngineCore, VLLM::Worker_TP0, VLLM::APIServer_1."""
    return process.comm.startswith("VLLM::") or any(word.startswith("VLLM::") for word in process.argv[:1])


def is_supervisor(process: ProcessFacts) -> bool:
    """Whether the process is vllmd or one of its commands."""
    words = _arguments(process.argv)
    module = words[1] if words[:1] == ["-m"] and len(words) > 1 else ""
    return module.split(".")[0] == "vllmd" or bool(words and _name(words[0]) in _OWN_COMMANDS)


_OWN_COMMANDS = frozenset({"vllmd", "vllmctl", "vllm-preflight", "vllm-resolve-model", "vllm-serve"})
_PYTHON = re.compile(r"python[0-9.]*t?")


def _serves(argv: Sequence[str]) -> bool:
    words = _arguments(argv)
    if not words:
        return False
    for first, second in itertools.pairwise(words):
        if first == "-m" and (second == "vllm" or second.startswith("vllm.entrypoints")):
            return True
        if _name(first) == "vllm" and second == "serve":
            return True
    return False


def _arguments(argv: Sequence[str]) -> list[str]:
    """The words to look at: for Python what follows the interpreter, for a title ('vllm serve ...' as one argument) its
    words; nothing for programs that only carry such words for another machine, as `ssh host vllm serve` does."""
    words = list(argv)
    if len(words) == 1 and " " in words[0]:
        words = words[0].split()
    if not words:
        return []
    if _PYTHON.fullmatch(_name(words[0])):
        return words[1:]
    return words if _name(words[0]) in _OWN_COMMANDS or _name(words[0]) == "vllm" else []


def _name(word: str) -> str:
    return word.rpartition("/")[2]
