"""Record what steps of small models ask of the allocator, and make the package's step traces.

    python benchmarks/record_step_traces.py [--quick] [--patterns TEXT ...] [--out FILE]

One to four minutes for each of 32 patterns (two heads, eight combinations of policies, one
micro-batch or several), with AdamW; the traces of the other optimizers are made out of these, see
`bertbench.memory.traces.build.variants`. A regressor has the classifier's trace, exact GELU that
of the one by tanh. To be run again when `finetune` or TensorFlow changes what a step does: `pytest
-m slow tests/test_step_traces.py` tells whether the traces still say what a real step asks for.
`--quick` makes one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, Setup, TrainingStep, Workload, published_workload
from bertbench.devices.device import Budget, make_budget
from bertbench.devices.discover import resolve_device
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.traces.build.building import build_trace
from bertbench.memory.traces.build.moments import find_moments, keep_highest
from bertbench.memory.traces.build.samples import Sample
from bertbench.memory.traces.build.variants import with_optimizer
from bertbench.memory.traces.step import pattern_of
from bertbench.memory.traces.trace import LAYERS, OTHER_LAYERS, traces_from_bytes, traces_to_bytes
from bertbench.trials.measure import TrialListener, TrialSettings, measure_step
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import PRESETS, BertConfig, preset
from finetune.spec.optimizers import OPTIMIZERS

_POLICIES = ("none", "selective", "full", "nested")
_MIXED = (("selective", "none"), ("full", "none"), ("nested", "none"), ("nested", "selective"))
_SEQ_LENS = (64, 128, 256, 384, 512)
_LAYERS = 5
# More than 64 examples, so that what is a number for each of them is not small. Blocks of the same
# number of examples, and as many of them at the other length. Lengths are multiples of 16, for of
# others TensorFlow cannot take some rows without copying them.
_EXAMPLES = 66
_SEQ_LEN = 128

# Each another value of one dimension, with the same number of chunks.
_VARIED = {
    "n": 65,
    "s": 112,
    "h": 144,
    "a": 6,
    "f": 512,
    "v": 32003,
    "p": 640,
    "t": 3,
    "l": 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one pattern")
    parser.add_argument("--patterns", nargs="+", help="only those that contain one of the texts")
    parser.add_argument("--out", type=Path, help="file of traces; others in it stay")
    arguments = parser.parse_args()
    traces = {}
    if arguments.out and arguments.out.exists():
        traces = traces_from_bytes(arguments.out.read_bytes())
    budget = make_budget(resolve_device("cpu"), 3 * GIB_BYTES)
    for head, policies, accumulation in itertools.product(
        ("squad", "classifier"), (*((policy,) for policy in _POLICIES), *_MIXED), (1, 2)
    ):
        text = policies[0] if len(policies) == 1 else f"{policies[0]}:{_LAYERS}"
        text += "" if policies[-1] in (policies[0], "none") else f"+{policies[-1]}"
        levers = Levers(parse_checkpointing(text), accumulation)
        workload = Workload("sample", _config(_LAYERS * len(policies)), head, _SEQ_LEN)
        setup = Setup(workload, levers)
        pattern = pattern_of(setup)
        if arguments.patterns and not any(text in pattern for text in arguments.patterns):
            continue
        began = time.monotonic()
        base = _record(budget, setup.step(_EXAMPLES))
        more = {LAYERS: _one_more(budget, base, len(policies) > 1)}
        if len(policies) > 1:
            larger = dataclasses.replace(workload, config=_config(2 * _LAYERS + 1))
            more[OTHER_LAYERS] = _record(budget, Setup(larger, levers).step(_EXAMPLES))
        varied = {
            name: _another(budget, base, name, value)
            for name, value in _VARIED.items()
            # SQuAD's head has two outputs always.
            if name != "l" or head == "classifier"
        }
        published = [published_workload(m, s, head) for m in PRESETS for s in _SEQ_LENS]
        trace = build_trace(base, more, varied)
        traces[pattern] = keep_highest(trace, published)
        for optimizer in OPTIMIZERS[1:]:
            variant = with_optimizer(trace, optimizer)
            variant = dataclasses.replace(variant, moments=find_moments(variant))
            name = pattern_of(Setup(workload, dataclasses.replace(levers, optimizer=optimizer)))
            traces[name] = keep_highest(variant, published)
        data = traces_to_bytes(traces)
        if arguments.out:
            arguments.out.write_bytes(data)
        print(
            f"{pattern}: {len(traces[pattern].items)} items, {len(traces[pattern].sizes)} sizes; "
            f"{len(data):,} bytes in all; {time.monotonic() - began:.0f} s",
            flush=True,
        )
        if arguments.quick:
            break


def _config(layers: int) -> BertConfig:
    return dataclasses.replace(
        preset("bert-tiny"),
        vocab_size=30011,
        hidden_size=96,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=416,
    )


def _one_more(budget: Budget, base: Sample, mixed: bool) -> Sample:
    """One layer more with the first policy, and as many with the other."""
    workload, levers = base.step.workload, base.step.levers
    workload = dataclasses.replace(workload, config=_config(workload.config.num_hidden_layers + 1))
    if mixed:
        policy = dataclasses.replace(levers.checkpointing, layers=_LAYERS + 1)
        levers = dataclasses.replace(levers, checkpointing=policy)
    return _record(budget, Setup(workload, levers).step(base.step.micro_batch))


def _another(budget: Budget, base: Sample, name: str, value: int) -> Sample:
    workload, examples = base.step.workload, base.step.micro_batch
    fields: dict[str, str] = {
        "h": "hidden_size",
        "a": "num_attention_heads",
        "f": "intermediate_size",
        "v": "vocab_size",
        "p": "max_position_embeddings",
        "t": "type_vocab_size",
    }
    if name == "n":
        examples = value
    elif name == "l":
        workload = dataclasses.replace(workload, num_labels=value)
    elif name == "s":
        workload = dataclasses.replace(workload, seq_len=value)
    else:
        values: dict[str, Any] = {fields[name]: value}
        config = dataclasses.replace(workload.config, **values)
        workload = dataclasses.replace(workload, config=config)
    return _record(budget, Setup(workload, base.step.levers).step(examples))


def _record(budget: Budget, step: TrainingStep) -> Sample:
    recordings: list[Recording] = []
    listener = TrialListener(on_recording=lambda _, recording: recordings.append(recording))
    trial = measure_step(step, budget, TrialSettings(steps=1), listener)
    if trial.outcome != "fits" or not recordings:
        raise SystemExit(f"{pattern_of(step.setup)}: {trial.message or 'no recording'}")
    return Sample(step, recordings[0])


if __name__ == "__main__":
    main()
