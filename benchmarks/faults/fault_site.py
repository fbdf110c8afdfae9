"""One place of its own for a chain of faults: folders, a ledger, and the command that is hurt."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

MARK = "BERTBENCH_FAULTS"
HANG_SECONDS = 600.0
"""A command that has not ended by then hangs: it takes a tenth of that on a busy machine."""

_GONE_SECONDS = 20.0
_PROBE = ("probe", "--models", "bert-tiny", "--seq-lens", "32,128", "--memory", "200MiB")
_RUN = ("run", "squad", "--demo", "--memory", "1GiB", "--num_train_epochs", "60")
_RUN_MORE = ("--save_checkpoints_steps", "40", "--evaluate_every_steps", "100", "--keep_best")


@dataclasses.dataclass(frozen=True)
class Site:
    """Folders that nothing else uses.

    Attributes:
        root: holds all others.
        verb: `probe` or `run`.
    """

    root: Path
    verb: str

    @property
    def temporary(self) -> Path:
        """What the command is given as TMPDIR."""
        return self.root / "t"

    @property
    def output(self) -> Path:
        """Output folder of a run."""
        return self.root / "out" / "run"

    @property
    def ledger(self) -> Path:
        """The ledger."""
        return self.root / "ledger" / "ledger.sqlite"

    @property
    def cache(self) -> Path:
        """Where a run keeps its features."""
        return self.root / "cache"

    @property
    def command(self) -> list[str]:
        """The command that every fault meets."""
        of_run = (*_RUN, *_RUN_MORE, "--output_dir", str(self.output))
        words = _PROBE if self.verb == "probe" else of_run
        return [sys.executable, "-m", "bertbench", *words]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the command; the mark lets its processes be found."""
        return {
            **os.environ,
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.temporary),
            "BERTBENCH_LOCKS": str(self.root / "locks"),
            "BERTBENCH_LEDGER": str(self.ledger),
            "BERTBENCH_CACHE": str(self.cache),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            MARK: str(self.root),
        }


def make_site(root: Path, verb: str) -> Site:
    """Make the folders."""
    site = Site(root, verb)
    for folder in ("home", "locks", "t", "out", "ledger", "cache"):
        (root / folder).mkdir(parents=True)
    (root / "locks").chmod(0o700)
    return site


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that has been started.

    Attributes:
        process: the process.
        printed: file of all that it prints.
    """

    process: psutil.Popen
    printed: Path

    def wait(self, seconds: float = HANG_SECONDS) -> int | None:
        """Return the exit code, or None when it had to be killed."""
        try:
            return int(self.process.wait(seconds))
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            for process in self.family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            self.process.wait()
            return None

    def text(self) -> str:
        """All that it has printed."""
        return self.printed.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def server(self) -> psutil.Process | None:
        """The process that starts trials, once it is there."""
        below = self.family()[1:]
        return next(iter(below), None)

    def keeper(self) -> psutil.Process | None:
        """The process that waits for the end of a trial, if one is at work."""
        return _last_child(self.server())

    def trial(self) -> psutil.Process | None:
        """The process of a trial, if one is at work."""
        return _last_child(self.keeper())


def _last_child(process: psutil.Process | None) -> psutil.Process | None:
    try:
        children = process.children() if process else []
    except psutil.NoSuchProcess:
        return None
    return children[-1] if children else None


def start(site: Site, *more: str, stdout: Any = None) -> Command:
    """Start the site's command in a session of its own."""
    printed = site.root / "printed.txt"
    with printed.open("wb") as file:
        process = psutil.Popen(
            [*site.command, *more],
            env=site.environment,
            cwd=site.root,
            stdin=subprocess.DEVNULL,
            stdout=stdout or file,
            stderr=file,
            start_new_session=True,
        )
    return Command(process, printed)


def judge(site: Site, command: Command, code: int | None, allowed: tuple[int, ...]) -> list[str]:
    """Say what is wrong about the end of a command: a hang, a traceback, a process left."""
    problems = []
    if code is None:
        problems.append(f"hang of {HANG_SECONDS:g} s")
    elif code not in allowed:
        problems.append(f"exit code {code}: {command.text()[-300:]!r}")
    if "Traceback (most recent call last)" in command.text():
        problems.append(f"traceback: {command.text()[-600:]!r}")
    left = _processes_left(site)
    if left:
        problems.append(f"process left: {left}")
    return problems


def _processes_left(site: Site) -> list[str]:
    deadline = time.monotonic() + _GONE_SECONDS
    while True:
        left = list(_marked(site))
        if not left:
            return []
        if time.monotonic() > deadline:
            names = []
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    names.append(" ".join(process.cmdline())[-120:])
                    process.kill()
            return names
        time.sleep(0.2)


def _marked(site: Site) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == str(
                site.root
            ):
                yield process


def files_left(site: Site) -> list[str]:
    """Temporary files and half-written ones, after the last command of a chain has ended."""
    left = [path for path in site.temporary.rglob("*") if not path.is_dir()]
    left += [path for path in site.temporary.iterdir() if path.is_dir()]
    if site.output.is_dir():
        left += site.output.rglob(".*")
        left += site.output.rglob("*.tmp")
    return sorted({str(path.relative_to(site.root)) for path in left})


def limits(site: Site) -> dict[int, tuple[int, str]]:
    """Largest batch and evidence by sequence length, as the command says when it is repeated."""
    out = site.root / "probe.json"
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [*site.command, "--json", str(out)],
        env=site.environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    if done.returncode:
        return {}
    cells = json.loads(out.read_text())["cells"]
    return {
        cell["seq_len"]: (cell["max_batch"], "certified" if cell["certificate"] else "not")
        for cell in cells
    }


def verdicts(site: Site) -> list[tuple[int, int, str]]:
    """Sequence length, batch and outcome of every trial in the ledger."""
    if not site.ledger.exists():
        return []
    with contextlib.closing(sqlite3.connect(site.ledger, timeout=30)) as ledger:
        try:
            rows = ledger.execute("SELECT seq_len, batch, outcome FROM trials").fetchall()
        except sqlite3.DatabaseError:
            return []
    return [(int(s), int(b), str(o)) for s, b, o in rows]


def losses(site: Site) -> dict[int, float]:
    """Loss by step, from the run's log."""
    found = {}
    log = site.output / "train_log.jsonl"
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            found[int(values["step"])] = float(values["loss"])
    return found


def saved_step(site: Site) -> int:
    """Step of the newest checkpoint; 0 without one."""
    steps = [int(path.stem.rpartition("-")[2]) for path in site.output.glob("model.ckpt-*.index")]
    return max(steps, default=0)


def forget(site: Site) -> None:
    """Take the folders away."""
    shutil.rmtree(site.root, ignore_errors=True)
