# SPDX-License-Identifier: Apache-2.0
"""Made-up traffic of other kinds than the published traces have: `--trace generated:KIND` or `generated:KIND:SEED`.

Small enough to replay in seconds (about 100,000 blocks asked), and different on purpose: what a policy learned from
chats must not cost where there are none. Equal seeds give equal traces; generated:all is one of each kind.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from bench.policies_trace import Trace, make_trace
from kvstore.errors import ConfigError

PREFIX = "generated:"
_BLOCK_TOKENS = 512

Line = tuple[float, int, list[int]]
Lines = Iterator[Line]
Ids = Iterator[int]


def names_of(name: str) -> list[str]:
    """What generated:all and generated:all:SEED stand for; any other name for itself."""
    kind, _, seed = name.removeprefix(PREFIX).partition(":")
    if not name.startswith(PREFIX) or kind != "all":
        return [name]
    return [f"{PREFIX}{each}{':' if seed else ''}{seed}" for each in KINDS]


def generated(name: str, counted_share: float = 0.5) -> Trace:
    """The trace of a name such as generated:agents or generated:agents:7."""
    kind, _, seed = name.removeprefix(PREFIX).partition(":")
    if kind not in KINDS or (seed and not seed.isdigit()):
        raise ConfigError(f"no traffic is called {name!r}: give {PREFIX}KIND or {PREFIX}KIND:SEED; {', '.join(KINDS)}")
    rng, ids = random.Random(f"{kind} {seed or 1}"), itertools.count(1)
    return make_trace(name, list(KINDS[kind](rng, ids)), counted_share)


def _new(ids: Ids, count: int) -> list[int]:
    return list(itertools.islice(ids, count))


def _some(rng: random.Random, median: float, spread: float, most: int) -> int:
    """At least 1, mostly around `median`."""
    return min(most, max(1, round(rng.lognormvariate(0, spread) * median)))


def _line(rng: random.Random, time_s: float, blocks: list[int]) -> Line:
    return time_s, max(1, len(blocks) * _BLOCK_TOKENS - rng.randrange(_BLOCK_TOKENS)), blocks


def _popular(rng: random.Random, count: int, exponent: float) -> Callable[[], int]:
    """A number from 0 to count - 1, the first ones most often (Zipf)."""
    weights = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(count)))
    return lambda: rng.choices(range(count), cum_weights=weights)[0]


def _chat(
    rng: random.Random, ids: Ids, at_s: float, shared: list[int], first: float, again: float, gap_s: float
) -> Lines:
    """Turns of one conversation. Each ends in a block that was not full, which the next has otherwise."""
    blocks, likely = shared + _new(ids, _some(rng, first, 1.0, 120)), again
    while True:
        yield _line(rng, at_s, blocks)
        if rng.random() > likely:
            return
        at_s += _some(rng, gap_s, 1.1, 3000)
        blocks = blocks[:-1] + _new(ids, _some(rng, 2.5, 0.8, 60))
        likely = min(0.8, likely + 0.15)


def chats(rng: random.Random, ids: Ids, start_s: float = 0.0, count: int = 2500, per_s: float = 1.0) -> Lines:
    """Conversations, of which few return after the first turn and more after each."""
    at_s, shared = start_s, _new(ids, 1)
    lines: list[Line] = []
    for _ in range(count):
        at_s += rng.expovariate(per_s)
        lines += _chat(rng, ids, at_s, shared, 14, 0.3, 90)
    yield from (line for line in lines if line[0] <= at_s)  # not those who come back when nobody else comes


def agents(rng: random.Random, ids: Ids, start_s: float = 0.0, count: int = 700) -> Lines:
    """Tasks of many quick steps under one of thirty long system prompts; one in four requests is a scan seen once."""
    prompts = [_new(ids, rng.randint(4, 20)) for _ in range(30)]
    pick, at_s = _popular(rng, len(prompts), 1.0), start_s
    for _ in range(count):
        at_s += rng.expovariate(0.5)
        blocks, step_s = prompts[pick()] + _new(ids, rng.randint(1, 4)), at_s
        for _ in range(rng.randint(2, 15)):
            yield _line(rng, step_s, blocks)
            step_s += rng.uniform(2, 20)
            blocks = blocks[:-1] + _new(ids, rng.randint(1, 3))
        for _ in range(2):
            yield _line(rng, at_s + rng.uniform(0, 60), _new(ids, rng.randint(5, 60)))


def documents(rng: random.Random, ids: Ids, start_s: float = 0.0, count: int = 3000) -> Lines:
    """Long documents, each asked many times for a while, mostly by other users: a question is its last block."""
    shelf = [_new(ids, rng.randint(10, 70)) for _ in range(150)]
    pick, at_s = _popular(rng, len(shelf), 0.8), start_s
    for _ in range(count):
        at_s += rng.expovariate(1.0)
        if rng.random() < 0.05:  # what everybody asks about changes
            shelf.insert(rng.randrange(20), _new(ids, rng.randint(10, 70)))
            shelf.pop()
        yield _line(rng, at_s, shelf[pick()] + _new(ids, 1))


def prompts(rng: random.Random, ids: Ids, start_s: float = 0.0, count: int = 10_000) -> Lines:
    """Nothing is shared but system prompts, some far more often than others."""
    systems = [_new(ids, rng.randint(1, 12)) for _ in range(400)]
    pick, at_s = _popular(rng, len(systems), 0.9), start_s
    for _ in range(count):
        at_s += rng.expovariate(4.0)
        yield _line(rng, at_s, systems[pick()] + _new(ids, rng.randint(1, 6)))


def uniform(rng: random.Random, ids: Ids, start_s: float = 0.0, count: int = 4000) -> Lines:
    """Any of three hundred conversations goes on, whatever it is like: there is nothing to learn."""
    open_now, at_s = [_new(ids, rng.randint(1, 30)) for _ in range(300)], start_s
    for _ in range(count):
        at_s += rng.expovariate(1.0)
        which = rng.randrange(len(open_now))
        open_now[which] = open_now[which][:-1] + _new(ids, rng.randint(1, 4))
        yield _line(rng, at_s, open_now[which])
        if rng.random() < 0.08:
            open_now[which] = _new(ids, rng.randint(1, 30))


def bursts(rng: random.Random, ids: Ids, start_s: float = 0.0) -> Lines:
    """Days of ten minutes: chats by day, whose gaps and sizes differ from day to day, and at night a batch of scans."""
    for day in range(6):
        day_s = start_s + 600.0 * day
        shared, first, gap_s = _new(ids, 2), rng.choice((3, 10, 25)), rng.choice((20, 60, 180))
        for _ in range(450):
            at_s = day_s + 600.0 * rng.betavariate(2, 3)
            turns = _chat(rng, ids, at_s, shared, first, rng.choice((0.1, 0.5)), gap_s)
            yield from (line for line in turns if line[0] < day_s + 1200)
        batch = _new(ids, 6)
        for _ in range(120):
            yield _line(rng, day_s + rng.uniform(480, 600), batch + _new(ids, rng.randint(5, 50)))


def loops(rng: random.Random, ids: Ids, start_s: float = 0.0) -> Lines:
    """Chats, and a job that asks about the same two hundred documents over and over: LRU's worst case."""
    shelf = [_new(ids, rng.randint(5, 40)) for _ in range(200)]
    for number in range(2000):
        yield _line(rng, start_s + 1.5 * number, shelf[number % len(shelf)] + _new(ids, 1))
    yield from chats(rng, ids, start_s, count=1200, per_s=0.4)


def change(rng: random.Random, ids: Ids) -> Lines:
    """Agents, then chats, then documents, then prompts: each quarter of an hour something else."""
    yield from agents(rng, ids, 0.0, count=400)
    yield from chats(rng, ids, 900.0, count=900)
    yield from documents(rng, ids, 1800.0, count=900)
    yield from prompts(rng, ids, 2700.0, count=3000)


def flips(rng: random.Random, ids: Ids) -> Lines:
    """Who comes back turns into who does not, every four minutes: what was learned is wrong."""
    at_s = 0.0
    for _ in range(4000):
        at_s += rng.expovariate(1.0)
        long = rng.random() < 0.5
        returns = long == (int(at_s / 240) % 2 == 0)
        blocks = _new(ids, rng.randint(12, 30) if long else rng.randint(1, 11))
        yield _line(rng, at_s, blocks)
        if returns:
            yield _line(rng, at_s + rng.uniform(20, 120), blocks + _new(ids, 2))


def drift(rng: random.Random, ids: Ids, start_s: float = 0.0) -> Lines:
    """System prompts, some far more often than others, of which one is exchanged every few seconds."""
    systems = [_new(ids, rng.randint(2, 25)) for _ in range(300)]
    pick = _popular(rng, len(systems), 0.7)
    for number in range(6000):
        if number % 8 == 0:
            systems[rng.randrange(len(systems))] = _new(ids, rng.randint(2, 25))
        yield _line(rng, start_s + 0.5 * number, systems[pick()] + _new(ids, rng.randint(1, 3)))


def phases(rng: random.Random, ids: Ids) -> Lines:
    """Ten minutes of chats, ten of a loop over some documents, and so on: what was learned is wrong at once."""
    for phase in range(6):
        start_s = 600.0 * phase
        if phase % 2 == 0:
            yield from chats(rng, ids, start_s, count=450, per_s=0.75)
            continue
        shelf = [_new(ids, rng.randint(5, 40)) for _ in range(rng.choice((40, 120, 300)))]
        for number in range(600):
            yield _line(rng, start_s + number, shelf[number % len(shelf)] + _new(ids, 1))


def lull(rng: random.Random, ids: Ids) -> Lines:
    """A quarter of an hour of chats, then only short prompts that come back at random, the first ones more often."""
    yield from chats(rng, ids, count=900)
    short = [_new(ids, rng.randint(1, 6)) for _ in range(500)]
    for number in range(3000):
        which = int(rng.random() ** 2 * len(short))
        yield _line(rng, 900 + 0.4 * number, short[which])
        if rng.random() < 0.1:
            short[which] = _new(ids, rng.randint(1, 6))


KINDS: dict[str, Callable[[random.Random, Ids], Lines]] = {
    "chats": chats,
    "agents": agents,
    "documents": documents,
    "prompts": prompts,
    "uniform": uniform,
    "bursts": bursts,
    "loops": loops,
    "change": change,
    "flips": flips,
    "drift": drift,
    "phases": phases,
    "lull": lull,
}
