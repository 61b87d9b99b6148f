# SPDX-License-Identifier: Apache-2.0
"""Calls that take long: how many of them run at once, and what that leaves to others."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import grpc
import pytest

from kvstore.block import ModelId, Root
from kvstore.errors import CapacityError
from kvstore.service.session import Account
from kvstore.service.turns import Turns
from kvstore.wire import kvstore_pb2 as pb
from tests.conftest import chain_of
from tests.service.conftest import StartServer
from tests.service.test_servicer import Peer, make_peer

__all__ = ["make_peer"]

FLOOD = 100
NUM_BLOCKS = 4_000


def test_one_account_has_half_of_the_turns_and_all_of_them_together_no_more_than_there_are() -> None:
    turns, accounts = Turns("Inspect", 4), [Account() for _ in range(3)]
    with ExitStack() as running:
        running.enter_context(turns.taken(accounts[0]))
        second = running.enter_context(ExitStack())
        second.enter_context(turns.taken(accounts[0]))
        with pytest.raises(CapacityError, match="2 calls of Inspect run already for this client or its tenant"):
            running.enter_context(turns.taken(accounts[0]))
        running.enter_context(turns.taken(accounts[1]))
        running.enter_context(turns.taken(accounts[1]))
        with pytest.raises(CapacityError, match="4 calls of Inspect run already: try again in a moment"):
            running.enter_context(turns.taken(accounts[2]))
        second.close()
        running.enter_context(turns.taken(accounts[2]))
    assert not turns._running, "nothing is kept of those that have ended"


@pytest.mark.alone
def test_a_flood_of_inspects_is_refused_and_another_client_is_answered_meanwhile(
    start_server: StartServer, make_peer: Callable[..., Peer], model: ModelId, root: Root
) -> None:
    server = start_server(num_blocks=NUM_BLOCKS)
    flooder, other = make_peer(server), make_peer(server)
    chain, short = chain_of(root, NUM_BLOCKS), chain_of(root, 3, seed=1)
    flooder.save(chain)
    flooder.commit(1, *range(NUM_BLOCKS))
    whole = other.whole(short)
    other.match(whole)  # its chain is known from now on
    asked = pb.InspectRequest(session=flooder.session, ids=b"".join(chain.ids))
    flood = [flooder.stub.Inspect.future(asked, timeout=60) for _ in range(FLOOD)]  # type: ignore[attr-defined]
    waits_s: list[float] = []
    while not waits_s or not all(call.done() for call in flood):
        began_s = time.perf_counter()
        other.stub.Match(pb.MatchRequest(session=other.session, request="r", chain=whole), timeout=20.0)
        waits_s.append(time.perf_counter() - began_s)
    codes = [call.code() for call in flood]
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(len(call.result().blocks) == NUM_BLOCKS for call in flood if call.code() is grpc.StatusCode.OK)
    said = {call.details() for call in flood if call.code() is not grpc.StatusCode.OK}
    assert said == {"2 calls of Inspect run already for this client or its tenant: wait"}
    print(f"{codes.count(grpc.StatusCode.OK)} answered, longest match {max(waits_s):.3f} s of {len(waits_s)}")
    assert sorted(waits_s)[len(waits_s) // 2] < 1.0
    other.end(requests=["r"])
    flooder.end(saves=[1])
