"""Pure: from the names of a model's files to what is missing. Indexes, split sets, single files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Set

PICKLES = ("bin", "pt", "pth", "ckpt", "pkl")
"""Formats in which a file says what to run while it is loaded."""
EXTENSIONS = ("safetensors", *PICKLES, "gguf")
NOT_WEIGHTS = re.compile(r"training_args\.bin|optimizer\.(bin|pt)|scheduler\.(bin|pt)|rng_state.*\.pth")
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin|pt|pth|ckpt|pkl|gguf)", re.ASCII)
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "tekken.json"}
TOKENIZER_PAIRS = ({"vocab.json", "merges.txt"}, {"tokenizer_config.json", "vocab.json"})
LONGEST_NAME = 255
"""Of a file, on every file system; what an index names may be longer."""
TOKENIZER_PLACES = ("", "tokenizer/", "tokenizer_files/")


def is_weight(name: str) -> bool:
    return name.rpartition(".")[2] in EXTENSIONS and not NOT_WEIGHTS.fullmatch(name)


def is_pickle(name: str) -> bool:
    return is_weight(name) and name.rpartition(".")[2] in PICKLES


def is_pickle_index(name: str) -> bool:
    """pytorch_model.bin.index.json and the like."""
    stem = name.removesuffix(".index.json")
    return stem != name and stem.rpartition(".")[2] in PICKLES


def loaded(names: Iterable[str]) -> list[str]:
    """Of the files of one directory the weights that an engine loads: it prefers safetensors, and then opens no
    pickle. Hidden files are none: no pattern of an engine's matches them."""
    found = [name for name in names if is_weight(name) and not name.startswith(".")]
    if any(name.endswith(".safetensors") for name in found):
        return [name for name in found if not is_pickle(name)]
    return found


def has_tokenizer(names: Set[str]) -> bool:
    """Any layout that an engine reads: also Mistral's tekken.json and the *.tiktoken of older Qwen and Kimi models."""
    for place in TOKENIZER_PLACES:
        here = {name.removeprefix(place) for name in names if name.startswith(place)}
        here = {name for name in here if "/" not in name}
        if here & TOKENIZERS or any(pair <= here for pair in TOKENIZER_PAIRS) or any(name.endswith(".tiktoken") for name in here):
            return True
    return False


def missing_parts(names: Iterable[str]) -> tuple[list[str], str]:
    """The parts that split sets (NAME-00001-of-00003.safetensors) lack, whichever are missing, the first included; and
    what is wrong with a part's own numbers ('' if nothing)."""
    sets: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for name in names:
        if match := PART.fullmatch(name):
            stem, part, total, extension = match.groups()
            if not 1 <= int(part) <= int(total):
                return [], f"{name} is part {int(part)} of {int(total)}"
            sets[stem, total, extension].add(int(part))
    missing = [
        f"{stem}-{part:05}-of-{total}.{extension}"
        for (stem, total, extension), parts in sorted(sets.items())
        for part in range(1, int(total) + 1)
        if part not in parts
    ]
    return missing, ""


def first_five(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in names[:5]) + more
