"""What the page on `/` makes of an answer's text, in a real browser: scripts, directions, markup, English steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import page_browser
from page_browser import ask, eventually, no_overflow
from page_server import Reply, Server

# Fixtures.
browser, one_server = page_browser.browser, page_browser.one_server
server, opened = page_browser.server, page_browser.opened


def test_right_to_left(opened: Callable[..., Any], server: Server) -> None:
    arabic = (
        "عاصمة بيلاروس هي **مينسك**.\n\n1. النهر: سفيسلاتش (Svislach)\n2. الأمر `print(1)`\n\n```\nx = 1\n```\n\nMinsk."
    )
    server.reply = lambda body: Reply(arabic, "What?", "Minsk.")
    server.models = [{"id": "demo", "language": "ar"}]
    tab = opened(360, 740)
    answer = ask(tab, "ما عاصمة بيلاروس؟")

    def direction(selector: str) -> str:
        return str(answer.locator(selector).first.evaluate("node => getComputedStyle(node).direction"))

    assert [direction(part) for part in ("p", "ol", "pre", "li code", ".text > p:last-child")] == [
        *("rtl", "rtl", "ltr", "ltr", "ltr")
    ]
    assert answer.locator(".text").first.get_attribute("lang") == "ar"
    assert tab.locator(".question").get_attribute("lang") == "ar" and direction("dd") == "ltr"
    # The numbers of the list are inside of the page, on the right.
    item, answer_box = answer.locator("li").first.bounding_box(), answer.bounding_box()
    assert item["x"] + item["width"] < answer_box["x"] + answer_box["width"] - 10 and no_overflow(tab)
    field = tab.get_by_label("Your question")
    field.fill("ما")
    assert field.evaluate("node => getComputedStyle(node).direction") == "rtl"


SCRIPTS = {
    "th": "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทยเป็นศูนย์กลางการปกครองการศึกษาการคมนาคมขนส่ง",
    "hi": "इटली की राजधानी रोम है और यह शहर टाइबर नदी के किनारे बसा है",
    "am": "የቡልጋሪያ ዋና ከተማ ሶፊያ ነው። ከተማዋ በቪቶሻ ተራራ ግርጌ ትገኛለች",
    "vi": "Thủ đô của Áo là Viên, một thành phố nằm bên bờ sông Đa-nuýp",
}


def test_scripts(opened: Callable[..., Any], server: Server) -> None:
    tab = opened(360, 740)
    for code, text in SCRIPTS.items():
        server.reply = lambda body, text=text: Reply(text)
        server.models = [{"id": "demo", "language": code}]
        tab.reload()
        tab.locator(f"#examples button[lang={code}]").first.click()
        answer = tab.locator(".answer[aria-busy=false] .text").first
        answer.locator("p").wait_for()
        assert answer.get_attribute("lang") == code and no_overflow(tab)
        # Several lines, each of the page's width, also without spaces.
        lines = answer.locator("p").evaluate(
            "p => { const range = document.createRange(); range.selectNodeContents(p);"
            " return [...range.getClientRects()].filter(r => r.width > 1).map(r => r.width) }"
        )
        assert len(lines) > 1 and all(width > 200 for width in lines[:-1]), code
        tab.get_by_role("button", name="New conversation").click()


def test_an_answer_never_becomes_markup(opened: Callable[..., Any], server: Server) -> None:
    text = (
        "# Title\n\nOne **bold _both_ ends**, a_b_c, 2 * 3 * 4, `<b>` and <img src=x onerror=alert(1)>\nnext line\n\n"
        "- first\n  more\n  - inner\n- second\n\n3. three\n4. four\n\n> said\n\n---\n\n"
        "```html\n<script>alert(1)</script>\n\n**no**\n```\n\n[link](javascript:alert(1)) ~~gone~~ \\*star\\*\n\n**open"
    )
    server.reply = lambda body: Reply(text)
    tab = opened()
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = ask(tab, "<b>question</b>")
    body = answer.locator(".text").first
    assert not body.locator("img, script, a, b").count() and tab.locator(".question b").count() == 0
    tags = body.evaluate("node => [...node.children].map(child => child.localName)")
    assert tags == ["h4", "p", "ul", "ol", "blockquote", "hr", "div", "p", "p"]
    paragraphs = body.locator("> p").all_inner_texts()
    assert paragraphs == [
        "One bold both ends, a_b_c, 2 * 3 * 4, <b> and <img src=x onerror=alert(1)>\nnext line",
        "[link](javascript:alert(1)) gone *star*",
        "**open",
    ]
    assert body.locator("strong em").inner_text() == "both" and body.locator("p code").inner_text() == "<b>"
    assert body.locator("> ul > li").all_inner_texts() == ["first\nmore\ninner", "second"]
    assert body.locator("ol").get_attribute("start") == "3"
    code = "<script>alert(1)</script>\n\n**no**"
    assert body.locator("pre").inner_text() == code
    for button, copied in ((body.get_by_role("button", name="Copy"), code), (answer.locator(".foot button"), text)):
        button.click()
        eventually(lambda: tab.evaluate("navigator.clipboard.readText()"), copied)


def test_forms_of_reasoning(opened: Callable[..., Any], server: Server) -> None:
    cases = [
        ("", "<think>\nQuestion: A?\n\nAnswer: B.\n</think>\n\nข", ["A?", "B."]),
        ("I think of bees.", "ข", ["I think of bees."]),
        ("Question: \n\nAnswer: B.\n\nAnswer: C.", "ข", ["B.\n\nAnswer: C."]),
        ("Question: A?", "ข", ["A?"]),
        ("", "ข", []),
    ]

    @dataclass
    class Given(Reply):
        def deltas(self) -> Iterator[dict[str, str]]:
            yield from ({"reasoning": piece} for piece in self.question_en)
            yield from ({"content": piece} for piece in self.answer)

    tab = opened()
    for reasoning, content, steps in cases:
        server.reply = lambda body, given=(content, reasoning): Given(*given)
        answer = ask(tab, "q")
        assert answer.locator("> .text").inner_text() == "ข"
        if steps:
            answer.locator("summary").click()
        assert answer.locator("dd:visible").all_inner_texts() == steps


def test_a_model_that_repeats_itself_does_not_hang_the_page(opened: Callable[..., Any], server: Server) -> None:
    tab = opened()
    for mark in ("`", "*", "**a ", "`a``", "_a", "# ", "- ", "```a\n"):
        text = mark * (12000 // len(mark))
        server.reply = lambda body, text=text: Reply(text, piece=4000)
        started = time.monotonic()
        ask(tab, "q")
        assert time.monotonic() - started < 20, mark  # a second or two; some regular expressions need hours
        tab.get_by_role("button", name="New conversation").click()
