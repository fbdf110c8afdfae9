"""What the commands answer, recorded from two source trees and compared.

    python benchmarks/same_output.py record OUT [--tree FOLDER] [--inputs OUT_OF_BEFORE]
    python benchmarks/same_output.py compare BEFORE AFTER

A change of the layout must change no answer. `record` runs plans, a tiny probe, the demo's
training and reports with the packages of one tree, and keeps their JSON. `--inputs` lets the
reports read the ledger and the run that an earlier recording has made, so that measured seconds
are the same. `compare` leaves out what a clock measured, and shows every other difference.
`--quick` records the plans alone.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.storage.json_files import json_text

_CARDS = ("gtx-1060", "rtx-3090", "t4", "a100")

_MEASURED = re.compile(
    r"seconds|time|per_second|rate|date|started|ended|process_peak|free_bytes|path|dir$|_file$|^predictions$"
)
"""Keys of trials, runs and reports whose values a clock or a folder's name decides."""

_PLANS = ("grid-", "large-", "least-", "classifier")
"""Names of what no clock decides: there only the host's free memory differs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    record = verbs.add_parser("record")
    record.add_argument("out", type=Path)
    record.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1])
    record.add_argument("--inputs", type=Path, help="an earlier recording, whose data are reported")
    record.add_argument("--quick", action="store_true", help="plans alone")
    compare = verbs.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "record":
        _record(arguments.out.resolve(), arguments.tree, arguments.inputs, arguments.quick)
    else:
        sys.exit(1 if _compare(arguments.before, arguments.after) else 0)


def _commands(out: Path, inputs: Path, quick: bool) -> Iterator[tuple[str, list[str]]]:
    empty = ["--ledger", str(out / "none.sqlite")]
    for card in _CARDS:
        yield f"grid-{card}", ["plan", "--target-batch=32", f"--gpu={card}", *empty]
    large = ["plan", "--model=bert-large", "--seq-len=384", "--target-batch=24", *empty]
    yield "large-4GiB", [*large, "--gpu=t4", "--memory=4GiB", "--explain"]
    yield "large-cpu", [*large, "--device=cpu", "--memory=6GiB"]
    yield "large-allow", [*large, "--gpu=rtx-3090", "--allow=bf16,adafactor", "--memory=6GiB"]
    yield "least-memory", [*large, "--gpu=all", "--min-memory"]
    yield "classifier", ["plan", "--model=bert-base", "--seq-len=128", "--head=classifier",
                         "--gpu=all", *empty]  # fmt: skip
    if quick:
        return
    ledger = ["--ledger", str(out / "ledger.sqlite")]
    yield "probe", ["probe", "--models=bert-tiny", "--seq-lens=32,128", "--memory=256MiB", *ledger]
    run = ["run", "squad", "--demo", "--memory=1GiB", "--num_train_epochs=2", "--seed=7"]
    yield "run", [*run, f"--output_dir={out / 'run'}"]
    yield "ledger", ["ledger", "list", "--ledger", str(inputs / "ledger.sqlite")]
    report = ["report", "--ledger", str(inputs / "ledger.sqlite"), "--run", str(inputs / "run")]
    yield "report", report
    yield "report-page", [*report, "--out", str(out / "report")]


def _record(out: Path, tree: Path, inputs: Path | None, quick: bool) -> None:
    out.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "BERTBENCH_CACHE": str(out)}
    for name, arguments in _commands(out, (inputs or out).resolve(), quick):
        command = [
            sys.executable,
            "-m",
            "bertbench",
            *arguments,
            "--json",
            str(out / f"{name}.json"),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out)
        (out / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
        print(f"{name}: exit code {done.returncode}", flush=True)
        if done.returncode:
            raise SystemExit(done.stderr)


def _compare(before: Path, after: Path) -> int:
    """Show what differs; returns in how many files."""
    different = 0
    first, second = ({path.name for path in folder.glob("*.json")} for folder in (before, after))
    names = sorted(first & second)
    for name in sorted(first ^ second):  # as of a recording with --quick
        print(f"{name}: in one of them only")
    for name in names:
        one, other = (_lines(folder / name) for folder in (before, after))
        lines = list(difflib.unified_diff(one, other, "before", "after", n=1, lineterm=""))
        different += bool(lines)
        print(f"{name}: {len(one):,} lines, {'DIFFERENT' if lines else 'the same'}")
        for line in lines[:40]:
            print(f"    {line}")
    print(f"{len(names)} files, {different} different")
    return different


def _lines(path: Path) -> list[str]:
    values = json.loads(path.read_text(encoding="utf-8"))
    measured = re.compile("^free_bytes") if path.name.startswith(_PLANS) else _MEASURED
    return json_text(_unmeasured(values, measured), indent=1).splitlines()


def _unmeasured(value: Any, measured: re.Pattern[str], key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _unmeasured(inner, measured, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_unmeasured(inner, measured, key) for inner in value]
    return "measured" if measured.search(key) else value


if __name__ == "__main__":
    main()
