# SPDX-License-Identifier: Apache-2.0
"""`kvstore top`: what the server is doing, drawn from two looks at its counters.

`draw` is a function of two samples and nothing else. A server that goes away leaves its last figures on the
screen, said to be old, and the screen goes on when it is back.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvstore.errors import KVStoreError
from kvstore.service.admin import Admin
from kvstore.wire import kvstore_pb2 as pb

_BAR_CELLS = 8
_FIRST_LOOK_S = 0.25
_UNITS = (("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40))
_MAX_CLIENTS = 20
_COLUMNS = 80
_QUIT = ("q", "Q", "\x03", "\x1b")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look: when (seconds, monotonic), counters by name, clients."""

    time_s: float
    values: Mapping[str, float]
    clients: tuple[pb.Client, ...] = ()


@dataclass(frozen=True, slots=True)
class Server:
    """Whose figures these are."""

    address: str
    version: str
    boot_id: str


def draw(
    server: Server, now: Sample, before: Sample | None, fault: str = "", max_clients: int = _MAX_CLIENTS
) -> RenderableType:
    """The screen. Without an earlier sample rates are left out; `fault` says why the figures are old."""
    parts: list[RenderableType] = [_head(server, fault), Text(), _tiers(now, before)]
    for tier in tiers_away(now.values):
        parts.append(Text(f"{tier} does not answer: hits are shorter until it does. Why: kvstore doctor", "bold red"))
    parts += [Text(), _requests(now, before)]
    if now.clients and max_clients > 0:
        parts += [Text(), _clients(now, max_clients)]
    return Group(*parts)


def _head(server: Server, fault: str) -> Text:
    text = Text.assemble(("kvstore ", "bold"), server.version, "  ", (server.address, "cyan"))
    text.append(f"  boot {server.boot_id[:8]}")
    if fault:
        text.append(f"\n{fault}", "bold red")
    return text


def _tiers(now: Sample, before: Sample | None) -> Table:
    """One row a tier, in 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    table.add_column("tier", no_wrap=True)
    table.add_column("occupancy", no_wrap=True, min_width=25)
    columns = ["blocks", "hits"] if before is None else ["blocks", "hits", "now", "GB/s in", "GB/s out"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for tier in tier_names(now.values):
        values = {key.partition(".")[2]: value for key, value in now.values.items() if key.startswith(f"{tier}.")}
        figures = [
            f"{values['blocks']:,.0f}" if "blocks" in values else "–",
            _share(values.get("hit_blocks", 0), values.get("missed_blocks", 0)),
        ]
        if before is not None:
            figures += [
                _share(*(_grown(now, before, f"{tier}.{name}") for name in ("hit_blocks", "missed_blocks"))),
                _rate(now, before, "save.bytes" if tier == "host" else f"{tier}.written_bytes"),
                _rate(now, before, f"{tier}.read_bytes"),
            ]
        table.add_row(tier, _occupancy(values), *figures, _state(values))
    return table


def _requests(now: Sample, before: Sample | None) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    values = now.values
    evictions = [key for key in values if key.endswith(".evicted_blocks")]
    if before is not None:
        rates = [
            ("matches", ["match.requests"]),
            ("loads", ["load.requests"]),
            ("saves", ["save.requests"]),
            ("evicted", evictions),
            ("refused", ["save.refused_blocks"]),
        ]
        table.add_row(*(_labelled(label, _per_second(now, before, keys)) for label, keys in rates))
    gauges = [
        ("leases", f"{values.get('lease.live', 0):,.0f}"),
        ("computing", f"{values.get('marks.live', 0):,.0f}"),
        ("pinned", f"{values.get('host.pinned_blocks', 0):,.0f}"),
        ("quarantined", f"{values.get('save.quarantined_slots', 0):,.0f}"),
        ("queue down", size(values.get("mover.queued_bytes", 0))),
    ]
    table.add_row(*(_labelled(label, text) for label, text in gauges))
    if values.get("ttft.saved_s"):
        table.add_row(_labelled("TTFT saved", f"{values['ttft.saved_s']:,.1f} s"))
    return table


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), text)


def _clients(now: Sample, max_clients: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"clients ({len(now.clients)})", no_wrap=True)
    for name in ("pid", "leases", "since"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("memory")
    shown = sorted(now.clients, key=lambda client: (-client.num_leases, client.name, client.pid))
    for client in shown[:max_clients]:
        name = "".join(letter if letter.isprintable() else "?" for letter in client.name[:40])
        way = "mapped" if client.mapped else "remote"
        table.add_row(Text(name or "–"), str(client.pid), f"{client.num_leases:,}", duration(client.age_s), way)
    if len(shown) > max_clients:
        table.add_row(f"… and {len(shown) - max_clients} more")
    return table


# ---- figures ----


def tier_names(values: Mapping[str, float]) -> list[str]:
    """Host first, then whatever else counts hits, in the order of names."""
    found = {key.partition(".")[0] for key in values if key.endswith((".hit_blocks", ".available", ".used_bytes"))}
    return ["host", *sorted(found - {"host"})]


def tiers_away(values: Mapping[str, float]) -> list[str]:
    """Those whose breaker lets no calls through."""
    return [tier for tier in tier_names(values) if not values.get(f"{tier}.available", 1)]


def _occupancy(values: Mapping[str, float]) -> Text:
    used = values.get("used_bytes", 0)
    capacity = values.get("capacity_bytes", 0)
    if not capacity:
        return Text(f"{'':{_BAR_CELLS}} {size(used)}")
    share = min(1.0, used / capacity)
    cells = round(share * _BAR_CELLS)
    if not values.get("available", 1):
        return Text(f"{'last saw':{_BAR_CELLS}} {_used_of(used, capacity)}", "dim")
    figures = f" {_used_of(used, capacity)} {share:.0%}"
    return Text.assemble(("█" * cells, "green"), ("░" * (_BAR_CELLS - cells), "bright_black"), figures)


def _used_of(used: float, capacity: float) -> str:
    """`3.1/4.0 GiB`: both in the unit of the second."""
    unit, length = next(pair for pair in reversed(_UNITS) if capacity >= pair[1])
    digits = 0 if capacity >= 100 * length else 1
    return f"{used / length:.{digits}f}/{capacity / length:.{digits}f} {unit}"


def _state(values: Mapping[str, float]) -> Text:
    """Whether the tier's breaker lets calls through, and its server our writes."""
    if not values.get("available", 1):
        return Text("DOWN", "bold red")
    return Text("ok", "green") if values.get("may_write", 1) else Text("no writes", "bold red")


def _grown(now: Sample, before: Sample, key: str) -> float:
    return now.values.get(key, 0) - before.values.get(key, 0)


def _share(hits: float, misses: float) -> str:
    return f"{hits / (hits + misses):.1%}" if hits + misses > 0 else "–"


def _seconds(now: Sample, before: Sample | None) -> float:
    return now.time_s - before.time_s if before is not None else 0.0


def _rate(now: Sample, before: Sample, key: str) -> str:
    """Bytes of a counter as GB/s; nothing where it is not counted."""
    if key not in now.values or now.time_s <= before.time_s:
        return "–"
    return f"{max(0.0, _grown(now, before, key)) / (now.time_s - before.time_s) / 1e9:.2f}"


def _per_second(now: Sample, before: Sample, keys: Sequence[str]) -> str:
    grown = max(0.0, sum(_grown(now, before, key) for key in keys))  # counters of a new server begin again
    return f"{grown / max(1e-9, now.time_s - before.time_s):,.0f}/s"


def size(num_bytes: float) -> str:
    """`4.0 GiB`."""
    unit, length = next((pair for pair in reversed(_UNITS) if num_bytes >= pair[1]), _UNITS[0])
    return f"{num_bytes / length:.{0 if length == 1 else 1}f} {unit}"


def duration(seconds: float) -> str:
    """`47 s`, `12 min`, `3 h`, `5 d`."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


# ---- the loop ----


def look(admin: Admin) -> Sample:
    reply = admin.stats()
    return Sample(time.monotonic(), dict(reply.values), tuple(reply.clients))


def server_of(admin: Admin) -> Server:
    return Server(admin.target.address, admin.opened.server_version, admin.opened.boot_id.hex())


def run(admin: Admin, *, once: bool, every_s: float, console: Console | None = None) -> None:
    """Draw until q, Ctrl-C or Escape. `once`, or an output that is no terminal: one frame, over one interval."""
    console = console or Console()
    before = look(admin)
    time.sleep(min(every_s, 1.0) if once else _FIRST_LOOK_S)  # rates need two looks
    now, fault = look(admin), ""
    if once or not console.is_terminal:
        console.print(draw(server_of(admin), now, before))
        return
    with _keys() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(fitted(console.size, server_of(admin), now, before), refresh=True)
        while not _quits(keyboard, every_s):
            try:
                before, now, fault = now, look(admin), ""
            except KVStoreError as error:
                fault = f"figures are {duration(time.monotonic() - now.time_s)} old: {error}"
            live.update(fitted(console.size, server_of(admin), now, before, fault), refresh=True)


def fitted(
    space: ConsoleDimensions, server: Server, now: Sample, before: Sample | None, fault: str = ""
) -> RenderableType:
    """The screen as far as it fits: clients last; or what it would need."""
    # A head, titles, the tiers, three rows of requests, three empty lines; and what is said where something is wrong.
    num_lines = 8 + len(tier_names(now.values)) + len(tiers_away(now.values)) + 2 * bool(fault)
    if space.width < _COLUMNS or space.height < num_lines:
        return Text(
            f"This terminal is {space.width} x {space.height}: enlarge it to {_COLUMNS} x {num_lines}, or press q and "
            "use kvstore status, or top --json."
        )
    return draw(server, now, before, fault, min(_MAX_CLIENTS, space.height - num_lines - 3))


def follow(admin: Admin, *, once: bool, every_s: float) -> Iterator[dict[str, object]]:
    """For scripts: each interval's values, and by how much each grew a second; one interval, or without an end."""
    server, before = server_of(admin), look(admin)
    while True:
        time.sleep(every_s)
        now = look(admin)
        length_s = now.time_s - before.time_s
        grown = {key: (value - before.values.get(key, 0.0)) / length_s for key, value in sorted(now.values.items())}
        yield {
            "address": server.address,
            "boot_id": server.boot_id,
            "seconds": length_s,
            "clients": len(now.clients),
            "values": dict(sorted(now.values.items())),
            "per_second": grown,
        }
        if once:
            return
        before = now


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The keyboard, each key at once and unseen; None where there is none."""
    if not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _quits(keyboard: int | None, wait_s: float) -> bool:
    """Wait for a key at most `wait_s`; True where it says to stop."""
    deadline = time.monotonic() + wait_s
    while (left_s := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([] if keyboard is None else [keyboard], [], [], left_s)
        if ready and keyboard is not None:
            typed = os.read(keyboard, 64).decode(errors="replace")
            if not typed or typed[0] in _QUIT:
                return True
    return False
