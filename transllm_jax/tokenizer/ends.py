"""Which tokens end an answer, for training, generation, evaluation and export.

A model's files may disagree: the first Meta-Llama-3-8B-Instruct ends answers with <|eot_id|>, which its
tokenizer_config.json does not name. So every token that any of these names is an end token: the eos_token_id of
generation_config.json and config.json, the eos_token of tokenizer_config.json, and the chat template, by the token with
which it ends an answer.
"""

from __future__ import annotations

from functools import lru_cache

from transllm_jax.tokenizer.chat import answer_end
from transllm_jax.tokenizer.tokenizer import Tokenizer


@lru_cache(maxsize=32)
def answer_end_id(tokenizer: Tokenizer) -> int:
    """The token that ends an answer in training: the chat template's; without a template, eos.

    Raises UserError for a template that cannot be trained on, and if there is neither a template nor an eos token.
    """
    end = answer_end(tokenizer)
    found = None if end is None else tokenizer.token_id(end)
    return tokenizer.eos_id if found is None else found


@lru_cache(maxsize=32)
def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that generation stops at, the chat template's first. Raises UserError if there are none."""
    return tuple(dict.fromkeys([answer_end_id(tokenizer), *named_ends(tokenizer)]))


def named_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end tokens that the model's files name, apart from its chat template."""
    named = [] if tokenizer.role("eos_token") is None else [tokenizer.eos_id]
    return tuple(dict.fromkeys([*tokenizer.model_ends, *named]))


def unnamed_end(tokenizer: Tokenizer) -> str | None:
    """The token with which the chat template ends an answer, if no file of the model names it as an end.

    Raises UserError for a template that cannot be trained on.
    """
    end = answer_end(tokenizer)
    return None if end is None or tokenizer.token_id(end) in named_ends(tokenizer) else end
