"""Isolated processes, and trials in them: nothing is lost, misread or left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from bertbench.core.errors import WorkError
from bertbench.core.units import MIB_BYTES
from bertbench.core.workload import Levers, Setup, published_workload
from bertbench.hardware.device import Budget, Device
from bertbench.memory.allocator import budget as allocator_budget
from bertbench.memory.allocator.budget import child_environment
from bertbench.trials import isolation as isolation_module
from bertbench.trials.interference import THIS_MACHINE, Machine
from bertbench.trials.measure import TrialListener, TrialSettings, measure_batches
from bertbench.trials.outcome import classify_error, classify_exit
from bertbench.trials.request import TrialRequest, request_from_payload
from bertbench.trials.trial import Trial
from helpers.isolated import run, start_script, wait_until_gone

CPU = Device("cpu", 0, "test", None, 1 << 34, 1 << 34)


def test_messages_environment_and_output_arrive(capfd: pytest.CaptureFixture[str]) -> None:
    [message], ending = run("echo", {"list": [1, "ü\n"]}, environment={"MARKER": "here"})
    assert message["payload"] == {"list": [1, "ü\n"]}
    folder = message["environment"]["TMPDIR"]
    assert not Path(folder).exists()
    assert message["environment"] == {**os.environ, "MARKER": "here", "TMPDIR": folder}
    assert message["pid"] != os.getpid()
    assert (ending.exit_code, ending.error, ending.timed_out, ending.garbage) == (
        0,
        None,
        False,
        "",
    )
    assert ending.tail == "noise on stdout"
    assert "MARKER" not in os.environ
    assert capfd.readouterr() == ("", ""), "an isolated process prints to the terminal"


def test_the_environment_is_this_process_s_not_the_server_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run("echo")  # the server runs from here on, without the variable
    monkeypatch.setenv("MARKER", "set later")
    [message], _ = run("echo")
    folder = message["environment"]["TMPDIR"]
    assert message["environment"] == {**os.environ, "TMPDIR": folder}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")
def test_tensorflow_is_preloaded_in_a_process_of_its_own() -> None:
    first, ending = run("echo")
    second, _ = run("echo")
    assert ending.preloaded
    assert first[0]["pid"] != second[0]["pid"]


@pytest.mark.parametrize(
    ("how", "exit_code"),
    [
        ("exit", 7),
        ("segfault", -signal.SIGSEGV),
        ("SIGKILL", -signal.SIGKILL),
        ("SIGTERM", -signal.SIGTERM),
    ],
)
def test_what_was_sent_before_a_crash_is_kept(how: str, exit_code: int) -> None:
    messages, ending = run("crash", {"how": how})
    assert messages == [{"before": "the crash"}]
    assert ending.exit_code == exit_code
    assert not ending.timed_out
    assert "last words" in ending.tail


def test_a_segmentation_fault_shows_where() -> None:
    _, ending = run("crash", {"how": "segfault"})
    assert ending.tail.startswith("last words\nFatal Python error: Segmentation fault\nFile ")
    assert "in crash" in ending.tail
    assert "Extension modules" not in ending.tail


def test_a_kill_by_a_person_is_no_memory_limit() -> None:
    _, ending = run("crash", {"how": "SIGKILL"})
    found = classify_exit(ending.exit_code, ending.oom_kills_before, ending.oom_kills_after)
    assert found == ("failed", "killed by SIGKILL; not known to be out of memory")


@pytest.mark.parametrize("how", ["hang", "half"])
def test_silence_is_ended(how: str) -> None:
    messages, ending = run("crash", {"how": how}, timeout_seconds=1.0)
    assert messages == [{"before": "the crash"}]
    assert ending.timed_out
    assert ending.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("how", ["garbage", "flood"])
def test_garbage_is_named_and_ends_the_process(how: str) -> None:
    messages, ending = run("crash", {"how": how})
    assert messages == [{"before": "the crash"}]
    assert ("not a message" if how == "garbage" else "xxx") in ending.garbage


def test_an_exception_crosses_with_its_telling_end() -> None:
    _, ending = run("crash", {"how": "raise"})
    assert ending.error is not None
    assert classify_error(*ending.error) == "oom"
    assert len(ending.error[1]) < 70_000


def test_a_missing_target_is_an_error_not_a_hang() -> None:
    _, ending = run("no_such_function")
    assert ending.error is not None
    assert ending.error[0] == "AttributeError"


@pytest.mark.parametrize("then", ["end", "hang"])
def test_descendants_are_ended_too(then: str) -> None:
    messages, _ = run("start_grandchild", {"then": then}, timeout_seconds=2.0)
    wait_until_gone(messages[0]["pids"])


def test_an_interruption_ends_the_process() -> None:
    pids: list[int] = []

    def interrupt(message: dict[str, Any]) -> None:
        pids.extend(message["pids"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("start_grandchild", {"then": "hang"}, on_message=interrupt)
    wait_until_gone(pids)


def test_no_file_descriptor_is_left() -> None:
    run("echo")
    before = psutil.Process().num_fds()
    for _ in range(5):
        run("echo")
        run("crash", {"how": "SIGKILL"})
    assert psutil.Process().num_fds() == before


def test_the_main_script_is_not_run_again(tmp_path: Path) -> None:
    with start_script(tmp_path, "end") as script:
        output, _ = script.communicate(timeout=120)
    assert script.returncode == 0
    assert output.count("script starts") == 1
    assert output.endswith("script ends\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a fork server")
def test_everything_dies_with_a_killed_parent(tmp_path: Path) -> None:
    with start_script(tmp_path, "hang") as script:
        assert script.stdout is not None
        script.stdout.readline()
        pids = [int(pid) for pid in script.stdout.readline().split()]
        servers = [child.pid for child in psutil.Process(script.pid).children()]
        assert servers
        script.kill()
    wait_until_gone(pids + servers)


def test_the_capped_cpu_is_in_force_in_a_forked_process() -> None:
    """One test of the real allocator; it waits 10 seconds before it reports the exhaustion."""
    environment = child_environment(Budget(CPU, 64 * MIB_BYTES))
    messages, ending = run("allocate", {"sizes_mib": [20, 200]}, environment=environment)
    assert ending.preloaded or sys.platform != "linux"
    assert [message["size_mib"] for message in messages] == [20]
    assert 20 * MIB_BYTES <= messages[0]["peak"] <= 64 * MIB_BYTES
    assert ending.error is not None, ending.tail
    assert ending.error[0] == "ResourceExhaustedError"
    assert classify_error(*ending.error) == "oom"


def test_a_system_that_refuses_the_budget_is_no_limit() -> None:
    """As under `ulimit -v`, where batch 1 seemed not to fit."""

    def refuse(**arguments: Any) -> None:
        raise MemoryError

    tensorflow = types.SimpleNamespace(
        device=lambda name: contextlib.nullcontext(),
        errors=types.SimpleNamespace(ResourceExhaustedError=MemoryError),
        raw_ops=types.SimpleNamespace(Empty=refuse),
        uint8=None,
    )
    with pytest.raises(WorkError, match=r"does not give a process 2,000 MiB") as refused:
        allocator_budget._reserve(tensorflow, 2000 * MIB_BYTES)
    assert classify_error("WorkError", str(refused.value)) == "failed"


NO_LISTENER = TrialListener()
SETTINGS = TrialSettings(target="helpers.isolation_targets:train")


def measure(
    script: str,
    batches: Sequence[int],
    listener: TrialListener = NO_LISTENER,
    machine: Machine = THIS_MACHINE,
    device: Device = CPU,
    **settings: Any,
) -> list[Trial]:
    """Measure with the fake training step, which takes its script in place of the optimizer."""
    return measure_batches(
        Setup(published_workload("bert-tiny", 64), Levers(optimizer=script)),
        Budget(device, 64 * MIB_BYTES),
        batches,
        dataclasses.replace(SETTINGS, **settings),
        listener,
        machine,
    )


def test_one_process_measures_rising_batches() -> None:
    seen: list[Trial] = []
    trials = measure("", [2, 4, 8], TrialListener(on_trial=seen.append))
    assert seen == trials
    assert [(t.batch, t.outcome, t.fresh) for t in trials] == [
        (2, "fits", True),
        (4, "fits", False),
        (8, "fits", False),
    ]
    assert len({(t.peak_bytes or 0) - t.batch * 1000 for t in trials}) == 1, "several processes"
    assert [t.step_seconds for t in trials] == [0.5] * 3


def test_fresh_trials_have_a_process_each() -> None:
    trials = measure("oom@4", [2, 3, 4, 5], fresh=True)
    assert [(t.batch, t.outcome, t.fresh) for t in trials] == [
        (2, "fits", True),
        (3, "fits", True),
        (4, "oom", True),
    ]
    assert len({(t.peak_bytes or 0) - t.batch * 1000 for t in trials[:2]}) == 2


@pytest.mark.parametrize(
    ("script", "outcome", "words"),
    [
        ("oom@4", "oom", "ResourceExhaustedError: OOM when allocating tensor with shape[2]"),
        ("uncaught@4", "oom", "ResourceExhaustedError: OOM when allocating tensor with shape[3]"),
        ("liar@4", "failed", "ValueError"),
        ("segfault@4", "failed", "killed by SIGSEGV (segmentation fault); it printed: "),
        ("SIGKILL@4", "failed", "not known to be out of memory; it printed: last words"),
        ("exit@4", "failed", "exit code 7"),
        ("hang@4", "failed", "no result within 2 s; killed"),
        ("garbage@4", "failed", "what is no message"),
        ("wrong@4", "failed", "sent a wrong result"),
        ("silent@4", "failed", "ended without a result"),
    ],
)
def test_the_end_of_a_process_becomes_the_outcome_of_the_batch_that_ran(
    script: str, outcome: str, words: str
) -> None:
    trials = measure(script, [2, 4, 8], timeout_seconds=2 if "hang" in script else 60)
    assert [(t.batch, t.outcome) for t in trials] == [(2, "fits"), (4, outcome)]
    assert words in trials[-1].message
    assert "\n" not in trials[-1].message
    assert trials[-1].peak_bytes is None


def test_a_request_crosses_unchanged() -> None:
    device = Device("gpu", 1, "A", "GPU-1", 1 << 34, 1 << 33, ((7, "x", 5),), "550")
    request = TrialRequest(
        Setup(published_workload("bert-mini", 128, "classifier"), Levers(accumulation_steps=3)),
        Budget(device, 1 << 30),
        (1, 2),
        4,
    )
    assert request_from_payload(request.to_payload()) == request


@pytest.mark.parametrize("batches", [[], [2, 2], [4, 2], [0, 1]])
def test_batches_must_rise(batches: list[int]) -> None:
    with pytest.raises(ValueError, match="rising"):
        measure("", batches)


def test_nothing_stays_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process cannot tidy up, as TensorFlow's generated code shows."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for how in ("exit", "hang"):
        messages, _ = run("leave_file", {"how": how}, timeout_seconds=2)
        path = Path(messages[0]["path"])
        assert path.is_relative_to(tmp_path)
        assert not path.exists()
    assert not list(tmp_path.glob("bertbench-*"))


def test_a_request_to_stop_is_heard() -> None:
    began = time.monotonic()
    _, ending = run(
        "crash",
        {"how": "hang"},
        timeout_seconds=300,
        stop=lambda: "enough" if time.monotonic() - began > 1 else "",
    )
    assert (ending.stopped, ending.timed_out) == ("enough", False)
    assert ending.seconds < 60


def test_a_silent_process_is_killed_with_a_guard_too() -> None:
    _, ending = run("crash", {"how": "hang"}, timeout_seconds=2, stop=lambda: "")
    assert (ending.stopped, ending.timed_out) == ("", True)


FULL_HOST = Machine(host_memory=lambda: (1 << 34, 300 * MIB_BYTES))


def test_a_trial_is_stopped_before_the_machine_swaps() -> None:
    """Whoever fills the machine, it says nothing about the batch."""
    (trial,) = measure("hang@4", [4], machine=FULL_HOST)
    assert trial.outcome == "failed"
    assert (
        "300 MiB of its 16.0 GiB were left; end what holds the memory, or give a smaller"
        in trial.message
    )


def test_a_trial_that_was_stopped_and_went_on_is_no_limit_and_no_time() -> None:
    fits, oom = measure("paused@4", [4, 8])
    assert (fits.outcome, fits.step_seconds) == ("fits", None)
    assert fits.peak_bytes is not None
    assert oom.outcome == "failed"
    assert "was stopped and went on" in oom.message
    assert oom.message.endswith("OOM when allocating tensor with shape[2])")


def test_a_trial_notices_that_it_was_stopped() -> None:
    def wake_stopped() -> None:
        for process in psutil.Process().children(recursive=True):
            if process.status() == psutil.STATUS_STOPPED:
                process.send_signal(signal.SIGCONT)

    (trial,) = measure_batches(
        Setup(published_workload("bert-tiny", 64)),
        Budget(CPU, 64 * MIB_BYTES),
        [4],
        TrialSettings(target="helpers.isolation_targets:stop_in_a_step"),
        TrialListener(poll=wake_stopped),
    )
    assert trial.outcome == "failed"
    assert "was stopped and went on" in trial.message


@pytest.mark.parametrize(("free_mib", "outcome"), [(100, "oom"), (63, "failed")])
def test_a_gpu_that_others_took_memory_of_meanwhile_is_no_limit(
    free_mib: int, outcome: str
) -> None:
    gpu = Device("gpu", 0, "Card", "GPU-1", 1 << 30, 1 << 30)
    now = dataclasses.replace(
        gpu, free_bytes=free_mib * MIB_BYTES, held_by=((77, "other", 900 * MIB_BYTES),)
    )
    taken = Machine(list_gpus=lambda: [now], given_back_seconds=0.3)
    (trial,) = measure("oom@4", [4], machine=taken, device=gpu)
    assert trial.outcome == outcome
    assert ("process 77 (other) holds 900 MiB" in trial.message) is (outcome == "failed")


def test_a_result_that_is_there_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation_module, "_ASK_EVERY_SECONDS", 20.0)
    (trial,) = measure("", [4], machine=FULL_HOST)
    assert trial.outcome == "fits"


def test_what_a_poll_raises_ends_the_trial() -> None:
    began = time.monotonic()

    def poll() -> None:
        if time.monotonic() - began > 1:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        measure("hang@4", [4], TrialListener(poll=poll))
    assert time.monotonic() - began < 60


def test_a_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits and durations follow the monotonic clock, not the one that people set."""
    jumps = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    (trial,) = measure("", [4], timeout_seconds=60)
    assert trial.outcome == "fits"
    assert trial.seconds < 60


@pytest.mark.parametrize(("script", "seconds"), [("hang@4", -3600.0), ("oom@4", 3600.0)])
def test_a_clock_that_is_set_is_no_limit_and_no_long_wait(script: str, seconds: float) -> None:
    """TensorFlow waits for memory by that clock: too short when it is set forward."""
    offsets = itertools.chain([0.0], itertools.repeat(seconds))
    set_clock = Machine(clock_offset=lambda: next(offsets))
    (trial,) = measure(script, [4], machine=set_clock)
    assert trial.outcome == "failed"
    assert trial.message.startswith("the system's clock was set during the trial")
    assert trial.seconds < 600
