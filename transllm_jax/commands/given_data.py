"""A look at the files that a new run is given: in what form they are, how much they hold, and which of it to hold out.

Only the first `LOOKED` items of a source are read, so that a large corpus is looked at in seconds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transllm_jax.choices import Content
from transllm_jax.data.clean.cleaning import NO_SCRIPT_SHARE, refuse_swapped, script_share
from transllm_jax.data.read.files import COMPRESSED, Collector, resolve, texts_of
from transllm_jax.data.read.instructions import read_instruction
from transllm_jax.data.read.shards import PLURAL, Reading, container_of, shards
from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.errors import UserError

# Items of a source that are read, and at most this many bytes of their text.
LOOKED, LOOKED_BYTES = 20_000, 50_000_000
# Bytes of text for a byte of a compressed file, roughly, and of a parquet file.
_EXPANDS, _EXPANDS_OF = 3.5, {".parquet": 2.0}
# Below this share of letters of the language's script, a file is probably not the right one.
LEAST_SCRIPT_SHARE = 0.3
_TEXT_FIELDS = ("text", "content", "raw_content", "document", "article", "body", "maintext")
_ENGLISH_FIELDS = ("en", "eng", "english", "source", "src", "sentence_en", "text_en")


@dataclass(frozen=True)
class Looked:
    """A source as it was found.

    entry: the keys of a `Source` of the config that are not defaults, `path` first. items: those that were read.
    whole: whether these are all. bytes: of all text of the source, estimated unless `whole`. notes: what a user should
    know.
    """

    entry: dict[str, Any]
    items: list[Any]
    whole: bool
    bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """How much it is, in words."""
        kind = PLURAL[self.entry.get("format", "text")]
        amount = f"{self.bytes / 1e6:,.1f} MB of text"
        return f"{len(self.items):,} {kind}, {amount}" if self.whole else f"about {amount} (the start was read)"


def look_at(path: str, content: Content, language: str, scripts: tuple[str, ...]) -> Looked:
    """Read the start of a source of text or pairs. `path`: a file or glob; for pairs also `ENGLISH:TARGET`, two files.

    language: its code. scripts: the names of its scripts. Raises UserError for what cannot be read.
    """
    entry: dict[str, Any] = {"path": path}
    if content == "pairs":
        entry["format"] = "pairs"
        english, colon, target = path.partition(":")
        if colon and not Path(path).exists() and Path(english).is_file():
            entry = {"path": english, "format": "pairs", "target_path": target}
    files = resolve(entry["path"])
    if container_of(files) != "lines":
        fields = _fields(files[0], content, language)
        if fields != ["text"]:
            entry["fields"] = fields
    notes: list[str] = []
    items, whole, read, collector = _read(entry, content)
    if content == "text" and "fields" not in entry and _is_a_line_each(items):
        entry["separator"] = "line"
        items, whole, read, collector = _read(entry, content)
        notes.append("no blank lines: each line is read as a document (`separator: line`)")
    if content == "text" and _has_tabs(items):
        notes.append("most lines have a tab: are these pairs, to be given with --pairs?")
    if collector.removed:
        entry["controls"] = "remove"
        notes.append("control characters (carriage returns among them) are removed (`controls: remove`)")
    if skipped := sum(collector.skipped.values()):
        entry["on_bad_rows"] = "skip"
        kinds = ", ".join(f"{count} {kind}" for kind, count in collector.skipped.most_common())
        notes.append(f"{skipped} bad rows are left out ({kinds}; `on_bad_rows: skip`)")
    share = _share(items, content, scripts)
    if share < NO_SCRIPT_SHARE and items:
        if content == "pairs":
            refuse_swapped(path, items, language, scripts)
        what = "the target side" if content == "pairs" else "the text"
        raise UserError(
            f"{path}: none of the letters of {what} are {' or '.join(scripts)}; give a file in the language {language}"
        )
    if share < LEAST_SCRIPT_SHARE:
        what = "the target side" if content == "pairs" else "the text"
        notes.append(f"only {share:.0%} of the letters of {what} are {' or '.join(scripts)}: is it the right file?")
    return Looked(entry, items, whole, read if whole else max(read, _size(files)), notes)


def look_at_instructions(path: str) -> tuple[int, bool, bool]:
    """How many instructions a file has (at most `LOOKED` are counted), whether these are all, and whether each of the
    first has a field `translation`. Raises UserError for what cannot be read, and for a record without an instruction.
    """
    rows = read_jsonl(path, {}, limit=LOOKED)
    for row, place in zip(rows, rows.places, strict=True):
        read_instruction(row, place)
    translated = all(isinstance(row.get("translation"), str) and row["translation"] for row in rows[:100])
    return len(rows), len(rows) < LOOKED, translated


@dataclass(frozen=True)
class HeldOutTexts:
    """What training leaves out: documents, (English, target) pairs, and questions in both languages."""

    documents: list[str]
    pairs: list[tuple[str, str]]
    questions: list[tuple[str, str]]


def hold_out(text: Sequence[Looked], pairs: Sequence[Looked]) -> HeldOutTexts:
    """Choose texts for the evaluation: 50 documents, 50 pairs and 30 questions, the same each time.

    Questions are pairs whose English side asks something, or others if there are too few. At most a twentieth of what
    was read is chosen for each, but one.
    """
    chosen = random.Random(0)
    documents = list(dict.fromkeys(item for source in text for item in source.items))
    rows = list(dict.fromkeys(item for source in pairs for item in source.items))
    share = _share_of(rows)
    questions = _choose([row for row in rows if _is_question(row)], min(30, share), _is_good_pair, chosen)
    missing = min(30, share) - len(questions)
    taken = set(questions)
    others = [row for row in rows if row not in taken]
    others = _choose(others, min(50, share) + missing, _is_good_pair, chosen)
    return HeldOutTexts(
        documents=_choose(documents, min(50, _share_of(documents)), _is_good_document, chosen),
        pairs=others[missing:],
        questions=[*questions, *others[:missing]],
    )


def _share_of(items: Sequence[Any]) -> int:
    return max(1, len(items) // 20) if len(items) > 2 else 0


def characters_of(sources: Sequence[Looked]) -> int:
    """How many different characters beyond ASCII occur at least twice in what was read, on the target side."""
    counts: Counter[str] = Counter()
    for source in sources:
        for item in source.items:
            counts.update(item[1] if source.entry.get("format") == "pairs" else item)
    return sum(count > 1 for character, count in counts.items() if not character.isascii())


def _choose(items: list[Any], count: int, good: Callable[[Any], bool], chosen: random.Random) -> list[Any]:
    """`count` of the items, or all if they are fewer: good ones, if there are enough."""
    best = [item for item in items if good(item)]
    found = best if len(best) >= count else items
    return chosen.sample(found, min(count, len(found)))


def _is_good_document(text: str) -> bool:
    return 200 <= len(text) <= 4000


def _is_good_pair(pair: tuple[str, str]) -> bool:
    return 3 <= len(pair[0].split()) <= 30 and len(pair[1]) >= 5


def _is_question(pair: tuple[str, str]) -> bool:
    return pair[0].rstrip().endswith("?")


def _size(files: Sequence[Path]) -> int:
    """Bytes of text in files, estimated from their sizes."""
    total = 0.0
    for file in files:
        suffix = file.suffix.lower()
        total += file.stat().st_size * (_EXPANDS if suffix in COMPRESSED else _EXPANDS_OF.get(suffix, 1.0))
    return int(total)


def _read(entry: dict[str, Any], content: Content) -> tuple[list[Any], bool, int, Collector]:
    """The first items of a source, whether these are all, the bytes of their text, and what was removed or skipped."""
    reading = Reading(
        path=entry["path"],
        content=content,
        fields=tuple(entry.get("fields", ())),
        target_path=entry.get("target_path"),
        separator=entry.get("separator", "blank line"),
        # Counted here, and written into the config.
        controls="remove",
        on_bad_rows="skip",
    )
    items: list[Any] = []
    read = 0
    collector = Collector("remove", "skip")
    found = (item for shard in shards(reading, lambda file: file.name) for item, _ in shard.items(collector))
    for item in islice(found, LOOKED):
        items.append(item)
        read += sum(len(text.encode()) for text in texts_of(item))
        if read > LOOKED_BYTES:
            return items, False, read, collector
    return items, next(found, None) is None, read, collector


def _is_a_line_each(items: Sequence[str]) -> bool:
    """Whether documents look like lines that nothing separates: hardly any document, each of many lines."""
    lines = sum(item.count("\n") + 1 for item in items[:100])
    return len(items) <= 3 and lines > 20 * len(items)


def _has_tabs(items: Sequence[str]) -> bool:
    lines = [line for item in items[:100] for line in item.splitlines()]
    return sum("\t" in line for line in lines) > len(lines) / 2


def _share(items: Sequence[Any], content: Content, scripts: tuple[str, ...]) -> float:
    """The share of letters of these scripts in the first items, on the target side."""
    target = [item[1] if content == "pairs" else item for item in items[:200]]
    return script_share("\n".join(target)[:200_000], scripts)


def _fields(file: Path, content: Content, language: str) -> list[str]:
    """The fields of a file of records that hold the text, or the two sides of a pair. Raises UserError if unclear."""
    first = next(iter(read_jsonl(file, required=(), limit=1)), {})
    record = {**first, **_inside(first)}
    texts = [name for name, value in record.items() if isinstance(value, str)]
    if content == "text":
        if found := next((name for name in _TEXT_FIELDS if name in texts), None):
            return [found]
        raise UserError(f"{file}: which field is the text? It has {', '.join(texts) or 'none'}; name one of them text")
    english = next((name for name in texts if name.rpartition(".")[2].lower() in _ENGLISH_FIELDS), None)
    wanted = (language.split("-")[0], language, "target", "tgt")
    target = next((name for name in texts if name != english and name.rpartition(".")[2].lower() in wanted), None)
    if target is None and english is not None and len(texts) == 2:
        target = next(name for name in texts if name != english)
    if english is None or target is None:
        raise UserError(
            f"{file}: which fields hold the two sides? It has {', '.join(texts) or 'none'}; name them en and "
            f"{language}, or write a file of lines, English<TAB>target"
        )
    return [english, target]


def _inside(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of objects inside a record, as `translation.en`."""
    return {
        f"{name}.{inner}": value
        for name, held in record.items()
        if isinstance(held, dict)
        for inner, value in held.items()
    }
