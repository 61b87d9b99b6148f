# SPDX-License-Identifier: Apache-2.0
"""What hangs from what in Redis, as far as exclusive stores have to know: which members have several children.

    kvs2:{<stripe>}:<root>:k    hash: member → the one child it has, as 16 hex digits; empty where it has none yet
    kvs2:{<stripe>}:<root>:f    set: members that others go on from, or may (`redis_names`)

What came up into a host may leave Redis, except what else hangs from. A store that reads what it then keeps itself
says nothing by that; so in place of reads its writes count. A new member without children is noted as an end. A child
that is written below a member that was there is noted as its one child, where it was an end or that same child was
there before; else the member has several from now on. A member of which nothing is noted counts as having several: what
is lost with a crash makes members stay. All stores on a server must be exclusive for this: others say nothing of ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.block import BlockId, BlockMeta, PartKey
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_nodes import Talk, many
from kvstore.tiers.redis_wire import command

# KEYS: order, forks, only children. ARGV: what to note, member, child. What lies there and is another's goes.
_NOTE = """
if not redis.call('ZSCORE', KEYS[1], ARGV[2]) then return 0 end
for i, kind in ipairs({'set', 'hash'}) do
  local there = redis.call('TYPE', KEYS[i + 1]).ok
  if there ~= kind and there ~= 'none' then redis.call('UNLINK', KEYS[i + 1]) end
end
if ARGV[1] == 'end' then  -- unless another store has gone on from it before this came
  return redis.call('SISMEMBER', KEYS[2], ARGV[2]) == 0 and redis.call('HSETNX', KEYS[3], ARGV[2], '') or 0
end
local only = redis.call('HGET', KEYS[3], ARGV[2])
if ARGV[1] == 'only' or (ARGV[1] == 'child' and only and (only == '' or only == ARGV[3])) then
  return redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
end
redis.call('HDEL', KEYS[3], ARGV[2])
return redis.call('SADD', KEYS[2], ARGV[2])
"""


@dataclass(frozen=True, slots=True)
class Growth:
    """What a write did to the chains in Redis."""

    ends: Sequence[PartKey]
    """New, with nothing behind them."""
    children: Sequence[tuple[PartKey, PartKey]]
    """Blocks that were there, each with a new child."""
    forks: Sequence[PartKey]
    """New, with several children."""


def growth_of(landed: Sequence[PartKey], meta: Mapping[BlockId, BlockMeta]) -> Growth:
    """Of what was written, parents first."""
    parents = [(key._replace(block=meta[key.block].parent), key) for key in landed if meta[key.block].depth]
    counts = Counter(parent for parent, _ in parents)
    fresh = set(landed)
    return Growth(
        ends=[key for key in landed if not counts[key]],
        children=[(parent, key) for parent, key in parents if parent not in fresh],
        forks=[parent for parent, count in counts.items() if parent in fresh and count > 1],
    )


def note(talk: Talk, names: Names, growths: Sequence[Growth], deadline: float) -> None:
    """Note them; of a node that does not answer nothing, and its members stay."""
    commands = []
    for growth in growths:
        commands += [_note(names, "fork", key) for key in growth.forks]
        commands += [_note(names, "child", parent, child) for parent, child in growth.children]
        commands += [_note(names, "end", key) for key in growth.ends]
    if commands:
        many(talk, commands, deadline, partial=True)


def free_end(talk: Talk, names: Names, keys: Sequence[PartKey], deadline: float) -> tuple[int, int]:
    """Which of a chain's keys, head to tail, may go: from and up to which nothing hangs from them but themselves.

    None, as an empty range, where something in Redis goes on from the last of them that is there, or may.
    """
    if not keys:
        return 0, 0
    commands = []
    for key in keys:
        bucket, member = names.bucket(key), names.member(key.block, key.part)
        commands.append(command("ZSCORE", bucket.order, member))
        commands.append(command("SISMEMBER", bucket.forks, member))
        commands.append(command("HGET", bucket.only, member))
    # What a node that does not answer, or a key that is another program's, says nothing of counts as shared.
    replies = talk.ask(commands, deadline)
    there, forked, only = replies[::3], replies[1::3], replies[2::3]
    stop = next((at for at in range(len(keys), 0, -1) if isinstance(there[at - 1], bytes)), 0)
    while stop < len(keys) and stop and keys[stop].block == keys[stop - 1].block:
        stop += 1  # other parts of that block
    after = _tag(keys[stop]) if stop < len(keys) else b""
    last = keys[stop - 1].block
    for at in range(stop - 1, -1, -1):
        if keys[at].block != last:
            break
        if there[at] is not None and only[at] not in (b"", after):
            return stop, stop
    start = next((at for at in range(stop, 0, -1) if forked[at - 1] != 0), 0)
    while 0 < start < stop and keys[start].block == keys[start - 1].block:
        start += 1
    return start, stop


def _tag(child: PartKey) -> bytes:
    return child.block[:8].hex().encode()


def note_only(talk: Talk, names: Names, keys: Sequence[PartKey], deadline: float) -> None:
    """Note that each of a chain's `keys` but the last has one child: if that goes and comes again, it is the same."""
    above: dict[int, PartKey] = {}
    commands = []
    for key in keys:
        parent = above.get(key.part)
        if parent is not None:
            commands.append(_note(names, "only", parent, key))
        above[key.part] = key
    if commands:
        many(talk, commands, deadline, partial=True)


def _note(names: Names, what: str, key: PartKey, child: PartKey | None = None) -> bytes:
    bucket = names.bucket(key)
    words: tuple[str | bytes, ...] = (
        what,
        names.member(key.block, key.part),
        _tag(child) if child is not None else b"",
    )
    return command("EVAL", _NOTE, 3, bucket.order, bucket.forks, bucket.only, *words)
