"""Fit the seconds of work of a CPU (`bertbench.hardware.step_time`) to sweeps of `regret.py`.

    python benchmarks/fit_cost.py SWEEP.json [SWEEP.json ...] [--leave-out CASE ...]

Least squares of the relative errors, no number below 0. Prints what `bertbench.hardware.step_time`
takes, and how far predictions are from the measurements: of the cases that were used, and of those
left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from bertbench.core.workload import Setup, levers_from_json, published_workload
from bertbench.hardware.step_time import Work, work_of

_NAMES = [field.name for field in dataclasses.fields(Work)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="CASE")
    arguments = parser.parse_args()
    cases, counts, seconds = [], [], []
    for path in arguments.sweeps:
        for row in json.loads(path.read_text(encoding="utf-8"))["settings"]:
            model, head, seq_len, _ = row["case"].split(":")
            workload = published_workload(model, int(seq_len), head)
            work = work_of(
                Setup(workload, levers_from_json(row["levers"])).step(row["micro_batch"])
            )
            cases.append(row["case"])
            counts.append(dataclasses.astuple(work))
            seconds.append(min(row["seconds"]))
    measured = np.array(seconds)
    # Relative errors; and columns of like size, which the solver needs.
    relative = np.array(counts) / measured[:, None]
    sizes = np.maximum(relative.max(axis=0), 1e-30)
    used = np.array([case not in arguments.leave_out for case in cases])
    fitted, _ = nnls(relative[used] / sizes, np.ones(used.sum()))
    unit_seconds = fitted / sizes
    print("Work(")
    for name, value in zip(_NAMES, unit_seconds, strict=True):
        if value:
            print(f"    {name}={value:.3g},")
    print(")")
    ratios = relative @ unit_seconds
    for case in dict.fromkeys(cases):
        of_case = np.array([one == case for one in cases])
        low, middle, high = np.quantile(ratios[of_case], [0.05, 0.5, 0.95])
        note = "left out" if case in arguments.leave_out else "used"
        print(
            f"{case:30s} {of_case.sum():4d} settings, predicted / measured {middle:.3f} "
            f"({low:.3f} to {high:.3f}), {note}"
        )


if __name__ == "__main__":
    main()
