"""What does this failure mean? From what a dead engine left (exit, kernel's counters, GPU findings, its lines) to a cause,
what to do about it, and the status that makes systemd do the right thing. Decides; reads nothing.

CAUSES is the table: one row a cause. An engine's own words are its plug-in's (`Signature`); what the kernel and the GPU
say comes before them, because an engine that was killed has said nothing, and one whose GPU is lost says a hundred things.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vllmd.core.events import Failure
from vllmd.core.fingerprint import Traceback, is_logged, plain, root_cause
from vllmd.core.lifecycle import NO_RESTART

QUOTED = 400
"""Characters of an engine's line in a sentence for people; the evidence has the whole of it."""
SAME_CRASH = 3
"""As often in a row the same crash is said to be one that a restart does not help."""


@dataclass(frozen=True, slots=True)
class Row:
    """`what` begins the sentence; `hint` is what to do where nothing better is known; `event` names the journal's kind."""

    what: str
    hint: str
    status: int

    def event(self, code: str) -> str:
        return "cause-" + code.replace("_", "-")


CAUSES: dict[str, Row] = {
    "host_out_of_memory": Row(
        "the kernel ended the engine because the host's memory, or the unit's share of it, ran out",
        "give the unit more (MemoryMax= in a drop-in), or the engine less: fewer workers, a smaller swap or CPU cache; `journalctl -k -e` names what was large",
        70,
    ),
    "gpu_lost": Row("a GPU is lost", "`vllmctl gpu` says what it needs: a reset, a reboot, or a person", 69),
    "gpu_fault": Row("a GPU reported an error of this engine", "if it comes back on the same GPU, suspect the GPU: `vllmctl gpu`", 70),
    "cuda_out_of_memory": Row(
        "the model does not fit into the GPU's memory",
        "lower serve.max_model_len or serve.gpu_memory_utilization, raise serve.tensor_parallel_size, or serve a quantized model",
        78,
    ),
    "gpu_memory_taken": Row(
        "the GPU's memory is taken by others", "end what holds it (`vllmctl gpu` names it), or lower serve.gpu_memory_utilization", 75
    ),
    "cuda_out_of_memory_serving": Row(
        "the engine ran out of GPU memory while it served",
        "lower serve.gpu_memory_utilization, so that more than the KV cache has room, or engine.args max-num-seqs; see that no other program uses the GPU (`vllmctl gpu`)",
        70,
    ),
    "nccl_failed": Row(
        "the GPUs cannot talk to each other (NCCL)",
        "NCCL_DEBUG=INFO under engine.env says more; look at links and peers: `nvidia-smi topo -m`, NCCL_SOCKET_IFNAME, the firewall between hosts",
        70,
    ),
    "peer_lost": Row("another host of this model is gone", "look there first: this instance failed because that one did", 75),
    "bad_flag": Row("the engine refuses its settings", "correct the instance's file (`vllmd check NAME --show-origin` says where each stands)", 78),
    "bad_model": Row("the engine refuses the model", "`vllmd resolve NAME` checks its files; `vllmctl store verify` reads every byte", 65),
    "port_taken": Row("the port was taken while the engine started", "`ss -ltnp` names who listens; the next start says it too", 75),
    "compile_cache_poisoned": Row(
        "the cache of compiled code is broken", "it was moved aside, and the next start compiles anew; nothing needs to be done", 70
    ),
    "library_missing": Row(
        "the engine lacks a library, or has one that does not fit", "`vllmctl engine install` makes a whole one; `ldd` on the named file shows what is missing", 78
    ),
    "driver_mismatch": Row(
        "the GPU driver does not fit the engine's CUDA", "update the driver and reboot (`nvidia-smi` shows its version), or install an engine for the older CUDA", 69
    ),
    "disk_full": Row("the engine found no space on a disk", "`df -h` shows it; caches are below vllmd's cache directory, and /dev/shm is the unit's own", 74),
    "worker_hung": Row("a worker of the engine hangs, says the engine", "the stacks of the incident show where; look at the GPU: `vllmctl gpu`", 75),
    "cuda_error": Row(
        "a CUDA kernel of the engine failed", "if it comes back, look at the GPU (`vllmctl gpu`), then at the engine's version; CUDA_LAUNCH_BLOCKING=1 under engine.env names the kernel", 70
    ),
    "engine_bug": Row("the engine crashed", "a fault of the engine: the incident has its traceback for a report; another version, or fewer options, may help", 70),
}

_CRASHES = {
    "SIGSEGV": "",
    "SIGABRT": "",
    "SIGFPE": "",
    "SIGBUS": "no page was left behind a mapping: mostly /dev/shm is too small (`df -h /dev/shm`; TemporaryFileSystem= in the unit), or the model's disk fails",
    "SIGILL": "this processor lacks an instruction that the engine uses: try engine.args `dtype: float32`, or an engine built for this processor",
}
_VAGUE = {"engine_exited", "engine_unhealthy", "engine_died", "engine_dead", "proof_failed"}
"""What was noticed, where that says only *that* the engine died: its own words may name the cause. A verdict of the watch
over a hung or sick engine is a cause by itself; only the kernel or a GPU knows better."""


@dataclass(frozen=True, slots=True)
class GpuFact:
    """A finding of the GPU watch on one of our GPUs. `fatal`: the GPU needs a reset, a reboot or a person."""

    what: str
    hint: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when an engine has failed. `signal` is a name ('SIGKILL') or ''; `oom_kills` counts the processes of
    this launch that the out-of-memory killer took, `host_oom_kills` those of the whole host meanwhile (where the launch
    has no cgroup of its own); `memory_fraction` is what the engine asks for of each GPU; `gpu_total_gib` 0 where unknown."""

    failure: Failure
    serving: bool = False
    phase: str = ""
    exit: str = ""
    exit_code: int | None = None
    signal: str = ""
    oom_kills: int = 0
    host_oom_kills: int = 0
    memory_text: str = ""
    lines: Sequence[str] = ()
    gpu: Sequence[GpuFact] = ()
    memory_fraction: float = 0.0
    gpu_total_gib: float = 0.0


Advice = tuple[str, int]
"""A hint ('' for the row's own), and a status (0 for the row's own)."""


@dataclass(frozen=True, slots=True)
class Signature:
    """An engine's words and what they mean. `when`: a text that a client's request may cause counts only at the start.
    `advise` makes a hint with figures from what was found."""

    pattern: re.Pattern[str]
    code: str
    when: Literal["start", "serving", "any"] = "any"
    advise: Callable[[re.Match[str], Facts], Advice] | None = None


@dataclass(frozen=True, slots=True)
class Signs:
    """What an engine's plug-in knows: its words in order of weight, `echoes`, the texts of those who only saw another die, and
    `quotes`, the beginnings of errors that repeat what a client has sent; `front` matches lines of those who answer requests."""

    signatures: tuple[Signature, ...] = ()
    echoes: tuple[re.Pattern[str], ...] = ()
    quotes: tuple[re.Pattern[str], ...] = ()
    front: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """`failure` replaces the vague one; `event` is the kind of its journal entry ('' when nothing was learned)."""

    failure: Failure
    event: str = ""
    quote: str = ""
    traceback: Traceback | None = None

    @property
    def code(self) -> str:
        return self.failure.code


def decide(facts: Facts, signs: Signs) -> Cause:
    """The cause, or what was noticed, unchanged, where nothing says more."""
    vague = facts.failure.code in _VAGUE
    facts = replace(facts, lines=_telling(facts, signs))
    # Whoever is killed by a signal, or hangs, has not ended of an exception: a traceback among its lines is a request's.
    found = root_cause(facts.lines, signs.echoes) if vague and not facts.signal else None
    cause = _by_kernel(facts) or _by_gpu(facts)
    if cause is None and vague:
        cause = _by_words(facts, signs) or _by_crash(facts, found, signs) or _by_host(facts)
    return replace(cause or Cause(facts.failure), traceback=found)


def _telling(facts: Facts, signs: Signs) -> Sequence[str]:
    """While it serves, whoever answers requests logs what went wrong with one, in a client's words: nothing dies of that. What
    they print at their own end is not logged, and tells nothing where it was another part that died."""
    if not facts.serving or signs.front is None:
        return facts.lines
    front, ended = signs.front, facts.failure.code == "engine_exited"
    return [line for line in facts.lines if not front.match(line) or (ended and not is_logged(line))]


def _by_kernel(facts: Facts) -> Cause | None:
    return _cause("host_out_of_memory", facts, facts.memory_text) if facts.oom_kills else None


def _by_host(facts: Facts) -> Cause | None:
    """Without a cgroup nobody says whom the killer took; a SIGKILL, or the death of a worker whose status only its parent
    knows, that came while it was at work is taken for its."""
    if facts.host_oom_kills and (facts.signal == "SIGKILL" or facts.failure.code == "engine_died"):
        return _cause("host_out_of_memory", facts, "the out-of-memory killer was at work on this host at that moment")
    return None


def _by_gpu(facts: Facts) -> Cause | None:
    """A verdict of the GPU watch says by itself which GPU, what it has and what to do."""
    if facts.failure.code.startswith("gpu_"):
        return None
    fatal = [each for each in facts.gpu if each.fatal]
    if fatal:
        return _cause("gpu_lost", facts, fatal[0].what, fatal[0].hint)
    if facts.gpu and facts.failure.code in _VAGUE:
        return _cause("gpu_fault", facts, facts.gpu[0].what, facts.gpu[0].hint)
    return None


def _by_words(facts: Facts, signs: Signs) -> Cause | None:
    now = "serving" if facts.serving else "start"
    lines = [text for line in facts.lines if not is_calm(line) and (text := plain(line)[1]) and not text.startswith(_SOURCE)]
    lines = [text for text in lines if not any(quote.match(text) for quote in signs.quotes)]
    for signature in signs.signatures:
        if signature.when not in (now, "any"):
            continue
        match = _first(signature.pattern, lines)
        if match is not None:
            hint, status = signature.advise(match, facts) if signature.advise else ("", 0)
            status = status or CAUSES[signature.code].status
            if facts.serving and status in NO_RESTART:
                # Its words may be a client's, and it has served with these files and GPUs: what is really lost, the next start's checks find.
                status = facts.failure.status
            return _cause(signature.code, facts, match.string.strip(), hint, status)
    return None


def _first(pattern: re.Pattern[str], lines: Iterable[str]) -> re.Match[str] | None:
    """The earliest: those who wait for the process that failed repeat its words after it."""
    return next((match for line in lines if (match := pattern.search(line))), None)


_SOURCE = " " * 4
"""Within a traceback: the line of code that raised the error holds its words too, with the figures not filled in."""
_CALM = re.compile(r"^(?:\([^)]{1,80}\) )?(?:(?:DEBUG|INFO|WARNING)[: ]|(?:\[rank\d{1,5}\]: ?)?\[?[IW]\d{4} |[^\s:]{1,300}:\d{1,7}: \w{0,60}Warning: )")
"""Of the engine, of C++ below it ('[rank1]:[W1121 10:11:12.123 TCPStore.cpp:125] ...'), of Python ('x.py:14: UserWarning: ...')."""


def is_calm(line: str) -> bool:
    """A line that says itself that it is no error: a prompt that is logged may hold any text, and torchvision warns of a
    library that nobody needs in the words of one that is missing."""
    return bool(_CALM.match(line))


def _by_crash(facts: Facts, found: Traceback | None, signs: Signs) -> Cause | None:
    if facts.signal in _CRASHES:
        return _cause("engine_bug", facts, f"killed by {facts.signal}", _CRASHES[facts.signal])
    if found is None or any(echo.search(found.text) for echo in signs.echoes):
        return None  # a process that was killed from without leaves only the cries of those who waited for it
    return _cause("engine_bug", facts, found.text)


def _cause(code: str, facts: Facts, quote: str, hint: str = "", status: int = 0) -> Cause:
    row = CAUSES[code]
    quote = _cut(quote)
    where = "" if facts.serving or not facts.phase else f" while {facts.phase}"
    ended = f" ({facts.exit})" if facts.exit and facts.exit not in quote else ""
    what = f"{row.what}{where}{ended}" + (f": {quote}" if quote else "")
    return Cause(Failure(code, what, hint or row.hint, status or row.status), row.event(code), quote)


def _cut(text: str) -> str:
    return text if len(text) <= QUOTED else text[: QUOTED - 4] + " ..."


def again(failure: Failure, times: int, first_at: str) -> Failure:
    """The same failure with a word on how often it has happened in a row."""
    if times < SAME_CRASH:
        return failure
    what = f"{failure.what} (the same failure, {times} times in a row since {first_at})"
    hint = f"restarts have not helped: {failure.hint}" if failure.hint else "restarts have not helped"
    return replace(failure, what=what, hint=hint)
