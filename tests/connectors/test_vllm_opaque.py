# SPDX-License-Identifier: Apache-2.0
"""Pages whose order is not known: kernels made up here that scramble them, and what tells two such engines apart."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from connectors.vllm_code import attention_classes, attention_name, releases, source_digest
from connectors.vllm_groups import LayerGroups
from connectors.vllm_identity import RankSlice
from connectors.vllm_layout import StoredPages, Worker, agreed_model, facts_of, stored_pages
from connectors.vllm_opaque import (
    OpaqueDevicePages,
    OpaquePages,
    fingerprint,
    opaque_model,
    page_digest,
    steps_in_page,
)
from connectors.vllm_order import UnknownOrder
from connectors.vllm_pages import DevicePages, EnginePages, PackedPages, StridedPages
from connectors.vllm_plan import PageLayout
from kvstore.block import ModelId
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, layout_of

PAGE, HEADS, DIM, LAYERS = 32, 2, 16, 3
MODEL = ModelId(
    model="m", revision="1", kv_dtype="float32", num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, block_tokens=64
)


def tensors(*, heads: int = HEADS, layers: int = LAYERS, page: int = PAGE) -> list[torch.Tensor]:
    return [torch.zeros(9, heads, page, 2 * DIM) for _ in range(layers)]


class Kernel:
    """Writes a page in an order that no strides describe, across heads, another one for each seed."""

    def __init__(self, seed: int, heads: int = HEADS) -> None:
        self.place = torch.randperm(heads * PAGE * 2 * DIM, generator=torch.Generator().manual_seed(seed))

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
        for number, slot in enumerate(slots.tolist()):
            page, token = divmod(slot, PAGE)
            at = self.place.view(tensor.shape[1:])[:, token]
            tensor[page].view(-1)[at] = torch.cat([keys[number], values[number]], -1)

    def read(self, page: torch.Tensor) -> torch.Tensor:
        """`[heads, tokens, 2 × dim]` of a page."""
        return page.reshape(-1)[self.place].view(page.shape)


class Attention:
    """An engine's attention, as far as pages are concerned."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self._kernel = kernel

    def do_kv_cache_update(
        self, layer: Any, keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self._kernel(keys * layer._k_scale_float, values, tensor, slots)


class AttentionOfAnotherKind(Attention):
    pass


class WritesInForward:
    """It has no kernel that writes pages alone."""


class Backend:
    forward_includes_kv_cache_update = False


def plain(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
    for number, slot in enumerate(slots.tolist()):
        tensor[slot // PAGE, :, slot % PAGE] = torch.cat([keys[number], values[number]], -1)


@dataclass
class Settings:
    backend: str = "one"


@dataclass
class Engine:
    """What is looked at of an engine; each field decides what its pages' bytes mean."""

    impl: Any = field(default_factory=lambda: Attention(Kernel(1)))
    isa: str = "vec"
    release: str = "vllm 0.32.0"
    platform: str = "cpu x86_64 AVX512"
    cache_dtype: str = "auto"
    attention: Settings = field(default_factory=Settings)
    dtype: torch.dtype = torch.float32
    tp: int = 1
    pp: int = 1
    mine: RankSlice = field(default_factory=lambda: RankSlice(range(LAYERS), range(HEADS)))
    tensors: list[torch.Tensor] = field(default_factory=tensors)
    page_bytes: int = HEADS * PAGE * 2 * DIM * 4
    model: ModelId = MODEL

    def worker(self) -> Worker:
        layer = SimpleNamespace(impl=self.impl, isa=self.isa, attn_backend=Backend, _k_scale_float=2.0)
        config: Any = SimpleNamespace(
            model_config=SimpleNamespace(dtype=self.dtype),
            cache_config=SimpleNamespace(cache_dtype=self.cache_dtype),
            attention_config=self.attention,
            parallel_config=SimpleNamespace(tensor_parallel_size=self.tp, pipeline_parallel_size=self.pp),
        )
        return Worker(
            engine=self.release,
            platform=self.platform,
            config=config,
            model=self.model,
            layers=[layer] * len(self.tensors),
            tensors=self.tensors,
            mine=self.mine,
            page_bytes=self.page_bytes,
            groups=LayerGroups.of_one(len(self.tensors)),
        )


def stored(wanted: PageLayout = PageLayout.AUTO, **changes: Any) -> StoredPages:
    return stored_pages(Engine(**changes).worker(), wanted)


def slots_of(layout: BlockLayout, parts: tuple[int, ...]) -> list[memoryview]:
    return [memoryview(bytearray(layout.parts[part].num_bytes)) for part in parts]


# -- which form --------------------------------------------------------------------------------------------------


def test_a_page_order_that_strides_describe_is_stored_as_canonical_bytes_whatever_the_layers_scale() -> None:
    made = stored(impl=Attention(plain))
    assert isinstance(made.pages, PackedPages)
    assert made.model == MODEL
    assert made.why == ""


@pytest.mark.parametrize(
    ("impl", "why"),
    [
        (Attention(Kernel(1)), "packed across heads"),
        (WritesInForward(), "only as part of attention"),
        (Attention(lambda *given: torch.zeros(2)[7]), "cannot be tried: IndexError"),
    ],
)
def test_a_page_order_that_is_not_found_is_stored_as_it_is_and_says_why(impl: Any, why: str) -> None:
    made = stored(impl=impl)
    assert isinstance(made.pages, OpaquePages)
    assert made.model.layout.startswith("opaque:")
    assert why in made.why
    with pytest.raises(UnknownOrder, match=why):
        stored(PageLayout.CANONICAL, impl=impl)


def test_it_can_be_set_that_pages_are_stored_as_they_are() -> None:
    made = stored(PageLayout.OPAQUE, impl=Attention(plain))
    assert isinstance(made.pages, OpaquePages)
    assert replace(made.model, layout="canonical") == MODEL


def test_an_order_found_that_fails_its_trial_is_not_taken_for_canonical() -> None:
    def swaps_heads(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
        plain(keys.flip(1), values.flip(1), tensor, slots)  # the probe writes the same to all heads

    made = stored(impl=Attention(swaps_heads))
    assert made.model.is_opaque
    assert "do not hold what its kernel wrote" in made.why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"page_bytes": HEADS * PAGE * (2 * DIM + 1) * 4}, "what the others mean is not known"),
        ({"tensors": [torch.zeros(9, HEADS, PAGE, 2 * DIM + 1)] * LAYERS}, "it is not stored|what the others mean"),
        ({"tensors": [*tensors(layers=2), torch.zeros(9, HEADS, PAGE, 4 * DIM)]}, "different shapes"),
        ({"tensors": tensors(page=48), "page_bytes": HEADS * 48 * 2 * DIM * 4}, "must be a multiple"),
        ({"tensors": tensors(page=512), "page_bytes": HEADS * 512 * 2 * DIM * 4}, "must be a multiple"),
    ],
)
def test_pages_that_are_not_keys_and_values_alone_or_make_no_blocks_are_refused(
    changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        stored(PageLayout.OPAQUE, impl=WritesInForward(), **changes)


def rolls(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
    Kernel(int(torch.randint(1 << 30, (1,))))(keys, values, tensor, slots)


def swizzles(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
    """Even and odd pages in orders of their own."""
    for odd in (0, 1):
        mine = slots // PAGE % 2 == odd
        Kernel(odd)(keys[mine], values[mine], tensor, slots[mine])


def swizzles_by_three(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
    """Pages 1 and 4 are alike, 6 is not."""
    for rest in (0, 1, 2):
        mine = slots // PAGE % 3 == rest
        Kernel(rest)(keys[mine], values[mine], tensor, slots[mine])


def goes_by_the_call(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
    """Another order where a page comes at once."""
    Kernel(int(len(keys) == PAGE))(keys, values, tensor, slots)


def writes_beyond(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
    """Of each page, one number stands in the next."""
    Kernel(1)(keys, values, tensor, slots)
    for page in (slots // PAGE).unique().tolist():
        tensor[page + 1].view(-1)[0] = keys[0, 0, 0]


def keeps_values_elsewhere(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
    """Half of the page is not written: values go to a buffer of the kernel's own."""
    for number, slot in enumerate(slots.tolist()):
        tensor[slot // PAGE, :, slot % PAGE, :DIM] = keys[number]


def clears_values(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
    """The same, and the page's half is zero."""
    Kernel(1)(keys, torch.zeros_like(values), tensor, slots)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (rolls, "other bytes of the same numbers each time"),
        (swizzles, "in another page"),
        (swizzles_by_three, "in another page"),
        (goes_by_the_call, "fewer tokens come at once"),
        (writes_beyond, "writes other pages"),
        (keeps_values_elsewhere, "leaves bytes of a page as they were"),
        (clears_values, "does not put all numbers"),
    ],
)
def test_a_page_that_does_not_stand_alone_is_refused(kernel: Callable[..., None], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        stored(PageLayout.OPAQUE, impl=Attention(kernel))


# -- who shares ----------------------------------------------------------------------------------------------------


def with_steps(step: int) -> list[torch.Tensor]:
    """The same pages with a gap between heads."""
    return [torch.zeros(9, HEADS, PAGE + step, 2 * DIM)[:, :, :PAGE] for _ in range(LAYERS)]


DIFFERENT: dict[str, tuple[set[str], dict[str, Any]]] = {
    "kernel": ({"written"}, {"impl": Attention(Kernel(2))}),
    "class": ({"attention"}, {"impl": AttentionOfAnotherKind(Kernel(1))}),
    "instruction set": ({"isa"}, {"isa": "amx"}),
    "release": ({"engine"}, {"release": "vllm 0.32.1"}),
    "platform": ({"platform"}, {"platform": "cpu x86_64 AVX2"}),
    "kv dtype": ({"kv dtype"}, {"cache_dtype": "fp8"}),
    "model's dtype": ({"kv dtype"}, {"dtype": torch.bfloat16, "impl": WritesInForward()}),
    "settings": ({"settings"}, {"attention": Settings("another")}),
    "tp": ({"split"}, {"tp": 2}),
    "pp": ({"split"}, {"pp": 2}),
    "heads": ({"split"}, {"mine": RankSlice(range(LAYERS), range(1))}),
    "page steps": ({"page"}, {"tensors": with_steps(1)}),
    "page size": ({"page"}, {"tensors": tensors(page=64), "impl": WritesInForward()}),
    "dtype": ({"page"}, {"tensors": [each.to(torch.int32) for each in tensors()], "impl": WritesInForward()}),
}
"""What differs, the facts that say so and no others do, and how an engine is made to be so."""


@pytest.mark.parametrize("what", DIFFERENT)
def test_engines_that_differ_in_anything_that_decides_their_bytes_share_nothing(what: str) -> None:
    says, changes = DIFFERENT[what]
    alike = {"impl": changes["impl"]} if isinstance(changes.get("impl"), WritesInForward) else {}
    one, other = facts_of(Engine(**alike).worker()), facts_of(Engine(**changes).worker())
    assert {name for name in one if one[name] != other[name]} == says
    assert fingerprint(one) != fingerprint(other)


def test_engines_that_are_alike_share_and_so_do_all_ranks_and_any_number_of_pages() -> None:
    common: dict[str, Any] = {"tp": 2, "impl": Attention(Kernel(1, heads=1))}
    one = facts_of(Engine(mine=RankSlice(range(LAYERS), range(1)), tensors=tensors(heads=1), **common).worker())
    larger = [torch.zeros(30, 1, PAGE, 2 * DIM) for _ in range(LAYERS)]
    other = facts_of(Engine(mine=RankSlice(range(LAYERS), range(1, 2)), tensors=larger, **common).worker())
    assert one == other
    assert re.fullmatch("[0-9a-f]{64}", one["written"]), "the kernel was tried"


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_KV_CACHE_LAYOUT",
        "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT",
        "AITER_ANYTHING",
        "FLASHINFER_ANYTHING",
        "FLASH_ATTENTION_TRITON_AMD_ENABLE",
        "TESTS_ANYTHING",  # the package of this test's classes
    ],
)
def test_environment_that_may_choose_an_order_is_part_of_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    before = facts_of(Engine().worker())
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert facts_of(Engine().worker()) == before, "threads are not"
    monkeypatch.setenv(name, "1")
    assert facts_of(Engine().worker()) != before


def test_a_patched_backend_is_another_one_though_its_name_and_release_are_the_same(tmp_path: Path) -> None:
    prints = []
    for number in (1, 2, 1):
        (tmp_path / "patched.py").write_text(f"class Kernel:\n    order = {number}\n")
        spec = importlib.util.spec_from_file_location("patched", tmp_path / "patched.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["patched"] = module

        class Ours(module.Kernel):  # type: ignore[name-defined,misc]
            pass

        prints.append(fingerprint(facts_of(Engine(impl=Ours()).worker())))
        del sys.modules["patched"]
    assert prints[0] == prints[2] != prints[1]


def test_a_packages_helpers_and_libraries_are_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "plugin_with_pages"
    (directory / "deep").mkdir(parents=True)
    (directory / "__init__.py").write_text("class Attention:\n    pass\n")
    (directory / "deep" / "helper.py").write_text("ORDER = 1\n")
    (directory / "kernel.so").write_bytes(b"one")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plugin = importlib.import_module(directory.name)

    def facts() -> dict[str, str]:
        return facts_of(Engine(impl=plugin.Attention()).worker())

    first = facts()
    assert facts() == first
    (directory / "notes.txt").write_text("not code")
    assert facts() == first
    seen = {first["packages"]}
    for name, content in (("deep/helper.py", b"ORDER = 2\n"), ("kernel.so", b"another"), ("more.so", b"")):
        (directory / name).write_bytes(content)
        now = facts()
        assert {key for key in now if now[key] != first[key]} == {"packages"}
        seen.add(now["packages"])
    assert len(seen) == 4
    del sys.modules[directory.name]


def test_releases_of_what_may_write_pages_are_part_of_it_and_no_others() -> None:
    has = {"flash-attn": "2.8", "amd_aiter": "0.1", "FlashInfer.python": "0.5", "triton": "3", "My_Plugin": "7"}
    others = {"tritonclient": "2", "requests": "2.32", "numpy": "2"}
    said = releases(["my_plugin", "numpyro"], [*has.items(), *others.items()])
    assert said == "amd-aiter=0.1 flash-attn=2.8 flashinfer-python=0.5 my-plugin=7 triton=3"
    for name in has:
        assert releases(["my_plugin"], [*(has | {name: "9"}).items(), *others.items()]) != said


def composed(**variants: type) -> tuple[type, type]:
    """A backend and its implementation as vLLM composes them: their names say nothing of what they are made of."""

    class Composite:
        pass

    class CompositeBackend:
        forward_includes_kv_cache_update = False

        @staticmethod
        def get_impl_cls() -> type:
            return Composite

    for name, kind in variants.items():
        setattr(CompositeBackend, name, kind)
    return CompositeBackend, Composite


def test_composed_backends_are_told_apart_by_what_they_are_made_of() -> None:
    class One:
        get_impl_cls = staticmethod(lambda: Attention)

    class Other:
        get_impl_cls = staticmethod(lambda: AttentionOfAnotherKind)

    made = [composed(first=One, second=Other), composed(first=Other, second=One), composed(first=One)]
    made.append(composed(first=composed(first=Other)[0]))
    assert len({attention_name(*each) for each in made}) == len(made)
    assert attention_name(*composed(first=One)) == attention_name(*made[2])
    assert {Attention, AttentionOfAnotherKind, One, Other} < attention_classes(*made[0])
    assert {AttentionOfAnotherKind, Other} < attention_classes(*made[3])


def test_a_backend_whose_source_cannot_be_read_says_so(tmp_path: Path) -> None:
    source = tmp_path / "gone.py"
    source.write_text("class Gone:\n    pass\n")
    spec = importlib.util.spec_from_file_location("gone", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["gone"] = module
    source.unlink()
    assert source_digest([module.Gone]) == "no source"
    del sys.modules["gone"]


def test_a_single_number_elsewhere_in_a_page_is_another_digest() -> None:
    kernel, other = Kernel(1), Kernel(1)
    other.place[[100, 900]] = other.place[[900, 100]]
    digests = {page_digest(each, tensors()[0], torch.float32) for each in (kernel, other)}
    assert len(digests) == 2


def test_fingerprints_do_not_meet_where_names_and_values_run_together() -> None:
    lists = ({"a": "b", "c": "d"}, {"a": "bc", "": "d"}, {"a": "b1", "c": "d"}, {"ab": "", "c": "d"}, {"a": "b"})
    assert len({fingerprint(facts) for facts in lists}) == len(lists)


def test_steps_say_how_a_page_lies_and_not_how_many_there_are() -> None:
    memory = {
        order: torch.zeros([{"H": 2, "B": pages, "N": 4, "C": 6}[axis] for axis in order])
        for order in ("HBNC",)
        for pages in (9,)
    }
    few = memory["HBNC"].permute(1, 0, 2, 3)
    many = torch.zeros(2, 30, 4, 6).permute(1, 0, 2, 3)
    turned = torch.zeros(9, 2, 6, 4).transpose(2, 3)
    assert steps_in_page(few) == steps_in_page(many)
    assert len({steps_in_page(few), steps_in_page(turned), steps_in_page(torch.zeros(9, 2, 4, 6))}) == 3


def test_canonical_and_opaque_and_two_opaque_engines_have_different_identities() -> None:
    ids = {stored(impl=Attention(kernel)).model.digest() for kernel in (plain, Kernel(1), Kernel(2))}
    assert len(ids) == 3
    assert stored().model == stored().model


def test_ranks_that_pack_alike_agree_and_others_are_refused_by_name() -> None:
    one, other = (stored(impl=Attention(Kernel(seed))) for seed in (1, 2))
    first, second = (one.model, "why one"), (other.model, "why other")
    ranks = [(0, 0), (0, 1)]
    assert agreed_model(dict.fromkeys(ranks, first), ranks) == one.model
    with pytest.raises(ConfigError, match="not all pack their pages alike") as differing:
        agreed_model({(0, 0): first, (0, 1): second}, ranks)
    assert f"pp0 tp0: {one.model.layout}, why one; pp0 tp1: {other.model.layout}, why other" in str(differing.value)
    with pytest.raises(ConfigError, match="not all pack their pages alike") as canonical:
        agreed_model({(0, 1): first}, ranks)
    assert f"pp0 tp0: canonical; pp0 tp1: {one.model.layout}, why one" in str(canonical.value)
    assert 'set "layout": "opaque"' in str(canonical.value)


def test_a_part_is_what_a_rank_holds_whatever_grid_is_set() -> None:
    fine = replace(MODEL, part_layers=1, part_heads=1)
    alone = opaque_model(fine, {}, page_tokens=PAGE, rank_heads=HEADS)
    ranks = opaque_model(fine, {}, page_tokens=PAGE, rank_heads=1)
    assert [part.heads for part in layout_of(alone).parts] == [range(HEADS)] * LAYERS
    assert [part.heads for part in layout_of(ranks).parts] == [range(1), range(1, 2)] * LAYERS
    assert alone.digest() != ranks.digest()


@pytest.mark.parametrize(("page", "block"), [(16, 64), (32, 64), (64, 64), (128, 128)])
def test_blocks_are_whole_pages(page: int, block: int) -> None:
    assert opaque_model(MODEL, {}, page_tokens=page, rank_heads=HEADS).block_tokens == block


# -- copies --------------------------------------------------------------------------------------------------------


def filled(kernel: Kernel, table: list[int], kv: torch.Tensor, mine: list[torch.Tensor]) -> None:
    slots = torch.tensor([table[token // PAGE] * PAGE + token % PAGE for token in range(kv.shape[2])])
    for layer, tensor in enumerate(mine):
        kernel(kv[layer, 0], kv[layer, 1], tensor, slots)


def loads(
    pages: EnginePages | DevicePages, table: list[int], blocks: list[tuple[int, list[memoryview]]], tokens: range
) -> None:
    if isinstance(pages, DevicePages):
        pages.start_load([table], blocks, tokens, after=pages.now()).finish()
    else:
        pages.scatter([table], blocks, tokens, together=True)


def saves(pages: EnginePages | DevicePages, table: list[int], blocks: list[tuple[int, list[memoryview]]]) -> None:
    if isinstance(pages, DevicePages):
        pages.start_save([table], blocks).finish()
    else:
        pages.gather([table], blocks)


KINDS = pytest.mark.parametrize("kind", [OpaquePages, OpaqueDevicePages])
Kind = type[OpaquePages] | type[OpaqueDevicePages]


@KINDS
@pytest.mark.parametrize("part_layers", [0, 1])
@pytest.mark.parametrize("make", [tensors, lambda: with_steps(3)])
def test_what_a_scrambling_kernel_wrote_comes_back_into_other_pages(
    kind: Kind, part_layers: int, make: Callable[[], list[torch.Tensor]]
) -> None:
    layout = layout_of(opaque_model(replace(MODEL, part_layers=part_layers), {}, page_tokens=PAGE, rank_heads=HEADS))
    kernel, mine = Kernel(1), make()
    kv = torch.randn(LAYERS, 2, 128, HEADS, DIM)
    filled_pages = torch.zeros(9, HEADS, PAGE, 2 * DIM)
    table, other = [5, 3, 8, 1], [4, 7, 2, 6]
    for layer, tensor in enumerate(mine):
        slots = torch.tensor([table[token // PAGE] * PAGE + token % PAGE for token in range(128)])
        filled_pages.zero_()
        kernel(kv[layer, 0], kv[layer, 1], filled_pages, slots)
        tensor.copy_(filled_pages)
    pages = kind(layout, mine, range(LAYERS), range(HEADS))
    blocks = [(index, slots_of(layout, pages.parts)) for index in (0, 1)]
    saves(pages, table, blocks)
    loads(pages, other, blocks, range(128))
    for layer, tensor in enumerate(mine):
        for number in range(4):
            got = kernel.read(tensor[other[number]])
            want = torch.cat([kv[layer, 0], kv[layer, 1]], -1)[number * PAGE : (number + 1) * PAGE].transpose(0, 1)
            assert torch.equal(got, want)
            assert torch.equal(tensor[table[number]], tensor[other[number]])
        assert not tensor[0].any()


@KINDS
def test_pages_below_the_first_token_are_not_written_and_none_is_written_in_part(kind: Kind) -> None:
    layout = layout_of(opaque_model(MODEL, {}, page_tokens=PAGE, rank_heads=HEADS))
    mine = tensors()
    pages = kind(layout, mine, range(LAYERS), range(HEADS))
    held = slots_of(layout, pages.parts)
    torch.frombuffer(held[0], dtype=torch.float32).fill_(1.0)
    for cut in (range(65, 128), range(96, 120), range(40, 128)):
        with pytest.raises(ValueError, match="part of a page"):
            loads(pages, [5, 3, 8, 1], [(1, held)], cut)
    assert all(not tensor.any() for tensor in mine)
    loads(pages, [5, 3, 8, 1], [(1, held)], range(96, 128))
    assert all(bool((tensor[1] == 1).all()) for tensor in mine)
    assert all(not tensor[page].any() for tensor in mine for page in (0, 2, 3, 4, 5, 6, 7, 8))


@KINDS
def test_a_slot_or_page_that_does_not_fit_is_refused_before_a_byte_moves(kind: Kind) -> None:
    layout = layout_of(opaque_model(MODEL, {}, page_tokens=PAGE, rank_heads=HEADS))
    mine = tensors()
    pages = kind(layout, mine, range(LAYERS), range(HEADS))
    held = slots_of(layout, pages.parts)
    torch.frombuffer(held[0], dtype=torch.float32).fill_(1.0)
    for table, slots in (([5, 9], held), ([5], held), ([5, -1], held), ([5, 3], [held[0][:-4]])):
        with pytest.raises(ValueError, match="outside|page table|a slot of"):
            loads(pages, table, [(0, slots)], range(64))
    assert all(not tensor.any() for tensor in mine)


def test_a_rank_copies_its_own_parts() -> None:
    layout = layout_of(opaque_model(replace(MODEL, part_layers=1), {}, page_tokens=PAGE, rank_heads=1))
    mine = [torch.randn(9, 1, PAGE, 2 * DIM) for _ in range(2)]
    pages = OpaquePages(layout, mine, range(1, 3), range(1, 2))
    assert pages.parts == (3, 5)
    held = slots_of(layout, pages.parts)
    pages.gather([[5, 3]], [(0, held)])
    for tensor, view in zip(mine, held, strict=True):
        assert bytes(view) == b"".join(tensor[page].numpy().tobytes() for page in (5, 3))
    with pytest.raises(ConfigError, match="are not cut"):
        OpaquePages(layout, tensors(layers=2), range(1, 3), range(2))


def test_copies_of_a_device_and_of_the_host_do_not_meet() -> None:
    one, other = facts_of(Engine().worker()), facts_of(Engine(tensors=[t.to("meta") for t in tensors()]).worker())
    assert one["format"] != other["format"]


def test_known_kernels_on_a_device_are_strided_and_others_kept_as_they_are() -> None:
    class FlashAttentionImpl:
        pass

    FlashAttentionImpl.__module__ = "vllm.v1.attention.backends.flash_attn"
    FlashAttentionImpl.__qualname__ = "FlashAttentionImpl"
    meta = [tensor.to("meta") for tensor in tensors()]
    made = stored(impl=FlashAttentionImpl(), tensors=meta)
    assert type(made.pages) is StridedPages
    made = stored(impl=Attention(plain), tensors=meta)
    assert type(made.pages) is OpaqueDevicePages
    assert "how tests.connectors.test_vllm_opaque.Attention orders its pages is not known" in made.why
