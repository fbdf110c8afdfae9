"""Recommended plans for the workloads of a ledger, calibrated by its trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Workload
from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.step_time import device_rates
from bertbench.ledger.records import LedgerRow
from bertbench.planning.calibration import calibrate
from bertbench.planning.planner import Plan, make_plan
from bertbench.planning.requests import PlannedDevice, PlanRequest
from bertbench.trials.trial import Trial
from finetune.errors import InputError
from finetune.spec.config import PRESETS
from reports.environments import Environment
from reports.measured_cells import MeasuredCell, model_order

_MAX_ROWS = 400
"""Number of the newest trials that calibrate a plan: of its own workload, and of others."""

_MAX_PLANS = 12
_TPU = "tpu-v2-8"
"""The TPU of the catalogue that a TPU in a ledger is planned as."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The plan that is recommended for one workload in one environment.

    Attributes:
        workload: what is trained.
        task: the head in words.
        environment: device and budget.
        plan: the plan, or the error that says why there is none.
        trial: trial of the chosen setting in a fresh process, if the ledger has one.
    """

    workload: Workload
    task: str
    environment: Environment
    plan: Plan | InputError
    trial: Trial | None

    @property
    def commands(self) -> tuple[str, ...]:
        """Commands that write the plan to a file, and train with it.

        Empty without a plan, and for a model that is not a published one.
        """
        if isinstance(self.plan, InputError) or self.workload.model not in PRESETS:
            return ()
        workload, environment = self.workload, self.environment
        where = f"--device {environment.kind} --memory {environment.budget_bytes // MIB_BYTES}MiB"
        on, at = where, where
        if environment.kind == "tpu":
            on, at = f"--gpu {_TPU}", "--use_tpu --tpu_name TPU_NAME"
        data = "classifier --task_name MRPC --data_dir glue/MRPC"
        if workload.head == "squad":
            data = "squad --train_file train-v1.1.json --predict_file dev-v1.1.json"
        model, seq_len, batch = workload.model, workload.seq_len, self.plan.target_batch
        return (
            f"bertbench plan --target-batch {batch} --model {model} "
            f"--seq-len {seq_len} --head {workload.head} {on} --json plan.json",
            f"bertbench run {data} --model MODEL_FOLDER --max_seq_length {seq_len} "
            f"--train_batch_size {batch} --plan plan.json {at} --output_dir output",
        )


def recommend_plans(cells: Sequence[MeasuredCell], target_batch: int) -> list[Recommendation]:
    """Plan each workload of a ledger, in each environment where it has trials.

    At most a dozen are planned, those with the newest trials.

    Args:
        cells: what `reports.measured_cells.collect_cells` returns.
        target_batch: effective batch.
    """
    rows: dict[Environment, list[LedgerRow]] = {}
    newest: dict[tuple[Environment, str], MeasuredCell] = {}
    for cell in cells:
        rows.setdefault(cell.environment, []).extend(cell.rows)
        if cell.workload is not None:
            key = cell.environment, cell.workload.key()
            newest[key] = max(cell, newest.get(key, cell), key=lambda c: c.newest.id)
    for some in rows.values():
        some.sort(key=lambda row: row.id)
    wanted = sorted(newest.values(), key=lambda cell: -cell.newest.id)[:_MAX_PLANS]
    found = [
        _plan(cell.workload, cell, rows[cell.environment], target_batch)
        for cell in wanted
        if cell.workload is not None
    ]
    return sorted(
        found, key=lambda p: (p.environment, model_order(p.workload.model), p.workload.seq_len)
    )


def _plan(
    workload: Workload, cell: MeasuredCell, rows: Sequence[LedgerRow], target_batch: int
) -> Recommendation:
    environment = cell.environment
    workload = dataclasses.replace(workload, model=cell.model)
    rates = device_rates(environment.as_device())
    device = PlannedDevice(
        environment.device,
        environment.kind,
        environment.budget_bytes,
        rates,
        find_accelerator(_TPU).replicas if environment.kind == "tpu" else 1,
    )
    key = workload.key()
    usable = [row for row in rows if row.trial.outcome != "failed"]
    own = [row for row in usable if row.question.workload == key]
    others = [row for row in usable if row.question.workload != key]
    known = [*others[-_MAX_ROWS:], *own[-_MAX_ROWS:]]
    try:
        calibration = calibrate(known, workload, rates, environment.kind)
        plan = make_plan(PlanRequest(target_batch), workload, device, calibration)
    except InputError as error:
        return Recommendation(workload, cell.task, environment, error, None)
    trials = [row.trial for row in own if _is_of(row, plan)]
    return Recommendation(workload, cell.task, environment, plan, trials[-1] if trials else None)


def _is_of(row: LedgerRow, plan: Plan) -> bool:
    chosen = plan.chosen
    return (
        row.trial.outcome == "fits"
        and row.trial.fresh
        and row.trial.batch == chosen.step.micro_batch
        and row.question.levers == chosen.step.levers.key()
    )
