# SPDX-License-Identifier: Apache-2.0
"""The connector's figures in vLLM's own log line and on its own /metrics page.

Counters, with vLLM's labels: `vllm:kvstore_<name>_total` for each of `COUNTERS`, and by serving tier
`vllm:kvstore_loaded_bytes_total` and `vllm:kvstore_load_seconds_total`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS: Mapping[str, str] = {
    "loads": "Loads begun.",
    "failed_loads": "Loads of which a part had to be computed.",
    "saved_blocks": "Blocks published, over all workers.",
    "refused_blocks": "Blocks that found no room, or whose parent was gone.",
    "save_s": "Seconds that copying out and publishing took, over all workers.",
}
_BY_TIER: Mapping[str, str] = {
    "loaded_bytes": "Bytes copied into the engine's pages, by tier.",
    "load_s": "Seconds that loads took, by tier.",
}


class KVStoreStats(KVConnectorStats):  # type: ignore[misc]  # vLLM may not be there when types are checked
    """Sums since the last report, by the names of `COUNTERS` and `name.tier`."""

    data: dict[str, float]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0.0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"kvstore.{name}": round(value, 4) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class KVStorePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters on vLLM's /metrics page."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        self._plain = {
            name: self._counter_cls(name=_exported(name), documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._by_tier = {
            name: self._counter_cls(name=_exported(name), documentation=text, labelnames=[*labelnames, "tier"])
            for name, text in _BY_TIER.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            base, _, tier = name.partition(".")
            if base in self._by_tier:
                self._by_tier[base].labels(*labels, tier).inc(value)
            elif base in self._plain:
                self._plain[base].labels(*labels).inc(value)


def _exported(name: str) -> str:
    return f"vllm:kvstore_{name.removesuffix('_s')}_seconds" if name.endswith("_s") else f"vllm:kvstore_{name}"
