"""What a step is compiled for: a product of the catalogue, or this machine's CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from bertbench.hardware.accelerators import Accelerator
from bertbench.hardware.gpu_targets import gpu_target
from finetune.errors import InputError
from finetune.storage.json_files import json_text

_EIGHT_CHIPS = {"v5e:2x2": "v5e:2x4", "v6e:2x2": "v6e:2x4"}
"""Names of topologies of eight devices, by those of four."""


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """A device to compile for, which need not exist.

    Attributes:
        kind: `cpu`, `gpu` or `tpu`.
        name: of the product, as in the catalogue.
        description: what the compiler is told: of a GPU its properties
            (`bertbench.hardware.gpu_targets`), of a TPU the name of its topology, of the CPU
            nothing.
        replicas: devices that share the effective batch, and run the same program.
    """

    kind: str
    name: str
    description: str = ""
    replicas: int = 1

    def key(self) -> str:
        """Canonical text for the ledger: equal where a compilation has the same result."""
        return json_text({"compiled_for": self.to_json()}, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        return dataclasses.asdict(self)


CPU_TARGET = CompileTarget("cpu", "cpu")
"""This machine's processor: the only target whose word can be checked by a trial here."""


def compile_target(accelerator: Accelerator, replicas: int = 1) -> CompileTarget:
    """Describe a product of the catalogue to its compiler.

    Example:
        >>> compile_target(find_accelerator("tpu-v2-8")).description
        'v2:2x2'

    Args:
        accelerator: the product.
        replicas: devices of it that share the effective batch. Of a TPU 1 stands for one of its
            devices alone, or all of them.

    Raises:
        InputError: a TPU has another number of devices.
    """
    if accelerator.kind == "gpu":
        return CompileTarget("gpu", accelerator.name, gpu_target(accelerator), replicas)
    if replicas not in (1, accelerator.replicas):
        raise InputError(
            f"{accelerator.name} has {accelerator.replicas} devices, not {replicas}",
            hint="leave --replicas out",
        )
    assert accelerator.topology is not None
    topology = accelerator.topology
    if replicas == 8:
        topology = _EIGHT_CHIPS.get(topology, topology)
    return CompileTarget("tpu", accelerator.name, topology, replicas)
