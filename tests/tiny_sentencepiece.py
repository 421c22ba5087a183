"""A tiny SentencePiece-BPE tokenizer of LLaMA-2's kind, and a chat model with one: for tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import random_weights, tiny_config
from sentencepiece import SentencePieceTrainer

from transllm_jax.conversion.hf.directory import write_model
from transllm_jax.conversion.hf.sentencepiece_tokenizer import write_tokenizer_json
from transllm_jax.tokenizer.tokenizer import Tokenizer

# LLaMA-2's own.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
# The base knows a few Thai characters and one Thai word, as LLaMA-2 knows some characters.
TEXT = [
    "the quick brown fox's tail, and the lazy dog's tail; he doesn't know where they'll go",
    "    def area(width):\n        return width * width  # 12,345 == 12 345",
    "she said that the capital of France is Paris, and that it is not far",
    "การ การ การ มา ดี",
]


def build_tiny_sentencepiece(
    directory: Path,
    *,
    text: list[str] | None = None,
    metaspace: bool = False,
    model: bool = True,
    **options: Any,
) -> Path:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json; returns the directory.

    text: what it is trained on, in place of TEXT. metaspace: tokenizer.json as transformers 5 writes it. model: whether
    tokenizer.model stays beside it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter((text or TEXT) * 3), model_prefix=str(directory / "tokenizer"), **given | options
    )
    (directory / "tokenizer.vocab").unlink()
    write_tokenizer_json(directory / "tokenizer.model", directory)
    if not model:
        (directory / "tokenizer.model").unlink()
    if metaspace:
        path = directory / "tokenizer.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        state["normalizer"] = None
        state["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        path.write_text(json.dumps(state), encoding="utf-8")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_sentencepiece_model(directory: Path) -> None:
    """A chat model with LLaMA-2's kind of tokenizer and template, untied."""
    tokenizer = build_tiny_sentencepiece(directory.with_name("tokenizer"), text=[*TEXT, "[INST] [/INST]"])
    path = tokenizer / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    path.write_text(json.dumps(config), encoding="utf-8")
    shape = tiny_config(Tokenizer.load(tokenizer).vocab_size, tied=False)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    write_model(directory, shape, random_weights(shape), tokenizer_dir=tokenizer, extra_config=ids)
