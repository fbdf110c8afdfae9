"""Predicted seconds of an optimizer step: operations over rates.

Good for comparing lever settings with one another; on a device that nothing was measured on, the
absolute number is a rough one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path

from bertbench.catalogue import ACCELERATORS, Accelerator, match_accelerator
from bertbench.devices import Device
from bertbench.workload import Levers, Workload
from finetune.config import parameter_count

_LINK_BYTES_PER_SECOND = {"cpu": 5e9, "gpu": 1e10, "tpu": 5e10}
"""Between two devices that train together. Guesses: host memory, PCIe 3 with 16 lanes, and the
TPUs' own links."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device delivers on this work.

    Attributes:
        flops_per_second: rate of large float32 matrix products and what surrounds them.
        bytes_per_second: memory bandwidth of the update.
        half_rate_tokens: tokens of a micro-batch at which half the rate is reached.
        launch_seconds: fixed cost of a layer's kernels, forward and backward.
        speedups: rate of a precision over that of float32, where it is another.
        link_bytes_per_second: rate of sums over replicas.
    """

    flops_per_second: float
    bytes_per_second: float
    half_rate_tokens: float
    launch_seconds: float
    speedups: Mapping[str, float] = dataclasses.field(default_factory=dict)
    link_bytes_per_second: float = _LINK_BYTES_PER_SECOND["cpu"]


_RECOMPUTED = {"none": 0.0, "selective": 0.36, "full": 0.96, "nested": 1.0}
"""Time of the second forward pass of a layer, in that of the first, of which the whole backward
pass takes two. BERT-Base on two cores, sequence length 384, batch 8, 2026-11-25. The layer's last
matrix product is never recomputed; drawing the masks again is."""

_HOST_UPDATE_BYTES_PER_SECOND = 4e9
"""Of an optimizer's state on the host: the bus and the host's memory together. A guess for PCIe 3
and two memory channels."""

_CPU_FLOPS_PER_CORE = 6e10
_GPU_EFFICIENCY = 0.5
_GPU_SPEEDUPS = {"tf32": 1.5, "bf16": 2.0, "fp16": 2.0}
"""Guesses on the low side: tensor cores are 4 to 16 times as fast, but what surrounds the matrix
products is bound by memory bandwidth."""
_TENSOR_CORES_CAPABILITY = 7.0
_CPU_BF16_SPEEDUPS = {True: 1.4, False: 0.5}
"""With and without bfloat16 instructions. The former: BERT-Mini, sequence length 128, on two cores
with AVX-512 BF16, 2026-11-24; the latter is a guess."""
_CPU_FP16_SPEEDUP = 0.8
"""The same model on the same cores, 2026-11-25."""


def gpu_rates(accelerator: Accelerator) -> Rates:
    """Rates of a product of the catalogue: half of the data sheet's."""
    # A TPU multiplies in bfloat16 whatever the type of the numbers is.
    speedups = dict(_GPU_SPEEDUPS) if accelerator.kind == "gpu" else {}
    if (accelerator.compute_capability or _TENSOR_CORES_CAPABILITY) < _TENSOR_CORES_CAPABILITY:
        speedups["fp16"] = 1.0
    return Rates(
        accelerator.flops_per_second * _GPU_EFFICIENCY,
        accelerator.bytes_per_second * _GPU_EFFICIENCY,
        half_rate_tokens=256,
        launch_seconds=5e-4,
        speedups=speedups,
        link_bytes_per_second=_LINK_BYTES_PER_SECOND[accelerator.kind],
    )


def device_rates(device: Device) -> Rates:
    """Rates of an attached device; a GPU that is not in the catalogue counts as a T4."""
    if device.kind == "cpu":
        cores = usable_cores()
        speedups = {
            "bf16": _CPU_BF16_SPEEDUPS[_multiplies_bfloat16()],
            "fp16": _CPU_FP16_SPEEDUP,
        }
        return Rates(_CPU_FLOPS_PER_CORE * cores, 1e10, 32, 2e-3, speedups)
    if device.kind == "tpu":
        # The smallest; which one it is cannot be asked before connecting.
        return gpu_rates(ACCELERATORS["tpu-v2-8"])
    accelerator = match_accelerator(device.name) or match_accelerator("t4")
    assert accelerator is not None
    return gpu_rates(accelerator)


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16; False where it cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


def forward_flops(workload: Workload) -> int:
    """Operations of one example's forward pass through the layers, two per multiply-add."""
    config, s = workload.config, workload.seq_len
    h, f = config.hidden_size, config.intermediate_size
    layer = 2 * s * (4 * h * h + 2 * h * f) + 4 * s * s * h
    return config.num_hidden_layers * layer


@functools.lru_cache(maxsize=256)
def _parameters(workload: Workload) -> int:
    return parameter_count(workload.config, workload.head, workload.num_labels)


def predict_step_seconds(
    workload: Workload, levers: Levers, micro_batch: int, rates: Rates, *, replicas: int = 1
) -> float:
    """Seconds of one optimizer step: all its micro-batches, the sum over replicas and the update.

    Args:
        workload: what is trained.
        levers: lever settings with the number of micro-batches.
        micro_batch: rows of each on one replica, padding rows among them.
        rates: the device's.
        replicas: devices that do the same at the same time.
    """
    layers = workload.config.num_hidden_layers
    policies = [levers.checkpointing.of_layer(index) for index in range(layers)]
    recomputed = sum(_RECOMPUTED[policy] for policy in policies) / layers
    # Forward once, backward twice as much, and what is recomputed.
    flops = forward_flops(workload) * micro_batch * (3 + recomputed)
    tokens = micro_batch * workload.seq_len
    efficiency = tokens / (tokens + rates.half_rate_tokens)
    speedup = rates.speedups.get(levers.precision, 1.0)
    parameters = _parameters(workload)
    micro_seconds = (
        flops / (rates.flops_per_second * speedup * efficiency)
        + rates.launch_seconds * layers * (1 + recomputed / 3)
        # An accumulator is read, added to and written.
        + (12 * parameters / rates.bytes_per_second if levers.accumulation_steps > 1 else 0)
    )
    # Norm, clipping, decay and Adam read and write weights, gradients and moments.
    update_seconds = 44 * parameters / rates.bytes_per_second
    if levers.placement == "host":
        # Gradient and change cross the bus; the host reads and writes the moments and the change.
        update_seconds += (8 + 28) * parameters / _HOST_UPDATE_BYTES_PER_SECOND
    # A ring sends and receives each gradient twice, but for one part in as many as there are.
    passes = 2 * (replicas - 1) / replicas
    sum_seconds = passes * 4 * parameters / rates.link_bytes_per_second
    return levers.accumulation_steps * micro_seconds + sum_seconds + update_seconds
