"""`transllm tokenizer expand` and `report`, from the command line to what they write and say."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from conftest import EXAMPLES, Command
from tiny_sentencepiece import build_tiny_sentencepiece
from tiny_tokenizer import build_tiny_tokenizer
from tokenizers import models, pre_tokenizers

from transllm_jax.commands.open_tokenizer import open_tokenizer
from transllm_jax.disk import parse_size
from transllm_jax.errors import UserError
from transllm_jax.evaluation.token_cost import TokenCost, costs, cut, example_words
from transllm_jax.tokenizer.scripts import script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer

HELD_OUT = EXAMPLES / "text.heldout.txt"
ENGLISH = EXAMPLES / "english.heldout.txt"
INDONESIAN = ["Saya sedang belajar bahasa Indonesia di rumah.", "Bahasa itu sangat indah dan mudah dipelajari."] * 4


@pytest.fixture
def command(transllm: Command) -> Command:
    """Runs `transllm tokenizer ARGUMENTS`."""
    return partial(transllm, "tokenizer")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("commands") / "base")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands") / "thai.txt"
    path.write_text((EXAMPLES / "text.train.txt").read_text(encoding="utf-8")[:12000], encoding="utf-8")
    return path


def numbers(printed: str, row: str) -> list[str]:
    """The words of the first line of the table of costs that has `row` among them."""
    return next(line.split() for line in printed.splitlines() if line.endswith("%") and Path(row).name in line.split())


# --- expand ---------------------------------------------------------------------------------------------------------


def test_expand(tmp_path: Path, command: Command, base: Path, corpus: Path) -> None:
    code, printed = command(
        *("expand", base, corpus, tmp_path / "out", "--size", 120, "--language", "th", "--marker", "<EN>"),
        *("--marker", "<TH>", "--held-out", HELD_OUT, "--english", ENGLISH),
    )
    assert code == 0
    old, new = Tokenizer.load(base), Tokenizer.load(tmp_path / "out")
    assert new.vocab_size == old.vocab_size + 122 and new.special_tokens["<TH>"] == new.vocab_size - 1
    assert "120 new tokens for Thai (Thai script) and 2 markers; 400 -> 522 tokens; tokenizer.json" in printed
    assert "1 new token produced there less than 2 times: the first bytes of characters" in printed
    texts = HELD_OUT.read_text(encoding="utf-8").split("\n\n")
    before, after = costs([old, new], [text.strip() for text in texts])
    for row, cost in (("before", before), ("after", after)):
        found = numbers(printed, row)
        assert f"{cost.tokens:,}" in found and f"{cost.per_character:.3f}" in found and f"{cost.per_word:.2f}" in found
    assert after.tokens < before.tokens / 2
    assert f"{ENGLISH}: 0 of " in printed and "not all English ids can stay" not in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["measured"][str(HELD_OUT)]["after"]["tokens"] == after.tokens
    assert report["english_changed"]["changed"] == 0 < report["english_changed"]["texts"]
    assert report["scripts"] == ["Thai"] and report["base"] == str(base) and report["markers"] == ["<EN>", "<TH>"]
    assert report["sample"]["kept_bytes"] == report["sample"]["bytes"] > 10_000
    assert len(report["examples"]) == 6 and all(old.encode(word)[1:] for word in report["examples"])
    assert all(word in printed for pair in report["examples"].values() for word in pair)


def _as_records(path: Path, texts: list[str], field: str) -> Path:
    """The texts in a file of records, each in a field beside another one; of JSON with its letters escaped."""
    rows = [{"id": number, field: text} for number, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize(
    ("suffix", "field"), [(".jsonl", "text"), (".jsonl.gz", "content"), (".json", "text"), (".parquet", "body")]
)
def test_records_are_read_as_texts(
    tmp_path: Path, command: Command, base: Path, corpus: Path, suffix: str, field: str
) -> None:
    """A corpus, held-out text and English in records cost what they cost as plain text."""

    def records(plain: Path, name: str) -> Path:
        texts = [text.strip("\n") for text in plain.read_text(encoding="utf-8").split("\n\n") if text.strip()]
        return _as_records(tmp_path / f"{name}{suffix}", texts, field)

    options = ("--size", 120, "--language", "th", "--marker", "<TH>")
    files = (corpus, HELD_OUT, ENGLISH)
    of_records = [records(file, name) for file, name in zip(files, ("corpus", "held_out", "english"), strict=True)]
    reports = []
    for name, (text, held_out, english), more in (
        ("plain", files, ()),
        ("records", of_records, () if field == "text" else ("--field", field)),
    ):
        more = (*options, *more, "--held-out", held_out, "--english", english)
        assert command("expand", base, text, tmp_path / name, *more)[0] == 0
        report = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
        reports.append({key: list(report[key].values()) for key in ("measured", "english_changed", "english_files")})
        reports[-1]["documents"] = report["sample"]["documents"], report["sample"]["bytes"]
    assert reports[0] == reports[1]
    assert (tmp_path / "plain/tokenizer.json").read_bytes() != b"" and (
        sorted(Tokenizer.load(tmp_path / "plain").backend.get_vocab())
        == sorted(Tokenizer.load(tmp_path / "records").backend.get_vocab())
    )
    more = () if field == "text" else ("--field", field)
    curve = ("--curve", "60,120", "--corpus", of_records[0], "--language", "th")
    printed = [
        command("report", base, file, "--base", base, *rest)[1].splitlines()
        for file, rest in (
            (HELD_OUT, ("--curve", "60,120", "--corpus", corpus, "--language", "th")),
            (of_records[1], (*curve, *more)),
        )
    ]
    for row in ("+60", "+120", "base"):
        of_text, of_record = ([line.split()[-6:] for line in lines if f" {row} " in line] for lines in printed)
        assert of_text == of_record and len(of_text) == 1


def test_options_that_no_file_has_a_use_for(tmp_path: Path, command: Command, base: Path, corpus: Path) -> None:
    rows = _as_records(tmp_path / "a.jsonl", ["ภาษาไทย", "ประเทศไทย"], "text")
    expand = ("expand", base, "{}", tmp_path / "out", "--size", 10, "--language", "th")
    for file, options, said in (
        (corpus, ("--field", "text"), "--field text is for records (.jsonl, .json, .parquet), and no file has any"),
        (rows, ("--lines",), "--lines is for text in lines, and all files have records: leave it out"),
        (rows, ("--field", "content"), "a.jsonl:1 has no field 'content' (it has: id, text)"),
    ):
        code, printed = command(*(file if part == "{}" else part for part in expand), *options)
        assert code == 2 and said in printed and not (tmp_path / "out").exists()
    code, printed = command("report", base, rows, "--field", "content")
    assert code == 2 and "a.jsonl:1 has no field 'content'" in printed


@pytest.mark.parametrize("cuts", ["whole", "base"])
def test_expand_says_who_reads_the_ids(tmp_path: Path, command: Command, base: Path, corpus: Path, cuts: str) -> None:
    options = ("--size", 130, "--language", "th", "--cuts", cuts)
    code, printed = command("expand", base, corpus, tmp_path / "out", *options)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert code == 0 and report["cuts"] == cuts and report["passes_for_base"]
    same = json.loads((base / "tokenizer.json").read_text())["pre_tokenizer"]
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    everyone = "transformers, vLLM and llama.cpp read the ids: text is cut where the base cuts it"
    some = "transformers and vLLM read the ids; llama.cpp reads others: it cuts text where the base does (--cuts base"
    if cuts == "base":
        assert written == same and everyone in printed and report["readers"]["llama.cpp"] == "as trained"
    else:
        assert written != same and some in printed and report["readers"]["llama.cpp"] == "other ids"


def test_tokens_within_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, base: Path, corpus: Path
) -> None:
    breakers = pytest.importorskip("icu4py.breakers")
    options = ("--size", 500, "--language", "th")
    within = ("--within-words", "--held-out", HELD_OUT)
    for name, more in (("across", ("--held-out", HELD_OUT)), ("within", within)):
        code, printed = command("expand", base, corpus, tmp_path / name, *options, *more)
        assert code == 0 and ("no new token crosses the end of a word, as ICU " in printed) == (name == "within")
    reports = [
        json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8")) for name in ("across", "within")
    ]
    assert [report["within_words"] for report in reports] == [False, True] and reports[0]["icu"] is None
    words = set(breakers.WordBreaker(corpus.read_text(encoding="utf-8"), "th"))
    crossing = [[t for t in r["longest"] if not any(t.strip() in word for word in words)] for r in reports]
    assert crossing[0] and crossing[1] == []
    curve = ("--curve", "500", "--corpus", corpus, "--language", "th", "--within-words")
    printed = command("report", base, HELD_OUT, *curve)[1]
    assert f"{reports[1]['measured'][str(HELD_OUT)]['after']['tokens']:,}" in numbers(printed, "+500")
    # Without ICU nothing is read and nothing is written; the tokenizer itself is used without it.
    monkeypatch.setitem(sys.modules, "icu4py", None)
    code, printed = command("expand", base, corpus, tmp_path / "out", *options, "--within-words")
    assert code == 2 and "needs icu4py; pip install 'transllm-jax[icu]'" in printed and not (tmp_path / "out").exists()
    assert command("report", tmp_path / "within", HELD_OUT)[0] == 0


def test_expand_says_where_the_converter_of_llama_cpp_has_to_be_told(
    tmp_path: Path, command: Command, base: Path
) -> None:
    text = tmp_path / "ru.txt"
    text.write_text("\n\n".join(["нещо на Български", "погода сегодня хорошая на столе"] * 4), encoding="utf-8")
    for cuts in ("whole", "base"):
        code, printed = command(
            *("expand", base, text, tmp_path / cuts, "--size", 24, "--language", "ru", "--cuts", cuts)
        )
        assert code == 0 and "add this one to its get_vocab_base_pre" in printed


def test_autotokenizer_loads_what_expand_writes(tmp_path: Path, command: Command, base: Path, corpus: Path) -> None:
    from transformers import AutoTokenizer

    options = ("--size", 130, "--language", "th", "--marker", "<TH>")
    assert command("expand", base, corpus, tmp_path / "out", *options)[0] == 0
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.load(tmp_path / "out")
    text = "ภาษาไทย and <TH> English  ๒๕๖๗ 🙂"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert len(theirs) == ours.vocab_size and theirs.chat_template == ours.chat_template


def test_letters_that_the_base_cannot_give_back_are_named(
    tmp_path: Path, command: Command, base: Path, corpus: Path
) -> None:
    shutil.copytree(base, tmp_path / "nfkc")
    path = tmp_path / "nfkc" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(state | {"normalizer": {"type": "NFKC"}}), encoding="utf-8")
    for name, said in (("nfkc", True), (base, False)):
        options = ("--size", 120, "--language", "th", "--force")
        code, printed = command("expand", tmp_path / name, corpus, tmp_path / "out", *options)
        assert code == 0, printed
        assert ("replaces ำ (U+0E33) by other letters" in printed) == said


def test_the_same_command_writes_the_same_bytes(tmp_path: Path, command: Command, base: Path, corpus: Path) -> None:
    options = ("--size", 130, "--language", "th", "--sample", "9KB", "--seed", 4)
    for name in ("one", "two"):
        assert command("expand", base, corpus, tmp_path / name, *options)[0] == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    report = json.loads((tmp_path / "one" / "report.json").read_text(encoding="utf-8"))
    assert 8000 < report["sample"]["kept_bytes"] <= 9000 < report["sample"]["bytes"]


def test_new_ids_begin_behind_the_rows_of_the_model(tmp_path: Path, command: Command, base: Path, corpus: Path) -> None:
    padded = build_tiny_tokenizer(tmp_path / "padded")
    (padded / "config.json").write_text('{"vocab_size": 448}')
    assert command("expand", padded, corpus, tmp_path / "out", "--size", 130, "--language", "th")[0] == 0
    ids = sorted(Tokenizer.load(tmp_path / "out").backend.get_vocab(with_added_tokens=True).values())
    assert ids[:400] == list(range(400)) and ids[-130:] == list(range(448, 578))


def test_a_latin_script_says_what_happens_to_english(tmp_path: Path, command: Command, base: Path) -> None:
    text = tmp_path / "id.txt"
    text.write_text("\n\n".join(INDONESIAN), encoding="utf-8")
    code, printed = command(
        *("expand", base, text, tmp_path / "out", "--size", 12, "--language", "id", "--english", ENGLISH)
    )
    assert code == 0 and "Indonesian (Latin script)" in printed
    assert "The Latin script is that of English, too: not all English ids can stay." in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    old, new = Tokenizer.load(base), Tokenizer.load(tmp_path / "out")
    documents = [text.strip() for text in ENGLISH.read_text(encoding="utf-8").split("\n\n")]
    changed = sum(old.encode(text) != new.encode(text) for text in documents)
    assert report["english_files"][str(ENGLISH)]["changed"] == changed > 0
    assert f"{changed} of {len(documents)} texts have other ids" in printed
    code, printed = command("expand", base, text, tmp_path / "two", "--size", 12, "--language", "id")
    assert code == 0 and "--english FILE counts which texts change" in printed


def test_lines_is_for_english_too(tmp_path: Path, command: Command, base: Path) -> None:
    text, english = tmp_path / "id.txt", tmp_path / "en.txt"
    text.write_text("\n".join(INDONESIAN), encoding="utf-8")
    english.write_text("The man reads.\nThe girl paints.\nRain falls.\n", encoding="utf-8")
    code, printed = command(
        *("expand", base, text, tmp_path / "out", "--size", 12, "--language", "id", "--english", english, "--lines")
    )
    assert code == 0 and "of 3 texts have other ids" in printed


def test_a_sentencepiece_base_gives_both_files(tmp_path: Path, command: Command, corpus: Path) -> None:
    build_tiny_sentencepiece(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    code, printed = command("expand", tmp_path / "base", corpus, tmp_path / "out", "--size", 100, "--language", "th")
    assert code == 0 and "tokenizer.json and tokenizer.model" in printed
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    ours = Tokenizer.load(tmp_path / "out")
    text = "ประเทศไทย is here"
    assert model.encode(text) == ours.encode(text) and model.vocab_size() == ours.vocab_size
    code, printed = command("report", tmp_path / "out", HELD_OUT)
    assert code == 0 and numbers(printed, str(tmp_path / "base"))[-1] == "100%"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corpus": "english"}, "the corpus has no Thai characters: give Thai text"),
        ({"corpus": "controls"}, "controls.txt:2 has the control character U+0007"),
        ({"corpus": "missing"}, "no file matches"),
        ({"base": "unigram"}, "is a Unigram tokenizer"),
        ({"base": "nothing"}, "does not exist"),
        ({"base": "empty"}, "has no tokenizer.json"),
        ({"--size": 100_000}, "the corpus supports"),
        ({"--size": 0}, "0 is too small"),
        ({"--min-count": 0}, "0 is too small"),
        ({"--language": "tai"}, "th (Thai)"),
        ({"--script": "Tai"}, "script 'Tai' is unknown; near it: Thai"),
        ({"--marker": "<|im_end|>"}, "has the marker '<|im_end|>' already"),
        ({"--marker": "< >"}, "white space"),
        ({"--sample": "much"}, "the size 'much' is not of the form"),
        ({"--held-out": "missing"}, "no file matches"),
        ({"--english": "missing"}, "no file matches"),
        ({"--english": "controls"}, "controls.txt:2 has the control character U+0007"),
        ({"dst": "full"}, "exists and is not empty"),
    ],
    ids=str,
)
def test_bad_input(
    tmp_path: Path, command: Command, base: Path, corpus: Path, changes: dict[str, Any], said: str
) -> None:
    backend = tokenizers.Tokenizer(models.Unigram([("a", 0.0)]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    for name in ("unigram", "empty", "full"):
        (tmp_path / name).mkdir()
    backend.save(str(tmp_path / "unigram" / "tokenizer.json"))
    for name in ("unigram", "empty", "full"):
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    (tmp_path / "controls").write_text("a")
    (tmp_path / "controls.txt").write_text("ดี\nไม่ดี\x07")
    (tmp_path / "english.txt").write_text("Only English here.")
    given: dict[str, Any] = {"base": base, "corpus": corpus, "dst": tmp_path / "out", "--size": 130, "--language": "th"}
    for key, value in changes.items():
        path = tmp_path / (f"{value}.txt" if key in ("corpus", "--held-out", "--english") else f"{value}")
        given[key] = path if key in ("base", "corpus", "dst", "--held-out", "--english") else value
    options = [part for key, value in given.items() if key.startswith("--") for part in (key, value)]
    before = sorted(tmp_path.rglob("*"))
    code, printed = command("expand", given["base"], given["corpus"], given["dst"], *options)
    assert code == 2 and said in printed
    assert printed.count("\n") == 1 and printed.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_force_replaces(tmp_path: Path, command: Command, base: Path, corpus: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("old", "tokenizer.json"):
        (tmp_path / "out" / name).write_text("")
    options = ("--size", 130, "--language", "th", "--force")
    assert command("expand", base, corpus, tmp_path / "out", *options)[0] == 0
    assert not (tmp_path / "out" / "old").exists() and (tmp_path / "out" / "tokenizer.json").stat().st_size
    code, printed = command("expand", tmp_path / "out", corpus, tmp_path / "out", *options)
    assert code == 2 and "which is read" in printed


# --- report ---------------------------------------------------------------------------------------------------------


def test_report_beside_the_base(tmp_path: Path, command: Command, base: Path, corpus: Path) -> None:
    assert command("expand", base, corpus, tmp_path / "out", "--size", 130, "--language", "th")[0] == 0
    code, printed = command("report", tmp_path / "out", HELD_OUT, ENGLISH)
    assert code == 0 and f"compared with {base}, which" in printed
    texts = [text.strip() for text in HELD_OUT.read_text(encoding="utf-8").split("\n\n")]
    before, after = costs([Tokenizer.load(base), Tokenizer.load(tmp_path / "out")], texts)
    lines = [line.split() for line in printed.splitlines() if line.endswith("%")]
    assert [line[-6:] for line in lines[:2]] == [
        [
            name.name,
            f"{cost.tokens:,}",
            f"{cost.per_character:.3f}",
            f"{cost.per_byte:.3f}",
            f"{cost.per_word:.2f}",
            share,
        ]
        for name, cost, share in (
            (base, before, "100%"),
            (tmp_path / "out", after, f"{after.tokens / before.tokens:.0%}"),
        )
    ]
    assert [line[-1] for line in lines[2:]] == ["100%", "100%"]  # English
    code, printed = command("report", base, HELD_OUT, "--compare", tmp_path / "out")
    assert code == 0 and [line.split()[-6:] for line in printed.splitlines() if line.endswith("%")] == [
        line[-6:] for line in lines[:2]
    ]


def test_a_curve_in_a_table_and_a_picture(tmp_path: Path, command: Command, base: Path, corpus: Path) -> None:
    out = tmp_path / "curve.png"
    options = ("--curve", "120, 60", "--corpus", corpus, "--language", "th", "--out", out)
    code, printed = command("report", base, HELD_OUT, *options)
    assert code == 0
    tokens = [int(numbers(printed, row)[-5].replace(",", "")) for row in (str(base), "+60", "+120")]
    assert tokens[0] > tokens[1] > tokens[2] and tokens[0] > 2 * tokens[2]
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 400 and picture.shape[1] > 1000 and 0 < (picture[..., :3] < 0.9).any(-1).mean() < 0.2
    # The last point is what expand makes of the same size.
    assert command("expand", base, corpus, tmp_path / "out", "--size", 120, "--language", "th")[0] == 0
    _, printed = command("report", tmp_path / "out", HELD_OUT)
    assert numbers(printed, str(tmp_path / "out"))[-5] == f"{tokens[2]:,}"
    assert command("report", base, HELD_OUT, *options)[0] == 2
    assert command("report", base, HELD_OUT, *options, "--force")[0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--curve", "10"], "give --language and --corpus, too"),
        (["--language", "th"], "what --curve learns from"),
        (["--curve", "10,x", "--corpus", "FILE", "--language", "th"], "'x' is not a number of tokens"),
        (["--curve", "0", "--corpus", "FILE", "--language", "th"], "'0' is not a number of tokens"),
        (["--out", "a.jpg"], ".png, .svg, .pdf"),
        (["--out", "none/a.png"], "is not a directory"),
        (["--base", "nowhere/"], "does not exist"),
    ],
)
def test_bad_input_of_report(command: Command, base: Path, corpus: Path, options: list[str], said: str) -> None:
    code, printed = command("report", base, HELD_OUT, *[str(corpus) if part == "FILE" else part for part in options])
    assert code == 2 and said in printed and printed.count("\n") == 1


def test_files_to_measure_on_are_checked(tmp_path: Path, command: Command, base: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff")
    for path, said in ((tmp_path / "bad.txt", "bad.txt:2 is not UTF-8"), (tmp_path / "none", "no file matches")):
        code, printed = command("report", base, path)
        assert code == 2 and said in printed


# --- the parts ------------------------------------------------------------------------------------------------------


def test_costs_are_counts(base: Path) -> None:
    tokenizer = Tokenizer.load(base)
    texts = ["ab ภา\u00a0x", "", "<|im_end|> two\nlines"] * 200  # several batches
    (found,) = costs([tokenizer], texts)
    ids = sum(len(tokenizer.encode(text, specials=False)) for text in texts)
    assert found == TokenCost(ids, 200 * (7 + 20), 200 * (7 + 5 + 20), 200 * (3 + 3))
    assert (found.per_character, found.per_byte, found.per_word) == (ids / 5400, ids / 6400, ids / 1200)


def test_a_cut_word_shows_whole_characters_and_counts_tokens(base: Path) -> None:
    tokenizer = Tokenizer.load(base)
    word = "ญี่ปุ่น"
    shown, count = cut(tokenizer, word).rsplit(" ", 1)
    assert shown.replace("|", "") == word and count == f"({len(tokenizer.encode(word))})"
    assert "\ufffd" not in shown and shown.count("|") >= 3


def test_example_words_are_frequent_and_of_the_script() -> None:
    texts = ["ภาษา ภาษา ไทย! English ก ประเทศ"] * 3 + ["ประเทศ " * 9, "ย" * 30]
    assert example_words(script_of("th"), texts, 9) == ["ประเทศ", "ภาษา"]
    assert example_words(script_of("th"), texts, 1) == ["ประเทศ"]


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 MB", "2GiB", "7")] == [5 * 10**9, 1500000, 2**31, 7]
    with pytest.raises(UserError):
        parse_size("0KB")


def test_a_run_is_opened_by_its_vocabulary(tmp_path: Path, base: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    build_tiny_tokenizer(tmp_path / "base")
    assert open_tokenizer(str(tmp_path), tmp_path / "s").directory == tmp_path / "base"
    build_tiny_tokenizer(tmp_path / "vocabulary")
    assert open_tokenizer(str(tmp_path), tmp_path / "s").directory == tmp_path / "vocabulary"
