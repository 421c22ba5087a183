"""The page on `/`, in a real browser: a question is asked, stopped, asked again, also without a mouse or on a phone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import page_browser
import pytest
from page_browser import QUESTION, THAI, ask, eventually, no_overflow
from page_server import Reply, Server

# Fixtures.
browser, one_server = page_browser.browser, page_browser.one_server
server, opened = page_browser.server, page_browser.opened

DELTAS = list(THAI.deltas())
# Deltas before the last of the English steps, and after the first of the answer.
IN_ENGLISH = sum("content" not in delta for delta in DELTAS) - 1
IN_THAI = IN_ENGLISH + 2


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
