"""Thirty runs of all training stages, each killed with SIGKILL once or twice, each ends with the undisturbed bytes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from reliability.harness import Ended, Harm, require_batches, require_same, results, run, where, write_config

pytestmark = pytest.mark.reliability

RUNS, AT_ONCE = 30, 2
SEED = 20240524
# How many of the runs are killed first at an event of each kind; see recorded.py.
FIRST = {
    "batch": 5,
    "line": 2,
    "save": 8,
    "tokenise": 3,
    "plan": 3,
    "validate": 2,
    "stage": 2,
    "manifest": 2,
    "arrays": 1,
    "file": 1,
    "evaluation": 1,
}


def harms(whole: Ended) -> list[list[Harm]]:
    """What each of the runs is given, process by process: the moments are spread over all of the undisturbed run."""
    chance = random.Random(SEED)
    planned: list[list[Harm]] = []
    for kind, runs in FIRST.items():
        number = whole.counts[kind]
        for place in range(runs):
            # One in each of `runs` equal parts of the run, anywhere in it.
            at = 1 + int((place + chance.random()) * number / runs)
            # At the event itself, or in what follows it: within a step, a validation, a write.
            after = chance.choice([0, chance.uniform(0, 0.05), chance.uniform(0, 0.3)])
            planned.append([{"kind": kind, "number": at, "do": "kill", "after": after}])
    for killed in chance.sample(planned, RUNS // 2):
        kind = chance.choice(["save", "batch", "line"])
        killed.append({"kind": kind, "number": chance.randint(1, 20), "do": "kill", "after": chance.uniform(0, 0.05)})
    return planned


def until_done(config: Path, workdir: Path, planned: Sequence[Harm]) -> list[Ended]:
    """Run, with this harm to each process, until a process ends by itself."""
    ended: list[Ended] = []
    for harm in (*planned, None):
        ended.append(run(config, workdir, "--until", "transfer", harm=harm))
        if ended[-1].code != -9:
            break
    return ended


def test_thirty_killed_runs_end_as_one_that_was_not(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_model)
    whole = run(config, tmp_path / "whole", "--until", "transfer")
    assert whole.code == 0, whole.errors
    wanted = results(tmp_path / "whole")
    planned = harms(whole)
    assert len(planned) == RUNS

    def one(number: int) -> list[str]:
        workdir = tmp_path / f"run{number}"
        ended = until_done(config, workdir, planned[number])
        *killed, last = ended
        assert last.code == 0, last.errors
        assert "Traceback" not in last.errors
        require_batches(ended, whole)
        require_same(results(workdir), wanted)
        return [where(process) for process in killed]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(one, range(RUNS)))
    counts = Counter(place for run_ in found for place in run_)
    print(f"\n{RUNS} runs, {counts.total()} kills: {', '.join(f'{n} in {place}' for place, n in counts.most_common())}")
    assert sum(bool(run_) for run_ in found) >= RUNS - 2, "hardly any run may have ended before it was killed"
    assert {"step", "save", "tokenising", "packing", "validation", "between stages"} <= counts.keys()
