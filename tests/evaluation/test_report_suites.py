"""The report with suites: tables, plots, and the answers of any two systems side by side, without a script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation.report_sample import Page, sample, section, text_of

from transllm_jax.errors import UserError
from transllm_jax.evaluation.page.report import refreshed_report
from transllm_jax.evaluation.page.suites import IN_WORKDIR, collect_suites

SYSTEMS = {"zero": 2, "demo": 30, "bridge": 12}


def keep(workdir: Path, system: str, right: int) -> None:
    place = workdir / IN_WORKDIR / system / "answers"
    place.mkdir(parents=True)
    items: list[dict[str, Any]] = [
        {
            "id": str(number),
            "question": f"คำถาม {number}",
            "visible": f"<b>{system}</b> {number}" if number else "",
            "right": number < right,
            "right_english": None,
            "understood": None,
            "chain_english": None,
            "error": None if number else "a time-out",
        }
        for number in range(40)
    ]
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    results = {"measure": "right", "asked": 40, "parsed": 39, "notes": [], "contamination": None, "made_with": {}}
    (place / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose suites were evaluated by two commands, the last one on two systems."""
    path = tmp_path_factory.mktemp("run")
    for system, right in SYSTEMS.items():
        keep(path, system, right)
    table = {"suites": [{"suite": "answers", "systems": {"zero": {}, "demo": {}}}]}
    (path / IN_WORKDIR / "table.json").write_text(json.dumps(table))
    (path / "evaluation" / "results.json").write_text(json.dumps(sample()))
    (path / "report.html").touch()
    # A suite that was killed, and one that this version does not know.
    for name in ("perplexity", "other"):
        (path / IN_WORKDIR / "demo" / name).mkdir()
    (path / IN_WORKDIR / "demo" / "other" / "items.jsonl").write_text('{"id": "1"}\n')
    refreshed_report(path)
    return path


@pytest.fixture(scope="module")
def page(workdir: Path) -> str:
    return (workdir / "report.html").read_text(encoding="utf-8")


def test_the_tables_have_all_systems_with_intervals_and_differences(page: str) -> None:
    text = text_of(section(page, "suite-answers"))
    assert "System value interval n minus zero" in text
    # Wilson's interval; the difference by hand: 28 / 42 -+ 1.96 sqrt(29 - 28^2 / 42) / 42.
    assert "demo 75 % 59.8 % to 85.8 % 40 +70.0 points +51.7 to +81.7" in text
    assert text.index("zero 5 %") < text.index("demo 75 %") < text.index("bridge 30 %")
    assert "zero: 1 of 40 have no answer or score; they count" in text
    assert 'suite-other"' not in page and 'suite-perplexity"' not in page


def test_the_plot_says_what_it_shows(page: str) -> None:
    labels = [
        attributes.get("aria-label") for tag, attributes in Page(section(page, "suite-answers")).tags if tag == "svg"
    ]
    assert labels == [
        "answers, right: zero 5 % (1.4 % to 16.5 %), demo 75 % (59.8 % to 85.8 %), bridge 30 % (18.1 % to 45.4 %)"
    ]


def test_any_two_systems_can_be_chosen_without_a_script(page: str) -> None:
    part = section(page, "suite-answers")
    tags = Page(part).tags
    inputs = [attributes for tag, attributes in tags if tag == "input"]
    assert [one["aria-label"] for one in inputs if "checked" in one] == ["left: zero", "right: demo"]
    assert len(inputs) == 2 * len(SYSTEMS) and len({one["id"] for one in inputs}) == len(inputs)
    assert not any(tag in ("script", "link", "iframe", "img") for tag, _ in tags) and "http" not in part
    assert part.count('<article class="talk">') == 12 and "12 of 40 questions" in text_of(part)
    assert "&lt;b&gt;demo&lt;/b&gt; 3" in part and "no answer" in text_of(part)
    style = page[page.index("<style>") : page.index("</style>")]
    assert ".left0:checked ~ .talks .left .s0, " in style and ".right2:checked ~ .talks .right .s2" in style


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    for system, right in {"zero": 2, "demo": 30}.items():
        keep(tmp_path, system, right)
    path = tmp_path / IN_WORKDIR / "demo" / "answers" / "items.jsonl"
    path.write_text(path.read_text().replace("\\u0e04\\u0e33", "other "))
    (found,) = collect_suites(tmp_path / IN_WORKDIR)
    assert [row["difference"] for row in found["comparison"]["rows"]] == [None, None]
    assert "zero: 0 of its 40 items ask what demo was asked; the differences are of these" in found["remarks"]
    path.write_text('{"id": "1"\n')
    with pytest.raises(UserError, match=r"items\.jsonl:1 is no item of a suite; remove .*, and evaluate"):
        collect_suites(tmp_path / IN_WORKDIR)


def test_without_suites_nothing_is_shown(tmp_path: Path) -> None:
    assert collect_suites(tmp_path / "nowhere") == [] and refreshed_report(tmp_path) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_shows_what_is_chosen(workdir: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 800}).new_page()
        page.goto(f"file://{workdir}/report.html")

        def shown() -> list[str]:
            return [
                who.split(":")[0] for who in page.locator(".compare .answers .bubble:visible .who").all_inner_texts()
            ]

        assert shown() == ["zero", "demo"] * 12
        page.get_by_label("left: bridge").check()
        assert shown() == ["bridge", "demo"] * 12
        browser.close()
