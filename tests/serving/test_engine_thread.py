"""The engine's thread with a real, tiny model: answers are those of the engine alone, whoever asks beside them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from conftest import random_weights, tiny_config
from scripted import MARKERS, chain_tokenizer
from serving_setup import chat, events, listening, streamed

from transllm_jax.generation.engine import ORIGINAL, WHOLE, Engine, Request
from transllm_jax.generation.sampling import Sampling
from transllm_jax.model.parameters import assemble, load_frozen
from transllm_jax.serving.engine_thread import EngineThread, Lane
from transllm_jax.serving.served import EngineFailed, Served
from transllm_jax.tokenizer.tokenizer import Tokenizer

SLOTS, LONGEST = 2, 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> Iterator[list[Served]]:
    """A model and its original, which share an engine."""
    config = tiny_config(tokenizer.vocab_size)
    split = assemble(config, load_frozen(config, random_weights(config)))
    engine = Engine(split, config, batch_size=SLOTS)
    lanes = [Lane(engine, mode, LONGEST, 8) for mode in (WHOLE, ORIGINAL)]
    thread = EngineThread(lanes)
    thread.start()
    yield [
        Served("tiny", thread, lanes[0], tokenizer, MARKERS),
        Served("tiny-original", thread, lanes[1], tokenizer, None),
    ]
    thread.close()
    assert not thread.alive and not any(lane.busy for lane in lanes)


def requests(count: int, tokenizer: Tokenizer) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            rng.integers(0, tokenizer.vocab_size, length).tolist(),
            6 + number,
            sampling=Sampling(0.9, seed=number) if number % 2 else Sampling(),
        )
        for number, length in enumerate(rng.integers(1, 200, count))
    ]


async def answer(model: Served, request: Request) -> list[int]:
    async with aclosing(model.generate(request)) as progress:
        return [token async for told in progress for token in told.ids]


def test_answers_of_many_at_once_are_those_of_each_alone(models: list[Served], tokenizer: Tokenizer) -> None:
    asked = requests(7, tokenizer)
    engine = models[0].lane.engine
    programs = set(engine.programs)

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(answer(model, request) for request in asked for model in models))

    found = asyncio.run(together())
    assert engine.programs == programs, "nothing is compiled after the start"
    alone = Engine(engine.split, engine.config, batch_size=SLOTS, cache_size=LONGEST)
    wanted = dict(alone.run(asked, at_once=SLOTS))
    # Without adapters the original is the model itself.
    assert found[::2] == found[1::2] == [wanted[number].ids for number in range(len(asked))]


def test_a_client_that_goes_away_frees_its_slot(models: list[Served], tokenizer: Tokenizer) -> None:
    model = models[0]
    long = Request([5] * 20, 200)
    short = Request([7] * 20, 4)

    async def leave() -> list[int]:
        async def begin() -> None:
            async with aclosing(model.generate(long)) as progress:
                async for _ in progress:
                    return

        # As many as there are slots are given up after their first tokens, others while they wait or are read.
        await asyncio.gather(*(begin() for _ in range(SLOTS)))
        tasks = [asyncio.ensure_future(answer(model, long)) for _ in range(3 * SLOTS)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return await answer(model, short)

    assert len(asyncio.run(leave())) == 4
    # What was given up last is noticed in the next round.
    end = time.monotonic() + 60
    while model.lane.busy and time.monotonic() < end:
        time.sleep(0.01)
    assert model.lane.running == model.lane.waiting == 0


def test_a_round_that_fails_ends_its_answers_and_the_next_one_is_answered(
    models: list[Served], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, request, said = models[0], Request([5] * 20, 8), "a word of a user"
    wanted = asyncio.run(answer(model, request))

    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError(said)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.lane.open()), "burst", fail)
        with pytest.raises(EngineFailed):
            asyncio.run(answer(model, request))
    assert model.thread.failures == 1 and model.thread.alive
    printed = "".join(capfd.readouterr())
    assert "RuntimeError" in printed and said not in printed
    assert asyncio.run(answer(model, request)) == wanted


def test_a_request_that_does_not_fit_is_not_taken(models: list[Served]) -> None:
    with pytest.raises(ValueError, match="longer than the 256 tokens"):
        asyncio.run(answer(models[0], Request([5] * 250, 20)))


def test_a_conversation_with_a_real_engine(models: list[Served]) -> None:
    """A random model writes no chain, but what is streamed is what is not, and the original answers as it does."""
    with listening(models) as address:
        for name in ("tiny", "tiny-original"):
            options: dict[str, Any] = {"model": name, "max_tokens": 40, "temperature": 1.0, "seed": 3}
            whole = chat(address, "Who?", **options).json()
            chunks = events(chat(address, "Who?", **options, stream=True).text)
            message = whole["choices"][0]["message"]
            for field in ("content", "reasoning"):
                assert streamed(chunks, field) == message.get(field, "")
            assert whole["usage"]["completion_tokens"] <= 40 and message["content"]
        # Several at once, each with its own answer.
        found: dict[int, str] = {}

        def ask(seed: int) -> None:
            reply = chat(address, "Who?", max_tokens=20, temperature=1.0, seed=seed).json()
            found[seed] = reply["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2, 3, 4, 5, 1)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert len(found) == 5 and len(set(found.values())) > 1
        again = chat(address, "Who?", max_tokens=20, temperature=1.0, seed=2).json()
        assert again["choices"][0]["message"]["content"] == found[2]
