"""The system message that a chat template writes by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_sentencepiece import TEMPLATE
from tiny_tokenizer import CHAT_TEMPLATE, build_tiny_tokenizer, change

from transllm_jax.tokenizer.chat import default_system_prompt
from transllm_jax.tokenizer.tokenizer import Tokenizer

REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
DROPS = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
# LLaMA-2's puts the system message into the user's.
MERGES = (
    "{% if messages[0]['role'] == 'system' %}[INST] <<SYS>>\n{{ messages[0]['content'] }}\n<</SYS>>\n\n"
    "{{ messages[1]['content'] }} [/INST]{% else %}[INST] {{ messages[0]['content'] }} [/INST]{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHAT_TEMPLATE, "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        (TEMPLATE, None),
        (MERGES, None),
        (MERGES.replace("[INST] {{ messages[0]", "[INST] <<SYS>>\nBe good.\n<</SYS>>\n\n{{ messages[0]"), "Be good."),
        (REFUSES, None),
        (DROPS, None),
    ],
)
def test_the_default_system_prompt(template: str, wanted: str | None, tmp_path: Path) -> None:
    change(build_tiny_tokenizer(tmp_path) / "tokenizer_config.json", chat_template=template)
    assert default_system_prompt(Tokenizer.load(tmp_path)) == wanted
