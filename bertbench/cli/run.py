"""`bertbench run`: the original's scripts, with a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from bertbench.cli.options.common import (
    BATCH,
    CONTEXT,
    CONTINUE_VARIABLE,
    MOST_SEED,
    REPLICAS,
    FiniteFloat,
    Number,
    Whole,
    allowed_levers,
    device_options,
    json_option,
    lever_options,
    resolve_budget,
    write_json,
)
from bertbench.cli.options.original_flags import OriginalCommand, PathOrUrl, local_files
from bertbench.core.errors import WorkError
from bertbench.core.terminal import echo, say
from bertbench.devices.accelerators import find_accelerator
from bertbench.devices.device import Budget, TpuSettings, make_budget
from bertbench.devices.discover import tpu_device
from bertbench.devices.threads import check_threads
from bertbench.run.output.cloud_storage import is_url
from bertbench.run.settings import RunRequest, RunSettings
from finetune.errors import InputError
from finetune.model_files.model_folder import RUN_FILE, ModelFiles, find_model_files
from finetune.spec.checkpointing import parse_checkpointing
from finetune.tasks.demo_data import demo_files

_PATH = PathOrUrl()
_DEMO_FLAGS = {"max_seq_length": 64, "train_batch_size": 8, "num_train_epochs": 6.0}


def _switch(name: str, default: bool | None, text: str) -> Callable[[Any], Any]:
    """A flag that may stand alone or take a value, as the original's: --do_train[=true]."""
    return click.option(
        name, type=bool, is_flag=False, flag_value="true", default=default, help=text
    )


def _shared_options(command: Any) -> Any:
    options = [
        click.option("--model", "model_dir", type=_PATH, help="Folder with configuration, "
                     "vocabulary and weights: of the original release, of Hugging Face, or of a "
                     "run."),
        click.option("--bert_config_file", type=_PATH, help="Shape of the model."),
        click.option("--vocab_file", type=_PATH,
                     help="WordPiece vocabulary: vocab.txt or tokenizer.json."),
        click.option("--init_checkpoint", type=_PATH,
                     help="Weights: a TensorFlow checkpoint, a safetensors file or a folder."),
        click.option("--output_dir", type=_PATH, help="Results and checkpoints."),
        click.option("--overwrite_output_dir", is_flag=True, help="Forget an earlier run there."),
        _switch("--do_lower_case", None, "Lower-case the input (uncased models). Default: as the "
                "model was trained, by its run.json or tokenizer_config.json; else guessed, which "
                "is said."),
        _switch("--strip_accents", None, "Take accents off letters. Default: likewise, else if "
                "the input is lower-cased."),
        _switch("--tokenize_chinese_chars", None, "Make each Chinese character a word. Default: "
                "likewise, else true."),
        click.option("--train_batch_size", "--target-batch", type=BATCH, default=32,
                     show_default=True, help="Effective batch, whatever fits at a time."),
        click.option("--predict_batch_size", "--eval_batch_size", type=BATCH,
                     default=8, show_default=True, help="At most so many at a time to predict."),
        click.option("--learning_rate", type=FiniteFloat(0, 1000), default=5e-5, show_default=True),
        click.option("--num_train_epochs", type=FiniteFloat(0, 1_000_000), default=3.0,
                     show_default=True),
        click.option("--warmup_proportion", type=FiniteFloat(0, 1), default=0.1,
                     show_default=True),
        click.option("--save_checkpoints_steps", type=Whole(1), default=1000,
                     show_default=True, help="Also every ten minutes."),
        click.option("--seed", type=Whole(0, MOST_SEED), default=12345, show_default=True),
        click.option("--adam_bias_correction", is_flag=True, help="Adam as published; the "
                     "original leaves its bias correction out."),
        click.option("--plan", "plan_file", type=_PATH, help="From `bertbench plan --json FILE`. "
                     "Default: plan now."),
        click.option("--checkpointing", help="Insist on a policy: none, selective, full, nested, "
                     "or full:N for N layers."),
        click.option("--micro_batch", type=BATCH, help="Insist on a micro-batch."),
        _switch("--resume", True, "Continue an interrupted run. With false, a folder that holds a "
                "run is refused."),
        click.option("--evaluate_every_steps", type=Whole(1), help="Evaluate while "
                     "training, and after the last step."),
        click.option("--early_stopping_patience", type=Whole(1), help="Stop after so "
                     "many evaluations without a new best."),
        click.option("--keep_best", is_flag=True, help="Keep the best evaluation's weights in "
                     "the folder best, and predict with them."),
        _switch("--feature_cache", True, "Keep SQuAD's features in $BERTBENCH_CACHE (default: the "
                "user's cache folder) for the next run."),
        _switch("--tensorboard", True, "Write event files to --output_dir."),
        click.option("--max_train_examples", type=Whole(1), help="Only the first ones."),
        _switch("--use_tpu", False, "Run on a Cloud TPU."),
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


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Fine-tune, predict and evaluate with a plan."""


@command.command(cls=OriginalCommand, context_settings=CONTEXT)
@_shared_options
@_switch("--do_train", None, "Default: if --train_file is given.")
@_switch("--do_predict", None, "Default: if --predict_file is given.")
@click.option("--train_file", type=_PATH, help="SQuAD JSON to train on.")
@click.option("--predict_file", type=_PATH, help="SQuAD JSON to answer.")
@click.option("--max_seq_length", type=Whole(8), default=384, show_default=True)
@click.option("--doc_stride", type=Whole(1), default=128, show_default=True)
@click.option("--max_query_length", type=Whole(1), default=64, show_default=True)
@click.option("--n_best_size", type=Whole(1), default=20, show_default=True)
@click.option("--max_answer_length", type=Whole(1), default=30, show_default=True)
@_switch("--version_2_with_negative", False, "Some questions have no answer.")
@click.option("--null_score_diff_threshold", type=Number(), default=0.0, show_default=True)
@_switch("--verbose_logging", False, "Accepted, as the original has it; does nothing.")
@_switch("--tune_threshold", False, "Find that threshold on --predict_file (SQuAD 2.0).")
@click.pass_context
def squad(context: click.Context, **flags: Any) -> None:
    """Question answering on SQuAD files. Without files: the demo.

    \b
    Example:
      bertbench run squad --model uncased_L-12_H-768_A-12 \\
        --train_file train-v1.1.json --predict_file dev-v1.1.json \\
        --target-batch 32 --memory 12GiB --output_dir squad_out
    """
    goes_on = _go_on(flags)
    with _saved_before(goes_on), local_files(flags):
        _run_squad(context, flags, goes_on)


def _go_on(flags: dict[str, Any]) -> bool:
    """Whether this process goes on with what the same command has begun in another; see there.

    Then it is to take what is in the output folder, whatever the flags say, and to make do with
    what is free.
    """
    folder = os.environ.pop(CONTINUE_VARIABLE, None)
    if folder is None:
        return False
    asked = flags["output_dir"]
    is_remote = isinstance(asked, str) and is_url(asked)
    if not is_remote and not (Path(folder) / RUN_FILE).is_file():
        raise WorkError(f"{folder} is gone, or has no {RUN_FILE} any more: the run cannot go on")
    flags["overwrite_output_dir"], flags["resume"] = False, True
    if flags["output_dir"] is None:
        flags["output_dir"] = Path(folder)
    return True


@contextlib.contextmanager
def _saved_before(goes_on: bool) -> Iterator[None]:
    """Say of a run that cannot go on that nothing is lost; its input was good when it began."""
    try:
        yield
    except InputError as error:
        if not goes_on:
            raise
        raise WorkError(f"{error}; what was done is saved: the same command goes on") from error


def _run_squad(context: click.Context, flags: dict[str, Any], goes_on: bool) -> None:
    check_threads()
    from bertbench.run.squad import SquadSettings, run_squad

    asked = flags["do_train"] or flags["do_predict"]
    if asked:
        # As in the original, what is not asked for is not done.
        flags["do_train"], flags["do_predict"] = bool(flags["do_train"]), bool(flags["do_predict"])
    no_files = flags["train_file"] is None and flags["predict_file"] is None
    if not flags["demo"] and no_files and not asked:
        say("no --train_file and no --predict_file: running the built-in demo")
        flags["demo"] = True
    if flags["demo"]:
        demo = demo_files()
        _use_demo(context, flags, {"doc_stride": 32, "max_query_length": 24})
        flags["train_file"] = flags["train_file"] or demo.squad_train
        flags["predict_file"] = flags["predict_file"] or demo.squad_dev
    _need(flags, "do_train", "train_file")
    _need(flags, "do_predict", "predict_file")
    files, settings = _model_and_settings(flags)
    squad_settings = SquadSettings(
        train_file=flags["train_file"] if flags["do_train"] is not False else None,
        predict_file=flags["predict_file"] if flags["do_predict"] is not False else None,
        **{
            field.name: flags[field.name]
            for field in dataclasses.fields(SquadSettings)
            if field.name not in ("train_file", "predict_file")
        },
    )
    budget = _budget(flags, goes_on)
    _report(run_squad(RunRequest(files, settings, budget), squad_settings), flags)


@command.command(cls=OriginalCommand, context_settings=CONTEXT)
@_shared_options
@click.option("--task_name", help="A task of GLUE, as in MRPC, or XNLI.")
@click.option("--data_dir", type=_PATH, help="Folder of the task's files.")
@click.option("--xnli_language", default="zh", show_default=True, help="Part of XNLI.")
@click.option(
    "--train_file", type=_PATH, help="Instead of a task, a table of your own: .tsv, .csv or .jsonl."
)
@click.option("--dev_file", type=_PATH, help="The same to evaluate.")
@click.option("--test_file", type=_PATH, help="The same to predict; labels are not needed.")
@click.option("--text_a", default="text", show_default=True, help="Column of the (first) sentence.")
@click.option("--text_b", help="Column of the second sentence.")
@click.option("--label", default="label", show_default=True, help="Column of the label.")
@click.option("--labels", help="All labels, as in no,yes. Default: those of --train_file.")
@click.option("--regression", is_flag=True, help="The label is a number to predict.")
@_switch(
    "--do_train",
    None,
    "Train on the train split. Default: true unless --do_eval or --do_predict is given.",
)
@_switch("--do_eval", None, "Evaluate on the dev split. Default: as --do_train.")
@_switch(
    "--do_predict",
    None,
    "Write probabilities for the test split. Default: if a --test_file is given, and neither "
    "--do_train nor --do_eval is.",
)
@click.option("--max_seq_length", type=Whole(8), default=128, show_default=True)
@click.pass_context
def classifier(context: click.Context, **flags: Any) -> None:
    """Sentence and sentence-pair classification on GLUE folders. Without a task: the demo.

    \b
    Example:
      bertbench run classifier --task_name MRPC --data_dir glue/MRPC \\
        --model uncased_L-12_H-768_A-12 --do_train --do_eval \\
        --train_batch_size 32 --learning_rate 2e-5 --output_dir mrpc_out
    """
    goes_on = _go_on(flags)
    with _saved_before(goes_on), local_files(flags):
        _run_classifier(context, flags, goes_on)


def _run_classifier(context: click.Context, flags: dict[str, Any], goes_on: bool) -> None:
    check_threads()
    from bertbench.run.classifier import ClassifierSettings, run_classifier

    tables = {split: flags[f"{split}_file"] for split in ("train", "dev", "test")}
    has_table = any(tables.values())
    is_task = flags["task_name"] is not None or flags["data_dir"] is not None
    if not flags["demo"] and not is_task and not has_table:
        say("no --task_name and no --train_file: running the built-in demo")
        flags["demo"] = True
    if flags["demo"]:
        demo = demo_files()
        _use_demo(context, flags, {})
        flags["task_name"] = flags["task_name"] or "MRPC"
        flags["data_dir"] = flags["data_dir"] or demo.mrpc_dir
    asked = flags["do_train"] or flags["do_eval"] or flags["do_predict"]
    files, settings = _model_and_settings(flags)
    do = {
        # A table that is given is wanted; without any flag, training and evaluation are.
        split: bool(tables[split]) if has_table and not asked else not asked and split != "test"
        for split in tables
    }
    do |= {
        split: flags[flag]
        for split, flag in (("train", "do_train"), ("dev", "do_eval"), ("test", "do_predict"))
        if flags[flag] is not None
    }
    what = ClassifierSettings(
        _classifier_source(flags, tables, do),
        do_train=do["train"],
        do_eval=do["dev"],
        do_predict=do["test"],
        max_train_examples=flags["max_train_examples"],
    )
    budget = _budget(flags, goes_on)
    _report(run_classifier(RunRequest(files, settings, budget), what), flags)


def _classifier_source(
    flags: dict[str, Any], tables: dict[str, Path | None], do: dict[str, bool]
) -> Any:
    """What to classify: a task's folder, or tables."""
    from bertbench.run.classifier import GlueSource
    from finetune.tasks.table_files import TableTask

    given = {split: path for split, path in tables.items() if path is not None}
    if not given:
        for name in ("task_name", "data_dir"):
            if flags[name] is None:
                raise InputError(f"--{name} is missing", hint="or use --demo")
        return GlueSource(flags["task_name"], flags["data_dir"], flags["xnli_language"])
    if flags["task_name"] is not None or flags["data_dir"] is not None:
        raise InputError("--task_name and --data_dir do not go with tables of your own")
    for split, flag in (("train", "do_train"), ("dev", "do_eval"), ("test", "do_predict")):
        if do[split] and split not in given:
            raise InputError(f"--{flag} needs --{split}_file")
    labels = flags["labels"]
    return TableTask(
        given,
        flags["text_a"],
        flags["text_b"],
        flags["label"],
        None if labels is None else tuple(labels.split(",")),
        flags["regression"],
    )


def _use_demo(context: click.Context, flags: dict[str, Any], more: dict[str, Any]) -> None:
    """Fill in the demo's model and small numbers where the user gave none."""
    demo = demo_files()
    for name, value in {**_DEMO_FLAGS, "learning_rate": 5e-4, **more}.items():
        if context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            flags[name] = value
    if flags["model_dir"] is None:
        if flags["vocab_file"] is None and flags["do_lower_case"] is None:
            flags["do_lower_case"] = True
        flags["bert_config_file"] = flags["bert_config_file"] or demo.bert_config_file
        flags["vocab_file"] = flags["vocab_file"] or demo.vocab_file
    if flags["output_dir"] is None:
        flags["output_dir"] = Path(tempfile.mkdtemp(prefix="bertbench-demo-"))


def _need(flags: dict[str, Any], switch: str, file: str) -> None:
    if flags[switch] and flags[file] is None:
        raise InputError(f"--{switch} needs --{file}")


def _model_and_settings(flags: dict[str, Any]) -> tuple[ModelFiles, RunSettings]:
    """Settings from flags; the output folder is required, as in the original."""
    if flags["output_dir"] is None:
        raise InputError("--output_dir is missing", hint="name a folder for the results")
    if flags["output_dir"].exists() and not flags["output_dir"].is_dir():
        raise InputError("--output_dir is not a folder", path=flags["output_dir"])
    files = find_model_files(
        flags["model_dir"],
        flags["bert_config_file"],
        flags["vocab_file"],
        flags["init_checkpoint"],
    )
    if flags["evaluate_every_steps"] is None:
        for name in ("early_stopping_patience", "keep_best"):
            if flags[name]:
                raise InputError(f"--{name} needs --evaluate_every_steps")
    policy = flags["checkpointing"]
    derived = {
        "overwrite": flags["overwrite_output_dir"],
        "checkpointing": None if policy is None else parse_checkpointing(policy),
        "allowed": allowed_levers(
            flags["precision"], flags["optimizer"], flags["placement"], flags["allow"]
        ),
        "insist_placement": flags["placement"] is not None,
    }
    names = {field.name for field in dataclasses.fields(RunSettings)} - set(derived)
    settings = RunSettings(**derived, **{name: flags[name] for name in names})
    return files, settings


def _tpu(flags: dict[str, Any]) -> TpuSettings | None:
    if not flags["use_tpu"]:
        return None
    return TpuSettings(
        flags["tpu_name"] or flags["master"],
        flags["tpu_zone"],
        flags["gcp_project"],
        flags["num_tpu_cores"],
    )


def _budget(flags: dict[str, Any], goes_on: bool) -> Budget:
    tpu = _tpu(flags)
    if tpu is not None:
        # As for a plan. The smallest; which one it is cannot be asked before connecting.
        usable_bytes = find_accelerator("tpu-v2-8").usable_bytes
        return make_budget(tpu_device(tpu, flags["memory"] or usable_bytes))
    budget = resolve_budget(flags["device"], flags["memory"])
    if goes_on and any(budget.budget_bytes > one.free_bytes for one in budget.device.each):
        # Somebody else has taken the memory that the run was promised.
        budget = make_budget(budget.device)
    return budget


def _report(results: dict[str, Any], flags: dict[str, Any]) -> None:
    json_file = flags["json_file"]
    if json_file is not None:
        write_json(json_file, results)
    if str(json_file) == "-":
        return
    for name, value in results.items():
        if not isinstance(value, dict):
            echo(f"{name} = {value}")
    echo(f"output: {flags['remote'] or flags['output_dir']}")
