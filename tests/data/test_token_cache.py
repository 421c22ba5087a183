"""The token cache: what is written is read again, is whole or not there, and is never taken for something else."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import DOCUMENTS, examples_of, items_of, shards_of, some_shards, write
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.choices import Content
from transllm_jax.data.clean.cleaning import Rules
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.data.clean.near_duplicates import signature
from transllm_jax.data.read.shards import Shard
from transllm_jax.data.rows import token_cache
from transllm_jax.data.rows.array_file import read_arrays, write_arrays
from transllm_jax.data.rows.examples import Example
from transllm_jax.data.rows.token_cache import ShardTokens, shard_path, write_shard
from transllm_jax.data.rows.transform import Transform
from transllm_jax.disk import sweep
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message, encode_conversation
from transllm_jax.tokenizer.tokenizer import Tokenizer

TEXT = Transform("text", 32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of more than 65,536 tokens; 'สวัสดี' is one of the last."""
    tokenizer = Tokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("wide")))
    tokenizer.backend.add_tokens([*(f"filler{n:06}" for n in range(1 << 16)), "สวัสดี"])
    return tokenizer


def written(directory: Path, shard: Shard, transform: Transform, tokenizer: Tokenizer) -> ShardTokens:
    path = shard_path(directory, shard, transform, tokenizer.fingerprint)
    write_shard(path, shard, transform, tokenizer, "refuse")
    return ShardTokens(path, shard.name)


def assert_same(found: list[Example], wanted: list[Example]) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        # The first token of an example is never a target, whatever its mask says.
        np.testing.assert_array_equal(a.mask[1:], b.mask[1:])
        assert a.ids.dtype == np.int32 and a.mask.dtype == np.uint8


@pytest.mark.parametrize("content", ["text", "pairs", "conversations"])
@pytest.mark.parametrize("which", ["tokenizer", "wide"])
def test_records_are_the_examples(
    tmp_path: Path, content: Content, which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    monkeypatch.setattr(token_cache, "_ITEMS", 3)  # several batches are on their way at once
    [shard] = some_shards(tmp_path / "data", content, files=1)
    transform = Transform(content, 48 if content != "conversations" else 150, near=True)
    tokens = written(tmp_path / "cache", shard, transform, tokenizer)
    counts = Counter[str]()
    items = items_of([shard])
    made = examples_of(transform, tokenizer, items, counts)
    wanted = [example for found, _ in made for example in found]
    assert_same(tokens.examples(list(range(len(tokens)))), wanted)
    assert_same(tokens.examples([3, 0, 3]), [wanted[n] for n in (3, 0, 3)])
    if which == "wide":
        assert content == "conversations" or max(int(example.ids.max()) for example in wanted) >= 1 << 16

    assert tokens.items == len(items)
    assert tokens.lengths.tolist() == list(map(len, wanted))
    assert tokens.column("trained").tolist() == [int(example.mask[1:].sum()) for example in wanted]
    assert tokens.column("bytes").tolist() == [size for _, sizes in made for size in sizes]
    assert tokens.column("item").tolist() == [n for n, (found, _) in enumerate(made) for _ in found]
    keys = [transform.keys(item) for item in items]
    assert tokens.column("exact").tolist() == [exact for exact, _ in keys]
    assert (tokens.column("near") == np.stack([near for _, near in keys if near is not None])).all()
    assert +Counter(tokens.counts) == +counts


def test_bytes_of_a_conversation_are_those_of_the_answers_that_are_trained(tokenizer: Tokenizer) -> None:
    def turn(question: str, answer: str, **more: bool) -> list[Message]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]  # type: ignore[list-item,typeddict-item]

    first, second, third = turn("a", "WRONG", train=False), turn("b", "right"), turn("c", "ใช่ " * 30)
    two = len(encode_conversation(tokenizer, [*first, *second])[0].ids)
    for length, messages, size in (
        (512, [*first, *second], 5),
        (512, [*second, *first, *third], 5 + len(third[1]["content"].encode())),
        (two, [*first, *second, *third], 5),  # cut at a turn
    ):
        counts = Counter[str]()
        ((examples, sizes),) = examples_of(Transform("conversations", length), tokenizer, [messages], counts)
        assert len(examples) == 1 and sizes == [size] and counts["cut at a turn"] == (length == two)


def test_bytes_of_a_document_are_shared_out_over_its_pieces(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "สวัสดี the fox " * 40
    [shard] = shards_of(write(tmp_path / "a.txt", [text]))
    tokens = written(tmp_path, shard, TEXT, tokenizer)
    assert len(tokens) > 5 and tokens.counts["split"] == 1
    assert tokens.column("bytes").sum() == len(text.encode())
    assert tokens.bytes_of([0, 1]) == tokens.column("bytes")[:2].sum()


def test_places_are_files_and_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first, second = write(tmp_path / "a.txt", ["one\nmore", "two"]), write(tmp_path / "b.txt", ["three"])
    [both] = shards_of(tmp_path / "*.txt", max_bytes=1000)  # a limit makes one shard of all files
    tokens = written(tmp_path, both, TEXT, tokenizer)
    assert tokens.places([0, 1, 2]) == [f"{first}:1", f"{first}:4", f"{second}:1"]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"text": "one"}, {"text": "two"}])
    parquet.write_table(table, tmp_path / "a.parquet")
    [shard] = shards_of(tmp_path / "a.parquet")
    assert written(tmp_path, shard, TEXT, tokenizer).places([1]) == [f"{tmp_path / 'a.parquet'}:row 2"]


def test_another_tokenizer_transform_or_content_has_another_name(
    tmp_path: Path, tokenizer: Tokenizer, wide: Tokenizer
) -> None:
    shard, other = some_shards(tmp_path, files=2)
    names = {shard_path(tmp_path, shard, TEXT, tokenizer.fingerprint)}
    assert shard_path(tmp_path, shard, Transform("text", 32), tokenizer.fingerprint) in names
    for transform in (
        Transform("pairs", 32),
        replace(TEXT, length=33),
        replace(TEXT, markers=Markers("<EN>", "<LAO>", "<RESPONSE>")),
        replace(TEXT, rules=Rules(min_characters=1)),
        replace(TEXT, rules=Rules(scripts=("Thai",), min_script_share=0.5)),
        replace(TEXT, evaluation=EvaluationTexts([("set", "a text of the evaluation set")])),
        replace(TEXT, evaluation=EvaluationTexts([("set", "another text of the evaluation set")])),
        replace(TEXT, exact=False),
        replace(TEXT, near=True),
    ):
        names.add(shard_path(tmp_path, shard, transform, tokenizer.fingerprint))
    names.add(shard_path(tmp_path, shard, TEXT, wide.fingerprint))
    names.add(shard_path(tmp_path, other, TEXT, tokenizer.fingerprint))
    assert len(names) == 12


def test_items_that_are_left_out_are_counted_and_have_no_example(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [shard] = some_shards(tmp_path / "data", files=1)
    transform = replace(TEXT, rules=Rules(min_characters=10_000), near=True)
    tokens = written(tmp_path, shard, transform, tokenizer)
    assert len(tokens) == 0 and tokens.items == len(DOCUMENTS) == tokens.counts["too short"]
    assert tokens.column("near").shape == (len(DOCUMENTS), len(signature("a")))


def test_specials_are_refused_with_their_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, items, line in (
        ("a.txt", ["one", "two\nlines <|im_end|>"], 4),
        ("b.tsv", [("one", "two"), ("three", "<RESPONSE>")], 2),
    ):
        content: Content = "text" if name.endswith("txt") else "pairs"
        [shard] = shards_of(write(tmp_path / name, items), content)
        with pytest.raises(UserError, match=rf"{name}:{line} contains the special token <"):
            written(tmp_path / "cache", shard, Transform(content, 32), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_the_chat_template_refuses_is_refused_with_its_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    picky = Tokenizer(tokenizer.backend, tokenizer.config, strict + str(tokenizer.chat_template))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [turns, turns, [{"role": "system", "content": "c"}, *turns]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps({'messages': row})}\n" for row in rows))
    [shard] = shards_of(path, "conversations")
    with pytest.raises(UserError, match=r"a\.jsonl:3: the chat template of .* refuses the conversation: no system"):
        written(tmp_path / "cache", shard, Transform("conversations", 200), picky)


def test_an_interrupt_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_ITEMS", 5)
    [shard] = some_shards(tmp_path / "data", files=1)

    def tell(items: int) -> None:
        told.append(items)
        if len(told) == 2:
            raise KeyboardInterrupt

    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "cache" / "a.npz", shard, TEXT, tokenizer, "refuse", tell)
    assert told == [5, 5] and list((tmp_path / "cache").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tiny_shards import shards_of
from transllm_jax.data.rows import token_cache
from transllm_jax.data.rows.transform import Transform
from transllm_jax.tokenizer.tokenizer import Tokenizer
data, cache, tokenizer, moment = map(Path, sys.argv[1:])
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
tell = kill if str(moment) == "records" else lambda items: None
token_cache.write_arrays = kill
[shard] = shards_of(data)
tokenizer = Tokenizer.load(tokenizer)
path = token_cache.shard_path(cache, shard, Transform("text", 32), tokenizer.fingerprint)
token_cache.write_shard(path, shard, Transform("text", 32), tokenizer, "refuse", tell)
"""


@pytest.mark.parametrize("moment", ["records", "arrays"])
def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path: Path, tokenizer: Tokenizer, moment: str) -> None:
    [shard] = some_shards(tmp_path / "data", files=1)
    cache = tmp_path / "cache"
    arguments = [sys.executable, "-c", KILLED, tmp_path / "data" / "*.txt", cache, tokenizer.source, moment]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([str(part) for part in arguments], env=environment)
    assert done.returncode == -signal.SIGKILL
    path = shard_path(cache, shard, TEXT, tokenizer.fingerprint)
    assert len(list(cache.iterdir())) == 1 and not path.exists()
    sweep(cache)
    assert [file.suffix for file in cache.iterdir()] == ([] if moment == "records" else [".array_record"])
    tokens = written(cache, shard, TEXT, tokenizer)
    assert len(list(cache.iterdir())) == 2 and tokens.examples([0])


def test_sweep_leaves_what_may_still_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [shard] = some_shards(tmp_path / "data", files=1)
    cache = tmp_path / "cache"
    seen: list[Path] = []

    def tell(items: int) -> None:
        sweep(cache)
        seen.extend(cache.iterdir())

    write_shard(cache / "a.npz", shard, TEXT, tokenizer, "refuse", tell)
    assert len(seen) == 1
    elsewhere = cache / ".a.otherhost-1-00ff.partial"
    for age, stays in ((60, True), (100_000, False)):
        elsewhere.touch()
        os.utime(elsewhere, times=(os.path.getmtime(elsewhere) - age,) * 2)
        sweep(cache)
        assert elsewhere.exists() == stays


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 70_000])  # the header of the records; their end
def test_a_full_disk_is_the_users_and_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer, size: int) -> None:
    documents: list[object] = [f"{n} {text}" for n in range(40) for text in DOCUMENTS]
    [shard] = shards_of(write(tmp_path / "a.txt", documents))
    cache = tmp_path / "cache"
    with file_size_limit(size), pytest.raises(UserError, match=r"cache cannot be written to \(.*File too large.*\)"):
        written(cache, shard, TEXT, tokenizer)
    assert list(cache.iterdir()) == []
    with file_size_limit(size), pytest.raises(UserError, match="cache cannot be written to"):
        write_arrays(cache / "b.npz", {"a": np.zeros(100_000)})
    assert list(cache.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_the_users(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [shard] = some_shards(tmp_path / "data", files=1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/cache cannot be written to \(Not a directory\): .*token_cache"):
        written(tmp_path / "file" / "cache", shard, TEXT, tokenizer)


def test_names_of_any_kind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number, name in enumerate(("ไฟล์ #1@2 [x].txt", "\U00020000" * 60 + ".txt", ".hidden.txt", "a:b?.txt")):
        path = write(tmp_path / f"ที่ อื่น#{number}" / name, ["one", "two"])
        [shard] = shards_of(path)
        tokens = written(tmp_path / "แคช @1", shard, TEXT, tokenizer)
        assert len(tokens.examples([0, 1])) == 2 and tokens.places([1]) == [f"{path}:3"]


def damaged(path: Path, at: int) -> bytes:
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :])
    return content


def test_damaged_arrays_are_refused_wherever_they_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(20, dtype=np.int32), "b": np.array("words"), "c": [np.ones((2, 3)), np.zeros((1, 3))]}
    write_arrays(path, arrays)
    whole = read_arrays(path, list(arrays))
    assert (
        whole[0].tolist() == list(range(20))
        and str(whole[1]) == "words"
        and whole[2].tolist() == [[1] * 3] * 2 + [[0] * 3]
    )
    refused = 0
    size = path.stat().st_size
    for at in range(0, size, 5):
        content = damaged(path, at)
        try:
            found = read_arrays(path, list(arrays))
        except ValueError:
            refused += 1
        else:  # such as a date that nobody reads
            for a, b in zip(found, whole, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
        path.write_bytes(content)
    assert refused > size / 10
    for cut in range(0, size, 99):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError):
            read_arrays(path, list(arrays))


def test_a_damaged_shard_is_the_users_and_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [shard] = some_shards(tmp_path / "data", files=1)
    tokens = written(tmp_path, shard, TEXT, tokenizer)
    records = tokens.path.with_suffix(".array_record")
    message = rf"{tokens.path.name} is damaged \(.*\): remove it and run again; it is made again from part-0.txt$"
    everything = list(range(len(tokens)))
    wanted = tokens.examples(everything)

    refused = 0
    for at in range(0, sum(map(len, wanted)) * 2, 97):
        content = damaged(records, at)
        try:
            assert_same(ShardTokens(tokens.path, shard.name).examples(everything), wanted)
        except UserError as error:
            refused += 1
            assert "is damaged" in str(error)
        records.write_bytes(content)
    assert refused > 10

    records.write_bytes(content[:-1])
    with pytest.raises(UserError, match=message):
        ShardTokens(tokens.path, shard.name)
    records.unlink()
    with pytest.raises(UserError, match=message):
        ShardTokens(tokens.path, shard.name)
    records.write_bytes(content)
    tokens.path.write_bytes(b"")
    with pytest.raises(UserError, match=message):
        ShardTokens(tokens.path, shard.name)
    with pytest.raises(UserError, match=message):
        tokens.column("line")
    tokens.path.unlink()
    assert_same(written(tmp_path, shard, TEXT, tokenizer).examples(everything), wanted)


def test_two_writers_at_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_ITEMS", 5)
    [shard] = some_shards(tmp_path / "data", files=1)
    path = tmp_path / "cache" / "a.npz"
    meet = threading.Barrier(2)  # neither is done before the other has begun
    threads = [
        threading.Thread(
            target=write_shard, args=(path, shard, TEXT, tokenizer, "refuse", lambda items: meet.wait(10) and None)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.array_record", "a.npz"]
    tokens = ShardTokens(path, "a")
    made = examples_of(TEXT, tokenizer, items_of([shard]), Counter())
    assert_same(tokens.examples(list(range(len(tokens)))), [example for found, _ in made for example in found])


def test_more_shards_than_a_process_may_open(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [shard] = some_shards(tmp_path / "data", files=1)
    tokens = written(tmp_path, shard, TEXT, tokenizer)
    many = []
    for n in range(300):
        path = tmp_path / f"{n}.npz"
        for suffix in (".npz", ".array_record"):
            shutil.copy(tokens.path.with_suffix(suffix), path.with_suffix(suffix))
        many.append(ShardTokens(path, "a"))
    for other in many:
        assert_same(other.examples([1]), tokens.examples([1]))
    assert len(list(Path("/proc/self/fd").iterdir())) < 300
