# SPDX-License-Identifier: Apache-2.0
"""What of CUDA's streams can be seen without CUDA: how a thread comes to a device, and leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("torch", reason="streams are torch's")

import torch

from kvstore.streams import CudaStreams


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is entered and left of torch's contexts, in order."""
    seen: list[str] = []

    def noted(name: str) -> object:
        @contextmanager
        def enter(what: object) -> Iterator[None]:
            seen.append(f"into {name} {what}")
            yield
            seen.append(f"out of {name}")

        return enter

    monkeypatch.setattr(torch.cuda, "device", noted("device"))
    monkeypatch.setattr(torch.cuda, "stream", noted("stream"))
    return seen


def test_a_thread_is_on_the_copies_device_before_it_enters_a_stream_and_until_it_has_left(seen: list[str]) -> None:
    """Torch's own context of a stream, left by a thread of another device, calls cudaSetDevice of that one."""
    CudaStreams(torch.device("cuda", 3)).submit("a stream", lambda: seen.append("copy"))
    assert seen == ["into device cuda:3", "into stream a stream", "copy", "out of stream", "out of device"]


def test_a_thread_waits_for_a_copy_on_its_device(seen: list[str]) -> None:
    """The thread that publishes saves calls CUDA for nothing else where none of a save was put off, and torch chooses
    no device for it: on a machine with several, every worker's would make itself a context on the first."""

    class Event:
        def synchronize(self) -> None:
            seen.append("synchronize")

        def query(self) -> bool:
            seen.append("query")
            return True

    streams = CudaStreams(torch.device("cuda", 3))
    streams.finish(Event())
    assert streams.is_reached(Event())
    there = ["into device cuda:3", "synchronize", "out of device"]
    assert seen == [*there, there[0], "query", there[2]]
