"""The tables of docs/ablation.md are those of bench/ablation.json, from which `ablate --with` goes on."""

from __future__ import annotations

from pathlib import Path

from transllm_jax.ablation.page import page
from transllm_jax.ablation.results import read_found

ROOT = Path(__file__).parents[2]


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and "`)" in line]


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    found = read_found(ROOT / "bench" / "ablation.json")
    told = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    assert rows(told) == rows(page(found, {}, "ablation.svg"))
    assert len(rows(told)) > 10


def test_the_results_name_no_paths_of_a_machine() -> None:
    for one in read_found(ROOT / "bench" / "ablation.json"):
        assert not any(Path(path).is_absolute() for path in one.shared.values()), one.key
