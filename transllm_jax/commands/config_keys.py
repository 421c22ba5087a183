"""`transllm config`: what the keys of a config mean."""

from __future__ import annotations

import re

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from transllm_jax.config import Config
from transllm_jax.config.describe import Key, doc, keys, schema, section_at


def described(key: str | None) -> RenderableType:
    """The meaning of a key, and if it is a section the keys in it; of the whole config without a key.

    Raises UserError for a key that the config does not have.
    """
    whole = schema()

    def of(section: type, prefix: str) -> list[Key]:
        return keys(section, whole, lambda name, _: f"section {prefix}{name}")

    if not key:
        more = Text("transllm config SECTION says what is in it, such as transllm config pretrain", "dim")
        return Group(Text(doc(Config)), *(_line(found) for found in of(Config, "")), more)
    holder, name = section_at(key)
    prefix = key.rpartition(".")[0]
    found = next(found for found in of(holder, f"{prefix}." if prefix else "") if found.name == name)
    lines: list[RenderableType] = [_line(found, key)]
    if found.section is not None:
        lines += [Padding(_line(inner), (0, 0, 0, 2), expand=False) for inner in of(found.section, f"{key}.")]
    return Group(*lines)


def _line(key: Key, name: str | None = None) -> RenderableType:
    head = Text.assemble((name or key.name, "bold"), (f"  {key.kind}, {key.given}".replace("`", ""), "dim"))
    return Group(head, Padding(Text(_paragraphs(key.meaning)), (0, 0, 0, 4), expand=False))


def _paragraphs(meaning: str) -> str:
    """Markdown without its marks and with a line for each paragraph and item: the terminal breaks lines itself."""
    return re.sub(r"\n(?![\n-])", " ", meaning.replace("`", "")).replace("\n\n", "\n")
