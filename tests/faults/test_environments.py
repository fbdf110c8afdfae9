"""Poor environments: every verb works there, or ends in one line that says what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bertbench.core.errors import WorkError
from bertbench.hardware import threads
from bertbench.hardware.threads import can_start_threads, check_threads
from helpers.paths import REPOSITORY

VERBS = (
    ["--help"],
    ["devices"],
    ["plan", "--target-batch", "8", "--model", "bert-tiny", "--seq-len", "64", "--memory", "1GiB"],
    ["plan", "--model", "no-such-é", "--target-batch", "8"],
    ["report"],
    ["ledger", "list"],
    ["fetch", "--list"],
)

# Runs the verbs one after the other, each in a fork, as Python takes long to start.
DRIVER = """
import os, sys
from bertbench.__main__ import main
import bertbench.cli
for verb in {verbs!r}:
    sys.stdout and sys.stdout.flush()
    pid = os.fork()
    if not pid:
        sys.argv = ["bertbench", *verb]
        main()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write({report}, b"%d\\n" % code)
"""


@dataclasses.dataclass(frozen=True)
class Poor:
    """What an environment lacks.

    Attributes:
        variables: set, or with None taken away.
        prepare: called in the child with a folder of the test before Python starts.
        stdout: where the output goes.
        codes: exit codes that may come beside 0 and those of wrong input.
        before: Python code that goes first.
    """

    variables: dict[str, str | None] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda folder: None
    stdout: str | None = None
    codes: tuple[int, ...] = ()
    before: str = ""


def gone(folder: Path) -> None:
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()


def limit(kind: int, number: int) -> Callable[[Path], None]:
    return lambda folder: resource.setrlimit(kind, (number, number))


def closed(*numbers: int) -> Callable[[Path], None]:
    def close(folder: Path) -> None:
        for number in numbers:
            with contextlib.suppress(OSError):
                os.close(number)

    return close


# A user whom the system does not know, as in containers.
NO_ENTRY = """
import pwd
def missing(user):
    raise KeyError(user)
pwd.getpwuid = missing
"""

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}

ENVIRONMENTS = {
    "no home": Poor({"HOME": None, "XDG_STATE_HOME": None}, before=NO_ENTRY),
    "a home that cannot be written": Poor({"HOME": "/proc/none"}),
    "no folder for temporary files": Poor({"TMPDIR": "/nonexistent"}),
    "a long name of it": Poor({"TMPDIR": "/tmp/" + "x" * 200}),
    "a working folder that is gone": Poor(prepare=gone),
    "a working folder that cannot be written": Poor(prepare=lambda folder: os.chdir("/proc")),
    "few files": Poor(prepare=limit(resource.RLIMIT_NOFILE, 16), codes=(1,)),
    "no files to write": Poor(prepare=limit(resource.RLIMIT_FSIZE, 0), codes=(1,)),
    "plain ASCII": Poor({**ASCII, "BERTBENCH_LEDGER": "/tmp/é/\udcff"}),
    "no kind of terminal": Poor({"TERM": None, "COLUMNS": "1", "LINES": "0"}),
    "a dumb terminal": Poor({"TERM": "dumb", "COLUMNS": "0"}),
    "nonsense for a width": Poor({"COLUMNS": "wide", "NO_COLOR": "1"}),
    "nothing open": Poor(prepare=closed(0, 1, 2)),
    "no standard output": Poor(prepare=closed(1)),
    "no standard error": Poor(prepare=closed(2)),
    "a full disk for the output": Poor(stdout="/dev/full", codes=(1,)),
    "a strict mask": Poor(prepare=lambda folder: os.umask(0o777) and None),
    "without assertions": Poor({"PYTHONOPTIMIZE": "2"}),
    "no path": Poor({"PATH": None, "LANG": "xx_XX.nothing"}),
    "signals ignored": Poor(prepare=lambda folder: signal.signal(2, signal.SIG_IGN) and None),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in tmp_path.rglob("*"):
        path.chmod(0o700)


def run_poorly(poor: Poor, command: list[str], folder: Path, pass_fds: tuple[int, ...] = ()) -> str:
    """Run Python in an environment; return what it wrote to standard error."""
    variables: dict[str, str | None] = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "BERTBENCH_LEDGER": None,
        "BERTBENCH_CACHE": None,
        **poor.variables,
    }
    log = folder / "stderr"
    with log.open("wb") as errors, open(poor.stdout or os.devnull, "wb") as output:
        subprocess.run(
            [sys.executable, *command],
            env={name: value for name, value in variables.items() if value is not None},
            preexec_fn=lambda: poor.prepare(folder),
            stdout=output,
            stderr=errors,
            timeout=280,
            pass_fds=pass_fds,
        )
    return log.read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_verbs_work_or_end_in_one_line(name: str, folder: Path) -> None:
    poor = ENVIRONMENTS[name]
    read, write = os.pipe()
    with open(read, encoding="utf-8") as report:
        driver = folder / "driver.py"
        driver.write_text(poor.before + DRIVER.format(verbs=VERBS, report=write), encoding="utf-8")
        errors = run_poorly(poor, [str(driver)], folder, (write,))
        os.close(write)
        lines = report.read().splitlines()
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    codes = [int(line) for line in lines]
    assert len(codes) == len(VERBS), errors
    for code, verb in zip(codes, VERBS, strict=True):
        wrong = verb[-1] == "8" and verb[0] == "plan" and "no-such" in verb[2]
        expected = {2} if wrong else {0, 2} if verb[0] == "ledger" else {0}
        allowed = {*expected, *poor.codes}
        assert code in allowed, (verb, errors)
    assert len(errors.splitlines()) <= 2 * len(VERBS)


def test_threads_that_the_system_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numeric libraries do with one, and TensorFlow, which would abort, is not begun."""
    assert can_start_threads(4)
    check_threads()
    left = [3]

    def start(thread: threads.threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        real(thread)

    real = threads.threading.Thread.start
    monkeypatch.setattr(threads.threading.Thread, "start", start)
    for name in threads._LIBRARY_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # Of a large machine, 8 cores are for this process.
    monkeypatch.setattr(os, "cpu_count", lambda: 512)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    threads.limit_library_threads()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    left[0] = 3
    with pytest.raises(WorkError, match="needs 24 threads, and the system does not allow them"):
        check_threads()


POOR_FOR_WORK = {
    name: poor
    for name, poor in ENVIRONMENTS.items()
    if name not in ("no kind of terminal", "a dumb terminal", "nonsense for a width", "no path")
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["probe", "run"])
@pytest.mark.parametrize("name", POOR_FOR_WORK)
def test_work_ends_well_or_in_one_line(name: str, verb: str, folder: Path) -> None:
    if verb == "probe":
        arguments = ["probe", "--models", "bert-tiny", "--seq-lens", "16", "--memory", "64MiB",
                     "--max-batch", "2", "--ledger", str(folder / "ledger")]  # fmt: skip
    else:
        arguments = ["run", "squad", "--demo", "--memory", "1GiB", "--num_train_epochs", "1",
                     "--output_dir", str(folder / "out")]  # fmt: skip
    read, write = os.pipe()
    with open(read, encoding="utf-8") as report:
        driver = folder / "driver.py"
        code = DRIVER.format(verbs=(arguments,), report=write)
        driver.write_text(POOR_FOR_WORK[name].before + code, encoding="utf-8")
        errors = run_poorly(POOR_FOR_WORK[name], [str(driver)], folder, (write,))
        os.close(write)
        [ended] = report.read().split()
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert int(ended) in (0, 1, 2), errors
