"""Step traces: made from recordings of small models, they say what any model's step asks for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertbench.core.units import GIB_BYTES, MIB_BYTES
from bertbench.core.workload import Levers, Setup, Workload, published_workload
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.allocator.bfc import MIN_ALLOCATION_BYTES, Memory, replay
from bertbench.memory.allocator.budget import empty_memory
from bertbench.memory.allocator.recording import Recording
from bertbench.memory.traces import step_requests as requests_module
from bertbench.memory.traces.build.comparison import first_difference, matches
from bertbench.memory.traces.build.layers import insertions
from bertbench.memory.traces.build.make_trace import build_trace
from bertbench.memory.traces.build.samples import Sample, UnlikeError
from bertbench.memory.traces.step_requests import (
    allocated_bytes,
    layers_of,
    replay_step,
    state_requests,
    step_requests,
    trace_of,
    unroll_step,
)
from bertbench.memory.traces.trace import LAYERS, OTHER_LAYERS, PerLayer
from bertbench.memory.traces.traced_peak import candidate_peaks, highest_peak
from bertbench.planning.candidates import all_policies
from bertbench.trials.measure import TrialListener, TrialSettings, measure_step
from finetune.spec.checkpointing import examples_per_chunk, parse_checkpointing
from finetune.spec.config import HEADS, preset
from finetune.spec.optimizers import OPTIMIZERS


class Toy:
    """Makes recordings of a step that is like ours: layers, chunks, gradients, an update."""

    def __init__(self, workload: Workload, levers: Levers, batch: int) -> None:
        self.workload, self.levers, self.batch = workload, levers, batch
        self.events, self.sizes = map(list, state_requests(workload, levers.optimizer))
        self.operations = ["Fill"] * len(self.sizes)
        self.loops = 0

    def ask(self, name: str, size_bytes: int) -> int:
        if self.levers.accumulation_steps > 1 and name != "DecodeRaw":
            name = f"while/body/_1/while/{name}"
        self.events.append(len(self.sizes))
        self.sizes.append(size_bytes)
        self.operations.append(name)
        return self.events[-1]

    def end(self, *allocations: int) -> None:
        self.events += [~allocation for allocation in allocations]

    def recording(self) -> Recording:
        config, tokens = self.workload.config, self.batch * self.workload.seq_len
        hidden = 4 * tokens * config.hidden_size
        for _ in range(2):
            rows = self.ask("DecodeRaw", 4 * tokens * self.levers.accumulation_steps)
            before = self.ask("GatherV2", hidden)
            kept: list[tuple[list[int], int]] = []
            for index in range(config.num_hidden_layers):
                policy = self.levers.checkpointing.of_layer(index)
                forward = self.chunks if policy in ("selective", "nested") else self.at_once
                kept.append((forward(index, policy), before))
                before = self.ask(f"concat_{index}", hidden)
            gradient = self.ask("gradient_tape/head", hidden)
            gradients = []
            for index, (its, inputs) in reversed(list(enumerate(kept))):
                work = self.ask(f"MatMul_{index}", 4 * tokens * config.intermediate_size)
                if self.levers.checkpointing.of_layer(index) == "selective":
                    self.chunks(index, "selective", its)
                    its = []
                if len(its) > 1 and index % 2:
                    its = its[::-1]  # ends that follow each other are the same in any order
                self.end(before, *its, work)
                gradients += [self.ask(f"MatMul_{index}_1", 4 * config.hidden_size**2)]
                gradients += [self.ask(f"BiasAddGrad_{index}", 4 * config.hidden_size)]
                more = self.ask(f"sub_{index}", hidden)
                self.end(gradient)
                gradient, before = more, inputs
            self.end(gradient, before)
            for first, second in zip(gradients[::2], gradients[1::2], strict=True):
                decay = self.ask("mul_9", 4 * config.hidden_size**2)
                self.end(first, decay, second)
            self.end(rows)
        return Recording(tuple(self.events), tuple(self.sizes), tuple(self.operations))

    def at_once(self, index: int, policy: str) -> list[int]:
        config, length = self.workload.config, self.workload.seq_len
        scores = self.ask(
            f"MatMul_{index}_2", 4 * self.batch * config.num_attention_heads * length**2
        )
        space = self.ask(
            f"MatMul_{index}_2", 1536 + 256 * config.hidden_size // config.num_attention_heads
        )
        self.end(space)
        mask = self.ask(f"GreaterEqual_{index}", self.batch * length * config.hidden_size)
        if policy == "full":
            self.end(scores)
            return [mask]
        return [scores, mask]

    def chunks(self, index: int, policy: str, taken: Sequence[int] = ()) -> list[int]:
        """A loop forwards that keeps something of each chunk, or one backwards that takes it."""
        length = self.workload.seq_len
        chunks = -(-self.batch // (examples_per_chunk(policy, length) or self.batch))
        self.loops += 1
        name = f"while_{self.loops}"
        kept = []
        asked = self.ask(f"{name}/cond/_{index}/{name}/Less", 1)
        for chunk in range(chunks):
            self.end(asked)
            counter = self.ask(f"{name}/body/_{index}/{name}/add", 4)
            examples = (chunk + 1) * self.batch // chunks - chunk * self.batch // chunks
            size_bytes = 4 * examples * length * self.workload.config.hidden_size
            work = self.ask(f"{name}/body/_{index}/{name}/MatMul", 3 * size_bytes)
            if taken:
                self.end(taken[chunk])
                gradient = self.ask(f"{name}/body/_{index}/{name}/sub", size_bytes)
                self.end(gradient)
            else:
                kept.append(self.ask(f"{name}/body/_{index}/{name}/mul", size_bytes))
            self.end(work, counter)
            asked = self.ask(f"{name}/cond/_{index}/{name}/Less", 1)
        self.end(asked)
        return kept


def toy_sample(
    policy: str, layers: int, batch: int = 66, seq_len: int = 128, *, steps: int = 1, **config: int
) -> Sample:
    values = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 416}
    small = dataclasses.replace(
        preset("bert-tiny"), num_hidden_layers=layers, vocab_size=1009, **{**values, **config}
    )  # type: ignore[arg-type]
    workload = Workload("toy", small, "squad", seq_len)
    levers = Levers(parse_checkpointing(policy), steps)
    recording = Toy(workload, levers, batch).recording()
    return Sample(Setup(workload, levers).step(batch), recording)


VARIED = {
    "n": {"batch": 65},
    "s": {"seq_len": 112},
    "h": {"hidden_size": 144},
    "a": {"num_attention_heads": 6},
    "f": {"intermediate_size": 512},
}


def toy_samples(policy: str) -> tuple[Sample, dict[str, Sample], dict[str, Sample]]:
    first, _, others = policy.partition("+")
    name, _, count = first.partition(":")
    layers = 2 * int(count) if count else 5
    more = {LAYERS: toy_sample(policy, layers + 1)}
    if count:
        longer = f"{name}:{int(count) + 1}" + (f"+{others}" if others else "")
        more = {
            LAYERS: toy_sample(longer, layers + 1),
            OTHER_LAYERS: toy_sample(policy, layers + 1),
        }
    varied = {key: toy_sample(policy, layers, **change) for key, change in VARIED.items()}
    return toy_sample(policy, layers), more, varied


TOYS = {
    policy: build_trace(*toy_samples(policy))
    for policy in ("none", "full", "selective", "nested", "full:5", "nested:5+selective")
}


def large(events: Sequence[int], sizes: Sequence[int]) -> list[object]:
    """Requests above what has a place of its own; ends that follow each other in any order."""
    number: dict[int, int] = {}
    result: list[object] = []
    for event in events:
        allocation = max(event, ~event)
        if sizes[allocation] <= MIN_ALLOCATION_BYTES:
            continue
        if event >= 0:
            number[allocation] = len(number)
            result.append(sizes[allocation])
        elif result and isinstance(result[-1], frozenset):
            result[-1] |= {number[allocation]}
        else:
            result.append(frozenset({number[allocation]}))
    return result


def written(policy: str, sample: Sample) -> list[object]:
    told = unroll_step(TOYS[policy], sample.step)
    before_events, before_sizes = state_requests(sample.step.workload, sample.step.levers.optimizer)
    shift = len(before_sizes)
    events = [event + shift if event >= 0 else event - shift for event in told.events]
    return large([*before_events, *events], [*before_sizes, *told.sizes])


@settings(max_examples=40)
@given(
    policy=st.sampled_from(["none", "full", "selective", "nested"]),
    layers=st.integers(2, 14),
    batch=st.integers(65, 200),
    seq_len=st.sampled_from([16, 48, 64, 128, 256, 512]),
    heads=st.sampled_from([2, 4, 8]),
    head_size=st.sampled_from([32, 48, 64]),
    intermediate=st.integers(100, 900),
)
def test_a_trace_says_what_another_model_and_batch_ask_for(
    policy: str,
    layers: int,
    batch: int,
    seq_len: int,
    heads: int,
    head_size: int,
    intermediate: int,
) -> None:
    sample = toy_sample(
        policy, layers, batch, seq_len, num_attention_heads=heads,
        hidden_size=heads * head_size, intermediate_size=intermediate,
    )  # fmt: skip
    assert written(policy, sample) == large(sample.recording.events, sample.recording.sizes)


@pytest.mark.parametrize(
    ("pattern", "policy", "layers"),
    [
        ("full:5", "full:3", 12),
        ("full:5", "full:11", 12),
        ("nested:5+selective", "nested:4+selective", 6),
        ("nested:5+selective", "nested:2+selective", 24),
    ],
)
def test_layers_of_two_policies(pattern: str, policy: str, layers: int) -> None:
    sample = toy_sample(policy, layers, 70)
    assert written(pattern, sample) == large(sample.recording.events, sample.recording.sizes)


def test_inputs_are_of_all_micro_batches() -> None:
    samples = [toy_sample("none", layers, steps=2) for layers in (5, 6)]
    varied = {key: toy_sample("none", 5, steps=2, **change) for key, change in VARIED.items()}
    trace = build_trace(samples[0], {LAYERS: samples[1]}, varied)
    larger = toy_sample("none", 7, 70, steps=4)
    told = unroll_step(trace, larger.step)
    state = len(state_requests(larger.step.workload, "adamw")[1])
    assert [size for size in told.sizes if size > MIN_ALLOCATION_BYTES] == [
        size for size in larger.recording.sizes[state:] if size > MIN_ALLOCATION_BYTES
    ]


def test_a_layer_is_written_once() -> None:
    repeated = [item for item in TOYS["nested"].items if isinstance(item, PerLayer)]
    assert len(repeated) >= 4  # forwards, backwards, of two steps
    short, long = (toy_sample("nested", layers) for layers in (5, 24))
    assert len(TOYS["nested"].items) < len(short.recording.events)
    assert len(written("nested", long)) > 2 * len(written("nested", short))


def test_too_few_layers_are_not_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one layer more of each kind than a real trace has, two are too few."""
    workload = published_workload("bert-tiny", 64)
    trace = trace_of(Setup(workload))
    assert trace is not None
    items = [
        dataclasses.replace(item, extra=-3) if isinstance(item, PerLayer) else item
        for item in trace.items
    ]
    needs_three = dataclasses.replace(trace, items=tuple(items))
    monkeypatch.setattr(requests_module, "read_trace", lambda pattern: needs_three)
    assert trace_of(Setup(workload)) is None
    assert trace_of(Setup(published_workload("bert-mini", 64))) is needs_three


def test_only_what_asks_for_the_same_shares_a_trace() -> None:
    workload = published_workload("bert-tiny", 64)
    trace = trace_of(Setup(workload))
    assert trace is not None
    for activation, expected in (("gelu_erf", trace), ("relu", None)):
        config = dataclasses.replace(workload.config, hidden_act=activation)
        assert trace_of(Setup(dataclasses.replace(workload, config=config))) is expected
    assert trace_of(Setup(workload, Levers(precision="tf32"))) is trace
    for other in (
        Levers(precision="bf16"),
        Levers(precision="fp16"),
        Levers(xla=True),
        Levers(placement="host"),
        Levers(parse_checkpointing("full:1+selective")),
    ):
        assert trace_of(Setup(workload, other)) is None
    assert trace_of(Setup(workload, Levers(optimizer="lion"))) not in (None, trace)
    classifier = published_workload("bert-tiny", 64, "classifier")
    regressor = published_workload("bert-tiny", 64, "regressor")
    assert trace_of(Setup(regressor)) is trace_of(Setup(classifier))


@settings(max_examples=60)
@given(
    policy=st.sampled_from(
        ["none", "full", "selective", "nested", "full:1", "full:4", "nested:3+selective"]
    ),
    layers=st.integers(2, 14),
    batch=st.integers(1, 200),
    seq_len=st.sampled_from([16, 64, 128, 256, 512]),
    heads=st.sampled_from([2, 4]),
    intermediate=st.integers(100, 900),
)
def test_moments_tell_how_much_is_alive(
    policy: str, layers: int, batch: int, seq_len: int, heads: int, intermediate: int
) -> None:
    """As much as all requests, written out and added up one after the other."""
    first, _, others = policy.partition("+")
    name, _, count = first.partition(":")
    layers = max(layers, int(count or 0) + 1)
    trace = TOYS[policy if not count else f"{name}:5" + (f"+{others}" if others else "")]
    sample = toy_sample(policy, layers, batch, seq_len, num_attention_heads=heads,
                        hidden_size=heads * 32, intermediate_size=intermediate)  # fmt: skip
    told = unroll_step(trace, sample.step)
    alive_bytes = most_bytes = 0
    for event in told.events:
        size_bytes = allocated_bytes(told.sizes[max(event, ~event)])
        alive_bytes += size_bytes if event >= 0 else -size_bytes
        most_bytes = max(most_bytes, alive_bytes)
    peaks = candidate_peaks(trace, sample.step)
    found_bytes, _ = highest_peak(peaks, layers_of(sample.step.setup))
    # PerChunk may be of two sizes, and the largest of the second size is not looked at.
    chunks = batch > (examples_per_chunk("nested", seq_len) or 1)
    assert found_bytes == pytest.approx(most_bytes, rel=0.02 if chunks else 1e-9)


def test_recordings_that_are_not_alike_make_no_trace() -> None:
    base, more, varied = toy_samples("none")
    other = toy_sample("full", 6)
    with pytest.raises(UnlikeError, match="not only insertions"):
        build_trace(base, {LAYERS: other}, varied)
    with pytest.raises(UnlikeError, match="another n makes other operations"):
        build_trace(base, more, {**varied, "n": other})


def test_a_trace_that_does_not_say_what_was_recorded_is_refused() -> None:
    base, more, varied = toy_samples("none")
    assert matches(TOYS["none"], more[LAYERS])
    recording = more[LAYERS].recording
    last = max(place for place, event in enumerate(recording.events) if event >= 0)
    sizes = list(recording.sizes)
    sizes[recording.events[last]] += 4096
    wrong = dataclasses.replace(
        more[LAYERS], recording=dataclasses.replace(recording, sizes=tuple(sizes))
    )
    assert not matches(TOYS["none"], wrong)
    with pytest.raises(UnlikeError):
        build_trace(base, {LAYERS: wrong}, varied)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.integers(0, 12),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_insertions_make_one_sequence_of_another(
    fewer: list[int], at: int, inserted: list[int]
) -> None:
    at = min(at, len(fewer))
    more = [*fewer[:at], *inserted, *fewer[at:]]
    found = insertions(fewer, more)
    assert len(found) == 1
    ((place, begin, end),) = found
    assert [*fewer[:place], *more[begin:end], *fewer[place:]] == more
    assert end - begin == len(inserted)


def test_two_insertions_are_not_cut_into_more() -> None:
    found = insertions("abcqxyzd", "abcabcqxyzxyzd")
    assert [end - begin for _, begin, end in found] == [3, 3]
    for wrong in ("abca", "abdabcd!"):
        with pytest.raises(UnlikeError):
            insertions("abcabcd", wrong)


@pytest.mark.parametrize(
    ("head", "activation", "policy", "accumulation", "batch"),
    [
        ("squad", "gelu_tanh", "none", 1, 7),
        # With and without chunks; the GELUs are alike in every request.
        ("classifier", "gelu_erf", "selective:2", 2, 30),
        *(
            pytest.param(head, activation, policy, accumulation, batch, marks=pytest.mark.slow)
            for head, activation, accumulation in itertools.product(
                ("squad", "classifier"), ("gelu_tanh", "gelu_erf"), (1, 2)
            )
            for policy, batch in (
                ("none", 9),
                ("selective", 70),
                ("full", 9),
                ("nested", 33),
                ("selective:2", 30),
                ("full:2", 9),
                ("nested:2", 33),
                ("nested:2+selective", 33),
            )
        ),
    ],
)
def test_a_real_step_asks_for_what_the_trace_says(
    head: str, activation: str, policy: str, accumulation: int, batch: int
) -> None:
    """The traces were made from models of other sizes, and hold what this one does to the byte.

    All but the number of different words, which is only expected.
    """
    workload = published_workload("bert-mini", 64, head)
    config = dataclasses.replace(workload.config, hidden_act=activation)
    workload = dataclasses.replace(workload, config=config)
    step = Setup(workload, Levers(parse_checkpointing(policy), accumulation)).step(batch)
    budget = make_budget(resolve_device("cpu"), GIB_BYTES)
    recordings: list[Recording] = []
    listener = TrialListener(on_recording=lambda _, recording: recordings.append(recording))
    trial = measure_step(step, budget, TrialSettings(steps=1), listener)
    requests = step_requests(step)
    assert requests is not None
    memory = empty_memory(budget)
    told, measured = replay(*requests, memory), trial.peak_bytes
    assert measured is not None
    # What the small pieces serve is not in the trace.
    assert 0 <= measured - told.peak_bytes <= memory.small_pieces // 2 * MIN_ALLOCATION_BYTES
    (recording,) = recordings
    without_small = replay(recording.events, recording.sizes, memory)
    assert without_small.peak_bytes == pytest.approx(measured, abs=1024)
    assert first_difference(Sample(step, recording)) is None


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_everything_that_is_planned_has_its_trace(head: str, optimizer: str) -> None:
    for model in ("bert-tiny", "bert-base", "bert-large"):
        workload = published_workload(model, 384, head)
        for policy in all_policies(workload.config.num_hidden_layers):
            for steps in (1, 3):
                levers = Levers(policy, steps, optimizer=optimizer)
                assert trace_of(Setup(workload, levers)) is not None


def test_memory_that_is_in_pieces_is_not_enough() -> None:
    """Seven examples of BERT-Small need 478 MiB if memory is plenty, and 512 MiB are too little."""
    workload = published_workload("bert-small", 128)
    budget = make_budget(resolve_device("cpu"), 512 * MIB_BYTES)
    plenty = replay_step(Setup(workload).step(7), Memory((4 * GIB_BYTES,)))
    assert plenty.peak_bytes < 0.95 * budget.budget_bytes
    assert replay_step(Setup(workload).step(6), empty_memory(budget)).fits
    assert not replay_step(Setup(workload).step(7), empty_memory(budget)).fits
