"""`transllm convert to-gguf`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tokenizer
from conftest import Command, random_weights
from converted import write_source
from tiny_families import FAMILIES
from tiny_sentencepiece import write_sentencepiece_model
from tiny_tokenizer import build_tiny_tokenizer, change

from transllm_jax.commands.open_model import open_source, tokenizer_of
from transllm_jax.conversion.gguf.modelfile import modelfile
from transllm_jax.conversion.gguf.weights import open_gguf
from transllm_jax.conversion.hf.directory import open_hf, write_model
from transllm_jax.tokenizer.chat import Message, render
from transllm_jax.tokenizer.growing.expand import expand
from transllm_jax.tokenizer.tokenizer import Tokenizer

MARKERS = {"english": "<EN>", "target": "<TH>", "response": "<RESPONSE>"}


@pytest.fixture
def command(transllm: Command) -> Command:
    """Runs `transllm convert ARGUMENTS`."""
    return partial(transllm, "convert")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported model with Thai tokens that byte-level cuts cannot make."""
    base = Tokenizer.load(build_tiny_tokenizer(tmp_path / "tokenizer"))
    texts = ["ที่นี่มีที่ ที่นี่ มีที่นี่"] * 4
    grown = expand(base, texts, size=6, markers=list(MARKERS.values()), cuts="whole").tokenizer
    grown.save(tmp_path / "grown")
    config = replace(FAMILIES["llama2"], vocab_size=grown.vocab_size, hidden_size=64, intermediate_size=96)
    write_model(
        tmp_path / "export", config, random_weights(config), tokenizer_dir=tmp_path / "grown",
        extra_config={"eos_token_id": 2},
    )  # fmt: skip
    about = {"language": {"code": "th", "name": "Thai"}, "markers": MARKERS}
    (tmp_path / "export/transllm.json").write_text(json.dumps(about))
    (tmp_path / "export/LICENSE").write_text("whose it is")
    return tmp_path / "export"


def test_what_is_written(exported: Path, tmp_path: Path, command: Command) -> None:
    code, printed = command("to-gguf", exported, tmp_path / "out")
    assert code == 0 and "out-F32.gguf: llama, 2 layers" in printed and "by length and not by merges" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"out-F32.gguf", "Modelfile", "transllm.json", "LICENSE"}
    assert json.loads((tmp_path / "out/transllm.json").read_text())["markers"] == MARKERS
    fields = open_gguf(tmp_path / "out/out-F32.gguf").fields
    assert fields["general.name"] == "out" and fields["general.languages"] == ["en", "th"]
    # Before the model's own template: what makes earlier turns English.
    assert fields["tokenizer.chat_template"].endswith("-%}\n" + tiny_tokenizer.CHAT_TEMPLATE)
    text = (tmp_path / "out/Modelfile").read_text()
    assert text.startswith("FROM ./out-F32.gguf\n") and "PARAMETER temperature 0\n" in text
    assert "PARAMETER repeat_penalty 1\n" in text and 'PARAMETER stop "<|im_end|>"\n' in text
    # Our own reader has the same weights and ids; a directory with one .gguf file is that file.
    code, printed = command("verify", exported, tmp_path / "out")
    assert code == 0 and printed.splitlines()[-1] == "the same" and "cut the prompt differently" not in printed
    # Replaced where it is asked for.
    code, printed = command("to-gguf", exported, tmp_path / "out", "--type", "Q8_0")
    assert code == 2 and "exists and is not empty" in printed
    assert command("to-gguf", exported, tmp_path / "out", "--type", "Q8_0", "--force")[0] == 0
    assert not (tmp_path / "out/out-F32.gguf").exists()
    code, printed = command("verify", exported, tmp_path / "out", "--tolerance", "10")
    assert code == 0 and "within the tolerance" in printed and "weights: largest difference" in printed
    assert command("verify", exported, tmp_path / "out")[0] == 1


def test_a_sentencepiece_model(tmp_path: Path, command: Command) -> None:
    write_sentencepiece_model(tmp_path / "model")
    code, printed = command("to-gguf", tmp_path / "model", tmp_path / "out", "--type", "bf16")
    assert code == 0 and len(printed.splitlines()) == 1, printed
    found = tokenizer_of(open_source(str(tmp_path / "out/out-BF16.gguf")))
    source = Tokenizer.load(tmp_path / "model")
    for text in ("the fox's  tail", "การ มา ดี x", "[INST] Paris [/INST]"):
        assert found.encode(text) == source.encode(text)
    text = (tmp_path / "out/Modelfile").read_text()
    # LLaMA-2's: llama.cpp writes the first <s> itself. No chains, so sampling is left as it is.
    assert '{{ "[INST] " }}' in text and '{{ " </s><s>[INST] " }}' in text
    assert '{{ " [/INST] " }}{{ else }}{{ " [/INST]" }}' in text
    assert "temperature" not in text and "num_ctx 512" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("SRC", "DST.gguf"), "is written as a directory"),
        (("SRC", "DST", "--type", "q4_k_m"), "llama-quantize IN.gguf OUT.gguf Q4_K_M"),
        (("SRC", "DST", "--type", "int8"), "there is no type int8; use one of f32"),
        (("SRC", "DST", "--type", "q8_0"), "needs a multiple of 32; use --type f16"),
        (("SRC", "DST", "--base", "SRC"), "is no adapter, so it needs no --base"),
        (("SRC", "DST", "--stage", "transfer"), "is not a run's work directory"),
        (("BARE", "DST"), "has no tokenizer, which a GGUF file holds"),
        (("FILE", "DST"), "is a GGUF file already"),
        (("QWEN", "DST"), "sliding window of 5 tokens"),
        (("SMALL", "DST"), "has ids up to 399, the model has 61 rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_arguments(tmp_path: Path, command: Command, arguments: tuple[str, ...], said: str) -> None:
    source = write_source(tmp_path / "source", "llama2", "bfloat16")
    for name, family in (("bare", "llama2"), ("small", "llama2")):
        config = FAMILIES[family]
        write_model(tmp_path / name, config, random_weights(config), extra_config={"eos_token_id": 2})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((source / name).read_bytes())
    if "QWEN" in arguments:
        write_source(tmp_path / "qwen", "qwen2-window", "float32")
    if "FILE" in arguments:
        assert command("to-gguf", source, tmp_path / "made")[0] == 0
    before = {path.name for path in tmp_path.iterdir()}
    places = {
        "SRC": source, "DST": tmp_path / "dst", "DST.gguf": tmp_path / "dst.gguf", "BARE": tmp_path / "bare",
        "QWEN": tmp_path / "qwen", "SMALL": tmp_path / "small", "FILE": tmp_path / "made/made-BF16.gguf",
    }  # fmt: skip
    code, printed = command("to-gguf", *(places.get(argument, argument) for argument in arguments))
    assert code == 2 and said in printed and printed.count("error:") == 1, printed
    assert {path.name for path in tmp_path.iterdir()} == before, "something was left behind"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_failure_leaves_nothing(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    source = write_source(tmp_path / "source", "llama2", "bfloat16")
    before = {path.name for path in tmp_path.iterdir()}
    read, count = type(open_hf(source)).read, 0

    def failing(self: Any, tensor: Any) -> np.ndarray:
        nonlocal count
        count += 1
        if count > 9:
            raise error
        return np.asarray(read(self, tensor))

    monkeypatch.setattr(type(open_hf(source)), "read", failing)
    code, printed = command("to-gguf", source, tmp_path / "dst")
    assert (code, printed.splitlines()[-1].split(":")[0]) in ((2, "error"), (75, "stopped, nothing was written"))
    assert {path.name for path in tmp_path.iterdir()} == before


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Only the last question is kept as it is.
ROTATING = "{% for m in messages %}{{ m['content'] if loop.last else m['content'] | upper }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (tiny_tokenizer.CHAT_TEMPLATE, ["<|im_start|>system\\nYou are a helpful", "<|im_end|>\\n<|im_start|>user\\n"]),
        (LLAMA3, ['"<|im_start|><|start_header_id|>user<|end_header_id|>\\n\\n"', "<|eot_id|>"]),
        (ROTATING, None),
        ("{{ messages[-1]['content'] }}", None),
        ("{{ raise_exception('no') }}", None),
        ("", None),
    ],
    ids=["chatml", "llama3", "rotating", "last", "refuses", "none"],
)
def test_go_templates(tmp_path: Path, template: str, wanted: list[str] | None) -> None:
    directory = build_tiny_tokenizer(tmp_path)
    change(directory / "tokenizer_config.json", chat_template=template or None)
    text, problem = modelfile(Tokenizer.load(directory), "a.gguf", 8192, chains=False)
    assert (problem is None) == ("TEMPLATE" in text) == (wanted is not None), problem
    for part in wanted or []:
        assert part in text
    if problem is not None:
        assert problem.startswith("the Modelfile has no TEMPLATE: ") and "\n" not in problem


def go(text: str, system: str, messages: list[tuple[str, str]]) -> str:
    """What Go's text/template writes for a template of ours: only what `modelfile` uses of it."""
    template = text.split('"""')[1]
    begin, _, rest = template.partition("\n{{- range")
    literals = [json.loads(found) for found in re.findall(r'{{ ("(?:[^"\\]|\\.)*") }}', begin)]
    out = literals[-1] if not system else literals[0] + system + (literals[1] if len(literals) == 3 else "")
    after = [json.loads(found) for found in re.findall(r'{{ ("(?:[^"\\]|\\.)*") }}', rest)]
    for number, (role, content) in enumerate(messages):
        out += content
        if role == "user":
            out += after[0]
        elif number < len(messages) - 1:
            out += after[1]
    return out


def test_a_go_template_writes_what_jinja_does(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(build_tiny_tokenizer(tmp_path))
    text, _ = modelfile(tokenizer, "a.gguf", 8192, chains=False)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    assert go(text, "", turns) == render(tokenizer, messages, add_generation_prompt=True)
    system: Message = {"role": "system", "content": "be kind"}
    assert go(text, "be kind", turns) == render(tokenizer, [system, *messages], add_generation_prompt=True)
    # An answer to go on with: nothing follows it.
    assert go(text, "", turns[:2]).endswith("assistant\nb")
