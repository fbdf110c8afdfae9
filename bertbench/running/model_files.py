"""The files of a run's model: its shape and its tokenizer, read and checked together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bertbench.core.terminal import say
from finetune.errors import InputError
from finetune.model_files.model_folder import FoundTokenizer, ModelFiles, find_tokenizer
from finetune.spec.config import BertConfig, from_json_file
from finetune.text.tokenization import Tokenizer

# Published models pad their vocabulary by at most a few hundred entries.
_USUAL_UNUSED_ROWS = 512


def load_config_and_tokenizer(
    files: ModelFiles,
    asked: Mapping[str, bool | None],
    max_seq_length: int,
    trained_in: Sequence[Path] = (),
    *,
    insist: bool = False,
) -> tuple[BertConfig, Tokenizer]:
    """Read a model's shape and tokenizer, and check that they belong together.

    Args:
        files: the model.
        asked: what flags say of the tokenizer, see
            `finetune.model_files.model_folder.find_tokenizer`.
        max_seq_length: tokens of an example.
        trained_in: output folders. What a run has recorded there about the tokenizer counts more
            than what the folder of the weights says.
        insist: refuse a model of which neither flags nor files tell whether letters are lowered.

    Raises:
        InputError: unreadable files, a vocabulary larger than the model's, sequences longer than
            the model has positions for, or what `insist` refuses.
    """
    config = from_json_file(files.config_file)
    found = find_tokenizer(files, asked, trained_in)
    _check_sizes(files, config, found, max_seq_length)
    if insist and found.guess == "":
        raise InputError(
            "cannot tell whether this is an uncased model",
            path=files.vocab_file,
            hint="say --do_lower_case=true or --do_lower_case=false",
        )
    for remark in found.remarks:
        say(f"warning: {remark}")
    if found.guess is not None:
        lower = found.tokenizer.normalization.do_lower_case
        by = f"guessed from {found.guess}" if found.guess else "as nothing tells"
        say(f"do_lower_case is {lower}, {by}; --do_lower_case={str(not lower).lower()} changes it")
    return config, found.tokenizer


def _check_sizes(
    files: ModelFiles, config: BertConfig, found: FoundTokenizer, max_seq_length: int
) -> None:
    """Compare the vocabulary and the sequence length with the model's shape.

    Raises:
        InputError: the model has no embedding for one of them. What is only unusual is said.
    """
    vocab_size = found.tokenizer.vocab_size
    if vocab_size > config.vocab_size:
        raise InputError(
            f"the vocabulary has {vocab_size} entries but the model only "
            f"{config.vocab_size} word embeddings",
            path=files.vocab_file,
            hint="use the vocabulary that came with the checkpoint",
        )
    if max_seq_length > config.max_position_embeddings:
        raise InputError(
            f"--max_seq_length {max_seq_length} is more than the model's "
            f"{config.max_position_embeddings} positions",
            path=files.config_file,
        )
    if vocab_size < config.vocab_size - _USUAL_UNUSED_ROWS:
        say(
            f"warning: {files.vocab_file} has {vocab_size} entries for the model's "
            f"{config.vocab_size} word embeddings: is it the model's?"
        )
    if max_seq_length > (found.model_max_length or max_seq_length):
        say(
            f"warning: --max_seq_length {max_seq_length} is more than the model_max_length "
            f"{found.model_max_length} of its tokenizer_config.json"
        )


def check_segments(config: BertConfig, config_file: Path) -> None:
    """Refuse a model that cannot tell two texts apart, as a task of pairs needs it.

    Raises:
        InputError: the model has embeddings for one segment only.
    """
    if config.type_vocab_size < 2:
        raise InputError(
            f"type_vocab_size is {config.type_vocab_size}: the model has no embedding for the "
            "second of two texts",
            path=config_file,
            hint="use a model of two segments, or a task of single texts",
        )
