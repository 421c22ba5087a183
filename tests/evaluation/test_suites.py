"""`transllm evaluate`: what the suites find, by hand-computed cases; killed in the middle, they end the same."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLES, Command, call, copy_run
from openai_server import Fault, Server, completion, openai_server
from processes import wait_for

from transllm_jax.commands.contaminated import Contamination
from transllm_jax.commands.evaluate import Given, evaluate
from transllm_jax.commands.open_systems import Systems
from transllm_jax.data.read.shards import Reading
from transllm_jax.disk import read_json
from transllm_jax.errors import Preempted, UserError
from transllm_jax.evaluation.likelihood import bits_per_byte, document_nats
from transllm_jax.evaluation.suites import answers, perplexity, translation
from transllm_jax.evaluation.suites.measure import mean_of, ratio_of
from transllm_jax.evaluation.suites.suite_run import SuiteOptions, SuiteRun, read_items
from transllm_jax.evaluation.systems.named import Named, parse_system, parse_systems
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress

CAPITALS = ("ฝรั่งเศส ปารีส France Paris", "ไทย กรุงเทพ Thailand Bangkok", "ญี่ปุ่น โตเกียว Japan Tokyo")
QUESTIONS: list[dict[str, Any]] = [
    {
        "kind": "capital",
        "question": f"เมืองหลวงของประเทศ{country}คือเมืองอะไร",
        "answers": [city],
        "question_en": f"What is the capital of {country_en}?",
        "answers_en": [city_en],
    }
    for country, city, country_en, city_en in map(str.split, CAPITALS)
]
QUESTIONS.append({"kind": "sum", "question": "สองบวกสองเท่ากับเท่าไรในเลขฐานสิบ", "answers": ["สี่", "4"]})


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "questions.jsonl", QUESTIONS)


class Said:
    """A system that says what a test has written down."""

    name = "said"

    def __init__(self, said: dict[str, Turn]) -> None:
        self.said, self.identity, self.asked = said, {"said": sorted(said)}, 0

    def answers(
        self, asked: Sequence[Asked], between: Callable[[], None] = lambda: None, *, at_once: int | None = None
    ) -> Iterator[tuple[Asked, list[Turn]]]:
        for one in asked:
            between()
            self.asked += 1
            yield one, [self.said[one.id]]


def chain(question: str, english: str, target: str, *, cut_off: bool = False) -> Turn:
    parts = {"question_en": question, "answer_en": english, "answer": target}
    return Turn([], f"<EN>{question}<RESPONSE>{english}<TH>{target}", target, parts, "chain", cut_off)


CHAINS = {
    "1": chain("what is the capital of France", "Paris.", "ปารีส"),  # right
    "2": chain("What is the capital of Thailand?", "It is Bangkok.", "โตเกียว"),  # mistranslated
    "3": chain("What is the capital of Kenya?", "Nairobi.", "ไนโรบี"),  # misread
    "4": Turn([], "", "", error="no room"),
    "1/en": Turn([], "Paris", "Paris"),
    "2/en": Turn([], "Tokyo", "Tokyo"),
    "3/en": Turn([], "Tokyo", "Tokyo"),
}


def suite_of(system: Any, directory: Path, questions: Path, **more: Any) -> SuiteRun:
    return SuiteRun("answers", system, directory, SuiteOptions(questions), Progress(quiet=True), **more)


def test_answers_are_counted_by_hand(tmp_path: Path, questions: Path) -> None:
    found = answers.run(suite_of(Said(CHAINS), tmp_path / "out", questions))
    # One of four is right; the one without an answer counts as wrong, and could have been right.
    assert (found.score, found.asked, found.parsed, found.worst, found.best) == (0.25, 4, 3, 0.25, 0.5)
    assert found.more["right in English"]["value"] == 2 / 3 and found.more["right in English"]["samples"] == 3
    assert found.more["question understood"]["value"] == 2 / 3
    assert found.more["right in the chain's English"]["value"] == 2 / 3
    because = found.more["wrong because"]
    assert because == {"form": 1, "misread": 1, "english": 0, "translation": 1, "unknown": 0}
    # Wilson's interval for 1 of 4, computed by hand with z = 1.95996.
    assert found.interval == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert found.groups["capital"]["right"]["samples"] == 3 and found.groups["sum"]["right"]["value"] == 0
    items = read_items(tmp_path / "out")
    assert [item["id"] for item in items] == ["1", "2", "3", "4"]
    assert [item["reason"] for item in items] == [None, "translation", "misread", "form"]
    assert items[1]["raw"].startswith("<EN>") and items[1]["visible"] == "โตเกียว" and items[3]["error"] == "no room"
    assert read_json(tmp_path / "out" / "results.json") == json.loads(json.dumps(found.recorded()))


def test_a_stopped_suite_asks_each_question_once(tmp_path: Path, questions: Path) -> None:
    whole = Said(CHAINS)
    answers.run(suite_of(whole, tmp_path / "whole", questions))

    def stop(where: str) -> None:
        if "3 of 7" in where:
            raise Preempted(where)

    first, second = Said(CHAINS), Said(CHAINS)
    with pytest.raises(Preempted, match="answers of said: 3 of 7 questions"):
        answers.run(suite_of(first, tmp_path / "out", questions, stop=stop))
    answers.run(suite_of(second, tmp_path / "out", questions))
    assert (first.asked, second.asked, whole.asked) == (3, 4, 7)
    for name in ("items.jsonl", "results.json", "answers.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Nothing is asked again, and other questions are not mixed in.
    assert answers.run(suite_of(second, tmp_path / "out", questions)).asked == 4 and second.asked == 4
    write(questions, QUESTIONS[:3])
    with pytest.raises(UserError, match=r"answers.jsonl was made with other settings \(questions"):
        answers.run(suite_of(second, tmp_path / "out", questions))


def test_measures_are_means_and_ratios_and_their_differences() -> None:
    first = [{"id": str(n), "score": n % 2, "a": n, "b": 2} for n in range(1, 5)]
    second = [{"id": str(n), "score": 1, "a": 2 * n, "b": 2} for n in range(2, 6)]
    share, ratio = mean_of("score", percent=True), ratio_of("a per b", "a", "b")
    one = share.interval(first)
    assert one is not None and (one.value, one.samples) == (0.5, 4)
    # Over the ids 2, 3 and 4 alone: 0, 1, 0 against 1, 1, 1; and 9 / 6 against 18 / 6.
    difference, of_ratios = share.difference(first, second), ratio.difference(first, second)
    assert difference is not None and of_ratios is not None
    assert difference.value == pytest.approx(-2 / 3) and difference.samples == 3
    assert of_ratios.value == pytest.approx(-1.5) and of_ratios.low <= -1.5 <= of_ratios.high
    assert share.interval([{"id": "1", "score": None}]) is None and share.difference(first, [{"id": "9"}]) is None


# --- how a system is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("runs/demo", Named("model", "demo", "runs/demo")),
        ("runs/demo#original", Named("model", "demo-original", "runs/demo", "original")),
        ("runs/demo/export/", Named("model", "demo-export", "runs/demo/export/")),
        ("mine=runs/demo", Named("model", "mine", "runs/demo")),
        ("http://a:1/v1#Qwen/Q-1", Named("endpoint", "Q-1", "http://a:1/v1", "Qwen/Q-1")),
        ("answers:x/gpt.jsonl", Named("answers", "gpt", "x/gpt.jsonl")),
        ("bridge:runs/demo", Named("bridge", "bridge-demo", "runs/demo")),
    ],
)
def test_systems_are_read(given: str, found: Named) -> None:
    assert parse_system(given) == found


def test_what_is_no_system_is_refused() -> None:
    with pytest.raises(UserError, match="a server has many models"):
        parse_system("http://a:1/v1")
    with pytest.raises(UserError, match="is no system; give a work directory"):
        parse_system("answers:")
    with pytest.raises(UserError, match="two systems have the name demo"):
        parse_systems(["runs/demo", "other/demo"])


# --- the command ----------------------------------------------------------------------------------------------------


def given(systems: Sequence[str], *suites: str, **more: Any) -> Given:
    return Given([str(system) for system in systems], suites, **{"batch_size": 2, **more})


@pytest.fixture(scope="module")
def everything(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """All suites on a tiny run, its original, a bridge and a file of answers."""
    here = tmp_path_factory.mktemp("everything")
    questions = write(here / "questions.jsonl", QUESTIONS)
    file = write(
        here / "file.jsonl", [{"id": 1, "answer": "ปารีส"}, {"question": QUESTIONS[1]["question"], "output": "x"}]
    )
    systems = [f"run={finished_run}", f"first={finished_run}#original", f"over=bridge:{finished_run}"]
    table = evaluate(
        given(
            [*systems, f"answers:{file}"], "answers", out=here / "out", questions=questions, max_new_tokens=12,
            max_answer_tokens=6,
        ),
        Progress(quiet=True),
    )  # fmt: skip
    more = evaluate(
        given(systems[:2], "perplexity", "retention", "translation", out=here / "more", max_answer_tokens=6,
              max_new_tokens=8, limit=3, questions=questions),
        Progress(quiet=True),
    )  # fmt: skip
    return {one["suite"]: one for one in [*table["suites"], *more["suites"]]}, here


def rows_of(table: dict[str, Any], measure: str) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in table["rows"] if row["measure"] == measure}


def test_every_kind_of_system_answers(everything: tuple[dict[str, Any], Path]) -> None:
    table, here = everything
    right = rows_of(table["answers"], "right")
    assert list(right) == ["run", "first", "over", "file"] and {row["samples"] for row in right.values()} == {4}
    assert right["run"]["difference"] is None and right["file"]["difference"]["samples"] == 4
    assert right["file"]["value"] == 0.25 and table["answers"]["systems"]["file"]["parsed"] == 2
    assert "file" not in rows_of(table["answers"], "right in English"), "it was not asked in English"
    items = {name: read_items(here / "out" / name / "answers") for name in right}
    assert all(item["prompt"] and item["english"]["prompt"] for item in items["run"][:3])
    assert items["run"][0]["how"] is not None and items["first"][0]["how"] is None
    assert items["run"][0]["english"]["raw"].startswith("<RESPONSE>")
    for item in items["over"]:
        assert item["error"] is not None or item["how"] == "bridge"
    identities = [read_json(here / "out" / name / "answers" / "results.json")["made_with"]["system"] for name in right]
    assert len({json.dumps(one) for one in identities}) == 4


def test_contamination_is_counted(everything: tuple[dict[str, Any], Path]) -> None:
    table, here = everything
    # The tiny run trains on everyday text; its own held-out questions are kept out of it, these are not in it.
    seen = table["answers"]["systems"]["run"]["contamination"]
    assert seen == {"of": 4, "found": 0, "by_source": {}, "ids": [], "too_short": 0}
    assert read_json(here / "out" / "run" / "answers" / "results.json")["contamination"] == seen
    assert table["answers"]["systems"]["file"]["contamination"] is None
    assert table["answers"]["systems"]["first"]["contamination"] is None, "the original was not trained"


def test_a_question_in_the_training_data_is_found(finished_run: Path, tmp_path: Path) -> None:
    line = (EXAMPLES / "pairs.train.tsv").read_text(encoding="utf-8").splitlines()[0].split("\t")[1]
    asked = write(tmp_path / "q.jsonl", [{"question": line, "answers": ["x"]}, QUESTIONS[0]])
    found = evaluate(given([str(finished_run)], "answers", out=tmp_path / "out", questions=asked, max_new_tokens=2),
                     Progress(quiet=True))["suites"][0]  # fmt: skip
    seen = found["systems"]["run"]["contamination"]
    assert (seen["found"], seen["of"], seen["ids"]) == (1, 2, ["1"])
    assert {"translate.sources.0", "transfer.pairs"} <= set(seen["by_source"])


def test_contamination_is_looked_for_again_where_a_run_left_out_other_text(finished_run: Path, tmp_path: Path) -> None:
    line = (EXAMPLES / "pairs.train.tsv").read_text(encoding="utf-8").splitlines()[0].split("\t")[1]
    asked = write(tmp_path / "q.jsonl", [{"question": line, "answers": ["x"]}])
    runs = [copy_run(finished_run, tmp_path / name).parent / "run" for name in "ab"]
    config = (runs[0] / "run.yaml").read_text(encoding="utf-8")
    assert "  answers: null" in config
    (runs[0] / "run.yaml").write_text(config.replace("  answers: null", f"  answers: {asked}"), encoding="utf-8")
    for systems, wanted in ((runs, [0, 1]), (runs[:1], [0]), (runs[1:], [1])):
        kept = Contamination(tmp_path / "contamination.json", Progress(quiet=True))
        found = [kept.of(run, "", [("1", line)], whole=True) for run in systems]
        assert [one and one["found"] for one in found] == wanted
    assert len(read_json(tmp_path / "contamination.json")) == 2


def test_the_limit_is_of_each_file(tmp_path: Path) -> None:
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("".join(f"text {name}{number}\n\n" for number in range(5)), encoding="utf-8")
    options = SuiteOptions(text=tuple(Reading(str(path)) for path in files), limit=2)
    assert list(perplexity.documents(options).values()) == ["text a0", "text a1", "text b0", "text b1"]


def test_perplexity_is_bits_over_bytes(everything: tuple[dict[str, Any], Path], finished_run: Path) -> None:
    table, here = everything
    items = read_items(here / "more" / "run" / "perplexity")
    target = [item for item in items if item["language"] == "target"]
    assert len(target) == 3 and len(items) == 6
    by_hand = sum(item["bits"] for item in target) / sum(len(item["text"].encode()) for item in target)
    row = rows_of(table["perplexity"], "bits per byte")["run"]
    assert row["value"] == pytest.approx(by_hand) and row["samples"] == 3 and row["low"] < row["value"] < row["high"]
    # The same as the evaluation inside a run measures.
    system = Systems(print, SuiteOptions()).model(Named("model", "run", str(finished_run)))
    weights, texts = system.weights, [item["text"] for item in target]
    whole = bits_per_byte(weights.split, weights.tokenizer, texts, length=64, batch_size=4)
    assert whole == pytest.approx(by_hand, rel=1e-5)
    alone = [document_nats(weights.split, weights.tokenizer, [text], length=64, batch_size=4)[0] for text in texts]
    assert np.allclose(np.array(alone) / math.log(2), [item["bits"] for item in target], rtol=1e-4)


def test_retention_of_the_original_is_whole(everything: tuple[dict[str, Any], Path]) -> None:
    table, here = everything
    drift = rows_of(table["retention"], "drift, KL per token")
    same = rows_of(table["retention"], "tokens that the original would say")
    assert drift["first"]["value"] == pytest.approx(0, abs=1e-6) and same["first"]["value"] == 1
    assert drift["run"]["value"] > 0.001 and same["run"]["value"] <= 1 and drift["run"]["samples"] == 3
    assert drift["first"]["difference"]["value"] == pytest.approx(-drift["run"]["value"], abs=1e-6)
    results = read_json(here / "more" / "run" / "retention" / "results.json")
    assert results["more"]["questions"] == 3 and results["more"]["answers of the original"] == 3
    assert rows_of(table["retention"], "right in English")["run"]["samples"] == 3


def test_translations_are_scored_as_sacrebleu_does(everything: tuple[dict[str, Any], Path]) -> None:
    import sacrebleu

    table, here = everything
    items = read_items(here / "more" / "run" / "translation")
    assert len(items) == 6 and {item["direction"] for item in items} == {"to_target", "to_english"}
    own = [item for item in items if item["direction"] == "to_english"]
    texts, references = [item["translation"] for item in own], [[item["reference"] for item in own]]
    for name, order in (("chrF into English", 0), ("chrF++ into English", 2)):
        row = rows_of(table["translation"], name)["run"]
        assert row["value"] == pytest.approx(sacrebleu.corpus_chrf(texts, references, word_order=order).score)
        assert row["samples"] == 3
    results = read_json(here / "more" / "run" / "translation" / "results.json")
    assert results["more"]["signatures"]["chrF"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    notes = " ".join(results["notes"])
    assert "chrF++ counts words by spaces, which Thai does not" in notes
    assert ("spBLEU" in results["more"]["signatures"]) != ("spBLEU is not measured" in notes)


def test_pairs_the_wrong_way_round_are_no_references(tmp_path: Path) -> None:
    pairs = tmp_path / "swapped.tsv"
    pairs.write_text("น้ำอยู่ที่ไหน\tWhere is the water?\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"swapped\.tsv: its columns are swapped: write English<TAB>th"):
        translation.check(SuiteOptions(pairs=pairs))


def test_scores_by_comet_are_read_back(
    everything: tuple[dict[str, Any], Path], finished_run: Path, tmp_path: Path
) -> None:
    _, here = everything
    shutil.copytree(here / "more" / "run", tmp_path / "run")
    comet = tmp_path / "run" / "translation" / "comet"
    lines = (comet / "to_english.hypothesis.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 3 and len((comet / "to_english.reference.txt").read_text().splitlines()) == 3
    again = given([f"run={finished_run}"], "translation", out=tmp_path, max_answer_tokens=6, max_new_tokens=8,
                  limit=3, questions=here / "questions.jsonl")  # fmt: skip
    path = comet / "to_english.json"
    scores = [0.5, 0.75, 0.25]
    path.write_text(
        json.dumps({"x": [{"mt": text, "COMET": score} for text, score in zip(lines, scores, strict=True)]})
    )
    row = rows_of(evaluate(again, Progress(quiet=True))["suites"][0], "COMET into English")["run"]
    assert (row["value"], row["samples"]) == (0.5, 3)
    path.write_text(path.read_text().replace("0.75", "NaN"))
    with pytest.raises(UserError, match="is not what comet-score --to_json writes"):
        evaluate(again, Progress(quiet=True))
    path.write_text(json.dumps({"x": [{"mt": "another", "COMET": 1.0}] * 3}))
    with pytest.raises(UserError, match="is of other translations"):
        evaluate(again, Progress(quiet=True))


def test_every_file_of_a_suite_is_gone_on_with(
    everything: tuple[dict[str, Any], Path], finished_run: Path, tmp_path: Path
) -> None:
    _, here = everything
    shutil.copytree(here / "more" / "run", tmp_path / "out" / "run")
    cut = [path for path in (tmp_path / "out").rglob("*.jsonl") if path.name != "items.jsonl"]
    assert {path.name for path in cut} == {"answers.jsonl", "documents.jsonl", "drift.jsonl", "original.jsonl"}
    for path in cut:
        # As a kill within the writing of the last line leaves it.
        path.write_bytes(path.read_bytes()[:-9])
    again = given([f"run={finished_run}"], "perplexity", "retention", "translation", out=tmp_path / "out", limit=3,
                  max_answer_tokens=6, max_new_tokens=8, questions=here / "questions.jsonl")  # fmt: skip
    evaluate(again, Progress(quiet=True))
    for path in (tmp_path / "out").rglob("*.json*"):
        if path.name in ("items.jsonl", "results.json"):
            whole = here / "more" / path.relative_to(tmp_path / "out")
            assert path.read_bytes() == whole.read_bytes(), path


def test_killed_in_the_middle_it_ends_the_same(finished_run: Path, tmp_path: Path) -> None:
    many = [{"question": f"คำถามที่ {n} คืออะไร", "answers": [str(n)], "question_en": f"What is {n}?", "answers_en": ["x"]}
            for n in range(24)]  # fmt: skip
    asked = write(tmp_path / "q.jsonl", many)
    words = ["evaluate", f"run={finished_run}", "--suite", "answers", "--questions", asked, "--max-new-tokens", 24]
    words += ["--max-answer-tokens", 24, "--batch-size", 2, "--no-contamination", "--out"]
    target = tmp_path / "out" / "run" / "answers" / "answers.jsonl"
    command = [sys.executable, "-m", "transllm_jax.cli.main", *map(str, words), str(tmp_path / "out")]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: target.exists() and target.read_bytes().count(b"\n") > 5, 300)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = target.read_bytes()
    assert 5 < kept.count(b"\n") < 48
    # As if the kill had come within a write.
    target.write_bytes(kept + b'{"id": "23", "tur')
    assert call(*words, tmp_path / "out") == 0 and call(*words, tmp_path / "whole") == 0
    assert target.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    for name in ("items.jsonl", "results.json"):
        there, whole = (tmp_path / at / "run" / "answers" / name for at in ("out", "whole"))
        assert there.read_bytes() == whole.read_bytes()
    assert len({json.loads(line)["id"] for line in target.read_bytes().splitlines()}) == 48


@pytest.fixture
def server() -> Iterator[Server]:
    with openai_server() as state:
        yield state


def test_a_server_is_asked_and_its_reasoning_is_kept_apart(server: Server, tmp_path: Path, questions: Path) -> None:
    def answered(body: dict[str, Any]) -> Fault:
        text = body["messages"][-1]["content"]
        reply = completion("<think>hm</think>ปารีส" if "ฝรั่งเศส" in text else "Bangkok Tokyo")
        reply["choices"][0]["message"]["reasoning_content"] = "secret"
        if "สองบวกสอง" in text:
            return Fault(400, {"error": {"message": "a filter"}})
        return Fault(200, reply)

    server.fail = answered
    found = evaluate(given([f"{server.url}#tiny"], "answers", out=tmp_path / "out", questions=questions,
                           endpoint=("concurrency=2", "body={top_k: 1}")), Progress(quiet=True))  # fmt: skip
    row = rows_of(found["suites"][0], "right")["tiny"]
    assert row["value"] == 0.25 and found["suites"][0]["systems"]["tiny"]["parsed"] == 3
    items = read_items(tmp_path / "out" / "tiny" / "answers")
    assert items[0]["visible"] == "ปารีส" and "secret" in items[0]["raw"] and items[3]["error"] == "status 400: a filter"
    assert not any("secret" in item["visible"] or "think" in item["visible"] for item in items)
    assert {body["top_k"] for body in server.bodies} == {1} and len(server.bodies) == 7


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_model_ends_the_command_at_once(
    server: Server, tmp_path: Path, questions: Path, transllm: Command, status: int
) -> None:
    server.fail = lambda body: Fault(status, {"error": {"message": "no"}})
    code, printed = transllm("evaluate", f"{server.url}#tiny", "--suite", "answers", "--questions", questions,
                             "--out", tmp_path / "out", "--endpoint", "concurrency=1")  # fmt: skip
    assert code == 2 and f"answered {status}: no" in printed and len(server.bodies) == 1


def test_conversations_of_two_turns_remember_the_first(finished_run: Path) -> None:
    system = Systems(print, SuiteOptions(), batch_size=2).model(Named("model", "run", f"{finished_run}", "original"))
    asked = [Asked(str(n), (f"Who is number {n}?", "Why?"), max_new_tokens=4) for n in range(5)]
    found = dict(system.answers(asked))
    assert len(found) == 5
    for one, turns in found.items():
        assert [len(turn.prompt) for turn in turns] in ([1, 3], [1, 1])
        if turns[0].visible:
            assert turns[1].prompt[1]["content"] == turns[0].visible and turns[1].prompt[0]["content"] == one.turns[0]
    # The rest of them alone gets the same answers.
    again = dict(system.answers(asked[3:], at_once=5))
    assert all(again[one] == found[one] for one in asked[3:])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("nothing", "--suite", "answers"), "needs questions with known answers; give --questions"),
        (("nothing", "--suite", "other"), "there is no suite 'other'; choose from answers"),
        (("nothing", "--suite", "answers", "--questions", "q"), "nothing"),
        (("answers:a", "--suite", "answers", "--questions", "q"), "a: no such file"),
        (("answers:b", "--suite", "perplexity", "--text", "t"), "needs a model's weights, which b does not show"),
        (("bridge:model", "--suite", "answers", "--questions", "q"), "has no stage translate; give --translator"),
        (("bridge:run", "--suite", "answers", "--questions", "q", "--translator", "b"), "give a server's model"),
        (("run#later", "--suite", "answers", "--questions", "q"), "has no point of this name; use original or one of"),
        (("http://x/v1#m", "--suite", "answers", "--questions", "q", "--endpoint", "kye=1"), "did you mean 'key'?"),
    ],
)
def test_bad_arguments_end_with_one_line(
    transllm: Command,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_run(finished_run, tmp_path, ("base", "vocabulary"))
    (tmp_path / "run" / "run.yaml").write_bytes((finished_run / "run.yaml").read_bytes())
    write(tmp_path / "q", QUESTIONS)
    write(tmp_path / "b", [{"id": 1, "answer": "x"}])
    (tmp_path / "t").write_text("text\n")
    code, printed = transllm("evaluate", *arguments)
    assert code == 2 and problem in printed and len(printed.strip().splitlines()) == 1, printed
    assert not (tmp_path / "evaluation").exists()


def test_a_request_to_stop_ends_between_two_pieces_of_work(
    finished_run: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interrupt, "requested", property(lambda _: True, lambda _, __: None), raising=False)
    with pytest.raises(Preempted, match=r"answers of run: \d+ of 7 questions: stopped, what is done is saved"):
        evaluate(given([f"run={finished_run}"], "answers", out=tmp_path, questions=questions), Progress(quiet=True))


def test_help_says_where_results_go(transllm: Command) -> None:
    """Of the default command, which is written without its name."""
    code, printed = transllm("evaluate", "--help")
    assert code == 0 and "by default evaluation/suites in the first work directory" in " ".join(printed.split())
    assert " evaluate [OPTIONS] " in printed and "evaluate suites" not in printed
    assert transllm("evaluate")[1].split() == printed.split()
    code, printed = transllm("evaluate", "--no-such-option")
    assert code == 2 and "evaluate [OPTIONS]" in printed and "evaluate suites" not in printed
