# SPDX-License-Identifier: Apache-2.0
"""A vLLM whose connector interface is another one is refused in words, without vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from connectors.vllm_interface import _INTERFACE, TESTED_VERSIONS, check_interface, untested
from kvstore.errors import ConfigError


def base(**changes: str | None) -> type:
    """A class with the interface's methods; `changes`: other parameters by name, None for no such method."""
    parameters: dict[str, str | None] = {name: ", ".join(wanted) for name, wanted in _INTERFACE.items()} | changes
    lines = [f"    def {name}(self, {wanted}): ..." for name, wanted in parameters.items() if wanted is not None]
    made: dict[str, type] = {}
    exec("class Base:\n" + "\n".join(lines), made)
    return made["Base"]


@pytest.mark.parametrize("name", [*_INTERFACE])
def test_a_method_that_is_missing_or_takes_other_things_is_named(name: str) -> None:
    check_interface(base())
    with pytest.raises(ConfigError, match=f"{name}.* is missing.*tested are {TESTED_VERSIONS[0]}"):
        check_interface(base(**{name: None}))
    if _INTERFACE[name]:
        with pytest.raises(ConfigError, match=f"{name}.*'other'"):
            check_interface(base(**{name: "other"}))


def test_methods_may_be_of_the_class_and_of_several_bases() -> None:
    class Other:
        @classmethod
        def build_kv_connector_stats(cls, data: object = None) -> None: ...

    without = base(build_kv_connector_stats=None)
    with pytest.raises(ConfigError, match="build_kv_connector_stats"):
        check_interface(without)
    check_interface(without, Other)


def imported(module: str, vllm: Path) -> str:
    """The last line of what Python says of an import under a vLLM of ours."""
    path = os.pathsep.join([str(vllm), str(Path(__file__).parents[2])])
    ran = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,  # some imports of torch in a row, where many others want the processors
    )
    assert ran.returncode == 1
    return ran.stderr.splitlines()[-1]


def test_a_vllm_that_lacks_a_name_is_refused_in_words(tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "distributed" / "kv_transfer" / "kv_connector" / "v1"
    package.mkdir(parents=True)
    (package / "base.py").write_text("class KVConnectorBase_V1: ...\n")
    said = imported("connectors.vllm", tmp_path)
    assert "ConfigError: vLLM" in said
    assert "cannot import name 'KVConnectorHandshakeMetadata'" in said


def test_a_vllm_whose_own_offloading_is_another_is_refused_in_words(tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "v1" / "kv_offload"
    package.mkdir(parents=True)
    (package / "base.py").write_text("class LookupResult: ...\n")
    said = imported("connectors.vllm_tiering", tmp_path)
    assert "ConfigError: vLLM" in said
    assert "lacks what connectors.vllm_tiering needs (cannot import name 'Medium'" in said


def test_a_release_that_was_not_tried_is_said_to_be_so() -> None:
    assert untested("0.32.0") == untested("0.32") == untested("0.32.1+cpu") == ""
    assert "0.33.0" in untested("0.33.0")
    assert untested("0.320.1")
