"""Bad input in a run that has begun: exit code 2, one line with what, where and how to fix it, and nothing lost.

Each test runs the command as a user would, on the directory of a run whose first stages are done, or on a copy of it.
The files of the stages that are done must stay unchanged.
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import EXAMPLES, Command, call
from refusals import Refused, changed, contents, refusing, says, small_run, write

from transllm_jax import disk
from transllm_jax.config import load_config
from transllm_jax.data.read.files import Place
from transllm_jax.errors import UserError
from transllm_jax.generation.translate import translation_prompt
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import recover
from transllm_jax.stages.run import Run
from transllm_jax.training.record.metrics import read_rows

THAI = "วันนี้ฝนตกที่บ้านของเรา"


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusing(capfd)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    """The config file of a run that has not begun."""
    return write(tmp_path / "config.yaml", small_run(tiny_model, tmp_path / "run"))


def run_until(stage: str, config: Path, workdir: Path, *options: str) -> None:
    """Runs the stages up to this one."""
    assert call("run", config, "--workdir", workdir, "--until", stage, *options) == 0


@pytest.fixture(scope="module")
def imported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory after `base` and its evaluation, with its config.yaml in it."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    workdir.mkdir()
    run_until("base", write(workdir / "config.yaml", small_run(tiny_model, workdir)), workdir)
    return workdir


@pytest.fixture(scope="module")
def expanded(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory after `vocabulary` and its evaluation."""
    workdir = tmp_path_factory.mktemp("expanded") / "run"
    shutil.copytree(imported, workdir)
    run_until("vocabulary", workdir / "config.yaml", workdir)
    return workdir


@pytest.fixture
def begun(imported: Path, tmp_path: Path) -> Path:
    """A copy of `imported` that a test may damage."""
    return Path(shutil.copytree(imported, tmp_path / "begun"))


@pytest.mark.parametrize("option", ["--until", "--force"])
def test_no_such_stage(refused: Refused, imported: Path, option: str) -> None:
    before = contents(imported)
    message = refused("run", imported / "config.yaml", option, "pretrian")
    says(message, f"{option} pretrian: no such stage", "the stages are base,", "pretrain")
    assert not changed(before, imported)


TEXT, PAIRS = "pretrain.sources=[{path: FILE}]", "translate.sources=[{path: FILE, format: pairs}]"
RECORDS = "recover.instructions=FILE"


@pytest.mark.parametrize(
    ("override", "name", "content", "words"),
    [
        # Text of stage `pretrain`, which runs after `vocabulary` and its evaluation.
        (TEXT, "a.txt", b"", ("a.txt is empty", "leave it out")),
        (TEXT, "a.txt", b"\n \n", ("a.txt has no documents",)),
        (TEXT, "a.txt", b"one\ntw\xe9\n", ("a.txt:2 is not UTF-8", "offset 6", "save it")),
        (TEXT, "a.txt", b"one\n\ntw\x07o\n", ("a.txt:3", "U+0007 at column 3", "remove")),
        (TEXT, "a.txt", b"one\r\n", ("a.txt:1 has a carriage return", "Unix line ends")),
        (TEXT, "a.txt", b"one\ntwo <TH> three\n", ("a.txt:2", "<TH>", "remove it")),
        (TEXT, "a.txt", b"one <|im_end|>\n", ("a.txt:1", "<|im_end|>", "remove it")),
        (TEXT, "a.txt.gz", b"no gzip", ("a.txt.gz:1 cannot be decompressed", "again")),
        ("vocabulary.corpus=[{path: FILE}]", "a.txt", b"one <EN> two" * 20, ("a.txt:1", "<EN>", "remove it")),
        # Pairs of stages `translate` and `transfer`.
        (PAIRS, "a.tsv", b"a\tb\nc\t \n", ("a.tsv:2", "empty", "fill it")),
        (PAIRS, "a.tsv", b"a\tb\nc\td\te\n", ("a.tsv:2 has 2 tabs", "one tab")),
        ("transfer.pairs={path: FILE, format: pairs}", "a.tsv", b"a\tb\nc <RESPONSE>\td\n", ("a.tsv:2", "<RESPONSE>")),
        ("transfer.pairs={path: FILE, format: pairs}", "a.tsv", b"no tab\n", ("a.tsv:1 has 0 tabs", "one tab")),
        # Records of stage `recover`.
        (RECORDS, "a.jsonl", b'{"instruction": "a"}\n{"instr', ("a.jsonl:2 is not JSON", "a line")),
        (RECORDS, "a.jsonl", b'{"question": "a"}\n', ("a.jsonl:1 has no field 'instruction'", "add")),
        (RECORDS, "a.jsonl", b'{"instruction": " "}\n', ("a.jsonl:1", "'instruction' is empty")),
        (RECORDS, "a.jsonl", b'{"instruction": "a", "input": 3}', ("a.jsonl:1: field 'input'", "3")),
        (RECORDS, "a.jsonl", b'{"instruction": "say <EN>"}\n', ("a.jsonl:1", "<EN>", "remove it")),
        # Fields that would change the answer, and that a chain cannot hold.
        (
            RECORDS,
            "a.jsonl",
            b'{"instruction": "a", "system": ""}\n{"instruction": "a", "system": "Speak like a pirate."}\n',
            ("a.jsonl:2: field 'system' is not read", "Speak like a pirate", "put its text into 'instruction'"),
        ),
        (
            RECORDS,
            "a.jsonl",
            b'{"instruction": "a", "history": []}\n{"instruction": "b", "history": [["a", "b"]]}\n',
            ("a.jsonl:2: field 'history' is not read",),
        ),
        (RECORDS, "a.jsonl", b'{"instruction": "a", "context": "b"}\n', ("field 'context' is not read", "'input'")),
        (
            "recover.translate_instructions={file: FILE, missing: error}",
            "a.jsonl",
            b'{"source": "Hello.", "target": "x"}\n',
            ("a.jsonl: no translation of 6 instructions, the first", "recover.translate_instructions.missing"),
        ),
        (
            "recover.translate_answers={file: FILE}",
            "a.jsonl",
            b'{"source": "a", "target": "b"}\n{"source": "a", "target": "c"}\n',
            ("a.jsonl:2: 'a' has another translation above", "remove one"),
        ),
        (
            "recover.translate_answers={file: FILE}",
            "a.jsonl",
            b'{"source": "a", "target": "<TH>b"}\n',
            ("a.jsonl:1", "<TH>", "remove it"),
        ),
    ],
)
def test_bad_text_is_found_before_the_next_stage_runs(
    refused: Refused, begun: Path, tmp_path: Path, override: str, name: str, content: bytes, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    before = contents(begun)
    override = override.replace("FILE", str(tmp_path / name))
    says(refused("run", begun / "config.yaml", "--workdir", begun, override), *words)
    assert not changed(before, begun)
    assert not (begun / "vocabulary").exists()


def test_a_corpus_that_cannot_give_the_vocabulary(refused: Refused, begun: Path) -> None:
    before = contents(begun)
    command = ("run", begun / "config.yaml", "--workdir", begun, "--until", "vocabulary")
    english = f"vocabulary.corpus=[{{path: {EXAMPLES / 'english.train.txt'}}}]"
    says(refused(*command, english), "vocabulary: the corpus has no Thai characters", "give Thai text")
    says(refused(*command, "vocabulary.size=9000"), "the corpus supports", "new tokens, not 9,000", "at most that many")
    says(refused(*command, "vocabulary.size=3"), "3 new tokens are too few", "ask for at least 103")
    assert not changed(before, begun)


def test_a_marker_that_is_already_a_token(refused: Refused, begun: Path) -> None:
    command = ("run", begun / "config.yaml", "--workdir", begun)
    # The evaluation of `base` was made with other markers, so it has to be redone; the check comes first.
    message = refused(*command, "markers.response=<|im_start|>", "--force", "evaluation/base")
    says(message, "markers", "has the token <|im_start|> already", "choose another")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.length=1024", ("pretrain.length is 1024", "the model's context is 512", "lower pretrain.length")),
        ("translate.length=513", ("translate.length is 513", "lower translate.length")),
        ("transfer.length=2048", ("transfer.length is 2048", "lower transfer.length")),
        ("recover.max_new_tokens=300", ("recover.max_new_tokens is 300", "context of 512", "at most 254")),
    ],
)
def test_longer_than_the_models_context(refused: Refused, begun: Path, override: str, words: tuple[str, ...]) -> None:
    before = contents(begun)
    says(refused("run", begun / "config.yaml", "--workdir", begun, override), *words)
    assert not changed(before, begun) and not (begun / "vocabulary").exists()


def test_an_instruction_longer_than_the_models_context(refused: Refused, begun: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "Say hello."}, {"instruction": "Read this.", "input": "hello there " * 200}]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = (f"recover.instructions={path}", "recover.translate_instructions={}")
    message = refused("run", begun / "config.yaml", "--workdir", begun, *overrides)
    says(message, "long.jsonl:2: a prompt of", "recover.max_new_tokens 6", "shorten the text")


def test_a_text_too_long_for_its_translation(expanded: Path) -> None:
    run = Run(load_config(expanded / "config.yaml"), expanded, Progress(quiet=True), Interrupt())
    text, place = "Read this, " * 20, Place("a.jsonl", 7)
    needed = len(translation_prompt(run.models.tokenizer("vocabulary"), run.markers, text, "to_target"))
    room = run.models.config.context - needed
    run.models.check_room([(text, place)], "recover.max_new_tokens", room, chat=False)
    with pytest.raises(UserError, match=rf"a.jsonl:7: a prompt of {needed} tokens and recover.max_new_tokens"):
        run.models.check_room([(text, place)], "recover.max_new_tokens", room + 1, chat=False)


def test_a_length_too_short_for_any_chain(refused: Refused, begun: Path) -> None:
    message = refused("run", begun / "config.yaml", "--workdir", begun, "transfer.length=16")
    says(message, "transfer.length is 16", "the shortest chain has", "raise transfer.length")


def test_instructions_and_pairs_that_are_all_held_out(refused: Refused, begun: Path, tmp_path: Path) -> None:
    held = [json.loads(line) for line in (EXAMPLES / "instructions.heldout.jsonl").open(encoding="utf-8")]
    records, pairs = tmp_path / "all.jsonl", tmp_path / "all.tsv"
    records.write_text(json.dumps({"instruction": held[0]["instruction"] + " "}) + "\n", encoding="utf-8")
    pairs.write_text(f"{held[0]['instruction']}\t{held[0]['translation']}\n", encoding="utf-8")
    command = ("run", begun / "config.yaml", "--workdir", begun)
    message = refused(*command, f"recover.instructions={records}", "recover.translate_instructions={}")
    says(message, "all.jsonl: all of it holds evaluation texts", "recover.contamination")
    message = refused(*command, f"transfer.pairs={{path: {pairs}, format: pairs}}")
    says(message, "all.tsv: all of it holds evaluation texts", "transfer.contamination")


def test_a_file_of_translations_of_other_instructions(refused: Refused, begun: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"source": "Something else.", "target": "x"}\n', encoding="utf-8")
    drop = f"recover.translate_instructions={{file: {other}, missing: drop}}"
    message = refused("run", begun / "config.yaml", "--workdir", begun, drop)
    says(message, "other.jsonl: it has no translation of any of the instructions", "missing to model")


def test_two_runs_on_one_work_directory(refused: Refused, begun: Path) -> None:
    before = contents(begun)
    with disk.locked(begun):
        message = refused("run", begun / "config.yaml", "--workdir", begun)
    says(message, f"{begun}: another run is at work here", "wait for it or stop it")
    assert not changed(before, begun)


def test_a_changed_key_is_named(refused: Refused, expanded: Path) -> None:
    before = contents(expanded)
    command = ("run", expanded / "config.yaml", "--workdir", expanded)
    message = refused(*command, "vocabulary.size=150")
    says(
        message,
        "vocabulary was made with other inputs",
        "vocabulary.size (140 -> 150)",
        "run.yaml has them",
        "--force vocabulary",
    )
    says(
        refused(*command, "model.dtype=bfloat16"),
        "base was made with other inputs",
        "model.dtype (float32 -> bfloat16)",
    )
    says(refused(*command, "language.name=Siamese"), "language.name (Thai -> Siamese)")
    says(refused(*command, "lora.rank=8"), "lora.rank (4 -> 8)")
    assert not changed(before, expanded)


def test_a_changed_file_is_named(refused: Refused, expanded: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((expanded / "config.yaml").read_text(encoding="utf-8"))
    workdir = Path(shutil.copytree(expanded, tmp_path / "run"))
    manifest = workdir / "vocabulary" / "manifest.json"
    made = json.loads(manifest.read_text(encoding="utf-8"))
    (name,) = [key for key in made["inputs"] if key.startswith("file ")]
    made["inputs"][name] = "0" * 64
    manifest.write_text(json.dumps(made), encoding="utf-8")
    message = refused("run", write(tmp_path / "config.yaml", config), "--workdir", workdir)
    says(message, "vocabulary was made with other inputs", "text.train.txt (000000000000…", "--force vocabulary")


def test_force_removes_nothing_when_the_run_is_refused(refused: Refused, expanded: Path) -> None:
    before = contents(expanded)
    command = ("run", expanded / "config.yaml", "--workdir", expanded, "--force")
    # The changed key belongs to another stage, which this --force does not redo.
    says(refused(*command, "evaluation/base", "vocabulary.size=150"), "vocabulary.size (140 -> 150)")
    says(refused(*command, "vocabulary", "evaluation.max_pairs=2"), "evaluation.max_pairs (1 -> 2)")
    assert not changed(before, expanded)


def test_a_damaged_manifest(refused: Refused, begun: Path) -> None:
    (begun / "base" / "manifest.json").write_text("{", encoding="utf-8")
    for command in (("status", begun), ("run", begun / "config.yaml", "--workdir", begun), ("chat", begun, "Hi")):
        says(refused(*command), "base/manifest.json is damaged", "--force")
    # What the message advises helps.
    run_until("base", begun / "config.yaml", begun, "--force", "base")
    assert json.loads((begun / "base" / "manifest.json").read_text(encoding="utf-8"))["state"] == "done"


def test_losses_that_are_not_finite(refused: Refused, expanded: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(expanded, tmp_path / "run"))
    before = contents(workdir)
    command = ("run", workdir / "config.yaml", "--workdir", workdir, "--until", "pretrain")
    wild = ("pretrain.learning_rate=1e30", "pretrain.checkpoint_every=2", "pretrain.warmup_ratio=0")
    stop = ("pretrain.max_skipped=2",)
    message = refused(*command, *wild, *stop, code=1)
    says(message, "not finite in 2 steps in a row, up to step 3", "lower pretrain.learning_rate", "stay as they are")
    assert not changed(before, workdir)
    rows = read_rows(workdir / "pretrain" / "metrics.jsonl")
    assert [row["loss"] is None for row in rows] == [False, True, True]
    skipped = read_rows(workdir / "pretrain" / "skipped.jsonl")
    assert [row["step"] for row in skipped] == [2, 3] and "text.train.txt:" in skipped[0]["rows"][0]
    assert [path.name for path in (workdir / "pretrain" / "checkpoints").iterdir()] == ["2"]
    # The same command continues from the checkpoint and ends the same way; another rate needs the stage redone.
    assert refused(*command, *wild, *stop, code=1).splitlines()[-1] == message.splitlines()[-1]
    message = refused(*command, *wild[1:])
    says(message, "pretrain.learning_rate (1e+30 -> 0.01)", "--force pretrain")


def test_an_answer_without_a_translation(expanded: Path, tmp_path: Path) -> None:
    """Found only after the original model has answered; its answers are kept."""
    workdir = Path(shutil.copytree(expanded, tmp_path / "run"))
    (tmp_path / "none.jsonl").write_text(json.dumps({"source": "a", "target": "b"}) + "\n", encoding="utf-8")
    overrides = [f"recover.translate_answers={{file: {tmp_path / 'none.jsonl'}, missing: error}}"]
    settings = load_config(workdir / "config.yaml", overrides)
    run = Run(settings, workdir, Progress(quiet=True), Interrupt())
    (workdir / "recover").mkdir()
    with pytest.raises(UserError, match=r"none\.jsonl: no translation of \d answers, .*translate_answers\.missing"):
        recover.run_stage(run, workdir / "recover")
    assert len(read_rows(workdir / "recover" / "answers.jsonl")) == 6


def test_a_full_disk(refused: Refused, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(begun / "vocabulary"))

    before = contents(begun)
    monkeypatch.setattr("transllm_jax.stages.vocabulary.save_arrays", full)
    message = refused("run", begun / "config.yaml", "--workdir", begun, "--until", "vocabulary")
    says(message, f"the disk is full at {begun / 'vocabulary'}", "free some space and run the same command again")
    assert not changed(before, begun) and not (begun / "vocabulary" / "manifest.json").exists()


def test_a_second_interrupt_ends_the_run_with_75(
    begun: Path, transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transllm_jax.stages.vocabulary.save_arrays", stop)
    code, printed = transllm("run", begun / "config.yaml", "--workdir", begun)
    assert code == 75 and "run the same command again to go on" in printed


def test_chat_with_a_run_without_a_finished_stage(refused: Refused, begun: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(begun / "run.yaml", empty)
    for option in ((), ("--base",)):
        says(refused("chat", empty, "Hi", *option), "no stage is done yet", "run `transllm run` first")


def test_chat_with_a_run_before_its_last_stage_says_so(expanded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for option, said in (((), "the model after vocabulary, which has learned no chains yet"), (("--base",), "")):
        assert call("chat", expanded, "Hi", "--max-new-tokens", "2", *option) == 0
        assert (said in capfd.readouterr().err) if said else ("chains" not in capfd.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], ("the question is empty", "ask something")),
        (["  \n"], ("the question is empty",)),
        (["Say <|im_end|> now"], ("the special token <|im_end|>", "in another way")),
        (["caf\udce9"], ("the question is not UTF-8", "locale")),
        (["Hi", "--temperature", "-1"], ("temperature -1.0 must be at least 0",)),
        (["Hi", "--top-p", "0"], ("top_p 0.0 in (0, 1]",)),
        (
            ["Hi", "--max-new-tokens", "5000"],
            ("5000 new ones exceed the model's context", "lower"),
        ),
        (["hello there " * 200], ("exceed the model's context of 512", "shorten the prompt")),
    ],
)
def test_chat_refuses_a_question_or_an_option(
    refused: Refused, imported: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    says(refused("chat", imported, *arguments), *words)


def test_chat_refuses_a_marker_in_a_question(refused: Refused, expanded: Path) -> None:
    says(refused("chat", expanded, f"<TH>{THAI}"), "the special token <TH>", "in another way")
