"""The processes behind a trial, stopped and killed: no wait is without end, nothing is left."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bertbench.core.errors import WorkError
from bertbench.trials import fork_client, isolation, temporary_folders
from bertbench.trials.fork_server import NUMBER
from bertbench.trials.temporary_folders import remove_abandoned, temporary_folder
from helpers.isolated import run, start_script, wait_until_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fork_client._stop()
    monkeypatch.setattr(fork_client, "PRELOAD", "json")  # imported at once
    monkeypatch.setattr(fork_client, "REPLY_SECONDS", 3.0)
    monkeypatch.setattr(isolation, "KILL_SECONDS", 1.0)
    run("echo")  # the server is up
    yield
    # A test may have left one that is stopped.
    fork_client._stop()


def server_pid() -> int:
    assert fork_client._server is not None
    return fork_client._server.process.pid


@pytest.mark.parametrize(
    ("how", "words"),
    [("SIGSTOP", "did not answer within 3 s"), ("SIGKILL", "was killed by SIGKILL")],
)
def test_another_server_takes_over(
    how: str, words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = server_pid()
    os.kill(old, getattr(signal, how))
    [message], ending = run("echo")
    assert ending.exit_code == 0
    wait_until_gone([old, message["pid"]])
    said = capfd.readouterr().err
    assert said == f"the process that starts trials {words}: starting another one\n"


def test_a_server_that_is_stopped_while_it_starts_is_replaced(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Long before the time that a slow disk is given."""
    python = tmp_path / "python"
    stop_once = f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; kill -STOP $$; }}"
    python.write_text(f'#!/bin/sh\n{stop_once}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    fork_client._stop()
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(fork_client, "_ASK_EVERY_SECONDS", 0.1)
    _, ending = run("echo")
    assert ending.exit_code == 0
    said = capfd.readouterr().err
    assert said == "the process that starts trials was stopped for 3 s: starting another one\n"


@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL"])
def test_a_trial_does_not_need_its_server_any_more(how: str) -> None:
    old = server_pid()
    _, ending = run(
        "crash", {"how": "exit"}, on_message=lambda message: os.kill(old, getattr(signal, how))
    )
    assert (ending.exit_code, ending.stopped, ending.timed_out) == (7, "", False)


@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL"])
@pytest.mark.parametrize("then", ["end", "hang"])
def test_a_trial_whose_end_nobody_tells(how: str, then: str) -> None:
    """It is ended, in a bounded time, and it means nothing."""
    pids: list[int] = []
    payload = {"then": then, "to_supervisor": how}
    _, ending = run(
        "start_grandchild",
        payload,
        on_message=lambda message: pids.extend([*message["pids"], message["supervisor"]]),
        timeout_seconds=3.0,
    )
    assert (ending.timed_out, "not known" in ending.stopped) in [(True, False), (False, True)]
    wait_until_gone(pids[:2])
    os.kill(pids[-1], signal.SIGKILL) if how == "SIGSTOP" else None


def test_a_server_that_cannot_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ImportError: no such thing >&2\nexit 3\n")
    python.chmod(0o755)
    fork_client._stop()
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(WorkError, match=r"exit code 3 \(ImportError: no such thing\), twice$"):
        run("echo")
    python.write_text("#!/bin/sh\nsleep 600\n")
    monkeypatch.setattr(fork_client, "START_SECONDS", 0.5)
    with pytest.raises(WorkError, match=r"was not ready within 0\.5 s, twice$"):
        run("echo")


def test_a_system_that_allows_no_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server says whose fork was refused."""
    near, far = socket.socketpair()

    def refuse() -> None:
        _, numbers, _, _ = socket.recv_fds(far, 1, 5)
        os.write(numbers[-1], NUMBER.pack(-errno.EAGAIN))
        for number in numbers:
            os.close(number)

    threading.Thread(target=refuse).start()
    server = fork_client._server
    assert server is not None
    monkeypatch.setattr(
        fork_client, "_server", fork_client._Server(os.getpid(), server.process, near, server.log)
    )
    with pytest.raises(BlockingIOError):
        run("echo")
    far.close()


def test_no_trial_beside_one_that_cannot_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def stop_supervisor(message: dict[str, Any]) -> None:
        pids.extend(message["pids"])
        pids.append(psutil.Process(pids[0]).ppid())
        os.kill(pids[-1], signal.SIGSTOP)

    with monkeypatch.context() as patch:
        patch.setattr(isolation, "_is_running", lambda pid: True)  # as a driver may hold it
        _, ending = run(
            "start_grandchild", {"then": "hang"}, on_message=stop_supervisor, timeout_seconds=1.0
        )
        assert (ending.exit_code, ending.timed_out) == (None, True)
        with pytest.raises(WorkError, match=f"process {pids[0]} of an earlier trial cannot be"):
            run("echo")
    os.kill(pids[-1], signal.SIGKILL)
    _, ending = run("echo")
    assert ending.exit_code == 0


def test_without_a_fork_each_trial_imports_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems where a fork is unsafe."""
    fork_client._stop()
    monkeypatch.setattr(fork_client, "PRELOAD", "")
    [message], ending = run("echo", {"a": 1})
    assert message["payload"] == {"a": 1}
    assert ending.exit_code == 0


def test_a_killed_parent_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    with start_script(tmp_path, "hang") as script:
        assert script.stdout is not None
        script.stdout.readline()
        pids = [int(pid) for pid in script.stdout.readline().split()]
        pids.append(psutil.Process(pids[0]).ppid())
        assert list(place.iterdir())
        script.kill()
    wait_until_gone(pids)
    assert not list(place.iterdir())


def test_a_long_place_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / ("x" * 120)
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    with start_script(tmp_path, "end") as script:
        output, _ = script.communicate(timeout=120)
    assert script.returncode == 0
    assert output.endswith("script ends\n")
    assert not list(place.iterdir())


def test_what_a_killed_process_left_goes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary_folders.tempfile, "tempdir", str(tmp_path))
    abandoned = tmp_path / f"{temporary_folders.PREFIX}abandoned"
    (abandoned / "inside").mkdir(parents=True)
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / f"{temporary_folders.PREFIX}link").symlink_to(kept)
    (tmp_path / "bertbench-demo-1").mkdir()
    with temporary_folder() as used:
        assert not abandoned.exists()
        remove_abandoned.cache_clear()
        remove_abandoned(str(tmp_path))
        assert used.is_dir()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["bertbench-demo-1", f"{temporary_folders.PREFIX}link", "kept"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_s_folder_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"{temporary_folders.PREFIX}other"
    other.mkdir()
    os.chown(other, 12345, 12345)
    remove_abandoned.cache_clear()
    remove_abandoned(str(tmp_path))
    assert other.is_dir()


def test_a_request_crosses_as_it_is() -> None:
    """Also names that are not UTF-8, as the system may have them in an environment."""
    environment = {"PATH": os.fsdecode(b"/\xff/\xc3\xbc")}
    [message], _ = run("echo", environment=environment)
    assert message["environment"]["PATH"] == environment["PATH"]
