"""What `--within-words` costs in tokens, and how many tokens cross words without it, on the text of examples/thai.

    python bench/within_words.py BASE [--size N ...] [--cuts whole|base] [--longest N]

BASE: a Hugging Face directory with tokenizer.json. For each number of new tokens, learned from text.train.txt and the
Thai side of pairs.train.tsv with and without the option: tokens per character of text.heldout.txt; how many new tokens
are no part of any word of the corpus; and how many ends of words of the held-out text are inside a token. Then the
longest tokens. First, how fast ICU's iterator finds the words.
"""

from __future__ import annotations

import argparse
import time
from itertools import accumulate
from pathlib import Path

from icu4py.breakers import WordBreaker

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.expand import expand, tokens_per_character
from transllm_jax.tokenizer.tokenizer import Tokenizer

THAI = Path(__file__).parents[1] / "examples" / "thai"


def documents(name: str) -> list[str]:
    return [text for text in (THAI / name).read_text(encoding="utf-8").split("\n\n") if text.strip()]


def ends_inside_tokens(tokenizer: Tokenizer, texts: list[str]) -> float:
    """The share of the ends of words that are inside a token, not between two."""
    inside = ends = 0
    for text in texts:
        words = [word for word in WordBreaker(text, "th")]
        # A space belongs to the word after it.
        found = [end for end in accumulate(map(len, words)) if text[end - 1] != " "]
        offsets = tokenizer.backend.encode(text, add_special_tokens=False).offsets
        within = {place for first, last in offsets for place in range(first + 1, last)}
        ends += len(found)
        inside += sum(end in within for end in found)
    return inside / ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--size", type=int, nargs="+", default=[500, 1500])
    parser.add_argument("--cuts", choices=["whole", "base"], default="whole")
    parser.add_argument("--longest", type=int, default=60)
    given = parser.parse_args()

    corpus, held_out = documents("text.train.txt"), documents("text.heldout.txt")
    pairs = (THAI / "pairs.train.tsv").read_text(encoding="utf-8").splitlines()
    corpus += [line.split("\t")[1] for line in pairs if "\t" in line]
    began = time.process_time()
    ends = sum(1 for text in corpus for _ in WordBreaker(text, "th").segments())
    seconds, characters = time.process_time() - began, sum(map(len, corpus))
    print(f"ICU: {ends:,} segments of {characters:,} characters, {characters / seconds / 1e6:.1f}M characters a second")
    words = {word for text in corpus for word in WordBreaker(text, "th")}
    base = Tokenizer.load(given.base)
    print(f"base: {tokens_per_character(base, held_out):.3f} tokens a character")
    for size in given.size:
        for within in (False, True):
            print(f"\n{size:,} new tokens, {'within words' if within else 'across words'}: ", end="")
            try:
                found = expand(base, corpus, size=size, markers=[], cuts=given.cuts, within_words=within)
            except UserError as error:
                print(error)
                continue
            # A token that is a part of a character has no text.
            names = [name for name in found.new_tokens if "\ufffd" not in name]
            crossing = sum(not any(name.strip() in word for word in words) for name in names)
            print(
                f"{tokens_per_character(found.tokenizer, held_out):.4f} tokens a character, {crossing} tokens cross "
                f"words, {ends_inside_tokens(found.tokenizer, held_out):.1%} of the ends of words are inside a token"
            )
            print(" | ".join(sorted(names, key=lambda name: (-len(name), name))[: given.longest]))


if __name__ == "__main__":
    main()
