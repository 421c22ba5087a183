"""`transllm config`: the keys of a config in words."""

from __future__ import annotations

import pytest
from conftest import Command

from transllm_jax.config import Config, meanings
from transllm_jax.config.describe import walk


def test_the_whole_config_is_listed(transllm: Command) -> None:
    code, printed = transllm("config")
    assert code == 0
    for name, meaning in meanings(Config).items():
        assert f"\n{name}  " in printed and meaning.split()[0].strip("`") in printed


def test_a_key_says_type_default_and_meaning(transllm: Command) -> None:
    code, printed = transllm("config", "lora.rank")
    assert code == 0 and printed.startswith("lora.rank  whole number > 0, default 64\n    The rank of each adapter")
    # A section's keys; the number of a list's item may be given.
    for key in ("pretrain.sources.0.cleaning", "pretrain.sources.cleaning"):
        code, printed = transllm("config", key)
        assert code == 0 and "near_duplicates  number" in printed


def test_every_section_can_be_asked_for(transllm: Command) -> None:
    for key, section in walk():
        code, printed = transllm("config", key)
        assert code == 0 and all(f"  {name}  " in printed for name in section.model_fields), key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("pretrain.remt", "did you mean 'remat'?"),
        ("lora.rank.x", "lora.rank is a value"),
        ("remat", "it is in pretrain, translate, transfer"),
        ("nothing", "the keys here are title, workdir"),
    ],
)
def test_an_unknown_key_is_named(transllm: Command, key: str, message: str) -> None:
    code, printed = transllm("config", key)
    assert code == 2 and printed.count("\n") == 1 and message in printed
