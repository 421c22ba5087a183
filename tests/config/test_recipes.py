"""The configs of the project: what their paths name is said where it comes from, and their first stage runs.

A public data set is replaced by tiny files of its format, at the paths that the page's commands give it.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command, random_weights, tiny_config
from pydantic import TypeAdapter
from tiny_sentencepiece import TEMPLATE, TEXT, build_tiny_sentencepiece

from transllm_jax.config import Config, Source, load_config
from transllm_jax.conversion.hf.directory import write_model
from transllm_jax.data.read.sources import read_documents, read_jsonl, read_pairs
from transllm_jax.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
THAI = ROOT / "examples" / "thai"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = [ROOT / "docs" / name for name in ("data-thai.md", "data-languages.md")]

DOCUMENTS: list[str] = read_documents(THAI / "text.train.txt")
ENGLISH: list[str] = read_documents(THAI / "english.train.txt")
PAIRS: list[tuple[str, str]] = read_pairs(THAI / "pairs.train.tsv")
HELD_OUT: list[tuple[str, str]] = read_pairs(THAI / "pairs.heldout.tsv")
INSTRUCTIONS: list[dict[str, Any]] = read_jsonl(THAI / "instructions.train.jsonl")
CHATS: list[dict[str, Any]] = read_jsonl(THAI / "instructions.heldout.jsonl")


# --- tiny files of the data sets' formats ---------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def wikipedia(documents: list[str]) -> Callable[[Path], None]:
    rows = [{"id": str(n), "url": f"https://x/{n}", "title": "x", "text": text} for n, text in enumerate(documents)]
    return lambda path: parquet(path, rows)


def fineweb(path: Path) -> None:
    rows = [
        {"text": text, "id": f"<urn:{n}>", "dump": "CC", "language_score": 0.9, "minhash_cluster_size": 1}
        for n, text in enumerate(DOCUMENTS)
    ]
    # Nobody has looked through the web: an empty page, a control character, and what LLaMA-2 ends an answer with.
    bad = [{**rows[0], "text": text} for text in (" ", f"{DOCUMENTS[0]}\r\x9f", f"{DOCUMENTS[1]}</s>")]
    parquet(path, [*bad, *rows])


def scb(path: Path) -> None:
    parquet(path, [{"subdataset": "x", "translation": {"en": english, "th": thai}} for english, thai in PAIRS])


def c4(path: Path) -> None:
    rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://x"} for text in ENGLISH]
    path.write_bytes(gzip.compress(jsonl(rows)))


def social(path: Path) -> None:
    path.write_text("".join(f"{thai} \u200b555\r\n" for _, thai in PAIRS), encoding="utf-8")


def instructions(path: Path) -> None:
    path.write_bytes(jsonl([{"instruction": row["instruction"], "input": ""} for row in INSTRUCTIONS]))


def held_out(first: int, last: int) -> Callable[[Path], None]:
    lines = "".join(f"{english}\t{thai}\n" for english, thai in HELD_OUT[first:last])
    return lambda path: (path.write_text(lines, encoding="utf-8"), None)[1]


def chats(*names: str) -> Callable[[Path], None]:
    """Instructions in TransLLM's tables: each field of `names` is there in English, and with _th in Thai."""
    rows = [
        {"Unnamed: 0": n, "Instruct_id": n}
        | {key: row[field] for name in names for key, field in ((name, "instruction"), (f"{name}_th", "translation"))}
        for n, row in enumerate(CHATS)
    ]
    return lambda path: (path.write_bytes(jsonl(rows)), None)[1]


# Where the commands of docs/data-thai.md put the files of each data set, and a tiny one of its format.
FILES: dict[str, Callable[[Path], None]] = {
    "data/wikipedia/20231101.th/train-00000-of-00001.parquet": wikipedia(DOCUMENTS),
    "data/wikipedia/20231101.simple/train-00000-of-00001.parquet": wikipedia(ENGLISH),
    "data/fineweb-2/data/tha_Thai/train/000_00000.parquet": fineweb,
    "data/fineweb-2/data/tha_Thai/train/000_00001.parquet": fineweb,
    "data/scb/data/train-00000-of-00001.parquet": scb,
    "data/scb/data/test-00000-of-00001.parquet": scb,
    "data/c4/en/c4-train.00000-of-01024.json.gz": c4,
    "data/social/neg.txt": social,
    "data/social/q.txt": social,
    "data/instructions/dolly.jsonl": instructions,
    "data/instructions/alpaca.jsonl": instructions,
    "data/evaluation/pud.en-th.tsv": held_out(0, 20),
    "data/evaluation/ntrex.en-th.tsv": held_out(20, 40),
    "data/evaluation/alpaca_eval.en-th.jsonl": chats("instruction"),
    "data/evaluation/mt_bench.en-th.jsonl": chats("instruction1", "instruction2"),
}


def write_llama2(directory: Path) -> None:
    """A chat model with LLaMA-2's kind of tokenizer, as tokenizer.model alone, and its template."""
    tokenizer = build_tiny_sentencepiece(directory.with_name("tokenizer"), text=[*TEXT, "[INST] [/INST]"])
    shape = tiny_config(Tokenizer.load(tokenizer).vocab_size, tied=False)
    write_model(directory, shape, random_weights(shape), extra_config={"bos_token_id": 1, "eos_token_id": 2})
    shutil.copy(tokenizer / "tokenizer.model", directory)
    described = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps({**described, "chat_template": TEMPLATE}))


# What makes any of the configs small enough for a test.
SMALL = [
    "model.sha256=null",
    "model.shape=null",
    "model.dtype=float32",
    "vocabulary.size=240",
    "lora.rank=4",
    *(
        f"{stage}.{key}"
        for stage in ("pretrain", "translate", "transfer")
        for key in ("epochs=null", "steps=2", "batch_size=2", "accumulate=1", "length=192", "remat=none")
    ),
    "recover.max_new_tokens=6",
    "recover.batch_size=4",
    *(f"evaluation.{key}=2" for key in ("max_documents", "max_pairs", "max_chats", "batch_size")),
    "evaluation.length=64",
    "evaluation.max_new_tokens=6",
    "evaluation.max_chain_tokens=8",
]


def paths_of(config: Config) -> set[str]:
    """The files, globs and directories that a config names."""

    def found(tree: Any, key: str = "") -> Iterator[str]:
        if isinstance(tree, dict):
            for name, value in tree.items():
                yield from found(value, name)
        elif isinstance(tree, list | tuple):
            for value in tree:
                yield from found(value, key)
        elif key in ("path", "target_path", "file", "pairs", "instructions", "shape", "tokenizer", "adapter") and tree:
            yield tree

    paths = set(found(config.model_dump(exclude={"workdir"})))
    return paths if re.match(r"pypi:|[\w-]+/[\w.-]+$", config.model.source) else paths | {config.model.source}


def in_repository(path: str) -> bool:
    return bool(list(ROOT.glob(path))) and not path.startswith("data/")


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_path_of_a_config_is_here_or_said_where_it_comes_from(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines[: lines.index(next(one for one in lines if not one.startswith("#")))])
    page = PAGES[0].read_text(encoding="utf-8")
    for named in paths_of(load_config(path)):
        assert not Path(named).is_absolute() and ".." not in Path(named).parts, named
        if in_repository(named):
            continue
        # The header names the directory, or the file; the page's commands and its entries of configs name the files.
        places = [named, *(f"{parent}/" for parent in Path(named).parents if str(parent) not in (".", "data"))]
        assert any(f"#   {place} " in header for place in (*places, f"{named}/")), f"{named} is not in the header"
        if named.startswith("data/"):
            assert named in page, f"{named} is not in {PAGES[0].name}"
            assert any(fnmatch(file, named) for file in FILES), f"{named} matches no file of the data sets"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_entries_of_configs_on_a_page_are_ones(page: Path) -> None:
    found = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    assert found
    for text in found:
        entry = yaml.safe_load(text)
        if set(entry) == {"sources"}:
            TypeAdapter(list[Source]).validate_python(entry["sources"])
        else:
            Config.model_validate({**demo, **{key: {**demo[key], **value} for key, value in entry.items()}})


# --- the first stage ------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Config, list[str]]:
    """A config in a directory that has its files; the config, and the arguments of a small run of it."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, write in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    path: Path = request.param
    config, changes = load_config(path), list(SMALL)
    if config.model.source.startswith("llama-2"):
        write_llama2(Path(config.model.source))
    else:
        changes.append(f"model.source={tiny_model}")
    return config, [f"configs/{path.name}", *changes]


each_config = pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem, indirect=True)


@pytest.mark.slow
@each_config
def test_a_config_runs_to_its_first_stage(recipe: tuple[Config, list[str]], transllm: Command) -> None:
    config, arguments = recipe
    code, printed = transllm("run", *arguments, "--until", "vocabulary")
    assert code == 0, printed
    report = json.loads((Path(config.workdir) / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert report["new_tokens"] == 240 and report["never_produced"] == 0
    assert report["table"]["new_rows"] % config.vocabulary.pad_to_multiple_of == 0


@pytest.mark.slow
@pytest.mark.full
@each_config
def test_a_dry_run_reads_all_files_of_a_config(recipe: tuple[Config, list[str]], transllm: Command) -> None:
    _, arguments = recipe
    code, printed = transllm("run", *arguments, "--dry-run")
    assert code == 0, printed
    for stage in ("pretrain", "translate", "transfer"):
        assert f"\n{stage}\n" in printed
