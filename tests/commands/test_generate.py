"""`transllm generate`: a line for each record, whatever happens to the process; what cannot be answered is listed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command, write_tiny_model
from processes import wait_for
from scripted import WHOLE_CHAIN, Script, chain_tokenizer
from tiny_sentencepiece import write_sentencepiece_model

from transllm_jax.commands.generate import GenerateOptions, generate, parse_share
from transllm_jax.commands.open_chat import ChatModel, open_chat_model
from transllm_jax.errors import Preempted, UserError
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.request import Result
from transllm_jax.generation.sampling import Sampling
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.tokenizer.chain import Markers

OPTIONS = GenerateOptions(max_new_tokens=6, batch_size=3)
SAMPLED = GenerateOptions(max_new_tokens=24, batch_size=3, sampling=Sampling(1.0, seed=5))


def write(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(model: Path, source: Path, target: Path, options: GenerateOptions = OPTIONS) -> int:
    return generate(str(model), source, target, options, Progress(quiet=True))


RECORDS: list[Any] = [
    {"id": "talk", "messages": [{"role": "user", "content": "Hello"}], "topic": "ทักทาย"},
    {"id": 7, "prompt": "The capital of France"},
    {"instruction": "What do bees make?", "text": "replaced"},
    {
        "id": "turns",
        "messages": [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": "Why?"},
        ],
    },
]


def test_each_record_comes_back_with_its_answer(tiny_model: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", RECORDS), tmp_path / "new" / "out.jsonl"
    assert answer(tiny_model, source, target) == 0
    rows = {row["id"]: row for row in read(target)}
    assert set(rows) == {"talk", 7, 3, "turns"}, "a record without an id has the number of its line"
    assert rows["talk"]["topic"] == "ทักทาย" and rows["turns"]["messages"] == RECORDS[3]["messages"]
    for row in rows.values():
        assert row["text"] != "replaced" and row["finish_reason"] in ("stop", "length") and 0 <= row["tokens"] <= 6
        assert "chain" not in row
    assert not (target.parent / "out.rejected.jsonl").exists()
    # Done: a second run changes nothing.
    before = target.read_bytes()
    assert answer(tiny_model, source, target) == 0 and target.read_bytes() == before


def test_a_command_that_goes_on_has_the_slots_of_the_whole_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With others, answers might be rounded differently."""
    engines: list[Engine] = []
    run = Engine.run

    def kept(engine: Engine, *given: Any, **options: Any) -> Any:
        engines.append(engine)
        return run(engine, *given, **options)

    monkeypatch.setattr(Engine, "run", kept)
    source, target = write(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl"
    options = GenerateOptions(6, batch_size=32)
    answer(tiny_model, source, target, options)
    lines = target.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    target.write_bytes(lines[0])
    answer(tiny_model, source, target, options)
    assert sorted(target.read_bytes().splitlines(keepends=True)) == sorted(lines)
    for engine in engines:
        assert [" 4 rows," in name for name in engine.programs if "burst" in name] == [True]
    assert len(engines) == 2


def test_a_chain_comes_with_its_parts_and_a_broken_one_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chain_tokenizer(tmp_path)
    config: Any = SimpleNamespace(context=10_000)
    opened = ChatModel("scripted", None, config, tokenizer, Markers())  # type: ignore[arg-type]
    # The last chain is without its answer, and is continued when all others are there.
    texts = [WHOLE_CHAIN, " is Paris", "A fox.", "<EN>Who?<RESPONSE>A <|im_start|>dog.", "สุนัข"]
    script = Script(tokenizer, *texts)
    monkeypatch.setattr("transllm_jax.commands.generate.Engine", lambda *given, **options: script)
    monkeypatch.setattr("transllm_jax.commands.generate.open_chat_model", lambda *given, **options: opened)
    asked = {"id": 1, "instruction": "อะไร", "chain": "old"}
    records = [asked, {"id": 2, "prompt": "It"}, {"id": 3, "instruction": "What?"}, {"id": 4, "instruction": "ใคร"}]
    answer(tmp_path, write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", replace(OPTIONS, batch_size=4))
    chain, raw, english, continued = read(tmp_path / "out.jsonl")
    length = len(tokenizer.encode(WHOLE_CHAIN))
    parts = {"question_en": "What is it?", "answer_en": "A fox.", "answer_target": "สุนัข"}
    told = {"text": "สุนัข", "finish_reason": "stop", "tokens": length, "how": "chain", "chain": parts}
    assert chain == asked | told
    assert raw["text"] == " is Paris" and "how" not in raw
    assert english["text"] == "A fox." and english["how"] == "plain" and "chain" not in english
    assert continued["how"] == "continued" and continued["text"] == "สุนัข"
    assert continued["chain"] == {"question_en": "Who?", "answer_en": "A <|im_start|>dog.", "answer_target": "สุนัข"}
    (again,) = script.calls[1]
    assert tokenizer.decode(again).endswith("<EN>Who?<RESPONSE>A <|im_start|>dog.<TH>")
    assert script.at_once == [4, 4]


def test_the_original_writes_the_english_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chain_tokenizer(tmp_path)
    config: Any = SimpleNamespace(context=10_000)
    none: Any = None
    base = ChatModel("original", none, config, tokenizer, Markers())
    opened = ChatModel("a", none, config, tokenizer, Markers(), original=lambda: base, in_chains=True)
    model = Script(tokenizer, "<EN>What is it?<RESPONSE>", " is Paris", "<RESPONSE>", "สุนัข")
    english = Script(tokenizer, "A fox.", "It is here.")
    engines = iter([model, english])
    monkeypatch.setattr("transllm_jax.commands.generate.Engine", lambda *given, **options: next(engines))
    monkeypatch.setattr("transllm_jax.commands.generate.open_chat_model", lambda *given, **options: opened)
    records = [{"id": 1, "instruction": "อะไร"}, {"id": 2, "prompt": "It"}, {"id": 3, "instruction": "Where?"}]
    source, target = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    answer(tmp_path, source, target, replace(OPTIONS, batch_size=4, english="original"))
    found = {row["id"]: row for row in read(target)}
    parts = {"question_en": "What is it?", "answer_en": "A fox.", "answer_target": "สุนัข"}
    assert (found[1]["text"], found[1]["how"], found[1]["chain"]) == ("สุนัข", "chain", parts)
    assert found[2]["text"] == " is Paris" and (found[3]["text"], found[3]["how"]) == ("It is here.", "english")
    assert [len(call) for call in model.calls] == [3, 1] and [len(call) for call in english.calls] == [2]
    # Answers of both kinds are not mixed in one file.
    with pytest.raises(UserError, match="english was 'original'"):
        answer(tmp_path, source, target, replace(OPTIONS, batch_size=4))


def test_lines_that_cannot_be_answered_are_listed_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    bad = [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"id": 7, "prompt": "again"}, "line 2 has the id 7, too"),
        ({"id": 1}, "has none"),
        ({"id": 2, "prompt": "x", "instruction": "y"}, "has prompt and instruction"),
        ({"id": 3, "prompt": " "}, "its prompt is no text, or empty"),
        ({"id": 4, "messages": [{"role": "user"}]}, "messages must be a list"),
        ({"id": 5, "messages": [{"role": "judge", "content": "x"}]}, "'judge'"),
        ({"id": 6, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "an answer"),
        ({"id": 8, "instruction": "a <|im_start|> b"}, "special token"),
        ({"id": 9, "prompt": "many words " * 600}, "exceed the model's context of 512"),
        ({"id": [1], "prompt": "x"}, "its id"),
        ('{"id": 10, "prompt": "\\ud800"}', "surrogate"),
        # Not equal to itself: the answer would belong to no record of the input.
        ('{"id": 12, "prompt": "x", "score": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "not JSON"),
    ]
    source = write(tmp_path / "in.jsonl", [*RECORDS, "", *(row for row, _ in bad)])
    source.write_bytes(source.read_bytes() + b'{"id": 11, "prompt": "\xff"}\n')
    target = tmp_path / "out.jsonl"
    assert answer(tiny_model, source, target) == len(bad) + 1
    assert len(read(target)) == len(RECORDS)
    rejected = read(tmp_path / "out.rejected.jsonl")
    assert [row["line"] for row in rejected] == list(range(6, 7 + len(bad)))
    for row, (line, reason) in zip(rejected, [*bad, (None, "not JSON")], strict=True):
        assert reason in row["reason"], row
        assert line is None or row["text"] == (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False))
    # They are correct now, and the list is gone.
    write(source, RECORDS)
    assert answer(tiny_model, source, target) == 0 and not (tmp_path / "out.rejected.jsonl").exists()


def test_a_file_of_which_nothing_can_be_answered_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for content, words in (
        (b"", "it is empty; give records"),
        (b"one\ttwo\nthree\tfour\n", "none of its 2 lines can be answered; see .*out.rejected.jsonl"),
        (json.dumps(RECORDS[0]).encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ):
        source.write_bytes(content)
        with pytest.raises(UserError, match=words):
            answer(tiny_model, source, target)
        assert not target.exists() and not (tmp_path / "out.settings.json").exists()
    assert len(read(tmp_path / "out.rejected.jsonl")) == 2
    # A byte order mark is no part of the first record.
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORDS[0]).encode())
    assert answer(tiny_model, source, target) == 0 and len(read(target)) == 1


def test_machines_share_the_records(tiny_model: Path, tmp_path: Path) -> None:
    records = [*RECORDS, {"id": 1}, {"id": 2, "prompt": "x"}, {"id": 2, "prompt": "again"}]
    source, target = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    assert answer(tiny_model, source, target) == 2
    shares = [answer(tiny_model, source, target, replace(OPTIONS, share=(number, 3))) for number in (1, 2, 3)]
    assert shares == [1, 1, 0], "a line that is wrong is listed by its share alone"
    parts = [read(tmp_path / f"out.{number}-of-3.jsonl") for number in (1, 2, 3)]
    assert [len(part) for part in parts] == [2, 1, 2]
    by_id = {str(row["id"]): row for row in read(target)}
    assert {str(row["id"]): row for part in parts for row in part} == by_id


@pytest.mark.parametrize("share", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_a_share_is_one_of_several(share: str) -> None:
    with pytest.raises(UserError, match=r"--share .* such as 2/8"):
        parse_share(share)


def test_answers_of_other_settings_are_not_mixed(tiny_model: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", RECORDS[:1]), tmp_path / "out.jsonl"
    answer(tiny_model, source, target)
    before = target.read_bytes()
    with pytest.raises(UserError, match=r"max_new_tokens was 6 and is 24, temperature was 0.0 and is 1.0"):
        answer(tiny_model, source, target, SAMPLED)
    other = write(tmp_path / "other.jsonl", [{"id": "talk", "prompt": "another"}])
    with pytest.raises(UserError, match=r"out.jsonl:1 answers no record of the input"):
        answer(tiny_model, other, target)
    with pytest.raises(UserError, match="is the input"):
        answer(tiny_model, source, source)
    for name in ("q.rejected.jsonl", "q.settings.json"):
        given = write(tmp_path / name, RECORDS[:1])
        with pytest.raises(UserError, match=f"{name}, which is written, is the input"):
            answer(tiny_model, given, tmp_path / "q.jsonl")
        assert given.exists()
    for place in (tmp_path, source / "out.jsonl"):
        with pytest.raises(UserError, match=r"is no file; name one|is no directory; name another"):
            answer(tiny_model, source, place)
    (tmp_path / "out.settings.json").unlink()
    with pytest.raises(UserError, match="does not; name another file"):
        answer(tiny_model, source, target)
    assert target.read_bytes() == before
    with target.open("ab") as held, pytest.raises(UserError, match="another process is writing it"):
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        answer(tiny_model, source, target)
    # How many are answered at once is no such setting.
    target.unlink()
    answer(tiny_model, write(source, RECORDS[:2]), target, GenerateOptions(6, batch_size=1))
    write(source, RECORDS)
    assert answer(tiny_model, source, target) == 0 and len(read(target)) == len(RECORDS)


def test_another_model_at_the_same_path_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    source, target = write(tmp_path / "in.jsonl", RECORDS[:1]), tmp_path / "out.jsonl"
    answer(model, source, target)
    write(source, RECORDS[:2])
    shutil.rmtree(model)
    write_tiny_model(model, seed=5)
    with pytest.raises(UserError, match=r"out.jsonl has answers of other settings \(weights was"):
        answer(model, source, target)


def test_a_refused_command_leaves_the_list_of_the_one_before(tiny_model: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [*RECORDS[:1], "{"]), tmp_path / "out.jsonl"
    assert answer(tiny_model, source, target) == 1
    with pytest.raises(UserError, match="answers no record of the input"):
        answer(tiny_model, write(tmp_path / "other.jsonl", [{"id": "talk", "prompt": "another"}]), target)
    assert (tmp_path / "out.rejected.jsonl").exists()


def test_a_space_at_the_beginning_of_a_continuation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece's decoder drops it from what it is given; and a rendered template has its first token already."""
    write_sentencepiece_model(tmp_path / "model")
    opened = open_chat_model(tmp_path / "model")
    tokenizer = opened.tokenizer
    asked: list[list[int]] = []
    # As it goes on behind a word.
    words = tokenizer.encode("It is here")[len(tokenizer.encode("It")) :]

    def say(self: Any, requests: Any, **_: Any) -> Any:
        for number, request in enumerate(requests):
            asked.append(list(request.prompt))
            yield number, Result(words, "stop", len(words))

    monkeypatch.setattr(Engine, "run", say)
    bos = tokenizer.decode(tokenizer.bos_ids, skip_special_tokens=False)
    records = [{"id": 1, "prompt": "It"}, {"id": 2, "prompt": f"{bos}It"}]
    source, target = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    answer(tmp_path / "model", source, target)
    assert [row["text"] for row in read(target)] == [" is here"] * 2
    assert asked[0] == asked[1] and asked[0][: len(tokenizer.bos_ids)] == tokenizer.bos_ids


MANY = [{"id": number, "prompt": f"Number {number} is"} for number in range(150)]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    here = tmp_path_factory.mktemp("undisturbed")
    answer(tiny_model, write(here / "in.jsonl", MANY), here / "out.jsonl", SAMPLED)
    lines = sorted((here / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert len({json.loads(line)["text"] for line in lines}) > 100, "samples differ"
    return lines


def test_killed_it_goes_on_and_no_answer_is_lost_or_doubled(
    tiny_model: Path, tmp_path: Path, undisturbed: list[str]
) -> None:
    source, target = write(tmp_path / "in.jsonl", MANY), tmp_path / "out.jsonl"
    words = ["generate", tiny_model, source, target, "--max-new-tokens", 24, "--temperature", 1.0, "--seed", 5]
    command = [sys.executable, "-m", "transllm_jax.cli.main", *map(str, words), "--batch-size", "3"]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: target.exists() and target.read_bytes().count(b"\n") > 10, 300)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = target.read_bytes()
    assert 10 < kept.count(b"\n") < len(MANY)
    # As if the kill had come within a write.
    target.write_bytes(kept + b'{"id": 149, "prompt": "Num')
    assert answer(tiny_model, source, target, SAMPLED) == 0
    lines = target.read_text(encoding="utf-8").splitlines()
    assert target.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert sorted(lines) == undisturbed


def test_stopped_it_says_how_far_it_is(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write(tmp_path / "in.jsonl", MANY[:20]), tmp_path / "out.jsonl"
    monkeypatch.setattr(
        Interrupt, "requested", property(lambda _: target.stat().st_size > 0, lambda _, __: None), raising=False
    )
    with pytest.raises(Preempted, match=r"generate: \d+ of 20 answers: stopped, what is done is saved"):
        answer(tiny_model, source, target)
    assert 0 < len(read(target)) < 20


def test_the_original_model_is_asked_without_adapters(finished_run: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", RECORDS)
    for base in (False, True):
        answer(finished_run, source, tmp_path / f"{base}.jsonl", GenerateOptions(6, batch_size=2, base=base))
    whole, original = ({row["id"]: row["text"] for row in read(tmp_path / f"{base}.jsonl")} for base in (False, True))
    assert len(whole) == len(RECORDS) and whole != original
    answer(finished_run.parent / "model", source, tmp_path / "model.jsonl", GenerateOptions(6, batch_size=2))
    assert {row["id"]: row["text"] for row in read(tmp_path / "model.jsonl")} == original


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("nothing", "in.jsonl", "out.jsonl"), "'nothing' does not exist"),
        (("model", "missing.jsonl", "out.jsonl"), "missing.jsonl: no such file"),
        (("model", "in.jsonl", "out.jsonl", "--top-p", "2"), "sampling: temperature"),
        (("model", "in.jsonl", "out.jsonl", "--min-p", "2"), "min_p 2.0 in"),
        (("model", "in.jsonl", "out.jsonl", "--top-k", "3000000000"), "top_k 3000000000 must be from 0 to"),
        (("model", "in.jsonl", "out.jsonl", "--base"), "has no original model in it"),
        (("model", "in.jsonl", "out.jsonl", "--english", "original"), "no original model is beside"),
    ],
)
def test_bad_arguments_end_with_one_line(
    transllm: Command,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", RECORDS)
    (tmp_path / "model").symlink_to(tiny_model)
    code, printed = transllm("generate", *arguments)
    assert code == 2 and problem in printed and len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
