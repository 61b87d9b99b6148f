# SPDX-License-Identifier: Apache-2.0
"""Adapters are known by content, and KV is kept only where the engine read the files that it is named by."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from connectors.vllm_adapters import Adapter, AdapterDigests, AdapterFiles, adapter_digest
from connectors.vllm_plan import Orders, Scheduled
from kvstore.block import Chain, Root
from kvstore.errors import ConfigError
from tests.connectors.test_vllm_plan import BLOCK, MODEL, PAGE, Bench, FakeRequest, tokens
from tests.waiting import eventually


def adapter_of(directory: Path, *, load_inplace: bool = False) -> Any:
    return SimpleNamespace(lora_name="x", lora_int_id=1, lora_path=str(directory), load_inplace=load_inplace)


def test_an_adapter_is_a_miss_until_its_digest_is_known() -> None:
    class Late(AdapterDigests):
        def __init__(self) -> None:
            super().__init__()
            self.future: Future[Adapter] = Future()

        def of(self, lora: Any) -> Future[Adapter]:
            return self.future if lora is not None else super().of(lora)

    bench = Bench()
    bench.fill(tokens(100))
    late = Late()
    bench.side._adapters = late
    request = FakeRequest("r", tokens(120), lora_request=SimpleNamespace(lora_int_id=1, lora_path="x"))
    assert bench.side.match(request, 0) == (0, False)
    assert bench.step((request, 120)).saves == ()
    late.future.set_result(Adapter(b"digest"))
    request.num_computed_tokens = 0
    assert [(order.adapter, order.stop) for order in bench.step((request, 120)).saves] == [(b"digest", 7)]
    bench.side.ended(request, ())
    again = FakeRequest("s", tokens(120), lora_request=SimpleNamespace(lora_int_id=1, lora_path="x"))
    assert bench.side.match(again, 0) == (112, False)
    bench.side.ended(again, ())
    bench.report()
    bench.close()


def test_digests_of_adapters_are_computed_on_another_thread_once_each(tmp_path: Path) -> None:
    go, seen = threading.Event(), list[tuple[str, str]]()

    def digest(directory: Path) -> bytes:
        go.wait(10)
        seen.append((directory.name, threading.current_thread().name))
        if not directory.exists():
            raise FileNotFoundError(directory)
        return directory.name.encode()

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"one")
    digests = AdapterDigests(digest)
    one = SimpleNamespace(lora_name="x", lora_int_id=1, lora_path=str(tmp_path / "one"), load_inplace=False)
    gone = SimpleNamespace(lora_name="y", lora_int_id=2, lora_path=str(tmp_path / "gone"), load_inplace=False)
    futures = [digests.of(one), digests.of(gone), digests.of(one)]
    assert not any(future.done() for future in futures), "whoever asks does not wait"
    go.set()
    assert futures[0].result(10).digest == futures[2].result(10).digest == b"one"
    assert isinstance(futures[1].exception(10), FileNotFoundError)
    assert [name for name, _ in seen] == ["one", "gone"]
    assert all(thread.startswith("kvstore-lora") for _, thread in seen)
    one.load_inplace = True  # as vLLM says of every request after it was loaded in place once
    assert digests.of(one).result(0).digest == b"one", "known at once, so that the request can load"
    assert len(seen) == 2
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"other")
    assert digests.of(one).result(10).digest == b"one"
    assert len(seen) == 3
    digests.close()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_whose_files_changed_is_not_known_until_the_engine_loads_it_anew(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"old")
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    digests = AdapterDigests()
    old = digests.of(adapter_of(tmp_path)).result(10)
    assert digests.of(adapter_of(tmp_path)).result(10) == old
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(before + b" ")
    assert isinstance(digests.of(adapter_of(tmp_path)).exception(10), ConfigError), "which one the engine has"
    new = digests.of(adapter_of(tmp_path, load_inplace=True)).result(10)
    assert new != old
    assert digests.of(adapter_of(tmp_path)).result(10) == new
    digests.close()


def test_an_adapter_that_changed_and_changed_back_stays_unknown(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"old")
    digests = AdapterDigests()
    digests.of(adapter_of(tmp_path)).result(10)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "aside")
    assert digests.of(adapter_of(tmp_path)).exception(10) is not None
    (tmp_path / "aside").rename(tmp_path / "adapter_model.safetensors")
    assert digests.of(adapter_of(tmp_path)).exception(10) is not None, "the engine may have read it meanwhile"
    digests.close()


def test_an_adapter_whose_files_change_while_they_are_read_is_not_known(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"old")

    def digest(directory: Path) -> bytes:
        found = adapter_digest(directory)
        file.write_bytes(b"newer")
        return found

    digests = AdapterDigests(digest)
    assert isinstance(digests.of(adapter_of(tmp_path)).exception(10), ConfigError)
    digests.close()


def test_a_request_whose_adapter_cannot_be_read_runs_without_reuse(tmp_path: Path) -> None:
    bench = Bench()
    bench.fill(tokens(100))
    gone = SimpleNamespace(lora_name="x", lora_int_id=1, lora_path=str(tmp_path / "gone"), load_inplace=False)
    request = FakeRequest("r", tokens(120), lora_request=gone)
    bench.side.arrived(request)
    assert bench.side._tracked["r"].adapter.exception(10) is not None
    assert bench.side.match(request, 0) == (0, False)
    bench.side.allocated(request, bench.pages_for(request), 0)
    assert bench.step((request, 120)).saves == ()
    assert not bench.side.ended(request, bench.pages_for(request))
    bench.close()


def test_an_adapter_is_known_by_its_weights_and_settings(tmp_path: Path) -> None:
    digests = []
    for name, weights, settings in (("a", b"w", b"{}"), ("b", b"w", b"{}"), ("c", b"v", b"{}"), ("d", b"w", b"{ }")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(weights)
        (tmp_path / name / "adapter_config.json").write_bytes(settings)
        digests.append(adapter_digest(tmp_path / name))
    assert digests[0] == digests[1]
    assert len({*digests}) == 3


def test_a_copy_over_an_adapters_file_that_keeps_size_and_time_of_writing_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"old")
    before, files = file.stat(), AdapterFiles.at(str(tmp_path))
    assert files.are_unchanged
    with file.open("r+b") as same:
        same.write(b"new")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not files.are_unchanged


# -- files that change under a request -------------------------------------------------------------------------


class Adapted:
    """Both sides, and an adapter on disk that a request is computed with."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory, self.bench = directory, Bench(**settings)
        self.write(b"old")
        self.old = adapter_digest(directory)

    def write(self, weights: bytes) -> None:
        (self.directory / "adapter_model.safetensors").write_bytes(weights)

    def arrives(self, name: str, count: int = 120, *, load_inplace: bool = False) -> FakeRequest:
        request = FakeRequest(name, tokens(count), lora_request=adapter_of(self.directory, load_inplace=load_inplace))
        self.bench.side.arrived(request)
        self.bench.side._tracked[name].adapter.result(10)
        return request

    def starts(self, request: FakeRequest, local_tokens: int = 0) -> int:
        """Match it and give it pages; how many tokens are loaded for it."""
        found, _ = self.bench.side.match(request, local_tokens)
        assert found is not None
        self.bench.side.allocated(request, self.bench.pages_for(request), found)
        request.num_computed_tokens = local_tokens + found
        return found

    def runs(self, request: FakeRequest) -> tuple[Orders, set[int]]:
        """Its step; what was ordered, and the pages that the engine is told to compute again."""
        orders = self.bench.step((request, request.num_tokens - request.num_computed_tokens))
        bad = self.bench.worker.bad_pages(orders.proofs)
        self.bench.report()
        return orders, bad

    def ends(self, request: FakeRequest) -> None:
        if self.bench.side.ended(request, self.bench.pages_for(request)):
            self.bench.step()
        self.bench.report()

    def stored(self) -> int:
        """Blocks that lie under the digest of the files as they were."""
        found = self.bench.store.match(Chain(Root(MODEL, self.old), tokens(120)), "look")
        self.bench.store.forget("look")
        return found.num_blocks


def test_kv_of_an_adapter_rewritten_between_arrival_and_first_step_is_not_stored_as_the_old_ones(
    tmp_path: Path,
) -> None:
    adapted = Adapted(tmp_path)
    request = adapted.arrives("r")
    adapted.starts(request)
    adapted.write(b"new")  # what the engine reads
    orders, _ = adapted.runs(request)
    assert [order.adapter for order in orders.saves] == [adapted.old], "the scheduler's side cannot know"
    adapted.ends(request)
    assert adapted.stored() == 0
    assert adapted.bench.pages.read == []
    adapted.bench.close()


def test_an_adapter_rewritten_in_a_later_step_saves_no_more(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path)
    request = adapted.arrives("r")
    adapted.starts(request)
    adapted.bench.step((request, 64))
    adapted.write(b"new")
    adapted.runs(request)
    adapted.ends(request)
    assert adapted.stored() == 64 // BLOCK
    adapted.bench.close()


@pytest.mark.parametrize("sync_load_ms", [1e9, 0.0])
def test_what_was_loaded_for_an_adapter_that_was_rewritten_before_the_engine_read_it_is_computed_again(
    tmp_path: Path, sync_load_ms: float
) -> None:
    adapted = Adapted(tmp_path, sync_load_ms=sync_load_ms)
    first = adapted.arrives("first")
    adapted.starts(first)
    adapted.runs(first)
    adapted.ends(first)
    assert adapted.stored() == 7
    for name, changes in (("sound", False), ("changed", True)):
        request = adapted.arrives(name)
        assert adapted.starts(request) == 112
        if not sync_load_ms:  # loaded beside a step that it is not in
            assert eventually(lambda: adapted.bench.step() and adapted.bench.report())
        if changes:
            adapted.write(b"new")
        orders, bad = adapted.runs(request)
        assert len(orders.proofs) == 1
        assert bad == (set(adapted.bench.pages_for(request)[0][: 112 // PAGE]) if changes else set())
        assert adapted.runs(request)[0].proofs == (), "it is asked once"
        adapted.ends(request)
    assert adapted.stored() == 7
    adapted.bench.close()


def test_kv_that_the_engine_kept_of_an_adapter_as_it_was_is_not_stored_as_the_new_ones(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path)
    adapted.ends(adapted.arrives("first"))
    adapted.write(b"new")
    new = adapted.arrives("again", load_inplace=True)
    assert adapted.starts(new, 64) == 0  # vLLM's own cache goes by the adapter's name and path
    orders, _ = adapted.runs(new)
    assert orders.saves == ()
    adapted.ends(new)
    anew = adapted.arrives("anew")
    assert adapted.starts(anew) == 0
    orders, _ = adapted.runs(anew)
    assert [(order.adapter, order.stop) for order in orders.saves] == [(adapter_digest(tmp_path), 7)]
    adapted.ends(anew)
    adapted.bench.close()


def test_pages_of_a_rewritten_adapter_are_told_with_the_step_though_it_is_saved_only_after(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path)
    for name in ("first", "changed"):
        request = adapted.arrives(name)
        adapted.starts(request)
        if name == "changed":
            adapted.write(b"new")
            step = Scheduled({name: 8}, {name: 112}, {name: adapted.bench.pages_for(request)}.__getitem__)
            orders = adapted.bench.side.orders(step)
            adapted.bench.worker.load(orders)
            want = set(adapted.bench.pages_for(request)[0][: 112 // PAGE])
            assert adapted.bench.worker.bad_pages(orders.proofs) == want, "with drafts, vLLM asks before it saves"
            adapted.bench.worker.save(orders)
            assert adapted.bench.worker.bad_pages() == set()
        else:
            adapted.runs(request)
        adapted.ends(request)
    assert adapted.stored() == 7
    adapted.bench.close()


def test_a_number_that_has_stood_for_two_paths_neither_saves_nor_loads_under_either(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    adapted = Adapted(tmp_path / "a")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"new")
    before = adapted.arrives("before")
    adapted.starts(before)
    adapted.bench.step((before, 64))
    assert adapted.stored() == 64 // BLOCK
    in_place = adapter_of(tmp_path / "b", load_inplace=True)
    after = FakeRequest("after", tokens(120), lora_request=in_place)
    adapted.bench.side.arrived(after)  # from the step that loaded it on, "before" is computed with its weights
    assert adapted.runs(before)[0].saves == ()
    adapted.starts(before)  # it was preempted
    assert adapted.bench.store.live_announcements == 0, "nobody waits for what is not saved"
    adapted.ends(before)
    assert adapted.starts(after) == 0
    assert adapted.runs(after)[0].saves == ()
    adapted.ends(after)
    assert adapted.stored() == 64 // BLOCK
    again = FakeRequest("again", tokens(120), lora_request=adapter_of(tmp_path / "a"))
    assert adapted.bench.side.match(again, 0) == (0, False)
    adapted.ends(again)
    assert adapted.bench.store.live_announcements == 0
    adapted.bench.close()
