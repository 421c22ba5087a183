"""What llama.cpp makes of a model that `transllm convert to-gguf` wrote, beside what we make of it.

    python bench/to_gguf.py MODEL --llama-cpp PYTHON [--types f32,q8_0] [--text FILE ...] [--english FILE ...]
                               [--questions FILE] [--answers 20] [--dst DIR]

MODEL: a run's work directory, or any model directory. --llama-cpp: a Python interpreter that has xllamacpp (llama.cpp's
server as a wheel: `python -m venv V; V/bin/pip install xllamacpp`). --text, --english: documents separated by blank
lines; of a .tsv file, its second or its first column. --questions: a .jsonl of records with `question`, or lines.

For each type the file is written, read by llama.cpp and read back by us:
- ids: in how many texts llama.cpp's are ours, and which share of our tokens it has at the same places;
- markers: that each is one id, and is printed;
- logits: of the first question's prompt, by llama.cpp and by us from the same file: the largest difference of the
  log-probabilities of the 50 most probable tokens, after each of the prompt's last 4 tokens;
- answers: llama.cpp's greedy answers, and at how many of their tokens ours is the same (from the same prompt ids);
- bits per byte of --text, by our ids and by llama.cpp's, in the file as we read it back.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from llama_server import ask, llama_cpp

from transllm_jax.commands.open_model import open_source, tokenizer_of
from transllm_jax.commands.to_gguf import to_gguf
from transllm_jax.conversion.logits import logits_of
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.disk import read_json
from transllm_jax.progress import Progress
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message, render
from transllm_jax.tokenizer.tokenizer import Tokenizer

TOP, LAST = 50, 4


def documents(paths: Sequence[Path], column: int) -> list[str]:
    found: list[str] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        parts = (
            [line.split("\t")[column] for line in text.splitlines()] if path.suffix == ".tsv" else text.split("\n\n")
        )
        found += [part for part in parts if part.strip()]
    return found


def places(tokenizer: Tokenizer, ids: Sequence[int]) -> set[tuple[str, int]]:
    """Each token with the text before it."""
    return {(tokenizer.decode(ids[:number]), token) for number, token in enumerate(ids)}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


class InMemory:
    """A model whose tensors are read once: the texts are many."""

    def __init__(self, model: OpenedModel) -> None:
        self.model, self.config, self.where = model, model.config, model.where
        self.read = cache(model.read)
        self.dtype = model.dtype


def scores_of(model: OpenedModel, ids: Sequence[int], length: int) -> np.ndarray:
    """Log-probabilities [len(ids), V]. Padded to `length`, so that one program is compiled for all texts."""
    size = -(-max(len(ids), length) // length) * length
    return log_softmax(logits_of(model, [*ids, *[0] * (size - len(ids))])[: len(ids)])


def bits_per_byte(model: OpenedModel, tokenizer: Tokenizer, texts: Sequence[str], ids: Sequence[list[int]]) -> float:
    nats = 0.0
    for own in ids:
        whole = [tokenizer.document_end_id, *tokenizer.bos_ids, *own]
        first = len(whole) - len(own)
        logits = logits_of(model, [*whole, *[0] * (-len(whole) % 128)])[first - 1 : len(whole) - 1]
        largest = logits.max(axis=1)
        sums = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64))
        nats += float((sums - logits[np.arange(len(own)), own]).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def measure(file: Path, given: argparse.Namespace, questions: Sequence[str], markers: Markers | None) -> None:
    found = open_source(str(file))
    model, tokenizer = InMemory(found.model), tokenizer_of(found)
    texts, english = documents(given.text, 1), documents(given.english, 0)
    prompts: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    rendered = [render(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    ours = [tokenizer.encode(text) for text in rendered]
    with llama_cpp(given.llama_cpp, file, given.threads) as address:

        def tokenize(text: str) -> list[int]:
            body = {"content": text, "parse_special": True, "add_special": False}
            return list(ask(address, "/tokenize", body)["tokens"])

        theirs = {name: [tokenize(text) for text in part] for name, part in (("text", texts), ("english", english))}
        for name, part in (("text", texts), ("english", english)):
            own = [tokenizer.encode(text) for text in part]
            same = sum(a == b for a, b in zip(own, theirs[name], strict=True))
            kept = sum(len(places(tokenizer, a) & places(tokenizer, b)) for a, b in zip(own, theirs[name], strict=True))
            count, other = sum(map(len, own)), sum(map(len, theirs[name]))
            print(f"  {name}: ids are ours in {same} of {len(part)} texts, {kept / max(count, 1):.2%} of {count:,} "
                  f"tokens; llama.cpp has {other:,}")  # fmt: skip
        same = sum(tokenize(text) == ids for text, ids in zip(rendered, ours, strict=True))
        print(f"  prompts: ids are ours in {same} of {len(rendered)}")
        for marker in [] if markers is None else markers.in_order():
            marked = tokenize(marker)
            shown = ask(address, "/detokenize", {"tokens": marked})["content"]
            print(f"  marker {marker}: ids {marked}, ours {tokenizer.token_id(marker)}, printed as {shown!r}")
        worst = 0.0
        scores = scores_of(model, ours[0], 128)
        for size in range(len(ours[0]) - LAST + 1, len(ours[0]) + 1):
            body = {"prompt": ours[0][:size], "n_predict": 1, "n_probs": TOP, "temperature": 0, "cache_prompt": False}
            top = ask(address, "/completion", body)["completion_probabilities"][0]["top_logprobs"]
            worst = max([worst, *(abs(item["logprob"] - scores[size - 1, item["id"]]) for item in top)])
        print(f"  log-probabilities: largest difference {worst:.2g} (the {TOP} most probable tokens, {LAST} positions)")
        agreed = tokens = whole = 0
        for number, ids in enumerate(ours[: given.answers]):
            body = {"prompt": ids, "n_predict": 200, "temperature": 0, "return_tokens": True, "cache_prompt": False}
            answer = ask(address, "/completion", body)
            said = list(answer["tokens"])
            best = scores_of(model, ids + said, 128)[len(ids) - 1 : -1].argmax(axis=1)
            hits = int(np.sum(best == said))
            agreed, tokens, whole = agreed + hits, tokens + len(said), whole + (hits == len(said))
            if number < 2:
                print(f"    {questions[number]} -> {answer['content']}")
        count = min(given.answers, len(ours))
        print(f"  greedy answers: {whole} of {count} are ours, {agreed} of {tokens} tokens")
    texts = texts[: given.documents]
    if texts:
        own = [tokenizer.encode(text) for text in texts]
        mine, other_ids = bits_per_byte(model, tokenizer, texts, own), theirs["text"][: len(texts)]
        other_bits = bits_per_byte(model, tokenizer, texts, other_ids)
        print(f"  bits per byte: {mine:.4f} by our ids, {other_bits:.4f} by llama.cpp's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama-cpp", required=True)
    parser.add_argument("--types", default="f32,q8_0")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--english", type=Path, nargs="*", default=[])
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--documents", type=int, default=20, help="how many of --text are for bits per byte")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dst", type=Path, help="where the files stay; by default they are removed")
    given = parser.parse_args()

    questions = ["What is the capital of France?", "ผึ้งผลิตอะไร"]
    if given.questions is not None:
        lines = given.questions.read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line)["question"] if line.startswith("{") else line for line in lines if line.strip()]
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.types.split(","):
            dst = (given.dst or Path(scratch)) / name
            to_gguf(given.model, dst, Progress(quiet=True), type_name=name, force=True)
            file = next(dst.glob("*.gguf"))
            about = dst / "transllm.json"
            markers = Markers(**read_json(about)["markers"]) if about.is_file() else None
            print(f"{file.name}: {file.stat().st_size / 1e6:,.1f} MB")
            measure(file, given, questions, markers)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
