"""What a compiler says about a step is what the step needs, and its crash says nothing."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bertbench.compiling.compilation import (
    FAILED,
    NO_ROOM,
    Compilation,
    CompileSettings,
    compile_lowered,
    compile_step,
    lowered,
)
from bertbench.compiling.installed import compiler_versions, has_compiler
from bertbench.compiling.target import CPU_TARGET, CompileTarget, compile_target
from bertbench.core.errors import WorkError
from bertbench.core.units import GIB_BYTES
from bertbench.core.workload import Levers, Setup, TrainingStep, published_workload
from bertbench.hardware.accelerators import find_accelerator
from bertbench.hardware.device import make_budget
from bertbench.hardware.discover import resolve_device
from bertbench.memory.allocator.budget import memory_of
from bertbench.memory.compiled import CompiledMemory, compiled_memory_from_json, replay_compiled
from bertbench.trials.isolation import ProcessEnd, run_isolated
from bertbench.trials.measure import TrialSettings, measure_step
from finetune.errors import InputError
from finetune.spec.checkpointing import parse_checkpointing

TPU = CompileTarget("tpu", "tpu-v2-8", "v2:2x2")
GPU = CompileTarget("gpu", "t4", "a description")


def tiny_step(policy: str = "none", count: int = 1, seq_len: int = 32) -> TrainingStep:
    levers = Levers(parse_checkpointing(policy), count, xla=True)
    return Setup(published_workload("bert-tiny", seq_len), levers).step(4)


@pytest.mark.parametrize(
    ("policy", "count"), [("nested", 2), pytest.param("none", 1, marks=pytest.mark.slow)]
)
def test_a_compiled_step_needs_what_a_trial_measures(policy: str, count: int) -> None:
    step = tiny_step(policy, count, seq_len=128)
    compilation = compile_step(step, CPU_TARGET)
    assert compilation.outcome == "compiled"
    assert compilation.memory is not None
    budget = make_budget(resolve_device("cpu"), GIB_BYTES)
    trial = measure_step(step, budget, TrialSettings(steps=2))
    predicted = replay_compiled(step, compilation.memory, memory_of("cpu", GIB_BYTES))
    assert trial.peak_bytes is not None
    assert predicted.fits
    # The graph's constants, a few hundred pieces of 256 bytes, are not counted.
    assert predicted.peak_bytes <= trial.peak_bytes <= 1.003 * predicted.peak_bytes


def test_a_step_fits_where_its_buffer_finds_one_piece() -> None:
    step = tiny_step()
    memory = CompiledMemory(52_000_000, 1_000, 40_000_000, 0)
    enough = replay_compiled(step, memory, memory_of("gpu", GIB_BYTES))
    assert enough.fits
    assert memory.device_bytes < enough.peak_bytes < 1.1 * memory.device_bytes
    larger = dataclasses.replace(memory, temporary_bytes=GIB_BYTES - 50_000_000)
    assert not replay_compiled(step, larger, memory_of("gpu", GIB_BYTES)).fits


def end(**values: Any) -> ProcessEnd:
    return ProcessEnd(
        **{
            "exit_code": 0, "timed_out": False, "stopped": "", "garbage": "", "error": None,
            "printed": "", "oom_kills_before": {}, "oom_kills_after": {}, "preloaded": True,
            "seconds": 1.0, **values,
        }
    )  # fmt: skip


def told(*messages: Mapping[str, Any], **values: Any) -> CompileSettings:
    """Processes that send these messages and end so; steps are lowered to an empty file."""

    def run(
        function: str,
        payload: Mapping[str, Any],
        *,
        on_message: Callable[[Mapping[str, Any]], None],
        **others: Any,
    ) -> ProcessEnd:
        if function.endswith(":lower"):
            on_message({"event": "lowered"})
            return end()
        for message in messages:
            on_message(message)
        return end(**values)

    return CompileSettings(run=run)


def compiled_with(settings: CompileSettings, target: CompileTarget) -> Compilation:
    with lowered(tiny_step(), 1, settings) as module:
        return compile_lowered(module, 4, target, settings)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertbench.compiling.compilation.compiler_versions", lambda kind: {})


REFUSAL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (18.44G) exceeds available HBM (7.48G)."
)


@pytest.mark.usefixtures("installed")
def test_only_a_tpus_compiler_says_what_does_not_fit() -> None:
    settings = told({"event": "error", "message": REFUSAL})
    assert compiled_with(settings, TPU).outcome == NO_ROOM

    assert compiled_with(settings, GPU).outcome == "failed"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (told({"event": "error", "message": "INTERNAL: a fault"}), "a fault"),
        (told(exit_code=-11), "segmentation fault"),
        (told(timed_out=True, exit_code=-9), "no result within"),
        (told(stopped="the machine is full"), "the machine is full"),
        (told(garbage="b'?'"), "no message"),
        (told(exit_code=1, error=("RuntimeError", "the compiler ended with code -6")), "code -6"),
        (told(exit_code=-9, oom_kills_after={"a": 1}, oom_kills_before={"a": 0}), "killed"),
    ],
)
def test_a_compiler_that_fails_says_nothing_about_the_batch(
    settings: CompileSettings, why: str
) -> None:
    compilation = compiled_with(settings, TPU)
    assert compilation.outcome == "failed"
    assert why in compilation.message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_signal_that_ends_a_compiler_is_known(number: int, tmp_path: Path) -> None:
    """Else a kernel that kills the compiler for want of memory would not be found out."""
    end = run_isolated(
        "helpers.isolation_targets:compile_with_a_dying_compiler",
        {"answer": str(tmp_path / "answer.json"), "signal": str(int(number))},
        environment={},
        timeout_seconds=60,
        on_message=lambda message: None,
    )
    assert end.exit_code == -number
    assert end.error is None


@pytest.mark.usefixtures("installed")
def test_a_wrong_answer_is_refused() -> None:
    settings = told({"event": "compiled", "memory": {"argument_bytes": -1}})
    compilation = compiled_with(settings, TPU)
    assert compilation.outcome == FAILED
    assert "argument_bytes" in compilation.message


@pytest.mark.usefixtures("installed")
def test_a_step_that_is_not_lowered_is_a_failure() -> None:
    def run(function: str, payload: object, **others: Any) -> ProcessEnd:
        return end(exit_code=1, error=("ValueError", "no such step"))

    with (
        pytest.raises(WorkError, match="no such step"),
        lowered(tiny_step(), 1, CompileSettings(run=run)),
    ):
        pass


def test_memory_survives_json() -> None:
    memory = CompiledMemory(1, 2, 3, 4)
    assert compiled_memory_from_json(memory.to_json()) == memory
    for wrong in ({}, {**memory.to_json(), "program_bytes": 1.5}, [], None):
        with pytest.raises(InputError):
            compiled_memory_from_json(wrong)  # type: ignore[arg-type]


def test_targets_are_told_apart() -> None:
    names = ("t4", "titan-x", "rtx-4090", "tpu-v2-8", "tpu-v3-8")
    targets = [compile_target(find_accelerator(name)) for name in names]
    targets += [compile_target(find_accelerator("t4"), 2), CPU_TARGET]
    assert len({target.key() for target in targets}) == len(targets)
    assert compile_target(find_accelerator("tpu-v5e-8"), 8).description == "v5e:2x4"
    with pytest.raises(InputError, match="has 8 devices, not 3"):
        compile_target(find_accelerator("tpu-v2-8"), 3)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(InputError) as error:
        compiler_versions("tpu")
    assert "libtpu" in str(error.value)
    assert "bertbench[compile-tpu]" in str(error.value)
    assert not has_compiler("gpu")


@pytest.mark.skipif(not has_compiler("gpu"), reason="needs bertbench[compile-gpu]")
@pytest.mark.parametrize(
    ("name", "replicas"), [pytest.param("titan-x", 1, marks=pytest.mark.slow), ("h100", 2)]
)
def test_a_gpus_compiler(name: str, replicas: int) -> None:
    step = tiny_step()
    compilation = compile_step(step, compile_target(find_accelerator(name), replicas))
    assert compilation.message == ""
    assert compilation.memory is not None
    # Three copies of all trained parameters.
    assert 52_000_000 < compilation.memory.argument_bytes < 53_000_000
    assert 16_000_000 < compilation.memory.temporary_bytes < 80_000_000
    assert compilation.memory.output_bytes < 10_000


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler("tpu"), reason="needs bertbench[compile-tpu]")
@pytest.mark.parametrize("replicas", [1, 8])
def test_a_tpus_compiler(replicas: int) -> None:
    target = compile_target(find_accelerator("tpu-v2-8"), replicas)
    compilation = compile_step(tiny_step(), target)
    assert compilation.message == ""
    assert compilation.memory is not None
    assert compilation.memory.program_bytes > 1_000_000
    # 512 examples of full length do not fit.
    large = dataclasses.replace(tiny_step(seq_len=512), micro_batch=4096)
    refused = compile_step(large, target)
    assert refused.outcome == NO_ROOM, refused
