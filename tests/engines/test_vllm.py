# SPDX-License-Identifier: Apache-2.0
"""The vLLM connector in a real vLLM engine, each scenario in a fork of its own; see `vllm_runs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engines.runner import Runner, there_is_vllm

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not there_is_vllm(), reason="did NOT run: no vLLM here; `make venv-vllm` installs it in .venv-vllm (3.5 GB)"
    ),
]

Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a scenario; returns what it saw."""
    with Runner(tmp_path_factory.mktemp("vllm")) as runner:
        yield runner.run


NOISE_S = 0.9
"""How much longer a step may take by chance on a busy machine; less than the deadlines of the scenarios, which are 1 s
and more."""


def within_the_deadline(facts: dict[str, Any], *damaged: str) -> bool:
    """Whether no request took longer than the same one computed and the deadline, noise aside; all of `damaged` did
    happen and were timed."""
    assert set(facts["added"]) == set(damaged)
    slowest_s = max(facts["added_s"], *facts["added"].values())
    return bool(slowest_s < facts["deadline_s"] + NOISE_S)


def healthy(facts: dict[str, Any]) -> bool:
    """Nothing is held, the store is sound, and on wrong bytes the answer was another."""
    return facts["held"] == [] and facts["check"] == [] and facts["control_differs"] is True


@pytest.mark.parametrize(
    ("scenario", "hits"),
    [
        # Cold, the same prompt of 300 tokens again, and a second turn of which 383 tokens have KV.
        ("base", [0, 299, 352]),
        ("chunks_64", [0, 299, 352]),
        ("chunks_256", [0, 299, 352]),
        ("chunks_2048", [0, 2091, 2144]),
        ("in_process", [0, 299, 352]),
        ("beside_the_step", [0, 299, 352]),
        ("without_prefix_cache", [0, 299, 352]),
        ("pages_of_128", [0, 299, 352]),
        ("blocks_of_64", [0, 299, 320]),
        ("fine_grid", [0, 299, 352]),
    ],
)
def test_a_second_turn_reuses_prompt_and_answer(run: Run, scenario: str, hits: list[int]) -> None:
    facts = run(scenario)
    assert facts["equal"] == [True, True, True]
    assert facts["hits"] == hits
    assert facts["num_blocks"] == {"blocks_of_64": 5, "chunks_2048": 67}.get(scenario, 11)  # the last token has no KV
    assert facts["is_real"] is (scenario == "in_process"), "the store that the flag makes, or one of the tests'"
    assert facts["left_open"] == (0 if scenario == "in_process" else 1), "it ends with its engine"
    assert facts["error"] < 1e-4
    assert facts["num_distinct"] > 20
    assert facts["metrics"]["loads"] == 3
    assert facts["metrics"]["failed_loads"] == 0
    assert min(facts["metrics"][name] for name in ("saved_blocks", "loaded_bytes")) > 0
    assert facts["control_differs"]
    assert healthy(facts)


def test_beginning_of_anothers_block_is_reused_to_the_token(run: Run) -> None:
    facts = run("partial")
    assert facts["equal"] == [True] * 4
    assert facts["hits"] == [0, 210, 33, 20]
    assert facts["error"] < 1e-4
    assert healthy(facts)


def test_one_text_under_two_images_shares_nothing_and_under_the_same_image_all(run: Run) -> None:
    facts = run("images")
    red, blue, *again = facts["answers"]
    assert red != blue, "blocks of the other image would be noticed"
    assert again == [red, blue, red]
    assert facts["hits"][:2] == [0, 0]
    assert min(facts["hits"][2:]) >= 288
    a_prompt = (facts["num_tokens"] - 1) // 32
    assert facts["num_blocks"] == [a_prompt, *[2 * a_prompt] * 4]
    assert all(facts["equal"])
    assert healthy(facts)


@pytest.mark.parametrize("scenario", ["ngram", "draft_model", "medusa", "eagle", "windows_and_drafts"])
def test_rejected_drafts_are_never_stored(run: Run, scenario: str) -> None:
    facts = run(scenario)
    assert facts["drafted"] > facts["accepted"] > 0
    assert facts["equal"] == [True, True, True]
    assert facts["hits"] == [299] * 8
    # For EAGLE vLLM drops the last block of its own hit: 256 tokens, after which loading pays again. Else it has 288.
    assert facts["kept_hits"] == [299 if scenario == "eagle" else 288] * 8
    assert facts["num_blocks"] == [11]
    assert facts["error"] < 1e-4
    assert facts["control_differs"]
    assert healthy(facts)


def test_nothing_is_loaded_beside_a_drafter_with_kv_of_its_own_whose_drafts_would_then_be_in_vain(run: Run) -> None:
    facts = run("drafter_alone")
    assert facts["equal"] == [True]
    assert facts["hits"] == [0] * 4
    assert facts["num_blocks"] > 8
    before, after = facts["accepted"]
    assert after >= before / 2 > 0
    assert facts["held"] == facts["check"] == []


def test_without_the_save_boundary_rejected_drafts_would_be_stored(run: Run) -> None:
    facts = run("ngram_without_clamp")
    assert facts["num_blocks"] == [12]
    assert facts["error"] > 1e-2


@pytest.mark.parametrize(
    ("scenario", "keeps", "error"),
    [
        ("windows", [False, True], 1e-4),
        ("windows_in_one_step", [False, True], 1e-4),
        ("windows_in_pages_of_128", [False, True], 1e-4),
        ("windows_kept", [True], 1e-4),
        ("windows_and_shared_layers", [False, False, True], 1e-3),
        ("windows_and_shared_layers_kept", [True], 1e-3),
        ("windows_and_sinks", [False, True], 1e-3),
        ("windows_alone", [False], 1e-4),
    ],
)
def test_layers_with_windows_are_stored_as_others_whatever_the_engine_keeps_of_them(
    run: Run, scenario: str, keeps: list[bool], error: float
) -> None:
    """Every other layer, or all of them, with a window of 48 tokens, and prompts and answers of several windows."""
    facts = run(scenario)
    assert facts["keeps"] == keeps
    assert facts["equal"] == [True, True, True]
    assert facts["hits"] == [0, 299, 352]
    assert facts["num_blocks"] == 11
    assert facts["error"] < error
    assert facts["num_distinct"] > 20
    assert healthy(facts)


def test_what_the_engines_own_cache_has_of_layers_with_windows_is_gone_on_from(run: Run) -> None:
    facts = run("windows_in_chats")
    assert facts["keeps"] == [False, True]
    assert len(facts["equal"]) > 20
    assert all(facts["equal"])
    assert any(local for local, _ in facts["began"])
    assert any(not local for local, _ in facts["began"])
    assert facts["missing"] == [0, 0, 0]
    assert facts["error"] < 1e-4
    assert healthy(facts)


def test_engines_of_one_model_share_whether_they_keep_windows_in_groups_or_not_and_at_any_split(run: Run) -> None:
    facts = run("windows_in_a_fleet")
    assert {name: engine["hits"] for name, engine in facts.items()} == {
        "ranks save": [0],
        "stages load": [299, 0],
        "one that keeps all loads": [299, 299, 0],
        "one in groups loads": [299, 299, 299],
        "ranks load": [299],
    }
    for name, engine in facts.items():
        assert engine["keeps"] == ([True] if name == "one that keeps all loads" else [False, True])
        assert all(engine["equal"])
        assert engine["error"] < 1e-4
        assert set(engine["num_blocks"]) == {11}
        assert engine["held"] == []
    assert facts["ranks load"]["control_differs"]


@pytest.mark.parametrize(
    ("scenario", "keeps"), [("chunked_attention", [False, True]), ("chunked_attention_kept", [True])]
)
def test_layers_that_attend_within_chunks_are_stored_whatever_the_engine_keeps_of_them(
    run: Run, scenario: str, keeps: list[bool]
) -> None:
    facts = run(scenario)
    assert sorted(facts["keeps"]) == sorted(keeps)
    assert facts["equal"] == [True, True, True]
    assert facts["layout"] == "opaque"
    assert facts["hits"] == [0, 288, 352]
    assert facts["num_blocks"] == [13, 13]
    assert facts["apart"] < 1e-4
    assert healthy(facts)


@pytest.mark.parametrize("scenario", ["preemption", "windows_through_preemption"])
def test_preempted_requests_come_back_from_the_store(run: Run, scenario: str) -> None:
    facts = run(scenario)
    assert facts["equal"] == [True]
    assert facts["preemptions"] > 0
    assert facts["loads"] == facts["preemptions"]
    assert facts["lost"] == facts["preemptions"], "who has lost its pages is named in the step that may give them away"
    assert facts["error"] < 1e-4
    assert healthy(facts)


@pytest.mark.alone
@pytest.mark.parametrize("scenario", ["faults", "faults_beside_the_step", "windows_and_faults"])
def test_a_store_that_fails_changes_no_token_and_costs_its_deadline_at_most(run: Run, scenario: str) -> None:
    facts = run(scenario)
    assert all(facts["equal"].values()), facts["equal"]
    failing = {"ends at 0", "ends at 4", "ends at 8", "breaks", "lies", "slow"}
    assert {name for name, count in facts["failed"].items() if count} == failing
    assert facts["asked"] >= 4
    assert facts["added_s"] < facts["deadline_s"] + NOISE_S
    assert facts["error"] < 1e-4
    assert healthy(facts)


@pytest.mark.parametrize("scenario", ["aborts", "windows_and_aborts"])
def test_aborted_requests_leave_nothing_behind(run: Run, scenario: str) -> None:
    facts = run(scenario)
    assert facts["seen"]["in its prompt"] == ["RUNNING"]
    assert facts["seen"]["in its load"] == ["WAITING_FOR_REMOTE_KVS"]
    assert facts["blocks_before_the_first_token"] > 0
    assert facts["pages_back"]
    assert facts["equal"] == [True]
    assert facts["hits"] == [288]
    assert facts["error"] < 1e-4
    assert healthy(facts)


def test_a_salt_is_a_namespace_and_a_reset_empties_the_store(run: Run) -> None:
    facts = run("tenants")
    assert all(facts["equal"])
    assert facts["hits"] == [0, 0, 0, 299, 299, 299]
    assert facts["num_blocks"] == [11, 11, 11]
    assert facts["error"] < 1e-4
    assert facts["blocks_after_reset"] == 0
    assert healthy(facts)


def test_a_reset_under_running_requests_leaves_nothing_of_before_to_be_served_or_saved(run: Run) -> None:
    facts = run("resets")
    anew, as_they_are = facts["anew"], facts["as they are"]
    assert anew["states"] == {"answers": "RUNNING", "prefills": "RUNNING"}
    assert as_they_are["states"] == {"answers": "RUNNING", "prefills": "RUNNING", "loads": "WAITING_FOR_REMOTE_KVS"}
    for found in (anew, as_they_are):
        assert found["stored_before"] > 0
        assert found["stored_after"] == 0
        assert all(found["equal"])
        for error, num_blocks in found["stored"]:
            assert error < 1e-4
            assert num_blocks == 11
    assert (anew["done"], as_they_are["done"]) == (True, False)  # vLLM's own cache is kept while requests run
    assert anew["began"]
    assert anew["again"] == [True, 299]
    assert as_they_are["failed"] == 1, "what was being loaded was of before"
    assert as_they_are["kept"] == [0, 0], "so was what two requests went on with"
    assert as_they_are["again"] == [True, 0]
    assert healthy(facts)


def test_an_engine_killed_in_the_middle_of_a_save_or_a_load_holds_nothing_and_the_next_one_goes_on(run: Run) -> None:
    facts = run("killed")
    for what in ("save", "load"):
        death = facts[what]
        assert death["there"]
        assert death["signal"] == 9
        assert death["held_before"]["sessions"] == 1
        assert death["held"] == {}
        assert death["free_after_s"] < 5
        assert death["check"] == []
        after = facts[f"after {what}"]
        assert after["equal"]
        assert after["num_blocks"] == 11
        assert after["error"] < 1e-4
        assert after["held"] == []
    assert facts["save"]["blocks"] == [6, 4], "the two of its third chunk went with it"
    assert facts["save"]["used_bytes"][0] > facts["save"]["used_bytes"][1]
    assert facts["after save"]["hits"] == 128
    assert facts["load"]["held_before"]["lease.live"] > 0
    assert facts["load"]["held_before"]["host.pinned_blocks"] > 0
    assert facts["load"]["blocks"] == [11, 11]
    assert facts["after load"]["hits"] == 299
    assert facts["after load"]["control_differs"]


def test_what_requests_say_of_themselves_decides_what_goes(run: Run) -> None:
    facts = run("hints")
    for how in ("silent", "said"):
        assert all(facts[how]["equal"].values())
        assert facts[how]["control_differs"]
        assert facts[how]["held"] == []
    assert facts["silent"]["kept"]["1"] < 11
    assert facts["silent"]["kept"]["2"] == facts["silent"]["kept"]["3"] == 11
    assert facts["said"]["kept"]["2"] < 11
    assert facts["said"]["kept"]["1"] == facts["said"]["kept"]["3"] == 11


def test_adapters_are_known_by_content(run: Run) -> None:
    facts = run("adapters")
    assert facts["hits"] == [0, 0, 0, 299, 299, 299, 299]
    assert all(facts["same"])
    assert facts["num_answers"] == 3
    assert facts["same_bytes"]
    assert healthy(facts)


def test_an_adapter_rewritten_before_the_engine_reads_it_spoils_neither_the_store_nor_an_answer(run: Run) -> None:
    for facts in run("adapters_rewritten").values():
        assert facts["num_answers"] == 2
        assert facts["stored"] == [0, 0], "it came as one adapter and was computed with another"
        assert facts["hits"] == [0, 0, 299]
        assert facts["equal"] == [True] * 5
        assert facts["hits_before"] == 299, "vLLM counts what it then computed again"
        assert facts["hits_kept"] == 288, "vLLM's own cache goes by name and path"
        assert facts["stored_kept"] == [0, 0]
        assert healthy(facts)


@pytest.mark.parametrize(("scenario", "kv_dtype"), [("fp8", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")])
def test_fp8_pages_are_stored_as_bytes(run: Run, scenario: str, kv_dtype: str) -> None:
    facts = run(scenario)
    if "not_run" in facts:
        pytest.skip(f"did NOT run: {facts['not_run']}")
    assert facts["kv_dtype"] == kv_dtype
    assert facts["equal"] == [True]
    assert facts["hits"] == [299]
    assert facts["same_bytes"]
    assert facts["control_differs"]
    assert healthy(facts)


@pytest.mark.alone
def test_a_sidecar_may_be_killed_at_any_time_and_come_back_under_a_running_engine(run: Run) -> None:
    facts = run("sidecar_killed")
    assert all(facts["equal"].values()), facts["equal"]
    hits = facts["hits"]
    assert [hits[name] for name in ("cold", "sound", "goes on")] == [0, 299, 299]
    for how in ("in the step", "beside the steps"):
        assert [hits[f"{when}, {how}"] for when in ("before", "gone", "back")] == [299, 0, 299]
    assert facts["failed"] == 2  # the loads that it was killed in
    assert within_the_deadline(facts, "sidecar killed", "sidecar gone", "sidecar stopped"), facts["added"]
    assert facts["num_blocks"] == 11
    assert facts["error"] < 1e-4
    assert facts["control_differs"]
    assert facts["held"] == []


@pytest.mark.alone
def test_a_cold_replica_loads_from_redis_which_may_be_killed_in_the_middle(run: Run) -> None:
    facts = run("redis_tier")
    assert all(facts["equal"].values()), facts["equal"]
    assert facts["hits"]["from Redis"] == 288
    assert facts["loaded"]["host"] == 0
    assert facts["loaded"]["redis"] > 0
    assert facts["killed"] == {"acted": True, "failed": 1}
    assert within_the_deadline(facts, "redis killed", "redis gone"), facts["added"]
    assert facts["num_blocks"] == 11
    assert facts["error"] < 1e-4
    assert facts["control_hits"] == 288
    assert facts["control_differs"]
    assert facts["held"] == []


@pytest.mark.parametrize("scenario", ["tp2", "pp2"])
def test_what_parallel_engines_save_a_single_one_loads_and_the_reverse(run: Run, scenario: str) -> None:
    facts = run(scenario)
    assert facts["many saves"]["hits"] == [0, 0, 0]
    assert facts["one loads"]["hits"] == [299, 0]
    # From Redis, which gives whole blocks alone. The last two lack a part of one rank in block 4: one was deleted, the
    # other damaged, which is seen when it loads.
    assert facts["many loads"]["hits"][:3] == [288, 288, 128]
    assert within_the_deadline(facts["many loads"], "part deleted", "part damaged"), facts["many loads"]["added"]
    for engine in facts.values():
        assert all(engine["equal"])
        assert engine["error"] < 1e-4
        assert set(engine["num_blocks"]) == {11}
        assert engine["held"] == []
    assert facts["many loads"]["control_hits"] == 288
    assert facts["many loads"]["control_differs"]


def test_of_ranks_that_hold_the_same_head_one_saves_and_all_load(run: Run) -> None:
    facts = run("tp2_replicas")
    assert facts["many saves"]["hits"] == facts["one saves"]["hits"] == [0]
    assert facts["one loads"]["hits"] == facts["many loads"]["hits"] == [299]
    assert facts["many saves"]["save_calls"] == facts["one saves"]["save_calls"] > 0
    for engine in facts.values():
        assert all(engine["equal"])
        assert engine["error"] < 1e-4
        assert engine["num_blocks"] == [11]
        assert engine["held"] == []
    assert facts["many loads"]["control_hits"] > 0
    assert facts["many loads"]["control_differs"]


def test_a_producer_saves_and_does_not_load_and_a_consumer_the_reverse(run: Run) -> None:
    facts = run("roles")
    produces, consumes = facts["produces"], facts["consumes"]
    assert produces["hits"] == [0, 0]
    assert produces["num_blocks"] == [11, 11]
    assert produces["loads"] == 0
    assert consumes["hits"] == [299, 0, 0, 299], "what it computed itself is not there the second time"
    assert consumes["num_blocks"] == [11] * 4
    assert consumes["control_differs"]
    for engine in (produces, consumes):
        assert all(engine["equal"])
        assert engine["error"] < 1e-4
        assert engine["held"] == []


def test_an_engine_that_cannot_be_served_does_not_start_and_says_why_in_one_sentence(run: Run) -> None:
    refused = run("refusals")
    assert refused["nothing"] == ""
    assert "some layers attend to a window of 48 tokens" in refused["windows below a block"]
    assert "set a smaller block_tokens" in refused["windows below a block"]
    assert "some layers attend within chunks of 64 tokens" in refused["chunks below a block"]
    assert "load_with_drafts is set for a model with layers in groups" in refused["windows beside a drafter"]
    assert "has another connector interface (get_num_new_matched_tokens" in refused["interface"]
    assert "tested are 0.32" in refused["interface"]
    assert 'set "kv_load_failure_policy": "recompute"' in refused["policy"]
    assert "has 'adress': known are address" in refused["setting"]
    assert "one must divide the other" in refused["block"]
    assert "start `kvstore serve`" in refused["ranks"]
    assert all("\n" not in sentence for sentence in refused.values())


def test_a_prompt_that_many_send_at_once_is_computed_once_and_taken_as_it_comes(run: Run) -> None:
    facts = run("burst")
    assert facts["equal"] == [True] * 4
    assert facts["computed_times"] == 1.0
    assert max(facts["others_began"]) < facts["first_ended"], "the first one's blocks were reused while it ran"
    assert facts["error"] < 1e-4
    assert healthy(facts)


def test_who_waited_for_an_aborted_request_goes_on_without_it(run: Run) -> None:
    facts = run("orphans")
    assert facts["equal"] == [True] * 3
    assert facts["aborted"] == []
    # What it had saved is reused; the rest is computed by one of the three, for which the others wait in their turn.
    assert min(facts["hits"]) >= 64
    assert sorted(facts["hits"])[1:] == [640, 640]
    assert facts["marks"] == 0
    assert facts["error"] < 1e-4
    assert healthy(facts)


def test_prompts_of_embeddings_are_known_by_content(run: Run) -> None:
    facts = run("embeddings")
    assert facts["equal"] == [True] * 8
    assert facts["hits"] == [0, 0, 299, 299, 0, 0, 0, 299]
    assert facts["num_blocks"] == [11, 11]
    assert facts["error"] < 1e-4
    assert healthy(facts)


@pytest.mark.parametrize(
    ("scenario", "block_tokens", "hits"),
    [
        # Cold, the same prompt of 300 tokens, one that shares 210 of them, and a second turn: whole blocks alone.
        ("kept", 32, [0, 288, 192, 320]),
        ("kept_beside_the_step", 32, [0, 288, 192, 320]),
        ("kept_blocks_of_64", 64, [0, 256, 192, 320]),
        ("kept_pages_of_128", 128, [0, 256, 128, 256]),
    ],
)
def test_pages_of_an_unknown_order_are_kept_as_they_are(
    run: Run, scenario: str, block_tokens: int, hits: list[int]
) -> None:
    facts = run(scenario)
    assert facts["layout"].startswith("opaque:")
    assert facts["block_tokens"] == block_tokens
    assert facts["equal"] == [True] * 4
    assert facts["hits"] == hits
    assert facts["num_blocks"] >= hits[-1] // block_tokens
    assert facts["same_bytes"]
    assert facts["warned"] is (scenario != "kept_pages_of_128"), "that one was set to be stored so"
    assert facts["failed_loads"] == 0
    assert facts["num_distinct"] > 10
    assert healthy(facts)


def test_preempted_requests_of_an_unknown_order_come_back_whole(run: Run) -> None:
    facts = run("kept_through_preemption")
    assert facts["layout"].startswith("opaque:")
    assert facts["equal"] == [True]
    assert facts["preemptions"] > 0
    assert facts["loads"] > 0
    assert facts["failed_loads"] == 0
    assert healthy(facts)


def test_a_scheduler_that_was_not_told_of_opaque_pages_rests_and_refuses_to_be_told_late(run: Run) -> None:
    facts = run("untold")
    after, before = facts["after"], facts["before"]
    assert after["layout"] == "canonical"
    assert after["num_blocks"] == facts["there"] > 0
    assert before["layout"].startswith("opaque:")
    assert before["hits"] == [0, 0, 288, 288]
    assert before["num_blocks"] > facts["there"]
    # Of four requests, two of which find blocks: the first, whose step tells the scheduler's side.
    assert (after["loads"], after["failed_loads"]) == (1, 1)
    assert (before["loads"], before["failed_loads"]) == (2, 0)
    for engine in (before, after):
        assert engine["equal"] == [True] * 4
        assert engine["held"] == []
        assert "when requests have come already" in engine["late"]
        assert engine["layout_then"] == engine["layout"]


@pytest.mark.parametrize("scenario", ["strangers", "ranks"])
def test_engines_that_pack_pages_differently_never_load_each_others(run: Run, scenario: str) -> None:
    facts = run(scenario)
    layouts = [engine["layout"] for engine in facts["first"].values()]
    assert len(set(layouts)) == len(layouts)
    assert [layout for layout in layouts if not layout.startswith("opaque:")] == ["canonical"] * (scenario != "ranks")
    for name, engine in facts["first"].items():
        # Each has the same model and prompt, and all but the first find a store that others have filled.
        assert engine["hits"] == [0, 299 if name == "canonical" else 288], name
        assert engine["equal"] == [True, True], name
        assert engine["held"] == [], name
    again = facts["again"]
    assert again["layout"] == layouts[-1]
    assert again["hits"] == [288, 288]
    assert again["equal"] == [True, True]
    assert again["control_hits"] > 0
    assert again["control_differs"]
    assert again["held"] == []


@pytest.mark.parametrize(("scenario", "hits", "error"), [("both_engines", 299, 1e-4), ("smollm2", 208, 5e-4)])
def test_vllm_and_transformers_load_what_the_other_saved(run: Run, scenario: str, hits: int, error: float) -> None:
    facts = run(scenario)
    assert facts["same_id"], facts
    assert facts["equal"] == [True, True]
    assert facts["transformers_hits"] == hits
    assert facts["vllm_hits"] == [hits]
    # SmolLM2's keys reach 30: 6.7e-5 apart with AVX-512, 1.2e-4 with AVX2, which sums in another order.
    assert facts["error"] < error
    assert facts["num_distinct"] > 20
    assert facts["control_differs"]
    assert facts["transformers_control_differs"]
    assert healthy(facts)


@pytest.mark.alone
def test_the_tier_below_vllms_own_offloading_keeps_its_contract(run: Run) -> None:
    clauses = run("tiering_contract")["clauses"]
    assert len(clauses) == 8
    assert {name: fault for name, fault in clauses.items() if fault} == {}


def test_chats_that_overflow_vllms_own_offloading_come_back_from_redis(run: Run) -> None:
    facts = run("tiering")
    assert all(facts["equal"].values()), facts["equal"]
    assert facts["hits"]["from Redis"] == 288
    assert facts["chunk_hits"] >= 9
    assert facts["read_bytes"] >= 9 * 49152
    assert facts["acted"]
    assert facts["hits"]["killed"] < 288
    assert facts["control_hits"] > 0
    assert facts["control_differs"]
    assert facts["jobs"] == 0
