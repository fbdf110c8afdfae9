"""Record what steps of small models ask of the allocator, and make the package's step traces.

    python benchmarks/record_step_traces.py --out FILE [--quick] [--patterns TEXT ...]
    python benchmarks/record_step_traces.py --confirm

The first form takes one to four minutes for each of 32 patterns: two heads, eight combinations of
policies, one micro-batch or several. All are recorded with AdamW; the traces of the other
optimizers are made out of these. The second form takes a minute. It compares the package's traces
with a few real steps and writes the hash of today's sources into the manifest. See
`docs/recording-traces.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, Setup, TrainingStep, Workload, published_workload
from bertbench.hardware.device import Budget, make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.traces.archive import (
    FORMAT,
    Manifest,
    archive_path,
    other_tensorflow,
    read_archive,
    write_archive,
)
from bertbench.memory.traces.build.comparison import first_difference
from bertbench.memory.traces.build.make_trace import build_trace
from bertbench.memory.traces.build.peak_search import find_peaks, keep_highest
from bertbench.memory.traces.build.samples import Sample
from bertbench.memory.traces.build.sources import sources_hash
from bertbench.memory.traces.build.variants import with_optimizer
from bertbench.memory.traces.step_requests import pattern_of
from bertbench.memory.traces.trace import LAYERS, OTHER_LAYERS, StepTrace
from bertbench.trials.measure import TrialListener, TrialSettings, measure_step
from finetune.spec.checkpointing import parse_checkpointing
from finetune.spec.config import PRESETS, BertConfig, preset
from finetune.spec.optimizers import OPTIMIZERS

_POLICIES = ("none", "selective", "full", "nested")
_MIXED = (("selective", "none"), ("full", "none"), ("nested", "none"), ("nested", "selective"))
_SEQ_LENS = (64, 128, 256, 384, 512)
_LAYERS = 5
# More than 64 examples, so that a number for each of them takes more than 256 bytes. Both sequence
# lengths give the same number of chunks. They are multiples of 16, because with other lengths
# TensorFlow copies some rows.
_EXAMPLES = 66
_SEQ_LEN = 128

# Another value of each dimension, with the same number of chunks.
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
_CONFIG_FIELDS = {
    "h": "hidden_size",
    "a": "num_attention_heads",
    "f": "intermediate_size",
    "v": "vocab_size",
    "p": "max_position_embeddings",
    "t": "type_vocab_size",
}

# Head, checkpointing, micro-batches and examples of the steps that are compared with the traces.
# Together they run every policy, both heads, with and without accumulation.
_CONFIRMED = (
    ("squad", "none", 1, 7),
    ("squad", "full:2", 1, 9),
    ("classifier", "nested:2+selective", 2, 33),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="archive to write; other traces in it stay")
    parser.add_argument("--quick", action="store_true", help="record one pattern alone")
    parser.add_argument("--patterns", nargs="+", help="only those that contain one of the texts")
    parser.add_argument(
        "--confirm", action="store_true", help="compare the package's traces with a few real steps"
    )
    arguments = parser.parse_args()
    if arguments.confirm:
        _confirm()
    else:
        setups = [setup for setup in _setups() if _named(setup, arguments.patterns)]
        partial = bool(arguments.quick or arguments.patterns)
        _record_all(setups[:1] if arguments.quick else setups, arguments.out, partial)


def _confirm() -> None:
    """Compare the package's traces with real steps, and write today's hash into the manifest."""
    installed = other_tensorflow()
    if installed is not None:
        raise SystemExit(f"the traces are not of TensorFlow {installed}: record them again")
    budget = make_budget(resolve_device("cpu"), GIB_BYTES)
    for head, policy, micro_batches, examples in _CONFIRMED:
        levers = Levers(parse_checkpointing(policy), micro_batches)
        setup = Setup(published_workload("bert-mini", 64, head), levers)
        difference = first_difference(_record(budget, setup.step(examples)))
        if difference is not None:
            raise SystemExit(f"{pattern_of(setup)}: {difference}; record the traces again")
        print(f"{pattern_of(setup)}: as in the trace", flush=True)
    path = archive_path()
    traces, manifest = read_archive(path.read_bytes())
    confirmed = dataclasses.replace(manifest, confirmed=_today(), sources=sources_hash())
    path.write_bytes(write_archive(traces, confirmed))


def _record_all(setups: Sequence[Setup], out: Path | None, partial: bool) -> None:
    """Record traces one by one, and write the archive after each of them."""
    version = metadata.version("tensorflow")
    manifest = Manifest(FORMAT, version, _today(), _today(), sources_hash())
    traces: dict[str, StepTrace] = {}
    if out is not None and out.exists():
        there, its_manifest = read_archive(out.read_bytes())
        if (its_manifest.tensorflow, its_manifest.sources) == (version, manifest.sources):
            traces = there
        elif partial:
            raise SystemExit(
                f"{out} has traces of other sources or of another TensorFlow: record all patterns, "
                "or name another file"
            )
    budget = make_budget(resolve_device("cpu"), 3 * GIB_BYTES)
    for setup in setups:
        began = time.monotonic()
        traces |= _record_pattern(budget, setup)
        data = write_archive(traces, manifest)
        if out is not None:
            out.write_bytes(data)
        trace = traces[pattern_of(setup)]
        print(
            f"{pattern_of(setup)}: {len(trace.items)} items, {len(trace.sizes)} sizes; "
            f"{len(data):,} bytes in all; {time.monotonic() - began:.0f} s",
            flush=True,
        )


def _setups() -> Iterator[Setup]:
    """Setups of the base samples, one for each pattern."""
    for head, policies, accumulation in itertools.product(
        ("squad", "classifier"), (*((policy,) for policy in _POLICIES), *_MIXED), (1, 2)
    ):
        text = policies[0] if len(policies) == 1 else f"{policies[0]}:{_LAYERS}"
        text += "" if policies[-1] in (policies[0], "none") else f"+{policies[-1]}"
        workload = Workload("sample", _config(_LAYERS * len(policies)), head, _SEQ_LEN)
        yield Setup(workload, Levers(parse_checkpointing(text), accumulation))


def _named(setup: Setup, texts: Sequence[str] | None) -> bool:
    return not texts or any(text in pattern_of(setup) for text in texts)


def _record_pattern(budget: Budget, setup: Setup) -> dict[str, StepTrace]:
    """Record the samples of a pattern, and make its trace for every optimizer."""
    workload, levers = setup.workload, setup.levers
    base = _record(budget, setup.step(_EXAMPLES))
    mixed = levers.checkpointing.layers is not None
    more = {LAYERS: _one_more(budget, base, mixed)}
    if mixed:
        larger = dataclasses.replace(workload, config=_config(2 * _LAYERS + 1))
        more[OTHER_LAYERS] = _record(budget, Setup(larger, levers).step(_EXAMPLES))
    varied = {
        name: _another(budget, base, name, value)
        for name, value in _VARIED.items()
        # SQuAD's head always has two outputs.
        if name != "l" or workload.head == "classifier"
    }
    published = [published_workload(m, s, workload.head) for m in PRESETS for s in _SEQ_LENS]
    trace = build_trace(base, more, varied)
    traces = {pattern_of(setup): keep_highest(trace, published)}
    for optimizer in OPTIMIZERS[1:]:
        variant = with_optimizer(trace, optimizer)
        variant = dataclasses.replace(variant, peaks=find_peaks(variant))
        other = Setup(workload, dataclasses.replace(levers, optimizer=optimizer))
        traces[pattern_of(other)] = keep_highest(variant, published)
    return traces


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
    """Record one more layer with the first policy, and the same number with the other."""
    workload, levers = base.step.workload, base.step.levers
    workload = dataclasses.replace(workload, config=_config(workload.config.num_hidden_layers + 1))
    if mixed:
        policy = dataclasses.replace(levers.checkpointing, layers=_LAYERS + 1)
        levers = dataclasses.replace(levers, checkpointing=policy)
    return _record(budget, Setup(workload, levers).step(base.step.micro_batch))


def _another(budget: Budget, base: Sample, name: str, value: int) -> Sample:
    """Record another value of a dimension."""
    workload, examples = base.step.workload, base.step.micro_batch
    if name == "n":
        examples = value
    elif name == "l":
        workload = dataclasses.replace(workload, num_labels=value)
    elif name == "s":
        workload = dataclasses.replace(workload, seq_len=value)
    else:
        values: dict[str, Any] = {_CONFIG_FIELDS[name]: value}
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


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


if __name__ == "__main__":
    main()
