# SPDX-License-Identifier: Apache-2.0
"""What is said of a host before the start: of hosts made up file by file, and of this one."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import replace

import pytest

from kvstore.service.preflight import Finding, Host, Needs, lift_file_limit, preflight

GIB = 1 << 30
MEMINFO = """MemTotal:       65536000 kB
MemFree:          100000 kB
MemAvailable:   {available_kb} kB
HugePages_Total:    {total}
HugePages_Free:     {free}
HugePages_Rsvd:     {reserved}
Hugepagesize:       2048 kB
"""


def meminfo(available: int = 32 * GIB, total: int = 0, free: int = 0, reserved: int = 0) -> str:
    return MEMINFO.format(available_kb=available // 1024, total=total, free=free, reserved=reserved)


HEALTHY: Mapping[str, str] = {
    "/proc/meminfo": meminfo(),
    "/proc/self/cgroup": "0::/kv.slice/kv.service\n",
    "/proc/self/status": "CapEff:\t0000000000000000\n",
    "/sys/devices/system/node/has_memory": "0\n",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force\n",
}


def host(
    files: Mapping[str, str] | None = None,
    *,
    memlock: int | None = None,
    max_files: int | None = None,
    kernel: str = "6.8.0",
    watch: str = "peer",
    gpus: Mapping[str, int] | None = None,
) -> Host:
    """A healthy host with some of its files replaced."""
    plugged = {"0000:00:1f.0": {"vendor": "0x8086", "class": "0x060100", "numa_node": "0"}}
    for name, node in (gpus or {}).items():
        plugged[name] = {"vendor": "0x10de", "class": "0x030200", "numa_node": str(node)}
    devices = {
        f"/sys/bus/pci/devices/{name}/{key}": f"{text}\n" for name, of in plugged.items() for key, text in of.items()
    }
    return Host(
        read={**HEALTHY, **devices, **(files or {})}.get,
        pci_devices=lambda: list(plugged),
        memlock_bytes=lambda: memlock,
        max_files=lambda: max_files,
        can_seal=lambda: True,
        can_watch=lambda: watch,
        kernel=kernel,
    )


def finding(name: str, needs: Needs, on: Host) -> Finding:
    (found,) = [each for each in preflight(needs, on) if each.name == name]
    assert bool(found.fix) != found.ok
    return found


def test_a_healthy_host_is_ok_throughout() -> None:
    found = preflight(Needs(capacity_bytes=8 * GIB, pin_memory=True, max_sessions=1024), host())
    assert [each.name for each in found if not each.ok] == []
    assert len({each.name for each in found}) == len(found) == 8


def test_this_host_can_share_and_watch() -> None:
    found = {each.name: each for each in preflight(Needs(capacity_bytes=1 << 20, pin_memory=True))}
    assert found["sealed shared memory"].ok
    assert found["watching clients"].ok
    assert found["memory"].ok


def test_less_memory_than_the_arena_takes_is_said_with_what_fits() -> None:
    found = finding("memory", Needs(capacity_bytes=8 * GIB), host({"/proc/meminfo": meminfo(4 * GIB)}))
    assert (found.ok, found.required, found.available) == (False, "8.2 GiB", "4 GiB")
    assert "lower host.capacity_bytes to 3.8 GiB" in found.fix
    assert finding("memory", Needs(capacity_bytes=3 * GIB), host({"/proc/meminfo": meminfo(4 * GIB)})).ok
    assert finding("memory", Needs(capacity_bytes=0), host({"/proc/meminfo": meminfo(0)})).ok  # runs already


def test_a_host_that_hides_its_memory_is_given_the_benefit_of_the_doubt() -> None:
    assert finding("memory", Needs(capacity_bytes=GIB), host({"/proc/meminfo": ""})).ok


@pytest.mark.parametrize(
    ("files", "available"),
    [
        pytest.param(
            {
                "/sys/fs/cgroup/kv.slice/kv.service/memory.max": "max\n",
                "/sys/fs/cgroup/kv.slice/memory.max": f"{6 * GIB}\n",
                "/sys/fs/cgroup/kv.slice/memory.current": f"{2 * GIB}\n",
                "/sys/fs/cgroup/kv.slice/memory.stat": f"anon 5\ninactive_file {GIB}\nfile 9\n",
            },
            "5 GiB of 6 GiB",
            id="v2, the limit one level up, page cache counted as free",
        ),
        pytest.param(
            {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": str(4 * GIB)},
            "4 GiB of 4 GiB",
            id="v2 in a container that sees its own group as the root",
        ),
        pytest.param(
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(3 * GIB),
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(2 * GIB),
                "/sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
            },
            "2 GiB of 3 GiB",
            id="v1 in a container that is named by the host's path",
        ),
        pytest.param(
            {
                "/sys/fs/cgroup/kv.slice/kv.service/memory.max": str(7 * GIB),
                "/sys/fs/cgroup/kv.slice/memory.max": str(9 * GIB),
                "/sys/fs/cgroup/kv.slice/memory.current": str(8 * GIB),
            },
            "1 GiB of 9 GiB",
            id="the level with the least room counts",
        ),
    ],
)
def test_the_tightest_cgroup_limit_is_found(files: Mapping[str, str], available: str) -> None:
    found = finding("cgroup memory limit", Needs(capacity_bytes=8 * GIB), host(files))
    assert (found.ok, found.available) == (False, available)
    assert "raise the memory limit of the container or unit (/sys/fs/cgroup" in found.fix
    assert finding("cgroup memory limit", Needs(capacity_bytes=GIB // 2), host(files)).ok


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"/sys/fs/cgroup/kv.slice/kv.service/memory.max": "max"},
        {
            "/proc/self/cgroup": "4:memory:/\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
        {"/proc/self/cgroup": ""},
    ],
)
def test_no_cgroup_limit_is_none(files: Mapping[str, str]) -> None:
    found = finding("cgroup memory limit", Needs(capacity_bytes=8 * GIB), host(files))
    assert (found.ok, found.available) == (True, "no limit")


def test_locked_memory_is_looked_at_only_where_pinning_is_asked() -> None:
    needs, tight = Needs(capacity_bytes=8 * GIB, pin_memory=True), host(memlock=8 << 20)
    found = finding("locked memory limit", needs, tight)
    assert (found.ok, found.required, found.available) == (False, "8 GiB", "8 MiB")
    assert "LimitMEMLOCK=infinity" in found.fix
    assert finding("locked memory limit", needs, host(memlock=8 * GIB)).ok
    assert finding("locked memory limit", needs, host(memlock=None)).ok
    assert all(each.ok for each in preflight(replace(needs, pin_memory=False), tight))


def test_the_capability_to_lock_memory_needs_no_limit() -> None:
    able = host({"/proc/self/status": "CapPrm:\t0\nCapEff:\t0000000000004000\n"}, memlock=0)
    found = finding("locked memory limit", Needs(capacity_bytes=GIB, pin_memory=True), able)
    assert (found.ok, found.available) == (True, "no limit (CAP_IPC_LOCK)")
    other = host({"/proc/self/status": "CapEff:\t0000000000002000\n"}, memlock=0)
    assert not finding("locked memory limit", Needs(capacity_bytes=GIB, pin_memory=True), other).ok


def test_reserved_huge_pages_take_the_place_of_available_memory() -> None:
    needs = Needs(capacity_bytes=GIB, huge_pages=True)
    files = {"/proc/meminfo": meminfo(available=0, total=600, free=520, reserved=20)}
    found = finding("huge pages", needs, host(files))
    assert (found.ok, found.required, found.available) == (False, "512 × 2 MiB", "500 × 2 MiB")
    assert "vm.nr_hugepages=612" in found.fix
    assert "memory" not in {each.name for each in preflight(needs, host(files))}
    assert finding("huge pages", needs, host({"/proc/meminfo": meminfo(total=512, free=512)})).ok


@pytest.mark.parametrize(
    ("text", "kernel", "ok"),
    [
        ("always within_size [advise] never deny force", "5.15.0", True),
        ("[always] within_size advise never deny force", "5.15.0", True),
        ("always within_size advise [never] deny force", "5.15.0-101-generic", False),
        ("always within_size advise [never] deny force", "6.1.0", True),
        ("always within_size advise never [deny] force", "6.8.0", False),
        ("", "6.8.0", False),
    ],
)
def test_transparent_huge_pages_are_wished_for_and_not_needed(text: str, kernel: str, ok: bool) -> None:
    files = {"/sys/kernel/mm/transparent_hugepage/shmem_enabled": text}
    found = finding("transparent huge pages", Needs(capacity_bytes=GIB), host(files, kernel=kernel))
    assert (found.ok, found.needed) == (ok, False)
    chosen = text.partition("[")[2].partition("]")[0]
    assert not found.ok or not found.required or chosen in ("always", "advise"), "it asks for nothing that it waives"


def test_a_kernel_that_cannot_seal_or_watch_is_named() -> None:
    old = replace(host(kernel="4.18.0", watch=""), can_seal=lambda: False)
    for name in ("sealed shared memory", "watching clients"):
        found = finding(name, Needs(capacity_bytes=GIB), old)
        assert (found.ok, found.needed) == (False, True)
        assert "4.18.0" in found.available
        assert "Linux" in found.fix
    by_id = finding("watching clients", Needs(capacity_bytes=GIB), host(watch="pid"))
    assert by_id.ok
    assert "share the PID namespace" in by_id.available


def test_too_few_open_files_are_said_with_how_many_clients_they_are_enough_for() -> None:
    needs = Needs(capacity_bytes=GIB, max_sessions=1024)
    found = finding("open files limit", needs, host(max_files=1024))
    assert (found.required, found.available, found.needed) == ("3328 for 1024 clients", "1024", False)
    assert "LimitNOFILE=3328" in found.fix
    assert found.fix.endswith("lower service.max_sessions to 256")
    assert finding("open files limit", replace(needs, max_sessions=256), host(max_files=1024)).ok
    assert finding("open files limit", needs, host(max_files=None)).ok


def test_the_soft_limit_of_open_files_is_lifted_as_far_as_the_hard_one_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        lift_file_limit(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (556, before[1])
        lift_file_limit(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (556, before[1]), "never lowered"
        lift_file_limit(1 << 40)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


TWO_NODES = {"/sys/devices/system/node/has_memory": "0-1\n"}


@pytest.mark.parametrize(
    ("setting", "files", "gpus", "ok", "available"),
    [
        ("auto", {}, {"0000:01:00.0": 0}, True, "there is one"),
        ("auto", TWO_NODES, {}, True, "any"),
        ("auto", TWO_NODES, {"0000:01:00.0": -1}, True, "any"),
        ("auto", TWO_NODES, {"0000:01:00.0": 1, "0000:02:00.0": 1}, True, "node 1 of 2"),
        ("auto", TWO_NODES, {"0000:01:00.0": 0, "0000:81:00.0": 1}, False, "any: there are GPUs at nodes [0, 1]"),
        ("none", TWO_NODES, {"0000:01:00.0": 0, "0000:81:00.0": 1}, True, "any"),
        ("1", TWO_NODES, {"0000:01:00.0": 0, "0000:81:00.0": 1}, True, "node 1 of 2"),
        ("4", TWO_NODES, {}, False, "nodes [0, 1]"),
    ],
)
def test_the_arenas_node_is_that_of_the_gpus_where_all_are_at_one(
    setting: str, files: Mapping[str, str], gpus: Mapping[str, int], ok: bool, available: str
) -> None:
    found = finding("memory node", Needs(capacity_bytes=GIB, numa_node=setting), host(files, gpus=gpus))
    assert (found.ok, found.available) == (ok, available)
    assert found.needed == (setting == "4" or found.ok)
