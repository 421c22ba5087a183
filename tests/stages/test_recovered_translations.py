"""Stage `recover` with translations that a test wrote: what is checked, rejected, listed, and put together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copy_run, tiny_run

from transllm_jax.config import Filters, Recover, load_config
from transllm_jax.errors import UserError
from transllm_jax.generation.translate import Direction, Made
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import pipeline, recover, steps, translations
from transllm_jax.stages.filters import DROPPED
from transllm_jax.stages.manifest import Artifact
from transllm_jax.stages.run import Run

# Instructions, and what the original model answered.
ANSWERS = {
    "Name a colour.": "Red is a warm colour. Blue is a cold one.",
    "List two tools.": "1. **Hammer:** It drives nails.\n2. Saw\n\n```sh\nls. Now\n```",
    "Count.": "42",
    "Loop.": "I say this again and again, all day. " * 5,
    "Break off.": "The answer is that",
}
# What the model of stage `translate` makes of each sentence, if it does not simply translate it.
THAI = "ภาษาไทยเป็นภาษาที่ใช้ในประเทศไทยมานาน"


def thai(text: str) -> str:
    """A translation of usual length, with the numbers."""
    numbers = " ".join(word for word in text.replace(".", "").split() if word.isdigit())
    return (THAI * 3)[: max(2, len(text))] + f" {numbers}".rstrip()


@pytest.fixture(scope="module")
def translated(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of a run that is done up to `translate`, with the default filters and checks."""
    here = tmp_path_factory.mktemp("recovered")
    copy_run(finished_run, here, ("base", "vocabulary", "pretrain", "translate"))
    (here / "instructions.jsonl").write_text(
        "".join(json.dumps({"instruction": text}) + "\n" for text in ANSWERS), encoding="utf-8"
    )
    tree: dict[str, Any] = tiny_run(finished_run.parent / "model", here / "run")
    tree["recover"] = {"instructions": str(here / "instructions.jsonl"), "batch_size": 3, "max_new_tokens": 20}
    (here / "config.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return here / "config.yaml"


class Model:
    """In place of the model that translates."""

    def __init__(self) -> None:
        self.given: dict[str, str | None] = {}
        self.cut_off: set[str] = set()
        self.asked: list[tuple[str, str]] = []

    def make(self, texts: Sequence[str], direction: Direction) -> list[Made]:
        self.asked += [(direction, text) for text in texts]
        back = {made: english for english, made in self.given.items()}
        default: Callable[[str], str | None] = thai if direction == "to_target" else lambda text: back.get(text, "No.")
        return [Made(self.given.get(text, default(text)), text not in self.cut_off) for text in texts]

    def each(self, texts: Sequence[str], direction: Direction, first: int) -> list[tuple[int, Made]]:
        """From the last to the first: an engine is done in any order."""
        return list(enumerate(self.make(texts[first:], direction), first))[::-1]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model()
    monkeypatch.setattr(translations, "ModelTranslator", lambda *given, **options: made)
    monkeypatch.setattr(translations, "Engine", lambda *given, **options: None)
    return made


@pytest.fixture
def go(translated: Path, tmp_path: Path, model: Model) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Runs the stage after the answers; gives its directory and its summary."""
    config = load_config(translated)
    directory = tmp_path / "recover"
    directory.mkdir()

    def run(*changes: str, answers: dict[str, str] = ANSWERS) -> tuple[Path, dict[str, Any]]:
        rows = [
            {"instruction": asked, "answer": said, "finished": asked != "Break off."} for asked, said in answers.items()
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / "answers.jsonl").write_text(text, encoding="utf-8")
        settings = load_config(translated, list(changes))
        given = Run(settings, Path(config.workdir), Progress(quiet=True), Interrupt())
        return directory, dict(recover.run_stage(given, directory))

    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_filtered_and_translated_sentence_by_sentence(go: Any, model: Model) -> None:
    directory, summary = go()
    chains = {row["question_en"]: row for row in lines(directory / "chains.jsonl")}
    assert list(chains) == ["Name a colour.", "List two tools.", "Count."]
    assert chains["Name a colour."]["question"] == thai("Name a colour.")
    red, blue = (thai(text) for text in ("Red is a warm colour.", "Blue is a cold one."))
    assert chains["Name a colour."]["answer"] == f"{red} {blue}"
    hammer, drives, saw = (thai(text) for text in ("Hammer:", "It drives nails.", "Saw"))
    assert chains["List two tools."]["answer"] == f"1. **{hammer}** {drives}\n2. {saw}\n\n```sh\nls. Now\n```"
    assert chains["Count."]["answer"] == "42", "nothing to translate"
    assert all(row["translated_by"] == {"question": "model", "answer": "model"} for row in chains.values())
    # All sentences of all texts, in batches.
    assert ("to_target", "Red is a warm colour.") in model.asked and len(model.asked) == 3 + 5
    dropped = lines(directory / DROPPED)
    assert [(row["reason"], row["instruction"]) for row in dropped] == [
        ("repetitive", "Loop."),
        ("cut off", "Break off."),
    ]
    assert summary["left_out"] == {"cut off": 1, "repetitive": 1} and summary["unfinished"] == 1
    assert summary["translations_rejected"] == {} and summary["chains"] == 3
    assert "(1 cut off, 1 repetitive: left out), 3 chains" in summary["text"]
    assert summary["system_prompt"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize(
    ("source", "translation", "reason", "off"),
    [
        ("Blue is a cold one.", None, "empty", None),
        ("Blue is a cold one.", "CUT OFF", "cut off", "recover.keep_unfinished=true"),
        ("Blue is a cold one.", THAI * 4, "repetitive", "recover.filters={max_repeated: 1}"),
        (
            "Blue is a cold one.",
            THAI + THAI[::-1] + THAI[1::2],
            "wrong length",
            "recover.checks.max_length_factor=null",
        ),
        ("Blue is a cold one.", "Azul es un color.", "wrong script", "recover.checks.min_script_share=0"),
        ("Blue is a cold one.", "Blue is a cold one.", "untranslated", "recover.checks.min_script_share=0"),
        ("Room 5 is at `x`.", "ห้องนี้อยู่ที่ `y` 5", "lost code, address, number or mark", "recover.checks.keep=[]"),
    ],
)
def test_a_translation_is_rejected_with_its_reason(
    go: Any, model: Model, source: str, translation: str | None, reason: str, off: str | None
) -> None:
    answers = {**ANSWERS, "Name a colour.": f"Red is a warm colour. {source}"}
    model.given[source] = thai(source) if translation == "CUT OFF" else translation
    if translation == "CUT OFF":
        model.cut_off.add(source)
    directory, summary = go(answers=answers)
    assert [row["question_en"] for row in lines(directory / "chains.jsonl")] == ["List two tools.", "Count."]
    assert summary["translations_rejected"] == {reason: 1} and summary["answers_translated_by"]["none"] == 1
    (row,) = [row for row in lines(directory / DROPPED) if row["of"] != "answer"]
    assert (row["of"], row["reason"], row["source"]) == ("translation of answers", reason, source)
    assert row["translation"] == model.given[source] and row["text"] == answers["Name a colour."]
    if off is not None:
        shutil.rmtree(directory)
        directory.mkdir()
        changes = [off]
        if reason == "repetitive":  # it is long as well
            changes.append("recover.checks={max_length_factor: null}")
        assert go(*changes, answers=answers)[1]["translations_rejected"] == {}


def test_a_round_trip_finds_what_says_something_else(go: Any, model: Model) -> None:
    for text in ANSWERS:
        model.given[text] = thai(text) + text[0]
    for text in ("Red is a warm colour.", "Hammer:", "It drives nails.", "Saw"):
        model.given[text] = thai(text) + text[1]
    directory, summary = go("recover.checks.min_round_trip=80")
    # One of two sentences comes back as "No."
    (row,) = [row for row in lines(directory / DROPPED) if row["of"] != "answer"]
    assert row["reason"] == "round trip" and row["source"] == ANSWERS["Name a colour."]
    assert row["back"] == "Red is a warm colour. No." and 20 < row["measure"] < 80
    assert summary["translations_rejected"] == {"round trip": 1} and summary["chains"] == 2
    rows = lines(directory / "round_trips.jsonl")
    assert len(rows) == 3 + 5 and all(row["finished"] for row in rows)


def test_when_no_chain_is_left_the_reasons_are_said(go: Any, model: Model) -> None:
    model.given |= dict.fromkeys(("Name a colour.", "List two tools.", "Count."))
    said = "answers left out: 1 cut off, 1 repetitive; translations rejected: 3 empty; see .*dropped.jsonl"
    with pytest.raises(UserError, match=rf"no chain is left of 5 instructions; {said}"):
        go()


def test_a_seq2seq_model_gets_the_same_batches_wherever_it_goes_on(
    translated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its translations depend on the batch; batches of an older version, or a part of one, are in the file."""
    asked: list[list[str]] = []

    class Seq2seq:
        def make(self, texts: Sequence[str], direction: Direction) -> list[Made]:
            asked.append(list(texts))
            return [Made(f"{text} with {' '.join(texts)}", True) for text in texts]

    monkeypatch.setattr(translations, "Seq2seqTranslator", lambda *given, **options: Seq2seq())
    config = load_config(translated)
    run = Run(config, Path(config.workdir), Progress(quiet=True), Interrupt())
    known = [{"of": "answers", "source": "abcdefgh"[number]} for number in range(8)]
    path = tmp_path / "translations.seq2seq.jsonl"

    def rows() -> list[dict[str, Any]]:
        del asked[:]
        return translations._Worker(run, "seq2seq", config.recover).rows(path, "to_target", known, "translations")

    whole = rows()
    data = path.read_bytes()
    assert asked == [["a", "b", "c"], ["d", "e", "f"], ["g", "h"]] and len(whole) == 8
    for kept in range(8):
        path.write_bytes(b"".join(data.splitlines(keepends=True)[:kept]) + b'{"of": "ans')
        assert rows() == whole and path.read_bytes() == data
        assert len(asked) == 3 - kept // 3


def test_with_other_checks_it_goes_on_from_what_is_translated(go: Any, model: Model) -> None:
    answers = {**ANSWERS, "Count.": "One and two and three."}
    model.given |= dict.fromkeys(("Red is a warm colour.", answers["Count."]), "No se puede traducir esto.")
    model.given["List two tools."] = None
    with pytest.raises(UserError, match=r"rejected: .*; with other recover\.checks, the run goes on"):
        go("recover.checks.max_length_factor=null", answers=answers)
    asked = list(model.asked)
    _, summary = go("recover.checks={min_script_share: 0, max_length_factor: null}", answers=answers)
    assert summary["chains"] == 2 and model.asked == asked


def test_the_checks_of_a_stage_that_was_stopped_may_change(translated: Path, tmp_path: Path) -> None:
    def inputs(*changes: str) -> dict[str, Any]:
        config = load_config(translated, list(changes))
        return pipeline.look_at_inputs(Run(config, Path(config.workdir), Progress(quiet=True), Interrupt()))["recover"]

    place, may_change = Artifact(tmp_path, "recover"), steps.STEPS[steps.index("recover")].may_change
    place.begin(inputs())
    changed = inputs("recover.checks={min_script_share: 0, min_round_trip: 30}")
    assert place.state(changed, may_change) == "running"
    with pytest.raises(UserError, match=r"other inputs: recover.filters.max_repeated \(unset -> 0.9\)"):
        place.state(inputs("recover.filters.max_repeated=0.9"), may_change)
    place.finish(inputs(), {"text": "done"})
    assert place.state(inputs(), may_change) == "done"
    with pytest.raises(UserError, match="redo it with --force recover"):
        place.state(changed, may_change)


def test_what_an_older_version_began_to_translate_goes_on_as_it_began(
    go: Any, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = Filters(max_repeated=1, min_latin_share=0)
    with monkeypatch.context() as patch:

        def before(run: Run, directory: Path) -> tuple[Recover, bool]:
            return run.config.recover.model_copy(update={"filters": none, "sentences": False}), False

        patch.setattr(recover, "_settings", before)
        directory, summary = go()
    path = directory / "translations.jsonl"
    assert not (directory / DROPPED).exists() and summary["chains"] == 4
    rows = lines(path)
    assert ANSWERS["Name a colour."] in [row["source"] for row in rows] and len(rows) == 8
    chains = (directory / "chains.jsonl").read_bytes()
    # Stopped after a batch, by a version that did not write `finished`.
    old = [{key: value for key, value in row.items() if key != "finished"} for row in rows[:3]]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in old), encoding="utf-8")
    (directory / "chains.jsonl").unlink()
    model.asked.clear()
    assert go()[1] == summary
    assert [text for _, text in model.asked] == [row["source"] for row in rows[3:]]
    assert lines(path) == [*old, *rows[3:]] and (directory / "chains.jsonl").read_bytes() == chains
    assert not (directory / DROPPED).exists()
    # Begun anew, it is filtered.
    path.unlink()
    assert go()[1]["chains"] == 3 and (directory / DROPPED).exists()
