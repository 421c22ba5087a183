"""A sample of a corpus: which documents, whatever reads them; resumed; in bounded memory."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import alive, wait_for

from transllm_jax.data.read import files
from transllm_jax.data.read import sample as sample_module
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.sample import Sample, sample_documents
from transllm_jax.data.read.shards import iter_texts
from transllm_jax.data.read.sources import iter_documents, read_documents
from transllm_jax.errors import UserError


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def size(documents: list[str]) -> int:
    return sum(len(text.encode()) for text in documents)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Five files of 40 documents of very different sizes, each document different."""
    rng = random.Random(0)
    paths = []
    for number in range(5):
        documents = [
            f"เอกสาร {number}.{n}\n" + "กขค ง" * rng.choice([1, 3, 30]) + "x" * rng.randrange(50) for n in range(40)
        ]
        paths.append(write(tmp_path / f"part{number}.txt", documents))
    return paths


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files give so little at first that some have to be read again."""
    monkeypatch.setattr(sample_module, "_LEAST", 1)
    monkeypatch.setattr(sample_module, "_MARGIN", 1)


def everything(paths: list[Path]) -> list[str]:
    return [text for path in paths for text in read_documents(path)]


def test_all_of_a_corpus_that_fits(corpus: list[Path]) -> None:
    documents = everything(corpus)
    found = sample_documents(corpus, max_bytes=size(documents))
    assert sorted(found.documents) == sorted(documents) and found.documents != documents
    report = found.report
    assert (report.files, report.documents, report.kept_documents) == (5, 200, 200)
    assert report.bytes == report.kept_bytes == size(documents)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_sample_is_the_lowest_priorities_that_fit(corpus: list[Path], tight: None, share: float) -> None:
    """The whole corpus, sampled, says the order; every smaller sample begins it and goes on until one does not fit."""
    order = sample_documents(corpus, max_bytes=10**9).documents
    budget = round(share * size(order))
    order = [text for text in order if len(text.encode()) <= budget]
    found = sample_documents(corpus, max_bytes=budget).documents
    assert found == order[: len(found)] and found
    assert size(found) <= budget < size(order[: len(found) + 1])


def test_what_reads_it_does_not_matter(corpus: list[Path], tight: None, tmp_path: Path) -> None:
    def take(paths: list[Any], **options: Any) -> Sample:
        return sample_documents(paths, max_bytes=9000, seed=3, **options)

    first = take(list(corpus))
    assert take(corpus[::-1], processes=2) == first
    assert take([tmp_path / "part*.txt", corpus[0]], cache=tmp_path / "cache") == first  # a file counts once
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in corpus:
        path.rename(moved / path.name)
    assert take([moved / "*.txt"]) == first
    assert {text.split(".")[0][-1] for text in first.documents} == set("01234")


def test_the_last_byte_decides(corpus: list[Path], tight: None) -> None:
    order = sample_documents(corpus, max_bytes=10**9).documents
    for count in (20, 50, 150):
        budget = size(order[:count])
        assert sample_documents(corpus, max_bytes=budget).documents == order[:count]
        assert sample_documents(corpus, max_bytes=budget - 1).documents == order[: count - 1]


def test_a_file_that_gave_too_little_is_read_again(corpus: list[Path], tight: None, read_files: list[str]) -> None:
    sample_documents(corpus, max_bytes=9000)
    assert len(read_files) > len(set(read_files)) == 5


def test_seeds_give_different_samples(corpus: list[Path]) -> None:
    found = [sample_documents(corpus, max_bytes=5000, seed=seed).documents for seed in (0, 1, 0)]
    assert found[0] == found[2] and not set(found[0]) <= set(found[1])


def test_documents_are_those_of_read_documents(tmp_path: Path) -> None:
    text = "\ufeffก\nข\n\n \t\n\ncafe\u0301\n\u2028x\n\n\nสุดท้าย"
    plain = tmp_path / "a.txt"
    plain.write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(text.encode()))
    for path in sorted(tmp_path.iterdir()):
        for separator in ("blank line", "line"):
            wanted = read_documents(path, separator=separator)  # type: ignore[arg-type]
            found = sample_documents([path], max_bytes=1000, separator=separator)  # type: ignore[arg-type]
            assert sorted(found.documents) == sorted(wanted)
            assert found.report.normalised == wanted.report.normalised == 1
            places = [place for _, place in iter_documents(path, Collector("refuse"), separator=separator)]  # type: ignore[arg-type]
            assert places == wanted.places


def test_documents_larger_than_the_sample_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ["short", "line\n" * 200, "l" * 200, "other"])
    found = sample_documents([path], max_bytes=100)
    assert sorted(found.documents) == ["other", "short"]
    assert (found.report.documents, found.report.too_long, found.report.bytes) == (4, 2, 10)
    with pytest.raises(UserError, match="only documents of more than 3 bytes: take a larger sample, or"):
        sample_documents([path], max_bytes=3)


def test_memory_is_bounded_by_the_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(2000):
            file.write(f"{rng.random()}" * 50 + "\n\n")
        file.write("one document\n" * 100_000)  # of 1.3 MB, without an end
    tracemalloc.start()
    try:
        found = sample_documents([path], max_bytes=100_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 98_000 < found.report.kept_bytes <= 100_000 and path.stat().st_size > 3_000_000
    # The documents kept, once more as JSON while they are read back, a buffer: not the file's 3 MB.
    assert peak < 900_000


def test_records_are_documents(corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of JSON and of parquet, with their letters escaped or not: the texts and counts of plain text."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [*everything(corpus[:2]), "cafe\u0301", "l" * 5000]
    plain = write(tmp_path / "a.txt", texts)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"data": {"text": text}}) + "\n" for text in texts))
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"data": {"text": text}} for text in texts]), table, compression="none")
    monkeypatch.setattr(files, "_LINES_PER_UPDATE", 10)
    wanted = sample_documents([plain], max_bytes=4000)
    assert (wanted.report.too_long, wanted.report.normalised) == (1, 1)
    for path in (lines, table):
        told: list[tuple[int, int]] = []
        asked: dict[str, Any] = {"max_bytes": 10**6, "field": "data.text"}
        found = sample_documents([path], **asked, on_progress=lambda a, b: told.append((a, b)))  # noqa: B023
        assert sorted(found.documents) == sorted(sample_documents([plain], max_bytes=10**6).documents)
        done, size_of = [a for a, _ in told], path.stat().st_size
        assert done == sorted(done) and {b for _, b in told} == {size_of} and done[-1] == size_of
        assert path == table or 0 < done[1] < size_of
        less = sample_documents([path], **asked | {"max_bytes": 4000})
        counts = [(r.documents, r.bytes, r.too_long, r.normalised) for r in (less.report, wanted.report)]
        assert counts[0] == counts[1] and 3000 < less.report.kept_bytes <= 4000
        with pytest.raises(UserError, match="1 has no field 'text'" if path == lines else "has no field 'text'"):
            sample_documents([path], max_bytes=4000)


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, in order."""
    names: list[str] = []

    def counting(path: Any, *arguments: Any, **options: Any) -> Any:
        names.append(Path(path).name)
        return iter_texts(path, *arguments, **options)

    monkeypatch.setattr(sample_module, "iter_texts", counting)
    return names


def test_a_pass_that_was_cut_off_goes_on(corpus: list[Path], tmp_path: Path, read_files: list[str]) -> None:
    wanted = sample_documents(corpus, max_bytes=9000)
    read_files.clear()
    cache = tmp_path / "cache"

    def stop(done: int, total: int) -> None:
        if len(read_files) == 3:
            raise KeyboardInterrupt

    # `at` is told every so many lines: in small files never, so the stop comes from a file's own lines.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "_LINES_PER_UPDATE", 1)
        sample_documents(corpus, max_bytes=9000, cache=cache, on_progress=stop)
    assert read_files == ["part0.txt", "part1.txt", "part2.txt"]
    assert len(list(cache.glob("part-*"))) == 2 and not list(cache.glob("sample-*"))
    assert not list(cache.glob(".*"))
    read_files.clear()
    assert sample_documents(corpus, max_bytes=9000, cache=cache) == wanted
    assert read_files == ["part2.txt", "part3.txt", "part4.txt"]
    # What is complete is one file, and is not made again.
    assert len(list(cache.iterdir())) == 1
    read_files.clear()
    assert sample_documents(corpus, max_bytes=9000, cache=cache) == wanted and not read_files


def test_what_was_kept_is_for_one_state_of_a_file_and_one_question(
    corpus: list[Path], tmp_path: Path, read_files: list[str]
) -> None:
    cache = tmp_path / "cache"
    asked: list[dict[str, Any]] = [
        {"max_bytes": 9000},
        {"max_bytes": 9001},
        {"max_bytes": 9000, "seed": 1},
        {"max_bytes": 9000, "separator": "line"},
        {"max_bytes": 9000, "controls": "remove"},
    ]
    for options in asked:
        read_files.clear()
        sample_documents(corpus, cache=cache, **options)
        assert len(read_files) == 5, options
    before = os.stat(corpus[1])
    write(corpus[1], ["อื่น " + "y" * n for n in range(50)])
    for time in (before.st_mtime_ns + 1, before.st_mtime_ns + 2):
        os.utime(corpus[1], ns=(time, time))
        read_files.clear()
        found = sample_documents(corpus, cache=cache, max_bytes=9000)
        assert "part1.txt" in read_files and any(text.startswith("อื่น") for text in found.documents)


def test_progress_is_told_in_bytes_of_the_files(corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LINES_PER_UPDATE", 10)
    total = sum(path.stat().st_size for path in corpus)
    for processes in (1, 2):
        told: list[tuple[int, int]] = []
        sample_documents(corpus, max_bytes=10**6, processes=processes, on_progress=lambda a, b: told.append((a, b)))  # noqa: B023
        done = [a for a, _ in told]
        assert {b for _, b in told} == {total} and done[0] == 0 and done[-1] == total
        assert done == sorted(done) and len(told) > 2


# --- processes ------------------------------------------------------------------------------------------------------

# Its processes import it, too: each reads what is no file, notes its number, and reads on for ever or is killed.
PARENT = """
import os, signal, sys, time
from pathlib import Path
from transllm_jax.data.read import sample
from transllm_jax.data.read.files import Place
from transllm_jax.errors import UserError

def endless(path, reading, collector, *, on_read, **options):
    Path(f"{path}.note").write_text(str(os.getpid()))
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(0.05)
        on_read(0)
        yield "a text", Place(str(path), 1)

sample.iter_texts = endless
if __name__ == "__main__":
    try:
        sample.sample_documents(["a.txt", "b.txt"], max_bytes=1000, processes=2)
    except UserError as error:
        sys.exit(str(error))
"""


def parent(directory: Path, what: str, **options: Any) -> subprocess.Popen[str]:
    for name in ("a.txt", "b.txt"):
        write(directory / name, ["a text"])
    (directory / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "parent.py", what], cwd=directory, env=environment, text=True, **options)


def test_no_process_outlives_one_that_was_killed(tmp_path: Path) -> None:
    asking = parent(tmp_path, "slow")
    notes = [tmp_path / "a.txt.note", tmp_path / "b.txt.note"]
    wait_for(lambda: all(note.is_file() and note.read_text() for note in notes))
    workers = [int(note.read_text()) for note in notes]
    assert asking.poll() is None and asking.pid not in workers and all(map(alive, workers))
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    wait_for(lambda: not any(map(alive, workers)))


def test_a_process_that_is_killed_is_told(tmp_path: Path) -> None:
    asking = parent(tmp_path, "killed", stderr=subprocess.PIPE)
    errors = asking.communicate(timeout=60)[1]
    assert "a process was killed, most likely because memory ran out: run again, with more memory" in errors
    assert "Traceback" not in errors


# --- bad input ------------------------------------------------------------------------------------------------------

Write = Callable[[Path], object]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.write_bytes("ก\n\nดี\x07\n".encode()), "bad.txt:3 has the control character U+0007 at column 3"),
        (lambda p: p.write_bytes(b"a\r\nb"), "bad.txt:1 has a carriage return"),
        (lambda p: p.write_bytes("ก\n".encode() + b"\xff\n"), "bad.txt:2 is not UTF-8: byte 0xff at offset 4"),
        (lambda p: p.write_bytes(b""), "bad.txt is empty"),
    ],
)
def test_a_bad_file_is_named_with_its_line(corpus: list[Path], spoil: Write, said: str, processes: int) -> None:
    bad = corpus[0].with_name("bad.txt")
    spoil(bad)
    with pytest.raises(UserError) as error:
        sample_documents([*corpus, bad], max_bytes=1000, processes=processes)
    assert said in str(error.value)


def test_control_characters_can_be_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\x07b\r\n\nc")
    found = sample_documents([path], max_bytes=100, controls="remove")
    assert sorted(found.documents) == ["ab", "c"] and found.report.removed == 2


def test_other_bad_input(tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    for paths, options, said in (
        ([blank], {}, "has no documents: give files with text"),
        ([tmp_path / "none.txt"], {}, "no file matches"),
        (corpus, {"max_bytes": 0}, "holds nothing"),
        (corpus, {"separator": "tab"}, "separator is 'tab'"),
        (corpus, {"controls": "keep"}, "controls is 'keep'"),
    ):
        with pytest.raises(UserError, match=said):
            sample_documents(paths, **({"max_bytes": 100} | options))  # type: ignore[arg-type]
    monkeypatch.setattr(files, "_LONGEST_LINE", 1 << 20)
    long = tmp_path / "long.txt"
    long.write_text("a\n" + "b" * (1 << 20))
    with pytest.raises(UserError, match=r"long.txt:2 is longer than 1 MiB: break the line"):
        sample_documents([long], max_bytes=10**7)
