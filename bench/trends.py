"""How often the findings call a made-up loss flat or rising, by how it falls, its noise and its steps.

    python bench/trends.py

Losses fall along a line from `start` to `end`, with normal noise; 1,000 seeds each. docs/reading-a-run.md quotes it.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transllm_jax.evaluation.advice.findings import findings
from transllm_jax.evaluation.advice.recorded import Recorded, Training

SEEDS = 1000
# start, end, steps, standard deviation of the noise
CASES = (
    (7.3, 7.3, 50, 0.1),
    (7.3, 7.3, 50, 0.2),
    (7.3, 7.3, 90, 0.2),
    (5.0, 5.0, 90, 0.8),
    (3.0, 3.0, 1000, 0.3),
    (7.3, 6.9, 50, 0.25),
    (5.0, 4.4, 90, 0.8),
    (3.0, 2.9, 1000, 0.1),
)


def topics(start: float, end: float, steps: int, noise: float, seed: int) -> list[str]:
    """What is found in one made-up stage."""
    draw = random.Random(seed)
    line = (start + (end - start) * step / (steps - 1) for step in range(steps))
    losses = [{"step": step, "loss": loss + draw.gauss(0, noise)} for step, loss in enumerate(line, 1)]
    return [finding.topic for finding in findings(Recorded(training={"pretrain": Training(losses)}))]


def main() -> None:
    print("| loss | steps | noise | does not fall | rises |\n|---|---|---|---|---|")
    for start, end, steps, noise in CASES:
        found = Counter(topic for seed in range(SEEDS) for topic in topics(start, end, steps, noise, seed))
        flat, rising = found["The loss does not fall"], found["The loss rises"]
        print(f"| {start} to {end} | {steps:,} | {noise} | {flat} | {rising} |", flush=True)


if __name__ == "__main__":
    main()
