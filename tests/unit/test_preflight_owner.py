"""Which process is a vLLM, by its own facts."""

from __future__ import annotations

import pytest

from vllmd.preflight.owner import OwnerRules, ProcessFacts, is_engine

pytestmark = pytest.mark.unit

YES = [
    "vllm serve m",
    "/opt/vllm/bin/vllm serve m --port 8000",
    "/opt/vllm/bin/python /opt/vllm/bin/vllm serve m",
    "python3.11 -u /usr/bin/vllm serve m",
    "python -m vllm.entrypoints.openai.api_server --model m",
    "python -m vllm.entrypoints.cli.main serve m",
    "python3 -m vllm serve m",
    "python3 fake.py vllm serve m",
    "VLLM::APIServer_0",
]
NO = [
    "python -m vllmd run qwen3",
    "/usr/bin/python3 /usr/bin/vllmd run vllm serve",
    "vllmctl status",
    "/usr/bin/vllm-preflight vllm serve m",
    "python -m http.server 8000 --directory /srv/vllm",
    "python editor_plugin.py --language-server vllm",
    "python -m vllmtools serve",
    "vllm bench serve",
    "ssh -L 8000:localhost:8000 gpu vllm serve m",
    "kubectl exec pod -- vllm serve m",
    "nginx: worker process",
    "",
]


def process(line: str, **more: str) -> ProcessFacts:
    return ProcessFacts(4711, argv=tuple(line.split()), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("line", YES)
def test_a_vllm_passes(line: str) -> None:
    assert is_engine(process(line), OwnerRules())


@pytest.mark.parametrize("line", NO)
def test_what_only_talks_of_vllm_does_not(line: str) -> None:
    assert not is_engine(process(line), OwnerRules())


def test_a_shell_that_started_a_vllm_does_not() -> None:
    shell = ProcessFacts(1, argv=("/bin/bash", "-c", "cd /srv && vllm serve m"))
    assert not is_engine(shell, OwnerRules())


def test_a_title_of_one_argument_is_read_as_words() -> None:
    assert is_engine(ProcessFacts(1, argv=("vllm serve m --port 8000",)), OwnerRules())


def test_a_renamed_worker_is_known_by_its_short_name_too() -> None:
    assert is_engine(ProcessFacts(1, comm="VLLM::EngineCor"), OwnerRules())


def test_a_regex_replaces_the_test_and_looks_at_command_line_or_program() -> None:
    rules = OwnerRules(regex="my.engine$")
    assert is_engine(process("/opt/My-Engine"), rules)
    assert is_engine(process("serve", exe="/opt/MY-ENGINE"), rules)
    assert not is_engine(process("vllm serve m"), rules)


def test_signatures_add_to_the_test() -> None:
    rules = OwnerRules(signatures=("My-Fork", ""))
    assert is_engine(process("/opt/my-fork/bin/server"), rules)
    assert is_engine(process("vllm serve m"), rules)
    assert not is_engine(process("nginx"), rules)


@pytest.mark.parametrize("rules", [OwnerRules(regex="vllm"), OwnerRules(regex="."), OwnerRules(signatures=("vllm",))])
@pytest.mark.parametrize("line", ["python -m vllmd run a", "/usr/bin/vllmd run a", "python /usr/bin/vllmctl logs", "vllm-preflight"])
def test_vllmd_itself_never_passes_whatever_the_pattern(line: str, rules: OwnerRules) -> None:
    assert not is_engine(process(line), rules)
