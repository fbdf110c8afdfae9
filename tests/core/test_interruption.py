"""Signals: what is asked is saved, what is interrupted ends, and nobody sees a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from finetune.tasks.demo_data import demo_files

# A command in place of the real ones: it says that it begins, and how it ended.
SCRIPT = """
import sys, time
import bertbench.cli as cli
from bertbench.core.errors import StoppedEarlyError
from bertbench.core.interruption import interruptible
from bertbench.core.terminal import say

def training():
    with interruptible() as should_stop:
        say("ready")
        while not should_stop():
            time.sleep(0.01)
        time.sleep(0.5)  # it saves
    print("saved", flush=True)
    raise StoppedEarlyError("stopped; saved")

def stubborn():
    "It takes an interruption for something else, or is deaf."
    with interruptible():
        try:
            say("ready")
            time.sleep(600)
        except KeyboardInterrupt:
            raise ValueError("a library does not know what happened")

def deaf():
    try:
        say("ready")
        time.sleep(600)
    except KeyboardInterrupt:
        say("deaf")
        time.sleep(600)

class Unraisable:
    def __del__(self):
        say("ready")
        time.sleep(600)

def swallowing():
    thing = Unraisable()
    del thing
    time.sleep(600)

def slow_to_tidy_up():
    try:
        say("ready")
        time.sleep(600)
    finally:
        time.sleep(0.5)
        print("tidied up", flush=True)

def plain():
    say("ready")
    time.sleep(600)

work = globals()[sys.argv[1]]
cli.cli.main = lambda **options: work()
cli.main()
"""

INT, TERM, HUP, XCPU = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU


def start(work: str, **options: object) -> subprocess.Popen[str]:
    # The tests themselves may run under nohup.
    options.setdefault("preexec_fn", lambda: signal.signal(HUP, signal.SIG_DFL))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, work],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert process.stderr.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str], signals: list[int]) -> tuple[str, list[str]]:
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    return output, errors.splitlines()


@pytest.mark.parametrize("signals", [[INT], [TERM], [HUP], [XCPU], [HUP, HUP, TERM], [TERM] * 5])
def test_a_training_that_is_asked_saves(signals: list[int]) -> None:
    """A closed terminal and a batch system send several signals."""
    output, errors = end(start("training"), signals)
    assert output == "saved\n"
    assert errors == [
        "stopping after this step; press Ctrl-C again to stop at once",
        "bertbench: stopped; saved",
    ]


@pytest.mark.parametrize("signals", [[INT, INT], [INT] * 5, [TERM, INT, INT], [INT] * 20])
def test_a_second_ctrl_c_interrupts_at_once(signals: list[int]) -> None:
    output, errors = end(start("training"), signals)
    assert output == ""
    assert errors[-1] == "bertbench: interrupted"


@pytest.mark.parametrize("signals", [[INT], [INT] * 5, [TERM], [HUP, TERM, INT]])
@pytest.mark.parametrize("work", ["plain", "slow_to_tidy_up", "swallowing"])
def test_other_work_is_interrupted_once(work: str, signals: list[int]) -> None:
    output, errors = end(start(work), signals)
    assert output == ("tidied up\n" if work == "slow_to_tidy_up" else "")
    assert errors[-1] == "bertbench: interrupted"


def test_what_an_interruption_becomes_in_a_library_is_no_traceback() -> None:
    _, errors = end(start("stubborn"), [INT, INT])
    assert errors[-1] == "bertbench: interrupted"


def test_work_that_does_not_end_is_ended() -> None:
    process = start("deaf")
    process.send_signal(INT)
    assert process.stderr is not None
    # A line that the signal meets half written is written again.
    said = [process.stderr.readline()]
    while said[-1] == "ready\n":
        said.append(process.stderr.readline())
    assert said[-1] == "deaf\n"
    time.sleep(2.5)
    end(process, [INT])


def test_a_command_that_has_not_begun_is_interrupted_in_one_line() -> None:
    """Threads are tried before; it takes long enough to be met on a busy machine."""
    script = """
import bertbench.cli as cli
def interrupted():
    raise KeyboardInterrupt
cli.limit_library_threads = interrupted
cli.main()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "bertbench: interrupted\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    process = start("plain", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(HUP)
    time.sleep(0.5)
    assert process.poll() is None
    end(process, [TERM])


def take_terminal() -> None:
    """Make standard input the terminal of this new session, whose end sends it a SIGHUP."""
    signal.signal(HUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    os.close(os.open(os.ttyname(0), os.O_RDWR))


def test_a_terminal_that_is_gone_does_not_keep_from_saving() -> None:
    """Everything that is said to it fails, also in the handler."""
    master, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "training"],
        stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(terminal)
    assert b"ready" in os.read(master, 100)
    os.close(master)
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == (b"saved\n", 130)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for temporary files, in which nothing is to be left."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    assert not list(path.iterdir())


def command(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bertbench", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_handlers(process: subprocess.Popen[str]) -> None:
    """Wait until a process handles SIGTERM; before, Python itself has not begun with ours."""
    while True:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if "SigCgt" in line).split()[1], 16)
        if caught >> (TERM - 1) & 1:
            return
        assert process.poll() is None
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("verb", ["run", "probe"])
def test_five_quick_ctrl_c_at_any_time(
    verb: str, seconds: float, place: Path, tmp_path: Path
) -> None:
    """Also while TensorFlow is imported, and while a step runs."""
    if verb == "run":
        process = command(
            "run", "squad", "--train_file", demo_files().squad_train, "--demo", "--memory", "1GiB",
            "--output_dir", tmp_path / "out", "--num_train_epochs", 400,
        )  # fmt: skip
    else:
        process = command("probe", "--models", "bert-tiny", "--seq-lens", 64,
                          "--ledger", tmp_path / "ledger.sqlite")  # fmt: skip
    wait_for_handlers(process)
    time.sleep(seconds)
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(5):
        process.send_signal(INT)
        time.sleep(0.05)
    output, errors = process.communicate(timeout=200)
    assert "Traceback" not in output + errors
    assert process.returncode == 130
    psutil.wait_procs(children, timeout=20)
    assert not any(child.is_running() for child in children)
