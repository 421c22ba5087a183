"""Whether the questions of a suite occur in the text that a run was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transllm_jax.choices import POINTS, TRAININGS
from transllm_jax.commands.open_chat import open_run
from transllm_jax.config import Source
from transllm_jax.data.clean.cleaning import text_of
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.disk import read_json, sha256_of_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.progress import Progress
from transllm_jax.stages.points import newest_point
from transllm_jax.stages.run import Run


class Contamination:
    """Looks for questions in the training data of runs, and keeps what it found in a file."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path, self._progress = path, progress

    def of(self, workdir: Path, point: str, texts: Iterable[tuple[str, str]], *, whole: bool) -> dict[str, Any] | None:
        """How many of the questions occur in what a point was trained on, and where; None if there are no questions.

        point: empty for the newest. texts: each with the id of its question, which may have several. whole: as in
        `registry.Suite`. The result has `of` (all questions), `found`, `by_source` (by the config's key), `ids`, and
        `too_short` (texts that are too short to be looked for). Text that the run left out, because it holds an
        evaluation text, does not count. `found` is None, with `why`, where a file is not there.
        """
        given = list(texts)
        if not given:
            return None
        wanted = EvaluationTexts([] if whole else given, whole=given if whole else ())
        run = open_run(workdir)
        point = point or newest_point(workdir)
        recover, count = run.config.recover, len({id for id, _ in given})
        try:
            sources = list(_sources(run, point))
            hashes = run.inputs.source_hashes(source for _, source, _ in sources)
            if point == POINTS[-1]:
                hashes |= run.inputs.hashes([recover.instructions])
            key = sha256_of_json([wanted.key, point, hashes, _how_read(run, sources)])
            known = read_json(self._path) if self._path.exists() else {}
            if key not in known:
                self._progress.say(f"  {count:,} questions or texts are looked for in the training data of {workdir}")
                found = self._look(run, point, sources, wanted)
                ids = sorted(set().union(*found.values()), key=lambda id: (len(id), id))
                by_source = {name: len(some) for name, some in found.items() if some}
                known[key] = {"of": count, "found": len(ids), "by_source": by_source, "ids": ids}
                known[key]["too_short"] = wanted.ignored
                write_json(self._path, known)
        except UserError as error:
            return {"of": count, "found": None, "why": str(error)}
        kept: dict[str, Any] = known[key]
        return kept

    def _look(
        self, run: Run, point: str, sources: list[tuple[str, Source, bool]], wanted: EvaluationTexts
    ) -> dict[str, set[str]]:
        """The ids that each source has."""
        found = {}
        for name, source, filtered in sources:
            items = run.inputs.items(source, Collector(source.controls, source.on_bad_rows))
            found[name] = _found(run, wanted, (text_of(item) for item, _ in items), filtered)
        if point == POINTS[-1]:
            section = run.config.recover
            rows = read_jsonl(section.instructions, {}, limit=section.max_instructions)
            # Whole records: a question may be in a conversation, whatever its fields are called.
            texts = (" ".join(_strings(row)) for row in rows)
            found["recover.instructions"] = _found(run, wanted, texts, section.contamination)
        return found


def _how_read(run: Run, sources: list[tuple[str, Source, bool]]) -> list[Any]:
    """How the sources are read, and which text the run left out."""
    recover = run.config.recover
    filters = recover.contamination or any(is_filtered for _, _, is_filtered in sources)
    return [
        [[name, source.model_dump(mode="json"), is_filtered] for name, source, is_filtered in sources],
        [recover.max_instructions, recover.contamination],
        run.inputs.evaluation_texts.key if filters else None,
    ]


def _found(run: Run, wanted: EvaluationTexts, texts: Iterable[str], filtered: bool) -> set[str]:
    """The ids of the questions in some texts. filtered: the run left out those with evaluation texts of its own."""
    ids: set[str] = set()
    for text in texts:
        found = wanted.every_found_in(text)
        if found - ids and not (filtered and run.inputs.evaluation_texts.found_in(text) is not None):
            ids |= found
    return ids


def _sources(run: Run, point: str) -> Iterator[tuple[str, Source, bool]]:
    """What the stages up to a point train on: the config's key, the source, and whether the run left out evaluation
    texts."""
    config = run.config
    for stage in TRAININGS:
        if POINTS.index(stage) <= POINTS.index(point):
            for number, source in enumerate(getattr(config, stage).sources):
                yield f"{stage}.sources.{number}", source, source.cleaning.contamination
    if point == POINTS[-1]:
        yield "transfer.pairs", config.transfer.pairs, config.transfer.contamination


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
