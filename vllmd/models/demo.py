"""Tiny models with random weights, made without network: for `make run`, for tests, for trying an installation.

    python -m vllmd.models.demo DIR [--kind generate|embed|score] [--shards N]

Only the standard library is used, and nothing of vllmd, so that any Python can run this file, the engine's own too. The
same seed gives the same bytes everywhere: that is why the tokenizer is trained here (61 merges) and not by a library.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import struct
from array import array
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

KINDS = ("generate", "embed", "score")
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 64, 2, 4, 2, 32, 128, 320
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "The server answers when the model is loaded, and not before.",
    "A tiny model knows nothing, but it says so very quickly.",
    "Start the instance, watch the journal, and stop it again.",
    "Hello, how are you? I am fine, thank you. What is the time?",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Shape = tuple[int, ...]


def make(directory: Path, kind: str = "generate", shards: int = 2, seed: int = 7) -> Path:
    """Write a whole model into `directory` (made if missing); returns it. Under 1 MB, in a fraction of a second."""
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", _config(kind))
    _write_tokenizer(directory)
    if kind == "embed":
        _write_pooling(directory)
    if kind == "generate":
        _write_json(directory / "generation_config.json", {"eos_token_id": [0, 2], "pad_token_id": 0})
    _write_weights(directory, _shapes(kind), shards, random.Random(seed))
    return directory


def _config(kind: str) -> dict[str, Any]:
    architecture = "Qwen3ForSequenceClassification" if kind == "score" else "Qwen3ForCausalLM"
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "qwen3",
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.02,
    }
    if kind == "score":
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config


def _write_pooling(directory: Path) -> None:
    """The sentence-transformers layout, as real embedding models of causal architectures have it."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    _write_json(directory / "modules.json", modules)
    (directory / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in ("cls_token", "mean_tokens", "lasttoken")}
    _write_json(directory / "1_Pooling/config.json", {"word_embedding_dimension": HIDDEN, **modes})


# The tokenizer: byte-level BPE.


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable ones stand for themselves."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, moved = [], 0
    for byte in range(256):
        letters.append(chr(byte) if byte in plain else chr(256 + moved))
        moved += byte not in plain
    return letters


def _train_merges(count: int) -> list[tuple[str, str]]:
    letters = _byte_letters()
    words = [
        [letters[byte] for byte in word.encode()] for text in SENTENCES for word in re.findall(r" ?\w+| ?[^\s\w]+", text)
    ]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in word:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def _write_tokenizer(directory: Path) -> None:
    merges = _train_merges(VOCAB - 256 - len(SPECIAL))
    tokens = [*SPECIAL, *_byte_letters(), *(left + right for left, right in merges)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [list(pair) for pair in merges],
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": number, "content": token, "special": True, **flags} for number, token in enumerate(SPECIAL)]
    pipeline = {"normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    _write_json(directory / "tokenizer.json", head | pipeline)
    names = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "chat_template": CHAT_TEMPLATE}
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "clean_up_tokenization_spaces": False} | names,
    )


# The weights: safetensors, float32.


def _shapes(kind: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}."
        shapes |= {
            f"{place}input_layernorm.weight": (HIDDEN,),
            f"{place}self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{place}self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{place}self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{place}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{place}self_attn.q_norm.weight": (HEAD_DIM,),
            f"{place}self_attn.k_norm.weight": (HEAD_DIM,),
            f"{place}post_attention_layernorm.weight": (HIDDEN,),
            f"{place}mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{place}mlp.up_proj.weight": (MLP, HIDDEN),
            f"{place}mlp.down_proj.weight": (HIDDEN, MLP),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes | ({"score.weight": (1, HIDDEN)} if kind == "score" else {})


def _tensor(shape: Shape, source: random.Random) -> bytes:
    if len(shape) == 1:
        values = array("f", [1.0] * shape[0])
    else:
        values = array("f", (source.uniform(-0.2, 0.2) for _ in range(shape[0] * shape[1])))
    return values.tobytes()


def _write_weights(directory: Path, shapes: dict[str, Shape], shards: int, source: random.Random) -> None:
    names = list(shapes)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        total += write_safetensors(directory / file, {name: (shapes[name], _tensor(shapes[name], source)) for name in part})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: dict[str, tuple[Shape, bytes]]) -> int:
    """Write float32 tensors; returns the bytes of their data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(data for _, data in tensors.values())
    return offset


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vllmd.models.demo", description="Make a tiny model with random weights.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="generate")
    parser.add_argument("--shards", type=int, default=2)
    given = parser.parse_args(argv)
    make(given.directory, given.kind, given.shards)


if __name__ == "__main__":
    main()
