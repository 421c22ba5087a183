"""The report of other results: HTML in values, missing parts and values, verdicts, and runs of older versions."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_sample import POINTS, QUESTION, Page, sample, section, terminal, text_of

from transllm_jax.evaluation.page import report
from transllm_jax.evaluation.page.measures import percent, rows
from transllm_jax.evaluation.page.plots import validation_plot
from transllm_jax.evaluation.page.report import (
    conversation_panel,
    render_report,
    summary_table,
)
from transllm_jax.evaluation.page.verdict import verdict
from transllm_jax.training.record.ledger import CATEGORIES, Ledger, summarise


def test_html_in_any_value_is_escaped() -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, str):
            return value + "\"'><script>alert(1)</script>"
        if isinstance(value, list):
            return [spoil(item) for item in value]
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return value

    results = spoil(sample())
    results["points"] = [*POINTS, "<script>"]
    results["losses"]["<script>x"] = [{"step": 1, "loss": 1.0}]
    results["metrics"]["<script>{y}"] = {"base": 1.0}
    assert "<script" not in render_report(results)


@pytest.mark.parametrize(
    ("outcomes", "headline"),
    [
        ([], "No goals were checked in this run."),
        ([True], "The goal was met."),
        ([True, True], "Both goals were met."),
        ([True, False, None], "One of three goals was met; one was not, one was not measured."),
        ([False, False], "None of two goals was met; two were not."),
        ([True, True, None], "Two of three goals were met; one was not measured."),
    ],
)
def test_headline(outcomes: list[bool | None], headline: str) -> None:
    assert verdict({"goals": [{"name": "x", "met": outcome} for outcome in outcomes]}).headline == headline


def test_the_verdict_says_when_a_value_got_worse() -> None:
    results = sample()
    results["metrics"]["bits_per_byte"]["transfer"] = 1.8
    results["metrics"]["tokens_per_character"]["transfer"] = None
    sentence = verdict(results).sentences[0]
    assert "1.800 bits per byte, 17.5 % more than with the original model" in sentence
    assert "0.374 tokens per character after translate" in sentence
    change = next(rows(results)).change
    assert change is not None and change.verdict == "worse" and change.text == "+17.5 %"


def test_english_drift_is_compared_with_stage_3() -> None:
    change = next(row for row in rows(sample()) if row.measure.key == "english_kl").change
    assert change is not None and (change.since, change.until) == ("translate", "transfer")
    assert change.text == "−50.7 %" and change.verdict == "better"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "?", True])
def test_a_missing_value_is_shown_as_not_measured(value: Any) -> None:
    results = sample()
    results["metrics"]["bits_per_byte"] = {point: value for point in POINTS}
    row = next(rows(results))
    assert {row.text(point) for point in POINTS} == {"not measured"}
    assert row.change is None and row.last is None
    assert "bits per byte" not in " ".join(verdict(results).sentences)
    page = render_report(results)
    assert page.count("<svg") == 11
    assert not re.search(r">\s*(nan|inf|None|True)\s*<", page)


@pytest.fixture
def plots_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws a plot only once for the same arguments, because drawing takes most of the time of a report."""

    def once(draw: Callable[..., Any]) -> Callable[..., Any]:
        drawn: dict[str, Any] = {}

        def plot(*arguments: Any) -> Any:
            key = repr(arguments)
            if key not in drawn:
                drawn[key] = draw(*arguments)
            return drawn[key]

        return plot

    for name in ("measure_plot", "loss_plot", "validation_plot"):
        monkeypatch.setattr(report, name, once(getattr(report, name)))


def test_each_part_may_be_missing(plots_drawn_once: None) -> None:
    whole = sample()
    for key in whole:
        for gap in ("absent", None):
            results = copy.deepcopy(whole)
            if gap is None:
                results[key] = None
            else:
                del results[key]
            assert "None" not in Page(render_report(results)).text.replace("None were checked", ""), key
            terminal(summary_table(results))
            terminal(conversation_panel(results))
    empty = Page(render_report({})).text
    assert "Conversations: not measured." in empty and "Translations: not measured." in empty
    assert "No goals were checked" in empty and not re.search(r"\d\.\d", empty.split("}\n")[-1])


def test_each_entry_of_a_part_may_be_incomplete() -> None:
    results = sample()
    results["conversations"] = [{"question": QUESTION}, {"chain": {"question_en": "only this"}}]
    results["translations"] = [
        {"english": "a", "target": "b"},
        {"english": "a", "target": "b", "outputs": {}},
    ]
    results["goals"] = [{"name": "Chains", "met": None}]
    results["stages"] = [{"name": "pretrain"}]
    results["losses"] = {
        "pretrain": [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 2.5}],
        "translate": [],
    }
    text = Page(render_report(results)).text
    assert "only this" in text
    assert "1 without a finite loss" in text and "not measured" in text and "nan" not in text


def test_percentages_are_not_rounded_up_to_a_goal() -> None:
    assert percent(0.9) == "90 %" and percent(0.875) == "87.5 %" and percent(1.0) == "100 %"
    assert percent(0.9999) == "99.99 %" and percent(0.0) == "0 %" and percent(0.0001) == "0.01 %"
    assert percent(-0.2134, sign=True) == "−21.3 %" and percent(0.78, sign=True) == "+78.0 %"


def test_times_may_be_missing(plots_drawn_once: None) -> None:
    for counted in ({}, summarise(Path("no such ledger")), None, {"stages": {"pretrain": {"seconds": None}}}):
        results = {**sample(), "ledger": counted}
        assert "Where the time went: not measured." in Page(render_report(results)).text


def test_every_category_of_time_has_a_name_and_a_colour(tmp_path: Path) -> None:
    """Each category of the ledger is a part of a bar."""
    clock = iter(range(1000))
    for forced in (False, True):
        with Ledger(tmp_path / "ledger.jsonl", clock=lambda: float(next(clock))) as book:
            for kind in CATEGORIES:
                with book.stage(kind, anew=forced), book.spend(kind):
                    pass
    counted = summarise(tmp_path / "ledger.jsonl")
    counted["lost"] = counted["stages"]["step"]["lost"] = 1.0
    html = render_report({"ledger": counted})
    kinds = re.findall(r'<li><i class="(\w+)">', section(html, "times"))
    assert set(kinds) == {*CATEGORIES, "lost", "redone"}
    for kind in kinds:
        assert re.search(rf"\bi\.{kind} {{ background: ", html), kind


def test_a_stage_shows_its_speed_memory_and_use_of_the_device() -> None:
    results = sample()
    text = text_of(section(render_report(results), "training"))
    assert "Stage time steps tokens tokens/s peak memory MFU " in text
    assert "3 min 30 s 120 122,880 590.1 3.25 GiB 41.4 % translate 2 min 1 s 80 81,920 677.0 – – " in text
    assert "MFU, model FLOPs utilisation" in text and "Peak memory is" in text
    del results["stages"][1]["memory_bytes"], results["stages"][1]["model_flops_utilisation"]
    older = text_of(section(render_report(results), "training"))
    assert "Stage time steps tokens tokens/s vocabulary" in older and "MFU" not in older and "eak memory" not in older


def test_the_validation_plot_spans_the_steps_of_the_loss() -> None:
    losses = [{"step": step, "loss": 1.0} for step in (1, 400)]

    def ticks(plot: Any) -> list[str]:
        return re.findall(r">(\d+)</text>", str(plot))

    one = [{"step": 100, "bits_per_byte": 1.5}]
    assert "400" in ticks(validation_plot("x", one, 100, losses))
    assert "400" not in ticks(validation_plot("x", one, 100, []))


def test_a_run_without_findings(plots_drawn_once: None) -> None:
    results = sample()
    results["findings"] = []
    assert "show nothing to turn" in text_of(section(render_report(results), "next"))
    # Before there were any.
    del results["findings"]
    assert 'id="next"' not in render_report(results)
    results["findings"] = [{}, {"topic": "Only this"}, None]
    assert "Only this" in section(render_report(results), "next")


def test_an_older_run_has_no_training_data(plots_drawn_once: None) -> None:
    for nothing in ({}, None, {"pretrain": None}, {"pretrain": {"sources": None, "validation": None, "skipped": None}}):
        html = render_report({**sample(), "trained": nothing})
        assert "What was trained on: not measured." in Page(html).text
        assert html.count("<svg") == 11 and "skipped" not in section(html, "training")
    results = {**sample(), "trained": {"pretrain": {"sources": {"a": {}, "b": None}, "skipped_updates": [{}, None]}}}
    text = text_of(section(render_report(results), "data"))
    assert "pretrain a – – – – – b – – – – –" in text and "left out" not in text
