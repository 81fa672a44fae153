"""Usable cores: the files in which Linux states quotas, as containers and services see them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from vitfold.cores import check_threads, cpu_quota, most_threads, usable_cores
from vitfold.errors import EngineError

V2 = "29 23 0:26 {below} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 32 0:30 {below} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "36 32 0:33 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory"
DISK = "24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"
CPU = "sys/fs/cgroup/cpu,cpuacct"
NEW = "sys/fs/cgroup"


def v2(path: str, limits: Mapping[str, str], below: str = "/") -> dict[str, str]:
    files = {f"{NEW}/{folder}cpu.max": text for folder, text in limits.items()}
    return {"proc/self/cgroup": f"0::{path}\n", "proc/self/mountinfo": f"{DISK}\n{V2.format(below=below)}\n", **files}


def v1(path: str, limits: Mapping[str, tuple[str, str]], below: str = "/") -> dict[str, str]:
    files = {f"{CPU}/{folder}cpu.cfs_quota_us": quota for folder, (quota, _) in limits.items()}
    files |= {f"{CPU}/{folder}cpu.cfs_period_us": period for folder, (_, period) in limits.items()}
    groups = f"12:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:{path}\n"
    mounts = f"{DISK}\n{V1_MEMORY}\n{V1.format(below=below)}\n"
    return {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}


QUOTAS: tuple[tuple[str, dict[str, str], float | None], ...] = (
    ("no control groups", {}, None),
    ("docker --cpus=2, version 2", v2("/", {"": "200000 100000\n"}), 2.0),
    ("docker --cpus=1.5, version 2", v2("/", {"": "150000 100000\n"}), 1.5),
    ("no limit, version 2", v2("/", {"": "max 100000\n"}), None),
    ("a limit without a period", v2("/", {"": "50000\n"}), 0.5),
    ("a service of systemd", v2("/system.slice/vit.service", {"system.slice/vit.service/": "300000 100000\n"}), 3.0),
    (
        "a group above that allows less",
        v2("/kubepods/burstable/pod1", {"kubepods/": "400000 100000", "kubepods/burstable/pod1/": "800000 100000"}),
        4.0,
    ),
    (
        "a group above without a limit",
        v2("/kubepods/pod1", {"kubepods/": "max 100000", "kubepods/pod1/": "250000 100000"}),
        2.5,
    ),
    ("a group outside of the container's name space", v2("/../../other", {"": "200000 100000"}), 2.0),
    ("a mount of the container's own group", v2("/docker/abc", {"": "200000 100000"}, below="/docker/abc"), 2.0),
    ("docker --cpus=2, version 1", v1("/docker/abc", {"": ("200000\n", "100000\n")}, below="/docker/abc"), 2.0),
    ("Kubernetes, version 1", v1("/kubepods/pod1", {"kubepods/pod1/": ("50000", "100000")}), 0.5),
    ("no limit, version 1", v1("/", {"": ("-1\n", "100000\n")}), None),
    ("another period, version 1", v1("/a", {"a/": ("30000", "10000")}), 3.0),
    ("a quota without a period, version 1", {**v1("/a", {"a/": ("30000", "")})}, None),
    (
        "both versions, the limit in the first",
        {**v1("/a", {"a/": ("200000", "100000")}), "proc/self/cgroup": "4:cpu,cpuacct:/a\n0::/a\n"},
        2.0,
    ),
    ("files that hold nonsense", v2("/", {"": "many few\n"}), None),
    ("an empty file", v2("/", {"": ""}), None),
    ("a period of nothing", v2("/", {"": "100000 0\n"}), None),
    ("a quota of nothing", v2("/", {"": "0 100000\n"}), None),
    ("lines that are none", {"proc/self/cgroup": "nonsense\n::\n\n", "proc/self/mountinfo": "a b\n - \n"}, None),
)


def lay(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(("files", "quota"), [case[1:] for case in QUOTAS], ids=[case[0] for case in QUOTAS])
def test_quotas_are_read_where_linux_states_them(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(lay(tmp_path, files)) == quota
    allowed = len(os.sched_getaffinity(0))
    expected = allowed if quota is None else min(allowed, {0.5: 1, 1.5: 2, 2.5: 3}.get(quota, int(quota)))
    assert usable_cores(tmp_path) == expected


def test_a_quota_never_gives_more_than_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(lay(tmp_path, v2("/", {"": "100000000 100000"}))) == len(os.sched_getaffinity(0))


def test_threads_are_one_per_usable_core_unless_named() -> None:
    assert check_threads(None) == usable_cores()
    assert check_threads(1) == 1
    assert check_threads(most_threads()) == most_threads() >= 4 * usable_cores()
    with pytest.raises(EngineError, match=rf"leave it out for one per usable core \({usable_cores()}\)"):
        check_threads(most_threads() + 1)
