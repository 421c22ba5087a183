"""One training step of SmolLM2-135M's shape with LoRA and new vocabulary rows: ours beside torch + PEFT.

    python bench/train_step.py [--batch 4] [--length 256] [--rank 32] [--rounds 5]

Both train adapters on all seven projections and the rows of 2,000 new tokens, in float32, on random weights and random
tokens, with AdamW. PEFT trains the new rows the way its users do (`trainable_token_indices`). Each runs in a process of
its own that is warmed up and then waits; steps alternate, so that a machine that speeds up or slows down does so for
both. Printed: median seconds, tokens a second, their ratio, and each process's peak memory.
Needs `pip install torch peft` besides this package.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
NEW_ROWS = 2000


def ours(batch: int, length: int, rank: int) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from transllm_jax.model.config import LlamaConfig
    from transllm_jax.model.lora import LoraConfig
    from transllm_jax.model.parameters import abstract, assemble, initial_adapters
    from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
    from transllm_jax.training.step import initial_state, make_step

    config, lora, rng = LlamaConfig(**SHAPE), LoraConfig(rank, 2 * rank), np.random.default_rng(0)
    shapes = abstract(config, lora, NEW_ROWS).frozen
    frozen = {
        path: jnp.asarray(0.03 * rng.standard_normal(leaf.shape, dtype=np.float32)) for path, leaf in shapes.items()
    }
    rows = 0.03 * rng.standard_normal((NEW_ROWS, config.hidden_size), dtype=np.float32)
    split = assemble(config, frozen, lora=lora, trainable={**initial_adapters(config, lora, 0), "vocabulary.new": rows})
    rates = OptimizerConfig(1e-4, 1000, 10)
    optimizer = make_optimizer(rates)
    step = make_step(split.structure, optimizer, schedule(rates), seed=0, dropout=False, remat="none")
    state = initial_state(split.trainable, optimizer)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size + NEW_ROWS, (batch, length)), jnp.int32)
    fields = {
        "tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
        "segment_ids": jnp.ones_like(tokens),
        "labels": jnp.roll(tokens, -1, axis=1),
        "weights": jnp.ones(tokens.shape, jnp.float32),
    }

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, split.frozen, fields)
        jax.block_until_ready(metrics.loss)
        return time.perf_counter() - start

    return run


def torch_peft(batch: int, length: int, rank: int) -> Callable[[], float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**SHAPE, "vocab_size": SHAPE["vocab_size"] + NEW_ROWS}
    theta = shape.pop("rope_theta")
    config = LlamaConfig(**shape, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    model = LlamaForCausalLM(config)
    model = get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            trainable_token_indices={"embed_tokens": list(range(SHAPE["vocab_size"], shape["vocab_size"]))},
        ),
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, shape["vocab_size"], (batch, length))

    def run() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - start

    return run


SUBJECTS = {"transllm-jax": ours, "torch + PEFT": torch_peft}


def serve(name: str, pipe: Connection, batch: int, length: int, rank: int) -> None:
    """A step a request, until None; then the peak memory in GiB."""
    run = SUBJECTS[name](batch, length, rank)
    for _ in range(2):
        run()
    pipe.send("ready")
    while pipe.recv() is not None:
        pipe.send(run())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("batch", 4), ("length", 256), ("rank", 32), ("rounds", 5)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in SUBJECTS:
        pipes[name], theirs = context.Pipe()
        arguments = (name, theirs, options.batch, options.length, options.rank)
        context.Process(target=serve, args=arguments, daemon=True).start()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    for _ in range(options.rounds):
        for name, pipe in pipes.items():
            pipe.send("step")
            seconds[name].append(pipe.recv())
    tokens = options.batch * options.length
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, pipe in pipes.items():
        pipe.send(None)
        peak = pipe.recv()
        low, high = min(seconds[name]), max(seconds[name])
        print(
            f"{name:14} {medians[name]:6.2f} s ({low:.2f} to {high:.2f})  {tokens / medians[name]:6.0f} tokens/s  "
            f"peak {peak:.2f} GiB"
        )
    print(f"ratio {medians['torch + PEFT'] / medians['transllm-jax']:.2f}")


if __name__ == "__main__":
    main()
