"""Files of checkpoints and of the token cache that are cut off, removed or changed by a bit, each in many ways."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from conftest import EXAMPLES
from reliability.damage import check_damaged_cache, check_damaged_checkpoints, damages, put
from reliability.harness import UNTIL, Whole, copied, goes_on, run, undisturbed

from transllm_jax.data.read.shards import Reading, shards
from transllm_jax.data.rows.planned import PlannedRows, Selection
from transllm_jax.data.rows.tokenise import tokenise
from transllm_jax.data.rows.transform import Transform
from transllm_jax.disk import sha256_of
from transllm_jax.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.reliability
SEED, TIMES = 11, 6


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An undisturbed run."""
    return undisturbed(tmp_path_factory.mktemp("whole"), tiny_model)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Orbax tells at length of each file that it cannot read."""
    caplog.set_level(logging.CRITICAL)


# What tensorstore tells of a read that orbax gave up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_file_of_a_checkpoint(tmp_path: Path) -> None:
    check_damaged_checkpoints(tmp_path, 8, print)


def test_every_file_of_the_token_cache(tiny_model: Path, tmp_path: Path) -> None:
    text, cache = tmp_path / "text.txt", tmp_path / "tokens"
    text.write_text((EXAMPLES / "text.train.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    tokenizer, transform = Tokenizer.load(tiny_model), Transform(content="text", length=64)

    def make() -> PlannedRows:
        found = shards(Reading(path=str(text)), sha256_of)
        return PlannedRows(tokenise(found, transform, tokenizer, "refuse", cache), Selection(row_length=64), cache)

    check_damaged_cache(make, cache, 300, print)


def test_a_run_goes_on_from_the_checkpoint_before(whole: Whole, tmp_path: Path) -> None:
    stopped = copied(whole.prepared, tmp_path / "stopped")
    ended = run(whole.config, stopped, *UNTIL, harm={"kind": "batch", "number": 10, "do": "term"})
    assert ended.code == 75
    newest = stopped / "pretrain" / "checkpoints" / "10"
    chance = random.Random(SEED)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    put_aside = 0
    for number, file in enumerate(chance.sample(files, TIMES)):
        what, changed = chance.choice(list(damages(file.read_bytes(), 5)))
        workdir = copied(stopped, tmp_path / f"run{number}")
        put(workdir / file.relative_to(stopped), changed)
        again = goes_on(whole, workdir, ended)
        first = again.batches[0][1]
        print(f"\n{file.relative_to(newest)} {what}: went on from step {first}", end="")
        if first != 10:
            assert first == 8 and "checkpoints/10 is damaged (" in again.out and "step 8 is used" in again.out
            assert not again.errors, again.errors
            put_aside += 1
    assert put_aside


def test_a_run_without_a_whole_checkpoint_is_refused(whole: Whole, tmp_path: Path) -> None:
    workdir = copied(whole.prepared, tmp_path / "run")
    ended = run(whole.config, workdir, *UNTIL, harm={"kind": "batch", "number": 10, "do": "term"})
    assert ended.code == 75
    for path in (workdir / "pretrain" / "checkpoints").glob("*/state/**/*"):
        if path.is_file():
            put(path, path.read_bytes()[: path.stat().st_size // 2])
    again = run(whole.config, workdir, *UNTIL)
    assert again.code == 2
    assert "checkpoints/10 is damaged (" in again.line() and "--force" in again.line()
    # And the next time, too: it never begins anew by itself.
    assert run(whole.config, workdir, *UNTIL).line() == again.line()
    anew = run(whole.config, workdir, *UNTIL, "--force", "pretrain")
    assert anew.code == 0, anew.errors
    assert [step for _, step, _ in anew.batches] == list(range(12))
