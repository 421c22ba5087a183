"""Whole runs of full fine-tuning (`lora: none`) with each value of `embeddings`, from the config to the export."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Command, call, write_run_config
from full_runs import BASE_ROWS, FROZEN, NEW_ROWS, POINTS, arrays, bfloat16, changed, opened, write_qwen

from transllm_jax.commands.chat import open_session
from transllm_jax.commands.open_model import open_source
from transllm_jax.config import load_config
from transllm_jax.conversion.hf.directory import open_hf, read_weights
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import tensors
from transllm_jax.errors import UserError
from transllm_jax.generation.sampling import Sampling
from transllm_jax.stages import steps
from transllm_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a base model in bfloat16."""
    directory = tmp_path_factory.mktemp("qwen") / "model"
    write_qwen(directory, "bfloat16")
    return directory


# One whole run in make test; test_full_start begins all of them.
RUNS = [pytest.param(name, marks=[pytest.mark.full] if name != "new" else []) for name in FROZEN]


@pytest.fixture(scope="module", params=RUNS)
def finished(request: pytest.FixtureRequest, qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The value of `embeddings`, and the work directory of a whole run of full fine-tuning."""
    here = tmp_path_factory.mktemp(f"full-{request.param}")
    assert call("run", write_run_config(here, qwen, lora="none", embeddings=request.param)) == 0
    return request.param, here / "run"


@pytest.fixture
def command(transllm: Command) -> Command:
    """Runs `transllm convert ARGUMENTS`."""
    return partial(transllm, "convert")


def our_logits(workdir: Path, point: str, ids: list[int]) -> np.ndarray:
    """The logits [T, V + n] after a stage, as training computes them. V: tokens of the base, n: new tokens."""
    model = opened(workdir).models.split(point).merge()
    tokens = jnp.asarray([ids])
    hidden = model(tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
    return np.asarray(model.vocabulary.logits(hidden))[0]


def their_logits(directory: Path, ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def test_all_weights_train_but_the_frozen_rows(finished: tuple[str, Path], qwen: Path) -> None:
    embeddings, workdir = finished
    original = read_weights(qwen)
    before = arrays(workdir, "vocabulary")
    assert before.keys() == original.keys() | NEW_ROWS
    for path, weights in original.items():
        np.testing.assert_array_equal(before[path], weights, err_msg=path)
    for point in POINTS[1:]:
        after = arrays(workdir, point)
        assert changed(before, after) == after.keys() - FROZEN[embeddings], point
        before = after
    assert {"blocks.attention.k_norm.scale", "blocks.attention.v.bias", "final_norm.scale"} <= original.keys()


def test_parameter_counts(finished: tuple[str, Path]) -> None:
    embeddings, workdir = finished
    trains = arrays(workdir, "vocabulary").keys() - FROZEN[embeddings]
    report = json.loads((workdir / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert report["trainable_parameters"] == sum(arrays(workdir, "vocabulary")[path].size for path in trains)
    assert report["frozen_parameters"] == sum(weights.size for weights in read_weights(workdir / "base").values())
    saved = json.loads((workdir / "transfer/checkpoints/4/state/_METADATA").read_text(encoding="utf-8"))
    paths = [path for path in saved["tree_metadata"] if path.startswith("('trainable'")]
    assert len(paths) == len(trains), "the optimizer has moments of frozen arrays"


def test_the_teacher_stays_the_original_model(finished: tuple[str, Path], qwen: Path) -> None:
    _, workdir = finished
    results = json.loads((workdir / "evaluation" / "results.json").read_text(encoding="utf-8"))
    drift = results["metrics"]["english_kl"]
    assert drift["base"] == 0 and min(drift[point] for point in POINTS[1:]) > 0
    assert all(np.isfinite(value) for values in results["metrics"].values() for value in values.values())
    run, original = opened(workdir), read_weights(qwen)
    for path, array in run.models.split("base").frozen.items():
        assert np.asarray(array).tobytes() == original[path].tobytes(), path
    # The chains are made of its answers, so it must differ from the trained model.
    ids = [1, 5, 9, 40, 200, 17]
    assert np.abs(our_logits(workdir, "base", ids) - our_logits(workdir, "transfer", ids)[:, :400]).max() > 0.1
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "tiny to Thai" in page


def test_run_yaml_is_a_config(finished: tuple[str, Path], transllm: Command) -> None:
    embeddings, workdir = finished
    config = load_config(workdir / "run.yaml")
    assert config.lora is None and config.embeddings == embeddings
    code, printed = transllm("run", workdir / "run.yaml")
    assert code == 0 and "All is done" in printed
    code, printed = transllm("status", workdir)
    assert code == 0, printed


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
    # Both sum in float32, in a different order.
    assert np.abs(their_logits(out, ids) - wanted).max() < 1e-4


def test_each_tensor_is_rounded_once(finished: tuple[str, Path], tmp_path: Path, command: Command) -> None:
    _, workdir = finished
    code, printed = command("to-hf", workdir, tmp_path / "out")
    assert code == 0
    # `out` has the type of the base, the export the type of training.
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


def test_chat_with_the_trained_and_the_original_model(finished: tuple[str, Path], transllm: Command) -> None:
    _, workdir = finished
    question = "ประเทศไทย"
    said = {}
    for name, where, options in (
        ("trained", workdir, {}),
        ("original", workdir, {"base": True}),
        ("exported", workdir / "export", {}),
        ("imported", workdir / "base", {}),
    ):
        session = open_session(where, max_new_tokens=12, sampling=Sampling(3.0, seed=1), **options)
        said[name] = list(session.ask(question))[-1].raw
    assert said["trained"] == said["exported"] != said["original"] == said["imported"]
    for options in ([], ["--base"]):
        code, printed = transllm("chat", workdir, question, "--max-new-tokens", "12", *options)
        assert code == 0, printed


def test_the_stages_of_these_tests_exist() -> None:
    assert {*POINTS, "export"} <= set(steps.NAMES)
