"""Keys of a configuration file that are not the encoder's shape: refused, harmless or unknown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune.errors import InputError

# Keys that ask for another encoder than BERT's, unless they have one of these values.
_EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, [], None),
    "quantization_config": ({}, None),
    "feed_forward_type": ("original", None),
    "hidden_norm": ("post", None),
}

# Notes, choices of what a program returns, and settings of a decoder that generates text.
_HARMLESS_NAMES = """
architectures bos_token_id chunk_size_feed_forward cross_attention_hidden_size
decoder_start_token_id directionality dtype eos_token_id finetuning_task gradient_checkpointing
id2label label2id language model_max_length model_type name_or_path num_labels output_attentions
output_hidden_states output_past pad_token_id pooler_fc_size pooler_num_attention_heads
pooler_num_fc_layers pooler_size_per_head pooler_type prefix problem_type return_dict
sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings
tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())


def unknown_keys(raw: Mapping[str, Any], shape: frozenset[str]) -> list[str]:
    """Find the keys of a configuration that are not used.

    Args:
        raw: the parsed file.
        shape: the keys that give the encoder's shape.

    Returns:
        Keys that are not read anywhere, without those that are known to be harmless.

    Raises:
        InputError: a key asks for an encoder that is not BERT's.
    """
    if raw.get("model_type") not in ("bert", None):
        raise InputError(f"model_type is {raw['model_type']!r:.60}, not 'bert'")
    if raw.get("position_embedding_type", "absolute") not in ("absolute", None):
        raise InputError(
            f"position_embedding_type is {raw['position_embedding_type']!r:.60}, and only absolute "
            "position embeddings are supported"
        )
    for key, expected in _EXPECTED.items():
        if key in raw and raw[key] not in expected:
            raise InputError(f"{key} is {raw[key]!r:.60}, which BERT's encoder does not have")
    if raw.get("embedding_size") not in (raw.get("hidden_size"), None):
        raise InputError("embedding_size is not hidden_size, as it is in BERT")
    code = raw.get("auto_map")
    if code is not None and not isinstance(code, dict):
        raise InputError(f"auto_map is {code!r:.60}, not an object")
    own = [key for key in code or () if re.match("Auto(Config|Model)", key)]
    if own:
        raise InputError(f"auto_map names code of its own for {own[0]:.60}, which is never run")
    known = {*_HARMLESS, *_EXPECTED, *shape, "position_embedding_type", "embedding_size"}
    # Names with an underscore in front are notes of the library that wrote the file.
    return [key for key in sorted(raw) if key not in known | {"auto_map"} and key[:1] != "_"]
