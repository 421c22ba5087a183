"""What recovery by token costs: a training step's time and memory, beside learning the same answers as text.

    python bench/recovery.py [--shape smollm2] [--batch 8] [--length 512] [--taught 2] [--top 64] [--rounds 7]

A batch has `--batch` rows of which `--taught` are English answers. Each way compiles the same step on random weights:

- sequence: the answers are text (`transfer.recovery: sequence`);
- token, both: the original model's distributions, alone and beside the text;
- token, all rows: as `token`, if every row of the batch were read again by the original;
- top: as `token`, with the `--top` most likely tokens of the original and one place for all others.

Steps of the ways alternate. Printed are the median seconds, their ratio to `sequence`, and what the compiled program
takes for intermediate values, by XLA. A mean over fewer tokens than the vocabulary saves no time here, because the
student's normaliser and the gradient need all logits, and the teacher's own are needed to find the largest. It saves
memory and disk where distributions are stored, which this does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import NEW_ROWS, SHAPES

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Split, abstract, assemble
from transllm_jax.training import divergence
from transllm_jax.training.logits import ChunkLoss, Options, Tables, log_probs, new_rows_of
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from transllm_jax.training.recovery import Teaching
from transllm_jax.training.step import initial_state, make_step


def split_of(shape: str, rank: int) -> Split:
    """A model of random weights with adapters and new rows."""
    config, lora = LlamaConfig(**SHAPES[shape]), LoraConfig(rank=rank, alpha=2.0 * rank)
    whole, rng = abstract(config, lora, NEW_ROWS), np.random.default_rng(0)

    def drawn(leaf: Any) -> Any:
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, dtype=np.float32))

    frozen = {path: drawn(leaf) for path, leaf in whole.frozen.items()}
    trainable = {path: drawn(leaf) for path, leaf in whole.trainable.items()}
    return assemble(config, frozen, lora=lora, trainable=trainable)


def batch_of(rows: int, length: int, taught: int, vocabulary: int, marker: int) -> dict[str, jax.Array]:
    """Rows of base ids; the first `taught` are of source 1, and each begins with a prompt and the marker."""
    tokens = np.random.default_rng(1).integers(0, vocabulary, (rows, length), dtype=np.int32)
    tokens[:taught, 16] = marker
    weights = np.ones((rows, length), np.float32)
    weights[:taught, :16], weights[:, -1] = 0, 0
    fields = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "labels": np.roll(tokens, -1, axis=1),
        "weights": weights,
        "sources": (np.arange(rows) < taught).astype(np.int32),
    }
    return {name: jnp.asarray(values) for name, values in fields.items()}


def top_of(count: int) -> Any:
    """`divergence._of_chunk` over the teacher's most likely tokens and the sum of all others."""

    def of_chunk(
        h: jax.Array, tables: Tables, teacher: jax.Array, weight: jax.Array, options: Options, gradients: bool
    ) -> ChunkLoss:
        original = tables.base if tables.original is None else tables.original
        scores = jnp.einsum("CD,VD->CV", teacher, original, preferred_element_type=jnp.float32)
        log_p, chosen = jax.lax.top_k(jax.nn.log_softmax(scores, axis=-1), count)
        log_q = log_probs(h, tables.base, new_rows_of(tables), options.padding)
        q = jnp.take_along_axis(log_q.base, chosen, axis=-1)
        rest_p, rest_q = (jnp.log1p(-jnp.minimum(jnp.exp(x).sum(-1), 1 - 1e-6)) for x in (log_p, q))
        p, left = jnp.exp(log_p), jnp.exp(rest_p)
        losses = (jnp.sum(p * (log_p - q), axis=-1) + left * (rest_p - rest_q)) * weight
        if not gradients:
            return jnp.sum(losses), losses, None
        # d / d logit: of a chosen token q - p, of any other q * (1 - left / rest of q).
        scale, share = weight[:, None], jnp.exp(rest_p - rest_q)[:, None]
        others = jnp.exp(log_q.base) * (1 - share)
        places = jnp.arange(h.shape[0])[:, None]
        of_base = others.at[places, chosen].set(jnp.exp(q) - p)
        return jnp.sum(losses), losses, (of_base * scale, jnp.exp(log_q.new) * (1 - share) * scale)

    return of_chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--batch", type=int, default=8, help="rows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (%(default)s)")
    parser.add_argument("--taught", type=int, default=2, help="rows of English answers (%(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    split, marker = split_of(given.shape, given.rank), SHAPES[given.shape]["vocab_size"]
    batch = batch_of(given.batch, given.length, given.taught, marker, marker)
    rates = OptimizerConfig(1e-4, steps=1000, warmup_steps=1)
    optimizer = make_optimizer(rates)
    full = divergence._of_chunk
    ways: dict[str, tuple[Teaching | None, Any]] = {
        "sequence": (None, full),
        "token": (Teaching(("sequence", "token"), given.taught, marker), full),
        "both": (Teaching(("sequence", "both"), given.taught, marker), full),
        "token, all rows": (Teaching(("sequence", "token"), given.batch, marker), full),
        f"top {given.top}": (Teaching(("sequence", "token"), given.taught, marker), top_of(given.top)),
    }
    steps, memory = {}, {}
    for name, (teaching, of_chunk) in ways.items():
        divergence._of_chunk = of_chunk
        step = make_step(
            split.structure,
            optimizer,
            schedule(rates),
            seed=0,
            dropout=False,
            remat="none",
            sources=2,
            teaching=teaching,
        )
        state = initial_state({path: jnp.copy(array) for path, array in split.trainable.items()}, optimizer)
        lowered: Any = step
        steps[name] = (lowered.lower(state, split.frozen, batch).compile(), state)
        memory[name] = steps[name][0].memory_analysis().temp_size_in_bytes
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):
        for name, (compiled, state) in steps.items():
            started = time.perf_counter()
            state, metrics = compiled(state, split.frozen, batch)
            jax.block_until_ready(metrics.loss)
            if number:
                seconds[name].append(time.perf_counter() - started)
            steps[name] = (compiled, state)
    first = statistics.median(seconds["sequence"])
    tokens = given.batch * given.length
    print(f"{given.batch} rows of {given.length} tokens, {given.taught} taught; {jax.devices()[0].device_kind}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:16} {median:7.2f} s  x {median / first:4.2f}  {tokens / median:7.0f} tokens/s  "
            f"{memory[name] / 2**30:6.2f} GiB intermediate"
        )


if __name__ == "__main__":
    main()
