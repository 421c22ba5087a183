"""Generation: batches give what one prompt at a time gives; chains are mended once; translators."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights, tiny_config
from scripted import MARKERS, WHOLE_CHAIN, Script, asked, chain_tokenizer, chat_of

from transllm_jax.errors import UserError
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.generation.answer import Answer
from transllm_jax.generation.chain import remembered
from transllm_jax.generation.engine import BURST, ORIGINAL, PIECES, WHOLE, Engine, Mode
from transllm_jax.generation.sampling import Sampling
from transllm_jax.generation.translate import FileTranslator, ModelTranslator
from transllm_jax.model.cache import CHUNK, decode, empty_cache, read, unstacked
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import BASE_ROWS, Split, abstract, assemble, load_frozen, merge
from transllm_jax.tokenizer.chain import Chain
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer

VOCAB, NEW, ROOM = 61, 20, 20
# No token has these ids: nothing stops before its time. Three, as in all tests: another number is another program.
NEVER = [VOCAB + NEW, VOCAB + NEW + 1, VOCAB + NEW + 2]
CONFIG = tiny_config(VOCAB, tied=False)


@pytest.fixture(scope="module")
def base() -> Split:
    return assemble(CONFIG, load_frozen(CONFIG, random_weights(CONFIG)))


@pytest.fixture(scope="module")
def trained(base: Split) -> Split:
    """The same frozen weights with adapters and new rows that make a difference."""
    lora = LoraConfig(rank=3, alpha=6.0)
    rng = np.random.default_rng(4)
    shapes = abstract(CONFIG, lora, NEW).trainable
    trainable = {
        path: (0.1 if path.startswith("vocabulary") else 0.2) * rng.standard_normal(leaf.shape, dtype=np.float32)
        for path, leaf in sorted(shapes.items())
    }
    return assemble(CONFIG, base.frozen, lora=lora, trainable=trainable)


def some_prompts(lengths: Sequence[int], vocab_size: int = VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


# More prompts than a batch holds, the last batch not full, not in the order of their lengths, and two widths.
PROMPTS = some_prompts([9, 1, PIECES[0] + 2, 5, 3])
BATCH = 2
# Those of one width, for what needs no second one.
SHORT = [row for row, prompt in enumerate(PROMPTS) if len(prompt) <= PIECES[0]]


@partial(jax.jit, static_argnames=("structure", "mode"))
def _all_logits(trainable: Any, frozen: Any, tokens: jax.Array, *, structure: Any, mode: Mode) -> jax.Array:
    model = merge(structure, trainable, frozen)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(tokens, positions, jnp.ones_like(tokens), adapters=mode.adapters)
    return model.vocabulary.logits(hidden, base_only=mode.base_only, adapters=mode.adapters)


def slow_greedy(split: Split, prompts: Sequence[Sequence[int]], count: int, mode: Mode = WHOLE) -> list[list[int]]:
    """The definition: at each token the whole text so far is read anew. What follows in a row is not seen."""
    tokens = np.zeros((len(PROMPTS), 2 * PIECES[0]), np.int32)  # one shape for all callers
    ends = np.array([len(prompt) for prompt in prompts])
    rows = np.arange(len(prompts))
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    for _ in range(count):
        scores = _all_logits(split.trainable, split.frozen, jnp.asarray(tokens), structure=split.structure, mode=mode)
        tokens[rows, ends] = np.asarray(scores)[rows, ends - 1].argmax(axis=-1)
        ends += 1
    return [tokens[row, end - count : end].tolist() for row, end in zip(rows, ends, strict=True)]


@pytest.fixture(scope="module")
def unstopped(trained: Split) -> list[list[int]]:
    """What the trained model says to PROMPTS, by the slow reference, without a stop token."""
    return slow_greedy(trained, PROMPTS, ROOM)


@pytest.fixture(scope="module")
def engine(trained: Split) -> Engine:
    return Engine(trained, CONFIG, batch_size=BATCH)


# --- greedy ---------------------------------------------------------------------------------------------------------


def test_a_batch_gives_what_rereading_the_whole_text_at_each_token_gives(
    engine: Engine, unstopped: list[list[int]]
) -> None:
    assert ROOM > BURST and len(PROMPTS) > 2 * BATCH
    assert sum(len(set(answer)) > 5 for answer in unstopped) > 3, "the model does not just repeat itself"
    assert max(chain(*unstopped)) >= VOCAB > min(chain(*unstopped)), "new ids are chosen, and read again"
    told: list[int] = []
    answers = engine.generate(PROMPTS, max_new_tokens=ROOM, stop=NEVER, on_tokens=told.append)
    assert answers == unstopped
    assert sum(told) == len(PROMPTS) * ROOM and len(told) > len(PROMPTS) / BATCH


def test_an_answer_ends_before_its_first_stop_token(engine: Engine, unstopped: list[list[int]]) -> None:
    def ends_with(stop: Sequence[int]) -> list[int]:
        return [next((at for at, token in enumerate(answer) if token in stop), ROOM) for answer in unstopped]

    def tells_apart(ends: list[int]) -> bool:
        """One row is done at once, one in the first burst, one in the second."""
        return 0 in ends and any(0 < end < BURST for end in ends) and any(BURST < end < ROOM for end in ends)

    stop = next(stop for stop in combinations({*chain(*unstopped)}, 3) if tells_apart(ends_with(stop)))
    ends = ends_with(stop)
    answers = engine.generate(PROMPTS, max_new_tokens=ROOM, stop=stop)
    assert answers == [answer[:end] for answer, end in zip(unstopped, ends, strict=True)]


def test_nothing_is_computed_past_the_last_stop_token(engine: Engine, unstopped: list[list[int]]) -> None:
    for at in (0, 3):
        stop = [*NEVER[1:], unstopped[0][at]]
        end = unstopped[0].index(stop[-1])
        told: list[int] = []
        answers = engine.generate([PROMPTS[0]] * BATCH, max_new_tokens=ROOM, stop=stop, on_tokens=told.append)
        assert answers == [unstopped[0][:end]] * BATCH and sum(told) == BATCH * (end + 1)


def test_an_end_in_the_last_place_is_an_end(engine: Engine, unstopped: list[list[int]]) -> None:
    """An answer is shorter than max_new_tokens exactly where the model ended it: stage `recover` goes by that."""
    answer = unstopped[0]
    end = next(at for at in range(1, ROOM) if answer[at] not in answer[:at])
    for room, length in ((end + 1, end), (end, end), (end + 2, end)):
        stop = [answer[end], *NEVER]
        (found,) = engine.generate([PROMPTS[0]], max_new_tokens=room, stop=stop)
        assert found == answer[:length] and (len(found) < room) == (room > end)


def test_work_ends_between_two_batches(engine: Engine) -> None:
    told: list[int] = []

    def between() -> None:
        if len(told) == 2:
            raise KeyboardInterrupt
        told.append(1)

    assert len(engine.generate(PROMPTS[:BATCH], max_new_tokens=1, stop=NEVER, between=between)) == BATCH
    assert not told
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS * 2, max_new_tokens=1, stop=NEVER, between=between)


def test_the_number_of_new_tokens_is_kept(engine: Engine, unstopped: list[list[int]]) -> None:
    answers = engine.generate(PROMPTS[3:], max_new_tokens=1, stop=NEVER)
    assert answers == [answer[:1] for answer in unstopped[3:]]


def test_a_stream_grows_to_what_generate_gives(engine: Engine, unstopped: list[list[int]]) -> None:
    steps = [step.ids for step in engine.stream(PROMPTS[0], max_new_tokens=ROOM, stop=NEVER)]
    assert [len(step) for step in steps] == [1, 1 + BURST, ROOM]
    assert all(steps[-1][: len(step)] == step for step in steps)
    assert steps[-1] == unstopped[0]
    stop = unstopped[0][6]
    *_, last = engine.stream(PROMPTS[0], max_new_tokens=ROOM, stop=[stop, *NEVER[1:]])
    assert last == (unstopped[0][: unstopped[0].index(stop)], stop)


def test_the_original_mode_is_the_base_model(base: Split, engine: Engine, unstopped: list[list[int]]) -> None:
    prompts = [PROMPTS[row] for row in SHORT]
    answers = engine.generate(prompts, max_new_tokens=ROOM, stop=NEVER, mode=ORIGINAL)
    assert answers == slow_greedy(base, prompts, ROOM)
    assert max(chain(*answers)) < VOCAB
    assert all(mine != unstopped[row] for mine, row in zip(answers, SHORT, strict=True))


@pytest.fixture(scope="module")
def retrained(base: Split, trained: Split) -> Split:
    """The trained model with base rows that are far from the frozen ones."""
    rng = np.random.default_rng(6)
    shape = base.frozen["vocabulary.base"].shape
    rows = {path: 0.1 * rng.standard_normal(shape, dtype=np.float32) for path in BASE_ROWS}
    trainable = {path: np.asarray(values) for path, values in trained.trainable.items()}
    return assemble(CONFIG, base.frozen, lora=LoraConfig(rank=3, alpha=6.0), trainable=trainable | rows)


def test_trained_base_rows_speak_and_the_original_does_not_hear_them(
    base: Split, retrained: Split, unstopped: list[list[int]]
) -> None:
    prompts = [PROMPTS[row] for row in SHORT]
    engine = Engine(retrained, CONFIG, batch_size=BATCH)
    answers = engine.generate(prompts, max_new_tokens=ROOM, stop=NEVER)
    assert answers == slow_greedy(retrained, prompts, ROOM)
    assert all(mine != unstopped[row] for mine, row in zip(answers, SHORT, strict=True))
    original = engine.generate(prompts, max_new_tokens=ROOM, stop=NEVER, mode=ORIGINAL)
    assert original == slow_greedy(base, prompts, ROOM)


def test_the_logits_of_the_original_mode_are_bit_for_bit_the_base_models(base: Split, retrained: Split) -> None:
    """Prefill and one token after it, on a text of base ids."""

    @partial(jax.jit, static_argnames=("structure", "mode"))
    def scores(trainable: Any, frozen: Any, *, structure: Any, mode: Mode) -> tuple[jax.Array, jax.Array]:
        model = merge(structure, trainable, frozen)
        tokens = jnp.asarray([PROMPTS[0]])
        cache, start = empty_cache(model, 1, CHUNK), jnp.zeros(1, jnp.int32)
        first, cache = read(model, cache, tokens[:, :-1], start, start + 8, start + 8, adapters=mode.adapters)
        given = cache, tokens[:, -1], start + 8, jnp.ones(1, bool)
        second, _ = decode(model, unstacked(model), *given, adapters=mode.adapters)
        first, second = (
            model.vocabulary.logits(hidden, base_only=mode.base_only, adapters=mode.adapters)
            for hidden in (first, second)
        )
        return first, second

    wanted = scores(base.trainable, base.frozen, structure=base.structure, mode=WHOLE)
    original = scores(retrained.trainable, retrained.frozen, structure=retrained.structure, mode=ORIGINAL)
    whole = scores(retrained.trainable, retrained.frozen, structure=retrained.structure, mode=WHOLE)
    for right, left, moved in zip(wanted, original, whole, strict=True):
        assert np.array_equal(left, right) and np.abs(moved[:, :VOCAB] - right).max() > 0.1


def test_a_model_is_its_own_teacher_whatever_was_trained(base: Split, retrained: Split) -> None:
    answers = [(prompt, prompt[::-1]) for prompt in some_prompts([9, 4, 6])]
    own, other = (Teacher(split, answers, batch_size=2) for split in (retrained, base))
    assert np.array_equal(own.states, other.states)
    distance = own.divergence(retrained)
    # Two programs: their sums may be taken in another order.
    assert distance > 0.1 and math.isclose(distance, other.divergence(retrained), rel_tol=1e-5)
    assert own.divergence(base) == 0


def test_a_prompt_without_room_is_refused(engine: Engine) -> None:
    limit = CONFIG.max_position_embeddings
    with pytest.raises(UserError, match=f"prompt of {limit - 9} tokens and 10 new ones .* context of {limit}"):
        engine.generate([[1], [1] * (limit - 9)], max_new_tokens=10, stop=NEVER)
    with pytest.raises(UserError, match="empty prompt"):
        engine.generate([[1], []], max_new_tokens=10, stop=NEVER)
    with pytest.raises(UserError, match=f"context of {limit}"):
        next(engine.stream([1] * limit, max_new_tokens=1, stop=NEVER))


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sampled_answers_do_not_depend_on_the_batch(engine: Engine) -> None:
    mode = Mode(sampling=Sampling(1.0, top_p=0.9, seed=3))

    def answers(prompts: list[list[int]]) -> list[list[int]]:
        return engine.generate(prompts, max_new_tokens=ROOM, stop=NEVER, mode=mode)

    prompts = [PROMPTS[row] for row in SHORT]
    first = answers(prompts)
    assert answers(prompts) == first
    # A prompt keeps its number; it stands in another batch, at another place, beside another prompt.
    others = some_prompts([4, 2, 30, 8, 3])
    assert answers([prompts[0], *others])[0] == first[0]
    assert answers([others[0], prompts[1]])[1] == first[1]
    # Two prompts alike are two draws.
    twice = answers([prompts[0], prompts[0]])
    assert twice[0] == first[0] != twice[1]


# --- chains ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny tokenizer with the chain's markers as special tokens."""
    return chain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_chain_that_breaks_off_is_continued_once_with_the_missing_marker(tokenizer: Tokenizer) -> None:
    questions = [asked("อะไร"), asked("ใคร"), asked("ที่ไหน")]
    script = Script(tokenizer, WHOLE_CHAIN, "<EN>Who is it?<RESPONSE>A dog.", "<RESPONSE>Here.", "สวัสดี")
    told: list[int] = []
    answers = chat_of(script, mode=ORIGINAL).answers(questions, on_tokens=told.append)

    prompts = [encode_prompt(tokenizer, question) for question in questions]
    marker = tokenizer.token_id("<TH>")
    continued = [*prompts[1], *tokenizer.encode("<EN>Who is it?<RESPONSE>A dog."), marker]
    assert script.calls == [prompts, [continued]]
    for options in script.options:
        assert options == {"max_new_tokens": 30, "stop": end_ids(tokenizer), "mode": ORIGINAL}
    assert len(told) == 2
    assert answers == [
        Answer(WHOLE_CHAIN, Chain("What is it?", "A fox.", "สุนัข"), "สุนัข", False),
        Answer("<EN>Who is it?<RESPONSE>A dog.<TH>สวัสดี", Chain("Who is it?", "A dog.", "สวัสดี"), "สวัสดี", True),
        Answer("<RESPONSE>Here.", None, "Here.", False),
    ]


@pytest.mark.parametrize(
    "text", ["<RESPONSE>Here.", "<EN>a translation", "<TH>สวัสดี", "no marker at all", WHOLE_CHAIN, ""]
)
def test_what_is_no_broken_chain_is_left_as_it_is(tokenizer: Tokenizer, text: str) -> None:
    script = Script(tokenizer, text, text)
    (answer,) = chat_of(script).answers([asked("อะไร")])
    *_, streamed = chat_of(script).stream(asked("อะไร"))
    assert len(script.calls) == 2 and streamed == answer
    assert answer.raw == text and not answer.continued and (answer.chain is not None) == (text == WHOLE_CHAIN)


def test_there_is_no_second_continuation_and_none_without_fallback(tokenizer: Tokenizer) -> None:
    broken = "<EN>Who?<RESPONSE>A dog."
    script = Script(tokenizer, broken, "")
    (answer,) = chat_of(script).answers([asked("ใคร")])
    assert len(script.calls) == 2 and script.texts == []
    assert answer == Answer(broken + "<TH>", None, "", True)

    script = Script(tokenizer, broken)
    (answer,) = chat_of(script).answers([asked("ใคร")], fallback=False)
    assert len(script.calls) == 1 and answer == Answer(broken, None, "A dog.", False)


def test_a_streamed_answer_ends_as_a_batched_one(tokenizer: Tokenizer) -> None:
    texts = ("<EN>Who is it?<RESPONSE>A dog.", "สวัสดี")
    script = Script(tokenizer, *texts)
    steps = list(chat_of(script).stream(asked("ใคร")))
    batched = Script(tokenizer, *texts)
    assert [steps[-1]] == chat_of(batched).answers([asked("ใคร")])
    assert script.calls == batched.calls
    assert [step.continued for step in steps] == [False, False, True, True]
    assert all(len(one.raw) <= len(other.raw) for one, other in pairwise(steps))

    (*_, whole) = chat_of(Script(tokenizer, WHOLE_CHAIN)).stream(asked("อะไร"))
    assert whole.visible == "สุนัข" and not whole.continued


def test_a_turn_is_remembered_in_english(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, WHOLE_CHAIN, "<TH>สวัสดี", "<RESPONSE>Yes.")
    chat = chat_of(script)
    history: list[Message] = []
    for question in ("อะไร", "แปล: hello", "Really?"):
        (answer,) = chat.answers([[*history, *asked(question)]])
        history += remembered(question, answer, tokenizer)
    assert history == [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A fox."},
        {"role": "user", "content": "แปล: hello"},
        {"role": "assistant", "content": "สวัสดี"},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes."},
    ]
    seen = tokenizer.decode(script.calls[2][0])
    assert "A fox." in seen and "Really?" in seen and "สุนัข" not in seen and "อะไร" not in seen


# --- translators ----------------------------------------------------------------------------------------------------


def jsonl(path: Path, *rows: tuple[str, str]) -> str:
    lines = [json.dumps({"en": english, "th": target}, ensure_ascii=False) for english, target in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_file_translates_what_it_has(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", ("a fox", "จิ้งจอก"), (" a dog ", "สุนัข"), ("a fox", "จิ้งจอก"))
    translator = FileTranslator(path, ("en", "th"))
    assert translator.translate(["a dog", "\na fox ", "a cat", "สุนัข"]) == ["สุนัข", "จิ้งจอก", None, None]


def test_a_file_with_two_translations_of_a_text_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", ("a fox", "จิ้งจอก"), ("a fox", "สุนัข"))
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: 'a fox' has another translation"):
        FileTranslator(path, ("en", "th"))
    with pytest.raises(UserError, match="no field 'source'"):
        FileTranslator(path)


@pytest.mark.parametrize(
    ("direction", "first", "second"), [("to_target", "<EN>", "<TH>"), ("to_english", "<TH>", "<EN>")]
)
def test_the_model_translates_after_the_markers(tokenizer: Tokenizer, direction: Any, first: str, second: str) -> None:
    script = Script(tokenizer, " a fox ", " ")
    engine: Any = script
    told: list[int] = []
    translator = ModelTranslator(engine, tokenizer, MARKERS, max_new_tokens=12, on_tokens=told.append)
    assert translator.translate(["จิ้งจอก ", "สุนัข"], direction) == ["a fox", None]
    assert [tokenizer.decode(prompt) for prompt in script.calls[0]] == [
        f"{first}จิ้งจอก{second}",
        f"{first}สุนัข{second}",
    ]
    (options,) = script.options
    ends = ["<|endoftext|>", "<|im_end|>", "<EN>", "<TH>", "<RESPONSE>"]
    assert sorted(options["stop"]) == sorted(tokenizer.token_id(end) for end in ends)
    assert options["max_new_tokens"] == 12 and told
    assert translator.translate([], direction) == [] and len(script.calls) == 1
