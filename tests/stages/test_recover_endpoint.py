"""Stage `recover` by a server: the same chains as by the run's own engine, resumed, checked and translated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import recover_setup
from openai_server import Fault, Server
from recover_setup import ANSWERS, CHAINS, LIMIT, NEW, Go, Said, teacher

from transllm_jax.config import load_config
from transllm_jax.errors import Preempted, UserError
from transllm_jax.generation.endpoint import Reply
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.hosts.runtime import Peers
from transllm_jax.hosts.site import Site
from transllm_jax.progress import Progress
from transllm_jax.stages import endpoint, endpoint_check, pipeline, recover
from transllm_jax.stages.endpoint_check import CHECK, Ours, compared
from transllm_jax.stages.endpoint_rows import add_translations
from transllm_jax.stages.run import Run
from transllm_jax.storage import Workdir
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Fixtures.
config, translated, own, table = recover_setup.config, recover_setup.translated, recover_setup.own, recover_setup.table
tokenizer, server, go = recover_setup.tokenizer, recover_setup.server, recover_setup.go

KEY = "sk-very-secret-123"
REPLIES = "answers.replies.jsonl"


def test_the_chains_of_a_server_are_those_of_the_own_engine(
    go: Go, server: Server, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    server.delay = 0.02
    said = Said()
    summary = go(teacher(server, ", key: SOME_KEY"), progress=said)
    here = tmp_path / "run" / "recover"
    for name in (ANSWERS, CHAINS, "conversations/chains.jsonl", "conversations/english.jsonl"):
        assert (here / name).read_bytes() == (own / name).read_bytes()
    assert summary["text"].startswith(f"{LIMIT} answers of small at {server.url}, ")
    # The check's first tokens, and then each instruction once, as messages.
    assert len(server.asked) == 2 * LIMIT and sorted(server.asked[LIMIT:]) == sorted(set(server.asked))
    assert all(body["messages"][0]["role"] == "user" and len(body["messages"]) == 1 for body in server.bodies)
    assert {body["max_tokens"] for body in server.bodies} == {NEW}
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert any("10 of 10 answers begin as this model's do" in line for line in said.lines)
    # Wherever something was written, the key was not.
    assert not any(KEY in line for line in said.lines)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_stopped_anywhere_it_goes_on_and_asks_nothing_twice(go: Go, server: Server, own: Path, tmp_path: Path) -> None:
    here = tmp_path / "run" / "recover"
    settings = teacher(server, ", concurrency: 1")
    asked: list[str] = []
    for number in range(30):
        interrupt = Interrupt()
        answered = server.answer

        def answer(body: dict[str, Any], interrupt: Interrupt = interrupt, answered: Any = answered) -> Any:
            if (here / CHECK).exists():
                interrupt.requested = True
            return answered(body)

        server.answer = answer
        try:
            go(settings, interrupt=interrupt)
            break
        except Preempted as stopped:
            assert "answers: stopped, what is done is saved" in str(stopped)
        finally:
            server.answer = answered
        # A killed process leaves a part of a line.
        with (here / REPLIES).open("ab") as file:
            file.write(b'{"id": "answers-0000')
        if number == 0:
            asked = server.asked[:LIMIT]
    assert number > 2 and (here / ANSWERS).read_bytes() == (own / ANSWERS).read_bytes()
    assert (here / CHAINS).read_bytes() == (own / CHAINS).read_bytes()
    # The check was made once. A request that was under way when the run stopped is sent again; an answer is not.
    assert len(asked) == LIMIT
    kept = [json.loads(line)["id"] for line in (here / REPLIES).read_text(encoding="utf-8").splitlines()]
    assert len(set(kept)) == len(kept) == LIMIT
    server.forget()
    go(settings)
    assert server.asked == []


def test_replies_of_another_run_are_not_taken(go: Go, server: Server, tmp_path: Path) -> None:
    go(teacher(server))
    path = tmp_path / "run" / "recover" / REPLIES
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in (b"{}\n", b"[1]\n", b"\0\n", lines[2][:9] + b"\n", lines[0]):
        path.write_bytes(b"".join([*lines[:2], changed, *lines[3:]]))
        before = path.read_bytes()
        with pytest.raises(UserError, match=rf"{REPLIES}:3 is not a reply to a request of this run.*--force recover"):
            go(teacher(server))
        assert path.read_bytes() == before


def test_what_came_before_a_server_failed_is_kept(go: Go, server: Server, own: Path, tmp_path: Path) -> None:
    here = tmp_path / "run" / "recover"
    server.fail = lambda body: Fault(401, {}) if (here / CHECK).exists() and len(server.bodies) > LIMIT + 4 else None
    with pytest.raises(UserError, match="answered 401"):
        go(teacher(server, ", concurrency: 1"))
    assert len((here / REPLIES).read_bytes().splitlines()) == 4
    server.fail = lambda body: None
    server.forget()
    go(teacher(server))
    assert len(server.asked) == LIMIT - 4 and (here / ANSWERS).read_bytes() == (own / ANSWERS).read_bytes()


# The check


def test_other_prompt_tokens_stop_the_run(go: Go, server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    counts = server.tokens

    def refused(more: Callable[[Sequence[Any]], int | None]) -> str:
        server.tokens = lambda messages: more(messages)
        with pytest.raises(UserError) as raised:
            go(teacher(server))
        # Nothing but the check was asked, and nothing was written.
        assert len(server.asked) == LIMIT and not list((tmp_path / "run" / "recover").iterdir())
        server.forget()
        line = str(raised.value)
        assert line.startswith("recover.teacher: ") and "set recover.teacher.check to false" in line
        return line

    line = refused(lambda messages: (counts(messages) or 0) + 1)
    assert "(10 of 10 instructions differ, by +1): most likely it writes a second BOS token" in line
    assert "leaves out the BOS token" in refused(lambda messages: (counts(messages) or 0) - 1)
    assert "another chat template or another default system prompt" in refused(lambda m: (counts(m) or 0) - 17)
    line = refused(lambda messages: (counts(messages) or 0) + len(messages[0]["content"]) % 3)
    assert "by +1 to +2): most likely it has another tokenizer" in line
    assert "does not say how many tokens a prompt has (usage.prompt_tokens)" in refused(lambda messages: None)


def test_other_first_tokens_stop_the_run_unless_it_says_otherwise(
    go: Go, server: Server, table: dict[str, tuple[str, str]], own: Path, tmp_path: Path
) -> None:
    def answer(wrong: int) -> Callable[[dict[str, Any]], tuple[str, str]]:
        others = list(table)[:wrong]
        return lambda body: (
            ("Something else.", "stop")
            if body["messages"][0]["content"] in others
            else table[body["messages"][0]["content"]]
        )

    server.answer = answer(3)
    with pytest.raises(UserError) as raised:
        go(teacher(server))
    line = str(raised.value)
    assert "only 7 of 10 answers" in line and "and 8 should" in line and "it answers 'Something else.'" in line
    assert repr(next(iter(table.values()))[0].strip())[1:4] in line and "--generation-config vllm" in line
    # Rounding may do this to two.
    server.answer = answer(2)
    go(teacher(server))
    found = json.loads((tmp_path / "run" / "recover" / CHECK).read_text(encoding="utf-8"))
    assert found == {"endpoint": server.url, "model": "small", "prompts": 10, "same_first_tokens": 8}
    shutil.rmtree(tmp_path / "run" / "recover")
    server.answer, server.tokens = answer(10), lambda messages: None
    server.forget()
    go(teacher(server, ", check: false"))
    assert len(server.asked) == LIMIT and not (tmp_path / "run" / "recover" / CHECK).exists()
    rows = (tmp_path / "run" / "recover" / ANSWERS).read_text(encoding="utf-8").splitlines()
    assert all(json.loads(row)["answer"] == "Something else." for row in rows)


def test_another_server_is_checked_again(go: Go, server: Server) -> None:
    go(teacher(server))
    server.forget()
    moved = server.url.replace("127.0.0.1", "localhost")
    go(f"recover.teacher={{endpoint: '{moved}', model: small}}")
    assert len(server.asked) == LIMIT


def test_how_answers_are_compared(tokenizer: Tokenizer) -> None:
    def alike(text: str, ended: bool, theirs: str) -> bool:
        ours = Ours("Say it.", [1, 2], text, ended)
        try:
            return bool(compared([ours], [Reply("a", theirs, "stop", 2)], tokenizer, "where", "there"))
        except UserError:
            return False

    # An answer from a batch is whole; one that ended has to be the same.
    assert alike("Bees make", False, " Bees make honey. ") and alike("Bees.", True, "Bees.\n")
    assert not alike("Bees make", False, "Bees") and not alike("Bees.", True, "Bees. And")
    # The last character may have been cut.
    assert alike("ผึ้ง", False, "ผึ้ง\ufffd")
    ours = [Ours("Say it.", [1, 2], "a", True)] * 2
    one = [Reply("a", error="status 400: no"), Reply("b", "a", "stop", 2)]
    assert compared(ours, one, tokenizer, "where", "there") == {"prompts": 1, "same_first_tokens": 1}
    with pytest.raises(UserError, match="there answered none of 2 instructions; the first: status 400: no"):
        compared(ours, one[:1] * 2, tokenizer, "where", "there")


def test_thinking_that_is_left_on_is_named(tokenizer: Tokenizer) -> None:
    template = str(tokenizer.chat_template) + "{% if not enable_thinking %}<think></think>{% endif %}"
    thinking = tokenizer.derived(chat_template=template)
    prompt = encode_prompt(thinking, [{"role": "user", "content": "Say it."}])
    on = len(encode_prompt(tokenizer, [{"role": "user", "content": "Say it."}]))
    with pytest.raises(UserError, match=r"set recover\.teacher\.body to \{chat_template_kwargs: \{enable_thinking"):
        compared([Ours("Say it.", prompt, "", False)], [Reply("a", "", "stop", on)], thinking, "recover.teacher", "url")


def test_instructions_are_taken_evenly() -> None:
    assert endpoint_check._evenly(3) == [0, 1, 2] and endpoint_check._evenly(0) == []
    assert endpoint_check._evenly(100) == list(range(0, 100, 5))


# Translations


def in_thai(text: str) -> str:
    """A Thai letter for each Latin one."""
    return "".join(
        chr(ord("ก") + ord(letter) % 32) if letter.isascii() and letter.isalpha() else letter for letter in text
    )


def test_a_server_translates(go: Go, server: Server, own: Path, tmp_path: Path) -> None:
    server.answer = lambda body: (in_thai(body["messages"][0]["content"]), "stop")
    server.tokens = lambda messages: None
    translator = (
        f"{{translator: {{endpoint: '{server.url}', model: mt, prompt: 'Into {{language}}: {{text}}', max_tokens: 9}}}}"
    )
    summary = go(f"recover.translate_answers={translator}", f"recover.translate_instructions={translator}")
    here = tmp_path / "run" / "recover"
    chains = [json.loads(line) for line in (here / CHAINS).read_text(encoding="utf-8").splitlines()]
    assert chains and (here / ANSWERS).read_bytes() == (own / ANSWERS).read_bytes()
    for chain in chains:
        assert chain["question"] == in_thai(f"Into Thai: {chain['question_en']}")
        assert chain["answer"] == in_thai(f"Into Thai: {chain['answer_en']}").strip()
        assert chain["translated_by"] == {"question": "endpoint", "answer": "endpoint"}
    assert {body["max_tokens"] for body in server.bodies} == {9} and {body["model"] for body in server.bodies} == {"mt"}
    assert len(set(server.asked)) == len(server.asked)
    assert summary["answers_translated_by"]["endpoint"] == len(chains) and summary["text"].endswith(
        f"by the endpoint {len(chains)}"
    )
    server.forget()
    go(f"recover.translate_answers={translator}", f"recover.translate_instructions={translator}")
    assert server.asked == []


def test_a_translation_that_is_cut_off_or_refused_is_left_out(
    config: Path, translated: Path, server: Server, tmp_path: Path
) -> None:
    server.answer = lambda body: ("แปล", "length" if "long" in str(body) else "stop")
    server.fail = lambda body: Fault(400, {}) if "bad" in str(body) else None
    said = Said()
    translator = f"{{translator: {{endpoint: '{server.url}', model: mt, refused: drop}}}}"
    changed = load_config(config, [f"recover.translate_instructions={translator}"])
    run = Run(changed, translated, said, Interrupt())
    texts = {"instructions": ["a", "long", "bad", "in a file", "a"], "answers": ["b"]}
    found: dict[str, list[str | None]] = {"instructions": [None, None, None, "ไฟล์", None], "answers": [None]}
    by = {"instructions": ["none", "none", "none", "file", "none"], "answers": ["none"]}
    assert add_translations(run, tmp_path, texts, found, by, changed.recover) == []
    assert found == {"instructions": ["แปล", None, None, "ไฟล์", "แปล"], "answers": [None]}
    assert by == {"instructions": ["endpoint", "none", "none", "file", "endpoint"], "answers": ["none"]}
    assert len(server.asked) == 3
    assert any("has no answer to 1 of 3 requests" in line and "status 400" in line for line in said.lines)


def test_the_translations_of_a_server_are_checked(
    config: Path, translated: Path, server: Server, tmp_path: Path
) -> None:
    replies = {"It is 9 pm now in Rome.": "ตอนนี้เป็นเวลาสามทุ่มที่โรม", "Bees make sweet honey.": "Bees make sweet honey."}
    server.answer = lambda body: (
        replies.get(text := body["messages"][0]["content"].split(": ")[1], in_thai(text)),
        "stop",
    )
    translator = f"{{translator: {{endpoint: '{server.url}', model: mt, prompt: 'Into {{language}}: {{text}}'}}}}"
    checks = ["recover.checks.keep=[numbers]", "recover.checks.min_script_share=0.3"]
    changed = load_config(config, [f"recover.translate_answers={translator}", *checks])
    run = Run(changed, translated, Said(), Interrupt())
    texts = {"answers": [*replies, "The dog sleeps in the sun."]}
    for settings in (changed.recover, None):
        found: dict[str, list[str | None]] = {"answers": [None] * 3}
        by = {"answers": ["none"] * 3}
        rejected = add_translations(run, tmp_path, texts, found, by, settings)
        if settings is None:
            assert rejected == [] and found["answers"][:2] == list(replies.values())
        else:
            reasons = ["lost code, address, number or mark", "untranslated"]
            assert [row["reason"] for row in rejected] == reasons
            assert [(row["source"], row["translation"]) for row in rejected] == list(replies.items())
            assert by["answers"] == ["none", "none", "endpoint"]


# The run


def test_a_server_may_move_and_a_model_may_not(config: Path, translated: Path, server: Server, tmp_path: Path) -> None:
    shutil.copytree(translated, tmp_path / "run")

    def run(*changes: str, interrupt: Interrupt | None = None, progress: Progress | None = None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # Without the evaluations, which take most of the time.
            steps = [step for step in pipeline.STEPS if not step.name.startswith("evaluation/")]
            patch.setattr(pipeline, "steps_until", lambda name: tuple(steps[: 1 + [s.name for s in steps].index(name)]))
            pipeline.run_pipeline(
                load_config(config, changes),
                tmp_path / "run",
                progress or Progress(quiet=True),
                interrupt or Interrupt(),
                until="recover",
            )

    server.fail = lambda body: Fault(500, {}) if len(server.bodies) > LIMIT + 3 else None
    with pytest.raises(UserError, match="the attempt failed, the last with status 500"):
        run(teacher(server, ", attempts: 1, concurrency: 1"))
    server.fail = lambda body: None
    said = Said()
    moved = f"recover.teacher={{endpoint: '{server.url.replace('127.0.0.1', 'localhost')}', model: small}}"
    run(moved, progress=said)
    assert any("goes on with another recover.teacher.endpoint: http://127" in line for line in said.lines)
    server.forget()
    run(teacher(server, ", concurrency: 3"))
    assert server.asked == []
    with pytest.raises(UserError, match=r"made with other inputs: recover\.teacher\.model \(small -> large\)"):
        run(teacher(server).replace("small", "large"))
    with pytest.raises(UserError, match=r"made with other inputs: .*recover\.teacher\.model \(small -> unset\)"):
        run()


def test_a_run_without_other_engines_has_the_inputs_that_it_had(config: Path, translated: Path) -> None:
    run = Run(load_config(config), translated, Progress(quiet=True), Interrupt())
    found = recover.inputs(run)["recover"]
    assert set(found) == {
        *("instructions", "max_instructions", "contamination", "max_new_tokens", "batch_size", "keep_unfinished"),
        *("translate_instructions", "translate_answers"),
        # The tiny run switches these off.
        *("filters", "checks"),
    }
    assert set(found["translate_answers"]) == {"file", "fields", "missing"}
    assert "teacher" not in load_config(config).to_yaml() and "translator" not in load_config(config).to_yaml()


def test_a_key_that_is_missing_stops_the_run_before_it_begins(
    go: Go, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match=r"recover\.teacher\.key: the environment variable SOME_KEY is not set"):
        go(teacher(server, ", key: SOME_KEY"))
    translator = f"{{translator: {{endpoint: '{server.url}', model: mt, key: SOME_KEY}}}}"
    with pytest.raises(UserError, match=r"recover\.translate_answers\.translator\.key: the environment variable"):
        go(f"recover.translate_answers={translator}")
    assert server.asked == []


def test_of_several_processes_one_asks(
    config: Path, translated: Path, own: Path, server: Server, tmp_path: Path
) -> None:
    """Another process than the primary gets the replies as the primary found them, and sends and writes nothing."""

    class Other(Peers):
        def __init__(self, replies: list[dict[str, Any]]) -> None:
            super().__init__()
            self.number, self.replies = 1, replies

        def run_on_primary(self, name: str, work: Callable[[], Any]) -> Any:
            if name == "answers":
                some, self.replies = self.replies[:4], self.replies[4:]
                return some
            return [] if name == "the answers so far" else work()

    run = Run(load_config(config, [teacher(server)]), translated, Progress(quiet=True), Interrupt())
    settings = run.config.recover.teacher
    assert settings is not None
    requests = endpoint.requests_of(settings, "answers", ["a", "b", "c", "d", "e", "f"], 4, 0)
    replies = [Reply(request.id, f"to {number}", "stop", 1, 1) for number, request in enumerate(requests)]
    other = Site(Workdir(translated), Other([reply.record() for reply in replies[::-1]]))
    run = Run(run.config, other, Progress(quiet=True), Interrupt())
    options: dict[str, Any] = {"stage": "recover", "where": "recover.teacher", "what": "answers", "unit": "answer"}
    assert endpoint.replies_to(run, tmp_path, requests, settings, **options) == replies
    assert server.asked == [] and not list(tmp_path.iterdir())
