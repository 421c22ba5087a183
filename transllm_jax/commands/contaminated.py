"""Whether the questions of a suite occur in the text that a run was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transllm_jax.commands.open_chat import open_run
from transllm_jax.config import Source
from transllm_jax.data.clean.cleaning import text_of
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.disk import read_json, sha256_of_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.progress import Progress
from transllm_jax.stages.run import Run


class Contamination:
    """Looks for questions in the training data of runs, and keeps what it found in a file."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path, self._progress = path, progress

    def of(self, workdir: Path, texts: Iterable[tuple[str, str]], *, whole: bool) -> dict[str, Any] | None:
        """How many of the questions occur, and where; None if there are no questions.

        texts: each with the id of its question, which may have several. whole: as in `registry.Suite`. The result has
        `of` (questions looked for), `found`, `by_source` (by the config's key) and `ids`. Text that the run left out
        because it holds an evaluation text does not count. `found` is None, with `why`, where a file is not there.
        """
        given = list(texts)
        wanted = EvaluationTexts([] if whole else given, whole=given if whole else ())
        if not wanted.texts:
            return None
        run = open_run(workdir)
        try:
            sources = list(_sources(run))
            hashes = run.inputs.source_hashes(source for _, source, _ in sources)
            hashes |= run.inputs.hashes([run.config.recover.instructions])
            filtered = [key for key, _, is_filtered in sources if is_filtered]
            key = sha256_of_json([wanted.key, hashes, filtered, run.config.recover.contamination])
            known = read_json(self._path) if self._path.exists() else {}
            if key not in known:
                self._progress.say(f"  {wanted.texts:,} questions are looked for in the training data of {workdir}")
                known[key] = self._look(run, sources, wanted, len(dict.fromkeys(id for id, _ in given)))
                write_json(self._path, known)
        except UserError as error:
            return {"of": wanted.texts, "found": None, "why": str(error)}
        found: dict[str, Any] = known[key]
        return found

    def _look(
        self, run: Run, sources: list[tuple[str, Source, bool]], wanted: EvaluationTexts, count: int
    ) -> dict[str, Any]:
        by_source: dict[str, set[str]] = {}
        for name, source, filtered in sources:
            items = run.inputs.items(source, Collector(source.controls, source.on_bad_rows))
            by_source[name] = _found(run, wanted, (text_of(item) for item, _ in items), filtered)
        section = run.config.recover
        rows = read_jsonl(section.instructions, {}, limit=section.max_instructions)
        # Whole records: a question may be in a conversation, whatever its fields are called.
        texts = (" ".join(_strings(row)) for row in rows)
        by_source["recover.instructions"] = _found(run, wanted, texts, section.contamination)
        ids = sorted(set().union(*by_source.values()), key=lambda id: (len(id), id))
        counts = {name: len(found) for name, found in by_source.items() if found}
        return {"of": count, "found": len(ids), "by_source": counts, "ids": ids}


def _found(run: Run, wanted: EvaluationTexts, texts: Iterable[str], filtered: bool) -> set[str]:
    """The ids of the questions in some texts. filtered: the run left out those with evaluation texts of its own."""
    ids: set[str] = set()
    for text in texts:
        found = wanted.every_found_in(text)
        if found - ids and not (filtered and run.inputs.evaluation_texts.found_in(text) is not None):
            ids |= found
    return ids


def _sources(run: Run) -> Iterator[tuple[str, Source, bool]]:
    """What the stages train on: the config's key, the source, and whether evaluation texts were left out."""
    config = run.config
    for stage in ("pretrain", "translate", "transfer"):
        for number, source in enumerate(getattr(config, stage).sources):
            yield f"{stage}.sources.{number}", source, source.cleaning.contamination
    yield "transfer.pairs", config.transfer.pairs, config.transfer.contamination


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
