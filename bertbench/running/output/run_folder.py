"""A run's output folder: held by one run at a time, begun anew or continued, and cleared up."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bertbench.core.terminal import say
from bertbench.running.output.run_record import (
    RunDescription,
    add_results,
    begin_record,
    check_same_run,
    read_record,
)
from bertbench.running.settings import RunSettings
from finetune.errors import InputError
from finetune.model_files.checkpoint_files import remove_half_written
from finetune.model_files.model_folder import RUN_FILE
from finetune.spec.config import BertConfig, to_original_json
from finetune.storage.files import remove_temporaries, write_atomically
from finetune.storage.folders import HeldFolder, held_folder, try_lock
from finetune.text.tokenization import Tokenizer
from finetune.text.tokenizer_files import write_tokenizer_files

_BEST_WEIGHTS = ("best/model.ckpt-*", "best/checkpoint")
_RUN_FILES = (
    "model.ckpt-*",
    ".tmp-*",
    "checkpoint",
    "train_log.jsonl",
    "eval_log.jsonl",
    "events.out.tfevents.*",
    "eval/events.out.tfevents.*",
    *_BEST_WEIGHTS,
    "predictions.json",
    "nbest_predictions.json",
    "null_odds.json",
    "eval_results.txt",
    "test_results*.tsv",
    RUN_FILE,
)
_MODEL_FILES = ("bert_config.json", "vocab.txt", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    """The output folder of a run, while no other run can write to it.

    Attributes:
        held: the open folder.
        begun: the run's record as it began; None without training.
    """

    held: HeldFolder
    begun: Mapping[str, Any] | None = None

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.held.path

    def check(self) -> None:
        """See that the path still leads to the folder; to be called before anything is written.

        Raises:
            FolderLostError: somebody has deleted, renamed or replaced the folder.
        """
        self.held.check()

    def add_results(self, results: Mapping[str, Any]) -> None:
        """Add what came out to the run's record.

        Args:
            results: what is known by now.

        Raises:
            FolderLostError: the folder is not there any more.
            OSError: it cannot be written to.
        """
        self.check()
        warning = add_results(self.path, results, self.begun)
        if warning:
            say(f"warning: {warning}")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[HeldFolder]:
    """Hold a folder in the block, so that no other run writes to it.

    A folder that is not there is made. No file is left in it.

    Yields:
        The folder, which tells whether it is still there.

    Raises:
        InputError: another process holds it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(held_folder(folder))
        except OSError as error:
            raise InputError(f"cannot use the output folder ({error})", path=folder) from error
        if not try_lock(held.descriptor):
            raise InputError(
                "another run is writing to this folder",
                path=folder,
                hint="wait for its end, or choose another --output_dir",
            )
        yield held


@contextlib.contextmanager
def open_output(
    settings: RunSettings, description: RunDescription | None = None
) -> Iterator[OutputFolder]:
    """Hold the output folder of a run in the block.

    Args:
        settings: name the folder.
        description: of the training that begins or continues there; None for prediction alone.

    Raises:
        InputError: another process holds the folder, it cannot be made, or it holds another run.
    """
    with alone_in(settings.output_dir) as held:
        begun = None if description is None else begin_run(settings, description)
        clear_remains(settings.output_dir)
        yield OutputFolder(held, begun)


def begin_run(settings: RunSettings, description: RunDescription) -> dict[str, Any]:
    """Record the run in its output folder, or see that the folder holds this same run.

    Args:
        settings: name the folder.
        description: of the run.

    Returns:
        The run's record as it was written.

    Raises:
        InputError: the folder holds another run, or something else under the names needed.
    """
    folder = settings.output_dir
    if settings.overwrite and (folder / RUN_FILE).is_file():
        _remove(folder, _RUN_FILES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use the output folder ({error})", path=folder) from error
    earlier = _earlier_record(settings)
    if earlier is not None:
        check_same_run(earlier, description, folder)
    if not settings.keep_best:
        # They would be taken for the result although later weights may be better.
        _remove(folder, _BEST_WEIGHTS)
    return begin_record(folder, earlier or {}, settings, description)


def _earlier_record(settings: RunSettings) -> dict[str, Any] | None:
    """The record of the run in the output folder; None if there is no run.

    Raises:
        InputError: there is one and the settings forbid to continue it, its record is damaged, or
            there are checkpoints without a record.
    """
    folder = settings.output_dir
    if not (folder / RUN_FILE).exists():
        if any(folder.glob("model.ckpt-*")):
            raise InputError(
                "the output folder holds checkpoints of something else",
                path=folder,
                hint="choose another --output_dir",
            )
        return None
    earlier = read_record(folder)
    if not settings.resume:
        raise InputError(
            "the output folder holds a run already",
            path=folder,
            hint="choose another --output_dir, or --overwrite_output_dir to start again",
        )
    return earlier


def _remove(folder: Path, patterns: Iterable[str]) -> None:
    """Remove what a run has written, and nothing else: a user may keep other files there."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def clear_remains(folder: Path) -> None:
    """Remove what killed processes have left half written in an output folder.

    Args:
        folder: held by this process alone.
    """
    names = [pattern for pattern in (*_RUN_FILES, *_MODEL_FILES) if "/" not in pattern]
    for place in (folder, folder / "best"):
        remove_temporaries(place, names)
        if (folder / RUN_FILE).is_file():
            remove_half_written(place)


def write_model_files(settings: RunSettings, tokenizer: Tokenizer, config: BertConfig) -> None:
    """Leave configuration and tokenizer beside the weights, so the folder is a model folder."""
    folder = settings.output_dir
    for place in (folder, folder / "best") if settings.keep_best else (folder,):
        place.mkdir(exist_ok=True)
        write_atomically(place / "bert_config.json", to_original_json(config))
        write_tokenizer_files(place, tokenizer, config.max_position_embeddings)
