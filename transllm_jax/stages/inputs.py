"""The files that the stages of a run read: their hashes, their items, and checks for faults."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, TypeVar

from transllm_jax.config import Config, Source
from transllm_jax.data.clean.cleaning import COMPARED, refuse_swapped, text_of
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.data.read.bad_rows import check_share, first_of_each
from transllm_jax.data.read.files import Collector, Loaded, Place, catch_bad_row, resolve, texts_of
from transllm_jax.data.read.questions import read_questions
from transllm_jax.data.read.shards import Item, Reading, Shard, shards
from transllm_jax.data.read.sources import read_jsonl, refuse_special
from transllm_jax.disk import FileHashes
from transllm_jax.errors import UserError
from transllm_jax.progress import Progress
from transllm_jax.stages.bad_rows import BadRows
from transllm_jax.stages.models import Models
from transllm_jax.stages.points import markers_of
from transllm_jax.tokenizer.chat import encode_conversation

T = TypeVar("T", bound=Item)

# Before a run begins, at most this many characters of a source are checked, and at most this many of its conversations
# are rendered by the chat template.
CHECKED_CHARACTERS, RENDERED = 100_000_000, 1000


def reading(source: Source) -> Reading:
    """A source of the config in the form that the data package takes."""
    return Reading(
        path=source.path,
        content=source.format,
        container=source.container,
        fields=tuple(source.fields),
        target_path=source.target_path,
        separator=source.separator,
        controls=source.controls,
        on_bad_rows=source.on_bad_rows,
        max_bytes=source.max_bytes,
        max_items=source.max_items,
        split=source.split,
        data_dir=source.data_dir,
    )


def target_text(source: Source, item: Item) -> str:
    """An item's text in the target language: a document, or that side of a pair."""
    return str(item[1] if source.format == "pairs" else item)


class Inputs:
    """Reads the sources of a run's config. Each file is hashed once."""

    def __init__(
        self, config: Config, models: Models, hash_of: FileHashes, bad_rows: BadRows, progress: Progress
    ) -> None:
        self._config, self._models, self.hash_of = config, models, hash_of
        self.bad_rows, self._progress = bad_rows, progress
        self._markers = markers_of(config).in_order()
        self._checked: set[str] = set()

    def hashes(self, paths: Iterable[str]) -> dict[str, str]:
        """The hashes of the files that match these paths or globs, as `file PATH` -> hash, for a step's inputs.

        Raises UserError for a path without a file.
        """
        # Named by the path as given, which the user knows; only the content matters.
        found = {f"file {file}": self.hash_of(file) for path in paths for file in resolve(path)}
        self.hash_of.write()
        return found

    def source_hashes(self, given: Iterable[Source]) -> dict[str, str]:
        """The hashes of the sources' files, for a step's inputs. A dataset has one hash, that of its shards' keys.

        Raises UserError for a source without a file.
        """
        found = {}
        for source in given:
            if source.container in ("datasets", "tfds"):
                keys = " ".join(shard.key for shard in self.shards(source))
                self.hash_of.write()
                found[f"{source.container} {source.path}"] = hashlib.sha256(keys.encode()).hexdigest()
            else:
                found.update(self.hashes([source.path, *([source.target_path] if source.target_path else [])]))
        return found

    def shards(self, source: Source) -> list[Shard]:
        """The shards of a source. Raises UserError for a source without a file."""
        return shards(reading(source), self.hash_of)

    def items(
        self, source: Source, collector: Collector, find_special: Callable[[str], str | None] | None = None
    ) -> Iterator[tuple[Item, Place]]:
        """The items of a source one at a time, each with its place.

        find_special: finds a special token in a text; an item that contains one is a bad row. The collector refuses or
        skips bad rows. Raises UserError.
        """
        for shard in self.shards(source):
            for item, place in shard.items(collector):
                bad = None if find_special is None else catch_bad_row(refuse_special, item, find_special, place)
                if bad is None:
                    yield item, place
                else:
                    collector.refuse_or_skip(bad, place)

    def read(self, source: Source, stage: str, find_special: Callable[[str], str | None] | None = None) -> Loaded[Any]:
        """All items of a source: documents, (English, target) pairs, or conversations; see `items`.

        stage: its directory gets the file of bad rows.
        """
        collector = Collector(source.controls, source.on_bad_rows)
        found = list(self.items(source, collector, find_special))
        self.bad_rows.note(stage, source, len(found), collector.skipped, collector.bad_rows)
        return Loaded([item for item, _ in found], [place for _, place in found], collector.report)

    def target_texts(self, source: Source) -> Iterator[str]:
        """Texts in the target language one at a time."""
        for item, _ in self.items(source, Collector(source.controls, source.on_bad_rows)):
            yield target_text(source, item)

    def read_target(self, source: Source, stage: str) -> list[str]:
        """All texts in the target language; a text that contains a special token is a bad row."""
        loaded = self.read(source, stage, self._models.tokenizer("base").find_special)
        return [target_text(source, item) for item in loaded]

    def read_english(self, source: Source, stage: str) -> list[str]:
        """All English texts: documents, or that side of pairs."""
        return [item[0] if source.format == "pairs" else item for item in self.read(source, stage)]

    def find_special(self, text: str) -> str | None:
        """The first special token of the base, or marker of the chain, in a text. The user's data may not have any."""
        found = self._models.tokenizer("base").find_special(text)
        return found or next((marker for marker in self._markers if marker in text), None)

    def check(self, source: Source) -> None:
        """Check a source's first `CHECKED_CHARACTERS` characters, once. The rest is checked when it is used.

        Raises UserError with file and line.
        """
        known = repr(reading(source))
        if known in self._checked:
            return
        collector = Collector(source.controls, source.on_bad_rows)
        characters = good = 0
        whole = True
        pairs: list[tuple[str, str]] = []
        find_special = self._models.tokenizer("base").find_special if source.chains else self.find_special
        for item, place in self.items(source, collector, find_special):
            if source.format == "conversations" and good < RENDERED:
                self._check_template(item, place)
            if isinstance(item, tuple) and len(pairs) < COMPARED:
                pairs.append(item)
            good += 1
            characters += sum(map(len, texts_of(item)))
            if characters > CHECKED_CHARACTERS:
                whole = False
                break
        if whole and collector.skipped:
            first = next(iter(first_of_each(collector.bad_rows).values()))
            check_share(source.path, good, collector.skipped, source.max_bad_share, first, "")
        refuse_swapped(source.path, pairs, self._config.language.code, self._config.language.scripts)
        self._checked.add(known)

    def _check_template(self, item: Item, place: Place) -> None:
        """Raises UserError with the place if the chat template refuses the conversation."""
        assert isinstance(item, list)
        try:
            encode_conversation(self._models.tokenizer("base"), item, self._markers)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None

    @cached_property
    def evaluation_texts(self) -> EvaluationTexts:
        """The texts of the evaluation sets. No training text may contain a part of one."""
        section = self._config.evaluation
        pairs = Source(path=section.pairs, format="pairs")
        stage = "evaluation"
        texts = [("evaluation.text", text) for item in self.read(section.text, stage) for text in texts_of(item)]
        texts += [("evaluation.pairs", text) for pair in self.read(pairs, stage) for text in pair]
        for field in section.instruction_fields:
            rows = read_jsonl(section.instructions, required=(field,))
            texts += [("evaluation.instructions", row[field]) for row in rows]
        for number, source in enumerate(section.others):
            texts += [
                (f"evaluation.others.{number}", text) for item in self.read(source, stage) for text in texts_of(item)
            ]
        return EvaluationTexts(texts, whole=[("evaluation.answers", text) for text in self._asked()])

    def _asked(self) -> Iterator[str]:
        """The texts of the checkable questions in both languages, each together with the turns before it."""
        path = self._config.evaluation.answers
        for question in read_questions(path) if path is not None else ():
            yield text_of(question.asked)
            for wording in question.wordings:
                yield text_of([*question.history_en, {"role": "user", "content": wording}])

    def contamination_hashes(self, wanted: bool) -> dict[str, Any]:
        """The evaluation sets as inputs of a step that removes contaminated text; empty if not wanted."""
        section = self._config.evaluation
        if not wanted:
            return {}
        return {
            "evaluation.others": [source.path for source in section.others],
            **self.hashes([section.pairs, section.instructions, *([section.answers] if section.answers else [])]),
            **self.source_hashes([section.text, *section.others]),
        }

    def check_clean(self, items: Iterable[Item], what: str, key: str) -> None:
        """Raises UserError that names the config's key if every item contains an evaluation text."""
        if all(self.evaluation_texts.found_in(text_of(item)) is not None for item in items):
            raise UserError(f"{what}: all of it holds evaluation texts; give other text, or set {key} to false")

    def uncontaminated(self, items: list[T], what: str) -> list[T]:
        """The items that contain no evaluation text; prints how many were left out."""
        kept = [item for item in items if self.evaluation_texts.found_in(text_of(item)) is None]
        if len(kept) < len(items):
            self._progress.say(
                f"  {what}: {len(items) - len(kept)} of {len(items)} hold evaluation texts, left out", style="yellow"
            )
        return kept
