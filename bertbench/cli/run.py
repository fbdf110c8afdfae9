"""`bertbench run`: the original's scripts, with a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from bertbench.cli.options.common import CONTEXT, CONTINUE_VARIABLE, Number, Whole, write_json
from bertbench.cli.options.original_flags import OriginalCommand, local_files
from bertbench.cli.options.run_flags import PATH, make_request, shared_options, switch
from bertbench.core.errors import WorkError
from bertbench.core.terminal import echo, say
from bertbench.hardware.threads import check_threads
from bertbench.running.output.cloud_storage import is_url
from finetune.errors import InputError
from finetune.model_files.model_folder import RUN_FILE
from finetune.tasks.demo_data import demo_files

_DEMO_FLAGS = {
    "max_seq_length": 64,
    "train_batch_size": 8,
    "num_train_epochs": 6.0,
    "learning_rate": 5e-4,
}
_SPLIT_FLAGS = {"train": "do_train", "dev": "do_eval", "test": "do_predict"}


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Fine-tune, predict and evaluate with a plan."""


@command.command(cls=OriginalCommand, context_settings=CONTEXT)
@shared_options
@switch("--do_train", None, "Default: if --train_file is given.")
@switch("--do_predict", None, "Default: if --predict_file is given.")
@click.option("--train_file", type=PATH, help="SQuAD JSON to train on.")
@click.option("--predict_file", type=PATH, help="SQuAD JSON to answer.")
@click.option("--max_seq_length", type=Whole(8), default=384, show_default=True)
@click.option("--doc_stride", type=Whole(1), default=128, show_default=True)
@click.option("--max_query_length", type=Whole(1), default=64, show_default=True)
@click.option("--n_best_size", type=Whole(1), default=20, show_default=True)
@click.option("--max_answer_length", type=Whole(1), default=30, show_default=True)
@switch("--version_2_with_negative", False, "Some questions have no answer.")
@click.option("--null_score_diff_threshold", type=Number(), default=0.0, show_default=True)
@switch("--verbose_logging", False, "Accepted, as the original has it; does nothing.")
@switch("--tune_threshold", False, "Find that threshold on --predict_file (SQuAD 2.0).")
@click.pass_context
def squad(context: click.Context, **flags: Any) -> None:
    """Question answering on SQuAD files. Without files: the demo.

    \b
    Example:
      bertbench run squad --model uncased_L-12_H-768_A-12 \\
        --train_file train-v1.1.json --predict_file dev-v1.1.json \\
        --target-batch 32 --memory 12GiB --output_dir squad_out
    """
    with _continued_run(flags) as continues, local_files(flags):
        _run_squad(context, flags, continues)


@contextlib.contextmanager
def _continued_run(flags: dict[str, Any]) -> Iterator[bool]:
    """Tell in the block whether this process continues a run that ran out of memory in another.

    Then it takes what is in the output folder, whatever the flags say. The input was good when the
    run began: an error in it is no reason to call the command wrong.

    Raises:
        WorkError: the run cannot continue.
    """
    folder = os.environ.pop(CONTINUE_VARIABLE, None)
    if folder is None:
        yield False
        return
    asked = flags["output_dir"]
    is_remote = isinstance(asked, str) and is_url(asked)
    if not is_remote and not (Path(folder) / RUN_FILE).is_file():
        raise WorkError(f"{folder} is gone, or has no {RUN_FILE} any more: the run cannot continue")
    flags["overwrite_output_dir"], flags["resume"] = False, True
    if asked is None:
        flags["output_dir"] = Path(folder)
    try:
        yield True
    except InputError as error:
        raise WorkError(f"{error}; what was done is saved: the same command continues") from error


def _run_squad(context: click.Context, flags: dict[str, Any], continues: bool) -> None:
    check_threads()
    from bertbench.running.squad import SquadSettings, run_squad

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
    for do, file in (("do_train", "train_file"), ("do_predict", "predict_file")):
        if flags[do] and flags[file] is None:
            raise InputError(f"--{do} needs --{file}")
        if flags[do] is False:
            flags[file] = None
    request = make_request(flags, continues=continues)
    names = [field.name for field in dataclasses.fields(SquadSettings)]
    _report(run_squad(request, SquadSettings(**{name: flags[name] for name in names})), flags)


@command.command(cls=OriginalCommand, context_settings=CONTEXT)
@shared_options
@click.option("--task_name", help="A task of GLUE, as in MRPC, or XNLI.")
@click.option("--data_dir", type=PATH, help="Folder of the task's files.")
@click.option("--xnli_language", default="zh", show_default=True, help="Part of XNLI.")
@click.option(
    "--train_file", type=PATH, help="Instead of a task, a table of your own: .tsv, .csv or .jsonl."
)
@click.option("--dev_file", type=PATH, help="The same to evaluate.")
@click.option("--test_file", type=PATH, help="The same to predict; labels are not needed.")
@click.option("--text_a", default="text", show_default=True, help="Column of the (first) sentence.")
@click.option("--text_b", help="Column of the second sentence.")
@click.option("--label", default="label", show_default=True, help="Column of the label.")
@click.option("--labels", help="All labels, as in no,yes. Default: those of --train_file.")
@click.option("--regression", is_flag=True, help="The label is a number to predict.")
@switch(
    "--do_train",
    None,
    "Train on the train split. Default: true unless --do_eval or --do_predict is given.",
)
@switch("--do_eval", None, "Evaluate on the dev split. Default: as --do_train.")
@switch(
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
    with _continued_run(flags) as continues, local_files(flags):
        _run_classifier(context, flags, continues)


def _run_classifier(context: click.Context, flags: dict[str, Any], continues: bool) -> None:
    check_threads()
    from bertbench.running.classifier import ClassifierSettings, run_classifier

    tables = {split: flags[f"{split}_file"] for split in _SPLIT_FLAGS}
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
    # A table that is given is wanted; without any flag, training and evaluation are.
    wanted = tables if has_table else {"train": True, "dev": True, "test": False}
    if any(flags[name] for name in _SPLIT_FLAGS.values()):
        wanted = dict.fromkeys(_SPLIT_FLAGS)
    do = {
        split: bool(wanted[split]) if flags[name] is None else flags[name]
        for split, name in _SPLIT_FLAGS.items()
    }
    request = make_request(flags, continues=continues)
    what = ClassifierSettings(
        _classifier_source(flags, tables, do),
        do_train=do["train"],
        do_eval=do["dev"],
        do_predict=do["test"],
        max_train_examples=flags["max_train_examples"],
    )
    _report(run_classifier(request, what), flags)


def _classifier_source(
    flags: dict[str, Any], tables: dict[str, Path | None], do: dict[str, bool]
) -> Any:
    """What to classify: a task's folder, or tables."""
    from bertbench.running.classifier import GlueSource
    from finetune.tasks.table_files import TableTask

    given = {split: path for split, path in tables.items() if path is not None}
    if not given:
        for name in ("task_name", "data_dir"):
            if flags[name] is None:
                raise InputError(f"--{name} is missing", hint="or use --demo")
        return GlueSource(flags["task_name"], flags["data_dir"], flags["xnli_language"])
    if flags["task_name"] is not None or flags["data_dir"] is not None:
        raise InputError("--task_name and --data_dir do not go with tables of your own")
    for split, name in _SPLIT_FLAGS.items():
        if do[split] and split not in given:
            raise InputError(f"--{name} needs --{split}_file")
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
    for name, value in {**_DEMO_FLAGS, **more}.items():
        if context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            flags[name] = value
    if flags["model_dir"] is None:
        if flags["vocab_file"] is None and flags["do_lower_case"] is None:
            flags["do_lower_case"] = True
        flags["bert_config_file"] = flags["bert_config_file"] or demo.bert_config_file
        flags["vocab_file"] = flags["vocab_file"] or demo.vocab_file
    if flags["output_dir"] is None:
        flags["output_dir"] = Path(tempfile.mkdtemp(prefix="bertbench-demo-"))


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
