"""`bertbench export`: fine-tuned weights for other tools."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bertbench.cli.common import CONTEXT, json_option, write_json
from bertbench.errors import WorkError
from bertbench.output_folder import RUN_FILE
from bertbench.quiet import muted_stderr
from bertbench.running import ModelFiles, find_model_files, load_config_and_tokenizer
from bertbench.terminal import echo, say
from finetune.checkpoint_files import PREFIX, list_checkpoints
from finetune.errors import InputError
from finetune.json_files import load_object
from finetune.tokenization import infer_do_lower_case

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
    help="For an uncased model. Default: as the run was, else as the model's name says.",
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
    """Write the weights in MODEL_DIR for other tools.

    MODEL_DIR is what `bertbench run` left in --output_dir, or any folder that its
    --model takes. The task's head is exported if the weights have one.

    \b
    Example:
      bertbench export squad_out --to squad_hf --format huggingface
    """
    files = find_model_files(model_dir, bert_config_file, vocab_file, None)
    weights = _find_weights(model_dir, checkpoint)
    record = _read_record(model_dir)
    lower = _find_case(do_lower_case, record, files, model_dir)
    if lower is None and kind == "huggingface":
        raise InputError(
            "cannot tell whether this is an uncased model",
            path=model_dir,
            hint="say --do_lower_case=true or --do_lower_case=false",
        )
    config, _ = load_config_and_tokenizer(files, lower is not False, 1)
    _start_tensorflow()
    from finetune import export
    from finetune.saved_model import export_saved_model

    model = export.open_model(weights, config)
    sources = [files.config_file, files.vocab_file, model.checkpoint]
    try:
        with export.new_folder(folder, force=force, sources=sources) as new:
            if kind == "huggingface":
                labels = _find_labels(record, files, model.num_labels)
                export.export_hugging_face(
                    model, files.vocab_file, new, do_lower_case=lower is True, labels=labels
                )
            elif kind == "checkpoint":
                export.export_checkpoint(model, files.vocab_file, new)
            else:
                export_saved_model(model, files.vocab_file, new)
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


def _read_record(model_dir: Path) -> Mapping[str, Any]:
    """What a run recorded about itself; empty if the folder is not a run's."""
    path = model_dir / RUN_FILE
    if not path.is_file() and model_dir.resolve().name == "best":
        # A run keeps its best weights in a folder within its own.
        path = model_dir.resolve().parent / RUN_FILE
    return _read_object(path)


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    return load_object(path, what="what belongs to the model", finite=False)


def _find_case(
    flag: bool | None, record: Mapping[str, Any], files: ModelFiles, model_dir: Path
) -> bool | None:
    if flag is not None:
        return flag
    tokenizer = _read_object(files.vocab_file.with_name("tokenizer_config.json"))
    for values in (record, tokenizer):
        recorded = values.get("do_lower_case")
        if isinstance(recorded, bool):
            return recorded
    for name in (record.get("init_checkpoint"), model_dir.resolve()):
        inferred = infer_do_lower_case(name) if name else None
        if inferred is not None:
            return inferred
    return None


def _find_labels(record: Mapping[str, Any], files: ModelFiles, num_labels: int) -> list[str] | None:
    """Names of the classes: as the run recorded, or as a Hugging Face configuration has them."""
    recorded = record.get("labels")
    # A regression has none.
    if isinstance(recorded, list) and recorded:
        return [str(label) for label in recorded]
    named = _read_object(files.config_file).get("id2label")
    wanted = [str(index) for index in range(num_labels)]
    if isinstance(named, dict) and set(named) == set(wanted):
        return [str(named[index]) for index in wanted]
    return None


def _start_tensorflow() -> None:
    """Load TensorFlow for its file formats alone: no accelerator's memory is touched."""
    os.environ.update({"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"})
    with muted_stderr():
        import tensorflow as tf

        # The first op sets up the device, which chatters too.
        tf.zeros([])
