"""A tiny byte-level BPE chat tokenizer of SmolLM2's kind, built in a fraction of a second: for tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

EOS, END = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = [EOS, "<|im_start|>", END]

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps under the old tree all afternoon.",
    "She asked what the capital of France is, and the answer was that the capital of France is Paris.",
    "You can write a short letter to your friend, then read it again and send it in the morning.",
    "There are seven days in a week and twelve months in a year; some months have thirty days, others more.",
    "A good teacher explains the same thing in another way when the children do not understand it.",
    "He doesn't know where they'll go, but we're sure that it's not far and that I've seen the place before.",
    "Translate the following sentence into English: the weather is nice today.",
    "ภาษาไทย ประเทศไทย สวัสดี",
]


def build_tiny_tokenizer(directory: str | Path, vocab_size: int = 400) -> Path:
    """Trains the tokenizer on a few sentences and writes a Hugging Face directory; returns its path.

    vocab_size: ids in total, at least 3 special tokens + 256 bytes (and what the sentences can give).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(f"the sentences give {backend.get_vocab_size()} tokens, not {vocab_size}")
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory


def change(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = {key: value for key, value in {**known, **fields}.items() if value is not None}
    path.write_text(json.dumps(known), encoding="utf-8")
