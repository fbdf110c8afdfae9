"""The faults: what happens to a command, or to its files, and how the command may end then."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from fault_site import Command, Site, judge, start

Attempt = Callable[[Site, random.Random, float], list[str]]
"""Lets one fault happen, given how long the command takes unhurt; returns what went wrong."""

_CGROUPS = Path("/sys/fs/cgroup/memory")
_STOPPED_SECONDS = 3.0
_MIB_BYTES = 1 << 20

# Exit codes: done, failed, wrong input, interrupted, ended by the signal itself.
_DONE, _FAILED, _WRONG, _INTERRUPTED = 0, 1, 2, 130
_KILLED = -signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: for the table.
        verb: whose command it meets.
        attempt: lets it happen once.
        keeps: the files of the site are worth going on with afterwards; False begins anew.
        possible: whether this machine can make it.
    """

    name: str
    verb: str
    attempt: Attempt
    keeps: bool = True
    possible: Callable[[], bool] = lambda: True


def _sleep_part(rng: random.Random, seconds: float) -> None:
    time.sleep(rng.uniform(0.02, 1.0) * seconds)


def _signalled(number: signal.Signals, allowed: tuple[int, ...], times: int = 1) -> Attempt:
    def attempt(site: Site, rng: random.Random, seconds: float) -> list[str]:
        command = start(site)
        _sleep_part(rng, seconds)
        for _ in range(times):
            with contextlib.suppress(psutil.NoSuchProcess):
                command.process.send_signal(number)
            time.sleep(rng.uniform(0.0, 0.2) if times > 1 else 0)
        return judge(site, command, command.wait(), allowed)

    return attempt


def _paused(site: Site, rng: random.Random, seconds: float) -> list[str]:
    """Stop all processes for a while, as Ctrl-Z and a suspended machine do."""
    command = start(site)
    _sleep_part(rng, seconds)
    family = command.family()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(_STOPPED_SECONDS)
    return judge(site, command, command.wait(), (_DONE,))


_Find = Callable[[Command], psutil.Process | None]


def _meet(command: Command, find: _Find, seconds: float) -> psutil.Process | None:
    """Wait for a process of the command."""
    deadline = time.monotonic() + 4 * seconds
    while time.monotonic() < deadline and command.process.is_running():
        process = find(command)
        if process is not None:
            return process
        time.sleep(0.02)
    return None


def _below(
    find: _Find, number: signal.Signals, allowed: tuple[int, ...], again: bool = False
) -> Attempt:
    """Send a signal to a process below the command; `again`: let it go on after a while."""

    def attempt(site: Site, rng: random.Random, seconds: float) -> list[str]:
        command = start(site, "--fresh")
        process = _meet(command, find, seconds)
        time.sleep(rng.uniform(0, 0.3 * seconds))
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                if again:
                    time.sleep(_STOPPED_SECONDS)
                    process.send_signal(signal.SIGCONT)
        return judge(site, command, command.wait(), allowed)

    return attempt


def _trial(command: Command) -> psutil.Process | None:
    return command.trial()


def _keeper(command: Command) -> psutil.Process | None:
    return command.keeper()


def _server(command: Command) -> psutil.Process | None:
    return command.server()


def _closed_pipe(site: Site, rng: random.Random, seconds: float) -> list[str]:
    """Close what the command prints to, as `| head -1` does."""
    reader, writer = os.pipe()
    command = start(site, stdout=writer)
    os.close(writer)
    time.sleep(rng.uniform(0, 0.5 * seconds))
    os.close(reader)
    return judge(site, command, command.wait(), (_DONE, _FAILED, -signal.SIGPIPE, 141))


def _full_device(site: Site, rng: random.Random, seconds: float) -> list[str]:
    """Print to a device that is full."""
    with open("/dev/full", "wb") as full:
        command = start(site, stdout=full)
    return judge(site, command, command.wait(), (_DONE, _FAILED))


def _can_mount() -> bool:
    return os.geteuid() == 0 and sys.platform == "linux"


@contextlib.contextmanager
def _small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """Put a small file system in the place of a folder, with what is in the folder."""
    kept = folder.with_name(folder.name + "-kept")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", str(folder), str(kept)], check=True)
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    size = f"size={used + size_bytes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{kept}/.", str(folder)], check=False)
        yield
        subprocess.run(["rm", "-rf", str(kept)], check=True)
        subprocess.run(["cp", "-a", str(folder), str(kept)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        kept.rename(folder)


def _full_disk(which: Callable[[Site], Path], least_bytes: int, most_bytes: int) -> Attempt:
    def attempt(site: Site, rng: random.Random, seconds: float) -> list[str]:
        with _small_disk(which(site), rng.randint(least_bytes, most_bytes)):
            command = start(site)
            return judge(site, command, command.wait(), (_DONE, _FAILED, _WRONG))

    return attempt


def _lost_folder(move: bool) -> Attempt:
    """Rename or delete the output folder while the run trains; it must not end with 0."""

    def attempt(site: Site, rng: random.Random, seconds: float) -> list[str]:
        command = start(site)
        deadline = time.monotonic() + 4 * seconds
        log = site.output / "train_log.jsonl"
        while not log.exists() and time.monotonic() < deadline and command.process.is_running():
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3 * seconds))
        away = site.output.with_name("away")
        during = command.process.is_running() and site.output.exists()
        with contextlib.suppress(FileNotFoundError):
            if move:
                site.output.rename(away)
            else:
                subprocess.run(["rm", "-rf", str(site.output)], check=True)
        code = command.wait()
        problems = judge(site, command, code, (_FAILED,) if during else (_DONE, _FAILED))
        if site.output.exists() and move:
            problems.append("results were written into a new folder")
        subprocess.run(["rm", "-rf", str(site.output), str(away)], check=True)
        return problems

    return attempt


def _between(change: Callable[[Site, random.Random], None]) -> Attempt:
    """Kill a run, change what it has left, and let it go on."""

    def attempt(site: Site, rng: random.Random, seconds: float) -> list[str]:
        command = start(site)
        _sleep_part(rng, seconds)
        command.process.send_signal(signal.SIGKILL)
        command.wait()
        change(site, rng)
        command = start(site)
        return judge(site, command, command.wait(), (_DONE,))

    return attempt


def _damaged(pattern: str, folder: Callable[[Site], Path], how: str) -> Attempt:
    """Damage a file that a killed run has left."""

    def change(site: Site, rng: random.Random) -> None:
        files = sorted(path for path in folder(site).glob(pattern) if path.is_file())
        if files:
            _damage(rng.choice(files), how, rng)

    return _between(change)


def _damage(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = bytearray()
    elif how == "cut":
        data = data[: rng.randrange(len(data) or 1)]
    elif how == "elsewhere":
        data = bytearray(b'model_checkpoint_path: "/nowhere/model.ckpt-7"\n')
    elif how == "line":
        lines = bytes(data).split(b"\n")
        lines[rng.randrange(len(lines))] = b'{"step": \xff'
        data = bytearray(b"\n".join(lines))
    elif data:
        # One bit, anywhere.
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def _stale_state(site: Site, rng: random.Random) -> None:
    """Let the state file name an older checkpoint, as a kill before its renewal does."""
    prefixes = sorted(site.output.glob("model.ckpt-*.index"), key=lambda p: int(p.stem[11:]))
    if len(prefixes) > 1:
        name = prefixes[0].stem
        (site.output / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\n')


def _damaged_ledger(site: Site, rng: random.Random, seconds: float) -> list[str]:
    """Flip a bit of the ledger, ask it, and put it back."""
    command = start(site)
    problems = judge(site, command, command.wait(), (_DONE,))
    whole = site.ledger.read_bytes()
    _damage(site.ledger, "bit", rng)
    for more in ([], ["--fresh"]) if rng.random() < 0.3 else ([],):
        command = start(site, *more)
        problems += judge(site, command, command.wait(), (_DONE, _FAILED, _WRONG))
    for path in site.ledger.parent.iterdir():
        path.unlink()
    site.ledger.write_bytes(whole)
    return problems


def _in_pressure(site: Site, rng: random.Random, seconds: float) -> list[str]:
    """Let another process take the memory until the kernel kills the trial."""
    group = _CGROUPS / f"bertbench-faults-{site.root.name}"
    group.mkdir()
    hog = None
    try:
        (group / "memory.limit_in_bytes").write_text(str(2000 * _MIB_BYTES))
        command = start(site, "--fresh")
        for process in command.family():
            (group / "cgroup.procs").write_text(str(process.pid))
        trial = _meet(command, _trial, seconds)
        time.sleep(rng.uniform(0.1, 0.5) * seconds)
        if trial is not None:
            hog = subprocess.Popen([sys.executable, "-c", _HOG, str(group / "cgroup.procs")])
            time.sleep(_STOPPED_SECONDS * 2)
            hog.kill()
        return judge(site, command, command.wait(), (_DONE, _FAILED))
    finally:
        if hog is not None:
            hog.kill()
            hog.wait()
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


# It asks the kernel to take any other process first.
_HOG = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
open("/proc/self/oom_score_adj", "w").write("-1000")
held = []
for _ in range(190):
    held.append(bytearray(10 << 20))
    time.sleep(0.01)
time.sleep(60)
"""


def _can_make_pressure() -> bool:
    return _can_mount() and os.access(_CGROUPS, os.W_OK) and (_CGROUPS / "cgroup.procs").exists()


def _lost_ledger(site: Site, rng: random.Random, seconds: float) -> list[str]:
    """Delete the ledger's folder while the probe works."""
    command = start(site, "--fresh")
    _sleep_part(rng, seconds)
    subprocess.run(["rm", "-rf", str(site.ledger.parent)], check=True)
    return judge(site, command, command.wait(), (_DONE, _FAILED, _WRONG))


def _two_at_once(site: Site, rng: random.Random, seconds: float) -> list[str]:
    """Run the same command twice at the same time."""
    command = start(site)
    time.sleep(rng.uniform(0, 0.3 * seconds))
    second = subprocess.Popen(
        site.command,
        env=site.environment,
        cwd=site.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    code = command.wait()
    try:
        text, _ = second.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        second.kill()
        return ["hang of the second command"]
    problems = judge(site, command, code, (_DONE, _WRONG))
    if b"Traceback" in text or second.returncode not in (_DONE, _WRONG):
        problems.append(f"second command, exit code {second.returncode}: {text[-300:]!r}")
    if _DONE not in (code, second.returncode):
        problems.append("neither of two commands was done")
    return problems


def _of_both() -> Iterator[Fault]:
    stops = (_DONE, _INTERRUPTED)
    for verb in ("probe", "run"):
        yield Fault("SIGKILL", verb, _signalled(signal.SIGKILL, (_DONE, _KILLED)))
        yield Fault("Ctrl-C", verb, _signalled(signal.SIGINT, stops))
        yield Fault("five Ctrl-C", verb, _signalled(signal.SIGINT, stops, times=5))
        terminated = (*stops, 143, -signal.SIGTERM)
        yield Fault("SIGTERM", verb, _signalled(signal.SIGTERM, terminated))
        hung_up = (*stops, 129, -signal.SIGHUP)
        yield Fault("SIGHUP", verb, _signalled(signal.SIGHUP, hung_up))
        yield Fault("all stopped, continued", verb, _paused)
        yield Fault("output closed", verb, _closed_pipe)
        yield Fault("output full", verb, _full_device)
        yield Fault("two at once", verb, _two_at_once)


def _of_probe() -> Iterator[Fault]:
    ended = (_DONE, _FAILED)
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    yield Fault("trial killed", "probe", _below(_trial, kill, ended))
    yield Fault("trial aborted", "probe", _below(_trial, signal.SIGABRT, ended))
    yield Fault("trial stopped, continued", "probe", _below(_trial, stop, ended, again=True))
    yield Fault("trial's keeper killed", "probe", _below(_keeper, kill, ended))
    yield Fault("fork server killed", "probe", _below(_server, kill, ended))
    yield Fault("fork server stopped", "probe", _below(_server, stop, ended))
    yield Fault("kernel kills for memory", "probe", _in_pressure, possible=_can_make_pressure)
    yield Fault("ledger's bit flipped", "probe", _damaged_ledger)
    yield Fault("ledger's folder deleted", "probe", _lost_ledger, keeps=False)
    of_ledger = _full_disk(lambda site: site.ledger.parent, 0, 60_000)
    yield Fault("ledger's disk full", "probe", of_ledger, possible=_can_mount)
    of_temporary = _full_disk(lambda site: site.temporary, 0, 20_000)
    yield Fault("temporary disk full", "probe", of_temporary, possible=_can_mount)


def _of_run() -> Iterator[Fault]:
    def output(site: Site) -> Path:
        return site.output

    yield Fault("output folder renamed", "run", _lost_folder(move=True), keeps=False)
    yield Fault("output folder deleted", "run", _lost_folder(move=False), keeps=False)
    yield Fault("disk full", "run", _full_disk(output, 0, 9_000_000), possible=_can_mount)
    yield Fault("checkpoint's data damaged", "run", _damaged("model.ckpt-*.data*", output, "bit"))
    yield Fault("checkpoint's index damaged", "run", _damaged("model.ckpt-*.index", output, "bit"))
    yield Fault("checkpoint cut", "run", _damaged("model.ckpt-*.data*", output, "cut"))
    yield Fault("state file names another", "run", _damaged("checkpoint", output, "elsewhere"))
    yield Fault("state file empty", "run", _damaged("checkpoint", output, "empty"))
    yield Fault("state file stale", "run", _between(_stale_state))
    yield Fault("line of the log damaged", "run", _damaged("train_log.jsonl", output, "line"))
    cached = _damaged("**/*", lambda site: site.cache, "bit")
    yield Fault("cached feature's bit flipped", "run", cached)


FAULTS = (*_of_both(), *_of_probe(), *_of_run())
