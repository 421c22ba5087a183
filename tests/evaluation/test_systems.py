"""What is evaluated: files of answers in the forms that tools write, bridges, servers; and when two systems are one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_run
from openai_server import openai_server

from transllm_jax.commands.open_systems import Systems
from transllm_jax.config import Endpoint, TranslatorEndpoint
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.suite_run import SuiteOptions
from transllm_jax.evaluation.systems.answers_file import AnswersFile
from transllm_jax.evaluation.systems.bridge import Bridge, EndpointTranslator
from transllm_jax.evaluation.systems.endpoint import EndpointSystem
from transllm_jax.evaluation.systems.named import Named
from transllm_jax.evaluation.systems.system import Asked, System, Turn
from transllm_jax.generation.sampling import Sampling
from transllm_jax.generation.translate import Direction

LANGUAGES = (("Thai", 64), ("Khmer", 64), ("Thai", 32))


def answered(system: System, *asked: Asked) -> dict[str, list[Turn]]:
    return {one.id: turns for one, turns in system.answers(asked)}


# --- files of answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"id": 81, "answers": ["one", "two"]},
        {"question_id": 81, "choices": [{"index": 0, "turns": ["one", "two"]}]},  # FastChat
        {"id": "81", "turns": [Turn([], "<EN>..", "one").recorded(), Turn([], "..", "two").recorded()]},  # our suites
        {"question": " Who? ", "answer": ["one", "two"]},
        # Of our suites, with what is accepted; and with the id of a question whose text is a part of what is asked.
        {"id": "81", "question": "Who?", "answers": ["gold"], "visible": Turn([], "..", "one").recorded()},
        {"id": "81", "instruction": "Wh", "output": ["one", "two"]},
    ],
)
def test_a_file_of_answers_in_the_forms_that_tools_write(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (turns,) = answered(AnswersFile("a", path), Asked("81", ("Who?", "Why?"))).values()
    given = ["one", "two"] if "visible" not in row else ["one"]
    assert [turn.visible for turn in turns if not turn.error] == given


def test_what_generate_writes_is_the_text_and_not_what_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    kept = {"instruction": "Who?", "answers": ["Lima"], "answer": "Lima"}
    path.write_text(json.dumps({**kept, "text": "It is Quito.", "finish_reason": "stop"}) + "\n")
    (turns,) = answered(AnswersFile("a", path), Asked("1", ("Who?",))).values()
    assert turns[0].visible == "It is Quito."
    path.write_text(json.dumps({**kept, "output": "It is Quito."}) + "\n")
    with pytest.raises(UserError, match="has answers and answer and output, each of which could be"):
        AnswersFile("a", path)


def test_a_file_that_answers_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "q1", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"answers none of the 2 questions: it has q1, and asked are 1, 2 \('Who"):
        answered(AnswersFile("a", path), Asked("1", ("Who?",)), Asked("2", ("Where?",)))


def test_ids_that_are_those_of_other_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": number, "question": f"Question {number}?", "answer": f"to {number}"} for number in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [Asked(str(number + 1), (f"Question {number}?",)) for number in range(3)]
    with pytest.raises(UserError, match=r"a.jsonl:2: question 1 is 'Question 0\?', and here 'Question 1\?'; correct"):
        answered(AnswersFile("a", path), *asked)
    path.write_text("".join(json.dumps({**row, "id": f"x{row['id']}"}) + "\n" for row in rows))
    assert [turns[0].visible for turns in answered(AnswersFile("a", path), *asked).values()] == ["to 0", "to 1", "to 2"]


def test_alpaca_evals_list_is_found_by_the_instruction(tmp_path: Path) -> None:
    path = tmp_path / "outputs.json"
    path.write_text(json.dumps([{"instruction": "Who?", "output": "A dog.", "generator": "x"}]))
    system = AnswersFile("a", path)
    found = answered(system, Asked("1", ("Who?",)), Asked("2", ("Where?",)))
    assert found["1"][0].visible == "A dog." and found["2"][0].visible == ""
    assert found["2"][0].error == f"{path} has no answer to turn 1 of question 2"
    path.write_text(path.read_text().replace("dog", "cat"))
    assert AnswersFile("a", path).identity != system.identity


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", r":2 is not JSON"),
        ("[1]", r":2 is no JSON object"),
        ('{"id": 2}', r":2 has no answer; put it into the field answer"),
        ('{"answer": "x"}', r":2 names no question"),
        ('{"id": 2, "answer": [3]}', r":2: an answer is a int"),
        ('{"id": 1, "answer": "x"}', r":2: another row above has the id 1"),
        (
            '{"question": "Q?", "answer": "y"}\n{"question": " Q?", "answer": "z"}',
            r":3: another row above has the same",
        ),
        ('{"id": 2, "answer": "\\ud83d"}', r":2 has half of a surrogate pair"),
        (
            '{"id": 2, "turns": [{"visible": "x", "prompt": [], "raw": "", "chain": {"answer": "x"}}]}',
            r":2: chain lacks",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "answer": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match=problem):
        AnswersFile("a", path)


# --- bridges --------------------------------------------------------------------------------------------------------


class Echo:
    """Answers "answer to QUESTION (turns before)"; keeps what it was asked."""

    name, identity = "echo", {"kind": "echo"}

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def answers(
        self, asked: Sequence[Asked], between: Callable[[], None] = lambda: None, *, at_once: int | None = None
    ) -> Iterator[tuple[Asked, list[Turn]]]:
        self.asked += asked
        # Not in the order of the questions: answers come as they are done.
        for one in reversed(asked):
            text = f"answer to {one.turns[0]} ({len(one.history) // 2})" if one.turns[0] != "silence" else ""
            yield one, [Turn([], text, text)]


class Words:
    """Translates by marking: to English `en(x)`, back `th(x)`; None for `?`."""

    identity: Mapping[str, Any] = {"kind": "words"}

    def translate(self, texts: Sequence[str], direction: Direction, between: Callable[[], None]) -> list[str | None]:
        mark = "en" if direction == "to_english" else "th"
        return [None if text == "?" else text if text == "silence" else f"{mark}({text})" for text in texts]


def test_a_bridge_translates_there_and_back_and_remembers_in_english() -> None:
    echo = Echo()
    bridge = Bridge("bridge", echo, Words())
    found = answered(
        bridge,
        Asked("1", ("a", "b")),
        Asked("2", ("?", "c")),
        Asked("3", ("silence",)),
        Asked("4", ("d",), "english"),
        Asked("5", ("Translate: e",), translate=("to_target", "e")),
    )
    first, second = found["1"]
    assert first.visible == "th(answer to en(a) (0))" and second.visible == "th(answer to en(b) (1))"
    assert second.chain == {
        "question_en": "en(b)",
        "answer_en": "answer to en(b) (1)",
        "answer": "th(answer to en(b) (1))",
    }
    (asked,) = (one for one in echo.asked if one.turns == ("en(b)",))
    assert [message["content"] for message in asked.history] == ["en(a)", "answer to en(a) (0)"]
    assert [turn.error for turn in found["2"]] == [
        "the question has no translation into English",
        "a turn before it has no answer",
    ]
    assert found["3"][0].visible == "" and found["3"][0].chain is None and found["3"][0].error is None
    # A question in English goes straight to it, and a translation to the translator.
    assert found["4"][0].visible == "answer to d (0)" and found["5"][0].visible == "th(e)"


def test_the_language_that_a_server_translates_into_is_part_of_the_identity() -> None:
    settings = TranslatorEndpoint(endpoint="http://localhost:1/v1", model="m", prompt="Into {language}: {text}")
    into = [EndpointTranslator(settings, language, limit, print).identity for language, limit in LANGUAGES]
    assert len({json.dumps(one) for one in into}) == len(LANGUAGES)


# --- servers --------------------------------------------------------------------------------------------------------


def test_a_server_gets_the_history_and_each_turn_a_seed_of_its_own() -> None:
    with openai_server() as server:
        settings = Endpoint(endpoint=server.url, model="m", refused="drop")
        system = EndpointSystem("m", settings, print)
        asked = Asked("1", ("a", "b"), max_new_tokens=7, sampling=Sampling(0.7, 0.9, seed=2**40 + 5))
        found = answered(system, asked)
        assert [turn.visible for turn in found["1"]] == ["to a", "to b"]
        first, second = server.bodies
        assert [message["content"] for message in second["messages"]] == ["a", "to a", "b"]
        assert first["temperature"] == 0.7 and first["top_p"] == 0.9 and first["max_tokens"] == 7
        assert first["seed"] == 5 and 0 <= second["seed"] < 2**31 and second["seed"] != 5
        # A chain that is served as text is read as one; reasoning that does not end leaves no answer.
        server.answer = lambda body: ("<EN>Who?<RESPONSE>A dog.<TH>หมา", "stop")
        (turn,) = answered(system, Asked("2", ("ใคร",)))["2"]
        assert turn.visible == "หมา" and turn.chain is not None and turn.chain["answer_en"] == "A dog."
        server.answer = lambda body: ("<think>well, <EN>", "length")
        (turn,) = answered(system, Asked("3", ("ใคร",)))["3"]
        assert turn.visible == "" and turn.cut_off and turn.raw.startswith("<think>")


# --- our own models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systems() -> Systems:
    return Systems(print, SuiteOptions(), batch_size=2)


def test_the_identity_is_that_of_weights_adapter_and_template(
    finished_run: Path, tmp_path: Path, systems: Systems
) -> None:
    def identity(where: Path, part: str = "") -> str:
        # Opened anew: an opener keeps the runs that it has opened.
        return json.dumps(Systems(print, SuiteOptions()).model(Named("model", "x", str(where), part)).identity)

    points = {part: identity(finished_run, part) for part in ("", "original", "translate")}
    assert len(set(points.values())) == 3 and points[""] == identity(finished_run, "transfer")
    copy_run(finished_run, tmp_path / "copy", None)
    copied = tmp_path / "copy" / "run"
    assert identity(copied) == points[""], "where it is does not matter"
    template = copied / "vocabulary" / "chat_template.jinja"
    template.write_text("Hi\n" + template.read_text(encoding="utf-8"), encoding="utf-8")
    assert identity(copied) != points[""] and identity(copied, "original") == points["original"]
    model = tmp_path / "model"
    shutil.copytree(finished_run.parent / "model", model)
    before = identity(model)
    weights = next(model.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1
    weights.write_bytes(data)
    assert identity(model) != before


def test_a_question_without_room_is_a_turn_with_an_error(finished_run: Path, systems: Systems) -> None:
    system = systems.model(Named("model", "run", str(finished_run)))
    found = answered(
        system,
        Asked("long", ("word " * 600,), max_new_tokens=4),
        Asked("special", ("a <|im_start|> b",), max_new_tokens=4),
        Asked("right", ("Who?",), max_new_tokens=4),
    )
    assert "exceed the model's context of 512" in str(found["long"][0].error)
    assert "special token" in str(found["special"][0].error) and found["right"][0].error is None
