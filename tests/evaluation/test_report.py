"""The report as an HTML page and in the terminal: it shows the results, and the page is one safe file."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from report_sample import QUESTION, Page, sample, section, terminal, text_of, trained
from rich.console import Group

from transllm_jax.evaluation.page.measures import rows, written
from transllm_jax.evaluation.page.plots import validation_plot
from transllm_jax.evaluation.page.report import (
    asked_lines,
    asked_sentence,
    conversation_panel,
    findings_lines,
    render_report,
    summary_table,
    time_sentence,
    write_report,
)


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(sample())


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "img", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "action", "poster"):
                assert (value or "").startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", html)
    assert not re.search(r"https?://", html)
    assert "default-src 'none'" in html


def test_ids_are_unique_and_inner_links_resolve(html: str) -> None:
    """Each matplotlib drawing has the same ids, so each gets a prefix of its own."""
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {
        attributes["href"][1:]
        for _, attributes in page.tags
        if (attributes.get("href") or "").startswith("#") and attributes["href"]
    } | set(re.findall(r"url\(#([^)]+)\)", html))
    wanted |= {str(attributes["aria-labelledby"]) for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert wanted <= set(ids)


def test_every_number_is_shown(html: str) -> None:
    results = sample()
    page = Page(html)
    exact = [attributes["value"] for tag, attributes in page.tags if tag == "data"]
    for row in rows(results):
        for point, value in row.values.items():
            if value is not None:
                assert str(value) in exact
                assert written(value, row.measure.style) in page.text, (row.label, point)
    for text in (
        "134,515,008",
        "11,000,000",
        "2,003",
        "122,880",
        "590.1",
        "3 min 30 s",
        "0.10.2",
        "21 documents",
    ):
        assert text in page.text
    for goal in results["goals"]:
        assert goal["measured"] in page.text and goal["wanted"] in page.text
    for points in results["losses"].values():
        assert f"{points[0]['loss']:.3f} at step 1" in page.text
        assert f"{points[-1]['loss']:.3f} at step {len(points)}" in page.text
    assert html.count("<svg") == 12  # eight measures (two are known at one point only), three losses, one validation


def test_questions_with_known_answers(html: str) -> None:
    sentence = (
        "Asked 120 questions in Thai, the original answers 0 rightly, this model 84. Asked 110 of them in English, the "
        "original answers 91 rightly, this model 89."
    )
    assert sentence in html[: html.index("</header>")]
    asked = section(html, "asked")
    text = text_of(asked)
    assert "asked understood English right Thai right no whole chain misread English wrong mistranslated" in text
    assert "capital 100 80 75 79 5 7 5 4" in text and "sum 20 4 4 5 0 15 0 0" in text
    assert "all 120 84 79 84 5 22 5 4" in text
    assert "answered: right" in text and "answered: wrong , no whole chain" in text.replace("wrong,", "wrong ,")
    assert "asked before: เมืองหลวงของประเทศเปรูคือเมืองอะไร" in text and "Accepted: โตเกียว, กรุงโตเกียว" in text
    assert "it answered rightly: Tokyo is the capital." in text
    # Texts of models and files may run from right to left.
    for content in ("โตเกียว", "กรุงลิมา", "What is the capital of Japan?", "ภาษาอังกฤษ"):
        assert re.search(rf'dir="auto">{re.escape(content)}<', asked), content


def test_questions_in_the_terminal() -> None:
    printed = terminal(Group(*asked_lines(sample())), width=120)
    assert "Asked 120 questions in Thai, the original answers 0 rightly, this model 84." in printed
    assert re.search(r"all +120 +84 +79 +84 +5 +22 +5 +4", printed)
    panel = terminal(conversation_panel(sample(), 1, asked=True))
    assert "Wrong answer" in panel and "ภาษาอังกฤษ" in panel and "Conversation 2 of 2" in panel
    assert "Right answer" in terminal(conversation_panel(sample(), asked=True))
    assert list(asked_lines({**sample(), "asked": None})) == []


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({}, ""),
        ({"base": {"": {"asked": 0}}}, ""),
        (
            {"base": {"a": {"asked": 1, "right": 1, "asked_in_english": 0}}},
            "Asked 1 question in Thai, the original answers 1 rightly.",
        ),
        (
            {
                point: {"a": {"asked": 2, "right": n, "asked_in_english": 2, "right_in_english": 2 - n}}
                for n, point in enumerate(("base", "vocabulary", "pretrain"))
            },
            "Asked 2 questions in Thai, the original answers 0 rightly, the model after pretrain 2. Asked in English, "
            "the original answers 2 rightly, the model after pretrain 0.",
        ),
    ],
)
def test_the_sentence_about_questions(counts: dict[str, Any], sentence: str) -> None:
    assert asked_sentence(counts, "Thai") == sentence


def test_plots_have_text_and_the_colours_of_the_page(html: str) -> None:
    drawing = html[html.index("<svg") : html.index("</svg>")]
    assert re.search(r"<text[^>]*>1\.183</text>", drawing)
    assert "<style" not in drawing and "var(--ink)" in drawing and "var(--font)" in drawing and "DejaVu" not in html
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", html)  # all placeholder colours were replaced


def test_output_of_a_model_is_escaped(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;EN&gt; How can I sleep better? &lt;RESPONSE&gt;" in html
    page = Page(html)
    assert "<EN> How can I sleep better?" in page.text  # a reader sees it unescaped
    assert not {"en", "th", "response", "here"} & {tag for tag, _ in page.tags} - {"th"}
    for place in ("title", "config"):
        results = sample()
        results[place] = "<b onclick=x>&\x1b[31m"
        written_html = render_report(results)
        assert "<b onclick" not in written_html and "\x1b" not in written_html


def test_text_is_marked_with_its_language(html: str) -> None:
    assert f'lang="th" dir="auto">{QUESTION}' in html
    assert 'lang="th" dir="auto">เมืองเมือง' in html  # the original model's answer, where it is in Thai
    assert 'lang="" dir="auto">I&#39;m sorry' in html


def test_unmet_goals_come_first(html: str) -> None:
    text = re.sub(r"\s+", " ", Page(html[html.index("<body") :]).text)
    assert "Five of six goals were met; one was not." in text
    unmet = text.index("not met Well-formed chains at least 90 % 87.5 %")
    assert unmet < text.index("met Thai bits per byte at least 20 %") < text.index("Before and after")
    assert text.index("21.3 % fewer than with the original model (1.532)") < unmet


def test_what_to_do_next_is_near_the_top(html: str) -> None:
    text = text_of(section(html, "next"))
    assert html.index('id="goals"') < html.index('id="next"') < html.index('id="measures"')
    assert "docs/reading-a-run.md has a section on each" in text
    assert "Chains do not end transfer 3 of 22 answers were cut off after 160 tokens. If they were still" in text
    assert "evaluation.max_chain_tokens now 160 transfer.sources Time goes elsewhere pretrain 22 %" in text


def test_findings_in_the_terminal() -> None:
    printed = terminal(findings_lines(sample()["findings"]))
    assert [line.rstrip() for line in printed.splitlines()] == [
        "What to do next  docs/reading-a-run.md has a section on each",
        "1 Chains do not end (transfer). 3 of 22 answers were cut off after 160 tokens.",
        "  → If they were still making sense, raise the limit. evaluation.max_chain_tokens (160),",
        "  transfer.sources",
        "2 Time goes elsewhere (pretrain). 22 % of the stage's time went into compiling.",
        "  → Keep compiled programs.",
    ]
    assert findings_lines([]) is None
    odd = findings_lines([{"topic": "[red]x", "what": "\x1b[31m", "keys": {"a[b]": 0.001}}])
    assert "[red]x" in terminal(odd) and "\x1b" not in terminal(odd) and "a[b] (0.001)" in terminal(odd)


def test_the_same_results_give_the_same_bytes(html: str) -> None:
    assert render_report(sample()) == html


def test_contrast_meets_wcag_aa(html: str) -> None:
    """WCAG 2 AA asks for 4.5 to 1, for each text colour on each of its backgrounds, in light and in dark mode."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    blocks = re.findall(r":root \{(.*?)\}", html, flags=re.S)
    assert len(blocks) == 2
    pairs = "ink/page muted/page accent/page good/page bad/page warn/page page/accent "
    pairs += "bad/bad-tint muted/bad-tint ink/bad-tint muted/tint ink/tint ink/card"
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for pair in pairs.split():
            low, high = sorted(luminance(colours[name]) for name in pair.split("/"))
            assert (high + 0.05) / (low + 0.05) >= 4.5, pair


def test_where_the_time_went(html: str) -> None:
    times = section(html, "times")
    text = re.sub(r"\s+", " ", Page(times.replace("</th>", " </th>")).text)
    assert "The run trained 83 % of 59 min 57 s; 4 min 4 s lost to 2 restarts." in text
    table = text[text.index("Stage") :]
    assert table.startswith(
        "Stage training steps compiling starting waiting for data saving validation other work lost to restarts all"
    )
    # The rows of the stages, in the order of the columns; a stage that took no time has no row.
    assert "pretrain 25 min 0 s 31 s 14 s 2.2 s 6.5 s 41 s – 4 min 4 s 30 min 39 s translate" in table
    assert table.rstrip().endswith("between stages – – 9.2 s – – – 1.5 s – 11 s")
    assert "report" not in table and "then redone" not in text
    # The bar of the longest stage is as wide as the page, and the parts of a bar fill it.
    bars = re.findall(r'<span style="width: ([\d.]+)%">(.*?)</span>', times)
    assert [float(width) for width, _ in bars] == [0.46, 3.59, 100.0, 51.34, 5.47, 34.18, 0.58]
    for _, parts in bars:
        assert abs(sum(map(float, re.findall(r'style="width: ([\d.]+)%"', parts))) - 100) < 0.05  # rounded, 8 parts
    assert re.search(r'<i class="lost" style="width: 13\.27%" title="lost to restarts: 4 min 4 s">', bars[2][1])


def test_what_was_trained_on(html: str) -> None:
    text = text_of(section(html, "data"))
    assert "Source items tokens rows padded epochs pretrain 1 news.txt" in text
    left_out = "left out: 12 too short, 3 contaminated, 1,204 exact duplicates, 37 near duplicates"
    assert f"1 news.txt {left_out} 21,408 1,974,211 3,871 0.4 % 0.03 2 english.txt nothing left out 300" in text
    # Text that the run itself made has no items, and nothing was left out of it.
    assert "transfer chains – 98,104 412 7 % 0.58 3 talks.jsonl left out: 4 longer than a row; 21 cut at a turn" in text
    assert "translate" not in text


def test_the_validation_plot_is_below_the_loss_and_marks_the_best_step(html: str) -> None:
    training = section(html, "training")
    curves = training.split('<div class="curve">')[1:]
    assert [curve.count("<svg") for curve in curves] == [2, 1, 1]
    text = text_of(curves[0])
    assert text.index("Loss of pretrain") < text.index("Validation, bits per byte best 1.200 at step 80, 1.300 at step")
    assert 'aria-label="Validation of pretrain: 1.300 bits per byte at step 120, best 1.200 at step 80"' in curves[0]

    def drawing(best: int | None, records: Any) -> str | None:
        found = validation_plot("pretrain", records, best, sample()["losses"]["pretrain"])
        return None if found is None else str(found)

    records = trained()["pretrain"]["validation"]
    ring, other, without = drawing(80, records), drawing(40, records), drawing(None, records)
    assert ring is not None and other is not None and without is not None
    # The ring is an additional marker at its step; the lines do not change.
    markers = [
        re.findall(r'<use[^>]* x="([\d.]+)" y="([\d.]+)" style="[^"]*--ink', text) for text in (ring, other, without)
    ]
    assert [len(found) for found in markers] == [1, 1, 0] and markers[0] != markers[1]
    assert "best" not in without.split(">")[0]
    # An unknown step is not marked, and values that are missing or not finite are not drawn.
    assert drawing(33, records) == without
    assert drawing(80, [*records, {"step": 60, "bits_per_byte": None}, {"step": 70}]) == ring
    assert drawing(2, []) is None and drawing(2, [{"step": 2, "bits_per_byte": math.nan}]) is None


def test_skipped_updates_are_counted_with_their_texts(html: str) -> None:
    text = text_of(section(html, "training"))
    assert "pretrain skipped 4 updates : the loss or its gradient was not finite. The texts of the first 2" in text
    assert "all are in pretrain/skipped.jsonl." in text
    assert "step 31: loss NaN, gradient norm infinite 1 news.txt: data/news.txt:104 data/news.txt:2210 1 news" in text
    assert (
        "step 32: loss 2.5, gradient norm NaN 1 news.txt: data/news.txt:104 data/news.txt:2210 and 6 more rows" in text
    )
    assert "translate skipped" not in text and "transfer skipped" not in text
    results = sample()
    results["trained"]["transfer"] |= {"skipped": 1, "skipped_updates": [{"step": 3, "rows": ["x" * 1000]}]}
    text = text_of(section(render_report(results), "training"))
    assert "transfer skipped 1 update :" in text and "The texts of these are listed here" in text
    assert "step 3: loss not measured" in text and "x" * 200 in text and "x" * 300 not in text


def test_the_page_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "report.html"
    write_report(json.loads(json.dumps(sample())), path)
    first = path.read_bytes()
    assert first.decode("utf-8").startswith("<!doctype html>") and first.rstrip().endswith(b"</html>")

    results = sample()
    results["title"] = "another"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_report(results, path)
    assert path.read_bytes() == first
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
    write_report(results, path)
    assert b"another" in path.read_bytes()


def test_summary_table() -> None:
    text = terminal(summary_table(sample()))
    line = next(line for line in text.splitlines() if "Thai bits/byte" in line)
    for part in ("↓", "1.532", "1.632", "1.183", "1.191", "1.206", "−21.3 %"):
        assert part in line
    assert next(line for line in text.splitlines() if "Well-formed chains" in line).count("–") == 3
    assert "87.5 %" in text and "original" in text and "transfer" in text
    assert "English drift, KL: change since translate" in text
    narrow = terminal(summary_table(sample()), width=80)
    assert "…" not in narrow and len(narrow.splitlines()) == len(text.splitlines())


def test_conversation_panel() -> None:
    results = sample()
    text = terminal(conversation_panel(results))
    places = [text.index(piece) for piece in (QUESTION, "How can I sleep better?", "Go to bed", "ลองเข้านอน")]
    assert places == sorted(places)
    results["conversations"][1]["raw"] = "[red]x[/red] [INST] \x1b[2J"
    broken = terminal(conversation_panel(results, 1))
    assert "not well formed" in broken and "[red]x[/red] [INST]" in broken and "\x1b" not in broken
    assert "not measured" in terminal(conversation_panel(results, 7))


@pytest.mark.parametrize(
    ("trained", "lost", "restarts", "sentence"),
    [
        (0.83, 240.0, 2, "trained 83 % of 2 h 10 min; 4 min 0 s lost to 2 restarts"),
        (0.8349, 0.0, 1, "trained 83 % of 2 h 10 min; nothing lost to 1 restart"),
        (0.9996, 0.0, 0, "trained 99.96 % of 2 h 10 min"),
        (0.0, 0.0, 0, "trained 0 % of 2 h 10 min"),
        (0.0004, 0.0, 0, "trained 0.04 % of 2 h 10 min"),
    ],
)
def test_the_sentence_about_time(trained: float, lost: float, restarts: int, sentence: str) -> None:
    counted = {"total": 7800.0, "trained": trained, "lost": lost, "restarts": restarts}
    assert time_sentence(counted) == sentence
