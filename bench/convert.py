"""Converts a checkpoint of LLaMA-2-7B's shape to ours and back; measures time and memory, and compares every bit.

    python bench/convert.py [--layers 32] [--dir DIR] [--keep] [--mesh fsdp=8,tensor=2] [--rank 64] [--transformers]

Writes a Hugging Face directory of random bfloat16 weights (13.5 GB in shards of at most 2 GB; fewer layers make it
smaller), then runs `transllm convert from-hf SRC OURS` and `transllm convert to-hf OURS BACK`, each in its own process,
whose peak resident memory the kernel reports when it ends. Then every tensor of BACK is compared with that of SRC by
its SHA-256, and config.json byte for byte. With `--rank`, a third command merges random adapters on all layers into
OURS and computes the logits of a prompt before and after. With `--transformers` (and torch), `from_pretrained` and
`save_pretrained` are timed too. Needs free disk space of three times the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))

from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.conversion.adapter import AdapterDescription, write_adapter
from transllm_jax.conversion.hf.directory import open_hf, write_config
from transllm_jax.conversion.hf.safetensors_io import write_tensors
from transllm_jax.conversion.hf.tokenizer_files import copy_tokenizer
from transllm_jax.conversion.names import Tensor, kernel_shapes, tensors
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import LoraConfig
from transllm_jax.training.arrays import save_arrays

ROOT = Path(__file__).parents[1]

SHARD_BYTES = 2_000_000_000


def llama2_7b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def write_source(directory: Path, config: LlamaConfig) -> None:
    """Write random finite bfloat16 weights: any sign and mantissa, and exponents like those of real weights."""
    dtype = np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)

    def get(tensor: Tensor) -> np.ndarray:
        bits = rng.integers(0, 1 << 16, int(np.prod(tensor.shape)), dtype=np.uint16)
        # The exponent's high bits are 0111 1: from 2^-7 up to 2^0, so never NaN or infinite.
        np.bitwise_and(bits, 0x83FF, out=bits)
        np.bitwise_or(bits, 0x3C00, out=bits)
        return bits.view(dtype).reshape(tensor.shape)

    directory.mkdir()
    write_tensors(directory, tensors(config), get, dtype, max_shard_bytes=SHARD_BYTES)
    write_config(directory, {**config.to_hf(), "bos_token_id": 1, "eos_token_id": 2}, dtype.name)
    build_tiny_tokenizer(directory)  # 400 tokens: the other rows count as padding


# Starts the command and prints its peak memory in KiB. The kernel counts the memory of the parent in a process's peak,
# and this script has held whole tensors, so a small process starts the command.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def convert(*arguments: str) -> tuple[float, float]:
    """Run `transllm convert ARGUMENTS`; returns seconds and the process's peak resident memory in GiB."""
    return measure([sys.executable, "-m", "transllm_jax.cli.main", "convert", *arguments])


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; returns seconds and the process's peak resident memory in GiB."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command[-4:])} ended with exit code {done.returncode}")
    return seconds, int(done.stdout) / 2**20


TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="2GB")
"""


def write_random_adapter(directory: Path, base: Path, config: LlamaConfig, rank: int) -> None:
    """Write adapters on every layer that change the kernels by about a hundredth of their size."""
    lora, rng = LoraConfig(rank, 2.0 * rank), np.random.default_rng(1)
    arrays = {}
    for path, (size_in, size_out) in kernel_shapes(config).items():
        layers = config.num_hidden_layers
        arrays[f"{path}.a"] = rng.standard_normal((layers, size_in, rank), np.float32) * np.float32(size_in**-0.5)
        arrays[f"{path}.b"] = rng.standard_normal((layers, rank, size_out), np.float32) * np.float32(0.01)
    directory.mkdir()
    save_arrays(directory / "trainable", arrays)
    copy_tokenizer(base, directory)
    model = open_directory(base)
    write_adapter(directory, AdapterDescription.of(model, lora, base_name=str(base), source="random"))


def hashes(directory: Path) -> dict[str, tuple[str, str]]:
    """Type and SHA-256 of every tensor of a Hugging Face directory."""
    model = open_hf(directory)
    found = {}
    for tensor in tensors(model.config):
        array = np.ascontiguousarray(model.read(tensor))
        found[tensor.name] = (array.dtype.name, hashlib.sha256(array.view(np.uint8).data).hexdigest())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dir", type=Path, help="where to work (a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="leave the three directories there")
    parser.add_argument("--mesh", help="cut our checkpoint for these devices, such as fsdp=8,tensor=2")
    parser.add_argument("--rank", type=int, help="merge random adapters of this rank, too")
    parser.add_argument("--transformers", action="store_true", help="time from_pretrained and save_pretrained, too")
    options = parser.parse_args()
    if options.dir is not None:
        options.dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=options.dir))
    source, ours, back = (work / name for name in ("source", "ours", "back"))
    try:
        config = llama2_7b(options.layers)
        start = time.perf_counter()
        write_source(source, config)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        shards = len(list(source.glob("*.safetensors")))
        print(
            f"source   {size / 1e9:6.2f} GB in {shards} file(s), made in {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        mesh = [] if options.mesh is None else ["--mesh", options.mesh]
        for name, arguments in (
            ("from-hf", [str(source), str(ours), *mesh]),
            ("to-hf", [str(ours), str(back)]),
        ):
            seconds, peak = convert(name, *arguments)
            print(f"{name:8} {seconds:6.1f} s  {size / seconds / 1e9:.2f} GB/s  peak {peak:.2f} GiB", flush=True)
        before, after = hashes(source), hashes(back)
        differing = [name for name in before if before[name] != after.get(name)]
        if before.keys() != after.keys() or differing:
            raise SystemExit(f"{len(differing)} of {len(before)} tensors differ: {', '.join(differing[:5])}")
        if (source / "config.json").read_bytes() != (back / "config.json").read_bytes():
            raise SystemExit("config.json differs")
        print(f"equal    all {len(before)} tensors by SHA-256, and config.json by its bytes", flush=True)
        shutil.rmtree(back)
        if options.rank is not None:
            write_random_adapter(work / "adapter", ours, config, options.rank)
            seconds, peak = convert("to-hf", str(work / "adapter"), str(back), "--no-check")
            print(f"merge    {seconds:6.1f} s  {size / seconds / 1e9:.2f} GB/s  peak {peak:.2f} GiB", flush=True)
            shutil.rmtree(back)
            seconds, peak = convert("to-hf", str(work / "adapter"), str(back))
            print(f"+ logits {seconds:6.1f} s  {size / seconds / 1e9:.2f} GB/s  peak {peak:.2f} GiB", flush=True)
            shutil.rmtree(back)
        if options.transformers:
            seconds, peak = measure([sys.executable, "-c", TRANSFORMERS, str(source), str(back)])
            print(f"theirs   {seconds:6.1f} s  {size / seconds / 1e9:.2f} GB/s  peak {peak:.2f} GiB", flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
