# SPDX-License-Identifier: Apache-2.0
"""Work a few steps ahead of whoever takes its results: the next message is made while gRPC sends the last one."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _Ended:
    failure: BaseException | None


def ahead(items: Iterator[Item], num_items: int) -> Iterator[Item]:
    """`items`, made on a thread of their own, at most `num_items` before they are taken. Its errors come as its own.

    When the caller stops, `items` is closed before this returns.
    """

    def all_of_them() -> Generator[Item]:  # which can be closed, whatever `items` is
        yield from items

    source = all_of_them()
    # Two queues in C: with a condition, which is Python, waking and waiting took as long as making a message.
    made: SimpleQueue[Item | _Ended] = SimpleQueue()
    room: SimpleQueue[bool] = SimpleQueue()
    for _ in range(num_items):
        room.put(True)
    stopped = False

    def make() -> None:
        failure = None
        try:
            while room.get() and not stopped:
                made.put(next(source))
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001 a thread's top: the taker raises it
            failure = error
        finally:
            source.close()
            made.put(_Ended(failure))

    thread = threading.Thread(target=make, name="kvstore-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _Ended):
            room.put(True)
            yield item
        failure = item.failure
    finally:
        stopped = True
        room.put(True)
        thread.join()
    if failure is not None:
        raise failure
