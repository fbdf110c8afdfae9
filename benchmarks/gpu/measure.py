"""What only a GPU can show: its limits and peaks beside a capped CPU's, its speed, and a peer.

    python benchmarks/gpu/measure.py --out FOLDER [--quick] [--minutes 8] [--part NAME ...]

| part | what |
| --- | --- |
| cells | the paper's twelve cells under every policy in 11,430 MiB, certified; limits and peaks |
| | beside those that the same requests have on a capped CPU |
| speed | examples a second by policy, micro-batch and precision, TensorFloat-32 among them |
| plans | effective batches of 24 and 32 of BERT-Large, sequence length 384, in 4 to 16 GiB |
| choice | the plan for an effective batch of 32 beside the settings that `speed` found fastest |
| placement | what the optimizer's state on the host saves and costs |
| peer | PyTorch and transformers on the same GPU, if they are installed |
| xla | examples a second of some settings compiled by XLA, which takes long |

Every trial is in a ledger in FOLDER as soon as it ends. A call ends by itself after `--minutes`,
the last of which is for the results, and the next one with the same FOLDER goes on; `results.json`
and `table.md` there are what all of them have measured. Several trials share the GPU (`--jobs`),
but one at a time does the steps that are timed, while others are set up with a step of one example
each. The device's settings are left alone.

`--quick`, on BERT-Tiny and BERT-Mini, needs no GPU and takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_tables
from gpu_parts import (
    FULL,
    QUICK,
    Cell,
    Scale,
    Timing,
    cells_of,
    choice_timings,
    limit_on_capped_cpu,
    placement_timings,
    plan_timings,
    plans_of,
    settled,
    speed_timings,
    xla_timings,
)
from timed_trial import TARGET, TURN_VARIABLE

from bertbench.core.progress import progress
from bertbench.core.terminal import say
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Setup
from bertbench.hardware.device import (
    GPU_CONTEXT_RESERVE_BYTES,
    Budget,
    budget_from_json,
    check_alone,
    check_free,
    make_budget,
)
from bertbench.hardware.discover import resolve_device
from bertbench.hardware.lock import devices_held
from bertbench.ledger.database import open_ledger
from bertbench.ledger.question import Question, versions_key
from bertbench.ledger.records import find, record
from bertbench.probing.cell import ProbeListener, ProbeSettings, probe_cell
from bertbench.trials.measure import TrialListener, TrialSettings, measure_batches
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.storage.json_files import json_text

PARTS = ("cells", "speed", "plans", "choice", "placement", "peer", "xla")
_STEPS = 4
_WRITING_MINUTES = 1.0
_LIKE_FAILURES = 3
_CORES_A_TRIAL = 2
_STARTED_WITH_SECONDS = 5.0


class OutOfTimeError(Exception):
    """The call's minutes are over."""


class BrokenError(Exception):
    """Trials fail again and again for one reason that is not memory."""


@dataclasses.dataclass
class Clock:
    """The end of a call, for all of its threads, by `time.monotonic`."""

    end: float

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def check(self) -> None:
        """End what is going on if the time is over."""
        if self.left() <= 0:
            raise OutOfTimeError

    def stop(self) -> None:
        """End all threads' work."""
        self.end = 0.0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What all parts are given.

    Attributes:
        scale: what is measured.
        budget: of all parts but `plans`.
        folder: of ledgers and results.
        jobs: most trials at a time.
        clock: end of the call.
        failures: messages of trials that failed in this call.
    """

    scale: Scale
    budget: Budget
    folder: Path
    jobs: int
    clock: Clock
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def limits(self) -> Path:
        """Ledger of `cells`, whose seconds are those of a shared GPU."""
        return self.folder / "limits.sqlite"

    @property
    def timings(self) -> Path:
        """Ledger of all others."""
        return self.folder / "timings.sqlite"

    @property
    def expected(self) -> Path:
        """Limits of the capped CPU."""
        return self.folder / "expected.json"

    @property
    def peers(self) -> Path:
        """Results of the peer, a line of JSON each."""
        return self.folder / "peer.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of ledgers and results")
    parser.add_argument("--quick", action="store_true", help="small models; needs no GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="end after this time")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", type=int, metavar="MIB", help="budget in MiB")
    parser.add_argument("--jobs", type=int, help="trials at a time; default: what the GPU holds")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    try:
        device = resolve_device(arguments.device)
        if device.kind == "cpu" and not arguments.quick:
            parser.error("no GPU is attached; --quick does without one")
        check_alone(device)
        budget = make_budget(device, (arguments.memory or scale.memory_mib) * MIB_BYTES)
        check_free(budget)
    except InputError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(time.monotonic() + 60 * (arguments.minutes - _WRITING_MINUTES))
    jobs = arguments.jobs or jobs_for(budget)
    measurement = Measurement(scale, budget, arguments.out, jobs, clock)
    subject = arguments.out / "budget.json"
    if not is_of(subject, budget):
        parser.error(f"{arguments.out} has results of another device or budget: name another --out")
    _write(subject, {"budget": budget.to_json()})
    os.environ[TURN_VARIABLE] = str(arguments.out.resolve() / "turn.lock")
    with devices_held([device]):
        try:
            for part in arguments.part:
                measure_part(measurement, part)
        except OutOfTimeError:
            say("the time is over; the same command goes on from here")
        except BrokenError as error:
            sys.exit(f"trials fail again and again: {error}")
        finally:
            write_results(measurement)


def measure_part(measurement: Measurement, part: str) -> None:
    """Measure what a part has left."""
    if part in _MEASURED_OTHERWISE:
        _MEASURED_OTHERWISE[part](measurement)
    else:
        measure_timings(measurement, part, _TIMINGS[part](measurement.scale, measurement.budget))


def is_of(subject: Path, budget: Budget) -> bool:
    """Whether a folder's file says the same device, driver and budget, or is not there yet."""
    if not subject.exists():
        return True
    before = json.loads(subject.read_text(encoding="utf-8"))["budget"]
    return budget_from_json(before).key() == budget.key()


def jobs_for(budget: Budget) -> int:
    """Trials that a GPU and a host hold at a time; a CPU's would take each other's cores."""
    if budget.device.kind != "gpu":
        return 1
    held = budget.device.free_bytes // (budget.budget_bytes + GPU_CONTEXT_RESERVE_BYTES)
    return max(1, min(held, (os.cpu_count() or 1) // _CORES_A_TRIAL))


def in_parallel(
    measurement: Measurement,
    name: str,
    pool: concurrent.futures.Executor,
    works: Sequence[Callable[[], str]],
) -> None:
    """Do pieces of work, several at a time; each says why a trial failed, if one has.

    Raises:
        OutOfTimeError: the time is over.
        BrokenError: trials fail again and again.
    """
    if not works:
        return
    with progress(name, len(works), "settings") as advance, pool:
        futures = [pool.submit(work) for work in works]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                notice_failure(measurement, future.result())
                advance(done, "")
        except BaseException:
            measurement.clock.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def notice_failure(measurement: Measurement, message: str) -> None:
    """Say that a trial has failed; give up if the same has happened often enough."""
    if not message:
        return
    say(f"failed: {message}")
    measurement.failures.append(message)
    if measurement.failures.count(message) >= _LIKE_FAILURES:
        raise BrokenError(message)


def measure_cells(measurement: Measurement) -> None:
    """Certify the limit of every cell."""
    budget = measurement.budget
    with open_ledger(measurement.limits) as ledger:
        cells = [
            cell
            for cell in cells_of(measurement.scale)
            if settled(find(ledger, Question(budget, Setup(*cell))), budget) is None
        ]
    end = measurement.clock.end
    works = [functools.partial(probe_one, measurement.limits, budget, cell, end) for cell in cells]
    # In processes: what recordings tell of a limit is worked out in Python, for seconds.
    in_parallel(measurement, "cells", _processes(measurement.jobs), works)
    work_out_expected(measurement)


def probe_one(limits: Path, budget: Budget, cell: Cell, end: float) -> str:
    """Certify the limit of a cell; say why a trial failed, if one has."""
    with open_ledger(limits) as ledger:
        question = Question(budget, Setup(*cell))
        listener = ProbeListener(poll=Clock(end).check)
        result = probe_cell(ledger, question, ProbeSettings(steps=2), listener).result
    return result.message if result.stopped_by == "failed" else ""


def _processes(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn")
    )


def work_out_expected(measurement: Measurement) -> None:
    """Write the limits of the capped CPU by cell, once."""
    limits = read_expected(measurement)
    missing = [cell for cell in cells_of(measurement.scale) if _name(cell) not in limits]
    if not missing:
        return
    with _processes(os.cpu_count() or 1) as pool:
        futures = [pool.submit(limit_on_capped_cpu, measurement.budget, *cell) for cell in missing]
        for cell, future in zip(missing, futures, strict=True):
            limits[_name(cell)] = future.result()
    _write(measurement.expected, limits)


def read_expected(measurement: Measurement) -> dict[str, int | None]:
    """Limits of the capped CPU; none before they have been worked out."""
    if not measurement.expected.exists():
        return {}
    limits: dict[str, int | None] = json.loads(measurement.expected.read_text(encoding="utf-8"))
    return limits


def _name(cell: Cell) -> str:
    workload, levers = cell
    return f"{workload.model} {workload.seq_len} {levers.checkpointing}"


def measure_timings(measurement: Measurement, name: str, timings: Sequence[Timing]) -> None:
    """Time what has not been timed."""

    def work(timing: Timing, batches: tuple[int, ...]) -> str:
        measurement.clock.check()
        question = Question(timing.budget, timing.setup)

        def keep(trial: Trial) -> None:
            # Before several micro-batches there was a step that warmed up.
            fresh = trial.fresh and len(batches) == 1
            record(ledger, question, dataclasses.replace(trial, fresh=fresh))

        with open_ledger(measurement.timings) as ledger:
            *_, last = measure_batches(
                timing.setup,
                timing.budget,
                batches,
                TrialSettings(_STEPS, target=TARGET),
                TrialListener(on_trial=keep, poll=measurement.clock.check),
            )
        return last.message if last.outcome == "failed" else ""

    with open_ledger(measurement.timings) as ledger:
        # Two plans may be one.
        left = [
            (timing, batches)
            for timing in dict.fromkeys(timings)
            if (batches := timing.open_batches(ledger))
        ]
    largest = max((timing.budget for timing, _ in left), key=lambda b: b.budget_bytes, default=None)
    jobs = 1 if largest is None else min(measurement.jobs, jobs_for(largest))
    works = [functools.partial(work, timing, batches) for timing, batches in left]
    in_parallel(measurement, name, concurrent.futures.ThreadPoolExecutor(jobs), works)


def measure_choice(measurement: Measurement) -> None:
    """Run the plan for the last target, and its rivals."""
    with open_ledger(measurement.timings) as ledger:
        timings = [
            timing
            for workload in measurement.scale.timed
            for timing in choice_timings(measurement.scale, measurement.budget, workload, ledger)
        ]
    measure_timings(measurement, "choice", timings)


def measure_peer(measurement: Measurement) -> None:
    """Ask PyTorch, one process at a time."""
    done = {(row["model"], row["seq_len"], row["attention"], row["checkpointing"])
            for row in peer_rows(measurement)}  # fmt: skip
    wanted = [
        (workload.model, workload.seq_len, attention, checkpointing)
        for workload in measurement.scale.timed
        for attention in ("eager", "sdpa")
        for checkpointing in ("none", "full")
    ]
    left = [one for one in wanted if one not in done]
    with progress("peer", len(wanted), "settings", first=len(done)) as advance:
        for number, one in enumerate(left, len(done) + 1):
            measurement.clock.check()
            model, seq_len, attention, checkpointing = one
            command = [
                sys.executable,
                str(Path(__file__).with_name("torch_peer.py")),
                model,
                str(seq_len),
                str(measurement.budget.budget_bytes),
                attention,
                checkpointing,
                *map(str, measurement.scale.batches),
            ]
            device = measurement.budget.device
            visible = (device.uuid or str(device.index)) if device.kind == "gpu" else ""
            try:
                ended = subprocess.run(
                    command,
                    check=False,
                    capture_output=True,
                    text=True,
                    timeout=max(measurement.clock.left(), _STARTED_WITH_SECONDS),
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": visible},
                )
            except subprocess.TimeoutExpired:
                raise OutOfTimeError from None
            if ended.returncode:
                last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
                if last.startswith("ModuleNotFoundError"):
                    say(f"no peer: {last}")
                    return
                notice_failure(measurement, f"PyTorch: {last}")
                continue
            with measurement.peers.open("a", encoding="utf-8") as file:
                file.write(ended.stdout.splitlines()[-1] + "\n")
            advance(number, "")


def peer_rows(measurement: Measurement) -> list[dict[str, Any]]:
    """What the peer has answered."""
    if not measurement.peers.exists():
        return []
    lines = measurement.peers.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_results(measurement: Measurement) -> None:
    """Put all that the ledgers have together."""
    expected = read_expected(measurement)
    scale, budget = measurement.scale, measurement.budget
    with open_ledger(measurement.limits) as ledger:
        cells = [
            gpu_tables.cell_row(budget, *cell, expected.get(_name(cell)), ledger)
            for cell in cells_of(scale)
        ]
        failures = gpu_tables.failures(ledger)
    with open_ledger(measurement.timings) as ledger:
        results = {
            "budget": budget.to_json(),
            "versions": json.loads(versions_key()),
            "cells": cells,
            "speed": [
                row
                for timing in (*speed_timings(scale, budget), *xla_timings(scale, budget))
                for row in gpu_tables.speed_rows(timing, ledger)
            ],
            "plans": [gpu_tables.plan_row(*row, ledger) for row in plans_of(scale, budget)],
            "choice": [
                gpu_tables.choice_row(
                    workload, choice_timings(scale, budget, workload, ledger), ledger
                )
                for workload in scale.timed
            ],
            "placement": [
                row
                for timing in placement_timings(scale, budget)
                for row in gpu_tables.speed_rows(timing, ledger)
            ],
            "peer": peer_rows(measurement),
            "failures": failures + gpu_tables.failures(ledger),
        }
    _write(measurement.folder / "results.json", results)
    table = gpu_tables.as_markdown(results)
    (measurement.folder / "table.md").write_text(table, encoding="utf-8")
    print(table)


_TIMINGS: dict[str, Callable[[Scale, Budget], list[Timing]]] = {
    "speed": speed_timings,
    "plans": plan_timings,
    "placement": placement_timings,
    "xla": xla_timings,
}
_MEASURED_OTHERWISE: dict[str, Callable[[Measurement], None]] = {
    "cells": measure_cells,
    "choice": measure_choice,
    "peer": measure_peer,
}


def _write(path: Path, values: Any) -> None:
    path.write_text(json_text(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
