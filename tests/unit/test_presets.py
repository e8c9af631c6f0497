"""Presets as data: what is shipped, what is wrong with a file, and the choice among GPUs that differ."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.needs import need
from vllmd.config import yamlfile
from vllmd.core import preset_choice as choice
from vllmd.core import tiers
from vllmd.core.preset_choice import Fit, Found, Misfit, Preset, Variant
from vllmd.core.tiers import TIERS, Card, Group, Part
from vllmd.errors import VllmdError
from vllmd.models import presets

pytestmark = pytest.mark.unit

SHARE = Path(__file__).parents[2] / "share"
SHIPPED = presets.read_from([SHARE / "presets"])
WHOLE = "tiers:\n  cpu:\n    model: a/b\n    min_gib: 4\n"


def cards(*which: tuple[str, str, int]) -> list[Card]:
    return [Card(index, f"GPU-{index}", name, capability=capability, memory_mib=mib) for index, (name, capability, mib) in enumerate(which)]


def judged(name: str, *groups: Group, wanted: int | None = None) -> Fit | Misfit:
    preset = SHIPPED.get(name)
    assert preset is not None
    return choice.judge(preset, groups, wanted)


# -- what is shipped


def test_every_shipped_preset_is_right_and_has_a_form_for_every_tier_of_the_table() -> None:
    assert SHIPPED.bad == {}
    by_name = {preset.id: set(preset.variants) for preset in SHIPPED.good}
    table = {tiers.BLACKWELL, tiers.HOPPER, tiers.OLDER, tiers.AMD}
    without_older = {"gemma4-26b-a4b", "nemotron3-elastic-30b-a3b"}
    from_the_table = ["qwen36-35b-a3b", "qwen36-27b", "qwen3-next-80b-a3b", "qwen3-30b-a3b", "llama-33-70b", "mistral-small-32-24b", "gemma4-31b", "gemma4-26b-a4b", "nemotron3-elastic-30b-a3b"]
    assert [preset.id for preset in SHIPPED.good][: len(from_the_table)] == from_the_table
    for name in from_the_table:
        assert by_name[name] - {tiers.LEGACY} == table - ({tiers.OLDER} if name in without_older else set()), name
    assert any(tiers.LEGACY in found for found in by_name.values())
    assert any(tiers.CPU in found for found in by_name.values())


def test_steps_of_the_context_begin_at_what_the_weights_need() -> None:
    for preset in SHIPPED.good:
        for tier, variant in preset.variants.items():
            assert variant.context[0][0] == variant.min_gib, f"{preset.id} on {tier}"


def test_without_bfloat16_every_form_says_half() -> None:
    for preset in SHIPPED.good:
        if variant := preset.variants.get(tiers.LEGACY):
            assert variant.args["dtype"] == "half", preset.id
            assert variant.min_capability >= (7, 5), "older ones have no kernels for AWQ, and no build of vLLM"


@pytest.mark.parametrize(("gib", "tokens"), [(31, None), (32, 65536), (47, 65536), (48, 131072), (79, 131072), (80, 262144), (1000, 262144)])
def test_the_largest_step_that_the_memory_reaches(gib: int, tokens: int | None) -> None:
    preset = SHIPPED.get("qwen36-35b-a3b")
    assert preset is not None
    assert preset.variants[tiers.BLACKWELL].tokens(gib) == tokens


def test_the_shipped_template_tells_tools_and_calls_as_json() -> None:
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        need(condition=False, what="jinja2")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((SHARE / "chat-templates/llama3-json-tools.jinja").read_text())
    call = {"function": {"name": "weather", "arguments": {"place": "Oslo"}}}
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "yes"},
    ]
    said = template.render(messages=messages, tools=[{"type": "function", "function": {"name": "weather"}}], bos_token="<|begin_of_text|>", add_generation_prompt=True)
    assert said.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n")
    assert '"name": "weather"' in said
    assert "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nRain?<|eot_id|>" in said
    assert '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "weather", "parameters": {"place": "Oslo"}}<|eot_id|>' in said
    assert said.endswith('<|start_header_id|>ipython<|end_header_id|>\n\n{"output": "yes"}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n')
    plain = template.render(messages=[{"role": "user", "content": " Hi "}], bos_token="<|begin_of_text|>", add_generation_prompt=False)
    assert "ipython" not in plain
    assert plain.endswith("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")


@pytest.mark.parametrize(("there", "reason"), [(0, "there is none"), (1, "there is 1"), (2, "there are 2 alike")])
def test_a_preset_of_more_gpus_than_there_are_says_how_many_it_wants(there: int, reason: str) -> None:
    four = Variant("a/b", 1, sizes=(4, 8))
    preset = Preset("big", "Big", "", 1, {tiers.CPU: four, tiers.OLDER: four})
    found = choice.judge(preset, tiers.groups(cards(*[("A100", "8.0", 81920)] * there), 65536))
    assert isinstance(found, Misfit)
    assert found.why == f"it needs 4 or 8 GPUs, and {reason}"


# -- files that are not right


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("", 1, "names no tier"),
        ("title: x\n", 1, "names no tier"),
        ("tiers: {}\n", 1, "names no tier"),
        ("tiers:\n  cpu:\n", 2, "tiers.cpu.model: is missing"),
        ("tiers:\n  gpu: {}\n", 2, "tiers.gpu: unknown key"),
        (WHOLE.replace("min_gib", "min_gb"), 4, "unknown key"),
        (WHOLE.replace("a/b", "b"), 3, "must be ORG/NAME, not 'b'"),
        (WHOLE.replace("4", "lots"), 4, "must be a whole number from 1 on, not 'lots'"),
        (WHOLE.replace("    min_gib: 4\n", ""), 2, "tiers.cpu.min_gib: is missing"),
        (WHOLE + "    context: {4: 8192, 8: 4096}\n", 5, "8 GiB give fewer tokens than 4"),
        (WHOLE + "    context: {little: 8192}\n", 5, "'little' is no number of GiB"),
        (WHOLE + "    gpus: 2\n", 5, "must be a list of numbers of GPUs"),
        (WHOLE + "    chat_template: ../../etc/passwd\n", 5, "must be the name of a file *.jinja"),
        (WHOLE + "    min_capability: new\n", 5, "must be a compute capability"),
        (WHOLE + "    env: {A: [1]}\n", 5, "tiers.cpu.env.A: must be text"),
        (WHOLE + "    env: {A: true}\n", 5, "tiers.cpu.env.A: must be text, and YAML reads it as True: write it in quotes"),
        (WHOLE + "    env: {A: }\n", 5, "tiers.cpu.env.A: is missing"),
        (WHOLE + "    args: [a]\n", 5, "must be a mapping, not a list"),
        (WHOLE + "    draft: {model: a/b, method: mtp, tokens: many}\n", 5, "tiers.cpu.draft.tokens: must be a whole number"),
        (WHOLE + "  amd: hopper\n", 5, "is the same as 'hopper', which is not described here"),
        ("titel: x\n" + WHOLE, 1, "titel: unknown key"),
        ("title: [1\n" + WHOLE, 2, "is not YAML"),
        ("- a\n", 1, "must hold keys and values"),
    ],
)
def test_a_file_that_is_not_right_is_told_with_its_line_and_the_others_work(text: str, place: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text(WHOLE)
    found = presets.read_from([tmp_path])
    assert [preset.id for preset in found.good] == ["good"]
    assert f"{tmp_path}/bad.yaml:{place}: " in found.bad["bad"].what
    assert reason in found.bad["bad"].what
    assert found.bad["bad"].hint


def test_an_administrator_s_preset_replaces_the_shipped_one_also_while_it_is_wrong(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "share", tmp_path / "etc"
    for place in (ours, theirs):
        place.mkdir()
        for name in ("one", "two", "three"):
            if (place, name) != (theirs, "three"):
                (place / f"{name}.yaml").write_text(f"title: {place.name}\n{WHOLE}")
    (theirs / "two.yaml").write_text("nonsense: 1\n")
    (theirs / "link.yaml").symlink_to(tmp_path / "nowhere")
    (theirs / "README").write_text("not a preset")
    found = presets.read_from([ours, theirs, tmp_path / "absent"])
    assert {preset.id: preset.title for preset in found.good} == {"one": "etc", "three": "share"}
    assert set(found.bad) == {"two", "link"}


def test_a_tier_may_be_as_another_one() -> None:
    preset = presets.parse("x", yamlfile.parse(WHOLE + "  amd: cpu\n", "x.yaml"))
    assert preset.variants["amd"] is preset.variants["cpu"]
    assert (preset.title, preset.order) == ("x", 1000)


@pytest.mark.parametrize("name", ["", "A", "a b", ".x", "-x", "x" * 65])
def test_names_that_no_preset_has(name: str) -> None:
    with pytest.raises(VllmdError, match=re.escape("cannot be the name of a preset")):
        presets.parse(name, yamlfile.parse(WHOLE, "x.yaml"))


# -- tiers


@pytest.mark.parametrize(
    ("capability", "tier"),
    [("12.1", "nvidia-blackwell"), ("12.0", "nvidia-blackwell"), ("11.0", "nvidia-blackwell"), ("10.0", "nvidia-blackwell"), ("9.0", "nvidia-hopper"),
     ("8.9", "nvidia-older"), ("8.0", "nvidia-older"), ("7.5", "nvidia-legacy"), ("6.1", "nvidia-legacy"), ("", "nvidia-older")],
)  # fmt: skip
def test_the_tier_of_a_compute_capability(capability: str, tier: str) -> None:
    assert tiers.tier_of(Card(0, capability=capability)) == tier


@pytest.mark.parametrize(("target", "tier"), [("gfx942", "amd"), ("gfx950", "amd"), ("gfx90a", "amd-older"), ("gfx1100", "amd-older"), ("", "amd-older")])
def test_the_tier_of_an_amd_gpu(target: str, tier: str) -> None:
    assert tiers.tier_of(Card(0, vendor="amd", architecture=target)) == tier


def test_what_cannot_be_used_is_left_out_and_no_gpu_left_is_not_a_processor() -> None:
    sick = Card(0, "GPU-0", "A", capability="9.0", memory_mib=1024, unusable="lost")
    assert tiers.groups([sick], 4096) == ()
    assert [group.kind for group in tiers.groups([], 4096)] == ["cpu"]
    preset = Preset("x", "x", "", 1, {tiers.HOPPER: Variant("a/b", 1)})
    assert choice.judge(preset, ()) == Misfit(preset, "no GPU of this host can be used")


def test_the_same_name_with_other_memory_is_another_gpu() -> None:
    found = tiers.groups(cards(("A100", "8.0", 81920), ("A100", "8.0", 40960), ("A100", "8.0", 81920)), 0)
    assert [(group.count, group.each_mib, group.tokens) for group in found] == [(2, 81920, ("GPU-0", "GPU-2")), (1, 40960, ("GPU-1",))]


def test_free_gpus_come_first() -> None:
    held = [Card(index, f"GPU-{index}", "H", capability="9.0", memory_mib=81559, held_by="qwen3" if index == 0 else "") for index in range(3)]
    [group] = tiers.groups(held, 0)
    assert (group.tokens, group.free) == (("GPU-1", "GPU-2", "GPU-0"), 2)


@pytest.mark.parametrize(("only", "tokens"), [(("1",), ["GPU-1"]), (("GPU-0",), ["GPU-0"]), (("MIG-a",), ["MIG-a"]), (("2",), []), (("7",), [])])
def test_only_what_the_instance_may_use(only: tuple[str, ...], tokens: list[str]) -> None:
    divided = Card(2, "GPU-2", "A", capability="8.0", memory_mib=40960, parts=(Part("MIG-a", 20096), Part("MIG-b", 20096)))
    all_of_them = [*cards(("A", "8.0", 40960), ("A", "8.0", 40960)), divided]
    assert [token for group in tiers.groups(all_of_them, 0, only) for token in group.tokens] == tokens


# -- the choice


def test_the_longest_context_then_the_fewest_gpus() -> None:
    eight = tiers.groups(cards(*[("A100", "8.0", 81920)] * 8), 0)
    fit = judged("mistral-small-32-24b", *eight)
    assert isinstance(fit, Fit)
    assert (fit.count, fit.context) == (1, 131072)
    fit = judged("qwen36-35b-a3b", *eight)
    assert isinstance(fit, Fit)
    assert (fit.count, fit.context) == (2, 262144)
    fit = judged("qwen36-35b-a3b", *eight, wanted=1)
    assert isinstance(fit, Fit)
    assert (fit.count, fit.context) == (1, 131072)


@pytest.mark.parametrize(
    ("name", "wanted", "why"),
    [
        ("qwen36-35b-a3b", 8, "it can be divided among 1, 2 or 4 GPUs, not among 8"),
        ("llama-33-70b", 16, "16 GPUs are wanted, and there are 8 alike"),
        ("llama-33-70b", 1, "it needs 44 GiB, and 1 x L4 has 22 GiB"),
    ],
)
def test_a_wanted_number_that_cannot_be(name: str, wanted: int, why: str) -> None:
    misfit = judged(name, *tiers.groups(cards(*[("L4", "8.9", 23034)] * 8), 0), wanted=wanted)
    assert isinstance(misfit, Misfit)
    assert misfit.why == why


def test_forced_is_the_nearest_with_the_shortest_context() -> None:
    preset = SHIPPED.get("llama-33-70b")
    assert preset is not None
    fit = choice.anyway(preset, tiers.groups(cards(("RTX 4090", "8.9", 24564), ("RTX 4090", "8.9", 24564)), 0), 1)
    assert fit is not None
    assert (fit.count, fit.context) == (1, 8192)
    assert choice.anyway(preset, tiers.groups([], 64 * 1024)) is None


def test_files_that_were_found_become_flags() -> None:
    fit = judged("gemma4-31b", *tiers.groups(cards(("B200", "10.0", 183359)), 0))
    assert isinstance(fit, Fit)

    def args(found: Found) -> dict[str, Any]:
        return dict(choice.settings(fit, found, is_only_group=True, names_gpus=False)["engine"]["args"])

    assert not {"chat-template", "speculative-config"} & set(args(Found()))
    whole = args(Found("/t.jinja", "/models/draft"))
    assert whole["chat-template"] == "/t.jinja"
    assert whole["speculative-config"] == {"method": "mtp", "model": "/models/draft", "num_speculative_tokens": 4}


# -- the page


@pytest.mark.parametrize("page", ["vllmd.presets.5.md", "choosing.md"])
def test_the_pages_tell_every_tier_and_their_examples_are_presets(page: str) -> None:
    text = (SHARE.parent / "docs" / page).read_text()
    assert all(f"| `{tier}` |" in text for tier in TIERS)
    example = re.search(r"(?m)^    # /etc/vllmd/presets/our-chat.yaml\n((?:    .*\n)+)", text)
    assert example
    preset = presets.parse("our-chat", yamlfile.parse(textwrap.dedent(example[1]), "our-chat.yaml"))
    assert preset.variants["nvidia-blackwell"].tokens(80) == 131072


def test_the_page_tells_every_key() -> None:
    text = (SHARE.parent / "docs/vllmd.presets.5.md").read_text()
    cells = " ".join(re.findall(r"(?m)^\| (`[^|]*) \|", text))
    assert all(f"`{key}`" in cells for key in (*presets.KEYS, *presets.VARIANT_KEYS))


# -- what others have, and what is not there


def test_gpus_that_somebody_has_are_left_to_him_where_it_fits_without_them() -> None:
    held = [Card(index, f"GPU-{index}", "A100", capability="8.0", memory_mib=81920, held_by="qwen3" if index == 0 else "") for index in range(2)]
    fit = judged("qwen36-35b-a3b", *tiers.groups(held, 0))
    assert isinstance(fit, Fit)
    assert (fit.count, fit.tokens, fit.context) == (1, ("GPU-1",), 131072)
    large = Preset("x", "x", "", 1, {tiers.OLDER: Variant("a/b", 100)})
    fit = choice.judge(large, tiers.groups(held, 0))
    assert isinstance(fit, Fit)
    assert fit.count == 2, "else it is told that they are not free"


def test_a_gpu_that_is_too_old_does_not_hide_what_is_wrong_with_the_others() -> None:
    misfit = judged("llama-33-70b", *tiers.groups(cards(("V100", "7.0", 32768), ("RTX 4090", "8.9", 24564)), 0))
    assert isinstance(misfit, Misfit)
    assert misfit.why == "it needs 44 GiB, and 1 x RTX 4090 has 23 GiB; GPUs that differ cannot be joined"
    misfit = judged("llama-33-70b", *tiers.groups(cards(("V100", "7.0", 32768)), 0))
    assert isinstance(misfit, Misfit)
    assert misfit.why == "it needs compute capability 7.5, and V100 has 7.0"


def test_gpus_are_wanted_where_there_is_none() -> None:
    misfit = judged("qwen3-0.6b", *tiers.groups([], 64 * 1024), wanted=2)
    assert isinstance(misfit, Misfit)
    assert misfit.why == "2 GPUs are wanted, and there is none"
