# SPDX-License-Identifier: Apache-2.0
"""What the host must have for a service of a given size: looked at before the start, printed by `serve` and `doctor`.

Each finding says what is required, what is there and what helps. All that is read of the host goes through a `Host`,
so that every check is a function of what a file says. The size of /dev/shm is not among them: the arena is a memfd,
which does not count there.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from kvstore.errors import ConfigError
from kvstore.numa import NONE, chosen_node, nodes_of_gpus, nodes_with_memory, pci_devices

_CAP_IPC_LOCK = 14
_CGROUPS = "/sys/fs/cgroup"
_FUTURE_WRITE = 0x10
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number of pages near 2^63 for "none"
_SO_PEERPIDFD = 77
_SHMEM_HUGE = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
_ROOM_BYTES = 256 << 20
"""Beside the arena: the process, its index, buffers."""
_FILES_A_CLIENT = 3
"""Its connection, its pidfd, and the socket it came by."""
_ROOM_FILES = 256
"""Beside clients: the arena, listeners, pools of lower tiers, admins, log files."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the preflight.

    Attributes:
        name: what was looked at.
        ok: whether it is as required.
        required, available: for people, with units; nothing is required where that is empty.
        fix: what to do where it is not ok; empty where it is.
        needed: False where the service runs without it, slower.
    """

    name: str
    ok: bool
    required: str
    available: str
    fix: str = ""
    needed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What is going to be started.

    Attributes:
        capacity_bytes: of the arena. 0 where it runs already, so that memory is not asked for a second time.
        pin_memory: it is going to be locked in memory.
        huge_pages: it is to come from the reserved 2 MiB pages.
        max_sessions: clients at once; 0 where that is not asked.
        numa_node: as in the settings of the host tier.
    """

    capacity_bytes: int
    pin_memory: bool = False
    huge_pages: bool = False
    max_sessions: int = 0
    numa_node: str = NONE


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _memlock_bytes() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _max_files() -> int | None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard


def lift_file_limit(max_sessions: int) -> None:
    """Raise this process's soft limit of open files to what so many clients take, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _files_for(max_sessions)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _files_for(max_sessions: int) -> int:
    return _FILES_A_CLIENT * max_sessions + _ROOM_FILES


def _can_seal() -> bool:
    """Tried, since no file says it: a memfd sealed in size, and against writers to come."""
    try:
        fd = os.memfd_create("kvstore-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return False
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _FUTURE_WRITE)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _can_watch() -> str:
    """How a client's process can be watched: "peer" by its socket, "pid" by its id, "" not at all."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
            return "peer"
        except OSError:
            pass
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return ""
    return "pid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What is read of the host.

    Attributes:
        read: text of a file, None where it cannot be read.
        memlock_bytes: soft RLIMIT_MEMLOCK, None for no limit.
        max_files: hard RLIMIT_NOFILE, None for no limit: `lift_file_limit` raises the soft one.
        can_seal: whether memfds can be sealed as the arena needs.
        can_watch: "peer", "pid" or "": see `_can_watch`.
        kernel: release of the kernel.
        pci_devices: names of what is plugged in.
    """

    read: Callable[[str], str | None] = _read
    memlock_bytes: Callable[[], int | None] = _memlock_bytes
    max_files: Callable[[], int | None] = _max_files
    can_seal: Callable[[], bool] = _can_seal
    can_watch: Callable[[], str] = _can_watch
    kernel: str = field(default_factory=lambda: os.uname().release)
    pci_devices: Callable[[], list[str]] = pci_devices


def preflight(needs: Needs, host: Host | None = None) -> list[Finding]:
    """Every check that applies, in the order they are worth reading. Raises nothing."""
    host = host or Host()
    findings = [_seals(host), _pidfd(host)]
    if needs.huge_pages:
        findings.append(_reserved_huge_pages(needs.capacity_bytes, host))
    else:
        findings.append(_available_memory(needs.capacity_bytes, host))
    findings.append(_memory_node(needs.numa_node, host))
    findings.append(_cgroup(needs.capacity_bytes, host))
    if needs.pin_memory:
        findings.append(_memlock(needs.capacity_bytes, host))
    if needs.max_sessions:
        findings.append(_open_files(needs.max_sessions, host))
    if not needs.huge_pages:
        findings.append(_transparent_huge_pages(host))
    return findings


# -- memory ----------------------------------------------------------------------------------------------------


def _meminfo(host: Host) -> dict[str, int]:
    """Numbers of /proc/meminfo: bytes, and plain counts."""
    found = {}
    for line in (host.read("/proc/meminfo") or "").splitlines():
        if match := re.match(r"(\w+):\s+(\d+)( kB)?", line):
            found[match[1]] = int(match[2]) * (1024 if match[3] else 1)
    return found


def _available_memory(capacity_bytes: int, host: Host) -> Finding:
    available = _meminfo(host).get("MemAvailable")
    need = capacity_bytes + _ROOM_BYTES if capacity_bytes else 0
    if available is None:
        return Finding("memory", True, size(need), "unknown: /proc/meminfo does not say")
    ok = need <= available
    fix = (
        f"lower host.capacity_bytes to {size(max(0, available - _ROOM_BYTES))} or free memory; after a crash, wait "
        "until clients have let go of the old arena"
    )
    return Finding("memory", ok, size(need), size(available), "" if ok else fix)


def _reserved_huge_pages(capacity_bytes: int, host: Host) -> Finding:
    info = _meminfo(host)
    page = info.get("Hugepagesize", 2 << 20)
    need = -(-capacity_bytes // page)
    free = max(0, info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0))
    ok = need <= free
    more = info.get("HugePages_Total", 0) + need - free
    fix = f"sysctl vm.nr_hugepages={more}, best at boot, or turn host.huge_pages off"
    return Finding("huge pages", ok, f"{need} × {size(page)}", f"{free} × {size(page)}", "" if ok else fix)


def _transparent_huge_pages(host: Host) -> Finding:
    name, wanted = "transparent huge pages", "always or advise"
    text = host.read(_SHMEM_HUGE)
    chosen = re.search(r"\[(\w+)\]", text or "")
    if chosen is None:
        fix = "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
        return Finding(name, False, wanted, "not in this kernel", fix, needed=False)
    if chosen[1] == "never" and _release(host.kernel) >= (6, 1):
        found = "set to never, which Linux 6.1 and later heed only where a program does not ask for them: kvstore asks"
        return Finding(name, True, "", found, needed=False)
    ok = chosen[1] not in ("never", "deny")
    fix = f"echo advise > {_SHMEM_HUGE}: clients then map the arena at once instead of page by page"
    return Finding(name, ok, wanted, chosen[1], "" if ok else fix, needed=False)


def _memory_node(setting: str, host: Host) -> Finding:
    """Which node the arena's memory comes from: another than the GPUs' costs copies some of the link's rate."""
    nodes, name = nodes_with_memory(host.read), "memory node"
    try:
        node = chosen_node(setting, host.read, host.pci_devices)
    except ConfigError as error:
        return Finding(name, False, setting, f"nodes {nodes}", str(error))
    if node is not None:
        return Finding(name, True, setting, f"node {node} of {len(nodes)}")
    near = nodes_of_gpus(host.read, host.pci_devices)
    if setting == NONE or len(nodes) < 2 or len(near) < 2:
        return Finding(name, True, setting, "there is one" if len(nodes) == 1 else "any")
    fix = "run a sidecar a node, each with its own host.numa_node, or set that to none"
    return Finding(name, False, setting, f"any: there are GPUs at nodes {near}", fix, needed=False)


# -- limits ----------------------------------------------------------------------------------------------------


def _cgroup(capacity_bytes: int, host: Host) -> Finding:
    """The tightest memory limit above this process. What the page cache could give back counts as free."""
    need = capacity_bytes + _ROOM_BYTES if capacity_bytes else 0
    levels = [level for level in _levels(host) if level[1] < _NO_LIMIT]
    if not levels:
        return Finding("cgroup memory limit", True, size(need), "no limit")
    path, limit, used = min(levels, key=lambda level: level[1] - level[2])
    free = max(0, limit - used)
    ok = need <= free
    fix = (
        f"raise the memory limit of the container or unit ({path}) to {size(used + need)}, or lower "
        f"host.capacity_bytes to {size(max(0, free - _ROOM_BYTES))}"
    )
    return Finding("cgroup memory limit", ok, size(need), f"{size(free)} of {size(limit)}", "" if ok else fix)


def _levels(host: Host) -> list[tuple[str, int, int]]:
    """(directory, limit, bytes in use that cannot be reclaimed) of each level that has a limit, v1 and v2."""
    found: list[tuple[str, int, int]] = []
    for line in (host.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit_file, used_file = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, used_file = f"{_CGROUPS}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, of which only the root is to be seen here.
        for level in (PurePosixPath(path), *PurePosixPath(path).parents):
            directory = f"{base}{level}".rstrip("/")
            limit, used = (
                _number(host.read(f"{directory}/{limit_file}")),
                _number(host.read(f"{directory}/{used_file}")),
            )
            if limit is not None:
                found.append((directory, limit, max(0, (used or 0) - _reclaimable(directory, host))))
    return found


def _reclaimable(directory: str, host: Host) -> int:
    text = host.read(f"{directory}/memory.stat") or ""
    match = re.search(r"^total_inactive_file (\d+)$", text, re.M) or re.search(r"^inactive_file (\d+)$", text, re.M)
    return int(match[1]) if match else 0


def _memlock(capacity_bytes: int, host: Host) -> Finding:
    name, limit = "locked memory limit", host.memlock_bytes()
    capabilities = re.search(r"^CapEff:\s+([0-9a-f]+)$", host.read("/proc/self/status") or "", re.M)
    if capabilities and int(capabilities[1], 16) >> _CAP_IPC_LOCK & 1:
        return Finding(name, True, size(capacity_bytes), "no limit (CAP_IPC_LOCK)")
    if limit is None:
        return Finding(name, True, size(capacity_bytes), "no limit")
    ok = capacity_bytes <= limit
    fix = (
        "set LimitMEMLOCK=infinity in the systemd unit, memlock in /etc/security/limits.conf, or --ulimit memlock=-1 "
        "for a container; or turn service.pin_memory off"
    )
    return Finding(name, ok, size(capacity_bytes), size(limit), "" if ok else fix)


def _open_files(max_sessions: int, host: Host) -> Finding:
    """Without them the last clients find no room; the others are served."""
    name, need, limit = "open files limit", _files_for(max_sessions), host.max_files()
    required = f"{need} for {max_sessions} clients"
    if limit is None:
        return Finding(name, True, required, "no limit", needed=False)
    ok = need <= limit
    fits = max(1, (limit - _ROOM_FILES) // _FILES_A_CLIENT)
    fix = (
        f"set LimitNOFILE={need} in the systemd unit, nofile in /etc/security/limits.conf, or --ulimit nofile={need} "
        f"for a container; or lower service.max_sessions to {fits}"
    )
    return Finding(name, ok, required, str(limit), "" if ok else fix, needed=False)


# -- kernel ----------------------------------------------------------------------------------------------------


def _seals(host: Host) -> Finding:
    ok = host.can_seal()
    fix = "run on Linux 5.1 or newer, and let the container's seccomp profile pass memfd_create and fcntl"
    return Finding("sealed shared memory", ok, "memfd with F_SEAL_FUTURE_WRITE", _there(ok, host), "" if ok else fix)


def _pidfd(host: Host) -> Finding:
    how = host.can_watch()
    available = {"peer": "by socket", "pid": "by process id: clients must share the PID namespace"}.get(how)
    fix = "run on Linux 6.5 or newer, or 5.3 with a seccomp profile that passes pidfd_open"
    return Finding("watching clients", bool(how), "pidfd", available or _there(False, host), "" if how else fix)


def _there(ok: bool, host: Host) -> str:
    return f"{'there' if ok else 'refused'} (Linux {host.kernel})"


def _release(kernel: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", kernel)[:2])


def _number(text: str | None) -> int | None:
    """The number in a cgroup's file; None where there is no such file or no limit in it."""
    text = (text or "").strip()
    return int(text) if text.isdigit() else None


def size(num_bytes: int) -> str:
    """For people: one decimal, binary units."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
