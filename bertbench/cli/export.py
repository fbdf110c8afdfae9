"""`bertbench export`: fine-tuned weights for other tools."""

from __future__ import annotations

import os
from pathlib import Path

import click

from bertbench.cli.options.common import CONTEXT, json_option, write_json
from bertbench.core.errors import WorkError
from bertbench.core.quiet import muted_stderr
from bertbench.core.terminal import echo, say
from bertbench.run.model_files import load_config_and_tokenizer
from finetune.errors import InputError
from finetune.model_files.checkpoint_files import PREFIX, list_checkpoints
from finetune.model_files.head_labels import read_trained_head
from finetune.model_files.model_folder import find_model_files

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(context_settings=CONTEXT)
@click.argument("model_dir", type=_FOLDER)
@click.option("--to", "folder", type=_FOLDER, required=True, help="Folder to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["huggingface", "checkpoint", "savedmodel"]),
    required=True,
    help="For transformers, for the original code and run, or for serving.",
)
@click.option(
    "--checkpoint",
    help="Which weights: a step, as 1200, or a checkpoint's name. Default: the newest.",
)
@click.option("--bert_config_file", type=_FILE, help="Where MODEL_DIR has none.")
@click.option("--vocab_file", type=_FILE, help="Where MODEL_DIR has none.")
@click.option(
    "--do_lower_case",
    type=bool,
    is_flag=False,
    flag_value="true",
    help="For an uncased model. Default: as the run was, or as the model's files say.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export_weights.")
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
    """Write the weights in MODEL_DIR for other tools.

    MODEL_DIR is what `bertbench run` left in --output_dir, or any folder that its
    --model takes. The task's head is exported if the weights have one.

    \b
    Example:
      bertbench export squad_out --to squad_hf --format huggingface
    """
    files = find_model_files(model_dir, bert_config_file, vocab_file, None)
    weights = _find_weights(model_dir, checkpoint)
    asked = {"do_lower_case": do_lower_case}
    # What is written says whether letters are lowered, and will be believed.
    config, tokenizer = load_config_and_tokenizer(files, asked, 1, insist=True)
    _start_tensorflow()
    from finetune.export import export_weights
    from finetune.export.export_folder import new_folder
    from finetune.export.saved_model import export_saved_model

    model = export_weights.open_model(weights, config)
    sources = [files.config_file, files.vocab_file, model.checkpoint]
    labels = None
    if model.head == "classifier" and not model.is_regression:
        trained = read_trained_head(model.checkpoint.parent)
        if trained.why_other:
            raise InputError(
                f"its head is no classifier of texts into one class each ({trained.why_other})",
                path=model.checkpoint.parent,
            )
        labels = trained.labels
    try:
        with new_folder(folder, force=force, sources=sources) as new:
            if kind == "huggingface":
                export_weights.export_hugging_face(model, tokenizer, new, labels=labels)
            elif kind == "checkpoint":
                export_weights.export_checkpoint(model, tokenizer, new, labels)
            else:
                export_saved_model(model, tokenizer, new, labels)
    except OSError as error:
        raise WorkError(f"cannot write the export: {error}; nothing was changed") from error
    if model.left_out:
        say(f"left out, as the model has no place for them: {', '.join(model.left_out)}")
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    results = {
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
    if json_file is not None:
        write_json(json_file, results)
    if str(json_file) != "-":
        what = "encoder" if model.head is None else f"{model.head} model"
        echo(
            f"{folder}: {what} of {model.parameters:,} parameters "
            f"from {model.checkpoint.name}, as {kind}"
        )


def _find_weights(model_dir: Path, checkpoint: str | None) -> Path:
    """The weights that `--checkpoint` means; a name may be given without its folder."""
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
            hint=f"there are those of {there}" if there else "give a checkpoint's name",
        )
    inside = model_dir / checkpoint
    return inside if inside.is_file() or Path(f"{inside}.index").is_file() else Path(checkpoint)


def _start_tensorflow() -> None:
    """Load TensorFlow for its file formats alone: no accelerator's memory is touched."""
    os.environ.update({"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"})
    with muted_stderr():
        import tensorflow as tf

        # The first op sets up the device, which chatters too.
        tf.zeros([])
