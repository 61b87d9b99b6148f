# SPDX-License-Identifier: Apache-2.0
"""Groups of layers, each of which the engine keeps in pages of its own, and for how long it keeps them.

vLLM gives layers of one kind a group, or several of as many layers each, and a request a page table for every group.
Layers that attend to a window, or to chunks, need no more than that, and their groups let go of the rest as a request
moves on: its places in the table then name page 0 (`vllm_plan.NO_PAGE`), as they do from the start where a prefix is
there without having been computed. KV of a token is that of its prefix all the same, and it is in the pages of all
groups in the step that computes it. So a stored block does not depend on groups: where its pages are does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from connectors.vllm_plan import NO_PAGE, Tables
from kvstore.errors import ConfigError

_FULL = "FullAttentionSpec"
_WINDOW, _CHUNK = "SlidingWindowSpec", "ChunkedLocalAttentionSpec"

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Groups:
    """Of an engine.

    Attributes:
        page_tokens: of all groups; page_bytes: of one layer.
        number: of each layer's group, by the layer's name. Under PP, of the layers that this rank has. One that attends
            to another layer's keys and values is not among them: it has no pages but that one's.
        keeps: of each group, whether it keeps all tokens while a request runs.
        windows, chunks: sizes of what other groups keep.
    """

    page_tokens: int
    page_bytes: int
    number: Mapping[str, int]
    keeps: tuple[bool, ...]
    windows: tuple[int, ...]
    chunks: tuple[int, ...]

    @classmethod
    def of(cls, groups: Sequence[Any]) -> Self:
        """Raises ConfigError where a group keeps anything else than keys and values of a prefix."""
        specs = [group.kv_cache_spec for group in groups]
        kinds = {type(spec).__name__ for spec in specs}
        if not specs or not kinds <= {_FULL, _WINDOW, _CHUNK}:
            raise ConfigError(
                f"the engine keeps {len(specs)} groups of KV layers ({', '.join(sorted(kinds))}): "
                "full attention, sliding windows and chunks are stored"
            )
        if any(getattr(spec, "non_causal", False) for spec in specs):
            raise ConfigError("some layers attend to later tokens of a prompt: their keys are not those of a prefix")
        sizes = {(int(spec.block_size), int(spec.page_size_bytes)) for spec in specs}
        if len(sizes) > 1:
            raise ConfigError(
                f"the engine keeps groups of KV layers in pages of different sizes ({sorted(sizes)} tokens and bytes), "
                "which are not stored"
            )
        ((page_tokens, page_bytes),) = sizes
        return cls(
            page_tokens=page_tokens,
            page_bytes=page_bytes,
            number={name: at for at, group in enumerate(groups) for name in group.layer_names},
            keeps=tuple(type(spec).__name__ == _FULL for spec in specs),
            windows=tuple(int(spec.sliding_window) for spec in specs if type(spec).__name__ == _WINDOW),
            chunks=tuple(int(spec.attention_chunk_size) for spec in specs if type(spec).__name__ == _CHUNK),
        )

    @property
    def keeps_all(self) -> bool:
        """Whether a request's pages all stay while it runs, in one table."""
        return self.keeps == (True,)

    def check_block(self, block_tokens: int) -> None:
        """Raise ConfigError where steps that end within a block of `block_tokens` would leave its beginning behind."""
        if self.windows and min(self.windows) < block_tokens:
            raise ConfigError(
                f"some layers attend to a window of {min(self.windows)} tokens, and the engine lets go of what is "
                f"before it: blocks of {block_tokens} would never be there whole; set a smaller block_tokens"
            )
        if any(chunk % block_tokens for chunk in self.chunks):
            raise ConfigError(
                f"some layers attend within chunks of {min(self.chunks)} tokens, which blocks of {block_tokens} do not "
                "divide: set a block_tokens that does"
            )

    def of_layers(self, names: Sequence[str]) -> LayerGroups:
        """`names`: of each layer, the one whose pages it has."""
        return LayerGroups(np.array([self.number[name] for name in names], np.int64), self.keeps)


def arrays_of(tables: Tables) -> list[Ints]:
    """For whoever looks at them several times."""
    return [np.asarray(table, np.int64) for table in tables]


@dataclass(frozen=True, slots=True, eq=False)
class LayerGroups:
    """Of a worker's layers, in order: the number of each one's group; and of each group whether it keeps all tokens."""

    number: Ints
    keeps: tuple[bool, ...]

    @property
    def keeps_all(self) -> bool:
        """As `Groups.keeps_all`."""
        return self.keeps == (True,)

    @classmethod
    def of_one(cls, num_layers: int) -> Self:
        """All layers in one group, which keeps all."""
        return cls(np.zeros(num_layers, np.int64), (True,))

    def pages(
        self, tables: Sequence[Ints], entries: Ints, layers: range, num_pages: int, *, may_lack: bool
    ) -> tuple[Ints, Bools | None]:
        """Pages at `entries` of the tables, of each of `layers`, and which of them are there: both `[entries, layers]`.

        Where one table is all layers', and all is there, it is `[entries, 1]`, and None.

        Raises ValueError where one is outside the engine's `num_pages`, or is not there though its group keeps all, or
        although it `may_lack` none.
        """
        if len(tables) != len(self.keeps):
            raise ValueError(f"a request has {len(tables)} page tables where there are {len(self.keeps)} groups")
        if self.keeps_all:  # most engines: a step's end waits for this
            return _within(tables[0][_kept(tables[0], entries)], num_pages)[:, None], None
        found = np.zeros((len(tables), len(entries)), np.int64)
        there = np.ones_like(found, dtype=np.bool_)
        for at, (table, keeps) in enumerate(zip(tables, self.keeps, strict=True)):
            if keeps:
                found[at] = table[_kept(table, entries)]
                continue
            outside = (entries < 0) | (entries >= len(table))
            if len(table):
                found[at] = table[np.where(outside, 0, entries)]
            there[at] = ~outside & (found[at] != NO_PAGE)
        _within(found, num_pages)
        if not (may_lack or there.all()):
            raise ValueError("pages of a block that is to be copied out are not there any more")
        number = self.number[layers.start : layers.stop]
        return found[number].T, there[number].T


def chosen(places: Ints, there: Bools | None) -> Ints:
    """Those of `places` that are `there`, see `LayerGroups.pages`, one after the other."""
    return places.ravel() if there is None else places[there]


def _kept(table: Ints, entries: Ints) -> Ints:
    """`entries`, which `table` must have."""
    if len(entries) and not 0 <= int(entries.min()) <= int(entries.max()) < len(table):
        raise ValueError(f"entry {int(entries.max())} is outside a page table of {len(table)}")
    return entries


def _within(pages: Ints, num_pages: int) -> Ints:
    if pages.size and not 0 <= int(pages.min()) <= int(pages.max()) < num_pages:
        raise ValueError(f"a page in {pages.tolist()} is outside the engine's {num_pages} pages")
    return pages
