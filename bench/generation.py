"""Measures greedy generation: our engine beside transformers.generate (torch), on the same weights and prompts.

    python bench/generation.py MODEL [--instructions FILE] [--batch 1 8 32] [--new 48] [--repeat 5]
                               [--prompts 128] [--longest 256] [--only ours|theirs] [--llama-cpp PYTHON --gguf FILE]

MODEL: a directory in Hugging Face format, such as base/ of a run. FILE: jsonl with `instruction`, by default the
example's. Both in float32 on all cores. End tokens are switched off, so that the number of tokens is known.

Prints for each batch size the tokens a second of both (medians, after a first run that compiles and is not counted; the
engine's compilation is printed), how many rows have the same ids, and for the others the first place that differs. For
one row also the share of the memory bandwidth: the bytes of the weights that a token reads, over what a sum over a
large array reads in the same time. Then `--prompts` prompts whose answers have different lengths (log-normal, as those
of chat models roughly are; up to `--longest` tokens): the engine with 32 slots, and padded batches of 8 that run to
their longest answer. Only the tokens that were asked for are counted.

With `--llama-cpp` (an interpreter that has xllamacpp, see llama_server.py) and `--gguf`, the same model in that file's
own quantisation, llama.cpp's server answers the same prompts with as many slots: for orientation, since it reads fewer
bytes and gives other ids.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from llama_server import ask, llama_cpp

from transllm_jax.conversion.hf.tokenizer_files import load_tokenizer
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.generation.engine import Engine, Request
from transllm_jax.model.parameters import assemble, load_frozen
from transllm_jax.tokenizer.chat import encode_prompt

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "thai" / "instructions.train.jsonl"
PADDED, SLOTS = 8, 32
Answers = list[list[int]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--instructions", type=Path, default=EXAMPLE)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=128, help="of different lengths of answers; 0 leaves this out")
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("--llama-cpp", help="a Python interpreter that has xllamacpp")
    parser.add_argument("--gguf", type=Path, help="the model, for llama.cpp")
    options = parser.parse_args()
    if (options.llama_cpp is None) != (options.gguf is None):
        parser.error("--llama-cpp and --gguf go together")

    prompts = read_prompts(options.model, options.instructions)
    ours = None if options.only == "theirs" else Ours(options.model)
    theirs = None if options.only == "ours" else Theirs(options.model)
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for size in options.batch:
        some = [prompts[number % len(prompts)] for number in range(size)]
        limits = [options.new] * size
        compare(f"batch {size}, {options.new} new tokens", ours, theirs, some, limits, size, size, options.repeat)
        if options.llama_cpp is not None:
            with llama_cpp(options.llama_cpp, options.gguf, torch.get_num_threads(), size) as address:
                print_llama_cpp(address, some, options.new, options.repeat)
        if size == 1 and ours is not None:
            print_bandwidth(ours, some, options.new, options.repeat)
    if options.prompts:
        some = [prompts[number % len(prompts)] for number in range(options.prompts)]
        drawn = np.random.default_rng(0).lognormal(np.log(options.longest / 4), 0.8, options.prompts)
        limits = np.clip(drawn, 4, options.longest).astype(int).tolist()
        name = f"{options.prompts} answers of {min(limits)} to {max(limits)} tokens, {sum(limits)} together"
        compare(name, ours, theirs, some, limits, SLOTS, PADDED, 1)


def read_prompts(model: Path, path: Path) -> Answers:
    """The instructions as token ids by the model's chat template."""
    tokenizer = load_tokenizer(model)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [encode_prompt(tokenizer, [{"role": "user", "content": row["instruction"]}]) for row in rows]


class Ours:
    """The engine."""

    def __init__(self, path: Path) -> None:
        model = open_directory(path)
        frozen = load_frozen(model.config, model.weights(), np.dtype("float32"))
        self.config, self.split = model.config, assemble(model.config, frozen)
        self._engine: Engine | None = None

    def engine(self, slots: int, longest: int) -> Engine:
        """A warm engine."""
        engine = self._engine
        if engine is None or engine.batch_size != slots or engine.cache_size < longest:
            began = time.perf_counter()
            self._engine = engine = Engine(self.split, self.config, batch_size=slots)
            engine.warm_up(longest)
            print(f"  compiled {len(engine.programs)} programs in {time.perf_counter() - began:.1f} s")
        return engine

    def answers(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], slots: int) -> Answers:
        """Greedy answers of these lengths."""
        requests = [Request(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
        engine = self.engine(slots, max(len(one.prompt) + one.max_new_tokens for one in requests))
        found = dict(engine.run(requests))
        return [found[number].ids for number in range(len(requests))]


class Theirs:
    """transformers."""

    def __init__(self, path: Path) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def answers(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], size: int) -> Answers:
        """Greedy answers of these lengths, in padded batches; each batch runs to its longest answer."""
        found: Answers = []
        for first in range(0, len(prompts), size):
            rows, most = prompts[first : first + size], limits[first : first + size]
            width = max(map(len, rows))
            ids = torch.zeros((len(rows), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(rows):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            with torch.inference_mode():
                made = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(most))
            found += [row[width : width + limit].tolist() for row, limit in zip(made, most, strict=True)]
        return found


def compare(
    name: str,
    ours: Ours | None,
    theirs: Theirs | None,
    prompts: Answers,
    limits: list[int],
    slots: int,
    padded: int,
    repeat: int,
) -> None:
    """Print the tokens a second of both, and which ids differ."""
    print(f"{name}:")
    runs: dict[str, Callable[[], Answers]] = {}
    if ours is not None:
        runs["ours"] = lambda: ours.answers(prompts, limits, slots)
    if theirs is not None:
        runs["transformers"] = lambda: theirs.answers(prompts, limits, padded)
    answers = {}
    for who, run in runs.items():
        if repeat > 1 or who == "ours":
            # Ours compiles; both touch their memory.
            run()
        answers[who] = run() if repeat > 1 else []
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(repeat):
        for who, run in runs.items():
            began = time.perf_counter()
            answers[who] = run()
            seconds[who].append(time.perf_counter() - began)
    speed = {who: sum(limits) / statistics.median(taken) for who, taken in seconds.items()}
    for who, value in speed.items():
        spread = f", {min(seconds[who]):.2f} to {max(seconds[who]):.2f} s" if repeat > 1 else ""
        print(f"  {who}: {value:.1f} tokens/s{spread}")
    if len(answers) == 2:
        pairs = list(zip(answers["ours"], answers["transformers"], strict=True))
        same = sum(left == right for left, right in pairs)
        print(f"  {speed['ours'] / speed['transformers']:.2f}x; the same ids in {same} of {len(pairs)} rows")
        for row, (left, right) in enumerate(pairs):
            if left != right:
                at = next(place for place, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
                print(f"    row {row} differs from token {at} on: {left[at]} and {right[at]}")


def print_llama_cpp(address: str, prompts: Answers, new: int, repeat: int) -> None:
    """Print the tokens a second of llama.cpp's server, which answers all prompts at once."""
    body = {"n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}

    def answer(prompt: Sequence[int]) -> int:
        return len(ask(address, "/completion", {**body, "prompt": list(prompt)})["tokens"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        made = sum(pool.map(answer, prompts))
        taken = [timed(lambda: list(pool.map(answer, prompts))) for _ in range(repeat)]
    print(f"  llama.cpp: {made / statistics.median(taken):.1f} tokens/s, {min(taken):.2f} to {max(taken):.2f} s")


def print_bandwidth(ours: Ours, prompts: Answers, new: int, repeat: int) -> None:
    """Print the share of the memory bandwidth that one row reaches while it is generated."""
    # Of an untied model the embedding is not read whole.
    read = sum(array.nbytes for path, array in ours.split.frozen.items() if path != "vocabulary.base")
    read += ours.split.frozen["vocabulary.base"].nbytes if ours.config.tie_word_embeddings else 0

    # The difference of two lengths leaves the prompt out.
    def of_length(count: int) -> float:
        return statistics.median(timed(lambda: ours.answers(prompts, [count], 1)) for _ in range(repeat))

    short, long = of_length(new // 4), of_length(new)
    reached = read * (new - new // 4) / (long - short)
    large = torch.ones(2**27)
    best = large.nbytes / min(timed(large.sum) for _ in range(5))
    print(f"  {read / 1e6:.0f} MB a token, {reached / 1e9:.1f} GB/s: {reached / best:.0%} of {best / 1e9:.1f} GB/s")


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
