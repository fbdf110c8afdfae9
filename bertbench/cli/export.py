"""`bertbench export`: fine-tuned weights in the formats of other tools."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bertbench.cli.options.common import CONTEXT, PathName, json_option, write_json
from bertbench.core.errors import WorkError
from bertbench.core.quiet import muted_stderr
from bertbench.core.terminal import echo, say
from bertbench.running.model_files import load_config_and_tokenizer
from finetune.errors import InputError
from finetune.model_files.checkpoint_files import PREFIX, list_checkpoints
from finetune.model_files.head_labels import read_trained_head
from finetune.model_files.model_folder import find_model_files

if TYPE_CHECKING:
    from finetune.export.export_weights import StoredModel
    from finetune.text.tokenization import Tokenizer

_FILE = PathName(dir_okay=False)
_FOLDER = PathName(file_okay=False)


@click.command(context_settings=CONTEXT)
@click.argument("model_dir", type=_FOLDER)
@click.option("--to", "folder", type=_FOLDER, required=True, help="Folder to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["huggingface", "checkpoint", "savedmodel"]),
    required=True,
    help="For transformers; for the original code and `bertbench run`; or for serving.",
)
@click.option(
    "--checkpoint",
    help="Weights to export: a step, as 1200, or a checkpoint's name. Default: the newest.",
)
@click.option("--bert_config_file", type=_FILE, help="File to use if MODEL_DIR has none.")
@click.option("--vocab_file", type=_FILE, help="File to use if MODEL_DIR has none.")
@click.option(
    "--do_lower_case",
    type=bool,
    is_flag=False,
    flag_value="true",
    help="The model is uncased. Default: as in the run, or as the model's files say.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@json_option
def command(
    model_dir: Path,
    folder: Path,
    kind: str,
    checkpoint: str | None,
    bert_config_file: Path | None,
    vocab_file: Path | None,
    do_lower_case: bool | None,
    force: bool,
    json_file: Path | None,
) -> None:
    """Export the weights in MODEL_DIR for other tools.

    MODEL_DIR is an --output_dir of `bertbench run`, or any folder that its --model
    accepts. The task's head is exported if the weights have one.

    \b
    Example:
      bertbench export squad_out --to squad_hf --format huggingface
    """
    files = find_model_files(model_dir, bert_config_file, vocab_file, None)
    weights = _find_weights(model_dir, checkpoint)
    asked = {"do_lower_case": do_lower_case}
    # The export records whether letters are lowered, and other tools will believe it.
    config, tokenizer = load_config_and_tokenizer(files, asked, 1, insist=True)
    _start_tensorflow()
    from finetune.export.export_weights import open_model

    model = open_model(weights, config)
    sources = [files.config_file, files.vocab_file, model.checkpoint]
    _write(model, tokenizer, _Output(folder, kind, force), sources)
    if model.left_out:
        say(f"left out, as the model does not have these variables: {', '.join(model.left_out)}")
    if json_file is not None:
        write_json(json_file, _results(model, folder, kind))
    if str(json_file) != "-":
        what = "encoder" if model.head is None else f"{model.head} model"
        echo(
            f"{folder}: {what} of {model.parameters:,} parameters "
            f"from {model.checkpoint.name}, as {kind}"
        )


@dataclasses.dataclass(frozen=True)
class _Output:
    """What is to be written.

    Attributes:
        folder: where.
        kind: one of the values of `--format`.
        force: replace an earlier export in the folder.
    """

    folder: Path
    kind: str
    force: bool


def _write(
    model: StoredModel, tokenizer: Tokenizer, output: _Output, sources: Sequence[Path]
) -> None:
    """Write the export; on a failure nothing in the folder has changed.

    Args:
        model: the weights to write.
        tokenizer: that belongs to them.
        output: where, and in which format.
        sources: files that are read, which the export must not replace.

    Raises:
        InputError: the head is one that no export can hold, or the folder has other files.
        WorkError: the files cannot be written.
    """
    from finetune.export.export_folder import new_folder
    from finetune.export.export_weights import export_checkpoint, export_hugging_face
    from finetune.export.saved_model import export_saved_model

    labels = _labels_of(model)
    try:
        with new_folder(output.folder, force=output.force, sources=sources) as new:
            if output.kind == "huggingface":
                export_hugging_face(model, tokenizer, new, labels=labels)
            elif output.kind == "checkpoint":
                export_checkpoint(model, tokenizer, new, labels)
            else:
                export_saved_model(model, tokenizer, new, labels)
    except OSError as error:
        raise WorkError(f"cannot write the export: {error}; nothing was changed") from error


def _labels_of(model: StoredModel) -> tuple[str, ...] | None:
    """Names of the classes of a classifier; None for other heads, and where none are recorded.

    Raises:
        InputError: the head does something else than put each text into one class.
    """
    if model.head != "classifier" or model.is_regression:
        return None
    trained = read_trained_head(model.checkpoint.parent)
    if trained.why_other:
        raise InputError(
            f"its head does not put each text into one class ({trained.why_other})",
            path=model.checkpoint.parent,
        )
    return trained.labels


def _results(model: StoredModel, folder: Path, kind: str) -> dict[str, Any]:
    """What the export holds, for JSON."""
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": kind,
        "folder": str(folder),
        "checkpoint": str(model.checkpoint),
        "head": model.head,
        "num_labels": model.num_labels if model.head == "classifier" else None,
        "pooler": model.has_pooler,
        "parameters": model.parameters,
        "left_out": list(model.left_out),
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in written},
    }


def _find_weights(model_dir: Path, checkpoint: str | None) -> Path:
    """The weights that `--checkpoint` names; a name may be given without its folder."""
    if checkpoint is None:
        return model_dir
    if checkpoint.isdecimal():
        prefixes = list_checkpoints(model_dir)
        for prefix in prefixes:
            if prefix.name == f"{PREFIX}{checkpoint}":
                return prefix
        there = ", ".join(prefix.name.removeprefix(PREFIX) for prefix in prefixes)
        raise InputError(
            f"there is no checkpoint of step {checkpoint}",
            path=model_dir,
            hint=f"there are checkpoints of steps {there}" if there else "give a checkpoint's name",
        )
    inside = model_dir / checkpoint
    return inside if inside.is_file() or Path(f"{inside}.index").is_file() else Path(checkpoint)


def _start_tensorflow() -> None:
    """Load TensorFlow for its file formats alone; it takes no memory of an accelerator."""
    os.environ.update({"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"})
    with muted_stderr():
        import tensorflow as tf

        # The first op sets up the device, which writes messages too.
        tf.zeros([])
