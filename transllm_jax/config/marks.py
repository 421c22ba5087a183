"""Marks in a config: `???` stands for a value that is still to be given, and `${` begins a reference to a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transllm_jax.errors import UserError

# As in OmegaConf and Hydra. `transllm init` writes it.
MARK = "???"


def marked(tree: Any, key: str = "") -> Iterator[str]:
    """The dotted keys of a config's tree whose value is the mark, in order."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from marked(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from marked(value, f"{key}.{number}")
    elif tree == MARK:
        yield key


def require_values(tree: Any, where: str) -> None:
    """Raises UserError that names every key whose value is still the mark. where: the config's name in the message."""
    if left := list(marked(tree)):
        one = len(left) == 1
        raise UserError(
            f"{where}: {'this key is' if one else 'these keys are'} still {MARK}: {', '.join(left)}; "
            f"give {'it a value' if one else 'them values'} in the file, or on the command line as key=value"
        )


def escaped(text: str) -> str:
    """A config's text in which `${` is written as `$${`, which begins no reference."""
    return text.replace("${", "$${")
