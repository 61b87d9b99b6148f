# SPDX-License-Identifier: Apache-2.0
"""The chats that every arm replays: what extends what, who shares what, and that a seed fixes all of it.

Most tests encode text as its bytes, one token each, because no rule here depends on a tokenizer.
"""

from __future__ import annotations

import re
from itertools import combinations, pairwise

import numpy as np
import pytest

from bench.workload import SYSTEM, Turn, Workload, documents, multi_turn, shared_prefix, zero_reuse


def encode(text: str) -> list[int]:
    return list(text.encode())


def text_of(turn: Turn) -> str:
    return bytes(turn.token_ids.tolist()).decode(errors="replace")


def chats(*, users: int = 6, turns: int = 4, num_documents: int = 3, doc_tokens: int = 2000, seed: int = 0) -> Workload:
    return multi_turn(
        encode,
        users=users,
        turns=turns,
        num_documents=num_documents,
        doc_tokens=doc_tokens,
        new_tokens=400,
        seed=seed,
    )


def conversation(workload: Workload, user: int) -> list[Turn]:
    return sorted((turn for turn in workload.turns if turn.user == user), key=lambda turn: turn.turn)


# ---- one conversation ----


def test_each_prompt_is_a_strict_prefix_of_the_next() -> None:
    workload = chats()
    for user in range(6):
        for earlier, later in pairwise(conversation(workload, user)):
            assert len(later.token_ids) > len(earlier.token_ids)
            assert shared_prefix(earlier.token_ids, later.token_ids) == len(earlier.token_ids)
            assert later.num_new_tokens == len(later.token_ids) - len(earlier.token_ids)
            assert later.conversation == earlier.conversation


def test_later_turns_add_about_the_tokens_asked_for_and_not_always_the_same_number() -> None:
    added = [turn.num_new_tokens for turn in chats().turns if turn.turn > 1]
    assert all(320 <= count <= 480 for count in added)
    assert len(set(added)) > 5


def test_a_first_turn_is_all_new() -> None:
    for turn in chats().turns:
        if turn.turn == 1:
            assert turn.num_new_tokens == len(turn.token_ids)


def test_a_prompt_reads_as_system_then_user_and_assistant_by_turns() -> None:
    last = conversation(chats(), 0)[-1]
    speakers = re.findall(r"<\|im_start\|>(\w+)\n", text_of(last))
    assert speakers == ["system", *["user", "assistant"] * 4]
    assert text_of(last).endswith("<|im_start|>assistant\n")
    assert text_of(last).count("<|im_end|>") == len(speakers) - 1


def test_answers_in_the_history_are_text_of_the_document() -> None:
    workload = chats()
    for user in range(6):
        turn = conversation(workload, user)[-1]
        [source] = [document for document in documents(encode, 2000) if document.name == turn.document]
        answers = re.findall(r"<\|im_start\|>assistant\n(.+?)<\|im_end\|>", text_of(turn), re.DOTALL)
        assert len(answers) == 3
        for answer in answers:
            # Sentences are joined by one space; the last one may be cut.
            assert answer[:40] in " ".join(source.text.split())


# ---- between conversations ----


def test_every_prompt_begins_with_the_same_system_prompt() -> None:
    for turn in chats().turns:
        assert turn.token_ids[: len(encode(SYSTEM))].tolist() == encode(SYSTEM)


def test_users_of_one_document_share_it_and_users_of_two_do_not() -> None:
    workload = chats()
    firsts = [conversation(workload, user)[0] for user in range(6)]
    for left, right in combinations(firsts, 2):
        shared = shared_prefix(left.token_ids, right.token_ids)
        if left.document == right.document:
            assert shared >= len(encode(SYSTEM)) + 2000
        else:
            assert shared < len(encode(SYSTEM)) + 200
    assert len({turn.document for turn in firsts}) == 3


def test_users_of_one_document_ask_different_things() -> None:
    workload = chats()
    left, right = conversation(workload, 0)[-1], conversation(workload, 3)[-1]
    assert left.document == right.document
    assert shared_prefix(left.token_ids, right.token_ids) < len(encode(SYSTEM)) + 2000 + 100


def test_what_is_reusable_is_the_longest_prefix_of_any_earlier_prompt() -> None:
    workload = chats()
    for place, turn in enumerate(workload.turns):
        earlier = [tuple(before.token_ids.tolist()) for before in workload.turns[:place]]
        ids = tuple(turn.token_ids.tolist())
        longest = next(
            size for size in range(len(ids), -1, -1) if size == 0 or any(ids[:size] == e[:size] for e in earlier)
        )
        assert turn.num_reusable_tokens == longest


def test_turns_after_the_first_can_reuse_the_whole_prompt_before() -> None:
    for turn in chats().turns:
        if turn.turn > 1:
            assert turn.num_reusable_tokens >= len(turn.token_ids) - turn.num_new_tokens


def test_totals_add_up() -> None:
    workload = chats()
    assert workload.num_prompt_tokens == sum(len(turn.token_ids) for turn in workload.turns)
    assert workload.num_distinct_tokens == workload.num_prompt_tokens - workload.num_reusable_tokens
    # What nobody has seen: three documents, and every conversation's own turns.
    assert 3 * 2000 < workload.num_distinct_tokens < workload.num_prompt_tokens / 3


# ---- arrival ----


def test_every_user_comes_once_a_round_and_never_twice_in_a_row() -> None:
    for seed in range(20):
        workload = chats(doc_tokens=200, users=3, seed=seed)
        rounds = [workload.turns[start : start + 3] for start in range(0, 12, 3)]
        for number, members in enumerate(rounds, start=1):
            assert sorted(turn.user for turn in members) == [0, 1, 2]
            assert {turn.turn for turn in members} == {number}
        assert all(left.user != right.user for left, right in pairwise(workload.turns))


def test_users_arrive_in_an_order_of_the_seed() -> None:
    orders = {tuple(turn.user for turn in chats(doc_tokens=200, seed=seed).turns) for seed in range(5)}
    assert len(orders) == 5


def test_one_user_alone_still_gets_every_turn() -> None:
    assert [turn.turn for turn in chats(users=1, num_documents=1).turns] == [1, 2, 3, 4]


# ---- seeds ----


def test_a_seed_fixes_the_workload_and_another_changes_it() -> None:
    assert chats(seed=3).digest == chats(seed=3).digest
    assert chats(seed=3).digest != chats(seed=4).digest


def test_the_digest_tells_where_one_prompt_ends_and_the_next_begins() -> None:
    workload = chats(users=2, turns=1, num_documents=1)
    first, second = workload.turns
    joined = np.concatenate([first.token_ids, second.token_ids])
    cut = len(first.token_ids) - 1
    moved = Workload("", 0, 2, 1, (_with_ids(first, joined[:cut]), _with_ids(second, joined[cut:])))
    assert moved.digest != workload.digest


def test_more_turns_leave_the_earlier_ones_as_they_were() -> None:
    short, long = chats(turns=2), chats(turns=4)
    for user in range(6):
        for few, many in zip(conversation(short, user), conversation(long, user), strict=False):
            assert few.token_ids.tolist() == many.token_ids.tolist()


def test_token_ids_are_read_only_words_of_32_bits() -> None:
    workload = chats()
    for turn in (*workload.turns, *zero_reuse(encode, workload).turns):
        assert turn.token_ids.dtype == np.uint32
        assert not turn.token_ids.flags.writeable


# ---- documents ----


def test_documents_have_the_length_asked_for_and_no_paragraph_in_common() -> None:
    cut = documents(encode, 3000)
    assert len(cut) > 50
    assert {len(document.token_ids) for document in cut} == {3000}
    assert len({document.name for document in cut}) == len(cut)
    paragraphs = [paragraph for document in cut for paragraph in re.split(r"\n{2,}", document.text)]
    assert len(set(paragraphs)) == len(paragraphs)


def test_a_document_is_the_beginning_of_its_text() -> None:
    for document in documents(encode, 3000):
        assert encode(document.text)[:3000] == list(document.token_ids)


def test_more_documents_than_there_is_text_for_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"text for \d+ documents of 100000 tokens, not for 9"):
        chats(num_documents=9, doc_tokens=100_000)


@pytest.mark.parametrize("option", ["users", "turns", "num_documents", "doc_tokens"])
def test_counts_below_one_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match="start at 1"):
        chats(**{option: 0})


# ---- no reuse ----


def test_no_two_prompts_of_the_zero_reuse_workload_share_a_first_token() -> None:
    twin = zero_reuse(encode, chats())
    firsts = [int(turn.token_ids[0]) for turn in twin.turns]
    assert len(set(firsts)) == len(twin.turns)
    assert twin.num_reusable_tokens == 0
    assert twin.num_distinct_tokens == twin.num_prompt_tokens


def test_the_zero_reuse_workload_has_the_lengths_and_order_of_the_other() -> None:
    workload = chats()
    twin = zero_reuse(encode, workload)
    assert [(turn.user, turn.turn, len(turn.token_ids)) for turn in twin.turns] == [
        (turn.user, turn.turn, len(turn.token_ids)) for turn in workload.turns
    ]
    assert len({turn.conversation for turn in twin.turns}) == len(twin.turns)


def test_the_zero_reuse_workload_can_be_longer_than_the_other() -> None:
    workload = chats()
    count = 2 * len(workload.turns) + 1
    longer = zero_reuse(encode, workload, num_requests=count)
    assert len(longer.turns) == count
    assert len({(turn.user, turn.turn) for turn in longer.turns}) == count, "two requests that cannot be told apart"
    assert len({int(turn.token_ids[0]) for turn in longer.turns}) == count


def test_the_zero_reuse_workload_follows_its_seed() -> None:
    workload = chats()
    assert zero_reuse(encode, workload, seed=1).digest == zero_reuse(encode, workload, seed=1).digest
    assert zero_reuse(encode, workload, seed=1).digest != zero_reuse(encode, workload, seed=2).digest


def test_more_prompts_than_distinct_first_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct tokens"):
        zero_reuse(lambda text: [7] * len(text), chats())


# ---- prefixes ----


def test_shared_prefix_counts_leading_tokens_only() -> None:
    def ids(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return np.array(values, dtype=np.uint32)

    assert shared_prefix(ids(1, 2, 3), ids(1, 2, 3)) == 3
    assert shared_prefix(ids(1, 2, 3), ids(1, 2)) == 2
    assert shared_prefix(ids(1, 2, 3), ids(1, 9, 3)) == 1
    assert shared_prefix(ids(1), ids(2)) == 0
    assert shared_prefix(ids(), ids(2)) == 0


def _with_ids(turn: Turn, ids: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> Turn:
    return Turn(turn.user, turn.turn, turn.conversation, turn.document, ids, len(ids), 0)
