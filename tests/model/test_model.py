"""The model: it equals that of transformers, documents are apart, and gradients reach what trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
from conftest import random_weights, tiny_config
from tiny_families import FAMILIES
from tiny_splits import (
    LENGTH,
    LORA,
    NEW,
    VOCAB,
    base_split,
    gradients,
    logits,
    merged_weights,
    random_trainable,
    trained_split,
    training_batch,
    whole_rows,
)

from transllm_jax.choices import Remat
from transllm_jax.conversion.hf.directory import write_model
from transllm_jax.conversion.names import tensors
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import BASE_ROWS, count_parameters
from transllm_jax.training.step import summed_loss


@pytest.mark.reference
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_match_transformers(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = replace(tiny_config(VOCAB, tied=tied), num_key_value_heads=kv_heads, rope_theta=300.0, rms_norm_eps=1e-2)
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    write_model(tmp_path / "model", config, random_weights(config))
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )

    tokens, positions, segments = (array.copy() for array in whole_rows())
    # Row 0 is padded on its left. Row 1 starts at a position above 0 and has a gap, so its positions matter.
    segments[0, :7] = 0
    positions[0] = np.maximum(np.arange(LENGTH) - 7, 0)
    positions[1] = np.arange(LENGTH) + 5 + 30 * (np.arange(LENGTH) > 10)
    with torch.no_grad():
        wanted = reference(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(segments).long(),
            position_ids=torch.tensor(positions).long(),
        ).logits.numpy()
    ours = logits(base_split(config), (tokens, positions, segments))

    real = segments > 0
    assert ours.shape == (2, LENGTH, VOCAB) and np.isfinite(ours).all()
    assert wanted[real].std() > 0.3
    assert np.abs(ours - wanted)[real].max() < 1e-4


@pytest.mark.reference
@pytest.mark.parametrize(
    ("config", "train_base"),
    [
        (tiny_config(VOCAB, tied=False), False),
        (tiny_config(VOCAB, tied=False), True),
        (tiny_config(VOCAB, tied=True), True),
        *((FAMILIES[name], False) for name in ("llama3-untied", "mistral-window", "qwen2.5-untied", "qwen3-biases")),
    ],
    ids=["new rows", "base rows too", "base rows too, tied", "llama3", "mistral", "qwen2", "qwen3"],
)
def test_gradients_match_transformers(tmp_path: Path, config: LlamaConfig, train_base: bool) -> None:
    """The chain rule: if G is the gradient of a kernel W + s a b, that of a is s G b' and that of b is s a' G."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    structure, trainable, frozen = trained_split(config, train_base=train_base)
    larger = replace(config, vocab_size=VOCAB + NEW)
    of_base = random_trainable(config, LORA, NEW, train_base=train_base)
    write_model(tmp_path / "model", larger, merged_weights(config, LORA, of_base))
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    batch = training_batch(VOCAB + NEW)
    tokens, positions, segments = whole_rows(VOCAB + NEW)
    batch |= {"tokens": tokens, "positions": positions, "segment_ids": segments}
    ours, _ = gradients(trainable, frozen, batch, structure=structure)

    logits = reference(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(segments).long()).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(np.array(batch["labels"])).long().flatten(), reduction="none"
    )
    (losses * torch.tensor(np.array(batch["weights"])).flatten()).sum().backward()

    wanted = {path: np.zeros(values.shape, np.float32) for path, values in trainable.items()}
    parameters = dict(reference.named_parameters())
    for tensor in tensors(larger):
        gradient = parameters[tensor.name].grad.numpy()
        if tensor.path.endswith(".kernel"):
            stem, gradient = tensor.path.removesuffix("kernel"), LORA.scale * gradient.T
            a, b = (np.asarray(trainable[stem + name][tensor.layer]) for name in "ab")
            wanted[stem + "a"][tensor.layer], wanted[stem + "b"][tensor.layer] = gradient @ b.T, a.T @ gradient
        elif tensor.path.startswith("vocabulary."):
            wanted[tensor.path.replace("base", "new")] = gradient[VOCAB:]
            if train_base:
                wanted[f"{tensor.path}_trained"] = gradient[:VOCAB]
    assert wanted.keys() == ours.keys()
    for path, values in wanted.items():
        assert np.abs(values).max() > 1e-3
        assert np.abs(ours[path] - values).max() < 1e-4 * np.abs(values).max(), path


def test_a_document_does_not_attend_to_its_neighbours() -> None:
    split = trained_split(tiny_config(VOCAB))
    rng = np.random.default_rng(9)
    document = rng.integers(0, VOCAB + NEW, 8, dtype=np.int32)

    def row(start: int, neighbours: str) -> np.ndarray:
        """The document's logits from place `start` of a row whose other places hold padding or other documents."""
        tokens = rng.integers(0, VOCAB + NEW, (2, LENGTH), dtype=np.int32)
        segments = np.zeros_like(tokens)
        if neighbours != "padding":
            segments[:, :start], segments[:, start + 8 :] = 1, 3
        positions = np.where(segments == 3, np.arange(LENGTH) - start - 8, np.arange(LENGTH))
        at = slice(start, start + 8)
        tokens[0, at], segments[0, at], positions[0, at] = document, 2, np.arange(8)
        return logits(split, (tokens, positions.astype(np.int32), segments))[0, at]

    alone = row(6, "padding")
    assert alone.std() > 0.3
    for neighbours in ("padding", "documents", "documents"):
        assert np.array_equal(row(6, neighbours), alone)
    # At another place the same numbers are summed in another order: they are equal up to float32 rounding.
    for start in (0, 16):
        assert np.abs(row(start, "documents") - alone).max() < 1e-5


def test_a_token_does_not_attend_to_later_ones() -> None:
    split = base_split(tiny_config(VOCAB))
    tokens, positions, segments = whole_rows()
    before = logits(split, (tokens, positions, segments))
    changed = tokens.copy()
    changed[:, 15:] = (changed[:, 15:] + 1) % VOCAB
    after = logits(split, (changed, positions, segments))
    assert np.array_equal(before[:, :15], after[:, :15])
    assert np.abs(before[:, 15:] - after[:, 15:]).max(axis=(0, 2)).min() > 0.01


def test_gradients_reach_all_that_trains_and_nothing_frozen() -> None:
    # Untied, so that each of the two base tables has its own gradient.
    structure, trainable, frozen = trained_split(tiny_config(VOCAB, tied=False))
    batch = training_batch(VOCAB + NEW)

    of_trainable, of_frozen = gradients(trainable, frozen, batch, structure=structure)
    assert of_frozen.keys() == frozen.keys() and count_parameters(frozen) > count_parameters(trainable)
    for path, values in of_frozen.items():
        assert not np.asarray(values).any(), path
    for path, values in of_trainable.items():
        values = np.asarray(values)
        assert np.isfinite(values).all(), path
        # Each layer of an adapter, and each new row, has a gradient.
        assert (np.abs(values).reshape(len(values), -1).max(axis=1) > 1e-4).all(), path


def test_trained_base_rows_get_gradients() -> None:
    structure, trainable, frozen = trained_split(tiny_config(VOCAB, tied=False), train_base=True)
    batch = training_batch(VOCAB + NEW)
    of_trainable, of_frozen = gradients(trainable, frozen, batch, structure=structure)
    assert not any(np.asarray(values).any() for values in of_frozen.values())
    moved = {path: np.abs(np.asarray(of_trainable[path])).max(axis=1) for path in BASE_ROWS}
    # The embedding's rows of all tokens but each text's last are read; all rows take part in the output.
    read = np.isin(np.arange(VOCAB), np.asarray(batch["tokens"])[np.asarray(batch["weights"]) > 0])
    assert 0 < read.sum() < VOCAB and np.array_equal(moved[BASE_ROWS[0]] > 0, read)
    assert (moved[BASE_ROWS[1]] > 1e-4).all()


def test_without_adapters_trained_base_rows_get_no_gradient() -> None:
    structure, trainable, frozen = trained_split(tiny_config(VOCAB), train_base=True)
    batch = training_batch(VOCAB)

    def loss(trainable: Any, of: Any) -> jax.Array:
        return summed_loss(of, trainable, frozen, batch, adapters=False)

    value, slopes = jax.jit(jax.value_and_grad(loss), static_argnames="of")(trainable, of=structure)
    assert not any(np.asarray(slopes[path]).any() for path in slopes if path != "vocabulary.new")
    # The loss uses the frozen rows: it is that of a model that trains no base rows, bit for bit.
    without = trained_split(tiny_config(VOCAB))
    same = {path: trainable[path] for path in without.trainable}
    assert value == jax.jit(loss, static_argnames="of")(same, of=without.structure)


def test_remat_saves_memory_and_keeps_the_gradients() -> None:
    # With 8 layers, most of the memory is what is kept of them.
    structure, trainable, frozen = trained_split(replace(tiny_config(VOCAB), num_hidden_layers=8))
    batch = training_batch(VOCAB + NEW)

    def compiled(remat: Remat) -> Any:
        def loss(trainable: Any) -> jax.Array:
            return summed_loss(structure, trainable, frozen, batch, remat=remat)

        return jax.jit(jax.value_and_grad(loss)).lower(trainable).compile()

    programs = [compiled(remat) for remat in get_args(Remat)]
    keeping, some, *fewer, recomputing = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert recomputing < 0.8 * some < 0.8 * 0.8 * keeping
    assert all(recomputing < kept < some for kept in fewer)
    (loss, gradient), *others = (program(trainable) for program in programs)
    for again, recomputed in others:
        assert np.allclose(loss, again, rtol=1e-6)
        for path, values in gradient.items():
            scale = np.abs(values).max()
            # The same operations are compiled differently: float32 rounding, through eight layers.
            assert scale > 0 and np.abs(values - recomputed[path]).max() < 1e-5 * scale, path


def test_an_unknown_remat_is_refused() -> None:
    split = trained_split(tiny_config(VOCAB))
    known = ", ".join(get_args(Remat))
    with pytest.raises(ValueError, match=f"^remat is True; it must be one of {known}$"):
        summed_loss(*split, training_batch(VOCAB + NEW), remat=True)  # type: ignore[arg-type]
