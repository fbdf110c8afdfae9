"""Predicted seconds of an optimizer step: its operations are counted and multiplied by their rates.

The prediction is good for comparing lever settings. As a number of seconds it is rough on a device
that nothing was measured on.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from bertbench.core.workload import Levers, TrainingStep, Workload
from bertbench.hardware.accelerators import ACCELERATORS, Accelerator, match_accelerator
from bertbench.hardware.device import Device
from bertbench.hardware.threads import usable_cores
from finetune.spec.checkpointing import examples_per_chunk
from finetune.spec.config import parameter_count

_LINK_BYTES_PER_SECOND = {"cpu": 5e9, "gpu": 1e10, "tpu": 5e10}
"""Between two devices that train together. Guesses: host memory, PCIe 3 with 16 lanes, and the
TPUs' own links."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts of what an optimizer step does on one replica; or the seconds that each count costs.

    Attributes:
        products: operations of matrix products: forward, backward and recomputed.
        weights: elements of weight matrices, times the passes over them. A product costs this much
            even for very few tokens.
        scores: elements `[b, a, s, s]` of the attention, forward and backward.
        recomputed_scores: such elements that the backward pass computes again.
        hidden: elements `[b * s, h]` of layers, forward and backward. Those of the intermediate
            sublayer are proportional to them.
        recomputed_hidden: such elements that the backward pass computes again.
        small_scores: elements of scores in tensors with less than `_SMALL_ELEMENTS`.
        small_hidden: elements of hidden states in tensors with less than `_SMALL_ELEMENTS`.
        embedded: elements `[b * s, h]` of the embeddings and their gradient.
        layers: layers, times micro-batches. Kernels cost this much even for very small tensors.
        recomputed_layers: layers that the backward pass computes again, times micro-batches.
        chunks: chunks of examples in which layers are recomputed.
        summed: elements that are added to accumulators, in all micro-batches.
        accumulators: elements of accumulators, which are allocated once.
        updated: elements of trained variables.
    """

    products: float = 0.0
    weights: float = 0.0
    scores: float = 0.0
    recomputed_scores: float = 0.0
    hidden: float = 0.0
    recomputed_hidden: float = 0.0
    small_scores: float = 0.0
    small_hidden: float = 0.0
    embedded: float = 0.0
    layers: float = 0.0
    recomputed_layers: float = 0.0
    chunks: float = 0.0
    summed: float = 0.0
    accumulators: float = 0.0
    updated: float = 0.0

    def times(self, factor: float, names: Sequence[str]) -> Work:
        """Multiply the named counts by a factor, and keep the others."""
        values = dataclasses.asdict(self)
        return Work(**{n: v * factor if n in names else v for n, v in values.items()})


_KINDS = tuple(field.name for field in dataclasses.fields(Work))

_OF_ACTIVATIONS = (
    "products", "weights", "scores", "recomputed_scores", "hidden", "recomputed_hidden",
    "small_scores", "small_hidden",
)  # fmt: skip
"""Counts that cost less with a lower precision."""

_SMALL_ELEMENTS = 100_000
"""TensorFlow computes a smaller tensor on one core. Between 98,304 (slow) and 131,072, two cores,
2026-11-26."""

_ON_ALL_CORES = (
    "products", "weights", "scores", "recomputed_scores", "hidden", "recomputed_hidden", "embedded",
    "summed",
)  # fmt: skip
"""Counts that are shared by all cores; the others are done by one core."""

_RECOMPUTED_SHARE = 0.4
"""Part of the operations of a forward and a backward pass that a recomputed forward pass has."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a device is.

    Attributes:
        unit_seconds: seconds that one of each count costs.
        speedups: by how much a precision is faster than float32; missing ones are not.
        link_bytes_per_second: bytes that a replica sends to another one.
    """

    unit_seconds: Work
    speedups: Mapping[str, float] = dataclasses.field(default_factory=dict)
    link_bytes_per_second: float = _LINK_BYTES_PER_SECOND["cpu"]


_HOST_UPDATE_BYTES_PER_SECOND = 4e9
"""Of an optimizer's state on the host: the bus and the host's memory together. A guess for PCIe 3
and two memory channels."""

_CPU_CORES = 2
_CPU_UNIT_SECONDS = Work(
    products=6.22e-12,
    weights=2.93e-10,
    scores=1.78e-09,
    recomputed_scores=3.02e-09,
    hidden=8.90e-09,
    recomputed_hidden=1.85e-08,
    small_scores=7.68e-09,
    small_hidden=2.17e-08,
    embedded=6.71e-08,
    layers=1.93e-03,
    recomputed_layers=4.1e-05,
    chunks=6.47e-04,
    accumulators=4.43e-10,
)
"""Two cores of an AMD EPYC, float32. Fitted on 2026-11-26 by `benchmarks/fit_cost.py` to the steps
of all 240 lever settings of four workloads of BERT-Tiny, -Mini and -Small: nine in ten of the
predictions are between -8 % and +7 % of the measurement. What is small beside the rest in such
models, as the update, is not told apart from it."""

_GPU_EFFICIENCY = 0.5
_GPU_HALF_RATE_TOKENS = 256
"""With so many tokens in a micro-batch a GPU reaches half of its rate."""
_GPU_PASSES = {"scores": 44, "recomputed_scores": 24, "hidden": 200, "recomputed_hidden": 80}
"""Times that an element is read or written, counted in the operations that are not products, each
of which TensorFlow makes a kernel of. Not measured."""
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
    flops_per_second = accelerator.flops_per_second * _GPU_EFFICIENCY
    element_seconds = 4 / (accelerator.bytes_per_second * _GPU_EFFICIENCY)
    # A TPU multiplies in bfloat16 whatever the type of the numbers is.
    speedups = dict(_GPU_SPEEDUPS) if accelerator.kind == "gpu" else {}
    if (accelerator.compute_capability or _TENSOR_CORES_CAPABILITY) < _TENSOR_CORES_CAPABILITY:
        speedups["fp16"] = 1.0
    return Rates(
        Work(
            products=1 / flops_per_second,
            weights=2 * _GPU_HALF_RATE_TOKENS / flops_per_second,
            **{name: passes * element_seconds for name, passes in _GPU_PASSES.items()},
            layers=1e-3,
            recomputed_layers=4e-4,
            chunks=2e-3,
            # An accumulator is read, added to and written.
            summed=3 * element_seconds,
            accumulators=element_seconds,
            # Norm, clipping, decay and Adam read and write weights, gradients and moments.
            updated=11 * element_seconds,
        ),
        speedups,
        _LINK_BYTES_PER_SECOND[accelerator.kind],
    )


def device_rates(device: Device) -> Rates:
    """Rates of an attached device; a GPU that is not in the catalogue counts as a T4."""
    if device.kind == "cpu":
        speedups = {
            "bf16": _CPU_BF16_SPEEDUPS[_multiplies_bfloat16()],
            "fp16": _CPU_FP16_SPEEDUP,
        }
        # Other numbers of cores have not been measured.
        unit_seconds = _CPU_UNIT_SECONDS.times(_CPU_CORES / usable_cores(), _ON_ALL_CORES)
        return Rates(unit_seconds, speedups)
    if device.kind == "tpu":
        # The smallest; which one it is cannot be asked before connecting.
        return gpu_rates(ACCELERATORS["tpu-v2-8"])
    accelerator = match_accelerator(device.name) or match_accelerator("t4")
    assert accelerator is not None
    return gpu_rates(accelerator)


def _multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16; False where it cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


@functools.lru_cache(maxsize=256)
def _parameters(workload: Workload) -> int:
    return parameter_count(workload.config, workload.head, workload.num_labels)


@functools.lru_cache(maxsize=4096)
def work_of(step: TrainingStep) -> Work:
    """Count what an optimizer step does on one replica; padding rows are examples too."""
    workload, levers = step.workload, step.levers
    config, s, b = workload.config, workload.seq_len, step.micro_batch
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    micro_batches = levers.accumulation_steps
    tokens = b * s
    of_weights = 4 * h * h + 2 * h * f
    scores, hidden = b * config.num_attention_heads * s * s, tokens * h
    attention = 4 * scores * config.head_size  # two products
    counted: collections.defaultdict[str, float] = collections.defaultdict(float)
    for policy, count in _counted(levers, layers):
        recomputed = policy != "none"
        counted["products"] += count * 3 * (2 * tokens * of_weights + attention)
        counted["weights"] += count * 3 * of_weights
        if recomputed:
            counted["products"] += count * attention
            counted["recomputed_scores"] += count * scores
            counted["recomputed_hidden"] += count * hidden
            counted["recomputed_layers"] += count
        if policy not in ("none", "selective"):
            # All products but the last, which no gradient reads.
            counted["products"] += count * 2 * tokens * (of_weights - h * f)
            counted["weights"] += count * (of_weights - h * f)
        per_chunk = examples_per_chunk(policy, s)
        chunks = 1 if per_chunk is None else math.ceil(b / per_chunk)
        counted["chunks"] += 0 if per_chunk is None else count * chunks
        for name, elements in (("scores", scores), ("hidden", hidden)):
            if elements < chunks * _SMALL_ELEMENTS:
                counted[f"small_{name}"] += count * elements * (1 + recomputed * _RECOMPUTED_SHARE)
    parameters = _parameters(workload)
    counted["scores"], counted["hidden"] = layers * scores, layers * hidden
    counted["embedded"], counted["layers"] = hidden, layers
    # Rows of the word embeddings are added one by one.
    counted["summed"] = parameters - config.vocab_size * h if micro_batches > 1 else 0
    of_micro_batches = {name: float(micro_batches * count) for name, count in counted.items()}
    accumulators = parameters if micro_batches > 1 else 0
    return Work(**of_micro_batches, accumulators=accumulators, updated=parameters)


def _counted(levers: Levers, layers: int) -> list[tuple[str, int]]:
    """Policies and the numbers of layers under them; layers are alike."""
    counts = collections.Counter(levers.checkpointing.of_layer(index) for index in range(layers))
    return list(counts.items())


def predict_step_seconds(step: TrainingStep, rates: Rates, *, replicas: int = 1) -> float:
    """Predict the seconds of one optimizer step.

    They are those of all its micro-batches, of the sum over replicas and of the update.

    Args:
        step: of one replica; padding rows are examples too.
        rates: the device's.
        replicas: devices that do the same at the same time.
    """
    work, each = work_of(step), rates.unit_seconds
    speedup = rates.speedups.get(step.levers.precision, 1.0)
    seconds = sum(
        getattr(work, name) * getattr(each, name) / (speedup if name in _OF_ACTIVATIONS else 1.0)
        for name in _KINDS
    )
    parameters = _parameters(step.workload)
    if step.levers.placement == "host":
        # Gradient and change cross the bus; the host reads and writes the moments and the change.
        seconds += (8 + 28) * parameters / _HOST_UPDATE_BYTES_PER_SECOND
    # A ring sends and receives each gradient twice, but for one part in as many as there are.
    passes = 2 * (replicas - 1) / replicas
    return seconds + passes * 4 * parameters / rates.link_bytes_per_second
