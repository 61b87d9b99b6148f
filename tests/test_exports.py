# SPDX-License-Identifier: Apache-2.0
"""The public names are what they are said to be, and documents name only what exists."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import kvstore
from kvstore.api import Store
from kvstore.config import StoreConfig
from kvstore.service.client import SidecarStore

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "connectors/vllm.md", "deploy/access.md")


def test_every_public_name_resolves_and_is_listed() -> None:
    assert kvstore.__all__ == sorted(kvstore.__all__)
    for name in kvstore.__all__:
        assert getattr(kvstore, name).__name__ == name
    assert set(kvstore.__all__) <= set(dir(kvstore))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kvstore.Nothing


@pytest.mark.parametrize("page", PAGES)
def test_every_file_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = set(re.findall(r"`((?:kvstore|connectors|bench|tests|protos|deploy)/[\w./-]*\w)`", text))
    missing = [path for path in paths if not (ROOT / path).exists() and not list(ROOT.glob(path + "*"))]
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    assert missing + [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_dotted_name_a_page_gives_resolves(page: str) -> None:
    text = (ROOT / page).read_text()
    for module, name in set(re.findall(r"`(kvstore(?:\.[a-z_]+)+):([A-Za-z_]\w*)`", text)):
        assert hasattr(importlib.import_module(module), name), f"{module}:{name}"


def test_the_engine_example_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "store.save(" in block)
    exec(compile(example, "README.md", "exec"), {})


def test_every_setting_the_readme_names_exists_with_that_default() -> None:
    config = StoreConfig.load({"tiers": {"redis": {"url": "embedded"}}}, environ={})
    known = {key: value for key, value, _ in config.explain()}
    readme, access = ((ROOT / page).read_text() for page in ("README.md", "deploy/access.md"))
    named = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", readme, re.MULTILINE)
    assert len(named) >= 8
    for key in re.findall(r"`(service\.\w+)`", readme + access):
        assert key in known
    for key, default in named:
        value = known[key]
        shown = f"{value >> 30} GiB" if key == "host.capacity_bytes" and isinstance(value, int) else str(value).lower()
        assert shown in default.replace("`", ""), f"{key} is {value!r}, the page says {default!r}"


def test_every_public_method_of_a_store_says_what_it_does() -> None:
    for kind in (kvstore.KVStore, SidecarStore):
        public = {name for name in vars(kind) if not name.startswith("_")}
        assert {name for name in vars(Store) if not name.startswith("_")} <= public
        assert [name for name in sorted(public) if not inspect.getdoc(getattr(kind, name))] == []
