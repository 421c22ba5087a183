"""What every stage is given: the config, the work directory, a voice, and the models and tokenizers of its points.

A point is a state of the model in the course of a run: `base` (the original chat model) and, after each stage that
changes it, `vocabulary`, `pretrain`, `translate`, `transfer`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from conversion.hf.directory import open_hf, read_config, read_parts
from transllm_jax.config import Config, Source
from transllm_jax.data.clean.cleaning import text_of
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.data.read.bad_rows import check_share, first_of_each
from transllm_jax.data.read.files import Collector, Loaded, Place, attempt, resolve, texts_of
from transllm_jax.data.read.shards import Item, Reading, Shard, shards
from transllm_jax.data.read.sources import read_jsonl, refuse_special
from transllm_jax.disk import FileHashes
from transllm_jax.errors import UserError
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.hosts.runtime import Peers
from transllm_jax.hosts.site import Site
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import Index, Layout
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.mesh import make_layout, mesh_shape
from transllm_jax.model.parameters import Flat, Split, assemble, read_frozen
from transllm_jax.model.vocabulary import Padding, padding_of
from transllm_jax.progress import Progress
from transllm_jax.stages.bad_rows import BadRows
from transllm_jax.stages.manifest import Artifact
from transllm_jax.stages.trained import lora_of, trains
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import encode_conversation, encode_prompt
from transllm_jax.tokenizer.sentencepiece_model import unused
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays
from transllm_jax.training.record.ledger import LEDGER, Ledger

T = TypeVar("T", bound=Item)

POINTS = ("base", "vocabulary", "pretrain", "translate", "transfer")


def seed_for(seed: int, purpose: str) -> int:
    """31 bits that are a function of both, the same in every process: Python's own hash of a text is not."""
    digest = hashlib.sha256(json.dumps([seed, purpose]).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


class Run:
    """One run of the pipeline. The frozen weights are read once and shared by the models of all points."""

    def __init__(
        self,
        config: Config,
        workdir: Path | Site,
        progress: Progress,
        interrupt: Interrupt,
        *,
        since: float | None = None,
        profile: int = 0,
    ) -> None:
        """workdir: a directory for one process alone, or where several are at work together.

        since: when the process began, by `time.monotonic`. profile: steps of each training stage that are traced.
        """
        self._since = since
        self.profile = profile
        self.config = config
        self.site = workdir if isinstance(workdir, Site) else Site.of(workdir)
        self.workdir = self.site.workdir
        self.progress = progress
        self.interrupt = interrupt
        # The original model with its answers to held-out questions; made by the first evaluation, used by all.
        self.teacher: Teacher | None = None
        self._today = date.today()
        self.bad_rows = BadRows(self.own, self.workdir, self.progress.say)
        self._tokenizers: dict[str, Tokenizer] = {}
        self._checked: set[str] = set()

    @property
    def today(self) -> date:
        """The day that chat templates are told: the config's, which the pipeline fills in when the run begins."""
        return self.config.date or self._today

    @property
    def peers(self) -> Peers:
        """The processes of this run."""
        return self.site.peers

    @property
    def primary(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.site.peers.primary

    def seed_for(self, purpose: str) -> int:
        """The seed of one purpose, such as a stage's name: a hash of it and of the run's seed.

        No two purposes share one, nor do neighbouring seeds of the config.
        """
        return seed_for(self.config.seed, purpose)

    def own(self, directory: Path) -> Path:
        """Where this process writes what it tells of a step: the step's directory, or one that nobody reads."""
        if self.primary:
            return directory
        place = self._scratch / directory.name
        place.mkdir(exist_ok=True)
        return place

    def keep(self, *names: str) -> None:
        """What is here of these steps, and the account of time, outlives this host; nothing without a store."""
        if self.primary and self.site.mirrored:
            with self.ledger.still():
                self.site.push(LEDGER, *names)

    @cached_property
    def _scratch(self) -> Path:
        self._temporary = tempfile.TemporaryDirectory(prefix="transllm-")
        return Path(self._temporary.name)

    @property
    def base(self) -> Path:
        """The imported chat model: a Hugging Face directory."""
        return self.workdir / "base"

    @cached_property
    def model_config(self) -> LlamaConfig:
        """The base model's shape."""
        return read_config(self.base)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters' shape; None where all weights train."""
        return lora_of(self.config)

    @property
    def scale(self) -> float:
        """The factor of the adapters' output; 1 where there are none."""
        return 1.0 if self.lora is None else self.lora.scale

    @property
    def markers(self) -> Markers:
        """The chain's markers."""
        markers = self.config.markers
        return Markers(markers.english, self.config.target_marker, markers.response)

    @cached_property
    def frozen(self) -> Flat:
        """The base model's weights, on the devices."""
        dtype = jnp.dtype(self.config.model.dtype)
        model = open_hf(self.base)

        def read(path: str, parts: Sequence[Index]) -> list[np.ndarray]:
            return read_parts(model, path, parts, dtype)

        return read_frozen(self.model_config, read, dtype, self.layout)

    @cached_property
    def layout(self) -> Layout:
        """How arrays lie on the run's devices. Raises UserError for a mesh of another number of devices."""
        mesh = self.config.mesh
        shape = mesh_shape(len(jax.devices()), mesh.data, mesh.fsdp, mesh.tensor)
        return make_layout(shape, self.config.attention)

    def tokenizer(self, point: str) -> Tokenizer:
        """The tokenizer at a point: the base's own, or the expanded one."""
        name = "base" if point == "base" else "vocabulary"
        if name not in self._tokenizers:
            self._tokenizers[name] = Tokenizer.load(self.workdir / name, model=self.base, today=self.today)
        return self._tokenizers[name]

    def split(self, point: str) -> Split:
        """The model at a point."""
        rows, lora, trainable = self.model_config.vocab_size, None, None
        if point != "base":
            lora, trainable = self.lora, load_arrays(self.trainable(point))
            rows += len(trainable.get("vocabulary.new", ()))
        padding = tokenless(self.tokenizer(point), rows)
        return assemble(
            self.model_config, self.frozen, lora=lora, trainable=trainable, padding=padding, layout=self.layout
        )

    def trains(self, path: str) -> bool:
        """Whether an array of a point changes in training; of the vocabulary, some stay as they are."""
        return trains(self.config, path)

    def trainable(self, point: str) -> Path:
        """Where a point's adapters and new rows lie."""
        return self.workdir / point / "trainable"

    @cached_property
    def ledger(self) -> Ledger:
        """Where the time of this process goes."""
        return Ledger((self.workdir if self.primary else self._scratch) / LEDGER, since=self._since)

    @property
    def token_cache(self) -> Path:
        """Where tokenised text is kept."""
        given = self.config.token_cache
        return Path(given) if given else self.workdir / TOKENS

    @cached_property
    def tokens_are_shared(self) -> bool:
        """Whether all processes see one cache of tokens. To be asked by all."""
        given = self.config.token_cache
        return not self.site.mirrored if given is None else all(self.site.seen_by(self.token_cache))

    @cached_property
    def hash_of(self) -> FileHashes:
        """A file's hash."""
        return FileHashes(self.workdir / HASHES, keep=self.primary)

    def shards(self, source: Source) -> list[Shard]:
        """The shards of a source. Raises UserError for files that are not there."""
        return shards(reading(source), self.hash_of)

    def items(
        self, source: Source, collector: Collector, find_special: Callable[[str], str | None] | None = None
    ) -> Iterator[tuple[Item, Place]]:
        """The items of a source one at a time, each with its place; with `find_special`, one that holds a special token
        is a bad row.

        Bad rows are refused or skipped, as the collector does it. Raises UserError.
        """
        for shard in self.shards(source):
            for item, place in shard.items(collector):
                bad = None if find_special is None else attempt(refuse_special, item, find_special, place)
                if bad is None:
                    yield item, place
                else:
                    collector.bad(bad, place)

    def read(self, source: Source, stage: str, find_special: Callable[[str], str | None] | None = None) -> Loaded[Any]:
        """All items of a source: documents, (English, target) pairs, or conversations; see `items`.

        stage: whose directory bad rows are written to.
        """
        collector = Collector(source.controls, source.on_bad_rows)
        found = list(self.items(source, collector, find_special))
        self.bad_rows.note(stage, source, len(found), collector.skipped, collector.bad_rows)
        return Loaded([item for item, _ in found], [place for _, place in found], collector.report)

    def target_texts(self, source: Source) -> Iterator[str]:
        """Texts in the target language one at a time: documents, or of pairs that side."""
        for item, _ in self.items(source, Collector(source.controls, source.on_bad_rows)):
            yield str(item[1] if source.format == "pairs" else item)

    def read_target(self, source: Source, stage: str) -> list[str]:
        """Texts in the target language: documents, or of pairs that side."""
        loaded = self.read(source, stage, self.tokenizer("base").find_special)
        return [item[1] if source.format == "pairs" else item for item in loaded]

    def read_english(self, source: Source, stage: str) -> list[str]:
        """English texts: documents, or of pairs that side."""
        return [item[0] if source.format == "pairs" else item for item in self.read(source, stage)]

    def find_special(self, text: str) -> str | None:
        """The first of the base model's special tokens or the chain's markers in a text: no user data may hold one."""
        found = self.tokenizer("base").find_special(text)
        return found or next((marker for marker in self.markers.in_order() if marker in text), None)

    def check(self, source: Source) -> None:
        """Read a source for its faults alone, once, up to `CHECKED` characters: the rest is looked at when it is used.

        Raises UserError with file and line.
        """
        known = reading(source)
        if repr(known) in self._checked:
            return
        collector = Collector(source.controls, source.on_bad_rows)
        characters = good = 0
        whole = True
        for item, place in self.items(source, collector, self.find_special):
            if source.format == "conversations" and good < TRIED:
                self._try_template(item, place)
            good += 1
            characters += sum(map(len, texts_of(item)))
            if characters > CHECKED:
                whole = False
                break
        if whole and collector.skipped:
            first = next(iter(first_of_each(collector.bad_rows).values()))
            check_share(source.path, good, collector.skipped, source.max_bad_share, first, "")
        self._checked.add(repr(known))

    def _try_template(self, item: Item, place: Place) -> None:
        """Refuse a conversation that the chat template refuses. Raises UserError with its place."""
        assert isinstance(item, list)
        try:
            encode_conversation(self.tokenizer("base"), item, self.markers.in_order())
        except UserError as error:
            raise UserError(f"{place}: {error}") from None

    def check_length(self, key: str, length: int) -> None:
        """Refuse a length in tokens above the model's context. Raises UserError that names the config's key."""
        context = self.model_config.context
        if length > context:
            raise UserError(f"{key} is {length}, the model's context is {context} tokens; lower {key}")

    def check_room(
        self, questions: Iterable[tuple[str, Place]], key: str, new_tokens: int, *, chat: bool = True
    ) -> None:
        """Refuse a question that exceeds the model's context together with an answer of `new_tokens`.

        chat: it is asked in a conversation, not as a text to translate between two markers. The base's tokenizer
        counts: the expanded one needs no more. Raises UserError that names its place and the config's key.
        """
        tokenizer, context = self.tokenizer("base"), self.model_config.context

        def length(text: str) -> int:
            if not chat:
                return len(tokenizer.bos_ids) + len(tokenizer.encode(text.strip())) + 2
            return len(encode_prompt(tokenizer, [{"role": "user", "content": text}]))

        frame = length("a")
        for text, place in questions:
            # A token holds a byte at least, so most questions need not be encoded.
            if frame + len(text.encode()) + new_tokens <= context:
                continue
            tokens = length(text)
            if tokens + new_tokens > context:
                raise UserError(
                    f"{place}: a prompt of {tokens} tokens and {key} {new_tokens} exceed the model's context of "
                    f"{context}; shorten the text or lower {key}"
                )

    def hashes(self, paths: Iterable[str]) -> dict[str, str]:
        """The hashes of the files that these paths (or globs) mean, for a step's inputs.

        Raises UserError for a path that means none.
        """
        # Named by the path as given, which the user knows; the content is what counts.
        found = {f"file {file}": self.hash_of(file) for path in paths for file in resolve(path)}
        self.hash_of.write()
        return found

    def source_hashes(self, given: Iterable[Source]) -> dict[str, str]:
        """What sources hold, for a step's inputs: their files' hashes, or of a dataset that of its shards' keys.

        Raises UserError for a source that is not there.
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

    @cached_property
    def evaluation_texts(self) -> EvaluationTexts:
        """The evaluation sets, of which no training text may hold a part."""
        section = self.config.evaluation
        pairs = Source(path=section.pairs, format="pairs")
        here = "evaluation"
        texts = [("evaluation.text", text) for item in self.read(section.text, here) for text in texts_of(item)]
        texts += [("evaluation.pairs", text) for pair in self.read(pairs, here) for text in pair]
        for field in section.instruction_fields:
            rows = read_jsonl(section.instructions, required=(field,))
            texts += [("evaluation.instructions", row[field]) for row in rows]
        for number, source in enumerate(section.others):
            texts += [
                (f"evaluation.others.{number}", text) for item in self.read(source, here) for text in texts_of(item)
            ]
        return EvaluationTexts(texts)

    def check_clean(self, items: Iterable[Item], what: str, key: str) -> None:
        """Refuse items that all hold an evaluation text. Raises UserError that names the config's key."""
        if all(self.evaluation_texts.found_in(text_of(item)) is not None for item in items):
            raise UserError(f"{what}: all of it holds evaluation texts; give other text, or set {key} to false")

    def uncontaminated(self, items: list[T], what: str) -> list[T]:
        """The items that hold no evaluation text; says how many were left out."""
        kept = [item for item in items if self.evaluation_texts.found_in(text_of(item)) is None]
        if len(kept) < len(items):
            self.progress.say(
                f"  {what}: {len(items) - len(kept)} of {len(items)} hold evaluation texts, left out", style="yellow"
            )
        return kept


# In a work directory: tokenised text, and the hashes of files.
TOKENS, HASHES = "tokens", "hashes.json"
# Characters of a source that are looked at before a run begins.
CHECKED = 100_000_000
# Conversations of a source that are put through the chat template before a run begins.
TRIED = 1000


def reading(source: Source) -> Reading:
    """How the data package is asked for a source of the config."""
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


def token_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that stand for something, in order: not those of names that only fill the gap before new ids."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return sorted(number for token, number in vocabulary.items() if token != unused(number))


def tokenless(tokenizer: Tokenizer, rows: int) -> Padding:
    """The ids of a table of so many rows that a tokenizer has no token for."""
    return padding_of(token_ids(tokenizer), rows)


def about(run: Run) -> dict[str, Any]:
    """What `transllm chat` needs to know of an exported model, its `transllm.json`."""
    return {"language": run.config.language.model_dump(), "markers": asdict(run.markers)}


def newest_point(workdir: Path) -> str:
    """The last point of a run that is done. Raises UserError before the first."""
    for point in reversed(POINTS):
        manifest = Artifact(workdir / point, point).manifest()
        if manifest is not None and manifest["state"] == "done":
            return point
    raise UserError(f"{workdir}: no stage is done yet; run `transllm run` first")
