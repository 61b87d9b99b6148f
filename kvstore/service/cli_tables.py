# SPDX-License-Identifier: Apache-2.0
"""What `kvstore` shows of models, settings, blocks and events: tables and lines for people, rows for scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

from kvstore.block import ModelId
from kvstore.wire import kvstore_pb2 as pb

_SHORT = 12
"""Hex digits of an id for people: of a million blocks two begin alike once in five hundred times."""
_LINE = 80
WIDE = 112
"""Columns for a table with whole ids."""


def _short(identity: bytes) -> str:
    return identity.hex()[:_SHORT]


def models_table(models: Iterable[ModelId]) -> Table:
    """`layout` says who can read a model's blocks: canonical ones any engine, opaque ones the engines they name."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("model", "revision", "kv dtype", "block", "layout"):
        table.add_column(name, no_wrap=True)
    for model in models:
        row = (model.model[:48], model.revision[:12], model.kv_dtype, str(model.block_tokens), model.layout[:48])
        # Clients have named them, and may have meant this terminal.
        table.add_row(*(Text("".join(letter if letter.isprintable() else "?" for letter in cell)) for cell in row))
    return table


def setting_value(key: str, value: str) -> str:
    """A size in the largest unit that gives it exactly: 256 MiB; all else as it is."""
    if "_bytes" not in key.rpartition(".")[2] or not value.isdecimal() or not int(value):
        return value
    power = next((power for power in (4, 3, 2, 1) if int(value) % 1024**power == 0), 0)
    return f"{int(value) // 1024**power} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def settings_table(rows: Iterable[tuple[str, str, str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("setting", "value", "from"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


# ---- blocks ----


def where_of(info: pb.BlockInfo) -> list[str]:
    """The tiers that a block is in."""
    return [*(["host"] if info.resident and "host" not in info.tiers else []), *info.tiers]


def block_row(info: pb.BlockInfo) -> dict[str, object]:
    return {
        "id": info.id.hex(),
        "resident": info.resident,
        "tiers": list(info.tiers),
        "root": info.root.hex(),
        "parent": info.parent.hex(),
        "depth": info.depth,
        "ready_parts": info.ready_parts,
        "pins": info.num_pins,
        "children": info.num_children,
        "tokens": _tokens(info.tokens),
    }


def _tokens(packed: bytes) -> list[int]:
    return memoryview(packed).cast("I").tolist() if sys.byteorder == "little" else []


def blocks_table(blocks: Iterable[pb.BlockInfo], *, along: bool, whole_ids: bool) -> Table:
    """`along`: the blocks are a chain's, so that where each stands is known of those that are not there as well."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("block", justify="right")
    for name in ("id", "where"):
        table.add_column(name, no_wrap=True)
    for name in ("parts", "pins", "children", "tokens"):
        table.add_column(name, justify="right")
    num_there = num_blocks = 0
    for info in blocks:
        num_blocks += 1
        where = where_of(info)
        num_there += bool(where)
        table.add_row(
            str(info.depth) if where or along else "–",
            info.id.hex() if whole_ids else _short(info.id),
            Text(", ".join(where)) if where else Text("not here", "dim"),
            str(info.ready_parts.bit_count()) if info.resident else "–",
            str(info.num_pins) if info.resident else "–",
            str(info.num_children) if info.resident else "–",
            str(len(info.tokens) // 4) if info.tokens else "–",
        )
    table.caption = f"{num_there} of {num_blocks} blocks are there" + ("" if whole_ids else "; --json has whole ids")
    table.caption_justify = "left"
    return table


# ---- events ----


def events(reply: pb.WatchReply) -> Iterable[Mapping[str, object]]:
    """What a reply says, one row a block."""
    if reply.gap:
        yield {"kind": "gap", "sequence": reply.sequence}
    for event in reply.events:
        for at in range(0, len(event.ids) or 32, 32):
            line: dict[str, object] = {
                "kind": pb.BlockEvent.Kind.Name(event.kind).lower(),
                "tier": event.tier,
                "id": event.ids[at : at + 32].hex(),
                "depth": event.depth + at // 32,
                "root": event.root.hex(),
                "sequence": reply.sequence,
            }
            if event.tokens:
                width = len(event.tokens) * 32 // len(event.ids)
                line["tokens"] = _tokens(event.tokens[at // 32 * width : (at // 32 + 1) * width])
            yield line
    if reply.snapshot_done:
        yield {"kind": "snapshot_done", "sequence": reply.sequence}


def event_line(event: Mapping[str, object]) -> str:
    """A row of `events` for people, in 80 columns: with tokens, as many of them as fit."""
    number = f"event {event['sequence']}"
    if event["kind"] == "gap":
        return f"gap      events were missed: what came before is out of date  {number}"
    if event["kind"] == "snapshot_done":
        return f"snapshot is complete: events follow  {number}"
    line = f"{event['kind']:8} {event['tier']:6}"
    if event["id"]:
        line += f"  {str(event['id'])[:_SHORT]}  block {event['depth']:<5}"
    else:
        line += "  all"
    tokens = event.get("tokens")
    if isinstance(tokens, list):
        line += f"  {len(tokens)} tokens: {' '.join(map(str, tokens))}"
        return line if len(line) <= _LINE else f"{line[: _LINE - 2].rpartition(' ')[0]} …"
    if event["root"]:
        line += f" of {str(event['root'])[:_SHORT]}"
    return f"{line}  {number}"
