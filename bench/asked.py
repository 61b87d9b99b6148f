# SPDX-License-Identifier: Apache-2.0
"""What each figure of ``bench/results`` means, and what was asked of it.

Benchmarks print their figures beside it, and `bench.figures` draws pages from it. Needs nothing but Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Asked:
    """A figure of a summary: `key`, what it says, its `unit`, and the bound that was `asked`, such as ``>= 0.85``.

    `asked` is empty where nothing was; ``yes`` asks for a true value, ``== 0`` for just that. With a `headline`, its
    name there, it stands in the project's README.
    """

    key: str
    text: str
    asked: str = ""
    unit: str = ""
    headline: str = ""

    @property
    def bound(self) -> str:
        """What was asked, for people; empty where nothing was."""
        return self.asked.replace("<=", "≤").replace(">=", "≥").replace("== ", "")

    def met(self, value: object) -> bool | None:
        """Whether a measured value is what was asked; None where nothing was asked, or nothing measured."""
        if not self.asked or value is None:
            return None
        if self.asked == "yes":
            return value is True
        assert isinstance(value, int | float), f"{self.key} is {value!r}"
        relation, _, bound = self.asked.partition(" ")
        limit = float(bound)
        match relation:
            case "<=":
                return value <= limit
            case ">=":
                return value >= limit
            case ">":
                return value > limit
            case "==":
                return value == limit
        raise ValueError(f"{self.key} asks {self.asked!r}")


@dataclass(frozen=True, slots=True)
class Result:
    """One file of `bench/results`: its stem, a title, a remark without figures, what its figures are."""

    stem: str
    title: str
    figures: tuple[Asked, ...]
    remark: str = ""


_WORST = (
    Asked("worst_vs_lru_pts", "hit rate − lru's, at worst, capacities of 0.5 to 50 %", ">= -0.5", "points"),
    Asked("us_per_block", "time in the policy, at worst", "<= 10", "µs a block"),
)

RESULTS_ASKED = (
    Result(
        "ttft-cpu",
        "Multi-turn chats in transformers",
        (
            Asked("outputs_equal", "outputs with reuse equal those without, every turn and arm, fp32 greedy", "yes"),
            Asked(
                "speedup_host",
                "TTFT of later turns, ≥ 1.5k tokens reused: recompute ÷ host",
                ">= 8",
                "×",
                "multi-turn chat, SmolLM2 in transformers: TTFT by recompute ÷ from host memory",
            ),
            Asked("speedup_redis", "recompute ÷ Redis, host empty", ">= 6", "×", "… ÷ from Redis, host empty"),
            Asked("host_vs_device", "host ÷ a device cache that holds everything", "<= 1.15", "×"),
            Asked("redis_vs_device", "Redis ÷ that device cache", "<= 1.5", "×"),
            Asked("zero_reuse_overhead_pct", "no reuse at all: TTFT over no store", "<= 3", "%"),
            Asked("zero_reuse_overhead_pct_low", "95 % interval: from", "", "%"),
            Asked("zero_reuse_overhead_pct_high", "to", "", "%"),
            Asked("zero_reuse_write_through_overhead_pct", "no reuse, writing everything through to Redis", "", "%"),
            Asked("store_down_overhead_pct", "Redis dead, nothing in the host: TTFT over no store", "<= 3", "%"),
            Asked("store_down_overhead_pct_low", "95 % interval: from", "", "%"),
            Asked("store_down_overhead_pct_high", "to", "", "%"),
            Asked("ttft_turn2_p50_recompute_s", "median TTFT at turns 2 and later: recompute", "", "s"),
            Asked("ttft_turn2_p50_device_s", "a device cache that overflows", "", "s"),
            Asked("ttft_turn2_p50_device_host_s", "the same with the host below it", "", "s"),
            Asked("ttft_turn2_p50_host_s", "host alone", "", "s"),
            Asked("ttft_turn2_p50_redis_s", "Redis", "", "s"),
        ),
        "SmolLM2-135M in fp32; documents of the Python library, 4 users × 4 turns, compared request by request. One"
        " request's noise is about a tenth; an overhead below zero is noise, and the connector's cache, which is"
        " allocated at once where transformers' own grows.",
    ),
    Result(
        "tiers-cpu",
        "Store and tiers in one process",
        (
            Asked("host_save_ratio", "host save ÷ memcpy, 8 MiB parts, 512 MiB", ">= 0.85"),
            Asked("host_load_ratio", "host load ÷ memcpy", ">= 0.85"),
            Asked("paged_save_ratio", "scattered 16-token pages: save ÷ memcpy", ">= 0.6"),
            Asked("paged_load_ratio", "load ÷ memcpy", ">= 0.6"),
            Asked("match_128k_ms", "hash and match 131,072 tokens, all resident", "<= 3", "ms"),
            Asked("match_next_turn_ms", "one more turn of it", "<= 0.5", "ms"),
            Asked(
                "redis_load_ratio",
                "Valkey 9 over TCP, 8 MiB parts: load ÷ raw sockets",
                ">= 0.85",
                "",
                "Redis tier over TCP: load ÷ raw sockets",
            ),
            Asked("redis_save_ratio", "save ÷ raw sockets", ">= 0.85", "", "… save ÷ raw sockets"),
            Asked("redis_unix_load_ratio", "over a Unix socket: load ÷ raw Unix sockets", ">= 0.80"),
            Asked("redis_unix_save_ratio", "save ÷ raw Unix sockets", ">= 0.80"),
            Asked("redis_small_load_ratio", "TCP, 128 KiB parts: load ÷ raw sockets", ">= 0.6"),
            Asked("redis_small_save_ratio", "TCP, 128 KiB parts: save ÷ raw sockets"),
            Asked("redis_load_vs_redispy", "load ÷ redis-py's MGET with hiredis", ">= 1.8", "×"),
            Asked("redis_save_vs_redispy", "save ÷ redis-py's pipelined SET", ">= 3", "×"),
            Asked("redis7_load_ratio", "Redis 7: load ÷ a bare GET loop", ">= 0.9"),
            Asked("redis7_save_ratio", "Redis 7: save ÷ a bare SET loop", ">= 0.9"),
            Asked("presence_2048_ms", "presence of 2,048 keys", "<= 2", "ms"),
            Asked("presence_2048_inside_ms", "the same where the prefix ends inside: a second round trip", "", "ms"),
            Asked("touch_2048_ms", "a touch of 2,048 members of a million, in the background", "<= 3", "ms"),
            Asked("touch_2048_ttl_ms", "the same where it looks at their TTLs, once in six hours", "", "ms"),
        ),
        "The ceiling of a share of memcpy is one thread of libc's, which reads the destination before it overwrites it:"
        " that is how a share can be above 1.",
    ),
    Result(
        "faults-cpu",
        "Faults between store and Redis",
        (
            Asked(
                "fault_soak", "faults: delays, cuts, flipped bits, foreign replies, errors, flushes, kills", ">= 10000"
            ),
            Asked("fault_soak_blocks_served", "blocks served meanwhile"),
            Asked(
                "fault_soak_wrong_bytes",
                "blocks with wrong bytes",
                "== 0",
                "",
                "10,000 faults between store and Redis: blocks with wrong bytes",
            ),
            Asked("fault_soak_late_calls", "calls past their deadline", "== 0"),
            Asked("fault_soak_leaked_slots", "slots leaked", "== 0"),
            Asked("fault_soak_broken", "broken invariants", "== 0"),
            Asked(
                "host_hit_unaffected_pct",
                "a host hit with Redis slow or stopped: greatest change, either way",
                "<= 5",
                "%",
            ),
            Asked("host_hit_null_pct", "the same where nothing changes: what noise gives", "", "%"),
            Asked("host_hit_over_no_redis_pct", "a host hit with a healthy Redis over one without Redis", "", "%"),
            Asked("breaker_first_ms", "Redis stopped: first request, with a deadline of 250 ms", "<= 275", "ms"),
            Asked("breaker_open_ms", "later requests, p99", "<= 1", "ms"),
            Asked("breaker_open_max_ms", "later requests, the slowest", "", "ms"),
            Asked("failover_killed_back_ms", "primary killed, no Sentinel: from the new one to all blocks", "", "ms"),
            Asked("failover_hung_back_ms", "primary hung: likewise", "", "ms"),
            Asked("failover_late_requests", "requests past their deadline in failovers", "== 0"),
            Asked("failover_wrong_blocks", "blocks with wrong bytes in them", "== 0"),
        ),
    ),
    Result(
        "codec-cpu",
        "The tier's codec where it chooses by itself, links of 0.2 GB/s to a Unix socket, real KV and random bytes",
        (
            Asked("codec_auto_worst_pct", "write and read: time above the better of raw and lz4, worst cell", "", "%"),
            Asked("codec_auto_worst_read_pct", "read alone, worst cell", "", "%"),
            Asked("codec_null_worst_pct", "two arms that do the same, worst cell", "", "%"),
            Asked("codec_cells", "cells"),
            Asked("codec_auto_best_gain_pct", "time saved over raw, best cell", "", "%"),
        ),
        "Real KV is SmolLM2's over a document, in bf16. `auto` begins raw, and takes lz4 where calls are quicker.",
    ),
    Result(
        "lanes-cpu",
        "One load over several connections",
        (
            Asked(
                "lanes_flow_gain",
                "each connection carries 0.25 GB/s: up to four ÷ one",
                "",
                "×",
                "Redis where each connection carries 0.25 GB/s: load by up to four ÷ by one",
            ),
            Asked("lanes_flow_loads_to_learn", "loads of 64 MiB until four were taken"),
            *(
                Asked(f"lanes_{key}_overhead_pct{end}", line, "", "%")
                for key, place in (("unix", "Unix socket"), ("tcp", "loopback"))
                for end, line in (
                    ("", f"{place}, where one is best: all loads, trying included, over one connection always"),
                    ("_low", "95 % interval: from"),
                    ("_high", "to"),
                )
            ),
        ),
        "Client and server share the two cores.",
    ),
    Result(
        "service-cpu",
        "The sidecar in a process of its own",
        (
            Asked(
                "sidecar_load_ratio",
                "load of 512 MiB in 8 MiB parts, calls included ÷ memcpy",
                ">= 0.80",
                "",
                "sidecar: load of 512 MiB, calls included ÷ memcpy",
            ),
            Asked("sidecar_save_ratio", "save of it", ">= 0.75", "", "… save of it"),
            Asked("sidecar_paged_load_ratio", "128 MiB in scattered 32 KiB segments: load", ">= 0.5"),
            Asked("sidecar_paged_save_ratio", "save of it", ">= 0.5"),
            Asked("sidecar_match_128k_ms", "match of 131,072 tokens, hashing included", "<= 6", "ms"),
            Asked("sidecar_match_next_turn_ms", "the next turn", "<= 2", "ms"),
            Asked("rpc_p50_ms", "small match", "<= 0.45", "ms", "… a small match"),
            Asked("bare_rpc_p50_ms", "a bare gRPC echo in the same run", "", "ms"),
            Asked("rpc_p50_64_ratio", "small match while 64 clients watch: median ÷ alone", "<= 1.5"),
            Asked("rpc_p99_64_ms", "the same, 99th percentile", "<= 10", "ms"),
            Asked("clients8_total_ratio", "8 clients loading ÷ one", ">= 0.9"),
            Asked("clients8_fairness", "fastest ÷ slowest of them", "<= 2"),
            Asked("remote_load_ratio", "load without a mapping ÷ bare gRPC stream that keeps the bytes", ">= 0.8"),
            Asked("remote_load_ratio_to_dropped", "÷ one that drops them", ">= 0.8"),
            Asked("index_bytes_per_block", "a million blocks: bytes each without tokens", "<= 450"),
            Asked("index_match_growth", "match there, per block ÷ at 10,000", "<= 1.6"),
            Asked("index_match_us_per_block", "match there, per block", "<= 1", "µs"),
            Asked("index_match_p99_ms", "2,048 blocks of a million, p99", "<= 5", "ms"),
        ),
    ),
    Result(
        "vllm-ttft-cpu",
        "vLLM through the sidecar",
        (
            Asked(
                "ttft_vs_engine_hit",
                "TTFT, 232 new tokens ÷ the engine's own prefix cache",
                "<= 1.15",
                "×",
                "vLLM, 4,096 tokens reused: TTFT ÷ a hit in the engine's own prefix cache",
            ),
            Asked("added_ms_16", "16 new tokens: more than the engine's own prefix cache", "<= 25", "ms"),
            Asked("full_prompt_ms", "a prompt that is all in the store: TTFT", "", "ms"),
            Asked("redis_vs_host", "Redis with a cold host ÷ host", "<= 1.5", "×"),
            Asked(
                "ttft_vs_lmcache",
                "÷ LMCache's sidecar in shared memory",
                "<= 0.85",
                "×",
                "… ÷ LMCache's sidecar in shared memory",
            ),
            Asked("vs_recompute", "host ÷ computing it all", "", "×", "… ÷ computing it all"),
        ),
        "A random Llama of 100M parameters in bf16, 4,096 tokens reused; one warm engine, the same requests in every"
        " arm.",
    ),
    Result(
        "vllm-ttft-smollm2-cpu",
        "The same with SmolLM2-135M",
        (
            Asked("ttft_vs_engine_hit", "TTFT, 232 new tokens ÷ the engine's own prefix cache", "", "×"),
            Asked("added_ms_16", "16 new tokens: more than the engine's own prefix cache", "", "ms"),
            Asked("redis_vs_host", "Redis with a cold host ÷ host", "", "×"),
            Asked("vs_recompute", "host ÷ computing it all", "", "×"),
        ),
    ),
    Result(
        "vllm-cold-cpu",
        "vLLM where nothing is reused",
        (
            Asked(
                "zero_reuse_overhead_pct",
                "TTFT over engines without connector",
                "<= 2",
                "%",
                "vLLM, nothing reused: TTFT over no connector",
            ),
            Asked("zero_reuse_overhead_pct_low", "95 % interval: from", "", "%"),
            Asked("zero_reuse_overhead_pct_high", "to", "", "%"),
            Asked("zero_reuse_throughput_pct", "time of a request, so total throughput, likewise", "<= 2", "%"),
            Asked("zero_reuse_throughput_pct_low", "95 % interval: from", "", "%"),
            Asked("zero_reuse_throughput_pct_high", "to", "", "%"),
            Asked("no_difference_throughput_pct", "the same of two engines without: what noise gives", "", "%"),
            Asked("no_difference_throughput_pct_low", "95 % interval: from", "", "%"),
            Asked("no_difference_throughput_pct_high", "to", "", "%"),
            Asked("configured_throughput_pct", "the same of the engine with it taken off, over those without", "", "%"),
            Asked("configured_throughput_pct_low", "95 % interval: from", "", "%"),
            Asked("configured_throughput_pct_high", "to", "", "%"),
            Asked("same_engine_overhead_pct", "TTFT over the same engine, connector taken off", "<= 2", "%"),
            Asked("same_engine_overhead_pct_low", "95 % interval: from", "", "%"),
            Asked("same_engine_overhead_pct_high", "to", "", "%"),
            Asked("same_engine_throughput_pct", "time of a request likewise", "<= 2", "%"),
            Asked("same_engine_throughput_pct_low", "95 % interval: from", "", "%"),
            Asked("same_engine_throughput_pct_high", "to", "", "%"),
            Asked("same_engine_no_difference_throughput_pct", "taken off twice: what noise gives", "", "%"),
            Asked("same_engine_no_difference_throughput_pct_low", "95 % interval: from", "", "%"),
            Asked("same_engine_no_difference_throughput_pct_high", "to", "", "%"),
            Asked("sidecar_cpu_ms_a_request", "CPU of the sidecar for each request", "", "ms"),
            Asked("num_pairs", "alternating pairs", ">= 20"),
        ),
    ),
    Result(
        "vllm-down-cpu",
        "vLLM where the sidecar is away",
        (
            Asked(
                "store_down_overhead_pct",
                "sidecar ended: TTFT over the same engine, connector taken off",
                "<= 3",
                "%",
                "vLLM, sidecar gone: TTFT over no connector",
            ),
            Asked("store_down_overhead_pct_low", "95 % interval: from", "", "%"),
            Asked("store_down_overhead_pct_high", "to", "", "%"),
            Asked("store_down_vs_none_overhead_pct", "over an engine without connector", "", "%"),
            Asked("store_down_vs_none_overhead_pct_low", "95 % interval: from", "", "%"),
            Asked("store_down_vs_none_overhead_pct_high", "to", "", "%"),
            Asked("store_down_no_difference_overhead_pct", "taken off twice: what noise gives", "", "%"),
            Asked("store_down_no_difference_overhead_pct_low", "95 % interval: from", "", "%"),
            Asked("store_down_no_difference_overhead_pct_high", "to", "", "%"),
            Asked("hanging_worst_added_ms", "sidecar stopped: added to TTFT, the worst request", "", "ms"),
            Asked("hanging_median_added_ms", "the middle one", "", "ms"),
            Asked("hanging_worst_vs_deadline", "the worst ÷ the deadline of a call", "<= 1"),
            Asked("num_pairs", "rounds with the sidecar ended", ">= 20"),
        ),
        "Nothing is reused; the connector has served a hit before its sidecar goes.",
    ),
    Result(
        "vllm-equal-cpu",
        "vLLM's features, outputs with and without the store",
        (
            Asked("num_rows", "features and their combinations"),
            Asked(
                "num_different",
                "rows whose tokens differ",
                "== 0",
                "",
                "vLLM's features, one by one and together: rows whose tokens differ",
            ),
            Asked("num_not_run", "rows that died or could not run here", "== 0"),
            Asked("num_controls_missing", "rows without a control, but for the one that is a control itself", "== 0"),
            Asked("worst_error", "stored KV − recomputed KV, fp32, at worst", "<= 1e-4"),
            Asked("cross_engine_equal", "saved by vLLM, loaded by transformers, and the reverse", "yes"),
            Asked(
                "worst_added_delay_vs_deadline",
                "kills and damage: delay over the same request computed ÷ deadline, at worst",
                "<= 1",
            ),
            Asked("added_ms_sidecar_killed", "delay: sidecar killed in a load (deadline 1 s)", "", "ms"),
            Asked("added_ms_sidecar_gone", "sidecar gone", "", "ms"),
            Asked("added_ms_sidecar_stopped", "sidecar stopped, so that it answers nothing (1 s)", "", "ms"),
            Asked("added_ms_redis_killed", "Redis killed in a load (2 s)", "", "ms"),
            Asked("added_ms_redis_gone", "Redis gone", "", "ms"),
            Asked("added_ms_part_deleted", "one rank's part of a block deleted (5 s)", "", "ms"),
            Asked("added_ms_part_damaged", "one rank's part of a block damaged (5 s)", "", "ms"),
        ),
        "Each row has a control with wrong bytes, whose output must differ.",
    ),
    Result(
        "burst-cpu",
        "A burst: 8 users, one 2k system prompt, two vLLM engines, fp32",
        (
            Asked(
                "burst_speedup",
                "mean TTFT without ÷ with",
                ">= 2.5",
                "×",
                "8 users at once, one system prompt, two vLLM engines: mean TTFT without ÷ with",
            ),
            Asked("prefix_computed_times", "times that prompt was computed", "<= 1.2"),
            Asked("speedup_over_own_cache", "mean TTFT with the engines' own caches ÷ with", "", "×"),
            Asked("outputs_equal", "outputs equal", "yes"),
        ),
    ),
    Result(
        "breakeven-cpu",
        "Load or compute, links of 0.05 to 5 GB/s, prompts of 128 to 8k tokens",
        (
            Asked(
                "worst_regret_pct",
                "TTFT above the better of always and never loading, worst cell",
                "<= 5",
                "%",
                "load or compute, over 28 speeds and lengths: TTFT above the better choice, at worst",
            ),
            Asked("worst_null_pct", "two arms that do the same, worst cell", "", "%"),
            Asked("cells_over_target", "cells above the bound"),
            Asked("cells_surely_over_target", "cells above it beyond their noise"),
            Asked("cells", "cells"),
        ),
        "A random Llama of 10M parameters in transformers.",
    ),
    Result(
        "blocks-cpu",
        "Block size, and reuse of a block's beginning",
        (
            Asked("hit_pct_64", "hit tokens, blocks of 64", "", "%"),
            Asked("hit_pct_64_partial", "with a block's beginning", "", "%"),
            Asked("hit_pct_256", "hit tokens, blocks of 256", "", "%"),
            Asked("hit_pct_256_partial", "with a block's beginning", "", "%"),
            Asked("outputs_equal", "outputs equal", "yes"),
        ),
    ),
    Result(
        "policies-conversation",
        "Eviction: `returns` on the last half of a chat trace",
        (
            Asked("gap_closed_pct_2", "share of lru → optimum closed, capacity 2 % of the blocks", ">= 25", "%"),
            Asked(
                "gap_closed_pct_5",
                "5 %",
                ">= 20",
                "%",
                "eviction on a chat trace: share of the way from LRU to the offline optimum",
            ),
            Asked("gap_closed_pct_10", "10 %", ">= 15", "%"),
            Asked("worst_vs_lru_pts", "hit rate − lru's, at worst, capacities of 0.5 to 50 %", ">= -0.5", "points"),
            Asked("us_per_block", "time in the policy", "<= 10", "µs a block"),
        ),
    ),
    Result(
        "policies-synthetic",
        "Eviction on a synthetic trace",
        _WORST,
    ),
    Result(
        "policies-generated",
        "Eviction on generated traces",
        _WORST,
    ),
    Result(
        "exclusive-lru",
        "Two tiers: what exclusive ones bring over inclusive ones, host and tier below under lru",
        (
            Asked("gained_pts_cooled", "`exclusive`, as it is built: hits gained, at best", "", "points"),
            Asked("more_written_pct_cooled", "more written, at worst", "", "%"),
            Asked("found_alone_pct_cooled", "of the lower tier found after a restart, at worst", "", "%"),
            Asked("gained_pts_exclusive", "were all that comes up to leave below: hits gained, at best", "", "points"),
            Asked("more_written_pct_exclusive", "more written, at worst", "", "%"),
            Asked("found_alone_pct_exclusive", "found after a restart, at worst", "", "%"),
            Asked("gained_pts_ends", "were only ends to leave: hits gained, at best", "", "points"),
            Asked("more_written_pct_ends", "more written, at worst", "", "%"),
            Asked("found_alone_pct_ends", "found after a restart, at worst", "", "%"),
        ),
    ),
    Result(
        "standing",
        "Policies of the shared tier beside its lru, last halves of both traces, 2 to 20 % of the blocks",
        (
            Asked("mean_pts_returns", "`returns`: hits − lru's, mean", "", "points"),
            Asked("best_pts_returns", "at best", "", "points"),
            Asked("worst_pts_returns", "at worst", "", "points"),
            Asked("mean_pts_priority", "`priority`, over all requests, mean", "", "points"),
            Asked("favoured_mean_pts_priority", "over the fifth of conversations that was favoured", "", "points"),
        ),
        "Scores with `returns` were chosen on first halves. `lru` stays the default, for what the next table shows.",
    ),
    Result(
        "standing-flips",
        "… on generated traffic that changes its kind",
        (
            Asked("mean_pts_returns", "`returns`: hits − lru's, mean", "", "points"),
            Asked("best_pts_returns", "at best", "", "points"),
            Asked("worst_pts_returns", "at worst", "", "points"),
        ),
    ),
    Result(
        "shared-synthetic",
        "Eviction within Redis, synthetic trace at 5 %",
        (
            Asked("shared_lru_gap_pts", "hit rate below exact tail-first lru", "<= 0.3", "points"),
            Asked(
                "unreachable_pct",
                "bytes whose prefix is gone",
                "== 0",
                "%",
                "eviction within Redis: bytes whose prefix is gone",
            ),
        ),
    ),
    Result(
        "shared-conversation",
        "… two stores on one server, chat trace",
        (
            Asked("out_of_reach_blocks", "residents out of reach", "== 0"),
            Asked("other_faults", "accounts that are not what is there", "== 0"),
        ),
    ),
    Result(
        "lossy-cpu",
        "What fp8 and NVFP4 blocks do to SmolLM2",
        (
            Asked("fp8_bytes_share", "fp8: bytes ÷ bf16's"),
            Asked("fp8_perplexity_change_pct", "fp8: perplexity", "", "%"),
            Asked("fp8_logit_drift", "fp8: logit drift"),
            Asked("chunked_perplexity_change_pct", "bf16, prefilled in chunks: perplexity", "", "%"),
            Asked("chunked_logit_drift", "bf16, prefilled in chunks: logit drift"),
            Asked("nvfp4_bytes_share", "NVFP4: bytes ÷ bf16's"),
            Asked("nvfp4_perplexity_change_pct", "NVFP4: perplexity", "", "%"),
        ),
        "Chunked prefill is bf16's own rounding: the yardstick for what a format changes.",
    ),
    Result(
        "gpu-h100",
        "On a GPU",
        (
            Asked("bytes_equal", "every way gives the CPU's bytes", "yes"),
            Asked("order_kept", "saves and loads wait for the forward, and it for them", "yes"),
            Asked(
                "d2h_ratio",
                "device → host, 16-token pages in random order ÷ one large pinned copy",
                ">= 0.92",
                "",
                "GPU: device → host ÷ one large pinned copy",
            ),
            Asked("h2d_ratio", "host → device", ">= 0.92", "", "… host → device"),
            Asked("bidi_ratio", "both at once ÷ that pair's ceiling", ">= 0.85"),
            Asked("decode_slowdown_pct", "a decode step meanwhile", "<= 3", "%"),
            Asked("decode_slowdown_pct_link", "… beside large pinned copies both ways alone", "", "%"),
            Asked("pin_delay_s", "pinning 32 GiB: delay of the first request", "<= 0.5", "s"),
            *(
                Asked(f"ttft_vs_floor_{n}", f"TTFT from pinned host ÷ its floor, {n}", "<= 1.10", "×")
                for n in ("8k", "32k", "64k")
            ),
            *(
                Asked(
                    f"ttft_speedup_{n}",
                    f"recompute ÷ pinned host, {n}",
                    f">= {least}",
                    "×",
                    "… recompute ÷ pinned host, 64k" if n == "64k" else "",
                )
                for n, least in (("8k", 5), ("32k", 10), ("64k", 14))
            ),
            Asked("overlap_gain_32k", "copy + forward ÷ layer by layer, 32k", "> 1", "×"),
            Asked("fp8_gain_32k", "bf16 ÷ fp8, 32k", ">= 1.4", "×"),
            Asked("device_tier_overhead_pct", "device tier over the plain cached forward", "<= 5", "%"),
            Asked("device_rows_overhead_pct", "… where its rows are copied into a cache", "", "%"),
            Asked("turns_speedup_redis", "more chats than fit: recompute ÷ Redis, always loaded from", "", "×"),
            Asked("turns_speedup_redis_measured", "… ÷ Redis, loaded from where that is predicted to pay", "", "×"),
            Asked("split_decode_equal", "split-KV decode over reloaded pages equals that over native ones", "yes"),
        ),
        "Of the commit above: how copies are cut, begun and put off, fp8's way into the pages, and the cache that is"
        " served in place have changed since, and no device was at hand to measure them.",
    ),
)


def number(value: object) -> str:
    """A measured value in at most three digits that mean something."""
    match value:
        case None:
            return "not measured"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            if abs(value) >= 100 or value == int(value):
                return f"{value:,.0f}"
            return f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.2g}"
    return str(value)


def figures_of(stem: str) -> dict[str, Asked]:
    """The figures of one result by their keys. Raises KeyError where no result has that stem."""
    by_stem = {result.stem: result for result in RESULTS_ASKED}
    return {figure.key: figure for figure in by_stem[stem].figures}


def verdict(figure: Asked, value: object) -> str:
    """``asked ≥ 0.85: met``, or why that cannot be said; empty where nothing was asked."""
    if not figure.asked:
        return ""
    return f"asked {figure.bound}" + {None: "", True: ": met", False: ": NOT MET"}[figure.met(value)]


def print_figures(stem: str, summary: Mapping[str, object]) -> None:
    """Print a summary, a line a figure, beside what was asked of it for the published result `stem`."""
    known = figures_of(stem)
    for key, value in summary.items():
        figure = known.get(key, Asked(key, ""))
        print(f"{key:32} {number(value):>12} {figure.unit:10} {verdict(figure, value)}".rstrip())
