"""The command line as a user meets it: exit codes, messages, files, interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.tasks.demo_data import demo_files
from finetune.train.training_loop import read_log
from helpers.command_line import (
    bertbench,
    classifier_arguments,
    fails_with_one_line,
    squad_arguments,
    with_unanswerable_questions,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder without weights: the demo's shape and vocabulary."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(demo_files().bert_config_file, folder)
    shutil.copy(demo_files().vocab_file, folder)
    return folder


@pytest.mark.parametrize(
    "verb",
    [
        [],
        ["convert"],
        ["convert", "triviaqa"],
        ["devices"],
        ["eval"],
        ["export"],
        ["fetch"],
        ["eval", "squad"],
        ["ledger"],
        ["ledger", "export"],
        ["ledger", "list"],
        ["ledger", "prune"],
        ["plan"],
        ["probe"],
        ["report"],
        ["run"],
        ["run", "classifier"],
        ["run", "squad"],
    ],
)
def test_help_has_an_example_and_needs_no_tensorflow(verb: list[str]) -> None:
    program = (
        "import sys\n"
        "from bertbench.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert 'tensorflow' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *verb, "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: bertbench" in result.stdout
    assert "bertbench " in result.stdout.partition("Usage")[2]
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("verb", [[], ["run"], ["ledger"]])
def test_a_verb_that_is_missing_is_asked_for_with_the_help(verb: list[str]) -> None:
    result = bertbench(*verb)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"Usage: {' '.join(['bertbench', *verb])} [OPTIONS]")
    assert max(map(len, result.stderr.splitlines())) <= 80


def test_a_verb_that_is_mistyped_is_named() -> None:
    fails_with_one_line(bertbench("reprot"), "did you mean report?", "bertbench --help")
    result = bertbench("zzz")
    fails_with_one_line(result, "no verb 'zzz'; `bertbench --help`")


def test_plan_needs_no_tensorflow_and_writes_what_it_shows(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from bertbench.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert 'tensorflow' not in sys.modules\n"
    )
    path = tmp_path / "plan.json"
    arguments = ["plan", "--target-batch", "32", "--model", "bert-base", "--seq-len", "384",
                 "--gpu", "titan-x", "--memory", "12GiB", "--json", str(path)]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    plan = json.loads(path.read_text())
    chosen = plan["chosen"]
    assert plan["target_batch"] == 32
    assert plan["budget_bytes"] == 12 << 30
    assert 32 <= chosen["micro_batch"] * chosen["accumulation_steps"] < 32 + chosen["micro_batch"]
    assert sum(chosen["footprint"].values()) == chosen["predicted_peak_bytes"] < 12 << 30
    assert f"chosen {chosen['micro_batch']:>13}" in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:5])) <= 80


def test_plan_alone_prints_the_papers_grid() -> None:
    result = bertbench("plan", "--target-batch", "32", "--gpu", "titan-x")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert sum(line.startswith(("bert-base ", "bert-large ")) for line in lines) == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--model", "bert-huge", "--seq-len", "128"], ["bert-huge", "bert-base"]),
        (["plan", "--model", "bert-base", "--seq-len", "600"], ["600", "512"]),
        (["plan", "--model", "bert-large", "--seq-len", "128", "--memory", "2GiB"],
         ["does not fit", "more"]),
        (["plan", "--memory", "twelve"], ["twelve", "12GiB"]),
        (["plan", "--gpu", "t4", "--allow", "bf16"], ["t4", "bf16", "7.5"]),
        (["plan", "--device", "cpu", "--placement", "host"], ["host", "--placement", "GPUs"]),
        (["plan", "--gpu", "gtx-1050-ti", "--memory", "3500MiB", "--model", "bert-large",
          "--seq-len", "384", "--placement", "device"], ["does not fit"]),
        (["plan", "--gpu", "voodoo2"], ["voodoo2", "list"]),
        (["plan", "--checkpointing", "some"], ["some", "full"]),
        (["plan", "--no-such-flag"], ["no-such-flag"]),
        (["probe", "--models", "bert-tiny", "--seq-lens", "many"], ["many"]),
        (["probe", "--models", "bert-tiny", "--seq-lens", ""], ["names nothing"]),
        (["probe", "--models", ""], ["names nothing"]),
        (["probe", "--device", "gpu:77"], ["gpu:77"]),
        (["probe", "--memory", "900TiB"], ["more than"]),
        (["run", "classifier", "--task_name", "NoSuchTask", "--demo"], ["NoSuchTask", "MRPC"]),
        (["run", "squad", "--train_file", "no-such.json"], ["--output_dir"]),
        (["run", "squad", "--demo", "--tune_threshold"], ["--version_2_with_negative"]),
        (["run", "squad", "--demo", "--keep_best"], ["--evaluate_every_steps"]),
        (["run", "squad", "--demo", "--num_train_epochs", "nan"], ["num_train_epochs", "nan"]),
        (["run", "squad", "--demo", "--num_train_epochs", "inf"], ["num_train_epochs", "inf"]),
        (["run", "squad", "--demo", "--warmup_proportion", "nan"], ["warmup_proportion"]),
        (["run", "squad", "--demo", "--learning_rate", "-1"], ["learning_rate"]),
        (["eval", "squad", "no-such.json", "other.json"], ["no-such.json"]),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    fails_with_one_line(bertbench(*arguments), *words)


def test_missing_and_broken_files(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "out"
    missing = tmp_path / "missing.json"
    fails_with_one_line(
        bertbench(*squad_arguments(output, "--train_file", missing)), "missing.json"
    )
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": "1.1",\n "data": [\n  {"title" "x"}]}')
    fails_with_one_line(
        bertbench(*squad_arguments(output, "--train_file", broken)), f"{broken}:3:", "JSON"
    )
    with (model / "vocab.txt").open("a") as vocabulary:
        vocabulary.write("onemoreword\n")
    fails_with_one_line(
        bertbench("run", "squad", "--model", model, "--train_file", demo_files().squad_train,
                  "--output_dir", output, "--max_seq_length", "64", "--init_checkpoint", "x"),
        "vocab.txt", "1140",
    )  # fmt: skip
    assert not output.exists()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, shared_dir: Path) -> None:
    result = bertbench(
        *squad_arguments(
            tmp_path / "out",
            "--train_file",
            demo_files().squad_train,
            "--init_checkpoint",
            shared_dir / "golden" / "tiny_bert" / "bert_model.ckpt",
        )
    )
    fails_with_one_line(result, "word_embeddings", "[120, 32]", "[1140, 64]")


def test_demo_of_both_tasks(tmp_path: Path) -> None:
    squad = bertbench("run", "squad", "--demo", "--output-dir", tmp_path / "squad", "--json",
                      tmp_path / "squad.json", "--memory", "1GiB")  # fmt: skip
    assert squad.returncode == 0, squad.stderr
    results = json.loads((tmp_path / "squad.json").read_text())
    answers = json.loads((tmp_path / "squad" / "predictions.json").read_text())
    assert len(answers) == 13
    assert all(isinstance(answer, str) for answer in answers.values())
    assert 0 <= results["exact_match"] <= results["f1"] <= 100
    losses = [record.loss for record in read_log(tmp_path / "squad" / "train_log.jsonl")]
    assert len(losses) == results["global_step"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    classifier = bertbench("run", "classifier", "--demo", "--output_dir", tmp_path / "mrpc",
                           "--memory", "1GiB", "--do_train=true", "--do_eval=true",
                           "--do_predict=true")  # fmt: skip
    assert classifier.returncode == 0, classifier.stderr
    assert "eval_accuracy = " in classifier.stdout
    lines = (tmp_path / "mrpc" / "test_results.tsv").read_text().splitlines()
    assert len(lines) == 6
    assert all(abs(sum(map(float, line.split("\t"))) - 1) < 1e-5 for line in lines)


@pytest.mark.slow
def test_a_table_of_ones_own(tmp_path: Path) -> None:
    """Labels are those of training, also when predicting later; then they come from the record."""
    train, dev, test = (tmp_path / name for name in ("train.csv", "dev.jsonl", "test.tsv"))
    train.write_text("body,kind\n" + "".join(f'"text, {x}",{x}\n' for x in "cabacb"))
    dev.write_text('{"body": "text a", "kind": "c"}\n{"body": "text b", "kind": "b"}\n')
    test.write_text("body\ntext a\ntext b\ntext c\n")
    columns = ["--text_a", "body", "--label", "kind"]
    output = tmp_path / "out"
    first = bertbench(
        *classifier_arguments(output, *columns, "--train_file", train, "--dev_file", dev,
                              "--test_file", test)
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert "eval_accuracy = " in first.stdout
    assert json.loads((output / "run.json").read_text())["labels"] == ["a", "b", "c"]
    probabilities = (output / "test_results.tsv").read_text()
    assert [len(line.split("\t")) for line in probabilities.splitlines()] == [3, 3, 3]
    again = bertbench(
        *classifier_arguments(output, *columns, "--dev_file", dev, "--test_file", test)
    )
    assert again.returncode == 0, again.stderr
    assert (output / "test_results.tsv").read_text() == probabilities
    assert again.stdout.split("eval_loss")[1][:12] == first.stdout.split("eval_loss")[1][:12]
    fails_with_one_line(
        bertbench(*classifier_arguments(output, *columns, "--dev_file", dev, "--do_train")),
        "--train_file",
    )
    # In another order the columns of the probabilities would have other names than in training.
    asked = ["--dev_file", dev, "--labels", "c,b,a"]
    fails_with_one_line(
        bertbench(*classifier_arguments(output, *columns, *asked)),
        "not those that were trained",
        "a,b,c",
    )
    # Of weights from elsewhere the head's rows are brought into the order that is asked for.
    other = ["--init_checkpoint", output]
    elsewhere = bertbench(*classifier_arguments(tmp_path / "other", *columns, *asked, *other))
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert elsewhere.stdout.split("eval_loss")[1][:12] == first.stdout.split("eval_loss")[1][:12]
    assert "the classifier's rows are put in the order c, b, a" in elsewhere.stderr


@pytest.mark.slow
def test_best_weights_are_those_of_the_record(tmp_path: Path) -> None:
    """--keep_best may come late, or not be repeated: other weights are never taken for the best."""
    output = tmp_path / "out"
    table = tmp_path / "table.tsv"
    table.write_text("text\tlabel\n" + "".join(f"a b {n}\t{n % 2}\n" for n in range(12)))
    arguments = classifier_arguments(
        output, "--train_file", table, "--dev_file", table, "--evaluate_every_steps", "1"
    )
    assert bertbench(*arguments).returncode == 0
    trained = json.loads((output / "run.json").read_text())["results"]
    late = bertbench(*arguments, "--keep_best")
    assert late.returncode == 0, late.stderr
    results = json.loads((output / "run.json").read_text())["results"]
    # No step was made, and what the training came to is still said.
    for name in ("train_loss", "train_seconds", "global_step"):
        assert results[name] == trained[name]
    log = read_log(output / "train_log.jsonl")
    assert results["train_seconds"] == pytest.approx(sum(r.seconds for r in log), abs=1e-3)
    assert results["train_loss"] == log[-1].loss
    best = results["best_step"]
    assert results["weights_step"] == 3
    assert best == 3 or "are not there; using the last" in late.stderr
    (output / "best" / "model.ckpt-1.index").write_text("")
    (output / "best" / "checkpoint").write_text("")
    assert bertbench(*arguments).returncode == 0
    assert not list((output / "best").glob("model.ckpt-*"))
    other = tmp_path / "other.tsv"
    other.write_text(table.read_text() + "more\t1\n")
    arguments[arguments.index("--dev_file") + 1] = other
    fails_with_one_line(bertbench(*arguments), "evaluated on other data")


def test_out_of_memory_while_predicting_is_one_line(tmp_path: Path) -> None:
    result = bertbench(
        "run", "squad", "--demo", "--do_train=false", "--max_seq_length", "128", "--memory", "4MiB",
        "--predict_batch_size", "1000", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "--predict_batch_size" in result.stderr.splitlines()[-1]


def test_places_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "predictions.json").write_text("{}")
    for arguments in (
        ["run", "squad", "--demo", "--do_train=false", "--output_dir", "/dev/null/x"],
        ["eval", "squad", demo_files().squad_dev, tmp_path / "predictions.json", "--out_file",
         "/nonexistent/x.json"],
        ["plan", "--model", "bert-tiny", "--seq-len", "64", "--json", "/nonexistent/x.json"],
    ):  # fmt: skip
        result = bertbench(*arguments)
        assert result.returncode in (1, 2), result
        assert "Traceback" not in result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("bertbench: ")
        assert "/x" in last


def test_what_is_not_asked_for_is_not_done(tmp_path: Path) -> None:
    """As in the original, where --do_train is false unless it is given."""
    demo = demo_files()
    files = ["--train_file", demo.squad_train, "--predict_file", demo.squad_dev]
    result = bertbench(*squad_arguments(tmp_path / "out", *files, "--do_predict"))
    assert result.returncode == 0, result.stderr
    assert "train:" not in result.stderr
    assert (tmp_path / "out" / "predictions.json").is_file()
    fails_with_one_line(
        bertbench(*squad_arguments(tmp_path / "two", "--do_predict=true")), "--predict_file"
    )


def test_predictions_without_anything_to_compare_with(tmp_path: Path) -> None:
    root = json.loads(demo_files().squad_dev.read_text(encoding="utf-8"))
    for article in root["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                question["answers"] = []
    unlabelled = tmp_path / "x.json"
    unlabelled.write_text(json.dumps(root))
    (tmp_path / "p.json").write_text("{}")
    fails_with_one_line(
        bertbench("eval", "squad", unlabelled, tmp_path / "p.json"), "no question", "x.json"
    )
    (tmp_path / "odds.json").write_text('{"demo-dev-001": 1' + "0" * 400 + "}")
    (tmp_path / "p.json").write_text('{"demo-dev-001": "x"}')
    fails_with_one_line(
        bertbench("eval", "squad", demo_files().squad_dev, tmp_path / "p.json", "--version", "2.0",
                  "--na_prob_file", tmp_path / "odds.json"), "64 bits",
    )  # fmt: skip


def test_regression(tmp_path: Path) -> None:
    train = tmp_path / "train.tsv"
    train.write_text("text\tlabel\n" + "".join(f"word {n}\t{n / 2}\n" for n in range(8)))
    result = bertbench(
        *classifier_arguments(tmp_path / "out", "--train_file", train, "--dev_file", train,
                              "--test_file", train, "--regression")
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "eval_spearman = " in result.stdout
    rows = (tmp_path / "out" / "test_results.tsv").read_text().splitlines()
    assert len([float(row) for row in rows]) == 8


def test_squad_2_with_tuned_threshold_is_scored_as_by_eval(tmp_path: Path) -> None:
    demo = demo_files()
    train = with_unanswerable_questions(demo.squad_train, tmp_path / "train.json")
    dev = with_unanswerable_questions(demo.squad_dev, tmp_path / "dev.json")
    output = tmp_path / "out"
    result = bertbench(
        *squad_arguments(output, "--train_file", train, "--predict_file", dev, "--micro-batch", "4",
                         "--train_batch_size", "8", "--version_2_with_negative=true",
                         "--tune_threshold", "--evaluate_every_steps", "4", "--keep_best",
                         "--num_train_epochs", "2", "--json", tmp_path / "run.json")
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run.json").read_text())
    threshold = results["null_score_diff_threshold"]
    odds = json.loads((output / "null_odds.json").read_text())
    answers = json.loads((output / "predictions.json").read_text())
    assert {qas_id for qas_id in odds if answers[qas_id] == ""} == {
        qas_id for qas_id, value in odds.items() if value > threshold
    }
    evaluations = [json.loads(line) for line in (output / "eval_log.jsonl").open()]
    assert [record["step"] for record in evaluations] == [4, 8, 10]
    best = max(evaluations, key=lambda record: record["f1"])
    assert results["best_step"] == results["weights_step"] == best["step"]
    assert results["global_step"] == 10
    assert results["f1"] == pytest.approx(best["f1"])
    assert list(output.glob("events.out.tfevents.*"))
    assert list(output.glob("eval/events.out.tfevents.*"))

    scored = bertbench("eval", "squad", dev, output / "predictions.json", "--na-prob-file",
                       output / "null_odds.json", "--na-prob-thresh", "inf",
                       "--out-image-dir", tmp_path / "pictures", "--json", "-")  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    official = json.loads(scored.stdout)
    for name in ("exact", "f1", "total", "HasAns_f1", "NoAns_exact", "best_f1"):
        assert official[name] == results[name]
    assert 0 <= official["pr_oracle_ap"] <= 100
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "na_prob_hist_hasAns.png", "na_prob_hist_noAns.png", "pr_exact.png", "pr_f1.png",
        "pr_oracle.png",
    ]  # fmt: skip

    # As in the original, prediction alone takes the weights that training left in the folder.
    before = (output / "predictions.json").read_bytes()
    again = bertbench(
        *squad_arguments(output, "--predict_file", dev, "--version_2_with_negative", "true",
                         "--do_train=False", "--null_score_diff_threshold", str(threshold))
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "model.ckpt-" in again.stderr
    assert (output / "predictions.json").read_bytes() == before
    recorded = json.loads((output / "run.json").read_text())["results"]
    for name in ("global_step", "weights_step", "train_loss", "train_seconds"):
        assert recorded[name] == results[name]


def test_killed_run_continues_on_the_same_curve(tmp_path: Path) -> None:
    """SIGKILL in mid-epoch, another plan afterwards: the losses are those of an undisturbed run."""
    more = ["--train_file", demo_files().squad_train, "--train_batch_size", "8",
            "--num_train_epochs", "8", "--save_checkpoints_steps", "7"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert bertbench(*squad_arguments(whole, *more, "--micro-batch", "8")).returncode == 0
    arguments = squad_arguments(killed, *more, "--micro-batch", "8")
    process = subprocess.Popen(
        [sys.executable, "-m", "bertbench", *map(str, arguments)],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    log = killed / "train_log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 17):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # Two runs in one folder would write the same files.
    os.kill(process.pid, signal.SIGSTOP)
    before = log.read_bytes()
    fails_with_one_line(bertbench(*arguments), "another run is writing")
    assert log.read_bytes() == before
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = bertbench(
        *squad_arguments(killed, *more, "--micro-batch", "3", "--checkpointing", "full")
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing at step" in resumed.stderr
    expected, got = read_log(whole / "train_log.jsonl"), read_log(log)
    assert [record.step for record in got] == list(range(1, 41)) == [r.step for r in expected]
    for one, other in zip(expected, got, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=2e-4)
    # Another learning rate would be another run: refused, nothing touched.
    before = log.read_bytes()
    fails_with_one_line(
        bertbench(*squad_arguments(killed, *more, "--learning_rate", "1e-3")), "learning_rate"
    )
    assert log.read_bytes() == before


def test_ctrl_c_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    more = ["--train_file", demo_files().squad_train, "--train_batch_size", "8",
            "--num_train_epochs", "40", "--micro-batch", "8"]  # fmt: skip
    arguments = squad_arguments(tmp_path, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "bertbench", *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    log = tmp_path / "train_log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    steps = len(read_log(log))
    assert f"stopped at step {steps} of 200; saved" in errors
    assert (tmp_path / f"model.ckpt-{steps}.index").exists()


def test_plan_marks_settings_that_change_the_update() -> None:
    arguments = ["plan", "--seq-len", "384", "--target-batch", "24", "--memory", "5GiB"]
    allowed = bertbench(*arguments, "--model", "bert-large", "--allow", "Adafactor")
    assert "*" in allowed.stdout
    assert "* with adafactor: another update than the recipe's" in allowed.stdout
    assert all(len(line) <= 80 for line in allowed.stdout.splitlines()[1:3])
    exact = bertbench(*arguments, "--model", "bert-base")
    assert "adafactor" not in exact.stdout
    for wrong in (["--allow", "sgd"], ["--allow", "lion", "--optimizer", "adamw"]):
        refused = bertbench(*arguments, *wrong)
        fails_with_one_line(refused, "--allow")
        assert refused.stdout == ""


def test_a_plan_file_and_flags_that_contradict_each_other(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    made = bertbench(
        "plan", "--device", "cpu", "--memory", "1GiB", "--model", "bert-tiny", "--seq-len", "64",
        "--target-batch", "8", "--json", str(plan),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    result = bertbench(
        "run", "squad", "--demo", "--memory", "1GiB", "--plan", str(plan), "--precision", "bf16",
        "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    fails_with_one_line(result, "plan.json", "precision float32", "bf16")
