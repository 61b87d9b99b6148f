# SPDX-License-Identifier: Apache-2.0
"""What of CUDA's streams can be seen without CUDA: how a thread comes to a device, and leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("torch", reason="streams are torch's")

import torch

from kvstore.streams import CudaStreams


def test_a_thread_is_on_the_copies_device_before_it_enters_a_stream_and_until_it_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch's own context of a stream, left by a thread of another device, calls cudaSetDevice of that one."""
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
    CudaStreams(torch.device("cuda", 3)).submit("a stream", lambda: seen.append("copy"))
    assert seen == ["into device cuda:3", "into stream a stream", "copy", "out of stream", "out of device"]
