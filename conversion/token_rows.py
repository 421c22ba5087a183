"""Vocabulary rows of another model, found by the text of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transllm_jax.conversion.hf.safetensors_io import require_finite
from transllm_jax.conversion.hf.tokenizer_files import load_tokenizer
from transllm_jax.conversion.names import EMBEDDING, OUTPUT, tensors
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenRows:
    """A model from which rows are taken, for a model with the config `config`."""

    model: OpenedModel
    tokenizer: Tokenizer
    config: LlamaConfig

    def ids(self, tokens: Sequence[str]) -> list[int | None]:
        """The ids of tokens, which are spelled as in tokenizer.json; None for each that this model lacks.

        Raises UserError if it has none of the tokens, or has a token but no row for it.
        """
        found = [self.tokenizer.token_id(token) for token in tokens]
        if all(number is None for number in found):
            raise UserError(
                f"{self.model.where} has none of the {len(tokens)} new tokens; give a model with the same kind of "
                "tokenizer that was expanded for the same language"
            )
        if any(number is not None and number >= self.model.config.vocab_size for number in found):
            raise UserError(f"{self.model.where} has tokens without rows; the tokenizer is not this model's")
        return found

    def rows(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows of ids, float32 [n, D]: input rows as `vocabulary.new` and, for an untied model, output rows as
        `vocabulary.output_new`. Raises UserError if a value is not finite.
        """
        named = {tensor.name: tensor for tensor in tensors(self.model.config)}
        rows = {}
        for path, name in (("vocabulary.new", EMBEDDING), ("vocabulary.output_new", OUTPUT)):
            if name == OUTPUT and self.config.tie_word_embeddings:
                continue
            tensor = named[name if name in named else EMBEDDING]
            rows[path] = self.model.read(tensor)[list(ids)].astype(np.float32)
            require_finite(rows[path], tensor.name, self.model.where)
        return rows


def open_token_rows(directory: str | Path, config: LlamaConfig) -> TokenRows:
    """Open a Hugging Face directory or our own checkpoint to take rows from, for a model with the config `config`.

    Raises UserError if it is not a model directory, if its rows have another width, or if it has separate input and
    output rows while `config` ties them.
    """
    model = open_directory(directory)
    if model.config.hidden_size != config.hidden_size:
        raise UserError(
            f"{model.where}: its rows are {model.config.hidden_size} wide, the base's {config.hidden_size}; "
            "give a model of the base's width"
        )
    if config.tie_word_embeddings and not model.config.tie_word_embeddings:
        raise UserError(
            f"{model.where} has separate input and output rows, but the base ties them; give a model that ties them"
        )
    return TokenRows(model, load_tokenizer(directory), config)
