"""The whole run on a tiny random model: every stage, its resumption, its export, and what must never change."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import copy_run, tiny_run, write_config

from transllm_jax.choices import POINTS, TRAININGS
from transllm_jax.cli import main as cli
from transllm_jax.config import load_config
from transllm_jax.conversion.hf.directory import read_weights
from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.disk import sha256_of
from transllm_jax.errors import Preempted, UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.parameters import assemble, count_parameters, load_frozen
from transllm_jax.progress import Progress
from transllm_jax.stages import pipeline, steps
from transllm_jax.stages.run import Run
from transllm_jax.training.arrays import load_arrays
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from transllm_jax.training.record.metrics import read_rows

# What must be the same, byte for byte, however often a run was cut off.
FILES = (
    *(f"recover/{name}.jsonl" for name in ("answers", "translations", "chains")),
    *(f"evaluation/{point}/results.json" for point in POINTS),
)


class Soon(Interrupt):
    """A stop is asked for just before the run looks for it the n-th time."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._left = looks

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        assert not value


def execute(config: Path, **options: Any) -> bool:
    settings = load_config(config)
    return pipeline.run_pipeline(settings, Path(settings.workdir), Progress(quiet=True), Interrupt(), **options)


@pytest.fixture(scope="module")
def again(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The `Run` of another run of the same config, with what it has in memory at its end."""
    here = tmp_path_factory.mktemp("again")
    made: list[Run] = []

    class Kept(Run):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Run", Kept)
        assert execute(write_config(here / "config.yaml", tiny_run(finished_run.parent / "model", here / "run")))
    return made[0]


def adapters(workdir: Path, point: str) -> dict[str, np.ndarray]:
    return load_arrays(workdir / point / "trainable")


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(left[k].tobytes() == right[k].tobytes() for k in left)


def test_a_run_leaves_what_is_promised(finished_run: Path) -> None:
    workdir = finished_run
    for name in steps.NAMES:
        manifest = steps.artifact(workdir, name).manifest()
        assert manifest is not None and manifest["state"] == "done", name
    results = json.loads((workdir / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert set(results["metrics"]) == {
        "bits_per_byte",
        "tokens_per_character",
        "chrf_to_target",
        "chrf_to_english",
        "english_kl",
        "well_formed_chains",
    }
    for values in results["metrics"].values():
        assert set(values) == set(POINTS) and all(np.isfinite(value) for value in values.values())
    assert results["metrics"]["english_kl"]["base"] == 0
    assert results["metrics"]["english_kl"]["transfer"] > 0
    assert results["metrics"]["tokens_per_character"]["transfer"] < results["metrics"]["tokens_per_character"]["base"]
    assert len(results["losses"]["pretrain"]) == 4
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "tiny to Thai" in page and f"{results['metrics']['bits_per_byte']['transfer']:.3f}" in page


def test_a_trace_of_each_training_is_left_where_asked_for(finished_run: Path) -> None:
    workdir = finished_run
    for point in TRAININGS:
        (trace,) = (workdir / point / "profile").glob("plugins/profile/*/*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        # The third step of a session, counted from 0; the viewers go by its name and number.
        steps = {dict(event.stats).get("step_num") for event in events if event.name == "train"}
        assert steps == {2}, point


def test_each_stage_trains_and_hands_on(finished_run: Path) -> None:
    workdir = finished_run
    before = adapters(workdir, "vocabulary")
    for point in TRAININGS:
        after = adapters(workdir, point)
        moved = [path for path in after if not np.array_equal(before[path], after[path])]
        assert set(moved) == set(after), point  # adapters of all seven projections, and the new rows
        before = after


def test_frozen_is_frozen(finished_run: Path, again: Run) -> None:
    model = finished_run.parent / "model"
    assert sha256_of(finished_run / "base" / "model.safetensors") == sha256_of(model / "model.safetensors")
    original = read_weights(model)
    assert set(again.models.frozen) == set(original)
    for path, array in again.models.frozen.items():  # the very arrays that all four stages trained with
        assert np.asarray(array).tobytes() == original[path].tobytes(), path


def test_the_optimizer_knows_trainable_arrays_only(again: Run) -> None:
    run = again
    split = run.models.split("transfer")
    assert not set(split.trainable) & set(split.frozen)
    state = make_optimizer(OptimizerConfig(1e-3, 4, 1)).init(split.trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * count_parameters(split.trainable)
    saved = json.loads(
        (run.workdir / "transfer" / "checkpoints" / "4" / "state" / "_METADATA").read_text(encoding="utf-8")
    )
    assert not [path for path in saved["tree_metadata"] if "kernel" in path or "vocabulary.base" in path]


def test_adapters_off_is_the_original_model(finished_run: Path, again: Run) -> None:
    run = again
    original = read_weights(finished_run.parent / "model")
    imported = assemble(run.models.config, load_frozen(run.models.config, original)).merge()
    moved = run.models.split("transfer").merge()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, run.models.config.vocab_size, (2, 24)))
    positions, segments = jnp.broadcast_to(jnp.arange(24), (2, 24)), jnp.ones((2, 24), jnp.int32)
    wanted = imported.vocabulary.logits(imported(tokens, positions, segments))
    got = moved.vocabulary.logits(moved(tokens, positions, segments, adapters=False), base_only=True)
    assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
    on = moved.vocabulary.logits(moved(tokens, positions, segments), base_only=True)
    assert not np.array_equal(on, wanted)


def test_recovered_answers_are_the_original_models(finished_run: Path) -> None:
    workdir = finished_run
    answers = read_jsonl(workdir / "recover" / "answers.jsonl", required=("instruction",))
    chains = read_jsonl(workdir / "recover" / "chains.jsonl", required=("question", "answer_en", "answer"))
    assert len(answers) == 6 and 0 < len(chains) <= 6
    by_instruction = {row["instruction"]: row["answer"] for row in answers}
    for row in chains:
        assert row["answer_en"] == by_instruction[row["question_en"]]
        assert row["translated_by"] == {"question": "file", "answer": "model"}


def test_the_second_run_has_nothing_to_do(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir = finished_run.parent / "config.yaml", finished_run
    monkeypatch.setattr(pipeline, "_do", lambda *_, **__: pytest.fail("a step was done again"))
    assert not execute(config)
    monkeypatch.setattr(sys, "argv", ["transllm", "run", str(config)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "All is done" in printed and str(workdir / "report.html") in printed.replace("\n", "")


def test_the_same_seed_gives_the_same_bytes(finished_run: Path, again: Run, tmp_path: Path) -> None:
    for point in ("vocabulary", *TRAININGS):
        assert same(adapters(finished_run, point), adapters(again.workdir, point)), point
    for name in FILES:
        assert (finished_run / name).read_bytes() == (again.workdir / name).read_bytes(), name
    other = tiny_run(finished_run.parent / "model", tmp_path / "other", seed=2)
    execute(write_config(tmp_path / "other.yaml", other), until="pretrain")
    assert not (tmp_path / "other" / "translate").exists()
    assert not same(adapters(finished_run, "pretrain"), adapters(tmp_path / "other", "pretrain"))


def test_a_changed_config_is_refused_by_key_and_force_redoes_what_builds_on_it(
    finished_run: Path, tmp_path: Path
) -> None:
    config = copy_run(finished_run, tmp_path)
    assert not execute(config)
    kept = adapters(tmp_path / "run", "pretrain")
    done = (tmp_path / "run" / "pretrain" / "manifest.json").stat().st_mtime_ns
    changed: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    changed["translate"]["learning_rate"] = 5e-3
    write_config(config, changed)
    with pytest.raises(UserError, match=r"translate\.learning_rate \(0\.01 -> 0\.005\).*--force translate"):
        execute(config)
    before = adapters(tmp_path / "run", "transfer")
    execute(config, force="translate")
    assert (tmp_path / "run" / "pretrain" / "manifest.json").stat().st_mtime_ns == done
    assert same(adapters(tmp_path / "run", "pretrain"), kept)
    assert not same(adapters(tmp_path / "run", "transfer"), before)
    assert not execute(config)


# Steps that a run may have done before a test goes on with it.
BEFORE = ("base", "vocabulary", "pretrain", *(f"evaluation/{point}" for point in ("base", "vocabulary", "pretrain")))


def test_stopped_on_request_it_goes_on(finished_run: Path, tmp_path: Path) -> None:
    workdir = finished_run
    config = copy_run(finished_run, tmp_path, BEFORE)
    shutil.copy(finished_run / "evaluation" / "original_answers.json", tmp_path / "run" / "evaluation")
    settings = load_config(config)
    stops: list[str] = []
    looks = 1
    for _ in range(100):
        # Ctrl-C comes when the run looks for it for the first time; later, where nothing was whole by then.
        try:
            pipeline.run_pipeline(settings, tmp_path / "run", Progress(quiet=True), Soon(looks))
            break
        except Preempted as stopped:
            stops.append(str(stopped))
            looks = looks + 1 if stops[-2:-1] == stops[-1:] else 1
    for piece in ("of 5 parts", "answers:", "translations:", "stopped at step"):
        assert any(piece in line for line in stops), piece
    for point in TRAININGS:
        assert same(adapters(workdir, point), adapters(tmp_path / "run", point)), point
        # The losses, too, and no step twice.
        assert read_rows(workdir / point / "metrics.jsonl") == read_rows(tmp_path / "run" / point / "metrics.jsonl")
    for name in FILES:
        assert (workdir / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


# Signs of: an evaluation, a stage's training, the save of a checkpoint, answers, translations.
SIGNS = (
    "evaluation/base/so_far.json",
    "pretrain/metrics.jsonl",
    "translate/checkpoints",
    "recover/answers.jsonl",
    "recover/translations.jsonl",
    "transfer/metrics.jsonl",
)


@pytest.mark.slow
@pytest.mark.parametrize("signs", [SIGNS[1:2], pytest.param(SIGNS, marks=pytest.mark.full)], ids=["one", "six"])
def test_killed_at_any_moment_it_goes_on(finished_run: Path, tmp_path: Path, signs: tuple[str, ...]) -> None:
    workdir = finished_run
    config = write_config(tmp_path / "config.yaml", tiny_run(finished_run.parent / "model", tmp_path / "run"))
    command = [sys.executable, "-m", "transllm_jax.cli.main", "run", str(config)]
    # All stages where they are killed.
    points = TRAININGS if signs == SIGNS else TRAININGS[:1]
    command += [] if signs == SIGNS else ["--until", *points]
    # Some moments after the first sign of each piece of work, other ones in every run of this test.
    moments = random.Random(os.getpid())
    kills = 0
    for sign in signs:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not (tmp_path / "run" / sign).exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read().decode()  # type: ignore[union-attr]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=240)
    # A short piece of work may be over before the kill.
    assert kills >= max(1, len(signs) // 3)
    for point in points:
        assert same(adapters(workdir, point), adapters(tmp_path / "run", point)), point
        assert read_rows(workdir / point / "metrics.jsonl") == read_rows(tmp_path / "run" / point / "metrics.jsonl")
    for name in FILES if signs == SIGNS else ():
        assert (workdir / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_one_run_at_a_time(tiny_config_file: Path) -> None:
    from transllm_jax.disk import locked

    workdir = Path(load_config(tiny_config_file).workdir)
    with locked(workdir), pytest.raises(UserError, match="another run"):
        execute(tiny_config_file)


@pytest.mark.reference
def test_the_export_is_the_model_in_transformers(finished_run: Path, again: Run) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workdir, run = finished_run, again
    model = AutoModelForCausalLM.from_pretrained(workdir / "export", dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(workdir / "export")
    ours, tokenizer = run.models.split("transfer").merge(), run.models.tokenizer("transfer")
    assert model.config.tie_word_embeddings and model.get_input_embeddings().weight.shape[0] == len(theirs)
    for text in ("The cat sits on the warm roof.", "แมวนั่งอยู่บนหลังคา <TH>ฝนตก", "<EN>Hello<RESPONSE>Hi!<TH>สวัสดีครับ"):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        tokens = jnp.asarray([ids])
        hidden = ours(tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits.numpy()
        assert np.abs(np.asarray(ours.vocabulary.logits(hidden)) - wanted).max() < 1e-3
    from transllm_jax.tokenizer.chat import Message, encode_prompt

    messages: list[Message] = [{"role": "user", "content": "วันนี้ฝนตกไหม"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(rendered) == encode_prompt(tokenizer, messages)


def test_chat_speaks_with_the_run_its_original_and_the_export(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transllm_jax.commands.chat import open_session

    workdir = finished_run
    question = "ฝนตกไหม"
    answers = {}
    for name, path, base in (
        ("run", workdir, False),
        ("export", workdir / "export", False),
        ("original", workdir, True),
    ):
        session = open_session(path, base=base, max_new_tokens=12)
        *_, answers[name] = session.ask(question)
    assert answers["run"].raw == answers["export"].raw
    assert answers["run"].raw != answers["original"].raw
    with pytest.raises(UserError, match="special token <TH>"):
        list(open_session(workdir).ask("<TH>x"))
    monkeypatch.setattr(sys, "argv", ["transllm", "chat", str(workdir), question, "--show-chain"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.strip()
