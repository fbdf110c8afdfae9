"""Host memory that runs out while a real trial runs never becomes a limit.

Needs root and control groups of memory, version 1 or 2; each takes a minute or two.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bertbench.core.units import MIB_BYTES
from bertbench.hardware.host import CGROUP_ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LIMIT_MIB, BEGIN_MIB = 2000, 1150
"""Of the group, and what is in use when the other process begins: within the trial's step."""

# Takes memory page by page, says so, and keeps it for a while.
OTHER = """
import sys, time
held = bytearray(int(sys.argv[1]) << 20)
held[::4096] = b"x" * len(held[::4096])
print("holds", flush=True)
time.sleep(15)
"""


class Group:
    """A control group with a limit of memory."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        """Make it; `close` takes it away."""
        first = (CGROUP_ROOT / "memory").is_dir()
        self.folder = CGROUP_ROOT / ("memory" if first else "") / name
        self.folder.mkdir()
        limit = "memory.limit_in_bytes" if first else "memory.max"
        (self.folder / limit).write_text(str(limit_bytes))

    def join(self) -> None:
        """Put this process into it: for a child, before it runs its program."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def used_bytes(self) -> int:
        """What is in use, without file pages."""
        lines = (self.folder / "memory.stat").read_text().splitlines()
        counters = {name: int(number) for name, number in map(str.split, lines)}
        return counters.get("total_rss", counters.get("anon", 0))

    def kills(self) -> int:
        """How many processes the kernel has killed in it."""
        for name in ("memory.oom_control", "memory.events"):
            with contextlib.suppress(OSError):
                lines = (self.folder / name).read_text().splitlines()
                return int(dict(map(str.split, lines))["oom_kill"])
        raise AssertionError("the group does not count kills")

    def close(self) -> None:
        """End what is left in it and take it away."""
        for _ in range(100):
            for pid in (self.folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)


@pytest.fixture
def group() -> Iterator[Group]:
    try:
        made = Group(f"bertbench-test-{os.getpid()}", LIMIT_MIB * MIB_BYTES)
    except OSError as error:
        pytest.skip(f"no control group of memory can be made ({error})")
    yield made
    made.close()


def start_probe(folder: Path, memory: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bertbench", "probe", "--models", "bert-tiny", "--seq-lens", "128",
         "--memory", memory, "--device", "cpu", "--json", str(folder / "p.json")],
        env={**os.environ, "BERTBENCH_LEDGER": str(folder / "l.sqlite")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def result_of(probe: subprocess.Popen[str], folder: Path) -> tuple[dict[str, Any], str]:
    output, _ = probe.communicate(timeout=1500)
    (cell,) = json.loads((folder / "p.json").read_text())["cells"]
    return cell, output


@pytest.fixture(scope="module")
def limit(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What fits when nobody else takes memory."""
    folder = tmp_path_factory.mktemp("peace")
    cell, output = result_of(start_probe(folder, "700MiB"), folder)
    assert cell["certificate"] is not None, output
    return int(cell["max_batch"])


def assert_no_wrong_limit(cell: dict[str, Any], output: str, limit: int) -> None:
    for trial in cell["trials"]:
        expected = "fits" if trial["batch"] <= limit else "oom"
        assert trial["outcome"] in (expected, "failed"), trial
    assert cell["certificate"] is None or cell["max_batch"] == limit, output


@pytest.mark.parametrize("other_mib", [900, 1050])
@pytest.mark.parametrize("stopped", ["nothing", "probe", "trial"])
def test_another_process_takes_the_memory(
    tmp_path: Path, group: Group, limit: int, stopped: str, other_mib: int
) -> None:
    """With the probe stopped (Ctrl-Z) nobody but the kernel looks after memory."""
    probe = start_probe(tmp_path, "700MiB", preexec_fn=group.join)
    while group.used_bytes() < BEGIN_MIB * MIB_BYTES:
        assert probe.poll() is None, probe.communicate()[0]
        time.sleep(0.01)
    pids = {"nothing": [], "probe": [probe.pid], "trial": trials_of(group)}[stopped]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(other_mib)], preexec_fn=group.join,
        stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        while pids and other.poll() is None and not group.kills():
            time.sleep(0.05)
        time.sleep(2 * bool(pids))  # What is killed gives its memory back.
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        cell, output = result_of(probe, tmp_path)
        other.kill()
    assert_no_wrong_limit(cell, output, limit)
    assert probe.returncode == (1 if cell["stopped_by"] == "failed" else 0), output
    # Repeated in peace it finds the limit, whatever the ledger has kept.
    cell, output = result_of(start_probe(tmp_path, "700MiB"), tmp_path)
    assert cell["certificate"] is not None, output
    assert_no_wrong_limit(cell, output, limit)


def trials_of(group: Group) -> list[int]:
    """Processes of trials: those that the kernel is to kill first."""
    found = []
    for pid in (group.folder / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000":
                found.append(int(pid))
    return found


@pytest.mark.parametrize("limit_mib", [3500, 4500])
def test_a_limit_of_the_address_space(tmp_path: Path, limit_mib: int) -> None:
    """`ulimit -v`: the system refuses the budget, and batch 1 seemed not to fit."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit_mib * MIB_BYTES,) * 2)

    cell, output = result_of(start_probe(tmp_path, "2000MiB", preexec_fn=limited), tmp_path)
    assert cell["stopped_by"] == "failed", output
    assert "`ulimit -v`" in cell["message"] or limit_mib > 4000, output
    assert cell["certificate"] is None
    assert all(trial["outcome"] != "oom" for trial in cell["trials"])
