"""The laws of the layout, held: imports go one way, core is pure, the drawn graph is the table's."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import state_graph

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parent.parent.parent / "vllmd"
LAYERS = [
    {"errors"},
    {"config"},
    {"core"},
    {"system"},
    {"gpu", "models", "engines"},
    {"preflight"},
    {"configured"},
    {"stages"},
    {"instance"},
    {"daemon", "check"},
    {"cli", "ctl", "verbs", "commandline"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PURE = {"os", "socket", "subprocess", "time", "logging", "asyncio", "threading", "signal"}
CHILD_ONLY = {"pynvml", "boto3", "botocore", "huggingface_hub", "hf_xet", "blake3"}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module, *, top_level: bool = False) -> Iterator[str]:
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" if node.module == "vllmd" else node.module for alias in node.names)


def test_imports_go_one_way_and_never_between_siblings() -> None:
    wrong = []
    for name, tree in modules():
        own = layer(name)
        if not own or own == "__version__":
            continue
        assert own in LEVEL, f"{name} stands in no layer"
        for target in imported(tree):
            other = layer(target) if target.startswith("vllmd.") else ""
            if other in LEVEL and other != own and LEVEL[other] >= LEVEL[own] and LEVEL[own] < len(LAYERS) - 1:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_core_imports_nothing_that_acts_and_nothing_foreign() -> None:
    for name, tree in modules():
        if layer(name) == "core":
            for target in imported(tree):
                root = target.split(".")[0]
                assert root == "vllmd" or (root in sys.stdlib_module_names and root not in PURE), f"{name} imports {target}"


def test_what_belongs_to_children_is_never_imported_at_the_top() -> None:
    for name, tree in modules():
        for target in imported(tree, top_level=True):
            assert target.split(".")[0] not in CHILD_ONLY, f"{name} imports {target} at its top"
            assert target.split(".")[0] not in {"vllm", "torch", "transformers"}


def test_only_the_composition_knows_vllm() -> None:
    for name, tree in modules():
        if layer(name) not in {"engines", "cli", "ctl", "verbs"}:
            assert not any(target.startswith("vllmd.engines.vllm") for target in imported(tree)), name


def test_the_drawn_graph_is_the_table() -> None:
    page = state_graph.PAGE.read_text(encoding="utf-8")
    assert page == state_graph.rewritten(page), "run: python -m tools.state_graph"
