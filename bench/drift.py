"""How many words of the original model's English answers change at how much drift (KL per token).

For each trained point of a run, and for its adapters at a part of their strength: the KL to the original model on the
original's own answers to the held-out questions, as the evaluation measures it, and the share of the answers' tokens
that the model would no longer choose (greedy). Example:

    python bench/drift.py runs/demo

reads configs and weights from the run's directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from transllm_jax.config import load_config
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.model.parameters import Split
from transllm_jax.stages.models import Models
from transllm_jax.stages.points import markers_of

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
CHUNK = 256


def choices(split: Split, states: np.ndarray, *, original: bool) -> np.ndarray:
    """The token that the model would choose after each of the states [tokens, D], int [tokens]."""
    vocabulary = split.merge().vocabulary
    chosen = []
    for first in range(0, len(states), CHUNK):
        part = jnp.asarray(states[first : first + CHUNK])
        logits = vocabulary.logits(part, base_only=True, adapters=False) if original else vocabulary.logits(part)
        chosen.append(np.asarray(jnp.argmax(logits, axis=-1)))
    return np.concatenate(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args().workdir
    config = load_config(workdir / "run.yaml", [])
    models = Models(config, workdir, config.date or date.today())
    rows = json.loads((workdir / "evaluation" / "original_answers.json").read_text(encoding="utf-8"))["rows"]
    teacher = Teacher(models.split("base"), [(row["prompt"], row["answer"]) for row in rows], batch_size=4)
    before = choices(teacher.base, teacher.states, original=True)
    response = models.tokenizer("vocabulary").encode(markers_of(config).response)
    print(f"{len(before)} tokens of {len(rows)} answers")
    print("| point | strength of the adapters | KL per token | tokens that change |\n|---|---|---|---|")
    for point in ("pretrain", "translate", "transfer"):
        split = models.split(point)
        prefix = response if point == "transfer" else []
        for strength in STRENGTHS:
            # The product of a and b is scaled: b alone, so that the frozen weights stay.
            scaled = {
                path: array * strength if path.endswith(".b") else array for path, array in split.trainable.items()
            }
            part = Split(split.structure, scaled, split.frozen)
            drift = teacher.divergence(part, prefix)
            after = choices(part, teacher.states_of(part, prefix, adapters=True), original=False)
            print(f"| {point} | {strength} | {drift:.3f} | {np.mean(after != before):.1%} |", flush=True)


if __name__ == "__main__":
    main()
