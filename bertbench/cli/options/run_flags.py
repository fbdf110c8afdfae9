"""The flags that all tasks of `bertbench run` share, and the request that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from bertbench.cli.options.common import (
    BATCH,
    MAX_SEED,
    REPLICAS,
    FiniteFloat,
    Whole,
    allowed_levers,
    device_options,
    json_option,
    lever_options,
    resolve_budget,
)
from bertbench.cli.options.original_flags import PathOrUrl
from bertbench.hardware.device import Budget, TpuSettings
from bertbench.running.bind_device import shrink_to_free, tpu_budget
from bertbench.running.settings import RunRequest, RunSettings
from finetune.errors import InputError
from finetune.model_files.model_folder import ModelFiles, find_model_files
from finetune.spec.checkpointing import parse_checkpointing

PATH = PathOrUrl()


def switch(name: str, default: bool | None, text: str) -> Callable[[Any], Any]:
    """A flag that may stand alone or take a value, as the original's: --do_train[=true]."""
    return click.option(
        name, type=bool, is_flag=False, flag_value="true", default=default, help=text
    )


def shared_options(command: Any) -> Any:
    """Add the flags that all tasks share."""
    options = [
        click.option("--model", "model_dir", type=PATH, help="Folder with configuration, "
                     "vocabulary and weights: of the original release, of Hugging Face, or of a "
                     "run."),
        click.option("--bert_config_file", type=PATH, help="Shape of the model."),
        click.option("--vocab_file", type=PATH,
                     help="WordPiece vocabulary: vocab.txt or tokenizer.json."),
        click.option("--init_checkpoint", type=PATH,
                     help="Weights: a TensorFlow checkpoint, a safetensors file or a folder."),
        click.option("--output_dir", type=PATH, help="Results and checkpoints."),
        click.option("--overwrite_output_dir", is_flag=True, help="Forget an earlier run there."),
        switch("--do_lower_case", None, "Lower-case the input (uncased models). Default: as the "
                "model was trained, by its run.json or tokenizer_config.json; else guessed, which "
                "is said."),
        switch("--strip_accents", None, "Take accents off letters. Default: likewise, else if "
                "the input is lower-cased."),
        switch("--tokenize_chinese_chars", None, "Make each Chinese character a word. Default: "
                "likewise, else true."),
        click.option("--train_batch_size", "--target-batch", type=BATCH, default=32,
                     show_default=True, help="Effective batch; a plan cuts it up."),
        click.option("--predict_batch_size", "--eval_batch_size", type=BATCH,
                     default=8, show_default=True, help="At most so many at a time to predict."),
        click.option("--learning_rate", type=FiniteFloat(0, 1000), default=5e-5, show_default=True),
        click.option("--num_train_epochs", type=FiniteFloat(0, 1_000_000), default=3.0,
                     show_default=True),
        click.option("--warmup_proportion", type=FiniteFloat(0, 1), default=0.1,
                     show_default=True),
        click.option("--save_checkpoints_steps", type=Whole(1), default=1000,
                     show_default=True, help="Also every ten minutes."),
        click.option("--seed", type=Whole(0, MAX_SEED), default=12345, show_default=True),
        click.option("--adam_bias_correction", is_flag=True, help="Adam as published; the "
                     "original leaves its bias correction out."),
        click.option("--plan", "plan_file", type=PATH, help="From `bertbench plan --json FILE`. "
                     "Default: plan now."),
        click.option("--checkpointing", help="Insist on a policy: none, selective, full, nested, "
                     "or full:N for N layers."),
        click.option("--micro_batch", type=BATCH, help="Insist on a micro-batch."),
        switch("--resume", True, "Continue an interrupted run. With false, a folder that holds a "
                "run is refused."),
        click.option("--evaluate_every_steps", type=Whole(1), help="Evaluate while "
                     "training, and after the last step."),
        click.option("--early_stopping_patience", type=Whole(1), help="Stop after so "
                     "many evaluations without a new best."),
        click.option("--keep_best", is_flag=True, help="Keep the best evaluation's weights in "
                     "the folder best, and predict with them."),
        switch("--feature_cache", True, "Keep SQuAD's features in $BERTBENCH_CACHE (default: the "
                "user's cache folder) for the next run."),
        switch("--tensorboard", True, "Write event files to --output_dir."),
        click.option("--max_train_examples", type=Whole(1), help="Only the first ones."),
        switch("--use_tpu", False, "Run on a Cloud TPU."),
        click.option("--tpu_name", help="Its name, or grpc://ADDRESS."),
        click.option("--tpu_zone", help="Its zone. Default: asked of the environment."),
        click.option("--gcp_project", help="Its project. Default: asked of the environment."),
        click.option("--master", help="Its address, instead of --tpu_name."),
        click.option("--num_tpu_cores", type=REPLICAS, default=8, show_default=True),
        click.option("--iterations_per_loop", type=Whole(0), hidden=True),
        click.option("--demo", is_flag=True, help="Built-in data and a tiny random model."),
        lever_options,
        device_options,
        json_option,
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def make_request(flags: dict[str, Any], *, continues: bool) -> RunRequest:
    """Make the request that the shared flags describe.

    Args:
        flags: by name; addresses of cloud storage have become local paths.
        continues: whether this process continues a run that ran out of memory in another; then
            it makes do with the memory that is free.

    Raises:
        InputError: a flag is missing or wrong, or names something that is not there.
    """
    return RunRequest(_find_files(flags), _make_settings(flags), _make_budget(flags, continues))


def _find_files(flags: dict[str, Any]) -> ModelFiles:
    # As in the original, the output folder is required.
    if flags["output_dir"] is None:
        raise InputError("--output_dir is missing", hint="name a folder for the results")
    if flags["output_dir"].exists() and not flags["output_dir"].is_dir():
        raise InputError("--output_dir is not a folder", path=flags["output_dir"])
    return find_model_files(
        flags["model_dir"],
        flags["bert_config_file"],
        flags["vocab_file"],
        flags["init_checkpoint"],
    )


def _make_settings(flags: dict[str, Any]) -> RunSettings:
    if flags["evaluate_every_steps"] is None:
        for name in ("early_stopping_patience", "keep_best"):
            if flags[name]:
                raise InputError(f"--{name} needs --evaluate_every_steps")
    policy = flags["checkpointing"]
    derived = {
        "overwrite": flags["overwrite_output_dir"],
        "checkpointing": None if policy is None else parse_checkpointing(policy),
        "allowed": allowed_levers(
            flags["precision"],
            flags["optimizer"],
            flags["placement"],
            flags["allow"],
            xla=flags["xla"],
        ),
        "insist_placement": flags["placement"] is not None,
    }
    names = {field.name for field in dataclasses.fields(RunSettings)} - set(derived)
    return RunSettings(**derived, **{name: flags[name] for name in names})


def _make_budget(flags: dict[str, Any], continues: bool) -> Budget:
    if flags["use_tpu"]:
        tpu = TpuSettings(
            flags["tpu_name"] or flags["master"],
            flags["tpu_zone"],
            flags["gcp_project"],
            flags["num_tpu_cores"],
        )
        return tpu_budget(tpu, flags["memory"])
    budget = resolve_budget(flags["device"], flags["memory"])
    return shrink_to_free(budget) if continues else budget
