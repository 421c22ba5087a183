"""Suite `perplexity`: bits per byte of texts in the target language and in English.

Bits per byte can be compared between tokenizers; perplexity per token cannot. It needs the model's weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import Reading, shards
from transllm_jax.data.read.sources import read_pairs
from transllm_jax.disk import sha256_of
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.documents import measured_documents, ratio_in
from transllm_jax.evaluation.suites.measure import measured
from transllm_jax.evaluation.suites.results import Results
from transllm_jax.evaluation.suites.suite_run import SuiteOptions, SuiteRun
from transllm_jax.evaluation.systems.local import LocalSystem
from transllm_jax.evaluation.systems.system import System

TARGET, ENGLISH = "target", "english"
MEASURES = (
    ratio_in("bits per byte", "bits", "bytes", TARGET),
    ratio_in("bits per byte of English", "bits", "bytes", ENGLISH),
    ratio_in("tokens per character", "tokens", "characters", TARGET),
    ratio_in("tokens per character of English", "tokens", "characters", ENGLISH),
)


def check(options: SuiteOptions) -> None:
    """Raises UserError if there is no text, or a file is wrong."""
    if not documents(options):
        raise UserError("the suite perplexity needs text; give --text FILE, or --english-text FILE, or both")


def check_system(system: System) -> None:
    """Raises UserError for a system without weights."""
    require_weights(system, "perplexity")


def require_weights(system: System, suite: str) -> LocalSystem:
    """The system as a local model. Raises UserError if it is none."""
    if not isinstance(system, LocalSystem):
        raise UserError(
            f"the suite {suite} needs a model's weights, which {system.name} does not show; give a work directory or "
            "a model directory, or leave the suite out"
        )
    return system


def documents(options: SuiteOptions) -> dict[str, str]:
    """The texts by id: those in the target language, then those in English."""
    return {**texts_of(options.text, TARGET, options.limit), **english_documents(options)}


def english_documents(options: SuiteOptions) -> dict[str, str]:
    """The texts in English: those that were given, or else the English sides of the pairs."""
    if options.english_text or options.pairs is None:
        return texts_of(options.english_text, ENGLISH, options.limit)
    pairs = read_pairs(str(options.pairs), limit=options.limit)
    return {f"{ENGLISH}/{number}": english for number, (english, _) in enumerate(pairs, 1)}


def texts_of(given: Iterable[Reading], language: str, limit: int | None) -> dict[str, str]:
    """The texts of sources by id; of pairs, the side of the language. limit: of each source."""
    found: dict[str, str] = {}
    for reading in given:
        collector = Collector("remove")
        last = None if limit is None else len(found) + limit
        for shard in shards(reading, sha256_of):
            for item, _ in shard.items(collector):
                if last is not None and len(found) >= last:
                    break
                text = item[language == TARGET] if isinstance(item, tuple) else item
                assert isinstance(text, str)
                found[f"{language}/{len(found) + 1}"] = text
    return found


def run(suite: SuiteRun) -> Results:
    """Measure each text, and keep what was found."""
    system = require_weights(suite.system, suite.suite)
    rows = measured_documents(suite, system, documents(suite.options), "documents.jsonl")
    items = [{**row, "language": row["id"].partition("/")[0], "score": row["bits"] / row["bytes"]} for row in rows]
    found = measured(MEASURES, items)
    main = next(measure for measure in MEASURES if found[measure.name] is not None)
    value = found[main.name]
    return suite.keep(
        items,
        Results(
            suite=suite.suite,
            system=suite.system.name,
            measure=main.name,
            score=value["value"],
            interval=(value["low"], value["high"]),
            asked=len(items),
            parsed=len(items),
            higher_is_better=False,
            more={name: interval for name, interval in found.items() if interval is not None},
            made_with={**suite.made_with, "length": suite.options.length},
        ),
    )
