"""`transllm run CONFIG --dry-run`: what it says of a run is what the run would do, and it trains nothing."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from conftest import EXAMPLES, Command, call, tiny_run

from transllm_jax.commands.dry_run import CHARACTERS, measure
from transllm_jax.config import load_config
from transllm_jax.disk import sha256_of
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import pipeline, pretrain, steps, transfer, translate
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import Job, Part, prepare
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.placement import Placement

EPOCHS = 0.1
STAGES = ("pretrain", "translate", "transfer")


def dry_run(config: Path) -> str:
    """What the command prints in a terminal that is wide enough for every row."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "4000")
        assert call("run", config, "--dry-run") == 0
    return printed.getvalue()


class Planned:
    """A dry run that was done: its config, its work directory, what it printed, and what would be trained."""

    def __init__(self, config: Path, workdir: Path, printed: str) -> None:
        self.config, self.workdir, self.printed = config, workdir, printed
        self.run = Run(load_config(config), workdir, Progress(quiet=True), Interrupt())
        parts = {
            "pretrain": pretrain.parts(self.run),
            "translate": translate.parts(self.run),
            "transfer": transfer.known_parts(self.run),
        }
        self.parts: dict[str, list[Part]] = parts
        self.jobs = {name: self.job(name) for name in parts}

    def job(self, name: str) -> Job:
        """A stage's training; to measure it uses it up."""
        return prepare(self.run, name=name, start="vocabulary", parts=self.parts[name])

    def section(self, name: str) -> str:
        """What was printed of a stage."""
        after = self.printed.split(f"\n{name}\n", 1)[1]
        return re.split(rf"\n(?:{'|'.join(STAGES)})\n|\n\ntraining takes ", after)[0]


@pytest.fixture(scope="module")
def planned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    here = tmp_path_factory.mktemp("dry")
    changes = tiny_run(tiny_model, here / "run")
    section: Any = changes["pretrain"]
    # One document twice: a duplicate is left out, and counted.
    text = (EXAMPLES / "text.heldout.txt").read_text(encoding="utf-8").split("\n\n")
    (here / "text.txt").write_text("\n\n".join([*text[:6], text[2]]) + "\n", encoding="utf-8")
    del section["steps"]
    section |= {"epochs": EPOCHS, "sources": [{"path": str(here / "text.txt"), "cleaning": {"contamination": False}}]}
    config = here / "config.yaml"
    config.write_text(yaml.safe_dump(changes, allow_unicode=True), encoding="utf-8")
    return Planned(config, here / "run", dry_run(config))


def expected(row: dict[str, np.ndarray], tokenizer: Tokenizer) -> str:
    """A row as it should be shown, token by token: the loss counts a token where its predecessor's weight says so."""
    texts = []
    for segment in sorted(set(row["segment_ids"].tolist()) - {0}):
        places = np.flatnonzero(row["segment_ids"] == segment).tolist()
        counted = []
        for place in places:
            counts = place > places[0] and row["weights"][place - 1] > 0
            assert not counts or row["labels"][place - 1] == row["tokens"][place]
            counted.append((counts, int(row["tokens"][place])))
        text = ""
        for counts, group in groupby(counted, key=lambda pair: pair[0]):
            words = tokenizer.decode([token for _, token in group]).replace("\n", "↵")
            text += f"⟦{words}⟧" if counts else words
        texts.append(text)
    return " ┃ ".join(texts)


def rows_shown(section: str) -> list[tuple[str, str]]:
    """The rows of a stage as (source, text)."""
    lines = section.split("around what the loss counts\n", 1)[1].rstrip("\n").split("\n")
    return [(source.strip(), text.strip()) for source, text in zip(lines[::2], lines[1::2], strict=True)]


@pytest.mark.parametrize("stage", STAGES)
def test_the_rows_are_the_first_that_are_trained_on_with_the_loss_marked(planned: Planned, stage: str) -> None:
    job, tokenizer = planned.jobs[stage], planned.run.models.tokenizer("vocabulary")
    found = rows_shown(planned.section(stage))
    assert len(found) == 10
    for number, (source, text) in enumerate(found):
        batch, place = divmod(number, 2)
        row = {field: values[place] for field, values in job.batches[batch].items()}
        assert source == job.parts[int(row["sources"])].name
        wanted = expected(row, tokenizer).strip()
        if len(wanted) > CHARACTERS:
            assert re.fullmatch(rf"{re.escape(wanted[:CHARACTERS])}… \({(row['segment_ids'] > 0).sum()} tokens\)", text)
        else:
            assert text == wanted
    if stage == "transfer":  # of a conversation the answer counts, and its end
        assert all(re.search(r"assistant↵⟦(<EN>|<TH>)[^⟦⟧]+<\|im_end\|>⟧", text) for _, text in found)
    else:  # of a text all but its first token, which nothing comes before
        assert all(re.match(r"[^⟦⟧]{1,4}⟦[^⟦⟧]+⟧( ┃ |$)", text) for _, text in found)


def test_the_plan_says_what_would_be_trained_on(planned: Planned) -> None:
    for stage in STAGES:
        section, job = planned.section(stage), planned.jobs[stage]
        epochs = job.batches.epoch(job.config.optimizer.steps)
        for part in job.parts:
            rows = [part.rows.row(number) for number in range(len(part.rows))]
            held = sum(int((row["segment_ids"] > 0).sum()) for row in rows)
            padded = 1 - held / sum(row["segment_ids"].size for row in rows)
            line = next(line for line in section.split("\n") if line.startswith(f"  {part.name} "))
            cells = line.removeprefix(f"  {part.name} ").split()
            assert cells[-5:-3] == [f"{held:,}", str(len(rows))]
            assert cells[-3] == f"{padded:.1%}" and cells[-1] == f"{epochs[part.name]:.2f}"
    assert "pretrain: of 7 items of" in planned.section("pretrain")
    assert "text.txt: 1 exact duplicates" in planned.section("pretrain")
    assert re.search(r"1 pairs\.train\.tsv +60 .* 80% ", planned.section("translate"))
    assert "chains and English answers are known after stage recover" in planned.section("transfer")
    last = planned.printed.rstrip("\n").rsplit("\n", 1)[1]
    assert last.startswith("training takes ") and "without stage recover" in last


def test_steps_follow_from_epochs(planned: Planned) -> None:
    job = planned.jobs["pretrain"]
    steps = math.ceil(EPOCHS * math.ceil(len(job.parts[0].rows) / 2))
    assert 1 < steps != 4
    assert f"  {steps} steps of 2 x 64 tokens: {steps * 128} tokens; warm-up over" in planned.section("pretrain")
    assert "  4 steps of 2 x 256 tokens: 2,048 tokens" in planned.section("transfer")


def test_the_memory_and_the_time_of_a_step(planned: Planned) -> None:
    job = planned.job("pretrain")
    frozen, trained = (
        sum(array.nbytes for array in jax.tree.leaves(tree)) for tree in (job.split.frozen, job.split.trainable)
    )
    cost = measure(job)
    assert (cost.frozen, cost.trainable) == (frozen, trained)
    # Adam's two moments, and a few counters.
    assert 2 * trained <= cost.optimizer < 2 * trained + 1000
    assert cost.temporary > 0 and cost.memory == frozen + trained + cost.optimizer + cost.temporary
    assert cost.seconds is not None and cost.seconds > 0
    section = planned.section("pretrain")
    assert f"frozen {frozen / 2**20:.2f} MiB, trained {trained / 2**10:.0f} KiB, optimizer" in section
    speed = re.search(r"([\d.]+) (m?s) a step measured here, ([\d,]+) tokens/s", section)
    assert speed is not None
    seconds = float(speed[1]) / (1000 if speed[2] == "ms" else 1)
    # The seconds are printed with a decimal or two.
    assert float(speed[3].replace(",", "")) == pytest.approx(2 * 64 / seconds, rel=0.1)


def test_a_step_that_does_not_fit_is_not_tried(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "free_memory", lambda _: 0)
    cost = measure(planned.job("pretrain"))
    assert cost.seconds is None and cost.temporary > 0


def test_nothing_is_trained(planned: Planned) -> None:
    made = {path.name for path in planned.workdir.iterdir() if not path.name.startswith(".")}
    assert {"base", "vocabulary", "tokens", "run.yaml"} <= made
    assert not made & {*STAGES, "recover", "evaluation", "export", "report.html"}
    assert not list(planned.workdir.rglob("checkpoints")) and not list(planned.workdir.rglob("metrics.jsonl"))


def test_what_follows_begins_from_what_was_made(
    planned: Planned, transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> dict[str, tuple[str, int]]:
        files = [path for name in ("base", "vocabulary") for path in (planned.workdir / name).rglob("*")]
        return {str(path): (sha256_of(path), path.stat().st_mtime_ns) for path in files if path.is_file()}

    before, cached = kept(), sorted(path.name for path in (planned.workdir / "tokens").iterdir())
    code, again = transllm("run", planned.config, "--dry-run")
    assert code == 0 and kept() == before
    assert sorted(path.name for path in (planned.workdir / "tokens").iterdir()) == cached
    assert again.startswith("\npretrain\n") and "new tokens" not in again and "documents" not in again
    assert "1 exact duplicates" in again  # which is told again

    begun: list[str] = []
    monkeypatch.setattr(pipeline, "_do", lambda _, step, *__, **___: begun.append(step.name))
    code, _ = transllm("run", planned.config)
    assert code == 0
    assert begun == [name for name in steps.NAMES if name not in ("base", "vocabulary")]


@pytest.mark.parametrize("option", ["--until=pretrain", "--force=pretrain", "--profile=3"])
def test_an_option_that_means_nothing_is_refused(tiny_config_file: Path, transllm: Command, option: str) -> None:
    code, printed = transllm("run", tiny_config_file, "--dry-run", option)
    assert code == 2 and "--dry-run trains nothing; leave --until, --force and --profile out" in printed
    assert not (tiny_config_file.parent / "run").exists()


def test_bad_text_is_refused_with_its_place(tiny_config_file: Path, transllm: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("one\n\ntwo\a\n", encoding="utf-8")
    code, printed = transllm(
        "run", tiny_config_file, "--dry-run", f"translate.sources=[{{path: {tmp_path / 'bad.txt'}}}]"
    )
    assert code == 2 and "bad.txt:3" in printed and "U+0007" in printed
    assert not (tmp_path / "run" / "pretrain").exists()


@pytest.mark.slow
def test_bad_rows_are_said_counted_and_written(tiny_model: Path, tmp_path: Path) -> None:
    """In the corpus of stage 1, in a source of a training, and in the pairs of instructions."""
    pairs = tmp_path / "pairs.tsv"
    good = (EXAMPLES / "pairs.train.tsv").read_text(encoding="utf-8").splitlines()[:1500]
    pairs.write_text(
        "\n".join(["en\tth", *good[:9], "one\ttwo\tthree", *good[9:], "a <TH>\tก"]) + "\n", encoding="utf-8"
    )
    changes: Any = tiny_run(tiny_model, tmp_path / "run")
    source = {"path": str(pairs), "format": "pairs", "on_bad_rows": "skip"}
    changes["vocabulary"]["corpus"] = [source]
    changes["translate"]["sources"] = [source]
    changes["transfer"]["pairs"] = source
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(changes, allow_unicode=True), encoding="utf-8")
    said = dry_run(config)
    for stage in ("vocabulary", "translate", "transfer"):
        path = tmp_path / "run" / stage / "bad_rows.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [(row["place"], row["reason"]) for row in rows[:2]] == [
            (f"{pairs}:1", "header line"),
            (f"{pairs}:11", "not one tab"),
        ]
        # A marker of the chain is a word to the base's tokenizer, which is all that stage 1 has.
        assert [row["reason"] for row in rows[2:]] == ([] if stage == "vocabulary" else ["special token"])
        assert f"1 not one tab, the first: {pairs}:11 has 2 tabs" in said
    manifest = json.loads((tmp_path / "run" / "vocabulary" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["summary"]["left_out"] == {"bad rows: header line": 1, "bad rows: not one tab": 1}
