"""Recovery KD by token: the divergence from the original model, and which tokens it teaches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import VOCAB, adapted_split

from transllm_jax.choices import Recovery
from transllm_jax.data.rows.batches import Batches
from transllm_jax.data.rows.examples import make_example
from transllm_jax.data.rows.packing import PackedRows, pack
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Split
from transllm_jax.training.divergence import divergence
from transllm_jax.training.recovery import Teaching, original_view, weights_of
from transllm_jax.training.step import Batch, batch_losses, summed_loss

MARKER, OTHER = VOCAB + 1, VOCAB + 3
LENGTH = 16
LORA = LoraConfig(rank=2, alpha=4.0)
# Prompts and answers of the original's own ids.
CONVERSATIONS = [([3, 4, 5], [6, 7, 8, 2]), ([9, 10], [11, 12, 13, 14, 15, 2]), ([16, 17, 18, 19], [20, 2])]


def rows(conversations: Sequence[tuple[list[int], list[int]]], begin: Sequence[int] = (MARKER,)) -> Batch:
    """The conversations packed into rows, each answer after `begin`; trained on are `begin` and the answer."""
    examples = [
        make_example([*asked, *begin, *said], [0] * len(asked) + [1] * (len(begin) + len(said)))
        for asked, said in conversations
    ]
    packed = pack(examples, LENGTH)
    batch = {name: jnp.asarray(values) for name, values in packed.batch(0, len(packed)).items()}
    return {**batch, "sources": jnp.zeros(len(packed), jnp.int32)}


def joined(*batches: Batch) -> Batch:
    """The batches as one; each is a source of its own."""
    numbered = [batch | {"sources": batch["sources"] + number} for number, batch in enumerate(batches)]
    return {name: jnp.concatenate([batch[name] for batch in numbered]) for name in numbered[0]}


def objective(split: Split, batch: Batch, *modes: Recovery, most: int = 8) -> float:
    teaching = Teaching(modes, most, MARKER)
    return float(batch_losses(split.structure, split.trainable, split.frozen, batch, teaching=teaching)[0])


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("own", [False, True], ids=["one table", "two tables"])
def test_the_divergence_and_its_gradients_are_those_of_the_formula(chunk: int, own: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = {"hidden": (2, 5, 8), "base": (11, 8), "new": (4, 8), "teacher": (2, 5, 8), "original": (11, 8)}
    arrays = {name: jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    hidden, base, new, teacher, original = arrays.values()
    weights = jnp.asarray([[1, 0, 2, 1, 0], [0, 0, 0, 0, 0.5]], jnp.float32)
    padding = ((13, 15),)
    given = original if own else None

    def plain(hidden: jax.Array, base: jax.Array, new: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(teacher @ (original if own else jax.lax.stop_gradient(base)).T)
        scores = jnp.concatenate([hidden @ base.T, (hidden @ new.T)[..., :2]], axis=-1)
        log_q = jax.nn.log_softmax(scores)[..., :11]
        return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    def ours(hidden: jax.Array, base: jax.Array, new: jax.Array) -> jax.Array:
        return divergence(hidden, teacher, base, new, given, weights, chunk, train_base=True, padding=padding)[0]

    wanted, gradients = jax.value_and_grad(plain, argnums=(0, 1, 2))(hidden, base, new)
    found, of_ours = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(hidden, base, new)
    assert np.allclose(found, wanted, rtol=1e-5)
    for one, other in zip(of_ours, gradients, strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert not np.any(of_ours[2][2:]) and np.any(of_ours[2][:2])
    alone = jax.jit(partial(divergence, chunk=chunk, padding=padding))(hidden, teacher, base, new, given, weights)
    assert np.allclose(alone[0], wanted, rtol=1e-5) and np.allclose(jnp.sum(alone[1]), wanted, rtol=1e-5)


def test_the_original_reads_rows_without_the_marker() -> None:
    """Two conversations of a row: places after a marker move up by one, and its own prediction is that before it."""
    batch = rows([([3, 4], [5, 2]), ([6], [7, 8, 2])])
    assert batch["tokens"].tolist() == [[3, 4, MARKER, 5, 2, 6, MARKER, 7, 8, 2, 0, 0, 0, 0, 0, 0]]
    read, place = original_view(Teaching(("token",), 1, MARKER), batch, jnp.arange(1))
    assert read["segment_ids"][0].tolist() == [1, 1, 0, 1, 1, 2, 0, 2, 2, 2, 0, 0, 0, 0, 0, 0]
    assert read["positions"][0].tolist() == [0, 1, 0, 2, 3, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0]
    assert place[0, :10].tolist() == [0, 1, 1, 3, 4, 5, 5, 7, 8, 9]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("train_base", [False, True])
def test_the_loss_is_the_divergence_that_evaluation_measures(tied: bool, train_base: bool) -> None:
    """By another way: the original alone on each prompt and answer, and the trained model on them with the marker."""
    split = adapted_split(LORA, tied=tied, train_base=train_base)
    batch = rows(CONVERSATIONS)
    teacher = Teacher(split, CONVERSATIONS, batch_size=2)
    tokens = sum(len(said) for _, said in CONVERSATIONS)
    wanted = teacher.divergence(split, [MARKER]) * tokens
    # The marker is learned as a label in each mode, since the original does not know it.
    before = batch["labels"] == MARKER
    assert int(before.sum()) == 3
    marker = float(summed_loss(split.structure, split.trainable, split.frozen, batch | {"weights": 1.0 * before}))
    text = float(summed_loss(split.structure, split.trainable, split.frozen, batch))
    assert wanted > 0.1
    assert objective(split, batch, "token") == pytest.approx(wanted + marker, rel=1e-4)
    assert objective(split, batch, "both") == pytest.approx(wanted + text, rel=1e-4)
    heavy = batch_losses(
        split.structure, split.trainable, split.frozen, batch, teaching=Teaching(("token",), 8, MARKER, 3.0)
    )
    assert float(heavy[0]) == pytest.approx(3 * wanted + marker, rel=1e-4)
    assert float(jnp.sum(heavy[1])) == pytest.approx(wanted + marker, rel=1e-4)
    assert objective(split, batch, "sequence", most=1) == pytest.approx(text, rel=1e-5)


def test_only_the_rows_of_its_sources_are_taught() -> None:
    """Wherever they stand in the batch, and also if just as many rows are read again as are taught."""
    split = adapted_split(LORA)
    english, others = rows(CONVERSATIONS), rows([([21, 22], [23, OTHER, 2]), ([24], [25] * 12)])
    alone = {
        mode: objective(split, english, mode)  # type: ignore[arg-type]
        for mode in ("token", "both")
    }
    rest = float(summed_loss(split.structure, split.trainable, split.frozen, others))
    for batch, modes in (
        (joined(english, others), ("token", "sequence")),
        (joined(others, english), ("sequence", "token")),
        (joined(others, english), ("sequence", "both")),
    ):
        wanted = alone["both" if "both" in modes else "token"] + rest
        found = objective(split, batch, *modes, most=len(english["tokens"]))  # type: ignore[arg-type]
        assert found == pytest.approx(wanted, rel=1e-5), modes


def test_what_the_original_does_not_know_is_learned_as_text() -> None:
    """A new token, and what follows it in its conversation; the next conversation of the row is taught again."""
    batch = rows([([3], [4, OTHER, 5, 2]), ([6], [7, 2])])
    labels, taught = (weights[0].tolist() for weights in weights_of(Teaching(("token",), 1, MARKER), batch, VOCAB))
    #        3 MARKER 4 OTHER 5 2 | 6 MARKER 7 2
    assert labels[:10] == [1, 0, 1, 1, 1, 0, 1, 0, 0, 0]
    assert taught[:10] == [0, 1, 0, 0, 0, 0, 0, 1, 1, 0]
    both = weights_of(Teaching(("both",), 1, MARKER), batch, VOCAB)
    assert np.array_equal(both.labels, batch["weights"]) and both.taught[0].tolist() == taught


def test_a_step_against_the_gradient_lowers_the_divergence() -> None:
    split, batch = adapted_split(LORA), rows(CONVERSATIONS)
    batch["weights"] = batch["weights"] * (batch["labels"] != MARKER)

    @jax.jit
    def loss(trainable: dict[str, jax.Array]) -> jax.Array:
        teaching = Teaching(("token",), 2, MARKER)
        return batch_losses(split.structure, trainable, split.frozen, batch, teaching=teaching)[0]

    gradient = jax.grad(loss)(split.trainable)
    norm = jnp.sqrt(sum(jnp.sum(array**2) for array in gradient.values()))
    moved = {path: array - 1e-2 / norm * gradient[path] for path, array in split.trainable.items()}
    # By as much as the gradient says.
    assert float(loss(split.trainable) - loss(moved)) == pytest.approx(1e-2 * float(norm), rel=0.1)
    assert all(np.any(array) for path, array in gradient.items() if path.endswith(".b"))


def packed(number: int) -> PackedRows:
    return pack([make_example([1] * LENGTH, [1] * LENGTH) for _ in range(number)], LENGTH)


def test_a_batch_never_has_more_taught_rows_than_are_counted() -> None:
    batches = Batches([("a", packed(3), 0.5), ("b", packed(2), 0.3), ("c", packed(2), 0.2)], 4, seed=0)
    steps = 50
    for sources, size in (([1], 4), ([1, 2], 4), ([2], 2)):
        parts = [batches.rows(k)[:, 0].reshape(-1, size) for k in range(steps)]
        most = max(int(np.isin(part, sources).sum(axis=1).max()) for part in parts)
        assert batches.most_rows(sources, size, steps) == most < size
