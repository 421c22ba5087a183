"""The page on `/`, in a real browser without a window, against a server that answers from a script."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from page_server import Reply, Server, serving

from transllm_jax.serving.page import page, policy

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
QUESTION = "ผึ้งผลิตอะไร"
THAI = Reply("ผึ้งทำน้ำผึ้ง", "What do bees make?", "Bees make honey.")
DELTAS = list(THAI.deltas())
# Deltas before the last of the English steps, and after the first of the answer.
IN_ENGLISH = sum("content" not in delta for delta in DELTAS) - 1
IN_THAI = IN_ENGLISH + 2


# ---------------------------------------------------------------- without a browser


def test_only_the_script_and_the_style_of_the_file_may_run() -> None:
    html, headers = page().html.decode(), page().headers
    assert headers["Content-Security-Policy"] == policy(html)
    assert "default-src 'none'" in policy(html) and "unsafe" not in policy(html)
    assert policy(html.replace("</script>", " </script>")) != policy(html)
    # What the policy would refuse in silence.
    assert not re.search(r"<[^>]*\s(style|on\w+)=", re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL))
    assert "innerHTML" not in html and "insertAdjacentHTML" not in html and "document.write" not in html


def test_the_page_names_no_other_address() -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^'\"\s]*", page().html.decode()))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a format, which is not fetched


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_stands_out(theme: int) -> None:
    """Contrast of at least 4.5 (WCAG 2.2, 1.4.3), and of 3 for the edges of fields (1.4.11)."""
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", page().html.decode())
    colours = {name: pair[theme] for name, *pair in found}

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(first: str, second: str) -> float:
        low, high = sorted((luminance(colours[first]), luminance(colours[second])))
        return (high + 0.05) / (low + 0.05)

    for ink in ("ink", "muted", "accent"):
        for ground in ("page", "card", "tint", "code"):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
    for ink, ground in (("on-accent", "accent"), ("bad", "bad-tint"), ("ink", "bad-tint")):
        assert contrast(ink, ground) >= 4.5, (ink, ground)
    assert contrast("edge", "card") >= 3 and contrast("edge", "page") >= 3


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(one_server: Server) -> Server:
    fresh = Server()
    for name in ("reply", "key", "bodies", "gone", "released"):
        setattr(one_server, name, getattr(fresh, name))
    one_server.models = [
        {"id": "demo", "object": "model", "language": "th"},
        {"id": "demo-original", "object": "model", "language": "th"},
    ]
    return one_server


@pytest.fixture
def opened(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page. At the end, no script failed, nothing but what the server refused was complained of, and no
    request left this machine."""
    contexts, wrong = [], []

    def complaint(message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            wrong.append(message.text)

    def sent(request: Any) -> None:
        if not request.url.startswith("data:") and urlsplit(request.url).hostname != "127.0.0.1":
            wrong.append(request.url)

    def open_page(width: int = 1200, height: int = 800, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(30_000)  # on a machine that is busy
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", complaint)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", sent)
        tab.goto(server.url)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def ask(tab: Any, question: str, *, wait: bool = True) -> Any:
    """Type a question and send it; gives the answers' elements of its turn."""
    turns = tab.locator(".turn").count()
    tab.get_by_label("Your question").fill(question)
    tab.keyboard.press("Enter")
    turn = tab.locator(".turn").nth(turns)
    turn.wait_for()
    if wait:
        tab.locator(".answer[aria-busy=true]").first.wait_for(state="detached")
        tab.get_by_role("button", name="Send").wait_for()
    return turn.locator(".answer")


def eventually(read: Callable[[], object], wanted: object, *, seconds: float = 30) -> None:
    """What is read is as it should be, now or soon."""
    end = time.monotonic() + seconds
    while (found := read()) != wanted and time.monotonic() < end:
        time.sleep(0.02)
    assert found == wanted


def no_overflow(tab: Any) -> bool:
    return bool(tab.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_type_stream_unfold(opened: Callable[..., Any], server: Server) -> None:
    server.reply = lambda body: replace(THAI, hold=IN_ENGLISH)
    tab = opened()
    tab.get_by_role("heading", name="Ask in Thai").wait_for()
    tab.keyboard.type(QUESTION)  # the field has the focus
    tab.keyboard.press("Enter")
    answer = tab.locator(".answer")
    # While the server waits, what has come is there.
    answer.get_by_text("Answering in English").wait_for()
    assert answer.get_attribute("aria-busy") == "true" and tab.get_by_role("button", name="Stop").is_visible()
    server.release()
    answer.get_by_text(THAI.answer).wait_for()
    tab.get_by_role("button", name="Send").wait_for()
    assert answer.get_attribute("aria-busy") == "false"
    # The English steps are folded, with the question as it was understood beside their title.
    steps = answer.locator("details")
    assert not steps.get_by_role("term").first.is_visible()
    steps.get_by_text("English steps").click()
    assert steps.locator("dd:visible").all_inner_texts() == [THAI.question_en, THAI.answer_en]
    assert f"{len(DELTAS)} tokens" in answer.inner_text()
    # What a screen reader says, once, and in which language.
    status = tab.get_by_role("status").locator("span")
    assert status.inner_text() == THAI.answer and status.get_attribute("lang") == "th"
    (body,) = server.bodies
    assert body["model"] == "demo" and body["stream"] and body["stream_options"] == {"include_usage": True}
    assert not {"temperature", "max_tokens"} & set(body)


def test_the_next_question_carries_the_english_steps(opened: Callable[..., Any], server: Server) -> None:
    server.reply = lambda body: THAI
    tab = opened()
    ask(tab, QUESTION)
    ask(tab, "ทำไม")
    first, answer, second = server.bodies[1]["messages"]
    assert (first["content"], second["content"], answer["content"]) == (QUESTION, "ทำไม", THAI.answer)
    assert answer["reasoning_content"] == "Question: What do bees make?\n\nAnswer: Bees make honey."


def test_stop(opened: Callable[..., Any], server: Server) -> None:
    server.reply = lambda body: replace(THAI, hold=IN_THAI)
    tab = opened()
    answer = ask(tab, QUESTION, wait=False)
    answer.get_by_text("ผึ้ง").wait_for()
    tab.get_by_role("button", name="Stop").click()
    answer.get_by_text("You stopped this answer.").wait_for()
    ask(tab, QUESTION, wait=False).get_by_text("ผึ้ง").wait_for()
    tab.keyboard.press("Escape")
    tab.get_by_role("button", name="Send").wait_for()
    eventually(lambda: server.gone, 2)  # the server saw that nobody waits
    server.release()
    tab.locator(".answer").last.get_by_role("button", name="Ask again").click()
    tab.locator(".answer").last.get_by_text(THAI.answer).wait_for()
    assert tab.get_by_text("You stopped this answer.").count() == 1


def test_the_conversation_survives_a_reload(opened: Callable[..., Any], server: Server) -> None:
    server.reply = lambda body: THAI
    tab = opened()
    ask(tab, QUESTION)
    server.reply = lambda body: replace(THAI, hold=IN_THAI)
    ask(tab, "ทำไม", wait=False).get_by_text("ผึ้ง").wait_for()
    tab.get_by_label("Your question").fill("half a question")
    tab.reload()
    tab.get_by_text("The page was reloaded before this answer was complete.").wait_for()
    assert tab.locator(".question").all_inner_texts() == [QUESTION, "ทำไม"]
    assert tab.get_by_label("Your question").input_value() == "half a question"
    # It goes on where it was, with the English steps of before.
    server.release()
    ask(tab, "ที่ไหน")
    assert [message["content"] for message in server.bodies[-1]["messages"][::2]] == [QUESTION, "ทำไม", "ที่ไหน"]
    assert server.bodies[-1]["messages"][1]["reasoning_content"]
    tab.get_by_role("button", name="New conversation").click()
    tab.reload()
    tab.get_by_role("heading", name="Ask in Thai").wait_for()
    assert not tab.locator(".turn").count()
    # A new conversation that was not meant.
    ask(tab, QUESTION)
    tab.get_by_role("button", name="New conversation").click()
    tab.get_by_role("button", name="Bring the last conversation back").click()
    assert tab.locator(".question").all_inner_texts() == [QUESTION]


def test_side_by_side(opened: Callable[..., Any], server: Server) -> None:
    server.reply = lambda body: THAI if body["model"] == "demo" else Reply("I can’t read that.")
    tab = opened()
    ask(tab, "0")
    tab.get_by_role("radio", name="Side by side").check(force=True)
    ask(tab, QUESTION)
    answers = ask(tab, "ทำไม")
    assert [answers.nth(at).locator("h3").inner_text() for at in (0, 1)] == ["Transferred", "Original"]
    assert answers.nth(1).locator("details").is_hidden()
    # Each goes on from its own answers, and from the other's where it gave none.
    said = [[message["content"] for message in server.asked(name)[-1][1::2]] for name in ("demo", "demo-original")]
    assert said == [[THAI.answer] * 2, [THAI.answer, "I can’t read that."]]
    left, right = (answers.nth(at).bounding_box() for at in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    tab.set_viewport_size({"width": 360, "height": 740})
    left, right = (answers.nth(at).bounding_box() for at in (0, 1))
    assert left["x"] == right["x"] and left["y"] + left["height"] <= right["y"] and no_overflow(tab)
    # The choice is kept. Original alone says so.
    tab.reload()
    assert tab.get_by_role("radio", name="Side by side").is_checked()
    tab.get_by_role("radio", name="Original").check(force=True)
    assert ask(tab, QUESTION).locator("h3").inner_text() == "Original"


FAULTS = {
    "busy": (
        Reply(status=429, error={"message": "The queue is full."}, headers={"Retry-After": "5"}),
        "Try again in 5",
    ),
    "large": (Reply(status=413, error={"message": "The body is over 1 MB."}), "over 1 MB"),
    "broken": (Reply(status=500, error={"message": "The engine failed."}), "The engine failed."),
    "in the stream": (replace(THAI, hold=IN_THAI, fail=IN_THAI, error={"message": "Out of memory."}), "Out of memory."),
    "dropped": (replace(THAI, hold=IN_THAI, drop=IN_THAI), "lost in the middle"),
}


def test_errors_say_what_the_server_says(opened: Callable[..., Any], server: Server) -> None:
    tab = opened()
    for fault, (reply, said) in FAULTS.items():
        server.reply = lambda body, reply=reply: reply
        server.released.clear()
        answer = ask(tab, fault, wait=False)
        if reply.hold:
            answer.get_by_text("ผึ้ง").wait_for()
            server.release()
        alert = answer.get_by_role("alert")
        alert.wait_for()
        assert said in alert.inner_text()
        # What had come stays.
        assert answer.get_by_text("ผึ้ง").is_visible() == bool(reply.hold)
        server.reply = lambda body: THAI
        if fault == "large":
            alert.get_by_role("button", name="Change the question").click()
            assert tab.get_by_label("Your question").input_value() == fault and tab.locator(".question").count() == 1
        else:
            alert.get_by_role("button", name="Try again").click()
            answer.get_by_text(THAI.answer).wait_for()
            assert not alert.count()


def test_a_full_context(opened: Callable[..., Any], server: Server) -> None:
    full = Reply(status=400, error={"message": "4,100 tokens; 2,048 fit.", "code": "context_length_exceeded"})
    server.reply = lambda body: full if len(body["messages"]) > 3 else THAI
    tab = opened()
    for question in ("1", "2"):
        ask(tab, question)
    answer = ask(tab, "3")
    assert "4,100 tokens" in answer.get_by_role("alert").inner_text()
    answer.get_by_role("button", name="Forget the oldest turns and ask again").click()
    tab.locator(".answer").last.get_by_text(THAI.answer).wait_for()
    assert [message["content"] for message in server.bodies[-1]["messages"][::2]] == ["2", "3"]
    assert tab.locator(".turn", has_text="no longer sees").locator(".question").inner_text() == "2"


def test_what_failed_in_both_columns_is_asked_again_in_both(opened: Callable[..., Any], server: Server) -> None:
    server.reply = lambda body: Reply(status=429, error={"message": "The queue is full."})
    tab = opened()
    tab.get_by_role("radio", name="Side by side").check(force=True)
    answers = ask(tab, QUESTION)
    server.reply = lambda body: THAI
    answers.nth(1).get_by_role("button", name="Try again").click()
    eventually(lambda: answers.get_by_text(THAI.answer).count(), 2)
    assert not tab.get_by_role("alert").count() and len(server.bodies) == 4


def test_no_server_then_a_key(opened: Callable[..., Any], server: Server) -> None:
    tab = opened()
    tab.get_by_role("heading", name="Ask in Thai").wait_for()
    tab.route("**/v1/**", lambda route: route.abort())
    assert "does not answer" in ask(tab, QUESTION).get_by_role("alert").inner_text()
    tab.unroute("**/v1/**")
    server.key = "secret"
    tab.get_by_role("button", name="Try again").click()
    tab.get_by_label("API key (kept until").fill("wrong")
    tab.keyboard.press("Enter")
    tab.locator("#notice").get_by_role("alert").wait_for()
    tab.locator("#notice").get_by_label("API key").fill("secret")
    tab.keyboard.press("Enter")
    tab.get_by_role("heading", name="demo").wait_for()
    ask(tab, "again")
    assert (
        tab.locator(".answer").last.inner_text().startswith("to again")
        or "to again" in tab.locator("main").inner_text()
    )
    stored = tab.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
    assert "secret" not in stored[0] and "secret" in stored[1]


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


def test_an_answer_that_is_cut_off(opened: Callable[..., Any], server: Server) -> None:
    server.reply = lambda body: replace(THAI, finish="length")
    tab = opened()
    assert "the settings can raise it" in ask(tab, QUESTION).inner_text()
    # The script's server counts ten tokens before the answer.
    server.models = [{"id": "demo", "language": "th", "max_model_len": len(DELTAS) + 10}]
    tab.reload()
    tab.get_by_role("heading", name="demo Thai").wait_for()
    assert "fills the model’s context" in ask(tab, QUESTION).inner_text()


def test_keyboard_only(opened: Callable[..., Any], server: Server) -> None:
    server.reply = lambda body: THAI
    tab = opened()
    tab.get_by_role("heading", name="Ask in Thai").wait_for()
    press, focused = (
        tab.keyboard.press,
        lambda: tab.evaluate("document.activeElement.id || document.activeElement.localName"),
    )
    # Shift+Enter begins a line, Enter that chooses a word of an input method does not send.
    tab.keyboard.type("one")
    press("Shift+Enter")
    tab.keyboard.type("two")
    tab.locator("#question").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert not server.bodies
    press("Enter")
    tab.locator(".answer[aria-busy=false]").get_by_text(THAI.answer).wait_for()
    assert server.bodies[0]["messages"][0]["content"] == "one\ntwo" and focused() == "question"
    # Backwards: the answer's Copy, and its English steps.
    press("Shift+Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Copy"
    press("Shift+Tab")
    assert focused() == "summary"
    press("Enter")
    assert tab.locator("details[open]").count() == 1
    press("Shift+Tab")
    assert focused() == "open"
    press("Enter")
    assert tab.get_by_role("dialog", name="Settings").is_visible() and focused() == "temperature"
    tab.keyboard.type("0.5")
    press("Tab")
    tab.keyboard.type("64")
    press("Tab")
    press("Space")
    press("Enter")
    tab.get_by_role("dialog").wait_for(state="hidden")
    assert focused() == "open"
    press("Shift+Tab")
    press("Shift+Tab")
    press("ArrowRight")
    assert tab.get_by_role("radio", name="Original").is_checked()
    press("ArrowLeft")
    # A link at the top leads to the field.
    tab.get_by_text("Skip to the question").focus()
    press("Enter")
    tab.keyboard.type("again")
    press("Enter")
    tab.locator(".answer[aria-busy=false]").nth(1).get_by_text(THAI.answer).wait_for()
    body = server.bodies[-1]
    assert (body["temperature"], body["max_tokens"], body["messages"][-1]["content"]) == (0.5, 64, "again")
    assert tab.locator("details[open]").count() == 2


def test_a_model_that_repeats_itself_does_not_hang_the_page(opened: Callable[..., Any], server: Server) -> None:
    tab = opened()
    for mark in ("`", "*", "**a ", "`a``", "_a", "# ", "- ", "```a\n"):
        text = mark * (12000 // len(mark))
        server.reply = lambda body, text=text: Reply(text, piece=4000)
        started = time.monotonic()
        ask(tab, "q")
        assert time.monotonic() - started < 20, mark  # a second or two; some regular expressions need hours
        tab.get_by_role("button", name="New conversation").click()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone(opened: Callable[..., Any], server: Server, theme: str) -> None:
    wide = f"{'x' * 300}\n\n```\n{'y' * 300}\n```\n\n- {'ก' * 200}"
    server.reply = lambda body: Reply(wide, "q" * 200, "a" * 200)
    tab = opened(360, 740, is_mobile=True, has_touch=True, color_scheme=theme, reduced_motion="reduce")
    tab.get_by_role("heading", name="Ask in Thai").wait_for()
    assert no_overflow(tab)
    tab.get_by_label("Your question").fill("z" * 200)
    tab.keyboard.press("Enter")  # a new line there
    assert not server.bodies
    tab.get_by_role("button", name="Send").tap()
    tab.locator(".answer[aria-busy=false] .foot").wait_for()
    tab.get_by_text("English steps", exact=True).tap()
    assert no_overflow(tab)
    assert tab.evaluate("getComputedStyle(document.querySelector('textarea')).fontSize") >= "16px"
    # Each control has a name, and is large enough for a finger (24 pixels at least; WCAG 2.2, 2.5.8).
    tab.get_by_role("button", name="Settings").tap()
    assert no_overflow(tab)
    snapshot = tab.locator("body").aria_snapshot()
    assert not re.findall(
        r"- (?:button|textbox|radio|checkbox|combobox|spinbutton)(?: \[.*\])?:?$", snapshot, re.MULTILINE
    )
    for control in tab.locator("button:visible, input:visible, select:visible, summary:visible").all():
        box = control.bounding_box()
        assert min(box["width"], box["height"]) >= 22, control.evaluate("node => node.outerHTML")
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(251, 250, 247)", "dark": "rgb(21, 23, 26)"}[theme]
    # The theme of the settings wins.
    tab.get_by_label("Colours").select_option({"light": "dark", "dark": "light"}[theme])
    tab.get_by_role("button", name="Save").tap()
    other = {"rgb(251, 250, 247)": "rgb(21, 23, 26)", "rgb(21, 23, 26)": "rgb(251, 250, 247)"}[ground]
    eventually(lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor"), other)
    assert "animation" not in json.dumps(tab.evaluate("document.getAnimations().map(String)"))


def test_a_server_with_one_model(opened: Callable[..., Any], server: Server) -> None:
    server.models = [{"id": "my/model"}]
    tab = opened()
    tab.get_by_role("heading", name="Ask something").wait_for()
    assert tab.title() == "my/model – transllm" and tab.locator("#who").is_hidden()
    assert ask(tab, "q").locator("> .text").inner_text() == "to q"
    assert server.bodies[0]["model"] == "my/model"
