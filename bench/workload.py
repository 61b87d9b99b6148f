# SPDX-License-Identifier: Apache-2.0
"""Multi-turn chats about shared documents, the same for every arm of a benchmark.

Users share a system prompt; each asks several questions about a document that other
users ask about too. What the assistant said earlier is fixed text taken from the
document, never a model's output, so every arm replays the same token sequences and
turn k+1's prompt extends turn k's exactly. Documents are the language reference that
the standard library carries (``pydoc_data.topics``), so a workload depends on the
Python version: ``Workload.digest`` tells two apart.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.uint32]
Encode = Callable[[str], Sequence[int]]

# The markup of ChatML, which SmolLM2's chat template writes.
# The system prompt is as long as real ones are: several blocks of it are the same in
# every prompt, whatever the document.
SYSTEM = (
    "<|im_start|>system\n"
    "You are a careful assistant for people who read technical documentation. The user "
    "gives you one document and then asks about it, one question at a time.\n"
    "Answer from the document and from nothing else. Where it does not say, tell the "
    "user so, and name what they could look up instead. Quote the sentence you rely on "
    "before you explain it. Keep an answer to one paragraph unless the user asks for "
    "more. Use the document's own words for its terms, and explain a term the first "
    "time you use it. Write code only where the user asks for an example, and then the "
    "shortest that shows the point. When a question rests on a wrong assumption, say "
    "which one before you answer. When two passages disagree, quote both. Earlier "
    "answers in this conversation stand: do not repeat them, refer to them.<|im_end|>\n"
)
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_start|>assistant\n"
END = "<|im_end|>\n"

QUESTIONS = (
    'What does the document mean by "{quote}", and when does that matter?',
    'Which rule stands behind this sentence: "{quote}"?',
    'Explain "{quote}" in plain words for someone new to the language.',
    'Does anything else in the document limit what "{quote}" promises?',
    'Give an example in which "{quote}" decides what happens.',
)
_QUOTE_WORDS = 9
# Turns differ in length by up to this share of num_new_tokens, so that they end
# everywhere within a block.
_SPREAD = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One request: the whole prompt of one turn of one conversation."""

    user: int
    turn: int  # 1 is the first
    conversation: str
    document: str
    token_ids: TokenIds  # read-only
    num_new_tokens: int  # past the end of this conversation's previous prompt
    num_reusable_tokens: int  # longest prefix shared with a prompt that came earlier


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Turns in the order in which they arrive."""

    name: str
    seed: int
    num_users: int
    num_documents: int
    turns: tuple[Turn, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def num_reusable_tokens(self) -> int:
        """Tokens that a store without limits would serve."""
        return sum(turn.num_reusable_tokens for turn in self.turns)

    @property
    def num_distinct_tokens(self) -> int:
        """Tokens whose KV a store needs to hold to serve every reusable token."""
        return self.num_prompt_tokens - self.num_reusable_tokens

    @property
    def digest(self) -> str:
        """SHA-256 of every prompt in order: equal exactly where two runs replay the same."""
        state = hashlib.sha256()
        for turn in self.turns:
            state.update(len(turn.token_ids).to_bytes(8, "little"))
            state.update(turn.token_ids.astype("<u4").tobytes())
        return state.hexdigest()


@dataclass(frozen=True, slots=True)
class Document:
    """A stretch of real text, cut to a number of tokens."""

    name: str
    text: str
    token_ids: tuple[int, ...]


# --- documents ---------------------------------------------------------------


def documents(encode: Encode, num_tokens: int) -> list[Document]:
    """Cut the reference text into stretches of exactly num_tokens tokens.

    A stretch begins at a paragraph and no paragraph is in two; a topic's rest that is
    too short for one more is left out. The longest topics come first.
    """
    cut: list[Document] = []
    seen: set[str] = set()
    # Longest first: some topics are extracts of others, and it is the extracts that
    # are to have the holes.
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        taken: list[str] = []
        size = 0
        for paragraph in re.split(r"\n{2,}", topics[topic].strip()):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            taken.append(paragraph)
            # The seams between paragraphs may merge with them, so the sum is a guess.
            size += len(encode(paragraph))
            if size < num_tokens:
                continue
            text = "\n\n".join(taken)
            ids = encode(text)
            if len(ids) >= num_tokens:
                cut.append(Document(f"{topic}-{len(cut)}", text, tuple(ids[:num_tokens])))
                taken, size = [], 0
    return cut


def _sentences(text: str) -> list[str]:
    """Return the prose sentences of text, white space made single."""
    flat = " ".join(text.split())
    found = re.findall(r"[A-Z][^.!?]{30,300}[.!?](?= |$)", flat)
    return found or [flat]


# --- turns -------------------------------------------------------------------


def multi_turn(
    encode: Encode,
    *,
    users: int = 8,
    turns: int = 4,
    num_documents: int = 4,
    doc_tokens: int = 1600,
    new_tokens: int = 100,
    seed: int = 0,
) -> Workload:
    """Build the workload: users * turns prompts, round by round in shuffled order.

    User u asks about document u modulo num_documents. Each turn past the first adds
    about new_tokens tokens: the answer to the last question, the new question and the
    markup between. ``encode`` must give the same ids for the same text and one id per
    piece of markup. Raises ValueError where the text does not fill num_documents.
    """
    if min(users, turns, num_documents, doc_tokens, new_tokens) < 1:
        raise ValueError("users, turns, documents and token counts start at 1")
    rng = random.Random(seed)
    pool = documents(encode, doc_tokens)
    if len(pool) < num_documents:
        raise ValueError(f"there is text for {len(pool)} documents of {doc_tokens} tokens, not for {num_documents}")
    chosen = rng.sample(pool, num_documents)
    chats = []
    for user in range(users):
        document = chosen[user % num_documents]
        # A generator per user: more users or turns leave the others' text as it was.
        talk = random.Random(f"{seed}/{user}")
        prompts = _conversation(encode, document, turns, new_tokens, talk)
        chats.append((document.name, list(prompts)))
    arrived: list[Turn] = []
    for turn, user in _arrivals(users, turns, rng):
        name, prompts_of_user = chats[user]
        ids = _read_only(prompts_of_user[turn - 1])
        before = len(prompts_of_user[turn - 2]) if turn > 1 else 0
        arrived.append(
            Turn(
                user=user,
                turn=turn,
                conversation=f"{seed}-{user}",
                document=name,
                token_ids=ids,
                num_new_tokens=len(ids) - before,
                num_reusable_tokens=_longest_shared(ids, arrived),
            )
        )
    return Workload("multi_turn", seed, users, num_documents, tuple(arrived))


def _conversation(
    encode: Encode,
    document: Document,
    turns: int,
    new_tokens: int,
    rng: random.Random,
) -> Iterator[list[int]]:
    """Yield the prompt of each turn; each is a strict prefix of the next.

    Segments are encoded apart and their ids joined: encoding the whole text again each
    turn could merge across a seam and change ids that earlier turns have cached.
    """
    sentences = _sentences(document.text)
    ids = [*encode(SYSTEM), *encode(USER), *document.token_ids, *encode("\n\n")]
    ids += [*encode(_question(sentences, rng)), *encode(END + ASSISTANT)]
    yield ids
    for _ in range(turns - 1):
        question = [
            *encode(END + USER),
            *encode(_question(sentences, rng)),
            *encode(END + ASSISTANT),
        ]
        wanted = round(new_tokens * rng.uniform(1 - _SPREAD, 1 + _SPREAD))
        answer = _answer(encode, sentences, max(1, wanted - len(question)), rng)
        longer = [*ids, *answer, *question]
        assert longer[: len(ids)] == ids
        ids = longer
        yield ids


def _question(sentences: list[str], rng: random.Random) -> str:
    words = rng.choice(sentences).rstrip(".!?").split()
    return rng.choice(QUESTIONS).format(quote=" ".join(words[:_QUOTE_WORDS]))


def _answer(encode: Encode, sentences: list[str], num_tokens: int, rng: random.Random) -> list[int]:
    """Return num_tokens tokens of the document's sentences, from a random one on."""
    start = rng.randrange(len(sentences))
    text = " ".join([*sentences[start:], *sentences[:start]])
    ids = list(encode(text))
    while len(ids) < num_tokens:
        ids += encode(" " + text)
    return ids[:num_tokens]


def _arrivals(users: int, turns: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Yield (turn, user): every user once a round, never the same one twice in a row."""
    last = None
    for turn in range(1, turns + 1):
        order = list(range(users))
        rng.shuffle(order)
        if order[0] == last:
            order = [*order[1:], order[0]]
        last = order[-1]
        for user in order:
            yield turn, user


# --- no reuse ----------------------------------------------------------------


def zero_reuse(encode: Encode, like: Workload, seed: int = 0, num_requests: int | None = None) -> Workload:
    """Build prompts as long as those of ``like`` of which no two share a first token.

    ``num_requests`` of them, ``like``'s lengths over and over; as many as ``like`` has where not given.

    They are real text too: stretches of the reference that begin at distinct tokens.
    Nothing can be reused, so what a store costs here is what it costs when it is of
    no use. Raises ValueError where the text has fewer distinct tokens than prompts.
    """
    stream = np.array(
        [token for topic in sorted(topics) for token in encode(topics[topic])],
        dtype=np.uint32,
    )
    firsts = [int(token) for token in np.unique(stream)]
    count = len(like.turns) if num_requests is None else num_requests
    if len(firsts) < count:
        raise ValueError(f"the text begins with {len(firsts)} distinct tokens at most, not with {count}")
    rng = random.Random(f"zero/{seed}")
    made = []
    for number, first in enumerate(rng.sample(firsts, count)):
        turn = like.turns[number % len(like.turns)]
        user = turn.user + number // len(like.turns) * like.num_users
        start = int(rng.choice(np.flatnonzero(stream == first)))
        size = len(turn.token_ids)
        ids = _read_only(np.take(stream, range(start, start + size), mode="wrap"))
        made.append(
            Turn(
                user=user,
                turn=turn.turn,
                conversation=f"zero-{seed}-{user}-{turn.turn}",
                document="none",
                token_ids=ids,
                num_new_tokens=size,
                num_reusable_tokens=0,
            )
        )
    return Workload("zero_reuse", seed, like.num_users, len(made), tuple(made))


# --- token ids ---------------------------------------------------------------


def shared_prefix(left: TokenIds, right: TokenIds) -> int:
    """Count the leading tokens that two sequences have in common."""
    size = min(len(left), len(right))
    differs = np.flatnonzero(left[:size] != right[:size])
    return int(differs[0]) if len(differs) else size


def _longest_shared(ids: TokenIds, earlier: Sequence[Turn]) -> int:
    return max((shared_prefix(ids, turn.token_ids) for turn in earlier), default=0)


def _read_only(ids: Sequence[int] | TokenIds) -> TokenIds:
    array = np.array(ids, dtype=np.uint32)
    array.flags.writeable = False
    return array
