"""PEFT adapters that PEFT wrote: they compute the same here, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_peft import (
    EMBED,
    HEAD,
    IDS,
    NEAR,
    NEW,
    SOME,
    TIED,
    VOCAB,
    base_table,
    change,
    load_with_peft,
    ours,
    random_trainable,
    theirs,
    trained_by_peft,
    write_bases,
)

from transllm_jax.conversion.hf.directory import HFModel
from transllm_jax.conversion.peft.read import read_peft
from transllm_jax.conversion.peft.write import write_peft
from transllm_jax.errors import UserError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, HFModel]:
    return write_bases(tmp_path_factory.mktemp("bases"))


BOTH = ["embed_tokens", "lm_head"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rows": VOCAB},
    "resized and not trained": {},
    "all linear, rslora": {"target_modules": "all-linear", "use_rslora": True},
    "pattern": {"target_modules": r".*\.(k_proj|o_proj)$", "rows": VOCAB, "init_lora_weights": "gaussian"},
    "tables": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "tables, bare": {"modules_to_save": BOTH, "ensure_weight_tying": True, "save": False},
    "tables, no new rows": {"modules_to_save": BOTH, "ensure_weight_tying": True, "rows": VOCAB},
    "tokens": {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
    "tokens, bare": {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}, "save": False},
    "tokens, mixed": {
        "trainable_token_indices": {"embed_tokens": [3, *IDS[::-1], 7], "lm_head": [3, *IDS[::-1], 7]},
        "save": False,
    },
}


@pytest.mark.reference
@TIED
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_of_peft_compute_the_same(
    tmp_path: Path, bases: dict[bool, HFModel], tied: bool, variant: str
) -> None:
    base, options = bases[tied], VARIANTS[variant]
    rows = options.get("rows", VOCAB + NEW)
    wanted = trained_by_peft(base, tmp_path / "a", **options)
    adapter = read_peft(tmp_path / "a", base)
    assert adapter.new_rows == rows - VOCAB
    got = ours(base, adapter.lora, adapter.trainable)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() < NEAR and np.abs(wanted).max() > 0.5
    base_rows = "tables" in variant or variant == "tokens, mixed"
    assert ("vocabulary.base_trained" in adapter.trainable) == base_rows
    assert ("vocabulary.output_base_trained" in adapter.trainable) == (base_rows and not tied)
    assert adapter.lora.rslora == ("rslora" in variant)
    targets = {"all linear, rslora": ("q", "k", "v", "o", "gate", "up", "down"), "pattern": ("k", "o")}
    assert adapter.lora.targets == targets.get(variant, ("q", "down"))
    if variant == "tokens, mixed":
        assert list(np.flatnonzero((adapter.trainable["vocabulary.base_trained"] != base_table(base)).any(1))) == [3, 7]
    # Written again by us, it still computes the same.
    write_peft(tmp_path / "b", base, adapter.trainable, adapter.lora, base_model=str(base.directory))
    again = theirs(load_with_peft(base, tmp_path / "b", rows), rows)
    assert np.abs(again - wanted).max() < NEAR
    if variant == "tables":
        # If its base rows equal those of the base, the adapter has only new rows.
        put_base_rows_back(tmp_path / "a", base)
        adapter = read_peft(tmp_path / "a", base)
        assert sum("vocabulary" in path for path in adapter.trainable) == (1 if tied else 2)


def put_base_rows_back(directory: Path, base: HFModel) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if name.startswith((EMBED, HEAD)):
                output = name.startswith(HEAD) and not base.config.tie_word_embeddings
                array[:VOCAB] = base_table(base, "vocabulary.output_base" if output else "vocabulary.base")

    change(directory, arrays=edit)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("tied", "options", "said"),
    [
        (True, {"modules_to_save": BOTH}, "lm_head differs from embed_tokens, and the base ties"),
        (True, {"modules_to_save": ["embed_tokens"]}, "lm_head differs from embed_tokens, and the base ties"),
        (True, {"modules_to_save": ["embed_tokens"], "save": False}, "embed_tokens was trained without lm_head"),
        (True, {"modules_to_save": ["lm_head"], "save": False, "rows": VOCAB}, "lm_head differs from embed_tokens"),
        (True, {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS[:2]}}, "names other tokens"),
        (False, {"trainable_token_indices": IDS, "save": False}, "5 new rows of embed_tokens and 0 of lm_head"),
        (False, {"modules_to_save": ["lm_head"], "save": False}, "0 new rows of embed_tokens and 5 of lm_head"),
        (True, {"trainable_token_indices": [5, *IDS[1:]], "save": False}, "leaves out new tokens: 4 ids from 61"),
        (True, {"target_modules": r".*layers\.0.*q_proj"}, r"without an adapter, .*: model\.layers\.1\.self_attn\.q"),
        (True, {"target_modules": ["q_proj"], "layers_to_transform": [0]}, "layers_to_transform=.*some layers only"),
        (True, {"target_modules": ["q_proj", "lm_head"]}, "LoRA on lm_head is not supported"),
        (True, {"target_modules": r".*(q_proj|embed_tokens)"}, r"not part of .*embed_tokens\.lora_embedding_A"),
        (True, {"use_dora": True}, r"use_dora=True is not supported \(DoRA\)"),
        (True, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        (True, {"lora_bias": True}, "lora_bias=True is not supported"),
        (True, {"rank_pattern": {"down_proj": 2}}, "rank_pattern gives some layers another value"),
    ],
)
def test_unsupported_adapters_of_peft_are_refused(
    tmp_path: Path, bases: dict[bool, HFModel], tied: bool, options: dict[str, Any], said: str
) -> None:
    trained_by_peft(bases[tied], tmp_path / "a", **options)
    with pytest.raises(UserError, match=said) as caught:
        read_peft(tmp_path / "a", bases[tied])
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)


@pytest.mark.reference
def test_every_option_of_peft_is_known(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    """Each option of PEFT is read or refused; the test fails when a new version of PEFT adds one."""
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=3).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    write_peft(tmp_path / "a", bases[True], random_trainable(bases[True], SOME), SOME, base_model="b")
    written = (tmp_path / "a" / "adapter_config.json").read_text()
    for name in raw:
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(json.loads(written) | {name: {"made": "up"}}))
        try:
            read_peft(tmp_path / "a", bases[True])
        except UserError as error:
            assert f"{name}={{'made': 'up'}} is not known here" not in str(error)
