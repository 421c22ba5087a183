"""The sizes of a new config: what was measured for a model of this size and this much text, and what the paper took.

They are where to begin, not the best: `transllm run --dry-run` says what they cost on a machine, `transllm preflight`
on a slice of TPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# UTF-8 bytes a token of text of unknown language, after expansion. Thai: 3 bytes a character, 0.35 tokens a character.
BYTES_PER_TOKEN = 6
# A chain with its English answer, and the answer itself, in tokens.
TOKENS_PER_INSTRUCTION = 400
# Parameters from which a model is trained in bfloat16, and from which it takes the paper's sizes for 7B.
MEDIUM, LARGE = 500_000_000, 4_000_000_000


@dataclass(frozen=True)
class Given:
    """What is known of the model (parameters, context), the text and pairs (bytes) and the instructions (number).

    None is unknown. characters: different ones beyond ASCII in the text, which tokens of their own may need.
    """

    parameters: int | None
    context: int | None
    text: int | None
    pairs: int | None
    instructions: int | None
    characters: int = 0


@dataclass(frozen=True)
class StageSizes:
    """How a stage trains; see `config.training`. tokens: how many it trains on in all, estimated."""

    epochs: int
    batch_size: int
    accumulate: int
    length: int
    learning_rate: str
    remat: str
    tokens: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run; see `config.sections`."""

    dtype: str
    vocabulary: int
    rank: int
    new_rows_multiplier: int
    pretrain: StageSizes
    translate: StageSizes
    transfer: StageSizes
    max_new_tokens: int
    max_chain_tokens: int
    evaluated_tokens: int
    generated_at_once: int
    # Tokens of all pairs in both directions.
    pair_tokens: int
    # Pairs that become translation instructions.
    pairs: int

    @property
    def trained_tokens(self) -> int:
        """The tokens of the three training stages, estimated."""
        return self.pretrain.tokens + self.translate.tokens + self.transfer.tokens


def cpu_hours(parameters: int, tokens: int) -> tuple[float, float]:
    """Hours of training on two CPU cores, with AVX-512 and without it, from what was measured with SmolLM2-135M: 330 to
    445 and 110 to 135 tokens/s (docs/speed.md)."""
    work = tokens * parameters / 135e6
    return work / 400 / 3600, work / 110 / 3600


def sizes_for(given: Given) -> Sizes:
    """The sizes of a run. What is unknown counts as a model of 1B, 10 MB of text and of pairs, 2,000 instructions."""
    parameters = given.parameters or 1_000_000_000
    context = given.context or 4096
    text, pairs = given.text or 10_000_000, given.pairs or 10_000_000
    instructions = given.instructions or 2000
    large, medium = parameters >= LARGE, parameters >= MEDIUM
    # Rows that a step computes at once, all devices together: 8 on each of 16 chips for 7B, 8 on a laptop.
    rows = 128 if large else 32 if medium else 8
    remat = "queries" if large else "projections" if medium else "none"

    def stage(tokens: int, epochs: int, length: int, rate: str) -> StageSizes:
        # A slice of 16 or 8 chips takes at least a row each.
        least, most = (16, 1024) if large else (8, 256) if medium else (2, 8)
        batch = _batch(epochs * tokens, length, least, most)
        return StageSizes(epochs, batch, max(1, batch // rows), length, rate, remat, epochs * tokens)

    short = text + pairs < 3_000_000
    length = _within(context, 256 if short else 512)
    long = _within(context, 2048 if large else 512 if short else 1024)
    # Rates for minutes of training, for a small model on more text, and those of the paper.
    if large:
        first, last = "2e-4", "1e-4"
    elif short:
        first, last = "2e-3", "1e-3"
    else:
        first, last = ("3e-4", "2e-4") if medium else ("5e-4", "2e-4")
    answer = min(512 if large else 256, long // 4)
    pair_tokens = 2 * pairs // BYTES_PER_TOKEN
    return Sizes(
        dtype="bfloat16" if medium else "float32",
        vocabulary=_tokens(text + pairs // 2, given.characters),
        rank=16 if short and not large else 64,
        new_rows_multiplier=1 if large or short else 3,
        pretrain=stage(text // BYTES_PER_TOKEN, _epochs(text), length, first),
        # Pairs are 0.7 of the mixture.
        translate=stage(int(pair_tokens / 0.7), _epochs(pairs), length, first),
        transfer=stage(instructions * TOKENS_PER_INSTRUCTION, 3 if instructions < 5000 else 1, long, last),
        max_new_tokens=answer,
        max_chain_tokens=min(2 * answer, long // 2),
        evaluated_tokens=min(answer, 96),
        generated_at_once=64 if large else 32,
        pair_tokens=pair_tokens,
        pairs=max(100, 2 * instructions),
    )


def _tokens(text: int, characters: int) -> int:
    """New tokens for a corpus of this many bytes, a curve through what served: 1,500 for 0.3 MB, 3,000 for 5 MB, 4,000
    for 29 MB, and the paper's 21,000. With fewer than 200 bytes a token, many are seen too rarely to be learned. More
    than its characters in any case: Chinese has thousands."""
    wanted = max(min(21_000, 2000 * (text / 1e6) ** 0.25, text / 200), 1.2 * characters)
    step = 500 if wanted >= 1000 else 50
    return max(20, math.ceil(wanted / step) * step)


def _epochs(size: int) -> int:
    """Up to four times, text that is read again teaches nearly as much as fresh text (arXiv 2305.16264)."""
    return 4 if size < 1_000_000 else 2 if size < 100_000_000 else 1


def _batch(tokens: int, length: int, least: int, most: int) -> int:
    """The largest power of two that leaves 200 steps, so that the schedule has room; from `least` to `most`."""
    batch = least
    while batch < most and tokens // (2 * batch * length) >= 200:
        batch *= 2
    return batch


def _within(context: int, length: int) -> int:
    while length > context and length > 16:
        length //= 2
    return length
