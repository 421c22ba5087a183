"""Compares a training step with LoRA and a trained vocabulary: ours, and torch + transformers + PEFT.

    python bench/training.py [--shape small|smollm2|both|llama2-7b] [--dtype float32|bfloat16]
        [--remat none|projections|queries|feed_forward|attention|full] [--embeddings new|all|both] [--rounds 5]
        [--batch 4] [--length 512] [--rank 64] [--patience 0] [--apart] [--without-torch]

Both load the same Hugging Face directory of random weights and use the same LoRA matrices on all seven projections, the
same tokens, and AdamW with the same rates, betas and clipping, without dropout. 8,000 of the tokens are new. Ours
trains only their rows (`new`) or the whole tables (`all`), as PEFT does with `modules_to_save`. For a tied model PEFT
trains two separate tables unless `ensure_weight_tying` is set; it is set here, so that both train one table. Torch uses
its fused AdamW. In bfloat16 it computes under autocast, with trainable parameters in float32, like ours. Its gradient
checkpointing is on if `--remat` is not `none`.

Each subject runs in its own process, which does two steps to warm up and then waits. Steps alternate, so that changes
in the machine's speed affect all subjects (`--apart`: one process after the other, if memory is short). Other work on
the machine would not affect them equally: torch's threads wait for one another after each product and lose far more
time. So each step waits for a quiet machine, up to `--patience` seconds in all; rounds are added until enough were
undisturbed; and the share that other processes took in the rounds that count is printed. Prints the median seconds,
tokens per second, torch's seconds divided by ours, the peak memory after loading (of the process, with compilation; on
a GPU that of its arrays), its share of torch's, and the loss of each step: with `all` the losses of both agree, with
`new` the first ones. Needs `pip install torch peft` besides this package.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transllm_jax.choices import Remat

NEW_ROWS = 8000
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 32000,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "smollm2": {
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
    },
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
RATE, BETAS, EPSILON, CLIP = 1e-4, (0.9, 0.95), 1e-8, 1.0
WARM_UP = 2
# A round counts if other processes took at most the share QUIET of the processors in each of its steps. After
# MOST_ROUNDS times the wanted rounds, the quietest ones count.
QUIET, MOST_ROUNDS = 0.1, 2


@dataclass(frozen=True)
class Work:
    """The work of every subject: a model directory, adapters, and how they are trained."""

    shape: str
    dtype: str
    remat: Remat
    batch: int
    length: int
    rank: int
    model: Path

    def tokens(self, step: int) -> np.ndarray:
        """The ids [B, T] of a step."""
        rng = np.random.default_rng(1000 + step)
        return rng.integers(0, SHAPES[self.shape]["vocab_size"] + NEW_ROWS, (self.batch, self.length), np.int32)


# Runs a step: its number -> its loss.
Run = Callable[[int], float]


def write_weights(work: Work) -> None:
    """Write a Hugging Face directory of random weights, with the rows of the new tokens after the others."""
    import ml_dtypes

    from transllm_jax.conversion.hf.directory import write_model
    from transllm_jax.conversion.names import weight_shapes
    from transllm_jax.model.config import LlamaConfig

    shape = SHAPES[work.shape]
    config = LlamaConfig(**{**shape, "vocab_size": shape["vocab_size"] + NEW_ROWS})
    dtype = np.float32 if work.dtype == "float32" else ml_dtypes.bfloat16
    rng = np.random.default_rng(0)
    weights = {}
    for path, size in weight_shapes(config).items():
        array = np.ones(size, dtype)
        if not path.endswith("scale"):
            # One layer at a time, to need a second copy of a layer only.
            for part in array if array.ndim == 3 else [array]:
                part[...] = 0.03 * rng.standard_normal(part.shape, np.float32)
        weights[path] = array
    write_model(work.model, config, weights, dtype=work.dtype)


def adapters(work: Work) -> dict[str, np.ndarray]:
    """LoRA's initial matrices, path -> array, the same for all subjects."""
    from transllm_jax.model.config import LlamaConfig
    from transllm_jax.model.lora import LoraConfig
    from transllm_jax.model.parameters import initial_adapters

    return initial_adapters(LlamaConfig(**SHAPES[work.shape]), LoraConfig(work.rank, 2 * work.rank), 0)


def ours(work: Work, embeddings: str) -> Run:
    import jax
    import jax.numpy as jnp

    from transllm_jax.conversion.hf.directory import read_weights
    from transllm_jax.model.config import LlamaConfig
    from transllm_jax.model.lora import LoraConfig
    from transllm_jax.model.parameters import assemble, load_frozen
    from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
    from transllm_jax.training.step import initial_state, make_step

    config, lora = LlamaConfig(**SHAPES[work.shape]), LoraConfig(work.rank, 2 * work.rank)
    weights = read_weights(work.model, jnp.dtype(work.dtype))
    trainable: dict[str, Any] = adapters(work)
    for end in ("",) if config.tie_word_embeddings else ("", "output_"):
        table = weights[f"vocabulary.{end}base"]
        weights[f"vocabulary.{end}base"] = table[: config.vocab_size].copy()
        trainable[f"vocabulary.{end}new"] = table[config.vocab_size :].astype(np.float32)
        if embeddings == "all":
            trainable[f"vocabulary.{end}base_trained"] = table[: config.vocab_size].astype(np.float32)
        del table
    split = assemble(config, load_frozen(config, weights, jnp.dtype(work.dtype)), lora=lora, trainable=trainable)
    del trainable
    structure, frozen = split.structure, split.frozen
    rates = OptimizerConfig(
        RATE, 1, 0, beta1=BETAS[0], beta2=BETAS[1], clip_norm=CLIP, weight_decay=0.0, schedule="constant"
    )
    optimizer = make_optimizer(rates)
    step = make_step(structure, optimizer, schedule(rates), seed=0, dropout=False, remat=work.remat)
    state = initial_state(split.trainable, optimizer)
    del split

    def run(number: int) -> float:
        nonlocal state
        tokens = work.tokens(number)
        weights = np.ones(tokens.shape, np.float32)
        # The last token of a row has no label.
        weights[:, -1] = 0
        batch = {
            "tokens": tokens,
            "positions": np.broadcast_to(np.arange(work.length, dtype=np.int32), tokens.shape),
            "segment_ids": np.ones_like(tokens),
            "labels": np.roll(tokens, -1, axis=1),
            "weights": weights,
        }
        state, metrics = step(state, frozen, {field: jnp.asarray(values) for field, values in batch.items()})
        jax.block_until_ready(state)
        return float(metrics.loss)

    return run


def torch_peft(work: Work) -> Run:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from transllm_jax.conversion.names import KERNELS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, work.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    model = model.to(device)
    tied = SHAPES[work.shape]["tie_word_embeddings"]
    model = get_peft_model(
        model,
        LoraConfig(
            r=work.rank,
            lora_alpha=2 * work.rank,
            target_modules=[name.rpartition(".")[2] for name in KERNELS.values()],
            modules_to_save=["embed_tokens"] if tied else ["embed_tokens", "lm_head"],
            ensure_weight_tying=tied,
        ),
    )
    copied = 0
    matrices = adapters(work)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.data = parameter.data.float()
            for path, part in KERNELS.items():
                if f".{part}.lora_A" in name:
                    layer = int(name.partition("layers.")[2].partition(".")[0])
                    parameter.copy_(torch.from_numpy(matrices[f"{path}.a"][layer].T.copy()))
                    copied += 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = [parameter for parameter in trained if len(parameter) == SHAPES[work.shape]["vocab_size"] + NEW_ROWS]
    assert copied == 7 * SHAPES[work.shape]["num_hidden_layers"] and len(tables) == 2 - tied
    if work.remat != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)

    def run(number: int) -> float:
        tokens = torch.from_numpy(work.tokens(number)).long().to(device)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=work.dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return loss.item()

    return run


OURS = {"new": "ours, new rows", "all": "ours, all rows"}
TORCH = "torch + PEFT"


def clear_peak() -> None:
    """Reset the peak memory, so that it does not include loading."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The peak memory since `clear_peak`, in GiB: of the process, or of a GPU's arrays."""
    if "jax" in sys.modules:
        import jax

        if jax.default_backend() != "cpu" and (stats := jax.devices()[0].memory_stats()):
            return float(stats["peak_bytes_in_use"]) / 2**30
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return float(torch.cuda.max_memory_allocated()) / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def processors() -> tuple[float, float]:
    """Busy seconds and total seconds of all processors since the machine was started."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), sum(ticks) / os.sysconf("SC_CLK_TCK")


def others(before: tuple[float, float], after: tuple[float, float], own: float = 0.0) -> float:
    """The share of the processors that other processes took between two readings of `processors`."""
    return max(0.0, after[0] - before[0] - own) / max(after[1] - before[1], 0.01)


class Patience:
    """Waits for a quiet machine, for this many seconds in all."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def wait(self) -> None:
        while self.left > 0:
            before = processors()
            time.sleep(0.5)
            self.left -= 0.5
            if others(before, processors()) < QUIET / 2:
                return


def serve(name: str, pipe: Connection, work: Work) -> None:
    """Run one step for each request, until None; then send the peak memory in GiB."""
    # Subjects may share one GPU, so none may reserve its memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if name == TORCH:
        # The initial adapters are made with jax, which must not use the GPU that torch is measured on.
        os.environ["JAX_PLATFORMS"] = "cpu"
        run = torch_peft(work)
    else:
        run = ours(work, next(embeddings for embeddings, subject in OURS.items() if subject == name))
    clear_peak()
    for number in range(WARM_UP):
        pipe.send(run(number))
    while (number := pipe.recv()) is not None:
        start, before, own = time.perf_counter(), processors(), time.process_time()
        loss = run(number)
        seconds, after = time.perf_counter() - start, processors()
        pipe.send((seconds, others(before, after, time.process_time() - own), loss))
    pipe.send(peak())


class Subject:
    """A process that runs a step for each request."""

    def __init__(self, name: str, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(name, theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.losses: list[float] = [self.pipe.recv() for _ in range(WARM_UP)]
        # For each step: its seconds, and the share of the machine that other processes took.
        self.steps: list[tuple[float, float]] = []
        self.peak = 0.0

    def step(self) -> None:
        self.pipe.send(len(self.losses))
        seconds, disturbed, loss = self.pipe.recv()
        self.steps.append((seconds, disturbed))
        print(f"{self.name}: {seconds:.3f} s, others took {disturbed:.0%}", file=sys.stderr, flush=True)
        self.losses.append(loss)

    def end(self) -> None:
        self.pipe.send(None)
        self.peak = self.pipe.recv()
        self.process.join()


def rounds_of(subjects: list[Subject], rounds: int, patience: Patience) -> None:
    """Run alternating steps until enough rounds are quiet; then keep only the quietest."""

    def disturbed(number: int) -> float:
        return max(subject.steps[number][1] for subject in subjects)

    done = 0
    while done < MOST_ROUNDS * rounds and sum(disturbed(number) <= QUIET for number in range(done)) < rounds:
        for subject in subjects:
            patience.wait()
            subject.step()
        done += 1
    quietest = sorted(range(done), key=disturbed)[:rounds]
    for subject in subjects:
        subject.steps = [subject.steps[number] for number in quietest]


def measure(names: list[str], work: Work, rounds: int, patience: Patience, apart: bool) -> list[Subject]:
    subjects: list[Subject] = []
    for name in names:
        subjects.append(Subject(name, work))
        if apart:
            rounds_of(subjects[-1:], rounds, patience)
            subjects[-1].end()
    if not apart:
        rounds_of(subjects, rounds, patience)
        for subject in subjects:
            subject.end()
    return subjects


def report(subjects: list[Subject], work: Work) -> None:
    medians = {subject.name: statistics.median(seconds for seconds, _ in subject.steps) for subject in subjects}
    base = next((subject for subject in subjects if subject.name == TORCH), None)
    print(f"{work.shape}, {work.dtype}, {work.batch} x {work.length} tokens, rank {work.rank}, remat {work.remat}")
    for subject in subjects:
        seconds, disturbed = zip(*subject.steps, strict=True)
        median = medians[subject.name]
        line = (
            f"  {subject.name:15} {median:7.3f} s ({min(seconds):.3f} to {max(seconds):.3f}) "
            f"{work.batch * work.length / median:7.0f} tokens/s  peak {subject.peak:6.2f} GiB"
        )
        if base is not None and subject is not base:
            speed, memory = medians[base.name] / median, subject.peak / base.peak
            line += f"   {speed:.2f}x the speed, {memory:.2f}x the memory"
        print(f"{line}   (others took up to {max(disturbed):.0%})")
    for subject in subjects:
        print(f"  losses, {subject.name:15} " + " ".join(f"{loss:.6f}" for loss in subject.losses))
    if base is not None:
        for subject in subjects:
            differences = [abs(a / b - 1) for a, b in zip(subject.losses, base.losses, strict=False)]
            if subject is not base:
                print(f"  {subject.name}: first loss differs by {differences[0]:.1e}, any by {max(differences):.1e}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both", help="both: small and smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    remats = ["none", "projections", "queries", "feed_forward", "attention", "full"]
    parser.add_argument("--remat", choices=remats, default="none")
    parser.add_argument("--embeddings", choices=[*OURS, "both"], default="both")
    for option, default in (("rounds", 5), ("batch", 4), ("length", 512), ("rank", 64)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, in all")
    parser.add_argument("--apart", action="store_true", help="one process after the other")
    parser.add_argument("--without-torch", action="store_true", help="ours alone")
    options = parser.parse_args()
    names = [name for embeddings, name in OURS.items() if options.embeddings in (embeddings, "both")]
    names += [] if options.without_torch else [TORCH]
    for shape in ("small", "smollm2") if options.shape == "both" else (options.shape,):
        with tempfile.TemporaryDirectory() as scratch:
            work = Work(
                shape,
                options.dtype,
                options.remat,
                options.batch,
                options.length,
                options.rank,
                Path(scratch) / "model",
            )
            write_weights(work)
            report(measure(names, work, options.rounds, Patience(options.patience), options.apart), work)


if __name__ == "__main__":
    main()
