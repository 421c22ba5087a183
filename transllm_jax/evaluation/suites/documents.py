"""How well a model predicts texts, text by text, in groups: a killed suite goes on with the group that was not done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transllm_jax.disk import sha256_of_json
from transllm_jax.evaluation.likelihood import document_nats
from transllm_jax.evaluation.suites.measure import Measure, ratio_of
from transllm_jax.evaluation.suites.records import open_records
from transllm_jax.evaluation.suites.suite_run import SuiteRun
from transllm_jax.evaluation.systems.local import LocalSystem

# Texts of which the packed rows are computed together; always the same, so that a text's bits do not depend on a stop.
GROUP, ROWS = 64, 4


def measured_documents(
    suite: SuiteRun, system: LocalSystem, documents: Mapping[str, str], name: str
) -> list[dict[str, Any]]:
    """Each text by its id with its `bits`, `bytes`, `characters` and `tokens`.

    name: the file in which the suite keeps them. Raises Preempted.
    """
    ids, length = list(documents), suite.options.length
    settings = {"system": system.identity, "texts": sha256_of_json(dict(documents)), "length": length}
    what = f"{suite.suite} of {suite.system.name}"
    with (
        open_records(suite.directory / name, settings) as records,
        suite.progress.task(what, total=len(ids), done=len(records), unit="text") as bar,
    ):
        for start in range(0, len(ids), GROUP):
            some = ids[start : start + GROUP]
            if all(id in records for id in some):
                continue
            suite.stop(f"{what}: {len(records)} of {len(ids)} texts")
            for record in _group(system, [documents[id] for id in some], length):
                id = some[record.pop("place")]
                if id not in records:
                    records.add({"id": id, **record})
            bar.update(len(records))
        return [{**records[id], "text": documents[id]} for id in ids]


def _group(system: LocalSystem, texts: Sequence[str], length: int) -> list[dict[str, Any]]:
    weights = system.weights
    nats = document_nats(weights.split, weights.tokenizer, texts, length=length, batch_size=ROWS)
    tokens = [len(ids) for ids in weights.tokenizer.encode_batch(texts)]
    return [
        {
            "place": place,
            "bits": found / math.log(2),
            "bytes": len(text.encode()),
            "characters": len(text),
            "tokens": count,
        }
        for place, (text, found, count) in enumerate(zip(texts, nats, tokens, strict=True))
    ]


def ratio_in(name: str, above: str, below: str, language: str) -> Measure:
    """A ratio of sums over the items of a language. Lower is better."""
    whole = ratio_of(name, above, below)
    return Measure(
        name,
        lambda item: whole.parts(item) if item.get("language") == language else None,
        whole.value,
        higher_is_better=False,
    )
