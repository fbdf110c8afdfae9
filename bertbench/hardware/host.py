"""Host memory as the kernel reports it: total, free, and the number of OOM kills."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")

# Version 1 writes "no limit" as the largest multiple of the page size in 63 bits.
_NO_LIMIT_BYTES = 1 << 60


def host_memory() -> tuple[int, int]:
    """Return the bytes of host memory that this process may use, and how many of them are free."""
    memory = psutil.virtual_memory()
    total_bytes, free_bytes = int(memory.total), int(memory.available)
    for limit_bytes, used_bytes in cgroup_limits(memory_cgroups()):
        total_bytes = min(total_bytes, limit_bytes)
        free_bytes = min(free_bytes, max(limit_bytes - used_bytes, 0))
    return total_bytes, free_bytes


def memory_cgroups(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUPS) -> list[Path]:
    """Return the folders of the control groups that limit this process's memory, innermost first.

    Both versions of control groups are supported. In a container the kernel may name a path that is
    not mounted; its nearest ancestor that exists is taken instead.

    Args:
        root: where control groups are mounted.
        own: the file in which the kernel lists this process's groups.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mounts = [root, root / "unified"]
        elif "memory" in controllers.split(","):
            mounts = [root / "memory"]
        else:
            continue
        for mount in mounts:
            folder = mount / group.lstrip("/")
            while folder != mount.parent:
                if (folder / "memory.max").exists() or (folder / "memory.limit_in_bytes").exists():
                    folders.append(folder)
                folder = folder.parent
    return folders


def cgroup_limits(folders: list[Path]) -> list[tuple[int, int]]:
    """Return the limit and the used memory, in bytes, of each control group that has a limit.

    Pages of files do not count as used, because the kernel can drop them.
    """
    limits = []
    for folder in folders:
        limit_bytes = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used_bytes = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit_bytes is None or used_bytes is None or limit_bytes >= _NO_LIMIT_BYTES:
            continue
        counters = _counters(folder / "memory.stat")
        cached_bytes = sum(
            counters.get(f"total_{name}", counters.get(name, 0))
            for name in ("inactive_file", "active_file")
        )
        limits.append((limit_bytes, max(used_bytes - cached_bytes, 0)))
    return limits


def oom_kill_counts(folders: list[Path] | None = None, vmstat: Path = VMSTAT) -> dict[str, int]:
    """Count the processes that the kernel's OOM killer has ended.

    A count that has grown while a child process ended shows that the kernel killed it for memory.

    Returns:
        The count in each file that has one; empty if this machine does not count.
    """
    counts = {}
    for folder in memory_cgroups() if folders is None else folders:
        for name in ("memory.events", "memory.oom_control"):
            count = _counters(folder / name).get("oom_kill")
            if count is not None:
                counts[str(folder / name)] = count
    count = _counters(vmstat).get("oom_kill")
    if count is not None:
        counts[str(vmstat)] = count
    return counts


def _number(*candidates: Path) -> int | None:
    for path in candidates:
        try:
            text = path.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _counters(path: Path) -> dict[str, int]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
