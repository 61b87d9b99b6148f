# SPDX-License-Identifier: Apache-2.0
"""Bytes of blocks in messages: valid protobuf either way, every byte in its place, and nothing else in any."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
from google.protobuf.unknown_fields import UnknownFieldSet

from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError, UnknownLease
from kvstore.layout import layout_of
from kvstore.save import BlockSave
from kvstore.service import streams
from kvstore.service.bulk import MESSAGE_BYTES, Arrived, Misfit, Packer, Unpacker, checksum, decode, encode
from kvstore.service.rights import FULL, Rights
from kvstore.service.roots import RootBook
from kvstore.service.sums import Sums
from kvstore.store import KVStore
from kvstore.wire import kvstore_pb2 as pb
from tests.conftest import MakeStore, chain_of, content, save_all

SIZES = {
    "small parts": [300, 1],
    "a message a part": [MESSAGE_BYTES],
    "several messages a part": [2 * MESSAGE_BYTES + 17, 5],
    "parts that cross messages": [MESSAGE_BYTES - 3, 700_000],
}


def blocks_of(sizes: Sequence[int], num_blocks: int) -> list[list[memoryview]]:
    rng = random.Random(7)
    return [[memoryview(rng.randbytes(size)) for size in sizes] for _ in range(num_blocks)]


def packed(blocks: Sequence[Sequence[memoryview]], *, carry: bool = True) -> list[bytes]:
    packer = Packer(pb.ReadReply)
    messages: list[bytes] = []
    for index, views in enumerate(blocks):
        for part, view in enumerate(views):
            messages += packer.add(index, part, view, tier="host")
        messages += packer.end_block(index + 1, carry=carry)
    return [*messages, *packer.rest()]


def unpacked(messages: Sequence[bytes], into: Sequence[Sequence[memoryview]]) -> list[Arrived]:
    unpacker = Unpacker(lambda index: into[index], lambda index: index + 1)
    arrived: list[Arrived] = []
    for message in messages:
        arrived += unpacker.take(*decode(pb.ReadReply, message))
    assert not unpacker.in_block
    return arrived


def memory_for(blocks: Sequence[Sequence[memoryview]]) -> list[list[memoryview]]:
    return [[memoryview(bytearray(len(view))) for view in views] for views in blocks]


# ---- one message ----


def test_messages_written_by_hand_are_what_generated_code_reads() -> None:
    data = [b"abc", memoryview(b"d" * 300)]
    head = pb.ReadReply(
        index=3, part=200, offset=1 << 40, tier="redis", checksums=b"\x01" * 8, metas=[pb.Meta(depth=9)]
    )
    read = pb.ReadReply.FromString(encode(head, data))
    assert read.data == b"abc" + b"d" * 300
    assert not len(UnknownFieldSet(read))
    read.ClearField("data")
    assert read == head


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16_383, 16_384, MESSAGE_BYTES])
def test_messages_of_generated_code_are_read_by_hand_without_a_copy(length: int) -> None:
    whole = pb.WriteRequest(session=b"s" * 16, lease=1 << 60, index=7, checksums=b"z" * 16, data=bytes(length))
    message = whole.SerializeToString()
    head, data = decode(pb.WriteRequest, message)
    assert bytes(data) == whole.data
    assert not length or data.obj is message
    whole.ClearField("data")
    assert head == whole


def test_a_message_whose_data_is_not_last_is_read_all_the_same() -> None:
    """Another implementation may lay fields out as it likes, and a newer one may add some."""
    late = encode(pb.ReadReply(), [b"payload"]) + pb.ReadReply(index=5).SerializeToString()
    head, data = decode(pb.ReadReply, late)
    assert (head.index, bytes(data)) == (5, b"payload")
    unknown = b"\xf8\x07\x01" + encode(pb.ReadReply(index=5), [b"payload"])  # field 127, a varint
    head, data = decode(pb.ReadReply, unknown)
    assert (head.index, bytes(data)) == (5, b"payload")


def test_random_bytes_are_refused_and_never_crash() -> None:
    rng = random.Random(3)
    whole = encode(pb.ReadReply(index=3, tier="host", checksums=b"c" * 8), [b"data" * 50])
    refused = 0
    for _ in range(20_000):
        damaged = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(rng.randrange(1, 4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            decode(pb.ReadReply, bytes(damaged))
        except Misfit:
            refused += 1
    assert refused > 1_000


# ---- many messages ----


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("carry", [True, False])
def test_blocks_cut_into_messages_come_together_again(name: str, carry: bool) -> None:
    blocks = blocks_of(SIZES[name], 5)
    messages = packed(blocks, carry=carry)
    into = memory_for(blocks)
    arrived = unpacked(messages, into)
    assert [(each.index, each.part) for each in arrived] == [
        (index, part) for index in range(5) for part in range(len(SIZES[name]))
    ]
    assert all(each.good for each in arrived)
    assert into == blocks
    assert max(len(pb.ReadReply.FromString(message).data) for message in messages) <= MESSAGE_BYTES


def test_small_blocks_share_messages() -> None:
    assert len(packed(blocks_of([1000], 100))) == 1
    assert len(packed(blocks_of([1000], 100), carry=False)) == 100


def test_memory_of_a_block_may_be_used_again_once_the_block_was_ended() -> None:
    memory = bytearray(b"a" * 1000)
    packer = Packer(pb.ReadReply)
    messages = [*packer.add(0, 0, memoryview(memory)), *packer.end_block(1, carry=True)]
    memory[:] = b"b" * 1000
    messages += [*packer.add(1, 0, memoryview(memory)), *packer.end_block(2, carry=True), *packer.rest()]
    assert len(messages) == 1
    assert pb.ReadReply.FromString(messages[0]).data == b"a" * 1000 + b"b" * 1000


def test_a_changed_byte_is_told_of_the_part_it_lies_in() -> None:
    blocks = blocks_of([MESSAGE_BYTES + 10, 20], 2)
    messages = packed(blocks)
    for at in range(len(messages)):
        damaged = bytearray(messages[at])
        damaged[-5] ^= 1
        arrived = unpacked([*messages[:at], bytes(damaged), *messages[at + 1 :]], memory_for(blocks))
        assert [each.good for each in arrived].count(False) == 1


def _dropped(messages: list[bytes]) -> list[bytes]:
    return messages[:1] + messages[2:]


def _twice(messages: list[bytes]) -> list[bytes]:
    return messages[:1] + messages


def _turned(messages: list[bytes]) -> list[bytes]:
    return messages[::-1]


def _with(change: Callable[[pb.ReadReply], None]) -> Callable[[list[bytes]], list[bytes]]:
    def changed(messages: list[bytes]) -> list[bytes]:
        head, data = decode(pb.ReadReply, messages[1])
        change(head)
        return [messages[0], encode(head, [data]), *messages[2:]]

    return changed


def _offset(head: pb.ReadReply) -> None:
    head.offset -= 8


def _no_sums(head: pb.ReadReply) -> None:
    head.checksums = b""


def _more_sums(head: pb.ReadReply) -> None:
    head.checksums += bytes(8)


def _odd_sums(head: pb.ReadReply) -> None:
    head.checksums += b"\0"


def _part(head: pb.ReadReply) -> None:
    head.part = 60


@pytest.mark.parametrize(
    "spoil",
    [_dropped, _twice, _turned, *(_with(change) for change in (_offset, _no_sums, _more_sums, _odd_sums, _part))],
    ids=["dropped", "twice", "turned", "overlap", "no checksum", "checksum too many", "odd checksums", "wrong part"],
)
def test_data_that_does_not_come_next_is_refused(spoil: Callable[[list[bytes]], list[bytes]]) -> None:
    blocks = blocks_of([MESSAGE_BYTES + 10, 20], 3)
    messages = spoil(packed(blocks, carry=False))
    with pytest.raises(Misfit):
        unpacked(messages, memory_for(blocks))


def test_data_beyond_the_last_block_is_refused() -> None:
    blocks = blocks_of([1000], 3)

    def views_of(index: int) -> Sequence[memoryview]:
        if index >= 2:
            raise Misfit("no such block")
        return memory_for(blocks)[index]

    unpacker = Unpacker(views_of, lambda index: index + 1)
    with pytest.raises(Misfit, match="no such block"):
        list(unpacker.take(*decode(pb.ReadReply, packed(blocks)[0])))


# ---- Read ----


@pytest.fixture
def root(model: ModelId) -> Root:
    return Root(model)


def received(messages: Sequence[bytes], num_bytes: int) -> dict[int, bytes]:
    """Content of the blocks that came whole."""
    first, _ = decode(pb.ReadReply, messages[0])
    into = {index: [memoryview(bytearray(num_bytes))] for index in range(first.num_blocks)}
    unpacker = Unpacker(into.__getitem__, lambda index: index + 1)
    done = [
        each
        for message in messages[1:]
        for each in unpacker.take(*decode(pb.ReadReply, message))
        if each.good and each.ends_block
    ]
    return {each.index: bytes(into[each.index][0]) for each in done}


def test_read_gives_every_block_of_a_load(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 20)
    save_all(store, chain)
    store.match(chain, "r")
    with store.load("r") as load:
        found = received(list(streams.read(load, Sums(store.arena))), 4096)
    assert found == {index: content(chain, index, 0, 4096) for index in range(20)}


def test_read_holds_no_more_than_the_message_it_gives(store: KVStore, root: Root) -> None:
    """Lazy: what a slow reader has not asked for is not made, and the lease lives until the stream is dropped."""
    chain = chain_of(root, 20)
    save_all(store, chain)
    store.match(chain, "r")
    with store.load("r") as load:
        reading = streams.read(load, Sums(store.arena))
        assert decode(pb.ReadReply, next(reading))[0].num_blocks == 20
        assert store.stats()["host.pinned_blocks"] == 20
        reading.close()  # type: ignore[attr-defined]
    assert store.stats()["host.pinned_blocks"] == 0


def test_read_stops_where_the_lease_ran_out(make_store: MakeStore, root: Root) -> None:
    big = ModelId(
        model="big", revision="1", kv_dtype="float32", num_layers=8, num_kv_heads=8, head_dim=128, block_tokens=64
    )
    store = make_store(1024)
    num_bytes = store.open(big).block_bytes
    assert num_bytes > MESSAGE_BYTES
    chain = chain_of(Root(big), 3)
    save_all(store, chain)
    store.match(chain, "r")
    load = store.load("r")
    reading = streams.read(load, Sums(store.arena))
    next(reading)
    next(reading)
    load.close()  # as a session's end would
    assert list(reading) == []


def damage(store: KVStore, chain: Chain, index: int) -> None:
    """Flip a byte of a block in the arena, behind everybody's back."""
    store.match(chain, "damage")
    with store.load("damage") as load:
        slot = next(block.slots[0] for block in load if block.index == index)
    store.arena.view(slot, 4096)[7] ^= 1


def read_all(store: KVStore, chain: Chain, sums: Sums) -> dict[int, bytes]:
    store.match(chain, "r")
    with store.load("r") as load:
        return received(list(streams.read(load, sums)), 4096)


@pytest.mark.parametrize("first", ["uploaded", "read"])
def test_what_happens_to_a_block_after_its_checksum_was_taken_is_noticed(
    store: KVStore, root: Root, first: str
) -> None:
    chain, sums = chain_of(root, 6), Sums(store.arena)
    if first == "uploaded":
        with store.save(chain, 0, 6) as save:
            streams.write(HeldSave(save), iter(written(chain, range(6))), sums)
    else:
        save_all(store, chain)
        read_all(store, chain, sums)
    damage(store, chain, 3)
    assert set(read_all(store, chain, sums)) == {0, 1, 2, 4, 5}


def test_a_slot_that_is_used_again_has_a_new_checksum(store: KVStore, root: Root) -> None:
    sums = Sums(store.arena, max_sums=70)
    for seed in range(4):
        chain = chain_of(root, 40, seed=seed)
        save_all(store, chain)
        assert read_all(store, chain, sums) == {index: content(chain, index, 0, 4096) for index in range(40)}
        store.clear()


def test_a_checksum_taken_while_the_lease_ran_out_is_not_kept(make_store: MakeStore, root: Root) -> None:
    store = make_store(64)
    chain = chain_of(root, 1)
    save_all(store, chain)
    store.match(chain, "r")
    load = store.load("r")
    slot = next(iter(load)).slots[0]

    class Ending(Sums):
        def of(self, slot: int) -> int | None:
            load.close()  # before the checksum is taken: the slot may be anybody's by then
            return super().of(slot)

    sums = Ending(store.arena)
    list(streams.read(load, sums))
    assert Sums.of(sums, slot) is None


# ---- Write ----


@dataclass
class HeldSave:
    """A save as the service keeps it: filled while held, gone once ended."""

    save: BlockSave
    uploading: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False

    @contextmanager
    def filling(self) -> Iterator[BlockSave]:
        if self.ended:
            raise UnknownLease("the save has ended")
        yield self.save

    def commit(self, indices: Sequence[int]) -> list[int]:
        return self.save.publish(indices)


def written(chain: Chain, indices: Sequence[int], *, head: bool = False) -> list[bytes]:
    packer = Packer(pb.WriteRequest)
    messages: list[bytes] = []
    for index in indices:
        messages += packer.add(index, 0, memoryview(content(chain, index, 0, 4096)))
        messages += packer.end_block(index + 1, carry=True)
    messages += packer.rest()
    return [encode(pb.WriteRequest(session=b"s", lease=4), ()), *messages] if head else messages


def test_write_publishes_each_block_that_came_whole(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 6)
    with store.save(chain, 0, 6) as save:
        messages = iter(written(chain, [0, 1, 2, 3, 4, 5], head=True))
        assert streams.begin_write(messages) == (b"s", 4)
        assert streams.write(HeldSave(save), messages, Sums(store.arena)) == [0, 1, 2, 3, 4, 5]
    store.match(chain, "r")
    with store.load("r") as load:
        assert [bytes(block.views[0]) for block in load] == [content(chain, index, 0, 4096) for index in range(6)]


def test_several_writes_fill_one_save(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 6)
    with store.save(chain, 0, 6) as save:
        held = HeldSave(save)
        assert streams.write(held, iter(written(chain, [0, 1])), Sums(store.arena)) == [0, 1]
        assert streams.write(held, iter(written(chain, [2, 5])), Sums(store.arena)) == [2]  # 5 lacks its parent
    assert store.match(chain, "r").num_blocks == 3
    store.forget("r")


def _cut_short(messages: list[bytes]) -> list[bytes]:
    head, data = decode(pb.WriteRequest, messages[0])
    head.checksums = head.checksums[:8]
    return [encode(head, [data[:6000]])]


def _flipped(messages: list[bytes]) -> list[bytes]:
    damaged = bytearray(messages[0])
    damaged[-1] ^= 1
    return [bytes(damaged)]


def _elsewhere(messages: list[bytes]) -> list[bytes]:
    head, data = decode(pb.WriteRequest, messages[0])
    head.index = 3
    return [encode(head, [data])]


def _garbage(messages: list[bytes]) -> list[bytes]:
    return [messages[0][:4000]]


@pytest.mark.parametrize(("spoil", "visible"), [(_cut_short, 1), (_flipped, 1), (_elsewhere, 0), (_garbage, 0)])
def test_write_that_does_not_fit_leaves_nothing_half_written_behind(
    store: KVStore, root: Root, spoil: Callable[[list[bytes]], list[bytes]], visible: int
) -> None:
    chain = chain_of(root, 2)
    with store.save(chain, 0, 2) as save, pytest.raises(ConfigError):
        streams.write(HeldSave(save), iter(spoil(written(chain, [0, 1]))), Sums(store.arena))
    assert store.match(chain, "r").num_blocks == visible
    store.forget("r")


def test_write_to_a_save_that_ended_touches_no_slot(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 4)
    save = store.save(chain, 0, 4)
    held = HeldSave(save)
    views = [save.views(index)[0] for index in range(4)]
    before = [bytes(view or b"") for view in views]

    def messages() -> Iterator[bytes]:
        save.abort()
        held.ended = True
        yield from written(chain, [0, 1, 2, 3])

    with pytest.raises(UnknownLease):
        streams.write(held, messages(), Sums(store.arena))
    assert [bytes(view or b"") for view in views] == before


def test_two_writes_of_one_save_at_once_are_refused(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 2)
    with store.save(chain, 0, 2) as save:
        held = HeldSave(save)
        refused: list[str] = []

        def messages() -> Iterator[bytes]:
            with pytest.raises(ConfigError, match="another Write"):
                streams.write(held, iter(written(chain, [0])), Sums(store.arena))
            refused.append("yes")
            yield from written(chain, [0, 1])

        assert streams.write(held, messages(), Sums(store.arena)) == [0, 1]
        assert refused == ["yes"]


def test_write_that_begins_with_no_message_names_no_session() -> None:
    assert streams.begin_write(iter([])) == (b"", 0)
    with pytest.raises(ConfigError, match="first message"):
        streams.begin_write(iter([b"\xff\xff\xff"]))


# ---- Peek and Fetch ----


def peeked(root: bytes, ids: Sequence[bytes], parts: bytes = b"\0", used: bool = False) -> pb.PeekRequest:
    return pb.PeekRequest(root=root, ids=b"".join(ids), parts=parts, used=used)


@pytest.fixture
def roots(root: Root) -> RootBook:
    book = RootBook()
    book.learn(root)
    return book


def lending(store: KVStore) -> streams.Lend:
    return partial(store.lend, limit_bytes=1 << 40)


def test_peek_says_which_blocks_lie_in_the_host(store: KVStore, root: Root, roots: RootBook) -> None:
    chain = chain_of(root, 6)
    save_all(store, chain, 0, 4)
    found = streams.peek(store, roots, FULL, peeked(root.id, [*chain.ids, os.urandom(32)]))
    assert list(found.present) == [1, 1, 1, 1, 0, 0, 0]


def test_fetch_gives_blocks_in_the_order_asked_with_what_they_hash_to(
    store: KVStore, root: Root, roots: RootBook
) -> None:
    chain = chain_of(root, 6)
    save_all(store, chain)
    ids = [chain.ids[4], os.urandom(32), chain.ids[1], chain.ids[2]]
    first, *messages = streams.fetch(lending(store), roots, FULL, peeked(root.id, ids), Sums(store.arena))
    assert decode(pb.ReadReply, first)[0].num_blocks == 3
    into = {number: [memoryview(bytearray(4096))] for number in (0, 2, 3)}
    unpacker = Unpacker(into.__getitem__, lambda number: number + 1)
    numbers: list[int] = []
    metas: list[pb.Meta] = []
    for message in messages:
        head, data = decode(pb.ReadReply, message)
        metas += head.metas
        numbers += [each.index for each in unpacker.take(head, data) if each.good]
    assert numbers == [0, 2, 3]
    assert [bytes(into[number][0]) for number in numbers] == [content(chain, at, 0, 4096) for at in (4, 1, 2)]
    assert [(meta.parent, meta.depth) for meta in metas] == [(chain.parent_id(at), at) for at in (4, 1, 2)]
    assert [chain.meta(at).tokens for at in (4, 1, 2)] == [meta.tokens for meta in metas]


@pytest.mark.parametrize("case", ["no right to the salt", "a root nobody named", "another root"])
def test_peer_without_rights_sees_what_it_would_see_of_nothing(
    store: KVStore, root: Root, roots: RootBook, case: str
) -> None:
    chain = chain_of(root, 4)
    save_all(store, chain)
    rights = Rights(salts=frozenset({b"mine"}), models=None) if case == "no right to the salt" else FULL
    book = RootBook() if case == "a root nobody named" else roots
    asked = Root(root.model, salt=b"mine") if case == "another root" else root
    book.learn(Root(root.model, salt=b"mine"))
    assert not any(streams.peek(store, book, rights, peeked(asked.id, chain.ids)).present)
    messages = list(streams.fetch(lending(store), book, rights, peeked(asked.id, chain.ids), Sums(store.arena)))
    assert messages == [encode(pb.ReadReply(), ())]


@pytest.mark.parametrize(
    "request_",
    [
        peeked(b"short", []),
        peeked(bytes(32), [b"x" * 31]),
        peeked(bytes(32), [], parts=b""),
        peeked(bytes(32), [], parts=b"\1\1"),
        peeked(bytes(32), [], parts=b"\x40"),
        peeked(bytes(32), [bytes(32)] * (streams.MAX_PEEK_IDS + 1)),
    ],
    ids=["root", "ids", "no parts", "parts twice", "part 64", "too many"],
)
def test_malformed_peek_is_refused(store: KVStore, request_: pb.PeekRequest) -> None:
    with pytest.raises(ConfigError):
        streams.peek(store, RootBook(), FULL, request_)
    with pytest.raises(ConfigError):
        streams.fetch(lending(store), RootBook(), FULL, request_, Sums(store.arena))


def test_peek_for_use_keeps_a_chain_warm(make_store: MakeStore, root: Root, roots: RootBook) -> None:
    store = make_store(8)
    old, new = chain_of(root, 4, seed=1), chain_of(root, 4, seed=2)
    save_all(store, old)
    save_all(store, new)
    streams.peek(store, roots, FULL, peeked(root.id, old.ids, used=True))
    save_all(store, chain_of(root, 4, seed=3))
    assert list(streams.peek(store, roots, FULL, peeked(root.id, old.ids)).present) == [1, 1, 1, 1]
    assert list(streams.peek(store, roots, FULL, peeked(root.id, new.ids)).present) == [0, 0, 0, 0]


# ---- stalls ----


def test_stream_that_nobody_takes_from_is_cancelled() -> None:
    stalls = streams.StallWatch(0.1)
    cancelled = threading.Event()
    stream = stalls.sending(iter([b"a", b"b"]), cancelled.set)
    assert next(stream) == b"a"
    assert cancelled.wait(5)
    stalls.close()


def test_stream_that_is_taken_from_now_and_then_goes_on() -> None:
    def goes_on() -> bool:
        stalls = streams.StallWatch(0.4)
        cancelled = threading.Event()
        taken = 0
        for _ in stalls.sending(iter([b"x"] * 12), cancelled.set):
            taken += 1
            threading.Event().wait(0.05)
        stalls.close()
        return taken == 12 and not cancelled.is_set()

    assert any(goes_on() for _ in range(8))  # a machine that stands still takes nothing meanwhile either


def test_stream_that_nobody_sends_to_is_cancelled() -> None:
    stalls = streams.StallWatch(0.1)
    cancelled = threading.Event()

    def silent() -> Iterator[bytes]:
        yield b"a"
        cancelled.wait(5)

    assert list(stalls.receiving(silent(), cancelled.set)) == [b"a"]
    assert cancelled.is_set()
    stalls.close()


def test_checksum_is_the_one_of_frames() -> None:
    from kvstore.wire import frame

    assert checksum(b"abc") == frame.checksum(b"abc")


def test_parts_of_a_model_go_where_the_layout_says(make_store: MakeStore) -> None:
    model = ModelId(
        model="grid",
        revision="1",
        kv_dtype="bfloat16",
        num_layers=2,
        num_kv_heads=2,
        head_dim=16,
        block_tokens=16,
        part_layers=1,
        part_heads=1,
    )
    store = make_store(64)
    store.open(model)
    chain = chain_of(Root(model), 5)
    save_all(store, chain)
    store.match(chain, "r", parts=[2, 0])
    size = layout_of(model).parts[0].num_bytes
    with store.load("r") as load:
        messages = list(streams.read(load, Sums(store.arena)))
    into = [[memoryview(bytearray(size)) for _ in range(2)] for _ in range(5)]
    assert all(each.good for each in unpacked(messages[1:], into))
    assert [[bytes(view) for view in views] for views in into] == [
        [content(chain, index, part, size) for part in (2, 0)] for index in range(5)
    ]
