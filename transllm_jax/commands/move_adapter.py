"""What was trained, opened as it is on another model, or in part: for `transllm convert to-hf`."""

from __future__ import annotations

from dataclasses import replace

from transllm_jax.commands.open_model import Source, open_source, tokenizer_of
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.moved import moved, parse_factors
from transllm_jax.conversion.names import weight_shapes
from transllm_jax.errors import UserError


def moved_source(found: Source, source: str, factors: str, onto: str | None) -> Source:
    """The opened run or adapter `found` with its adapters multiplied, on its own base or on the model `onto`.

    source: its name for messages. factors: one number, or one for each layer. Raises UserError if it has no adapters,
    or if the other model has another shape or other tokens.
    """
    if not isinstance(found.model, Merged) or found.lora is None:
        raise UserError(f"{source} has no adapters to scale or to move; give a run, or an adapter")
    own = found.model.base
    below = replace(found, tokenizer=found.files, model=own) if onto is None else open_source(onto)
    base = below.model
    if weight_shapes(base.config) != weight_shapes(own.config):
        raise UserError(f"--onto {onto}: it has another shape than the base of {source}; give one of the same shape")
    if below.files is None:
        raise UserError(f"--onto {onto} is a GGUF file; bring it in with transllm convert from-hf, and give that")
    tokenizer = tokenizer_of(below)
    known, new = tokenizer.backend.get_vocab(), tokenizer_of(found).backend.get_vocab()
    if any(new.get(token) != id for token, id in known.items()):
        raise UserError(f"--onto {onto}: its tokens are not those of the base of {source}; give a model with them")
    special = [id for id in tokenizer.special_tokens.values() if id < base.config.vocab_size]
    trained = moved(found.model.trainable, base, parse_factors(factors), special)
    return replace(found, model=Merged(base, trained, found.lora.scale), files=below.files)
