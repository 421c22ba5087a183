"""Chat templates that think, that write the date, and that end an answer with what no file names: a run on one."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_run, write_tiny_model
from tiny_tokenizer import END, EOS, build_tiny_tokenizer, change

from transllm_jax.config import load_config
from transllm_jax.data.rows.examples import conversation_rows
from transllm_jax.disk import read_json
from transllm_jax.errors import UserError
from transllm_jax.generation.engine import Engine
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import run as run_module
from transllm_jax.stages.pipeline import run_pipeline
from transllm_jax.tokenizer.chat import (
    Message,
    check_template,
    encode_conversation,
    encode_prompt,
    fitting_rows,
    render,
    without_thinking,
)
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Like Qwen3's: without thinking an empty block is part of the prompt, and earlier answers lose theirs.
THINKING = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
DATED = """<|im_start|>system
Today Date: {{ strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" }}<|im_end|>
"""
BLOCK = "<think>\n\n</think>\n\n"
TALK: list[Message] = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "How large?"},
    {"role": "assistant", "content": "Small."},
]
FIRST, LATER = datetime.date(2026, 1, 31), datetime.date(2026, 2, 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def of(directory: Path, template: str, today: datetime.date | None = None) -> Tokenizer:
    tokenizer = Tokenizer.load(directory, today=today)
    tokenizer.chat_template = template
    return tokenizer


def parts(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> tuple[str, str]:
    """What of a row is context, and what is trained."""
    pairs = list(zip(ids, mask, strict=True))
    return tuple(tokenizer.decode([i for i, trained in pairs if trained == which]) for which in (0, 1))  # type: ignore


def test_the_block_of_no_thoughts_is_part_of_the_prompt(directory: Path) -> None:
    tokenizer = of(directory, THINKING)
    check_template(tokenizer)
    [(ids, mask, size)] = encode_conversation(tokenizer, TALK[:2])
    prompt = encode_prompt(tokenizer, TALK[:1])
    assert tokenizer.decode(prompt).endswith(f"assistant\n{BLOCK}")
    assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)])
    assert parts(tokenizer, ids, mask)[1] == "A model.<|im_end|>" and size == len("A model.")


def test_a_template_that_rewrites_earlier_turns_makes_a_row_of_each_answer(directory: Path) -> None:
    tokenizer = of(directory, THINKING)
    rows = encode_conversation(tokenizer, TALK)
    assert len(rows) == 2
    for number, row in zip((1, 3), rows, strict=True):
        prompt = encode_prompt(tokenizer, TALK[:number])
        assert row.ids[: len(prompt)] == prompt  # what generation sees
        assert parts(tokenizer, row.ids, row.mask)[1].rstrip() == TALK[number]["content"] + END
        assert tokenizer.decode(prompt).count(BLOCK) == 1
    # Too long a row goes, the others stay.
    short = len(rows[0].ids)
    assert fitting_rows(tokenizer, TALK, short) == (rows[:1], 1) and len(rows[1].ids) > short
    assert fitting_rows(tokenizer, TALK, short - 1) == ([], 2)
    cut, outcome = conversation_rows(tokenizer, TALK, short)
    assert len(cut) == 1 and outcome == "cut"
    # An answer that is not trained is context alone.
    (row,) = encode_conversation(tokenizer, [TALK[0], {**TALK[1], "train": False}, *TALK[2:]])
    assert row == rows[1]


def test_a_template_that_only_appends_keeps_what_is_not_trained_as_context(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    (whole,) = encode_conversation(tokenizer, TALK)
    (row,) = encode_conversation(tokenizer, [TALK[0], {**TALK[1], "train": False}, *TALK[2:]])
    assert row.ids == whole.ids
    assert parts(tokenizer, row.ids, row.mask)[1] == "Small.<|im_end|>" and row.size == len("Small.")
    with pytest.raises(UserError, match="nothing to train on"):
        encode_conversation(tokenizer, [TALK[0], {**TALK[1], "train": False}])


def test_a_template_that_thinks_without_being_asked_is_refused(directory: Path) -> None:
    asked = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    always = THINKING.replace(asked, "{% if true %}<think>\n")
    assert always != THINKING
    with pytest.raises(UserError, match="puts '</think>' between the generation prompt and an answer"):
        check_template(of(directory, always))


def test_who_renders_an_exported_template_gets_the_prompts_of_training(directory: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = of(directory, THINKING)
    exported = without_thinking(tokenizer)
    exported.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in (TALK[:1], TALK[:3]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == render(tokenizer, messages, True) == render(exported, messages, True) and BLOCK in text
    assert without_thinking(exported) is exported
    plain = Tokenizer.load(directory)
    assert without_thinking(plain) is plain


def test_the_date_is_the_tokenizers_and_counts_where_it_is_written(directory: Path) -> None:
    tokenizers = [of(directory, DATED + THINKING, today) for today in (FIRST, LATER, FIRST)]
    texts = [render(tokenizer, TALK) for tokenizer in tokenizers]
    assert "Today Date: 31 Jan 2026" in texts[0] and "Today Date: 01 Feb 2026" in texts[1] and texts[2] == texts[0]
    marks = [tokenizer.fingerprint for tokenizer in tokenizers]
    assert marks[0] == marks[2] != marks[1]
    assert tokenizers[0].derived(source="another").fingerprint == marks[0]
    # Where no date is written the day makes no difference.
    assert of(directory, THINKING, FIRST).fingerprint == of(directory, THINKING, LATER).fingerprint


def set_day(monkeypatch: pytest.MonkeyPatch, day: datetime.date) -> None:
    class Day(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return day

    monkeypatch.setattr(run_module, "date", Day)


@pytest.mark.slow
def test_a_run_on_such_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "model")
    change(tmp_path / "model" / "tokenizer_config.json", eos_token=EOS, chat_template=DATED + THINKING)
    for name in ("config.json", "generation_config.json"):
        change(tmp_path / "model" / name, eos_token_id=0)
    conversations = tmp_path / "talk.jsonl"
    conversations.write_text(json.dumps({"messages": TALK}) + "\n", encoding="utf-8")
    tree: dict[str, Any] = tiny_run(tmp_path / "model", tmp_path / "run")
    tree["transfer"]["sources"] = [{"path": str(conversations), "format": "conversations", "weight": 1}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    said: list[str] = []
    stops: list[set[int]] = []
    generate = Engine.generate

    def recorded(self: Engine, prompts: Any, *, stop: Sequence[int], **options: Any) -> list[list[int]]:
        stops.append(set(stop))
        return generate(self, prompts, stop=stop, **options)

    monkeypatch.setattr(Engine, "generate", recorded)

    def execute(**options: Any) -> bool:
        progress = Progress(quiet=True)
        monkeypatch.setattr(progress, "say", lambda text, **_: said.append(text))
        config = load_config(path)
        return run_pipeline(config, tmp_path / "run", progress, Interrupt(), **options)

    set_day(monkeypatch, FIRST)
    assert execute(until="translate")
    assert any(f"ends an answer with {END}, which no file of the model names" in line for line in said)
    set_day(monkeypatch, LATER)
    assert execute()
    tokenizer = Tokenizer.load(tmp_path / "model")
    end, eos = tokenizer.token_id(END), tokenizer.token_id(EOS)
    assert stops and all({end, eos} <= stop for stop in stops)
    # The day of the beginning counts, and stands in the run.
    assert load_config(tmp_path / "run" / "run.yaml").date == FIRST
    for step in ("recover", "transfer", "evaluation/transfer"):
        assert read_json(tmp_path / "run" / step / "manifest.json")["inputs"]["date"] == FIRST.isoformat()
    answers = read_json(tmp_path / "run" / "evaluation" / "original_answers.json")["rows"]
    assert all("Today Date: 31 Jan 2026" in tokenizer.decode(row["prompt"]) for row in answers)
    export = tmp_path / "run" / "export"
    assert set(read_json(export / "generation_config.json")["eos_token_id"]) == {end, eos, 0}
    assert "enable_thinking = false" in (export / "chat_template.jinja").read_text(encoding="utf-8")
    # Both answers of the conversation were trained on.
    sources = read_json(tmp_path / "run" / "transfer" / "manifest.json")["summary"]["sources"]
    assert sources["1 talk.jsonl"]["items"] == 1 and not execute()
    # Another day is another run, and said.
    tree["date"] = LATER
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError, match=r"made with other inputs: date \(2026-01-31 -> 2026-02-01\)"):
        execute()
    # What the day counts for is gone, the original's answers aside: it is asked anew.
    for manifest in (tmp_path / "run").rglob("manifest.json"):
        if "date" in read_json(manifest)["inputs"] or manifest.parent.name in ("export", "report"):
            manifest.unlink()
    assert execute(until="evaluation/base")
    answers = read_json(tmp_path / "run" / "evaluation" / "original_answers.json")["rows"]
    assert all("Today Date: 01 Feb 2026" in tokenizer.decode(row["prompt"]) for row in answers)
