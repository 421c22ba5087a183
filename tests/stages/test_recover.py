"""What a model generates for stage `recover` and for an evaluation: stopped, killed, damaged, it goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copy_run, tiny_run

from transllm_jax.config import load_config
from transllm_jax.errors import Preempted, UserError
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.pieces import cut, join
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.hosts.runtime import Peers
from transllm_jax.hosts.site import Site
from transllm_jax.progress import Progress
from transllm_jax.stages import evaluate, pipeline, recover
from transllm_jax.stages.run import Run
from transllm_jax.storage import Workdir

ANSWERS, TRANSLATIONS, CHAINS = "answers.jsonl", "translations.jsonl", "chains.jsonl"
FILES = (ANSWERS, TRANSLATIONS, CHAINS)
LIMIT, BATCH = 10, 4


@pytest.fixture(scope="module")
def config(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done up to `translate`. The model translates instructions and answers; evaluation is minimal."""
    here = tmp_path_factory.mktemp("recover")
    copy_run(finished_run, here, ("base", "vocabulary", "pretrain", "translate"))
    tree: dict[str, Any] = tiny_run(finished_run.parent / "model", here / "run")
    tree["recover"] |= {"max_instructions": LIMIT, "batch_size": BATCH, "translate_instructions": {}}
    tree["evaluation"] |= {"max_documents": 1, "max_pairs": 3, "max_chats": 3, "max_new_tokens": 4, "batch_size": 2}
    (here / "config.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return here / "config.yaml"


@pytest.fixture(scope="module")
def translated(config: Path) -> Path:
    """A work directory after stage `translate`."""
    return Path(load_config(config).workdir)


class Asked:
    """Counts the batches that engines are asked for, and stops the run within one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.stop_at: int | None = None
        self.interrupt = Interrupt()
        whole = Engine.generate

        def generate(engine: Engine, prompts: Any, **given: Any) -> Any:
            self.batches.append(len(prompts))
            if len(self.batches) == self.stop_at:
                self.interrupt.requested = True
            return whole(engine, prompts, **given)

        monkeypatch.setattr(Engine, "generate", generate)

    def anew(self, stop_at: int | None = None) -> None:
        """Begin to count again."""
        self.batches, self.stop_at, self.interrupt = [], stop_at, Interrupt()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


@pytest.fixture
def run_recover(config: Path, translated: Path, tmp_path: Path, asked: Asked) -> Callable[[], Path]:
    """Runs the stage in a process's own `Run`; gives its directory."""
    workdir = tmp_path / "run"
    shutil.copytree(translated, workdir)

    def go() -> Path:
        directory = workdir / "recover"
        directory.mkdir(exist_ok=True)
        recover.run_stage(Run(load_config(config), workdir, Progress(quiet=True), asked.interrupt), directory)
        return directory

    return go


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def undisturbed(config: Path, translated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    recover.run_stage(Run(load_config(config), translated, Progress(quiet=True), Interrupt()), directory)
    return contents(directory)


def test_the_translations_are_kept_with_what_they_are_of(undisturbed: dict[str, bytes]) -> None:
    answers = [json.loads(line) for line in undisturbed[ANSWERS].splitlines()]
    rows = [json.loads(line) for line in undisturbed[TRANSLATIONS].splitlines()]
    assert len(answers) == LIMIT and all(set(row) == {"of", "source", "translation", "finished"} for row in rows)
    sources = {kind: [row["source"] for row in rows if row["of"] == kind] for kind in ("instructions", "answers")}
    whole = [row for row in answers if row["answer"]]

    def sentences(texts: Iterable[str]) -> list[str]:
        return sorted({piece.text for text in texts for piece in cut(text) if piece.translate})

    assert sorted(sources["instructions"]) == sentences(row["instruction"] for row in whole)
    assert sorted(sources["answers"]) == sentences(row["answer"] for row in whole)
    found = {(row["of"], row["source"]): row["translation"] for row in rows}

    def translation(kind: str, text: str) -> str:
        pieces = cut(text)
        return join(pieces, [found[kind, piece.text] for piece in pieces if piece.translate])

    assert undisturbed[CHAINS]
    for line in undisturbed[CHAINS].splitlines():
        chain = json.loads(line)
        assert translation("instructions", chain["question_en"]) == chain["question"]
        assert translation("answers", chain["answer_en"]) == chain["answer"]


def test_stopped_within_any_batch_it_ends_as_one_that_was_not(
    run_recover: Callable[[], Path], undisturbed: dict[str, bytes], asked: Asked
) -> None:
    asked.anew()
    directory = run_recover()
    wanted = list(asked.batches)
    assert contents(directory) == undisturbed and len(wanted) == 8
    shutil.rmtree(directory)
    batches: list[int] = []
    said = []
    for _ in range(20):
        asked.anew(stop_at=1)
        try:
            run_recover()
            break
        except Preempted as stopped:
            said.append(str(stopped))
        finally:
            batches += asked.batches
    # Each process did one batch, and nothing was asked twice.
    assert batches == wanted and len(said) == 8
    rows = len(undisturbed[TRANSLATIONS].splitlines())
    assert said[0] == f"recover: 4 of {LIMIT} answers: stopped, what is done is saved"
    assert said[3] == f"recover: 4 of {rows} translations: stopped, what is done is saved"
    assert contents(directory) == undisturbed


def cuts(data: bytes) -> Iterator[int]:
    """Sizes that a file may have when a process is killed: of lines and parts of lines."""
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    yield from (0, 1, ends[0], ends[BATCH - 1] - 1, ends[BATCH - 1], ends[BATCH] + 7, ends[-1] - 1, ends[-1])


@pytest.mark.parametrize("name", [ANSWERS, TRANSLATIONS])
def test_cut_off_at_any_byte_it_ends_as_one_that_was_not(
    run_recover: Callable[[], Path],
    undisturbed: dict[str, bytes],
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    directory = run_recover()
    data = undisturbed[name]
    lines = data.splitlines(keepends=True)
    opened = Path.open

    def open_(path: Path, mode: str = "r", *given: Any, **options: Any) -> Any:
        assert path.name != name or "w" not in mode, "what was made so far is written anew"
        return opened(path, mode, *given, **options)

    monkeypatch.setattr(Path, "open", open_)
    for size in cuts(data):
        with opened(directory / name, "rb+") as file:
            file.truncate(0)
            file.write(data[:size])
        asked.anew(stop_at=1)
        whole = data[:size].count(b"\n")
        kept = whole if whole == len(lines) else whole // BATCH * BATCH
        if kept < len(lines):
            with pytest.raises(Preempted):
                run_recover()
            # What there was stands, and the batch that follows it.
            assert (directory / name).read_bytes() == b"".join(lines[: kept + BATCH])
        asked.anew()
        run_recover()
        assert contents(directory) == undisturbed
        assert len(asked.batches) == max(0, -(-(len(lines) - kept) // BATCH) - 1)


@pytest.mark.parametrize("name", [ANSWERS, TRANSLATIONS])
def test_a_row_that_does_not_belong_there_is_named_and_nothing_is_lost(
    run_recover: Callable[[], Path], undisturbed: dict[str, bytes], name: str
) -> None:
    directory = run_recover()
    lines = undisturbed[name].splitlines(keepends=True)
    for changed in (b"{}\n", b"[1]\n", b"\0\0\n", lines[2][:9] + b"\n", lines[3]):
        (directory / name).write_bytes(b"".join([*lines[:2], changed, *lines[3:]]))
        before = contents(directory)
        with pytest.raises(UserError, match=rf"{name}:3 is not the row that belongs there.*--force recover"):
            run_recover()
        assert contents(directory) == before
    # More rows than there are instructions.
    (directory / name).write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(UserError, match=rf"{name}:{len(lines) + 1} is not the row"):
        run_recover()


def test_of_several_processes_one_writes_and_all_stop(config: Path, translated: Path, tmp_path: Path) -> None:
    class Other(Peers):
        """A process that is not the primary; another one is asked to stop when it has asked `stop_at` times."""

        def __init__(self, stop_at: int) -> None:
            super().__init__()
            self.number, self.left = 1, stop_at

        def any(self, flag: bool) -> bool:
            assert not flag
            self.left -= 1
            return self.left == 0

    run = Run(load_config(config), Site(Workdir(translated), Other(2)), Progress(quiet=True), Interrupt())
    with pytest.raises(Preempted, match=rf"8 of {LIMIT} answers"):
        recover.run_stage(run, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(Preempted, match="evaluation/translate: 0 of 5 parts"):
        evaluate.run_evaluation(
            Run(load_config(config), Site(Workdir(translated), Other(1)), Progress(quiet=True), Interrupt()),
            tmp_path / "translate",
            "translate",
        )
    assert not list(tmp_path.iterdir())


def test_an_answer_too_long_to_be_translated_is_left_out(config: Path, translated: Path, tmp_path: Path) -> None:
    # What an answer's tokens say may need more tokens when it is read.
    run = Run(load_config(config), translated, Progress(quiet=True), Interrupt())
    texts: dict[recover.Kind, list[str]] = {
        "instructions": ["Say hello.", "Say more."],
        "answers": ["Hello.", "hello there " * 300],
    }
    found, by, rejected = recover._translate(run, tmp_path, texts, run.config.recover, checked=True)
    assert found["answers"][1] is None and by["answers"][1] == "none"
    assert by["instructions"] == ["model", "model"] and by["answers"][0] == "model"
    (row,) = rejected
    assert (row["of"], row["reason"], row["translation"]) == ("translation of answers", "no room", None)


# An evaluation


def evaluated(config: Path, workdir: Path, interrupt: Interrupt, *changes: str) -> None:
    settings = load_config(config, list(changes))
    pipeline.run_pipeline(settings, workdir, Progress(quiet=True), interrupt, until="base")


def test_an_evaluation_stops_between_batches_and_goes_on(
    config: Path, translated: Path, tmp_path: Path, asked: Asked
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(translated / "base", workdir / "base")
    asked.anew()
    evaluated(config, workdir, asked.interrupt)
    # Of the answers, of both translations and of the conversations, two each.
    assert asked.batches == [2, 1] * 4
    place, original = workdir / "evaluation" / "base", workdir / "evaluation" / evaluate.ORIGINAL
    wanted = (place / "results.json").read_bytes(), original.read_bytes()
    shutil.rmtree(workdir / "evaluation")
    stopped = []
    for stop_at in (1, 2, 2, 1, 2, 2):
        asked.anew(stop_at)
        with pytest.raises(Preempted) as raised:
            evaluated(config, workdir, asked.interrupt)
        assert len(asked.batches) == stop_at
        stopped.append(str(raised.value))
        assert json.loads((place / "manifest.json").read_text(encoding="utf-8"))["state"] == "running"
    said = "evaluation/base: {} of 5 parts: stopped, what is done is saved"
    assert stopped == [said.format(done) for done in (0, 0, 3, 3, 4, 5)]
    asked.anew()
    evaluated(config, workdir, asked.interrupt)
    assert ((place / "results.json").read_bytes(), original.read_bytes()) == wanted
    assert not (place / evaluate.SO_FAR).exists()
    # An evaluation that is not done is begun anew with another config, of which nothing that was found is used.
    shutil.rmtree(place)
    asked.anew(stop_at=4)
    with pytest.raises(Preempted):
        evaluated(config, workdir, asked.interrupt)
    asked.anew()
    evaluated(config, workdir, asked.interrupt, "evaluation.max_pairs=2")
    results = json.loads((place / "results.json").read_text(encoding="utf-8"))
    assert results["counts"]["pairs"] == 2 and len(results["translations"]["to_target"]) == 2
