"""All lever settings that a target batch can be reached with."""

from __future__ import annotations

import dataclasses
import math

from bertbench.core.workload import Levers, Workload
from bertbench.planning.requests import PlanRequest
from finetune.spec.checkpointing import NO_CHECKPOINTING, POLICIES, Checkpointing


def all_policies(layers: int) -> list[Checkpointing]:
    """Checkpointing to choose from: no policy, one, or two next to each other in bytes.

    Layers are alike, so that only the number under each policy matters. Of a single layer under the
    first policy there are no step traces.
    """
    return [
        NO_CHECKPOINTING,
        *(Checkpointing(policy) for policy in POLICIES[1:]),
        *(
            Checkpointing(policy, count, others)
            for policy, others in (
                ("selective", "none"),
                ("full", "none"),
                ("nested", "none"),
                ("nested", "selective"),
            )
            for count in range(2, layers)
        ),
    ]


def all_settings(request: PlanRequest, workload: Workload) -> list[Levers]:
    """All combinations that a request allows, with one micro-batch."""
    policies = request.policies
    if policies is None:
        policies = all_policies(workload.config.num_hidden_layers)
    return [
        dataclasses.replace(levers, checkpointing=policy)
        for levers in request.allowed
        for policy in policies
    ]


def cuts(target_batch: int) -> list[tuple[int, int]]:
    """Micro-batches and their numbers that reach a target, without needless rows.

    They need not divide it: 32 may run as 3 x 11, with one row that pads.
    """
    micro_batches = {math.ceil(target_batch / steps) for steps in range(1, target_batch + 1)}
    return [(size, math.ceil(target_batch / size)) for size in sorted(micro_batches, reverse=True)]
