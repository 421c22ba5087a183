"""All shards of a source through the tokenizer: once, on several cores, and what was whole stays whole."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from processes import alive, wait_for
from tiny_shards import shards_of, some_shards, write
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.data.pool import cores, run_in_processes
from transllm_jax.data.read.shards import Shard
from transllm_jax.data.rows import tokenise as module
from transllm_jax.data.rows.token_cache import ShardTokens
from transllm_jax.data.rows.tokenise import tokenise
from transllm_jax.data.rows.transform import Transform
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer

TEXT = Transform("text", 32, near=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def never_again(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, nothing may be tokenised."""

    def refuse(*_: object) -> None:
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(module, "write_shard", refuse)


def run(shards: list[Shard], tokenizer: Tokenizer, cache: Path, processes: int = 1) -> list[ShardTokens]:
    return tokenise(shards, TEXT, tokenizer, "refuse", cache, processes=processes)


def states(cache: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in cache.iterdir()}


def test_a_shard_is_tokenised_once(tmp_path: Path, tokenizer: Tokenizer, never_again: Callable[[], None]) -> None:
    shards = some_shards(tmp_path / "data")
    first = run(shards, tokenizer, tmp_path / "cache")
    assert [tokens.name for tokens in first] == ["part-0.txt", "part-1.txt", "part-2.txt"]
    before = states(tmp_path / "cache")
    never_again()
    second = run(shards_of(tmp_path / "data" / "*.txt"), tokenizer, tmp_path / "cache")
    assert [tokens.path for tokens in second] == [tokens.path for tokens in first]
    assert states(tmp_path / "cache") == before and len(before) == 6


def test_a_change_of_one_shard_redoes_that_shard_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = run(some_shards(tmp_path / "data"), tokenizer, tmp_path / "cache")
    before = states(tmp_path / "cache")
    write(tmp_path / "data" / "part-1.txt", ["another document"])
    second = run(shards_of(tmp_path / "data" / "*.txt"), tokenizer, tmp_path / "cache")
    after = states(tmp_path / "cache")
    assert before.items() <= after.items() and len(after) == 8
    assert [a.path == b.path for a, b in zip(first, second, strict=True)] == [True, False, True]
    assert len(second[1]) == 1


def test_another_tokenizer_or_transform_reads_nothing_of_the_old(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards, cache = some_shards(tmp_path / "data"), tmp_path / "cache"
    first = run(shards, tokenizer, cache)
    before = states(cache)
    other = Tokenizer.load(build_tiny_tokenizer(tmp_path / "other", 300))
    second = run(shards, other, cache)
    third = tokenise(shards, Transform("text", 16, near=True), tokenizer, "refuse", cache, processes=1)
    assert before.items() <= states(cache).items() and len(states(cache)) == 18
    # And each reads its own: fewer merges make more tokens, shorter rows more pieces.
    assert sum(second[0].lengths) > sum(first[0].lengths)
    assert len(third[0]) > len(first[0]) and max(third[0].lengths) <= 16


def test_several_processes_write_the_same_bytes_as_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = some_shards(tmp_path / "data")
    told: list[tuple[int, int]] = []
    run(shards, tokenizer, tmp_path / "one")
    tokens = tokenise(
        shards, TEXT, tokenizer, "refuse", tmp_path / "two", processes=2, on_progress=lambda *now: told.append(now)
    )
    one, two = ({name: content for name, (_, content) in states(tmp_path / name).items()} for name in ("one", "two"))
    assert one == two and len(one) == 6
    assert told[-1] == (sum(shard.size for shard in shards), sum(part.items for part in tokens)) and told[-1][1] == 40


def test_equal_files_are_tokenised_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in ("a", "b"):
        write(tmp_path / directory / "same.txt", ["one", "two"])
    written: list[Path] = []
    real = module.write_shard
    monkeypatch.setattr(module, "write_shard", lambda path, *rest: [written.append(path), real(path, *rest)])
    tokens = run(shards_of(tmp_path / "*" / "same.txt"), tokenizer, tmp_path / "cache")
    assert len(tokens) == 2 and len(written) == 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_leaves_whole_shards(
    tmp_path: Path, tokenizer: Tokenizer, processes: int, never_again: Callable[[], None]
) -> None:
    shards = some_shards(tmp_path / "data")

    def tell(done: int, items: int) -> None:
        if done:
            raise Stop

    with pytest.raises(Stop):
        tokenise(shards, TEXT, tokenizer, "refuse", tmp_path / "cache", on_progress=tell, processes=processes)
    left = states(tmp_path / "cache")
    assert 2 <= len(left) <= 6 and not [name for name in left if name.endswith(".partial")]
    run(shards, tokenizer, tmp_path / "cache")
    assert left.items() <= states(tmp_path / "cache").items()
    never_again()
    assert sum(tokens.items for tokens in run(shards, tokenizer, tmp_path / "cache")) == 40


# Shards that go wrong in ways of their own; in a module, as worker processes import it.
STRANGE = """
from __future__ import annotations
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from transllm_jax.data.read.files import Place

@dataclass(frozen=True)
class Strange:
    name: str
    what: str
    size: int = 1

    @property
    def key(self): return self.name

    def items(self, collector):
        Path(self.what + "-" + self.name).write_text(str(os.getpid()))
        yield "a text", Place(self.name, 1)
        if self.what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(0.05)
            yield "a text", Place(self.name, 1)
"""


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "strange.py").write_text(STRANGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    return importlib.import_module("strange")


def test_a_closed_terminal_ends_no_process_of_a_pool_by_itself() -> None:
    done: list[int] = []
    run_in_processes(
        signal.raise_signal,
        [signal.SIGHUP],
        1,
        on_progress=lambda items, count: done.extend(items),
        if_killed="it was killed",
    )
    assert done == [signal.SIGHUP]


def test_cores_are_those_that_a_job_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert cores(tmp_path) == 8
    for written, allowed in (("max 100000", 8), ("250000 100000", 3), ("5000 100000", 1), ("9000000 100000", 8)):
        (tmp_path / "cpu.max").write_text(f"{written}\n")
        assert cores(tmp_path) == allowed
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, allowed in ((-1, 8), (200000, 2)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert cores(tmp_path) == allowed


def test_an_error_in_a_process_is_told_with_its_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    some_shards(tmp_path / "data")
    bad = write(tmp_path / "data" / "part-9.txt", ["one", "two <|im_end|>"])
    with pytest.raises(UserError, match=rf"{bad}:3 contains the special token <\|im_end\|>"):
        run(shards_of(tmp_path / "data" / "*.txt"), tokenizer, tmp_path / "cache", processes=2)


def test_a_process_that_is_killed_is_told(tmp_path: Path, tokenizer: Tokenizer, strange: ModuleType) -> None:
    shards = [strange.Strange("a", "killed"), strange.Strange("b", "killed")]
    with pytest.raises(UserError, match="was killed, most likely because memory ran out: whole shards stay; run again"):
        run(shards, tokenizer, tmp_path / "cache", processes=2)


PARENT = """
import sys
from pathlib import Path
from strange import Strange
from test_tokenise import TEXT
from transllm_jax.data.rows.tokenise import tokenise
from transllm_jax.tokenizer.tokenizer import Tokenizer
if __name__ == "__main__":
    shards = [Strange("a", "slow"), Strange("b", "slow")]
    tokenise(shards, TEXT, Tokenizer.load(sys.argv[1]), "refuse", Path("cache"), processes=2)
"""


def test_no_process_outlives_one_that_was_killed(tmp_path: Path, tokenizer: Tokenizer, strange: ModuleType) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen([sys.executable, "parent.py", tokenizer.source], env=environment)
    notes = [tmp_path / "slow-a", tmp_path / "slow-b"]
    wait_for(lambda: all(note.is_file() and note.read_text() for note in notes))
    workers = [int(note.read_text()) for note in notes]
    assert parent.poll() is None and parent.pid not in workers
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(map(alive, workers)))
