"""What a model generates for stage `recover` and for an evaluation: stopped, killed, damaged, it goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copy_run, tiny_run

from transllm_jax.config import load_config
from transllm_jax.errors import Preempted, UserError
from transllm_jax.generation import translate
from transllm_jax.generation.device import Device
from transllm_jax.generation.engine import Engine, Request
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


@pytest.fixture(scope="module", autouse=True)
def uneven() -> Iterator[None]:
    """Answers of many lengths, which are done in another order than they begin. The tiny model's own are all alike."""

    def request(prompt: Sequence[int], room: int, stop: Sequence[int]) -> Request:
        return Request(prompt, 1 + sum(prompt) % room, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover, "Request", request)
        patch.setattr(translate, "Request", request)
        yield


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
    """Counts what engines are asked in each of their runs, and their answers; stops the run at one of these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.anew()
        whole = Engine.run

        def run(engine: Engine, requests: Iterable[Request], **given: Any) -> Any:
            self.runs.append(0)

            def counted() -> Iterator[Request]:
                for request in requests:
                    self.runs[-1] += 1
                    yield request

            for found in whole(engine, counted(), **given):
                self.answered += 1
                if self.answered == self.stop_at:
                    self.interrupt.requested = True
                yield found
            self.bursts |= {name for name in engine.programs if "burst" in name}

        monkeypatch.setattr(Engine, "run", run)

    def anew(self, stop_at: int | None = None) -> None:
        """Begin to count again."""
        self.runs: list[int] = []
        self.bursts: set[str] = set()
        self.answered, self.stop_at, self.interrupt = 0, stop_at, Interrupt()


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


def test_stopped_at_any_answer_it_ends_as_one_that_was_not(
    run_recover: Callable[[], Path], undisturbed: dict[str, bytes], asked: Asked
) -> None:
    asked.anew()
    directory = run_recover()
    total = {"answers": LIMIT, "translations": len(undisturbed[TRANSLATIONS].splitlines())}
    # All in one run each, so that a slot never waits for the answers in the others.
    assert contents(directory) == undisturbed and asked.runs == list(total.values())
    shutil.rmtree(directory)
    directory.mkdir()

    def done() -> dict[str, int]:
        """The rows in the files, which hold the beginnings of the undisturbed ones."""
        found = {}
        for what, name in (("answers", ANSWERS), ("translations", TRANSLATIONS)):
            data = (directory / name).read_bytes() if (directory / name).exists() else b""
            assert undisturbed[name].startswith(data) and data[-1:] in (b"", b"\n")
            found[what] = data.count(b"\n")
        return found

    stops: list[tuple[str, int]] = []
    for stop_at in range(1, sum(total.values())):
        missing = [total[what] - count for what, count in done().items() if count < total[what]]
        asked.anew(stop_at)
        try:
            run_recover()
            break
        except Preempted as stopped:
            what = "translations" if done()["translations"] or "translations" in str(stopped) else "answers"
            stops.append((what, done()[what]))
            assert str(stopped) == f"recover: {stops[-1][1]} of {total[what]} {what}: stopped, what is done is saved"
        # What is in the files is not asked again.
        assert all(count <= left for count, left in zip(asked.runs, missing, strict=False))
    assert asked.runs == missing and contents(directory) == undisturbed
    # Also between two places that are multiples of the number of slots.
    for what in total:
        assert any(count % BATCH for kind, count in stops if kind == what)


def test_a_slot_takes_the_next_instruction_when_its_answer_is_done(
    config: Path, translated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of ten answers are long. In four slots they overlap; batch by batch, one would begin after the other."""
    long, limits = 33, [33 if number % BATCH == 0 else 2 for number in range(LIMIT)]
    steps: list[int] = []
    whole, left = Device.burst, iter(limits)

    def burst(device: Device, slots: Any, **given: Any) -> None:
        whole(device, slots, **given)
        steps.append(max(row.new for row in slots if row is not None))

    monkeypatch.setattr(Device, "burst", burst)
    monkeypatch.setattr(recover, "Request", lambda prompt, room, stop: Request(prompt, next(left), ()))
    settings = load_config(config, [f"recover.max_new_tokens={long}"])
    run = Run(settings, translated, Progress(quiet=True), Interrupt())
    rows = recover._answer(run, tmp_path / ANSWERS, [f"Say {number}." for number in range(LIMIT)])
    assert [row["instruction"] for row in rows] == [f"Say {number}." for number in range(LIMIT)]
    assert next(left, None) is None and long - 1 <= sum(steps) < 2 * long


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
        asked.anew(stop_at=BATCH)
        kept = data[:size].count(b"\n")
        if kept < len(lines):
            try:
                run_recover()
            except Preempted:
                assert asked.answered >= BATCH
            else:
                assert len(lines) - kept < BATCH
            # What there was stands, and what was done since follows it.
            before, kept = kept, (directory / name).read_bytes().count(b"\n")
            assert (directory / name).read_bytes() == b"".join(lines[:kept]) and kept >= before
        asked.anew()
        run_recover()
        assert contents(directory) == undisturbed
        assert asked.runs == ([len(lines) - kept] if kept < len(lines) else [])
        # The number of slots is that of the whole file, however little is left.
        assert all(f" {BATCH} rows," in name for name in asked.bursts) and len(asked.bursts) == len(asked.runs)


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
        """One of two processes; the other one is asked to stop when this one has asked `stop_at` times."""

        def __init__(self, stop_at: int, number: int = 1) -> None:
            super().__init__()
            self.number, self.left = number, stop_at

        def any(self, flag: bool) -> bool:
            assert not flag
            self.left -= 1
            return self.left == 0

    said = []
    written = tmp_path / "primary"
    written.mkdir()
    for number, directory in enumerate((written, tmp_path)):
        run = Run(load_config(config), Site(Workdir(translated), Other(4, number)), Progress(quiet=True), Interrupt())
        with pytest.raises(Preempted) as stopped:
            recover.run_stage(run, directory)
        said.append(str(stopped.value))
    # Both have the same rows when they ask for the fourth time, and the primary has them in its file.
    rows = (written / ANSWERS).read_bytes().count(b"\n")
    assert 0 < rows < LIMIT
    assert said == [f"recover: {rows} of {LIMIT} answers: stopped, what is done is saved"] * 2
    shutil.rmtree(written)
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


def test_an_evaluation_stops_between_answers_and_goes_on(
    config: Path, translated: Path, tmp_path: Path, asked: Asked
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(translated / "base", workdir / "base")
    asked.anew()
    evaluated(config, workdir, asked.interrupt)
    # The answers, both translations and the conversations, in two slots.
    assert asked.runs == [3] * 4
    place, original = workdir / "evaluation" / "base", workdir / "evaluation" / evaluate.ORIGINAL
    wanted = (place / "results.json").read_bytes(), original.read_bytes()
    shutil.rmtree(workdir / "evaluation")
    stopped = []
    for stop_at in (1, 3, 3, 1, 3, 3):
        asked.anew(stop_at)
        with pytest.raises(Preempted) as raised:
            evaluated(config, workdir, asked.interrupt)
        assert len(asked.runs) == 1 and (asked.answered == 3 if stop_at == 3 else asked.answered < 3)
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
    asked.anew(stop_at=6)
    with pytest.raises(Preempted):
        evaluated(config, workdir, asked.interrupt)
    asked.anew()
    evaluated(config, workdir, asked.interrupt, "evaluation.max_pairs=2")
    results = json.loads((place / "results.json").read_text(encoding="utf-8"))
    assert results["counts"]["pairs"] == 2 and len(results["translations"]["to_target"]) == 2
