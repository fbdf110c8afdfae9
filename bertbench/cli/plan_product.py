"""`bertbench plan --gpu NAME --verify`: a plan whose step its product's compiler has seen."""

from __future__ import annotations

from bertbench.compiling.compilation import Compilation, Compile
from bertbench.compiling.installed import compiler_versions
from bertbench.core.terminal import say
from bertbench.core.workload import Workload
from bertbench.ledger.database import default_ledger_path, open_ledger
from bertbench.planning.compiled_evidence import planned_target
from bertbench.planning.planner import Plan, describe_planned_step
from bertbench.planning.requests import PlannedDevice, PlanRequest
from bertbench.planning.verify_compiled import verify_by_compiler
from bertbench.planning.workload_plans import plan_workload
from finetune.errors import InputError


def verify_for_product(
    request: PlanRequest,
    workload: Workload,
    device: PlannedDevice,
    compile_: Compile,
) -> tuple[Plan, list[Compilation]]:
    """Make a plan whose step compiles to a program that fits.

    Args:
        request: what the plan must reach, and what it may choose from.
        workload: what is trained.
        device: a product of the catalogue.
        compile_: compiles, as `bertbench.compiling.compilation.compile_step` does.

    Returns:
        The plan, and the compilations: of plans that did not fit, and its own, which is the last.

    Raises:
        InputError: nothing would be compiled, the compiler is not installed, or nothing fits.
        WorkError: a compilation failed.
    """
    target = planned_target(device)
    compiles = device.kind == "tpu" or all(levers.xla for levers in request.allowed)
    if target is None or not compiles:
        raise InputError(
            f"--gpu {device.name} need not be attached, so --verify can only compile the plan: "
            "that is for XLA and one GPU",
            hint="add --xla and leave --replicas out, or leave --verify out",
        )
    compiler_versions(target.kind)
    with open_ledger(request.ledger_file or default_ledger_path()) as ledger:
        plan, compilation, refuted = verify_by_compiler(
            lambda: plan_workload(request, workload, device),
            target,
            ledger,
            compile_,
            on_attempt=lambda tried: say(f"compiling {describe_planned_step(tried.chosen)}"),
        )
    return plan, [*refuted, compilation]
