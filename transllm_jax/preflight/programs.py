"""A run's training steps and generation as programs for TPUs that are not present, lowered from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transllm_jax.choices import TRAININGS, Remat
from transllm_jax.config import Config, Training
from transllm_jax.config.training import Transfer
from transllm_jax.conversion.hf.directory import parse_config
from transllm_jax.disk import read_model_json
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import SINGLE, Layout
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Flat, Split, abstract
from transllm_jax.stages.points import lora_of, trains
from transllm_jax.stages.training import check_layout, loop_config, rows_taught
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.flops import forward_flops_per_token, mean_keys, train_flops_per_token
from transllm_jax.training.loop import step_of
from transllm_jax.training.optimizer import make_optimizer
from transllm_jax.training.placement import Placement
from transllm_jax.training.recovery import Teaching
from transllm_jax.training.step import batch_losses, initial_state

STAGES = (*TRAININGS, "generation")
# The arrays [B, T] of a batch; a training step also takes `sources` [B].
_FIELDS = {"tokens": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32, "labels": jnp.int32}
_FIELDS |= {"weights": jnp.float32}


class Residual(NamedTuple):
    """An array that the forward pass keeps for the backward pass: shape, type and bytes on one device."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}, kept for the backward pass"


@dataclass(frozen=True)
class Program:
    """A program to compile, and what is known about it before it is compiled.

    lower: returns the lowered program. arguments: bytes on one device by kind: frozen, adapters (all trained arrays),
    optimizer, batch or cache. buffers: bytes on one device of the largest arguments, by name. kept: the residuals of a
    training step. model_flops: FLOPs of one execution on all devices, without rematerialisation. tokens: processed by
    one execution, on all devices. budget: tokens of the whole stage; None if unknown. about: one line for people.
    """

    stage: str
    lower: Callable[[], Any]
    layout: Layout
    arguments: dict[str, int]
    buffers: dict[str, int]
    kept: list[Residual]
    model_flops: float
    tokens: int
    budget: float | None
    about: str
    # For the table: rows x length of a batch, and the rematerialisation policy.
    rows: str
    remat: str = ""
    # The most keys that a query attends to, which the compiled kernel does not show.
    window: int | None = None
    # The rounds of loops that depend on data, by `op_name`; see `count_hlo`.
    rounds: Callable[[str], int | None] | None = None
    # Bytes on one device that have to be read once, whatever the program is, by kind; of generating a token.
    least: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelShapes:
    """The shapes of a run's model. `new_rows`: added to the vocabulary. `full`: all weights are trained."""

    config: Config
    shape: LlamaConfig
    new_rows: int
    full: bool

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None with full fine-tuning."""
        return None if self.full else lora_of(self.config)

    def split(self, layout: Layout) -> Split:
        """The trained and the frozen arrays, as shapes with shardings.

        Raises UserError if the mesh does not divide them.
        """
        dtype = jnp.dtype(self.config.model.dtype)
        train_base = not self.full and self.config.embeddings == "all"
        whole = abstract(self.shape, self.lora, self.new_rows, dtype, train_base=train_base, layout=layout)
        if not self.full:
            return whole.freeze(path for path in whole.trainable if not trains(self.config, path))
        float32: dict[str, Any] = {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
            for path, leaf in whole.frozen.items()
        }
        return Split(whole.structure, {**whole.trainable, **float32}, {})


def model_shapes(config: Config, workdir: Path, *, full: bool = False) -> ModelShapes:
    """The shapes of a config's model: from its work directory, else from `model.shape`, else from a local source.

    `full`: train all weights, whatever the config says. Raises UserError if none of these has a config.json.
    """
    candidates = [workdir / "base" / "config.json", *([Path(config.model.shape)] if config.model.shape else [])]
    candidates.append(Path(config.model.source) / "config.json")
    path = next((path for path in candidates if path.is_file()), None)
    if path is None and config.model.shape:
        raise UserError(
            f"model.shape: {config.model.shape}: no such file; paths are relative to the directory in which the "
            "command is started"
        )
    if path is None:
        raise UserError(
            f"the shape of {config.model.source} is not known here: name its config.json with "
            "model.shape=FILE, or import it with `transllm run CONFIG --until base`"
        )
    shape = parse_config(read_model_json(path), path.parent)
    return ModelShapes(config, shape, _new_rows(config, shape, workdir), full or config.lora is None)


def _new_rows(config: Config, shape: LlamaConfig, workdir: Path) -> int:
    section = config.vocabulary
    done = workdir / "vocabulary" if (workdir / "vocabulary" / "manifest.json").is_file() else None
    given = section.tokenizer or section.adapter
    markers = len({config.markers.english, config.target_marker, config.markers.response})
    if done is not None or given is not None:
        rows = Tokenizer.load(done or Path(str(given))).vocab_size - shape.vocab_size
    else:
        rows = (section.size or 0) + markers
    multiple = section.pad_to_multiple_of
    return -(-rows // multiple) * multiple


def training_program(
    model: ModelShapes, stage: str, layout: Layout, *, remat: Remat, batch_size: int, accumulate: int, length: int
) -> Program:
    """The training step of a stage. Raises UserError if the mesh does not divide the model or the batch.

    batch_size: rows of a step, in `accumulate` parts. length: tokens of a row.
    """
    section: Training = getattr(model.config, stage).model_copy(
        update={"remat": remat, "batch_size": batch_size, "accumulate": accumulate, "length": length}
    )
    if batch_size % accumulate:
        raise UserError(f"{stage}: a batch of {batch_size} rows is no multiple of {accumulate} parts")
    check_layout(layout, stage, section, model.shape.head_dim)
    split = model.split(layout)
    # Placeholders for the sources' names, and below for a number of steps that is not known.
    sources = ("a", "b") if stage != "transfer" else ("a", "b", "c")
    teaching = _teaching(section, batch_size // accumulate, layout)
    config = loop_config(model.lora, stage, section, section.steps or 1000, seed=0, sources=sources, teaching=teaching)
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
    tokens = batch_size * length
    return Program(
        stage=stage,
        lower=lambda: step_of(config, split).lower(state, split.frozen, batch),  # type: ignore[attr-defined]
        layout=layout,
        arguments={kind: sum(map(local_bytes, jax.tree.leaves(tree))) for kind, tree in arguments.items()},
        buffers=_largest({"frozen": split.frozen, "trained": state.trainable}),
        kept=_residuals(model, layout, remat, rows, length),
        model_flops=flops * tokens,
        tokens=tokens,
        budget=_budget(section) if section.steps is None else section.steps * tokens,
        about=f"{batch_size} x {length} tokens a step, {rows} x {length} at once on a device, "
        f"{accumulate} {'parts' if accumulate > 1 else 'part'}, remat {remat}",
        rows=f"{batch_size}x{length}",
        remat=remat,
        window=model.shape.sliding_window,
    )


def _teaching(section: Training, size: int, layout: Layout) -> Teaching | None:
    """What the original model teaches in a step, by the config's shares alone; None if it teaches nothing."""
    sources = getattr(section, "sources", [])
    taught = [source.weight for source in sources if source.recovery != "sequence"]
    shares = [source.weight for source in sources]
    if isinstance(section, Transfer):
        shares += [section.chains, section.english, section.translations]
        taught += [section.english] if section.recovery != "sequence" else []
    if not taught:
        return None
    # Without weights the shares are those of sizes, which are not known here: any row may be taught.
    share = 1.0 if None in shares else sum(filter(None, taught)) / sum(filter(None, shares))
    rows = rows_taught(min(math.ceil(share * size) + 1, size), size, layout)
    return Teaching(("token", "sequence", "sequence"), rows, marker=0)


def generation_programs(
    model: ModelShapes, layout: Layout, *, batch_size: int, prompt: int, new_tokens: int
) -> list[Program]:
    """The two programs of generation: reading prompts, and a burst of new tokens, counted as one token a row.

    prompt, new_tokens: tokens of each of the `batch_size` rows; the prompt is read as one piece. The token is the last
    one of the longest answer, which attends to the most keys.
    """
    from transllm_jax.generation.engine import PIECES, lowered
    from transllm_jax.model.cache import CHUNK

    split = model.split(layout)
    width = -(-prompt // PIECES[0]) * PIECES[0]
    prefill, burst, state = lowered(split, batch_size, width, new_tokens)
    arguments = {
        "frozen": sum(map(local_bytes, split.frozen.values())),
        "adapters": sum(map(local_bytes, split.trainable.values())),
    }
    # Of a table of embeddings that is not the output table as well, only a few rows are read.
    looked_up = set() if model.shape.tie_word_embeddings else {"vocabulary.base", "vocabulary.new"}
    read = {
        kind: sum(local_bytes(leaf) for path, leaf in arrays.items() if path not in looked_up)
        for kind, arrays in (("frozen", split.frozen), ("adapters", split.trainable))
    }
    cache = {"cache": sum(map(local_bytes, jax.tree.leaves(state)))}
    buffers = _largest({"frozen": split.frozen, "trained": split.trainable})
    window = model.shape.sliding_window
    longest = width + new_tokens
    flops = partial(forward_flops_per_token, model.shape, model.lora, model.new_rows)
    return [
        Program(
            stage="generation: prompts",
            lower=prefill,
            layout=layout,
            arguments=arguments,
            buffers=buffers,
            kept=[],
            model_flops=flops(mean_keys(model.shape, width), logits=1 / width) * batch_size * width,
            tokens=batch_size * width,
            budget=None,
            about=f"{batch_size} prompts of {width} tokens",
            rows=f"{batch_size}x{width}",
            window=window,
            rounds=partial(_attention_rounds, 0),
        ),
        Program(
            stage="generation: a token",
            lower=burst,
            layout=layout,
            arguments=arguments | cache,
            buffers=buffers,
            kept=[],
            model_flops=flops(min(longest, window or longest)) * batch_size,
            tokens=batch_size,
            budget=None,
            about=f"{batch_size} rows, up to {longest} tokens each",
            rows=f"{batch_size}x{longest}",
            window=window,
            rounds=partial(_attention_rounds, -(-longest // CHUNK)),
            least=read | {"cache": sum(map(local_bytes, jax.tree.leaves(state.cache)))},
        ),
    ]


def _attention_rounds(chunks: int, op_name: str) -> int | None:
    """How often attention reads a chunk of the cache; 1 for the loop over the tokens of a burst; None for others."""
    if op_name.endswith("closed_call/while"):
        return chunks
    return 1 if op_name == "jit(burst)/while" else None


def local_bytes(leaf: Any) -> int:
    """Bytes of an array on one device, by its sharding."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _largest(trees: dict[str, Flat]) -> dict[str, int]:
    sizes = {f"{kind} {path}": local_bytes(leaf) for kind, tree in trees.items() for path, leaf in tree.items()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:8])


def _batch(placement: Placement, size: int, length: int) -> dict[str, Any]:
    shape, sharding = placement.shape(size, length), placement.batch_sharding
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in _FIELDS.items()}
    return {**batch, "sources": jax.ShapeDtypeStruct(placement.shape(size), jnp.int32, sharding=sharding)}


def _budget(section: Training) -> float | None:
    """Tokens of a stage whose length is given in epochs; None unless each of its sources has a budget."""
    budgets = [source.tokens for source in getattr(section, "sources", [])]
    known = [budget for budget in budgets if budget is not None]
    return (section.epochs or 1) * sum(known) if known and len(known) == len(budgets) else None


def _residuals(model: ModelShapes, layout: Layout, remat: Remat, rows: int, length: int) -> list[Residual]:
    """The residuals of a step with `rows` rows on a device, largest first: those that grow with the number of rows.

    Counted for one device and with plain attention; the sums of the kernel's softmax are therefore counted once, as
    plain attention keeps them.
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

    # Numbers of rows that are not also sizes of the model, so that a dimension that differs counts rows.
    few, more = 3, 5
    found = []
    for small, large in zip(residuals(few), residuals(more), strict=True):
        if small.shape != large.shape:
            bytes_a_row = (math.prod(large.shape) - math.prod(small.shape)) // (more - few) * small.dtype.itemsize
            shape = tuple(
                rows * size // few if size != other else size
                for size, other in zip(small.shape, large.shape, strict=True)
            )
            found.append(Residual(shape, small.dtype.name, bytes_a_row * rows // layout.size("tensor")))
    return sorted(found, key=lambda residual: -residual.bytes)
