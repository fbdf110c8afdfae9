"""All settings that a target batch can be reached with."""

from __future__ import annotations

import dataclasses
import math

from bertbench.core.workload import Levers, Workload
from bertbench.planning.requests import PlanRequest
from finetune.spec.checkpointing import NO_CHECKPOINTING, POLICIES, Checkpointing


def all_policies(layers: int) -> list[Checkpointing]:
    """Checkpointing to choose from: one policy for all layers, or one for the first layers only.

    Layers are alike, so only the number of layers under each policy matters. The first policy of
    two has at least two layers, because no step trace is for one.

    Example:
        >>> [str(policy) for policy in all_policies(2)]
        ['none', 'selective', 'full', 'nested']
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


def all_levers(request: PlanRequest, workload: Workload) -> list[Levers]:
    """All levers that a request allows, with accumulation_steps 1; `cuts` has the others."""
    policies = request.policies
    if policies is None:
        policies = all_policies(workload.config.num_hidden_layers)
    return [
        dataclasses.replace(levers, checkpointing=policy)
        for levers in request.allowed
        for policy in policies
    ]


def cuts(target_batch: int) -> list[tuple[int, int]]:
    """All cuts of a target batch: pairs of a micro-batch size and a number of micro-batches.

    The size need not divide the target. The last micro-batch then has rows of padding, as few as
    this number of micro-batches allows: 7 examples may run as 2 micro-batches of 4 rows.

    Example:
        >>> cuts(7)
        [(7, 1), (4, 2), (3, 3), (2, 4), (1, 7)]
    """
    micro_batches = {math.ceil(target_batch / steps) for steps in range(1, target_batch + 1)}
    return [(size, math.ceil(target_batch / size)) for size in sorted(micro_batches, reverse=True)]
