"""How long a report takes, as a whole process, and how large its page is.

    python benchmarks/report.py [--quick] [--json FILE]

Ledgers are made up: none, one cell, and 100,000 trials of 400 cells (`--quick`: 5,000). About a
minute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question
from bertbench.ledger.records import record
from bertbench.trials.trial import Trial
from finetune.spec.checkpointing import POLICIES, parse_checkpointing
from finetune.storage.json_files import json_text

_MODELS, _SEQ_LENS = ("bert-tiny", "bert-base"), (64, 128, 256, 384, 512)
_CELLS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5,000 trials instead of 100,000")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for cells, trials in ((0, 0), (1, 2), (_CELLS, 12 if arguments.quick else 250)):
        with tempfile.TemporaryDirectory() as folder:
            ledger, page = Path(folder, "ledger.sqlite"), Path(folder, "report.html")
            _fill(ledger, cells, trials)
            began = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "bertbench", "report", "--ledger", str(ledger),
                 "--out", str(page)],
                check=True, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            seconds = time.monotonic() - began
            rows.append(
                {"trials": cells * trials, "cells": cells, "seconds": round(seconds, 2),
                 "page_bytes": page.stat().st_size}
            )  # fmt: skip
        row = rows[-1]
        print(
            f"{row['trials']:7,} trials of {row['cells']:3} cells: {row['seconds']:5.1f} s, "
            f"{row['page_bytes'] / 1e6:.2f} MB",
            flush=True,
        )
    if arguments.json:
        text = json_text({"reports": rows}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def _fill(path: Path, cells: int, trials: int) -> None:
    """Make a ledger with as many cells of as many trials, the last tenth of them out of memory."""
    device = resolve_device("cpu")
    with open_ledger(path) as ledger:
        # One transaction: what is measured is the reading.
        ledger.execute("BEGIN")
        for cell in range(cells):
            workload = published_workload(_MODELS[cell % 2], _SEQ_LENS[cell // 8 % 5])
            levers = Levers(parse_checkpointing(POLICIES[cell // 2 % 4]))
            budget = make_budget(device, (1000 + cell // 40) * MIB_BYTES)
            question = Question(budget, Setup(workload, levers))
            for number in range(trials):
                batch = number % 50 + 1
                fits = number < 0.9 * trials - 0.5
                record(
                    ledger, question,
                    Trial(batch, "fits", batch * 10 * MIB_BYTES, 0.1 * batch, 5.0, fresh=True)
                    if fits
                    else Trial(51, "oom", seconds=12.0, message="OOM", fresh=True),
                )  # fmt: skip
        ledger.execute("COMMIT")


if __name__ == "__main__":
    main()
