"""PEFT adapters read without PEFT: options and damage that are refused, and options that are accepted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_weights
from tiny_peft import EMBED, HEAD, IDS, NEW, Q0, SOME, TIED, VOCAB, base_table, change, random_trainable, write_bases

from transllm_jax.conversion.hf.directory import HFModel, open_hf, stacked, write_model
from transllm_jax.conversion.peft.read import open_peft, read_peft
from transllm_jax.conversion.peft.write import write_peft
from transllm_jax.errors import UserError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, HFModel]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, bases: dict[bool, HFModel]) -> Path:
    """Adapters that we wrote: tied and untied, with tokens and with tables."""
    directory = tmp_path_factory.mktemp("written")
    for tied, base in bases.items():
        for rows in ("tokens", "tables"):
            trainable = random_trainable(base, SOME)
            write_peft(directory / f"{rows}-{tied}", base, trainable, SOME, base_model="b", rows=rows)
    return directory


def refused(
    tmp_path: Path, written: Path, base: HFModel, rows: str = "tokens", *, config: Any = None, arrays: Any = None
) -> str:
    """The error for an adapter after a change of its config or its arrays."""
    directory = tmp_path / "a"
    shutil.copytree(written / f"{rows}-{base.config.tie_word_embeddings}", directory, dirs_exist_ok=True)
    change(directory, config, arrays)
    with pytest.raises(UserError) as caught:
        read_peft(directory, base)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("peft_type", "LOHA", "peft_type 'LOHA' is not supported"),
        ("peft_type", None, "peft_type None is not supported"),
        ("task_type", "SEQ_CLS", "task_type='SEQ_CLS' is not supported"),
        ("r", 0, "r is 0"),
        ("r", True, "r is True"),
        ("r", 2.0, "r is 2.0"),
        ("r", None, "r is None"),
        ("lora_alpha", "x", "lora_alpha is 'x'"),
        ("lora_alpha", None, "lora_alpha is None"),
        ("lora_alpha", 0, "lora_alpha is 0"),
        ("lora_dropout", 1, "lora_dropout is 1"),
        ("use_rslora", "yes", "use_rslora is 'yes'"),
        ("ensure_weight_tying", 1, "ensure_weight_tying is 1"),
        ("target_modules", None, "target_modules is None"),
        ("target_modules", [], "target_modules is []"),
        ("target_modules", ["c_attn"], "target_modules names no linear layer of this model"),
        ("target_modules", ["embed_tokens", "q_proj"], "LoRA on model.embed_tokens is not supported"),
        ("modules_to_save", ["score", "embed_tokens"], "modules_to_save: score is not supported"),
        ("modules_to_save", "lm_head", "modules_to_save is 'lm_head'"),
        ("modules_to_save", ["embed_tokens"], "both modules_to_save and trainable_token_indices name model.embed_tok"),
        ("trainable_token_indices", {"wte": [1]}, "trainable_token_indices: wte is not supported"),
        ("trainable_token_indices", [1, -1], "not a list of ids"),
        ("trainable_token_indices", [1, 10**30], "not a list of ids"),
        ("trainable_token_indices", [4, 4], "names 1 ids twice"),
        ("bias", "all", "bias='all' is not supported"),
        ("use_dora", True, "use_dora=True is not supported"),
        ("fan_in_fan_out", True, "fan_in_fan_out=True is not supported"),
        ("lora_bias", True, "lora_bias=True is not supported"),
        ("layers_to_transform", 0, "layers_to_transform=0 is not supported"),
        ("layers_pattern", "layers", "layers_pattern='layers' is not supported"),
        ("layer_replication", [[0, 1]], "layer_replication=[[0, 1]] is not supported"),
        ("megatron_config", {"a": 1}, "megatron_config={'a': 1} is not supported"),
        ("target_parameters", ["x"], "target_parameters=['x'] is not supported"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens=[1] is not supported"),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern gives some layers another value"),
        ("alpha_pattern", {"q_proj": 5.5, "v_proj": 1}, "alpha_pattern gives some layers another value"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights='pissa_niter_4' is not supported"),
        ("init_lora_weights", "olora", "init_lora_weights='olora' is not supported"),
        ("init_lora_weights", "loftq", "init_lora_weights='loftq' is not supported"),
        ("init_lora_weights", "corda", "init_lora_weights='corda' is not supported"),
        ("init_lora_weights", "mica", "init_lora_weights='mica' is not supported"),
        ("init_lora_weights", "lora_ga", "init_lora_weights='lora_ga' is not supported"),
        ("runtime_config", {"faster": 1}, "runtime_config={'faster': 1} is not known here"),
        ("invented_in_2031", 0.5, "invented_in_2031=0.5 is not known here"),
    ],
)
def test_bad_options_are_refused_by_name(
    tmp_path: Path, written: Path, bases: dict[bool, HFModel], field: str, value: Any, said: str
) -> None:
    message = refused(tmp_path, written, bases[True], config=lambda raw: raw.update({field: value}))
    assert said in message


def test_all_bad_options_are_listed(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    message = refused(
        tmp_path, written, bases[True], config=lambda raw: raw.update(use_dora=True, bias="all", r=-1, new_thing=[1])
    )
    for said in ("use_dora=True", "bias='all'", "r is -1", "new_thing=[1]", "merge the adapter with PEFT"):
        assert said in message


def test_options_that_change_nothing_are_accepted(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    before = read_peft(written / "tokens-True", bases[True])
    shutil.copytree(written / "tokens-True", tmp_path / "a")
    change(
        tmp_path / "a",
        lambda raw: raw.update(
            rank_pattern={"q_proj": 2},
            alpha_pattern={"q_proj": 5.5},
            init_lora_weights="eva",
            eva_config={"rho": 1.0},
            runtime_config={"ephemeral_gpu_offload": True},
            task_type=None,
            auto_mapping={"base_model_class": "LlamaForCausalLM"},
            target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
            exclude_modules=["k_proj"],
            invented_in_2031=False,
            trainable_token_indices=IDS,
            layers_pattern=[],
        ),
    )
    after = read_peft(tmp_path / "a", bases[True])
    assert after.lora == before.lora and after.trainable.keys() == before.trainable.keys()


def test_all_wrong_tensors_are_listed(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    down = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"

    def edit(arrays: dict[str, np.ndarray]) -> None:
        del arrays[down.format(0, "B")], arrays[down.format(1, "B")]
        del arrays[f"{EMBED}.token_adapter.trainable_tokens_delta"]
        arrays[f"{Q0}.lora_A.weight"] = np.ones((2, 47), np.float32)
        arrays[f"{Q0}.lora_B.weight"] = np.ones((64, 2), np.int8)
        arrays[f"{Q0}.lora_magnitude_vector"] = np.ones(64, np.float32)
        arrays[f"{Q0.replace('q_proj', 'k_proj')}.lora_A.weight"] = np.ones((2, 48), np.float32)
        arrays["model.layers.0.self_attn.v_proj.lora_A.weight"] = np.ones((2, 48), np.float32)
        arrays["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"][0, 0] = np.nan
        arrays[f"{HEAD}.token_adapter.trainable_tokens_delta"][1, 1] = np.inf

    message = refused(tmp_path, written, bases[False], arrays=edit)
    for said in (
        "missing: model.embed_tokens.token_adapter.trainable_tokens_delta, "
        "model.layers.{0,1}.mlp.down_proj.lora_B.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight has shape [2, 47], expected [2, 48]",
        "model.layers.0.self_attn.q_proj.lora_B.weight has type I8",
        "not part of a LoRA adapter of this model: model.layers.0.self_attn.k_proj.lora_A.weight, "
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector, "
        "model.layers.0.self_attn.v_proj.lora_A.weight (without the prefix base_model.model.)",
        "NaN or infinite: lm_head.token_adapter.trainable_tokens_delta, model.layers.1.self_attn.v_proj.lora_A.weight",
    ):
        assert said in message


def test_half_a_pair_is_refused(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    message = refused(
        tmp_path,
        written,
        bases[True],
        config=lambda raw: raw.update(target_modules="all-linear"),
        arrays=lambda arrays: arrays.pop(f"{Q0}.lora_A.weight"),
    )
    assert "missing: model.layers.0.self_attn.q_proj.lora_A.weight;" in message


def _set(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: value})


@pytest.mark.parametrize(
    ("tied", "rows", "config", "arrays", "said"),
    [
        (True, "tables", None, lambda a: a.pop(f"{EMBED}.weight"), "missing: model.embed_tokens.weight"),
        (False, "tables", None, lambda a: a.pop(f"{HEAD}.weight"), "missing: lm_head.weight"),
        (True, "tables", None, _set(f"{EMBED}.weight", np.ones((60, 48), np.float32)), "shape [60, 48], expected [61"),
        (True, "tables", None, _set(f"{EMBED}.weight", np.ones(48, np.float32)), "shape [48], expected [61, 48]"),
        (True, "tables", None, lambda a: a[f"{HEAD}.weight"].__setitem__((65, 0), 9), "lm_head differs from embed"),
        (
            False,
            "tables",
            None,
            _set(f"{EMBED}.original_module.weight", np.ones((66, 48), np.float32)),
            "model.embed_tokens.original_module.weight is not the table of",
        ),
        (
            False,
            "tables",
            None,
            _set(f"{HEAD}.modules_to_save.weight", np.ones((66, 48), np.float32)),
            "lm_head.modules_to_save.weight differs from lm_head.weight",
        ),
        (
            True,
            "tokens",
            {"trainable_token_indices": [61, 62, 63, 64, 2**31 - 1]},
            None,
            "leaves out new tokens: 5 ids from 61 on, up to 2147483647",
        ),
        (
            True,
            "tokens",
            None,
            _set(f"{EMBED}.token_adapter.base_layer.weight", np.ones((64, 48), np.float32)),
            "trainable_token_indices of model.embed_tokens names 65, above the table",
        ),
        (True, "tokens", {"trainable_token_indices": IDS[:4]}, None, "shape [5, 48], expected [4, 48]"),
        (True, "tokens", {"trainable_token_indices": None}, None, "not part of a LoRA adapter of this model: model.em"),
        (True, "tokens", {"trainable_token_indices": {"lm_head": IDS}}, None, "names other tokens for lm_head"),
    ],
)
def test_bad_tables_are_refused(
    tmp_path: Path,
    written: Path,
    bases: dict[bool, HFModel],
    tied: bool,
    rows: str,
    config: dict[str, Any] | None,
    arrays: Any,
    said: str,
) -> None:
    message = refused(tmp_path, written, bases[tied], rows, config=lambda raw: raw.update(config or {}), arrays=arrays)
    assert said in message


def test_one_changed_row_makes_both_tables_trained(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    shutil.copytree(written / "tables-False", tmp_path / "a")
    change(tmp_path / "a", arrays=lambda arrays: arrays[f"{HEAD}.weight"].__setitem__((7, 0), 2))
    back = read_peft(tmp_path / "a", bases[False]).trainable
    expected = base_table(bases[False], "vocabulary.output_base")
    np.testing.assert_array_equal(back["vocabulary.base_trained"], base_table(bases[False]))
    expected[7, 0] = 2
    np.testing.assert_array_equal(back["vocabulary.output_base_trained"], expected)


def test_rows_of_a_bfloat16_base_are_recognised(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    config = bases[True].config
    write_model(tmp_path / "base", config, random_weights(config), dtype="bfloat16")
    base = open_hf(tmp_path / "base")
    trainable = random_trainable(base, SOME)
    write_peft(tmp_path / "a", base, trainable, SOME, base_model="b", rows="tables")
    back = read_peft(tmp_path / "a", base)
    assert back.trainable.keys() == trainable.keys()
    # On a base of another type the rows differ: close is not equal.
    assert "vocabulary.base_trained" in read_peft(tmp_path / "a", bases[True]).trainable


def test_damaged_files_are_refused(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    directory = tmp_path / "a"
    weights = directory / "adapter_model.safetensors"

    def said(damage: Callable[[], Any]) -> str:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(written / "tokens-True", directory)
        damage()
        with pytest.raises(UserError) as caught:
            read_peft(directory, bases[True])
        return str(caught.value)

    assert "pickle file only (adapter_model.bin)" in said(lambda: weights.rename(directory / "adapter_model.bin"))
    assert "adapter_model.safetensors is missing" in said(weights.unlink)
    assert "is truncated or not a safetensors" in said(lambda: weights.write_bytes(weights.read_bytes()[:-1]))
    assert "is truncated or not a safetensors" in said(lambda: weights.write_bytes(b"\xff" * 64))
    assert "adapter_config.json is missing" in said((directory / "adapter_config.json").unlink)
    # A pickle beside the safetensors file is ignored.
    shutil.copytree(written / "tokens-True", directory, dirs_exist_ok=True)
    (directory / "adapter_model.bin").write_bytes(b"not read")
    assert read_peft(directory, bases[True]).new_rows == NEW


@TIED
def test_the_merged_model_is_the_base_with_the_adapter(written: Path, bases: dict[bool, HFModel], tied: bool) -> None:
    base = bases[tied]
    adapter = read_peft(written / f"tokens-{tied}", base)
    opened = open_peft(adapter, base)
    assert opened.config == replace(base.config, vocab_size=VOCAB + NEW)
    merged, before = stacked(opened), random_weights(base.config)
    product = adapter.trainable["blocks.attention.q.a"] @ adapter.trainable["blocks.attention.q.b"]
    expected = before["blocks.attention.q.kernel"] + np.float32(5.5 / 2**0.5) * product
    assert np.abs(merged["blocks.attention.q.kernel"] - expected).max() < 1e-5
    for path in ("blocks.attention.k.kernel", "final_norm.scale"):
        np.testing.assert_array_equal(merged[path], before[path])
    for table in ("base", "output_base") if not tied else ("base",):
        rows = adapter.trainable[f"vocabulary.{table.removesuffix('base')}new"]
        np.testing.assert_array_equal(merged[f"vocabulary.{table}"][VOCAB:], rows)
        np.testing.assert_array_equal(merged[f"vocabulary.{table}"][:VOCAB], before[f"vocabulary.{table}"])
