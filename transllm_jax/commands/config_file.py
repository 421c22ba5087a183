"""The config that `transllm init` writes, from a template, and the texts beside it, held out for the evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from transllm_jax.commands.given_data import HeldOutTexts, Looked
from transllm_jax.commands.given_model import GivenModel
from transllm_jax.commands.sizes import Sizes
from transllm_jax.config.load import parse_config
from transllm_jax.config.marks import MARK, escaped
from transllm_jax.disk import write_text
from transllm_jax.tokenizer.scripts import Script

TEXT, PAIRS, QUESTIONS = "text.txt", "pairs.tsv", "questions.jsonl"


@dataclass(frozen=True)
class Contents:
    """What a config is written from.

    language: its code; script: what is known of it. english: English text for stage 3, if there is any. instructions:
    their file; None if it is not given. translated: whether they have translations. missing: the options that were not
    given.
    """

    language: str
    script: Script
    model: GivenModel
    text: Sequence[Looked]
    pairs: Sequence[Looked]
    english: Looked | None
    instructions: str | None
    translated: bool
    sizes: Sizes
    held: HeldOutTexts
    missing: Sequence[str]


def write_config(path: Path, directory: Path, of: Contents) -> dict[str, Any]:
    """Write the held-out texts into `directory`, then the config `path`; returns its tree with the marks."""
    contents = {
        TEXT: "\n\n".join(_as_paragraph(document) for document in of.held.documents),
        PAIRS: "\n".join("\t".join(_as_line(side) for side in pair) for pair in of.held.pairs),
        QUESTIONS: "\n".join(
            json.dumps({"instruction": english, "translation": target}, ensure_ascii=False)
            for english, target in of.held.questions
        ),
    }
    where = {name: str(directory / name) if content else MARK for name, content in contents.items()}
    sources = [source.entry for source in of.text] or [{"path": MARK}]
    pair_sources = [source.entry for source in of.pairs] or [{"path": MARK, "format": "pairs"}]
    values: dict[str, Any] = {
        "path": path,
        "mark": MARK,
        "title": f"{_name_of(of.model.source)} to {of.script.language}",
        "workdir": f"runs/{path.stem}",
        "language": of.language,
        "language_name": of.script.language,
        "model": of.model.source,
        "model_note": of.model.note,
        "text": sources,
        "pairs": pair_sources,
        "translated_from": _mixture(of.pairs, of.text, of.english, of.sizes.pair_tokens),
        "instructions": of.instructions or MARK,
        "translated": of.translated,
        "sizes": of.sizes,
        "held_out": {"text": where[TEXT], "pairs": where[PAIRS], "questions": where[QUESTIONS]},
        "missing": of.missing,
    }
    rendered = _render(values)
    tree = parse_config(rendered, path).model_dump(mode="json")
    for name, content in contents.items():
        if content:
            write_text(directory / name, content + "\n")
    write_text(path, rendered)
    return tree


def _mixture(
    pairs: Sequence[Looked], text: Sequence[Looked], english: Looked | None, pair_tokens: int
) -> list[dict[str, Any]]:
    """The sources of stage translate with their weights: pairs, and some text of both languages.

    Text has a budget of tokens, a bit below its share: the pairs decide how long an epoch is.
    """
    shares = {0.7: pairs, 0.2 if english else 0.3: text, 0.1: [english] if english else []}
    entries = []
    for share, sources in shares.items():
        total = sum(source.bytes for source in sources)
        for source in sources:
            part = share * source.bytes / max(1, total)
            entry = source.entry | {"weight": max(0.01, round(part, 2))}
            if share < 0.7:
                entry["tokens"] = max(1000, int(0.8 * pair_tokens * part / 0.7))
            entries.append(entry)
        if not sources and share != 0.1:
            mark = {"path": MARK, "format": "pairs"} if share == 0.7 else {"path": MARK, "tokens": pair_tokens // 4}
            entries.append(mark | {"weight": share})
    return entries


def _render(values: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"json": _json, "flow": _flow}
    environment.globals["training"] = _training
    template = files("transllm_jax.commands").joinpath("templates/config.yaml.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def _training(stage: Any, comment: str) -> str:
    """The keys of a training stage."""
    remark = f"  # {comment}" if comment else ""
    lines = [f"epochs: {stage.epochs}", f"batch_size: {stage.batch_size}{remark}", f"length: {stage.length}"]
    if stage.accumulate > 1:
        lines.insert(
            2, f"accumulate: {stage.accumulate}  # micro-batches; `transllm preflight --search` finds what fits"
        )
    if stage.remat != "none":
        lines.append(f"remat: {stage.remat}")
    lines += [f"learning_rate: {stage.learning_rate}", "warmup_ratio: 0.05", "checkpoint_every: 100"]
    return "\n".join(f"  {line}" for line in lines)


def _json(value: Any) -> str:
    """A value as JSON, which a config reads as it is."""
    return escaped(json.dumps(value, ensure_ascii=False))


def _flow(entry: Mapping[str, Any]) -> str:
    """A mapping in YAML's flow style."""
    return "{ " + ", ".join(f"{key}: {_json(value)}" for key, value in entry.items()) + " }"


def _name_of(source: str) -> str:
    """A short name of a model, for the title."""
    if source == MARK:
        return "A chat model"
    return re.sub(r"\.gguf$", "", source.rstrip("/").rpartition("#")[2].rpartition("/")[2]) or source


def _as_line(text: str) -> str:
    return " ".join(text.split())


def _as_paragraph(document: str) -> str:
    """A document without blank lines, which would end it."""
    return re.sub(r"\n\s*\n", "\n", document.strip())
