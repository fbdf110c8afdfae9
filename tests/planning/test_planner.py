"""The planner: what is chosen fits, reaches the target, and nothing faster would have fitted."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertbench.core.units import GIB_BYTES, MIB_BYTES, format_bytes, parse_bytes
from bertbench.core.workload import Levers, Setup, Workload, levers_from_json, published_workload
from bertbench.hardware.accelerators import (
    ACCELERATORS,
    check_levers,
    find_accelerator,
    match_accelerator,
)
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.hardware.step_time import gpu_rates, predict_step_seconds
from bertbench.memory.prediction import predict_memory
from bertbench.memory.room import Room
from bertbench.planning.calibration import Calibration
from bertbench.planning.candidates import cuts
from bertbench.planning.min_memory import find_min_memory
from bertbench.planning.plan_file import PlanFile, read_plan
from bertbench.planning.planner import (
    Plan,
    make_plan,
)
from bertbench.planning.requests import PlannedDevice, PlanRequest
from bertbench.trials.measure import TrialSettings, measure_step
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import HEADS
from finetune.spec.optimizers import OPTIMIZERS

RATES = gpu_rates(ACCELERATORS["titan-x"])


def plan_for(model: str, seq_len: int, target: int, budget_bytes: int, policy: str = "") -> Plan:
    policies = [parse_checkpointing(policy)] if policy else None
    workload = published_workload(model, seq_len)
    return make_plan(
        PlanRequest(target, policies=policies),
        workload,
        PlannedDevice("test", "cpu", budget_bytes, RATES),
    )


@example("bert-tiny", 384, 65, 100)
@settings(max_examples=60)
@given(
    model=st.sampled_from(["bert-tiny", "bert-mini", "bert-medium", "bert-base"]),
    seq_len=st.sampled_from([64, 128, 384]),
    target=st.integers(1, 70),
    budget_mib=st.integers(60, 10_000),
)
def test_nothing_that_fits_is_faster(
    model: str, seq_len: int, target: int, budget_mib: int
) -> None:
    """Asked of every setting there is, one by one."""
    workload, room = published_workload(model, seq_len), Room("cpu", budget_mib * MIB_BYTES)

    def fits(levers: Levers, micro_batch: int) -> bool:
        return predict_memory(Setup(workload, levers), room).fits(micro_batch)

    policies = ["none", "selective", "full", "nested", "full:1", "nested:1+selective"]
    everything = [
        (micro_batch, Levers(parse_checkpointing(policy), steps))
        for policy in policies
        for micro_batch, steps in cuts(target)
    ]
    try:
        plan = make_plan(
            PlanRequest(target, policies=[parse_checkpointing(policy) for policy in policies]),
            workload,
            PlannedDevice("test", "cpu", room.budget_bytes, RATES),
        )
    except InputError:
        assert not any(fits(levers, size) for size, levers in everything)
        return
    chosen = plan.chosen
    assert fits(chosen.step.levers, chosen.step.micro_batch)
    assert chosen.footprint.peak_bytes <= room.budget_bytes
    assert target <= chosen.rows < target + chosen.step.micro_batch
    for micro_batch, levers in everything:
        seconds = predict_step_seconds(Setup(workload, levers).step(micro_batch), RATES)
        if seconds < chosen.predicted_step_seconds:
            assert not fits(levers, micro_batch)
    for entry in plan.alternatives:
        assert entry.predicted_step_seconds >= chosen.predicted_step_seconds
        assert entry.footprint.peak_bytes < chosen.footprint.peak_bytes
    for rejection in plan.rejected:
        assert not predict_memory(rejection.step.setup, room).fits(rejection.step.micro_batch)


@pytest.mark.parametrize(
    ("model", "budget_mib"), [("bert-base", 12_000), ("bert-large", 9_000), ("bert-large", 7_000)]
)
def test_a_plan_without_alternatives_is_the_same_plan(model: str, budget_mib: int) -> None:
    device = PlannedDevice("test", "cpu", budget_mib * MIB_BYTES, RATES)
    workload, request = published_workload(model, 384), PlanRequest(32)
    plan = make_plan(request, workload, device)
    assert plan.alternatives
    alone = make_plan(dataclasses.replace(request, alternatives=False), workload, device)
    assert alone == dataclasses.replace(plan, alternatives=())


def test_of_equally_fast_settings_that_with_the_smallest_peak_is_taken() -> None:
    device = PlannedDevice("test", "cpu", 12_000 * MIB_BYTES, RATES)
    workload, request = published_workload("bert-tiny", 128), PlanRequest(32)
    tied = make_plan(request, workload, device, Calibration(time_factor=0.0))
    plan = make_plan(request, workload, device)
    assert plan.alternatives
    for other in (plan.chosen, *plan.alternatives):
        assert tied.chosen.footprint.peak_bytes < 1.01 * other.footprint.peak_bytes
    assert not tied.alternatives


def test_a_step_needs_memory_in_one_piece() -> None:
    """What is alive at once, 7 examples' activations, would fit; the pieces are too small."""
    setup, room = Setup(published_workload("bert-small", 128)), Room("cpu", 512 * MIB_BYTES)
    predicted = predict_memory(setup, room)
    assert predicted.peak_bytes(7) < room.budget_bytes
    assert predicted.fits(6)
    assert not predicted.fits(7)
    assert predicted.max_micro_batch() == 6
    # Without a trace, and on a GPU, a margin takes its place.
    assert predicted.usable_bytes == room.budget_bytes
    unknown = dataclasses.replace(setup, levers=Levers(precision="bf16"))
    assert predict_memory(unknown, room).usable_bytes < room.budget_bytes
    on_gpu = predict_memory(setup, Room("gpu", room.budget_bytes))
    assert on_gpu.usable_bytes == int(room.budget_bytes / 1.08)


@given(st.integers(1, 300))
def test_cuts_have_no_needless_rows(target: int) -> None:
    found = cuts(target)
    assert found[0] == (target, 1)
    assert found[-1] == (1, target)
    for size, steps in found:
        assert target <= size * steps < target + size
        # Fewer examples at a time would take another step.
        assert size == 1 or (size - 1) * steps < target
    if target == 32:
        assert (11, 3) in found


def test_more_memory_is_never_slower() -> None:
    seconds = [
        plan_for("bert-large", 384, 24, gib * GIB_BYTES).chosen.predicted_step_seconds
        for gib in range(8, 80, 6)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_more_memory_is_never_worse_with_exact_gelu(optimizer: str) -> None:
    """As most models that people download have it: every plan is one that is known to the byte."""
    workload, levers = exact_gelu("bert-mini", 128), Levers(optimizer=optimizer)
    seconds = []
    for mebibytes in range(190, 215, 4):
        room = Room("cpu", mebibytes * MIB_BYTES)
        chosen = make_plan(
            PlanRequest(8, allowed=[levers]),
            workload,
            PlannedDevice("test", "cpu", room.budget_bytes, RATES),
        ).chosen
        predicted = predict_memory(chosen.step.setup, room)
        assert predicted.source == "trace"
        assert predicted.fits(chosen.step.micro_batch)
        seconds.append(chosen.predicted_step_seconds)
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("head", HEADS)
def test_plans_near_the_smallest_budget_run(optimizer: str, head: str) -> None:
    """BERT-Mini's shape with exact GELU once ran out of memory at 206 MiB, where another fitted."""
    workload, levers = exact_gelu("bert-mini", 128, head), Levers(optimizer=optimizer)
    smallest = find_min_memory(PlanRequest(8, allowed=[levers]), workload, "cpu").budget_bytes
    for budget_bytes in {smallest, smallest + MIB_BYTES, max(smallest, 206 * MIB_BYTES)}:
        budget = make_budget(resolve_device("cpu"), budget_bytes)
        plan = make_plan(
            PlanRequest(8, allowed=[levers]),
            workload,
            PlannedDevice("test", "cpu", budget_bytes, RATES),
        )
        step = plan.chosen.step
        trial = measure_step(step, budget, TrialSettings(steps=2))
        assert trial.outcome == "fits", (budget_bytes, trial.message)


def exact_gelu(model: str, seq_len: int, head: str = "squad") -> Workload:
    workload = published_workload(model, seq_len, head)
    config = dataclasses.replace(workload.config, hidden_act="gelu_erf")
    return dataclasses.replace(workload, config=config)


def test_plenty_of_memory_needs_no_lever() -> None:
    chosen = plan_for("bert-base", 128, 32, 80 * GIB_BYTES).chosen
    assert (chosen.step.micro_batch, chosen.step.levers) == (32, Levers())


def test_an_insisted_policy_is_kept() -> None:
    plan = plan_for("bert-base", 384, 32, 6 * GIB_BYTES, "full")
    assert str(plan.chosen.step.levers.checkpointing) == "full"
    # Checkpointing everything leaves room for the whole batch where `none` must be cut.
    assert plan.chosen.step.levers.accumulation_steps == 1
    assert plan_for("bert-base", 384, 32, 6 * GIB_BYTES, "none").chosen.step.micro_batch < 32


@pytest.mark.parametrize(("model", "target"), [("bert-base", 24), ("bert-mini", 1)])
def test_the_smallest_memory_is_enough_and_no_less_is(model: str, target: int) -> None:
    workload = published_workload(model, 384)
    policies = [parse_checkpointing(policy) for policy in ("none", "full", "nested")]
    smallest = find_min_memory(PlanRequest(target, policies=policies), workload, "cpu")

    def fits_in(budget_bytes: int) -> bool:
        predicted = predict_memory(smallest.step.setup, Room("cpu", budget_bytes))
        return predicted.fits(smallest.step.micro_batch)

    assert fits_in(smallest.budget_bytes)
    assert not fits_in(smallest.budget_bytes - MIB_BYTES)

    def plan(budget_bytes: int) -> Plan:
        return make_plan(
            PlanRequest(target, policies=policies),
            workload,
            PlannedDevice("test", "cpu", budget_bytes, RATES),
        )

    assert plan(smallest.budget_bytes).chosen.step.micro_batch <= target
    with pytest.raises(InputError, match="does not fit"):
        plan(smallest.budget_bytes - 16 * MIB_BYTES)


def test_missing_bytes_are_named() -> None:
    with pytest.raises(InputError, match=r"needs ([\d,]+) MiB, ([\d,]+) MiB more") as caught:
        plan_for("bert-large", 384, 24, 2 * GIB_BYTES)
    needed, missing = (
        int(word.replace(",", ""))
        for word in str(caught.value).replace(" MiB", "").split("needs ")[1].split(";")[0]
        .replace("more", "").split(", ")
    )  # fmt: skip
    assert abs(needed - missing - 2048) <= 1
    with pytest.raises(InputError, match="target batch 0"):
        plan_for("bert-tiny", 64, 0, GIB_BYTES)


def test_plan_file_round_trip(tmp_path: Path) -> None:
    plan = plan_for("bert-base", 384, 32, 8 * GIB_BYTES)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    chosen = plan.chosen
    assert read_plan(path) == PlanFile(32, chosen.step.micro_batch, chosen.step.levers, 1)
    values = plan.to_json()
    for replicas, reached in ((2, True), (1, False), (0, False)):
        values["target_batch"], values["chosen"]["replicas"] = 64, replicas
        path.write_text(json.dumps(values))
        if reached:
            assert read_plan(path).replicas == 2
        else:
            with pytest.raises(InputError, match="do not reach" if replicas else "'replicas' is"):
                read_plan(path)
    values = plan.to_json()
    values["chosen"]["accumulation_steps"] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="do not reach"):
        read_plan(path)
    for key, wrong in (
        ("checkpointing", None),
        ("checkpointing", 3),
        ("accumulation_steps", None),
        ("accumulation_steps", "1"),
        ("micro_batch", 1e400),
    ):
        values = plan.to_json()
        values["chosen"][key] = wrong
        path.write_text(json.dumps(values))
        with pytest.raises(InputError, match=r"not (a plan|JSON)"):
            read_plan(path)
    values = plan.to_json()
    values["chosen"]["checkpointing"] = "some"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"plan\.json: .*unknown checkpointing policy 'some'"):
        read_plan(path)
    path.write_text('{"target_batch": 32, "plans": []}')
    with pytest.raises(InputError, match="several workloads"):
        read_plan(path)
    path.write_text('{"chosen": 3}')
    with pytest.raises(InputError, match="not a plan"):
        read_plan(path)
    path.write_text('{\n"chosen": ]')
    with pytest.raises(InputError, match=r"plan\.json:2: not JSON"):
        read_plan(path)


def test_cost_counts_recomputation_and_accumulation() -> None:
    workload = published_workload("bert-base", 384)
    seconds = {
        policy: predict_step_seconds(
            Setup(workload, Levers(parse_checkpointing(policy))).step(8), RATES
        )
        for policy in ("none", "full:6", "full")
    }
    assert seconds["none"] < seconds["full:6"] < seconds["full"] < 1.4 * seconds["none"]
    cut = predict_step_seconds(Setup(workload, Levers(accumulation_steps=8)).step(1), RATES)
    assert cut > seconds["none"]


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("12GiB", 12 << 30), ("11430 MiB", 11430 << 20), ("8g", 8 << 30), ("1.5GB", 1_500_000_000),
     ("2097152", 2 << 20)],
)  # fmt: skip
def test_memory_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "many", "-3GiB", "12 parsecs", "5", "1e3MiB"])
def test_not_memory_sizes(text: str) -> None:
    with pytest.raises(InputError, match="memory size"):
        parse_bytes(text)


def test_catalogue() -> None:
    assert find_accelerator("NVIDIA GeForce RTX_2080 Ti").name == "rtx-2080-ti"
    assert find_accelerator("titan-x").usable_bytes == pytest.approx(11430 << 20, rel=0.01)
    found = match_accelerator("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.name == "h100"
    found = match_accelerator("NVIDIA GeForce RTX 2080 Ti")
    assert found is not None
    assert found.name == "rtx-2080-ti"
    assert match_accelerator("Voodoo 2") is None
    assert format_bytes(11430 << 20) == "11.2 GiB"
    assert format_bytes(437 << 20) == "437 MiB"


def test_optimizers_that_change_the_update_are_used_only_where_allowed() -> None:
    workload = published_workload("bert-large", 384)

    def plan(gib: float, *optimizers: str) -> Plan:
        budget_bytes = int(gib * GIB_BYTES)
        allowed = [Levers(optimizer=name) for name in ("adamw", *optimizers)]
        return make_plan(
            PlanRequest(24, allowed=allowed),
            workload,
            PlannedDevice("test", "cpu", budget_bytes, RATES),
        )

    # Where both are equally fast, the published update is taken.
    roomy = plan(80, "adafactor").chosen
    assert (roomy.step.levers.optimizer, roomy.to_json()["exact"]) == ("adamw", True)
    with pytest.raises(InputError, match="--allow adafactor"):
        plan(4)
    small = plan(4, "lion", "adafactor").chosen
    assert (small.step.levers.optimizer, small.to_json()["exact"]) == ("adafactor", False)
    with pytest.raises(InputError, match="does not fit") as caught:
        plan(1)
    assert "--allow" not in str(caught.value)


def test_the_host_takes_the_optimizers_state_where_nothing_else_fits() -> None:
    workload = published_workload("bert-large", 384)
    rates = gpu_rates(find_accelerator("gtx-1050-ti"))

    def plan(gibibytes: float, kind: str, host_if_needed: bool = True) -> Plan:
        return make_plan(
            PlanRequest(24, host_if_needed=host_if_needed),
            workload,
            PlannedDevice("a card", kind, int(gibibytes * GIB_BYTES), rates),
        )

    assert plan(6, "gpu").chosen.step.levers.placement == "device"
    with pytest.raises(InputError, match="does not fit"):
        plan(3.5, "cpu")
    with pytest.raises(InputError, match="does not fit"):
        plan(3.5, "gpu", host_if_needed=False)
    chosen = plan(3.5, "gpu").chosen
    assert chosen.step.levers.placement == "host"
    assert chosen.step.levers.exact
    assert chosen.footprint.parts["optimizer_state"] == 0
    trained = sum(
        math.prod(shape) for name, shape in workload.parameters.items() if workload.trained(name)
    )
    # Two moments, and what is on its way between the two memories.
    assert 8 * trained < chosen.footprint.host_bytes < 9 * trained
    assert chosen.predicted_step_seconds > plan(6, "gpu").chosen.predicted_step_seconds


def test_only_a_gpu_has_a_host() -> None:
    levers = Levers(placement="host")
    check_levers("gpu", "NVIDIA A100-SXM4-40GB", levers)
    with pytest.raises(InputError, match="host of AMD EPYC"):
        check_levers("cpu", "AMD EPYC", levers)
    with pytest.raises(InputError, match="XLA"):
        check_levers("gpu", "Tesla T4", Levers(xla=True, placement="host"))
    with pytest.raises(InputError, match="does not support fp16"):
        check_levers("tpu", "TPU v2", Levers(precision="fp16"))
    with pytest.raises(InputError, match="on the host with several replicas"):
        check_levers("gpu", "Tesla T4", Levers(placement="host"), replicas=2)
    assert levers_from_json(levers.to_json()) == levers
    with pytest.raises(InputError, match="moon"):
        levers_from_json({"placement": "moon"})


@pytest.mark.parametrize(
    ("target", "micro_batch", "padding"),
    [(32, 4, 0), (24, 3, 0), (12, 2, 4), (48, 6, 0), (3, 1, 5)],
)
def test_eight_cores_share_an_effective_batch(target: int, micro_batch: int, padding: int) -> None:
    """The original's Cloud TPU v2: 8 cores with 8 GiB each."""
    tpu = find_accelerator("TPU-v2-8")
    assert (tpu.kind, tpu.replicas, tpu.memory_bytes) == ("tpu", 8, 8 * GIB_BYTES)
    plan = make_plan(
        PlanRequest(target),
        published_workload("bert-base", 128),
        PlannedDevice(tpu.name, tpu.kind, tpu.usable_bytes, gpu_rates(tpu), replicas=tpu.replicas),
    )
    chosen = plan.chosen
    assert (chosen.step.micro_batch, chosen.step.levers.accumulation_steps) == (micro_batch, 1)
    assert (chosen.replicas, chosen.rows - target) == (8, padding)
    assert (plan.target_batch, chosen.to_json()["replicas"]) == (target, 8)


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_gradients_are_added_up_over_replicas(kind: str) -> None:
    """Which needs memory when activations are gone, and time, on top of what one replica needs."""
    workload, rates = published_workload("bert-base", 64), gpu_rates(ACCELERATORS["v100"])

    def plan(target: int, replicas: int, gibibytes: float = 8) -> Plan:
        return make_plan(
            PlanRequest(target),
            workload,
            PlannedDevice("some", kind, int(gibibytes * GIB_BYTES), rates, replicas=replicas),
        )

    one, four = plan(2, 1), plan(8, 4)
    assert one.chosen.step == four.chosen.step
    parts = four.chosen.footprint.parts
    copies = {"gpu": 2, "tpu": 0.6}[kind]
    assert parts["all_reduce"] == int(copies * parts["gradients"])
    assert four.chosen.footprint.peak_bytes > one.chosen.footprint.peak_bytes
    more_seconds = four.chosen.predicted_step_seconds - one.chosen.predicted_step_seconds
    assert more_seconds == pytest.approx(
        1.5 * parts["gradients"] / rates.link_bytes_per_second, 0.01
    )
    # With many examples it is the activations that count.
    parts = plan(4 * 32, 4).chosen.footprint.parts
    assert "all_reduce" not in parts
    # On one device this would fit.
    needed = 0.99 * four.chosen.footprint.peak_bytes / GIB_BYTES
    with pytest.raises(InputError, match="train on one device"):
        plan(8, 4, needed)
    assert plan(2, 1, needed).chosen.footprint.peak_bytes < needed * GIB_BYTES
    together = find_min_memory(PlanRequest(8), workload, kind, replicas=4)
    alone = find_min_memory(PlanRequest(2), workload, kind)
    assert alone.budget_bytes < together.budget_bytes


def test_the_optimizers_state_does_not_leave_replicas() -> None:
    with pytest.raises(InputError, match="does not fit"):
        make_plan(
            PlanRequest(24),
            published_workload("bert-large", 384),
            PlannedDevice("a card", "gpu", int(3.5 * GIB_BYTES), RATES, replicas=2),
        )
