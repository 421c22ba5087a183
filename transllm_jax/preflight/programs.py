"""The programs of a run for a slice that is not there: its training steps and its generation, lowered from shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conversion.hf.directory import parse_config
from transllm_jax.choices import TRAININGS, Remat
from transllm_jax.config import Config, Training
from transllm_jax.disk import read_model_json
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import SINGLE, Layout
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Flat, Split, abstract
from transllm_jax.stages.trained import lora_of, trains
from transllm_jax.stages.training import check_layout, loop_config
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.flops import forward_flops_per_token, mean_keys, train_flops_per_token
from transllm_jax.training.loop import step_of
from transllm_jax.training.optimizer import make_optimizer
from transllm_jax.training.placement import Placement
from transllm_jax.training.step import batch_losses, initial_state

STAGES = (*TRAININGS, "generation")
# Arrays of a batch, [B, T] each but the last.
_FIELDS = {"tokens": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32, "labels": jnp.int32}
_FIELDS |= {"weights": jnp.float32}


class Kept(NamedTuple):
    """A value that the forward pass keeps for the backward pass: shape and type on one device, bytes."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}, kept for the backward pass"


@dataclass(frozen=True)
class Program:
    """A program to compile, and what is known of it before.

    arguments: bytes on a device by kind: frozen, adapters (all that trains), optimizer, batch (or cache). kept: what a
    step keeps for its backward pass. model_flops: of one run of it on all devices, without what is computed again.
    tokens: of one run, on all devices. budget: tokens of the whole stage; None where it is not known. buffers: the
    largest arguments, by name.
    """

    stage: str
    lower: Callable[[], Any]
    layout: Layout
    arguments: dict[str, int]
    buffers: dict[str, int]
    kept: list[Kept]
    model_flops: float
    tokens: int
    budget: float | None
    about: str
    # For a table: rows of a batch by their length, and the policy of rematerialisation.
    rows: str
    remat: str = ""
    # How many keys a query sees at most, which a compiled kernel does not tell.
    window: int | None = None


@dataclass(frozen=True)
class Model:
    """The model of a run by its shapes."""

    config: Config
    shape: LlamaConfig
    new_rows: int
    # All weights train.
    full: bool

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters."""
        return None if self.full else lora_of(self.config)

    def split(self, layout: Layout) -> Split:
        """What trains and what is frozen, as shapes where they lie.

        Raises UserError for a mesh that does not divide it.
        """
        dtype = jnp.dtype(self.config.model.dtype)
        train_base = not self.full and self.config.embeddings == "all"
        whole = abstract(self.shape, self.lora, self.new_rows, dtype, train_base=train_base, layout=layout)
        if not self.full:
            return whole.hold(path for path in whole.trainable if not trains(self.config, path))
        masters: dict[str, Any] = {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
            for path, leaf in whole.frozen.items()
        }
        return Split(whole.structure, {**whole.trainable, **masters}, {})


def model_of(config: Config, workdir: Path, *, full: bool = False) -> Model:
    """The shapes of a config's model: of its work directory, else of `model.shape` or a source that is a directory.

    `full`: all its weights train, whatever the config says. Raises UserError where nothing says what they are.
    """
    found = [workdir / "base" / "config.json", *([Path(config.model.shape)] if config.model.shape else [])]
    found.append(Path(config.model.source) / "config.json")
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise UserError(
            f"the shape of {config.model.source} is not known here: name its config.json with "
            "model.shape=FILE, or import it with `transllm run CONFIG --until base`"
        )
    shape = parse_config(read_model_json(path), path.parent)
    return Model(config, shape, _new_rows(config, shape, workdir), full or config.lora is None)


def _new_rows(config: Config, shape: LlamaConfig, workdir: Path) -> int:
    section = config.vocabulary
    done = workdir / "vocabulary" if (workdir / "vocabulary" / "manifest.json").is_file() else None
    given = section.tokenizer or section.adapter
    markers = len({config.markers.english, config.target_marker, config.markers.response})
    if done is not None or given is not None:
        rows = Tokenizer.load(done or Path(str(given))).vocab_size - shape.vocab_size
    else:
        # The markers come behind the tokens.
        rows = (section.size or 0) + markers
    multiple = section.pad_to_multiple_of
    return -(-rows // multiple) * multiple


def training(
    model: Model, stage: str, layout: Layout, *, remat: Remat, batch_size: int, accumulate: int, length: int
) -> Program:
    """A training stage's step. Raises UserError for a mesh that divides model or batch not."""
    section: Training = getattr(model.config, stage).model_copy(
        update={"remat": remat, "batch_size": batch_size, "accumulate": accumulate, "length": length}
    )
    if batch_size % accumulate:
        raise UserError(f"{stage}: a batch of {batch_size} rows is no multiple of {accumulate} parts")
    check_layout(layout, stage, section, model.shape.head_dim)
    split = model.split(layout)
    steps = _steps(section)
    names = ("a", "b") if stage != "transfer" else ("a", "b", "c")
    config = loop_config(model.lora, stage, section, steps or 1000, seed=0, sources=names)
    placement = Placement(layout, accumulate)
    make = partial(initial_state, optimizer=make_optimizer(config.optimizer))
    state = placement.shapes(make, split.trainable)
    batch = _batch(placement, batch_size, length)
    flops = train_flops_per_token(
        model.shape,
        model.lora,
        model.new_rows,
        length,
        full=model.full,
        train_base=model.config.embeddings == "all",
        train_new=model.config.embeddings != "none",
    )
    rows = batch_size // accumulate // layout.batch_parts
    arguments = {"frozen": split.frozen, "adapters": state.trainable, "optimizer": state.optimizer, "batch": batch}
    return Program(
        stage,
        lambda: step_of(config, split).lower(state, split.frozen, batch),  # type: ignore[attr-defined]
        layout,
        {kind: sum(map(local_bytes, jax.tree.leaves(tree))) for kind, tree in arguments.items()},
        _named({"frozen": split.frozen, "trained": state.trainable}),
        _kept(model, layout, remat, rows, length),
        flops * batch_size * length,
        batch_size * length,
        steps * batch_size * length if steps else _budget(section),
        f"{batch_size} x {length} tokens a step, {rows} x {length} at once on a device, "
        f"{accumulate} {'parts' if accumulate > 1 else 'part'}, remat {remat}",
        f"{batch_size}x{length}",
        remat,
        model.shape.sliding_window,
    )


def generation(model: Model, layout: Layout, *, batch_size: int, prompt: int, new_tokens: int) -> list[Program]:
    """The two programs of generation: reading prompts, and a burst of new tokens (which counts as one token)."""
    from transllm_jax.generation.engine import PROMPT_MULTIPLE, lowered

    split = model.split(layout)
    width = -(-prompt // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    first, burst, state = lowered(split, batch_size, width, new_tokens)
    cache = sum(map(local_bytes, jax.tree.leaves(state)))
    arguments = {
        "frozen": sum(map(local_bytes, split.frozen.values())),
        "adapters": sum(map(local_bytes, split.trainable.values())),
    }
    flops, window = (
        partial(forward_flops_per_token, model.shape, model.lora, model.new_rows),
        model.shape.sliding_window,
    )
    buffers = _named({"frozen": split.frozen, "trained": split.trainable})
    return [
        Program(
            "generation: prompts",
            first,
            layout,
            arguments,
            buffers,
            [],
            flops(mean_keys(model.shape, width), logits=1 / width) * batch_size * width,
            batch_size * width,
            None,
            f"{batch_size} prompts of {width} tokens",
            f"{batch_size}x{width}",
            window=window,
        ),
        Program(
            "generation: a token",
            burst,
            layout,
            {**arguments, "cache": cache},
            buffers,
            [],
            flops(min(width + new_tokens, window or width + new_tokens)) * batch_size,
            batch_size,
            None,
            f"{batch_size} rows, up to {width + new_tokens} tokens each",
            f"{batch_size}x{width + new_tokens}",
            window=window,
        ),
    ]


def local_bytes(leaf: Any) -> int:
    """An array's bytes on one device, as its sharding says."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _named(trees: dict[str, Flat]) -> dict[str, int]:
    found = {f"{kind} {path}": local_bytes(leaf) for kind, tree in trees.items() for path, leaf in tree.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:8])


def _batch(placement: Placement, size: int, length: int) -> dict[str, Any]:
    shape, sharding = placement.shape(size, length), placement.batch_sharding
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in _FIELDS.items()}
    return {**batch, "sources": jax.ShapeDtypeStruct(placement.shape(size), jnp.int32, sharding=sharding)}


def _steps(section: Training) -> int | None:
    return section.steps


def _budget(section: Training) -> float | None:
    """Tokens of a stage that is given in epochs, where each of its sources has a budget."""
    budgets = [source.tokens for source in getattr(section, "sources", [])]
    known = [budget for budget in budgets if budget is not None]
    return (section.epochs or 1) * sum(known) if known and len(known) == len(budgets) else None


def _kept(model: Model, layout: Layout, remat: Remat, rows: int, length: int) -> list[Kept]:
    """What a step keeps for its backward pass on a device: what grows with the rows of a batch.

    Counted on one device without attention's kernel, whose sums of the softmax it therefore counts once, as our own
    attention keeps them.
    """
    split = model.split(replace(SINGLE, attention="plain"))

    def residuals(rows: int) -> list[Any]:
        batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in _FIELDS.items()}

        def loss(trainable: Flat, frozen: Flat, batch: Any) -> Any:
            def of(trainable: Flat) -> jax.Array:
                return batch_losses(split.structure, trainable, frozen, batch, remat=remat)[0]

            _, pull = jax.vjp(of, trainable)
            return pull

        return jax.tree.leaves(jax.eval_shape(loss, split.trainable, split.frozen, batch))

    # Two numbers that are no size of the model.
    one, two = residuals(3), residuals(5)
    found = []
    for few, more in zip(one, two, strict=True):
        if few.shape != more.shape:
            bytes_a_row = (math.prod(more.shape) - math.prod(few.shape)) // 2 * few.dtype.itemsize
            shape = tuple(
                rows * size // 3 if size != other else size for size, other in zip(few.shape, more.shape, strict=True)
            )
            found.append(Kept(shape, few.dtype.name, bytes_a_row * rows // layout.size("tensor")))
    return sorted(found, key=lambda kept: -kept.bytes)
