"""`lora: none` (full fine-tuning) and `embeddings: none` from the config to the export, on a tiny Qwen3 with biases."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from conftest import Command, call, random_weights, tiny_config, tiny_run
from tiny_tokenizer import build_tiny_tokenizer

from conversion.hf.directory import open_hf, read_weights, write_model
from conversion.merged import Merged
from conversion.names import tensors
from transllm_jax.commands.chat import open_session
from transllm_jax.commands.open_model import open_source
from transllm_jax.config import load_config
from transllm_jax.errors import UserError
from transllm_jax.generation.sampling import Sampling
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.config import LlamaConfig
from transllm_jax.progress import Progress
from transllm_jax.stages import base, steps, training, transfer, vocabulary
from transllm_jax.stages.manifest import Artifact
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays
from transllm_jax.training.loop import Outcome

POINTS = ("vocabulary", "pretrain", "translate", "transfer")
BASE_ROWS = {"vocabulary.base", "vocabulary.output_base"}
NEW_ROWS = {"vocabulary.new", "vocabulary.output_new"}
# What stays as it is, by the config's `embeddings`.
HELD = {"new": BASE_ROWS, "all": set(), "none": BASE_ROWS | NEW_ROWS}


def write_qwen(directory: Path, dtype: str) -> LlamaConfig:
    """An untied Qwen3 with biases and norms of queries and keys: every kind of weight that there is."""
    tokenizer = build_tiny_tokenizer(directory.with_name("tokenizer"))
    shape = replace(tiny_config(Tokenizer.load(tokenizer).vocab_size, tied=False), model_type="qwen3")
    config = replace(shape, attention_bias=True)
    extra = {"eos_token_id": Tokenizer.load(tokenizer).eos_id}
    write_model(directory, config, random_weights(config), dtype=dtype, tokenizer_dir=tokenizer, extra_config=extra)
    return config


def write_config(directory: Path, model: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = tiny_run(model, directory / "run", **changes)
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


def opened(workdir: Path) -> Run:
    return Run(load_config(workdir / "run.yaml"), workdir, Progress(quiet=True), Interrupt())


def arrays(workdir: Path, point: str) -> dict[str, np.ndarray]:
    return load_arrays(workdir / point / "trainable")


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    assert before.keys() == after.keys()
    return {path for path in after if before[path].tobytes() != after[path].tobytes()}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16."""
    directory = tmp_path_factory.mktemp("qwen") / "model"
    write_qwen(directory, "bfloat16")
    return directory


@pytest.fixture(scope="module", params=HELD)
def finished(request: pytest.FixtureRequest, qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """`embeddings`, and the work directory of a whole run of full fine-tuning."""
    here = tmp_path_factory.mktemp(f"full-{request.param}")
    assert call("run", write_config(here, qwen, lora="none", embeddings=request.param)) == 0
    return request.param, here / "run"


@pytest.fixture
def command(transllm: Command) -> Command:
    """Runs `transllm convert ARGUMENTS`."""
    return partial(transllm, "convert")


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in float32."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def our_logits(workdir: Path, point: str, ids: list[int]) -> np.ndarray:
    """The logits [T, V + n] of a point, as training computes them."""
    model = opened(workdir).split(point).merge()
    tokens = jnp.asarray([ids])
    hidden = model(tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
    return np.asarray(model.vocabulary.logits(hidden))[0]


def their_logits(directory: Path, ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


# --- the run --------------------------------------------------------------------------------------------------------


def test_all_weights_train_and_what_is_held_keeps_its_bits(finished: tuple[str, Path], qwen: Path) -> None:
    embeddings, workdir = finished
    original = read_weights(qwen)
    before = arrays(workdir, "vocabulary")
    assert before.keys() == original.keys() | NEW_ROWS
    for path, weights in original.items():
        np.testing.assert_array_equal(before[path], weights, err_msg=path)
    for point in POINTS[1:]:
        after = arrays(workdir, point)
        # Norms, biases, and the norms of queries and keys among them.
        assert moved(before, after) == after.keys() - HELD[embeddings], point
        before = after
    assert {"blocks.attention.k_norm.scale", "blocks.attention.v.bias", "final_norm.scale"} <= original.keys()


def test_the_counts_are_of_what_trains(finished: tuple[str, Path]) -> None:
    embeddings, workdir = finished
    trains = arrays(workdir, "vocabulary").keys() - HELD[embeddings]
    report = json.loads((workdir / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert report["trainable_parameters"] == sum(arrays(workdir, "vocabulary")[path].size for path in trains)
    assert report["frozen_parameters"] == sum(weights.size for weights in read_weights(workdir / "base").values())
    saved = json.loads((workdir / "transfer/checkpoints/4/state/_METADATA").read_text(encoding="utf-8"))
    paths = [path for path in saved["tree_metadata"] if path.startswith("('trainable'")]
    assert len(paths) == len(trains), "the optimizer has no moments of what is held"


def test_the_teacher_stays_the_original_model(finished: tuple[str, Path], qwen: Path) -> None:
    _, workdir = finished
    results = json.loads((workdir / "evaluation" / "results.json").read_text(encoding="utf-8"))
    drift = results["metrics"]["english_kl"]
    assert drift["base"] == 0 and min(drift[point] for point in POINTS[1:]) > 0
    assert all(np.isfinite(value) for values in results["metrics"].values() for value in values.values())
    run, original = opened(workdir), read_weights(qwen)
    for path, array in run.models.split("base").frozen.items():
        assert np.asarray(array).tobytes() == original[path].tobytes(), path
    # What the chains are made of are its answers.
    ids = [1, 5, 9, 40, 200, 17]
    assert np.abs(our_logits(workdir, "base", ids) - our_logits(workdir, "transfer", ids)[:, :400]).max() > 0.1
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "tiny to Thai" in page


def test_run_yaml_can_be_read_again(finished: tuple[str, Path], transllm: Command) -> None:
    embeddings, workdir = finished
    config = load_config(workdir / "run.yaml")
    assert config.lora is None and config.embeddings == embeddings
    code, printed = transllm("run", workdir / "run.yaml")
    assert code == 0 and "All is done" in printed
    code, printed = transllm("status", workdir)
    assert code == 0, printed


def begun(directory: Path, model: Path, **changes: Any) -> Run:
    """A run of which stages base and vocabulary are done, nothing measured."""
    config = load_config(write_config(directory, model, **changes))
    run = Run(config, directory / "run", Progress(quiet=True), Interrupt())
    base.run_stage(run, run.models.base)
    vocabulary.run_stage(run, run.workdir / "vocabulary")
    return run


@pytest.mark.parametrize(("lora", "embeddings"), [("none", "new"), ({"rank": 4}, "all")])
def test_a_base_of_a_wider_type_than_the_run_keeps_its_bits(tmp_path: Path, lora: Any, embeddings: str) -> None:
    """What trains begins at the base's own float32 values, whatever is computed in; held rows stay there."""
    write_qwen(tmp_path / "model", "float32")
    path = write_config(tmp_path, tmp_path / "model", lora=lora, embeddings=embeddings)
    run = Run(load_config(path, ["model.dtype=bfloat16"]), tmp_path / "run", Progress(quiet=True), Interrupt())
    base.run_stage(run, run.models.base)
    vocabulary.run_stage(run, run.workdir / "vocabulary")
    original, begun_at = read_weights(tmp_path / "model"), arrays(run.workdir, "vocabulary")
    copied = {path.removesuffix("_trained"): array for path, array in begun_at.items()}
    for path in original if lora == "none" else BASE_ROWS:
        assert copied[path].dtype == np.float32 and copied[path].tobytes() == original[path].tobytes(), path
    assert all(np.any(original[path] != bfloat16(original[path])) for path in BASE_ROWS)
    if lora == "none":
        job = training.prepare(
            run,
            run.workdir / "pretrain",
            name="pretrain",
            start="vocabulary",
            parts=training.source_parts(run, "pretrain"),
        )
        assert job.held.keys() == BASE_ROWS
        for path, array in job.held.items():
            assert np.asarray(array).tobytes() == original[path].tobytes()
        assert all(array.dtype == jnp.float32 for array in job.split.trainable.values())


# --- another kind of run on the same directory -----------------------------------------------------------------------


@pytest.mark.parametrize("after", ["none", {"rank": 4}])
def test_full_fine_tuning_and_adapters_do_not_share_a_directory(
    qwen: Path, tmp_path: Path, transllm: Command, after: Any
) -> None:
    then, now = ("a section", "none") if after == "none" else ("none", "a section")
    before = {"rank": 4} if after == "none" else "none"
    assert transllm("run", write_config(tmp_path, qwen, lora=before), "--until", "vocabulary")[0] == 0
    kept = (tmp_path / "run" / "run.yaml").read_bytes()
    code, printed = transllm("run", write_config(tmp_path, qwen, lora=after), "--until", "vocabulary")
    assert code == 2 and printed.count("\n") == 1
    assert f"vocabulary was made with other inputs: lora ({then} -> {now}); redo it with --force vocabulary" in printed
    assert (tmp_path / "run" / "run.yaml").read_bytes() == kept
    # As the message says.
    again = ("run", tmp_path / "config.yaml", "--until", "vocabulary", "--force", "vocabulary")
    assert transllm(*again)[0] == 0
    full = "blocks.mlp.up.kernel" in arrays(tmp_path / "run", "vocabulary")
    assert full == (after == "none")


def test_a_change_between_a_value_and_a_section_is_one_change(tmp_path: Path) -> None:
    made = Artifact(tmp_path, "step")
    made.begin({"lora.rank": 4, "lora.alpha": 8, "lorax": 1, "file a": "1", "file a.txt": "1", "same.x": None})
    given = {"lora": None, "lorax": 2, "file a": "2", "file a.txt": "2", "same.x": None}
    assert made.changes(given) == {
        "lora": ("a section", None),
        "lorax": (1, 2),
        "file a": ("1", "2"),
        "file a.txt": ("1", "2"),
    }


# --- conversion -----------------------------------------------------------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize("point", [*POINTS, "export"])
def test_transformers_computes_what_training_did(
    finished: tuple[str, Path], tmp_path: Path, command: Command, point: str
) -> None:
    _, workdir = finished
    out = workdir / "export"
    if point != "export":
        out = tmp_path / "out"
        code, printed = command("to-hf", workdir, out, "--stage", point, "--dtype", "float32")
        assert code == 0, printed
    ids = Tokenizer.load(out).encode("ประเทศไทย and the capital of France")
    wanted = our_logits(workdir, "transfer" if point == "export" else point, ids)
    assert max(ids) >= 400 and wanted.std() > 0.3
    # Float32 sums in another order.
    assert np.abs(their_logits(out, ids) - wanted).max() < 1e-4


def test_every_tensor_is_the_trained_one_rounded_once(
    finished: tuple[str, Path], tmp_path: Path, command: Command
) -> None:
    _, workdir = finished
    code, printed = command("to-hf", workdir, tmp_path / "out")
    assert code == 0
    # The type is the base's own.
    written, exact, base = (read_weights(place) for place in (tmp_path / "out", workdir / "export", workdir / "base"))
    trained = arrays(workdir, "transfer")
    largest = error = change = 0.0
    for path, values in exact.items():
        whole = trained[path]
        if path in BASE_ROWS:
            whole = np.concatenate([whole, trained[path.replace("base", "new")]])
        assert values.tobytes() == whole.tobytes(), path
        np.testing.assert_array_equal(written[path], bfloat16(whole), err_msg=path)
        if path not in BASE_ROWS:
            rounding = np.abs(written[path] - whole).astype(np.float64)
            largest, error = max(largest, rounding.max()), error + float(np.sum(rounding**2))
            change += float(np.sum((whole.astype(np.float64) - base[path]) ** 2))
    assert {open_hf(tmp_path / "out").dtype(tensor).name for tensor in tensors(open_hf(tmp_path / "out").config)} == {
        "bfloat16"
    }
    assert (
        f"all weights trained in float32, rounded once to bfloat16: no weight moved by more than {largest:.2g}, "
        f"all together by {(error / change) ** 0.5:.2%} of what training changed"
    ) in printed
    assert "written against trained, logits of" in printed


def test_a_run_and_its_export_are_the_same(finished: tuple[str, Path], command: Command) -> None:
    _, workdir = finished
    code, printed = command("verify", workdir, workdir / "export")
    assert code == 0 and printed.splitlines()[-1] == "the same", printed
    code, printed = command("verify", workdir, workdir / "export", "--stage-a", "translate")
    assert code == 1 and "they differ" in printed


def test_there_are_no_adapters_to_keep_apart(finished: tuple[str, Path], tmp_path: Path, command: Command) -> None:
    _, workdir = finished
    for arguments in (("to-peft", workdir, tmp_path / "out"), ("to-hf", workdir, tmp_path / "out", "--unmerged")):
        code, printed = command(*arguments)
        assert code == 2 and printed.count("\n") == 1, printed
        assert f"{workdir} has no adapters" in printed and "all of its weights were trained: lora is none" in printed
    assert not (tmp_path / "out").exists()
    model = open_source(str(workdir)).model
    assert isinstance(model, Merged)
    with pytest.raises(UserError, match="no adapters to keep apart"):
        Merged(model.base, model.trainable, 1.0, merge_adapters=False)


def test_chat_speaks_with_both_models(finished: tuple[str, Path], transllm: Command) -> None:
    _, workdir = finished
    question = "ประเทศไทย"
    said = {}
    for name, where, options in (
        ("moved", workdir, {}),
        ("original", workdir, {"base": True}),
        ("exported", workdir / "export", {}),
        ("imported", workdir / "base", {}),
    ):
        session = open_session(where, max_new_tokens=12, sampling=Sampling(3.0, seed=1), **options)
        said[name] = list(session.ask(question))[-1].raw
    assert said["moved"] == said["exported"] != said["original"] == said["imported"]
    for options in ([], ["--base"]):
        code, printed = transllm("chat", workdir, question, "--max-new-tokens", "4", *options)
        assert code == 0, printed


class Counting:
    """A base that counts what is read of it."""

    def __init__(self, model: Any) -> None:
        self.model, self.count = model, 0
        self.where, self.config, self.dtype = model.where, model.config, model.dtype

    def read(self, tensor: Any) -> np.ndarray:
        self.count += 1
        return np.asarray(self.model.read(tensor))


def test_a_merged_model_of_full_fine_tuning_holds_nothing_besides(qwen: Path) -> None:
    base = Counting(open_hf(qwen))
    trained: dict[str, np.ndarray] = {path: array + 1 for path, array in random_weights(base.config, 5).items()}
    trained |= {path: np.full((3, 48), 0.5, np.float32) for path in NEW_ROWS}
    model = Merged(base, trained, 1.0)
    assert model.full and model.config.vocab_size == base.config.vocab_size + 3
    for tensor in tensors(model.config):
        array = model.read(tensor)
        assert array.shape == tensor.shape and array.dtype == np.float32 == model.dtype(tensor)
        assert model.stored(tensor) == ml_dtypes.bfloat16
        if tensor.path not in BASE_ROWS:  # grown: copied while it is read
            assert np.shares_memory(array, trained[tensor.path]), tensor.name
    assert base.count == 0


def test_what_does_not_fit_the_base_is_refused(qwen: Path) -> None:
    base = open_hf(qwen)
    weights = random_weights(base.config)
    rows = {path: np.ones((3, 48), np.float32) for path in NEW_ROWS}
    assert Merged(base, {**weights, **rows}, 1.0).new_rows == 3
    bad = {**weights, **rows, "blocks.mlp.up.a": np.zeros((2, 48, 4), np.float32)}
    del bad["blocks.attention.q.bias"], bad["vocabulary.output_new"]
    bad["final_norm.scale"] = np.ones(47, np.float32)
    with pytest.raises(UserError) as found:
        Merged(base, bad, 1.0)
    said = str(found.value)
    for fault in (
        "what was trained does not fit the base model",
        "blocks.attention.q.bias is missing",
        "vocabulary.output_new is missing",
        "blocks.mlp.up.a is not part of the model",
        "final_norm.scale has shape [47], expected [48]",
    ):
        assert fault in said
    weights["final_norm.scale"][3] = np.nan
    with pytest.raises(UserError, match=r"final_norm\.scale of what was trained has 1 of 48 values NaN"):
        Merged(base, {**weights, **rows}, 1.0)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", HELD)
def test_training_holds_the_base_once(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embeddings: str
) -> None:
    """What is on the device when the first step begins: the base, what trains, what is held of it, and two moments."""
    run = begun(tmp_path, qwen, lora="none", embeddings=embeddings)
    gc.collect()
    known = {id(array) for array in jax.live_arrays()} - {id(array) for array in run.models.frozen.values()}
    seen: dict[str, int] = {}

    def look(split: Any, *_: Any, **__: Any) -> Outcome:
        gc.collect()
        seen["held"] = sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)
        seen["trains"] = sum(array.nbytes for array in split.trainable.values())
        return Outcome(split.trainable, 0)

    monkeypatch.setattr(training, "train", look)
    monkeypatch.setattr(training, "_told", lambda *_: {})
    training.train_stage(
        run,
        tmp_path / "run" / "pretrain",
        name="pretrain",
        start="vocabulary",
        parts=training.source_parts(run, "pretrain"),
    )
    frozen = sum(array.nbytes for array in run.models.frozen.values())
    rows = sum(
        array.nbytes for path, array in arrays(tmp_path / "run", "vocabulary").items() if path in HELD[embeddings]
    )
    assert seen["held"] == frozen + seen["trains"] + rows


# --- what the last stage trains on ------------------------------------------------------------------------------------

TALKS = [("What do bees make?", "Honey."), ("ผึ้งทำอะไร", "น้ำผึ้ง"), ("Say a word.", "Moon, of course.")]


def in_three_forms(talks: list[tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """The same conversations as the reference code's records, as OpenAI's, and as Alpaca's."""
    return {
        "conversations": [
            {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]}
            for ask, answer in talks
        ],
        "messages": [
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
            for ask, answer in talks
        ],
        "alpaca": [{"instruction": ask, "input": "", "output": answer} for ask, answer in talks],
    }


def write_talks(directory: Path) -> list[dict[str, Any]]:
    """Sources of the three forms, with weights."""
    sources = []
    for weight, (form, records) in zip((0.2, 0.3, 0.5), in_three_forms(TALKS).items(), strict=True):
        path = directory / f"{form}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        sources.append({"path": str(path), "format": "conversations", "weight": weight})
    return sources


@pytest.fixture(scope="module")
def adapted(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run with adapters and held rows, whose last stage reads conversations and no chains."""
    here = tmp_path_factory.mktemp("adapted")
    section: dict[str, Any] = {**tiny_run(qwen, here)["transfer"]}  # type: ignore[dict-item]
    section |= {"chains": 0, "sources": write_talks(here), "steps": 8}
    assert call("run", write_config(here, qwen, embeddings="none", transfer=section)) == 0
    return here / "run"


def test_held_rows_with_adapters_keep_their_bits(adapted: Path, qwen: Path) -> None:
    first = before = arrays(adapted, "vocabulary")
    assert before.keys() > NEW_ROWS
    for point in POINTS[1:]:
        after = arrays(adapted, point)
        assert moved(before, after) == after.keys() - NEW_ROWS, point
        before = after
    out, size = read_weights(adapted / "export"), len(read_weights(qwen)["vocabulary.base"])
    for path, table in (("vocabulary.new", "vocabulary.base"), ("vocabulary.output_new", "vocabulary.output_base")):
        assert out[table][size:].tobytes() == first[path].tobytes()
    # The vocabulary's rows do not count as trained.
    report = json.loads((adapted / "vocabulary/report.json").read_text(encoding="utf-8"))
    assert report["trainable_parameters"] == sum(first[path].size for path in first.keys() - NEW_ROWS)


def test_weights_of_0_leave_a_part_out_and_conversations_join_in(adapted: Path) -> None:
    manifest = json.loads((adapted / "transfer/manifest.json").read_text(encoding="utf-8"))
    sources, names = manifest["summary"]["sources"], ["1 conversations.jsonl", "2 messages.jsonl", "3 alpaca.jsonl"]
    assert list(sources) == ["english", "translations", *names]
    assert all(sources[name]["items"] == 3 and sources[name]["epochs"] > 0 for name in names)
    config = load_config(adapted / "run.yaml", ["transfer.english=0", "transfer.translations=0"])
    run = Run(config, adapted, Progress(quiet=True), Interrupt())
    tokenizer, parts = run.models.tokenizer("vocabulary"), transfer.parts(run)
    assert [part.name for part in parts] == names and [part.weight for part in parts] == [0.2, 0.3, 0.5]
    rows = [[part.rows.row(number) for number in range(len(part.rows))] for part in parts]
    assert len(rows[0]) == len(rows[1]) == len(rows[2]) > 0
    for one, other, third in zip(*rows, strict=True):
        for field in one:
            np.testing.assert_array_equal(one[field], other[field], err_msg=field)
            np.testing.assert_array_equal(one[field], third[field], err_msg=field)
    trained = [row["labels"][row["weights"] > 0].tolist() for row in rows[0]]
    said = tokenizer.decode([number for labels in trained for number in labels])
    # The loss is on the answers, and on the token that ends each.
    assert sorted(said.replace("<|im_end|>", "\n").split("\n")) == sorted([*(answer for _, answer in TALKS), ""])
    whole = "".join(tokenizer.decode(row["tokens"].tolist()) for row in rows[0])
    assert all(f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n{answer}" in whole for ask, answer in TALKS)


def test_a_last_stage_of_nothing_is_refused(qwen: Path, tmp_path: Path, transllm: Command) -> None:
    section: dict[str, Any] = {**tiny_run(qwen, tmp_path)["transfer"], "chains": 0}  # type: ignore[dict-item]
    for changes, said in (
        ({"english": 0, "translations": 0}, "nothing is left to train on"),
        (
            {"sources": [{"path": str(tmp_path / "talks.jsonl"), "format": "conversations"}]},
            "each of the sources needs a weight",
        ),
    ):
        config = write_config(tmp_path, qwen, transfer={**section, **changes})
        code, printed = transllm("run", config)
        assert code == 2 and said in printed and printed.count("\n") == 1


def test_the_pipeline_knows_the_stages_of_these_tests() -> None:
    assert {*POINTS, "export"} <= set(steps.NAMES)
