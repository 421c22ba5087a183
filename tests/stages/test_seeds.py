"""One seed in the config, and of it one for each purpose."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations, product

from transllm_jax.stages.run import seed_for


def test_no_two_purposes_share_a_seed() -> None:
    # Sums of letters did: of anagrams, and of a next seed with a name that ends on the letter before.
    names = ["pretrain", "translate", "transfer", "new rows", *("".join(letters) for letters in permutations("abcd"))]
    names += ["stage1", "stage2", "stage3", "1", "12"]
    found = [seed_for(seed, name) for seed, name in product([*range(20), 2**31 - 1], names)]
    assert len(set(found)) == len(found) and min(found) >= 0 and max(found) < 2**31


def test_a_seed_is_the_same_in_every_process() -> None:
    assert seed_for(0, "pretrain") == 1501001825
    code = "from transllm_jax.stages.run import seed_for; print(seed_for(7, 'translate'))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(asked.stdout) == seed_for(7, "translate")
