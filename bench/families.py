"""Converts every family in every type, and compares its logits with those of transformers.

    python bench/families.py

The models are small and random. Columns: bits that differ after Hugging Face -> ours -> Hugging Face; the largest
difference of a text's logits from transformers' on the same weights in float32, without and with the key and value
cache; and for bfloat16, the mean error of our logits divided by that of transformers', both against exact logits. Needs
torch.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(2, str(Path(__file__).parents[1] / "tests" / "model"))

from conftest import random_weights
from test_families import PROMPT, TOKENS, build, cached, reference_logits, whole
from tiny_families import FAMILIES

from transllm_jax.conversion.hf.directory import HFModel, open_hf, write_model
from transllm_jax.conversion.hf.export import export_hf
from transllm_jax.conversion.names import tensors
from transllm_jax.conversion.store import open_store, write_store


def differing_bits(a: HFModel, b: HFModel) -> int:
    """The number of bits that differ between two models with the same config."""
    count = 0
    for tensor in tensors(a.config):
        x, y = (np.ascontiguousarray(model.read(tensor)).view(np.uint8) for model in (a, b))
        count += int(np.unpackbits(x ^ y).sum())
    return count


def main() -> None:
    logging.disable(logging.WARNING)
    table = Table(box=None, pad_edge=False)
    for heading in ("family", "type", "bits", "whole", "cached", "bf16 error / theirs"):
        table.add_column(heading, justify="left" if heading in ("family", "type") else "right")
    for name, config in FAMILIES.items():
        for dtype in ("float32", "bfloat16", "float16"):
            with tempfile.TemporaryDirectory() as scratch:
                source, ours, back = (Path(scratch) / place for place in ("source", "ours", "back"))
                write_model(source, config, random_weights(config), dtype=dtype)
                (source / "tokenizer.json").write_text('{"model": {"vocab": {}}, "added_tokens": []}')
                ours.mkdir()
                write_store(ours, open_hf(source))
                (ours / "config.json").write_bytes((source / "config.json").read_bytes())
                export_hf(open_store(ours), source, back)
                split = build(back, config)
                exact = reference_logits(source)
                row = [
                    str(differing_bits(open_hf(source), open_hf(back))),
                    f"{np.abs(whole(split, TOKENS) - exact).max():.1e}",
                    f"{np.abs(cached(split, TOKENS, 3) - reference_logits(source, cache=True)).max():.1e}",
                ]
                if dtype == "bfloat16":
                    narrow = build(back, config, jnp.bfloat16)
                    ours_error = np.abs(whole(narrow, TOKENS) - exact).mean()
                    row.append(f"{ours_error / np.abs(reference_logits(source, 'bfloat16') - exact).mean():.2f}")
                table.add_row(name, dtype, *row)
    Console().print(table)
    print(f"logits of {TOKENS.shape[0]} texts of {TOKENS.shape[1]} tokens; cached after {PROMPT}")


if __name__ == "__main__":
    main()
