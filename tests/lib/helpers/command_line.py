"""The command line as a user calls it, and arguments that work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from finetune.tasks.demo_data import demo_files
from helpers.forked_command_line import AVAILABLE, run_forked

TIMEOUT_SECONDS = 240


def bertbench(
    *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command; one that imports TensorFlow, in a fork of a process that has done it."""
    words = [*map(str, arguments)]
    if AVAILABLE and words[:1] == ["run"] and env is None:
        return run_forked(words, cwd or Path.cwd(), TIMEOUT_SECONDS)
    return subprocess.run(
        [sys.executable, "-m", "bertbench", *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        cwd=cwd,
        env=env,
    )


def fails_with_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("bertbench: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last, last


def squad_arguments(output_dir: Path, *more: str | Path) -> list[str | Path]:
    demo = demo_files()
    return [
        "run", "squad", "--bert_config_file", demo.bert_config_file, "--vocab_file",
        demo.vocab_file, "--output_dir", output_dir, "--max_seq_length", "64", "--doc_stride",
        "32", "--max_query_length", "24", "--memory", "400MiB", *more,
    ]  # fmt: skip


def classifier_arguments(output_dir: Path, *more: str | Path) -> list[str | Path]:
    demo = demo_files()
    return [
        "run", "classifier", "--bert_config_file", demo.bert_config_file, "--vocab_file",
        demo.vocab_file, "--output_dir", output_dir, "--max_seq_length", "32", "--memory",
        "400MiB", "--train_batch_size", "4", "--num_train_epochs", "1", *more,
    ]  # fmt: skip


def with_unanswerable_questions(source: Path, target: Path) -> Path:
    """Copy a file in the format of SQuAD 2.0, each third question without an answer."""
    root = json.loads(source.read_text(encoding="utf-8"))
    number = 0
    for article in root["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                question["is_impossible"] = number % 3 == 0
                if question["is_impossible"]:
                    question["answers"] = []
                number += 1
    target.write_text(json.dumps(root), encoding="utf-8")
    return target
