"""What can be talked to besides a run."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from tiny_gguf import hf_weights, tiny_config, write_gguf

from transllm_jax.commands.open_chat import open_chat_model
from transllm_jax.conversion.import_base import import_base


def test_a_gguf_file_is_the_directory_that_is_made_of_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    config = tiny_config()
    write_gguf(file, config, hf_weights(config))
    import_base(str(file), tmp_path / "model")
    found, wanted = open_chat_model(file), open_chat_model(tmp_path / "model")
    assert found.name == "model.gguf" and found.config == wanted.config and found.original is None
    assert found.tokenizer.encode("Hello there") == wanted.tokenizer.encode("Hello there")
    jax.tree.map(np.testing.assert_array_equal, found.split.frozen, wanted.split.frozen)
