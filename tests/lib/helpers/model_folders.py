"""Small model folders of Hugging Face's, written as `transformers` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("möchte", "mochte", "Möchte", "Mochte", "ich", "Ich", "中", "国", "中国")
CONFIG: Mapping[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


def write_json(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def write_vocab(folder: Path, words: Sequence[str] = WORDS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("".join(f"{word}\n" for word in (*SPECIAL, *words)), encoding="utf-8")
    return path


def tokenizer_json(
    words: Sequence[str] = WORDS, normalizer: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A `tokenizer.json` of `transformers` 5."""
    special = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, token in enumerate(SPECIAL)
    ]  # fmt: skip

    def template(*pieces: tuple[str, int]) -> list[dict[str, Any]]:
        return [
            {"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": segment}}
            for name, segment in pieces
        ]

    single = (("[CLS]", 0), ("A", 0), ("[SEP]", 0))
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": None, "lowercase": True, **(normalizer or {}),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template(*single),
            "pair": template(*single, ("B", 1), ("[SEP]", 1)),
            "special_tokens": {},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: number for number, word in enumerate((*SPECIAL, *words))},
        },
    }  # fmt: skip
    return {**values, **changes}
