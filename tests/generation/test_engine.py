"""The engine's slots: an answer depends on its request and their number, to the bit; nothing compiles after warm-up."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_weights, tiny_config

from transllm_jax.errors import UserError
from transllm_jax.generation.device import Device
from transllm_jax.generation.engine import ORIGINAL, PIECES, WHOLE, Engine, Request, Result
from transllm_jax.generation.programs import Entry, admit, burst, empty_desk, empty_slots, read_piece
from transllm_jax.generation.row import Row
from transllm_jax.generation.sampling import Sampling
from transllm_jax.model.cache import CHUNK, unstacked
from transllm_jax.model.parameters import Split, assemble, load_frozen

VOCAB, SLOTS = 61, 4
CONFIG = tiny_config(VOCAB, tied=False)
LONG = CHUNK + PIECES[0] + 5
# The longest text of these tests.
ROOM = 3 * CHUNK


@pytest.fixture(scope="module")
def split() -> Split:
    return assemble(CONFIG, load_frozen(CONFIG, random_weights(CONFIG)))


def letters(ids: Sequence[int]) -> str:
    """A text of one or two letters a token."""
    return "".join(chr(97 + token % 26) * (1 + token % 2) for token in ids)


@pytest.fixture(scope="module")
def engine(split: Split) -> Engine:
    return Engine(split, CONFIG, batch_size=SLOTS, cache_size=ROOM, decode=letters)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def results(engine: Engine, requests: Sequence[Request], **options: Any) -> list[Result]:
    """The answers in the order of the requests, in all slots of the engine, however few they are."""
    found = dict(engine.run(requests, **{"at_once": engine.batch_size, **options}))
    return [found[number] for number in range(len(requests))]


SETTINGS = [
    Sampling(),
    Sampling(1.0, seed=3),
    Sampling(1.2, top_p=0.9, top_k=20, seed=5),
    Sampling(0.7, min_p=0.02, seed=7),
    Sampling(repetition_penalty=1.3),
    Sampling(1.0, repetition_penalty=1.5, seed=1),
]
REQUESTS = [
    Request(prompt(length, number), 20 + number, scored=True, sampling=SETTINGS[number % len(SETTINGS)])
    for number, length in enumerate([9, LONG, 1, 70, CHUNK, 33, 2 * CHUNK, 5, 40, 130])
]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Result]:
    """Each request's answer when nothing else is asked."""
    return [results(engine, [request])[0] for request in REQUESTS]


def test_an_answer_is_the_same_to_the_bit_whatever_else_is_asked(engine: Engine, alone: list[Result]) -> None:
    """Log-probabilities are compared, too: they show any difference in the sums."""
    assert results(engine, REQUESTS) == alone
    assert results(engine, REQUESTS[::-1]) == alone[::-1]
    order = np.random.default_rng(1).permutation(len(REQUESTS)).tolist()
    assert results(engine, [REQUESTS[number] for number in order]) == [alone[number] for number in order]
    assert len({tuple(result.ids) for result in alone}) == len(alone)


def test_an_answer_is_the_same_in_every_slot(engine: Engine, alone: list[Result]) -> None:
    assert results(engine, [REQUESTS[3]] * (2 * SLOTS + 1)) == [alone[3]] * (2 * SLOTS + 1)


def test_a_greedy_answer_does_not_care_that_others_are_sampled(engine: Engine) -> None:
    """All greedy, the engine only looks for the most likely token."""
    plain = [Request(prompt(12, number), 24) for number in range(3)]
    first = results(engine, plain)
    assert results(engine, [*plain, REQUESTS[2]])[:3] == first
    assert [one.ids for one in results(engine, [replace(request, scored=True) for request in plain])] == [
        one.ids for one in first
    ]


def test_engines_of_other_sizes_give_the_same_ids(split: Split, alone: list[Result]) -> None:
    """Sums may be taken in another order, so log-probabilities are equal up to rounding."""
    other = results(Engine(split, CONFIG, batch_size=1, cache_size=ROOM), REQUESTS[:4])
    for found, wanted in zip(other, alone, strict=False):
        assert found.ids == wanted.ids and found.logprobs is not None and wanted.logprobs is not None
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=1e-4, atol=1e-4)


def rows_of(engine: Engine) -> dict[str, set[int]]:
    """The numbers of rows of the programs that were used, by what they do."""
    found: dict[str, set[int]] = {}
    for name in engine.programs:
        what, rows = re.fullmatch(r"(.*?), the .*?, (\d+) rows, .*", name).groups()  # type: ignore[union-attr]
        found.setdefault(what.split()[1], set()).add(int(rows))
    return found


def test_few_prompts_get_few_rows(split: Split) -> None:
    """The least power of two; the answers are those of an engine that has no more, to the bit."""
    many = [Request(prompt(5 + number, number), 20, scored=True) for number in range(9)]
    sizes: dict[int, int] = {1: 1, 3: 4, 5: 6, 9: 6}
    for count, rows in sizes.items():
        engine = Engine(split, CONFIG, batch_size=6)
        found = dict(engine.run(many[:count]))
        assert rows_of(engine) == {"piece": {1}, "admission": {rows}, "burst": {rows}}
        other = Engine(split, CONFIG, batch_size=rows)
        assert found == dict(other.run(iter(many[:count]), longest=34)) and rows_of(other) == rows_of(engine)
    engine = Engine(split, CONFIG, batch_size=32)
    prompts = [one.prompt for one in many[:3]]
    options: Any = {"max_new_tokens": 20, "stop": []}
    answers = engine.generate(prompts, **options)
    assert rows_of(engine)["burst"] == {4} and answers == Engine(split, CONFIG, batch_size=4).generate(
        prompts, **options
    )
    *_, streamed = engine.stream(prompts[0], **options)
    assert rows_of(engine)["burst"] == {1, 4} and streamed.ids == engine.generate(prompts[:1], **options)[0]
    assert rows_of(engine)["burst"] == {1, 4}


def test_the_rest_of_a_work_is_answered_as_in_the_whole(engine: Engine) -> None:
    """To the bit, if the run is told how many requests there were."""
    many = [Request(prompt(5 + number, number), 20, scored=True) for number in range(SLOTS + 2)]
    whole = dict(engine.run(many))
    rest = dict(engine.run(many[-1:], at_once=len(many)))
    assert rest == {0: whole[len(many) - 1]}


def test_a_finished_answers_slot_takes_the_next_prompt_at_once(engine: Engine) -> None:
    """One long answer and many short ones: while it goes on, the other slots are never empty."""
    many = [Request(prompt(5), 60), *(Request(prompt(5, number), 3) for number in range(1, 40))]
    running: list[int] = []
    told = list(engine.run(many, on_tokens=running.append))
    assert [number for number, _ in told][-1] != 0 or len(told) == 40
    assert sorted(number for number, _ in told) == list(range(40))
    # In three slots, 39 answers of 3 tokens are done before the long one has its 60 tokens.
    assert [number for number, _ in told].index(0) > 30
    assert sum(running) == 60 + 39 * 3


def test_a_batch_takes_requests_while_others_go_on(engine: Engine, alone: list[Result]) -> None:
    """Piece by piece, in bursts of any size, and with some that are taken back: answers stay the same, to the bit."""
    batch = engine.batch(ROOM)
    rows = [Row(number, request) for number, request in enumerate(REQUESTS)]
    waiting, dropped = list(rows), {2, 6}
    steps = itertools.cycle([1, 5, 16])
    while waiting or batch.running:
        if waiting and batch.room:
            row = waiting.pop(0)
            for pieces, _ in enumerate(batch.admitting([row])):
                batch.burst(steps=next(steps))
                if row.number == 6 and pieces == 0:
                    batch.take_back(row)
            assert (row.number == 6) == (not row.ids)
        if rows[2] in batch.running and len(rows[2].ids) > 4:
            batch.take_back(rows[2])
        batch.burst(steps=next(steps))
    assert [row.result() for row in rows if row.number not in dropped] == [
        result for number, result in enumerate(alone) if number not in dropped
    ]
    assert 4 < len(rows[2].ids) < len(alone[2].ids) and batch.room == engine.desk_rows


def test_log_probabilities_are_those_of_the_tokens(engine: Engine, split: Split, alone: list[Result]) -> None:
    model = split.merge()
    for request, result in ((REQUESTS[0], alone[0]), (REQUESTS[5], alone[5])):
        text = np.array([[*request.prompt, *result.ids]])
        positions = np.arange(text.shape[1])[None]
        logits = model.vocabulary.logits(model(text, positions, np.ones_like(text)))[0]
        exact = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        places = range(len(request.prompt) - 1, text.shape[1] - 1)
        np.testing.assert_allclose(result.logprobs, exact[places, result.ids], rtol=1e-4, atol=1e-4)
    assert results(engine, [replace(REQUESTS[0], scored=False)])[0].logprobs is None


# --- ends -----------------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_an_answer_also_across_tokens(engine: Engine) -> None:
    request = Request(prompt(7), 40)
    (whole,) = results(engine, [request])
    text = letters(whole.ids)
    assert whole.text is None and whole.finish_reason == "length" and whole.made == 40
    ends = [0, *np.cumsum([len(letters([token])) for token in whole.ids]).tolist()]
    # Three letters from the middle of the answer: they are in several tokens, and may begin within one.
    for at in (ends[20], ends[21] + 1):
        string = text[at : at + 3]
        first = text.index(string)
        (found,) = results(engine, [replace(request, stop_strings=["no such text", string])])
        assert (found.text, found.finish_reason) == (text[:first], "stop")
        kept = max(count for count, end in enumerate(ends) if end <= first)
        assert found.ids == whole.ids[:kept] and found.made < 40
    # Its slot is free then, though nobody waits for it; the next one gets it.
    told = [request, replace(request, stop_strings=[text[ends[3] : ends[3] + 2]])] * SLOTS
    assert [one.finish_reason for one in results(engine, told)] == ["length", "stop"] * SLOTS
    (unchanged,) = results(engine, [replace(request, stop_strings=["no such text"])])
    assert (unchanged.ids, unchanged.text, unchanged.finish_reason) == (whole.ids, text, "length")


def test_the_reason_says_how_an_answer_ended(engine: Engine) -> None:
    (whole,) = results(engine, [Request(prompt(7), 40, scored=True)])
    end = next(at for at in range(5, 40) if whole.ids[at] not in whole.ids[:at])
    for room, reason in ((40, "stop"), (end + 1, "stop"), (end, "length")):
        (found,) = results(engine, [Request(prompt(7), room, [whole.ids[end]], scored=True)])
        assert found.finish_reason == reason and found.ids == whole.ids[:end]
        assert found.made == end + (reason == "stop") and found.logprobs == (whole.logprobs or [])[:end]
    # More stop tokens than a slot usually has room for.
    others = [token for token in range(VOCAB, VOCAB + 30)]
    (found,) = results(engine, [Request(prompt(7), 40, [*others, whole.ids[end]])])
    assert found.ids == whole.ids[:end]


def test_a_request_is_checked_before_it_gets_a_slot(engine: Engine, split: Split) -> None:
    with pytest.raises(UserError, match="exceed the model's context of 512"):
        list(engine.run([Request(prompt(5), 3), Request(prompt(500), 13)]))
    with pytest.raises(ValueError, match="longer than was announced"):
        list(Engine(split, CONFIG, batch_size=1).run(iter([Request(prompt(120), 20)]), longest=100))
    with pytest.raises(ValueError, match="stop string"):
        list(Engine(split, CONFIG, batch_size=1).run([Request(prompt(5), 3, stop_strings=["a"])]))
    assert list(engine.run([])) == []


# --- what is shared, and what is compiled ---------------------------------------------------------------------------


@pytest.fixture
def pieces(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the pieces that are read."""
    seen: list[int] = []
    read: Callable[..., None] = Device._read

    def counted(self: Device, tokens: np.ndarray, *given: Any) -> None:
        seen.append(tokens.shape[1])
        read(self, tokens, *given)

    monkeypatch.setattr(Device, "_read", counted)
    return seen


def test_a_prefix_that_prompts_share_is_read_once(engine: Engine, pieces: list[int]) -> None:
    shared = prompt(PIECES[-1] + 7, 99)
    requests = [Request([*shared, *prompt(5 + number, number)], 12, scored=True) for number in range(6)]
    together = results(engine, requests)
    assert pieces == [PIECES[-1], *[PIECES[0]] * 6]
    del pieces[:]
    assert [results(engine, [request])[0] for request in requests] == together
    assert pieces == [PIECES[-1], PIECES[0]] * 6


def test_the_next_turn_of_a_conversation_is_read_from_where_the_last_one_ended(split: Split, pieces: list[int]) -> None:
    engine = Engine(split, CONFIG, batch_size=1, cache_size=ROOM)
    first = prompt(PIECES[-1] + 3)
    *_, answer = engine.stream(first, max_new_tokens=20, stop=[])
    longer = [*first, *answer.ids, *prompt(4, 5)]
    *_, found = engine.stream(longer, max_new_tokens=20, stop=[])
    assert pieces == [PIECES[-1], PIECES[0], PIECES[0]]
    assert engine.generate([longer], max_new_tokens=20, stop=[]) == [found.ids]
    # A stream that nobody reads to its end leaves the engine as it was.
    next(engine.stream(longer, max_new_tokens=40, stop=[]))
    assert list(engine.stream(longer, max_new_tokens=20, stop=[]))[-1] == found
    # The original model has keys of its own.
    assert engine.generate([longer], max_new_tokens=20, stop=[], mode=ORIGINAL) == [found.ids]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled, or taken from the cache of compiled programs, meanwhile."""
    names: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "ompiling" in record.getMessage():
                names.append(record.getMessage()[:80])

    listener, logger = Listener(), logging.getLogger("jax")
    logger.addHandler(listener)
    try:
        with jax.log_compiles(True):
            yield names
    finally:
        logger.removeHandler(listener)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nothing_compiles_after_warm_up(split: Split, batch_size: int) -> None:
    # Shapes that no other test compiles.
    config = replace(CONFIG, max_position_embeddings=500 + batch_size)
    own = assemble(config, split.frozen)
    engine = Engine(own, config, batch_size=batch_size)
    sizes = {1, 2, batch_size} if batch_size > 1 else {1}
    with compilations() as names:
        for at_once in sizes:
            engine.warm_up(ROOM, mode=WHOLE, at_once=at_once)
    assert names, "compilations are seen"
    programs = set(engine.programs)
    assert len(programs) == len(PIECES) + 2 * len(sizes) and rows_of(engine)["burst"] == sizes
    with compilations() as names:
        for requests in (REQUESTS, REQUESTS[:1], [replace(one, stop=[1, 2, 3], scored=False) for one in REQUESTS]):
            results(engine, requests)
        list(engine.run(iter(REQUESTS), longest=ROOM))
        engine.warm_up(ROOM)
        engine.generate([prompt(3), prompt(200)], max_new_tokens=9, stop=[4])
        list(engine.stream(prompt(99), max_new_tokens=33, stop=[]))
    assert not names and engine.programs == programs


def test_a_cache_is_written_where_it_is(split: Split) -> None:
    """A copy of a cache for each token would cost more than the token."""
    rows, size = 3, 2 * CHUNK
    given = {"structure": split.structure, "size": size}
    desk = empty_desk(split.trainable, split.frozen, rows=rows, **given)
    slots = empty_slots(split.trainable, split.frozen, mode=WHOLE, rows=rows, stops=2, **given)
    zeros, flags = np.zeros(rows, np.int32), (np.ones(rows, bool), np.bool_(True), np.int32(3))
    layers = unstacked(split.merge())
    entry = Entry(zeros, zeros, zeros, slots.stops, slots.seen, slots.draw)  # type: ignore[arg-type]
    options: Any = {"structure": split.structure, "mode": WHOLE}
    lowered = {
        "a piece": read_piece.lower(
            split.trainable, split.frozen, desk, np.zeros((rows, 32), np.int32), zeros, zeros, zeros, **options
        ),
        "an admission": admit.lower(split.trainable, split.frozen, slots, desk, entry, **options),
        "a burst": burst.lower(split.trainable, split.frozen, layers, slots, *flags, **options),
        "a burst, layers in a loop": burst.lower(split.trainable, split.frozen, (), slots, *flags, **options),
    }
    shape = ",".join(map(str, desk.cache.k.shape))
    for name, program in lowered.items():
        text = program.compile().as_text()
        assert f"f32[{shape}]" in text and not re.findall(rf"= f32\[{shape}\]\S* copy\(.*", text), name
