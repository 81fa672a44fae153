"""How many cores this process may use: what the scheduler lets it run on, and what a container's quota pays for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vitfold.errors import EngineError

ROOT = Path("/")
_THREADS_PER_CORE = 4
_THREADS = 16
"""So many threads may be asked for on any machine."""


def usable_cores(root: Path = ROOT) -> int:
    """Return the cores that this process may use: of its affinity, and within the CPU quota of its control groups.

    A quota of a part of a core counts as a whole one. `root` is where /proc and /sys lie.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = cpu_quota(root)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota - 1e-6)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the CPUs that control groups (version 1 or 2) allow this process at a time; None without a bound.

    Every group above the process's own bounds it, too; the least counts.
    """
    found = [quota for folder, version in _groups(root) if (quota := _quota(folder, version)) is not None]
    return min(found, default=None)


def check_threads(threads: int | None) -> int:
    """Return a number of threads: the one asked for, or one for each usable core.

    Raises:
        EngineError: if it is no whole number, below 1, or more than this machine could use.
    """
    if threads is None:
        return usable_cores()
    most = most_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        raise EngineError(
            f"threads has to be a whole number of 1 to {most} on this machine, found {threads!r}; leave it out for one "
            f"per usable core ({usable_cores()})"
        )
    return threads


def most_threads() -> int:
    """Return the most threads that may be asked for: four per core of the machine, and sixteen anywhere."""
    return max(_THREADS, _THREADS_PER_CORE * (os.cpu_count() or 1))


def _groups(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folders of the groups that bound this process, from its own up, with the version of their files."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and "cpu" not in controllers.split(","):
            continue
        for kind, options, below, mount in mounts:
            if kind != ("cgroup2" if version == 2 else "cgroup") or (version == 1 and "cpu" not in options.split(",")):
                continue
            folder = root / mount.lstrip("/")
            for part in _upwards(_relative(path, below)):
                yield folder / part, version


def _mounts(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield kind, options, the path within the file system, and the place of each mounted file system."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, behind = line.partition(" - ")
        left, right = before.split(" "), behind.split(" ")
        if len(left) >= 5 and len(right) >= 3:
            yield right[0], right[2], left[3], left[4]


def _relative(path: str, below: str) -> str:
    """Return a group's path within what is mounted; in a container the mount shows the container's own group."""
    inside = PurePosixPath(path)
    if below != "/" and inside.is_relative_to(below):
        inside = inside.relative_to(below)
    return "" if below != "/" and str(inside) == path else str(inside).lstrip("/")


def _upwards(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _quota(folder: Path, version: int) -> float | None:
    if version == 2:
        words = (" ".join(_lines(folder / "cpu.max")) or "max").split()
        limit, period = words[0], words[1] if len(words) > 1 else "100000"
    else:
        limit = "".join(_lines(folder / "cpu.cfs_quota_us"))
        period = "".join(_lines(folder / "cpu.cfs_period_us"))
    if not (limit.isdecimal() and period.isdecimal()) or int(limit) == 0 or int(period) == 0:
        return None  # "max", -1, or nothing there
    return int(limit) / int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
