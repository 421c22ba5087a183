"""Preflight: real steps compiled by the TPU's compiler, with no TPU; skipped where libtpu is not installed."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from splash_work import splash_flops

from transllm_jax.config import Config, load_config
from transllm_jax.disk import read_json
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import SINGLE
from transllm_jax.model.mesh import make_layout, mesh_shape
from transllm_jax.model.parameters import abstract, count_parameters
from transllm_jax.model.splash import kernel_bytes
from transllm_jax.preflight.measure import BEST, Measured, _explain, measure
from transllm_jax.preflight.program.chips import parse_topology, topology_devices
from transllm_jax.preflight.program.hlo import CustomCall
from transllm_jax.preflight.program.hlo_text import Shape
from transllm_jax.preflight.programs import ModelShapes, generation_programs, model_shapes, training_program
from transllm_jax.preflight.search import candidates
from transllm_jax.preflight.show import show
from transllm_jax.training.flops import forward_flops_per_token, train_flops_per_token

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "llama2_7b_thai.yaml"
SMALL = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
NEW = 1008  # with three markers, a multiple of 16
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The recipe, of a small model."""
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps({**read_json(ROOT / "configs" / "models" / "llama2_7b.json"), **SMALL}))
    return load_config(RECIPE, [f"model.shape={path}", "vocabulary.size=1000", "lora.rank=16"])


def program_of(config: Config, tmp_path: Path, topology: str = "v5e:2x2", *, full: bool = False, **given: Any) -> Any:
    options: dict[str, Any] = {"remat": "full", "batch_size": 32, "accumulate": 2, "length": 256, **given}
    devices = topology_devices(topology)
    layout = make_layout(mesh_shape(len(devices), None, None, 1), config.attention, devices)
    return training_program(model_shapes(config, tmp_path, full=full), "pretrain", layout, **options)


@pytest.fixture(scope="module")
def measured(small: Config, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(program_of(small, tmp_path_factory.mktemp("run")), parse_topology("v5e:2x2"))


@needs_compiler
def test_a_step_compiles_for_a_slice_and_its_memory_is_told_by_kind(measured: Measured, small: Config) -> None:
    assert measured.fits and measured.counts is not None and measured.best is not None
    program = measured.program
    # Frozen weights in bfloat16 and what trains in float32, on each of 4 chips a quarter, norms aside.
    shape = LlamaConfig.from_hf(json.loads(Path(str(small.model.shape)).read_text()))
    split = abstract(shape, model_shapes(small, Path("none")).lora, NEW)
    norms = sum(leaf.size for path, leaf in split.frozen.items() if path.endswith("scale"))
    assert program.arguments["frozen"] == 2 * ((count_parameters(split.frozen) - norms) // 4 + norms)
    assert program.arguments["adapters"] == 4 * count_parameters(split.trainable) // 4
    # Two moments, and counts of updates.
    assert 0 <= program.arguments["optimizer"] - 2 * program.arguments["adapters"] < 64
    # What the compiler says of all arguments is their sum, padded to its tiles.
    arguments = measured.needed - measured.temporary
    assert sum(program.arguments.values()) <= arguments < 1.1 * sum(program.arguments.values())
    assert measured.temporary > measured.kept > 0


@needs_compiler
def test_days_and_chip_hours_are_told_or_how_to_get_them(measured: Measured) -> None:
    def said(budget: float | None) -> str:
        with (console := Console(width=200)).capture() as printed:
            show(console, replace(measured, program=replace(measured.program, budget=budget)))
        return printed.get()

    assert "1.00 billion tokens: " in said(1e9) and "chip-hours" in said(1e9)
    assert "budget         not known" in said(None) and "pretrain.epochs=null pretrain.steps=1000" in said(None)


@needs_compiler
def test_work_is_the_models_and_what_is_computed_again(measured: Measured) -> None:
    """Of full rematerialisation: between the model's FLOPs and these with a second forward pass of the layers."""
    assert measured.counts is not None
    assert not measured.counts.unexplained
    assert 1.0 < measured.executed < 1.5


@needs_compiler
def test_frozen_weights_are_gathered_and_what_trains_is_summed_where_it_is_kept(measured: Measured) -> None:
    counts = measured.counts
    assert counts is not None
    largest = max(found.result_bytes for found in counts.collectives.values() if found.kind == "all-reduce")
    # Scalars, and sums by source: no gradient is summed whole on every device.
    assert largest < 1024
    gathers = [found for found in counts.collectives.values() if found.kind == "all-gather"]
    layer = 2 * SMALL["hidden_size"] * SMALL["intermediate_size"]
    # One layer's kernel at a time, in the loop over the layers, and the two tables of the loss.
    assert max(found.result_bytes for found in gathers) <= max(layer, 2 * SMALL["vocab_size"] * SMALL["hidden_size"])
    assert not any(found.kind == "reduce-scatter" for found in counts.collectives.values())


@pytest.mark.full
@needs_compiler
def test_the_split_needs_less_than_full_fine_tuning(measured: Measured, small: Config, tmp_path: Path) -> None:
    full = measure(program_of(small, tmp_path, full=True), parse_topology("v5e:2x2"))
    assert full.program.arguments["frozen"] == 0 and full.needed > 1.5 * measured.needed
    assert full.program.model_flops > 1.3 * measured.program.model_flops


@needs_compiler
def test_generation_moves_no_weights(small: Config, tmp_path: Path) -> None:
    devices = topology_devices("v5e:2x2")
    layout = make_layout((1, 4, 1), small.attention, devices)
    first, token = generation_programs(model_shapes(small, tmp_path), layout, batch_size=8, prompt=64, new_tokens=64)
    found = measure(token, parse_topology("v5e:2x2"))
    assert found.fits and found.counts is not None
    # A token's states are summed and gathered; a layer's kernel would be a megabyte.
    assert max(of.result_bytes for of in found.counts.collectives.values()) < 2**18
    # Nor is the cache copied, for a token or for a piece of a prompt; it is read by layer and in chunks.
    cache = token.least["cache"]
    read = measure(first, parse_topology("v5e:2x2"))
    assert read.fits and read.counts is not None
    for counts in (found.counts, read.counts):
        assert max(one.hbm_bytes for one in counts.work.values()) < cache / 2
    # All of it is read for the last token of an answer, and each weight; little else is moved.
    least = sum(token.least.values())
    assert cache < least < found.counts.hbm_bytes < 2 * least


@pytest.mark.full
@needs_compiler
def test_search_finds_what_fits(small: Config, tmp_path: Path) -> None:
    topology, devices = parse_topology("v5e:2x2"), topology_devices("v5e:2x2")
    found = candidates(model_shapes(small, tmp_path), "pretrain", topology, devices, 64, 256)
    assert {one.remat for one in found} == {"projections", "queries", "feed_forward", "attention", "full"}
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert all(one.batch_size >= 64 and one.batch_size % one.accumulate == 0 for one in found)
    meshes = {one.mesh for one in found}
    assert (1, 4, 1) in meshes and (2, 2, 1) in meshes and (1, 2, 2) in meshes
    # What is guessed is near what is measured.
    best = measure(found[0].program, topology)
    assert best.fits and best.best is not None


def run(*arguments: str) -> tuple[int, str]:
    """The command, in this process: exit code and what it printed."""
    from typer.testing import CliRunner

    from transllm_jax.cli.main import app

    done = CliRunner().invoke(app, ["preflight", str(RECIPE), *arguments])
    if isinstance(done.exception, UserError):
        return 2, str(done.exception)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.mark.full
@needs_compiler
def test_the_command(small: Config, tmp_path: Path) -> None:
    shape = [f"model.shape={small.model.shape}", "vocabulary.size=1000", "pretrain.batch_size=32"]
    shape += ["pretrain.accumulate=2", "lora.rank=16"]
    options = ["--topology", "v5e:2x2", "--stage", "pretrain", "--json", str(tmp_path / "found.json")]
    code, said = run(*shape, *options)
    assert code == 0, said
    for word in (
        "memory a chip",
        "kept for the backward pass",
        "MFU",
        "all-gather",
        "chip-hours",
        "The estimate assumes",
    ):
        assert word in said
    assert f"{BEST:.0%} of 197 TFLOP/s" in re.sub(r"\s+", " ", said)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (
        found["fits"] and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and found["mfu"] > found["mfu_ordinary"]
    )


@needs_compiler
def test_what_does_not_fit_is_exit_3_with_the_largest_buffers(small: Config) -> None:
    shape = [f"model.shape={small.model.shape}", "vocabulary.size=1000", "pretrain.accumulate=1"]
    code, said = run(
        *shape, "--topology", "v5e:2x2", "--stage", "pretrain", "--batch", "32768", "--remat", "projections"
    )
    assert code == 3
    assert "it does not fit" in said and "kept for the backward pass" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--topology is missing"),
        (["--topology", "v5e:3x3"], "no slice of v5e has this shape"),
        (["--topology", "v9:2x2"], "v9 is not known"),
        (["--topology", "v5e:4x4", "--remat", "some"], "--remat some: no such policy"),
        (["--topology", "v5e:4x4", "--stage", "recover"], "--stage recover: no such stage"),
        (["--topology", "v5e:4x4", "model.shape=null"], "name its config.json with model.shape=FILE"),
        (["--topology", "v5e:4x4", "model.shape=none.json"], "model.shape: none.json: no such file"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], said: str) -> None:
    code, output = run(*arguments)
    assert code == 2 and said in output and "\n" not in output.strip()


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mesh", "fsdp=3"], "does not make 16 devices"),
        (["--mesh", "model=16"], "write AXIS=NUMBER"),
        (["--mesh", "tensor=3,fsdp=5"], "does not make 16 devices"),
        (["--batch", "100"], "cannot be cut over 16 devices"),
    ],
)
def test_a_mesh_or_batch_that_does_not_divide_is_one_line(arguments: list[str], said: str) -> None:
    code, output = run("--topology", "v5e:4x4", "pretrain.accumulate=1", "--stage", "pretrain", *arguments)
    assert code == 2 and said in output and "\n" not in output.strip()


@needs_compiler
def test_a_batch_of_a_later_stage_is_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transllm_jax.preflight.command.measure", lambda *_: pytest.fail("it compiles"))
    code, output = run("--topology", "v5e:4x4", "transfer.batch_size=4", "transfer.accumulate=1")
    assert code == 2 and "transfer.batch_size: 4 rows at once cannot be cut over 16 devices" in output


def test_mesh_sizes() -> None:
    assert mesh_shape(16, None, None, 1) == (1, 16, 1)
    assert mesh_shape(16, 2, None, 1) == (2, 8, 1)
    assert mesh_shape(16, None, 4, 2) == (2, 4, 2)
    assert mesh_shape(1, None, None, 1) == (1, 1, 1)
    for wrong in ((3, None, 1), (None, 5, 1), (None, None, 32), (2, 2, 2)):
        with pytest.raises(UserError, match="does not make 16 devices"):
            mesh_shape(16, *wrong)


def test_flops_of_reading_are_the_forward_third_of_training() -> None:
    """Without what trains and attention: twice the weights, of which training has two passes."""
    shape = LlamaConfig.from_hf(read_json(ROOT / "configs" / "models" / "llama2_7b.json"))
    forward = forward_flops_per_token(shape, None, 0, 0)
    assert forward == 2 * (6_738_415_616 - 32000 * 4096 - 65 * 4096)
    step = train_flops_per_token(shape, None, 0, 512, train_new=False)
    attention = 32 * 2 * 3 * 2 * 256 * 4096
    assert step - attention == 2 * forward


def with_window(small: Config, tmp_path: Path, window: int | None) -> ModelShapes:
    model = model_shapes(small, tmp_path)
    return replace(model, shape=replace(model.shape, sliding_window=window))


@pytest.mark.full
def test_a_window_bounds_the_keys_of_training_and_of_generation(small: Config, tmp_path: Path) -> None:
    """Of 3 layers of width 512, 2 FLOPs for each of scores and sums, a query and key; three times that in training."""
    options: Any = {"remat": "full", "batch_size": 8, "accumulate": 1, "length": 256}

    def work(window: int | None) -> tuple[float, ...]:
        model = with_window(small, tmp_path, window)
        prompts, token = generation_programs(model, SINGLE, batch_size=8, prompt=128, new_tokens=64)
        step = training_program(model, "pretrain", SINGLE, **options)
        assert step.window == prompts.window == token.window == window
        return step.model_flops, prompts.model_flops, token.model_flops

    less = [whole - some for whole, some in zip(work(None), work(48), strict=True)]
    # All but the first 48 queries see 48 keys, those half as many.
    fewer = [256 * 128 - (208 * 48 + 48 * 24), 128 * 64 - (80 * 48 + 48 * 24), 128 + 64 - 48]
    assert less == pytest.approx(
        [3 * 2 * 2 * 512 * 8 * keys * passes for keys, passes in zip(fewer, (3, 1, 1), strict=True)]
    )
    # A window that no row reaches changes nothing.
    assert work(256) == work(None)


def test_a_kernels_work_is_that_of_the_window_and_of_its_numbers() -> None:
    tables, name = [("s8", (1, 8, 8)), ("s32", (1, 8, 8))], "splash_mha_fwd_segmented_residuals.1"
    for dtype, itemsize in (("bf16", 2), ("f32", 4)):
        of = [*tables, *[(dtype, (2, 4, 4096, 128))] * 3]
        call = CustomCall(name, "tpu_custom_call", name, "", tuple(Shape(kind, dims, 0) for kind, dims in of), (), "")
        for window in (None, 600):
            flops, size = _explain(window, call) or (0, 0)
            assert flops == splash_flops(2, 4, 4096, 128, window, itemsize)[0]
            dims = [dims for _, dims in of]
            assert size == kernel_bytes(name, dims, window=window, itemsize=itemsize)
    # 7 of the 10 blocks of 1,024 are seen.
    assert 10 * splash_flops(2, 4, 4096, 128, 600)[0] == 7 * splash_flops(2, 4, 4096, 128)[0]


@pytest.mark.parametrize("name", ["llama2_7b", "llama2_13b", "llama2_70b"])
def test_the_shapes_are_the_published_models(name: str) -> None:
    shape = LlamaConfig.from_hf(read_json(ROOT / "configs" / "models" / f"{name}.json"))
    published = {"llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192}
    assert count_parameters(abstract(shape, None, 0, layout=SINGLE).frozen) == published[name]
