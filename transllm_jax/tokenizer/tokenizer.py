"""A tokenizer in a Hugging Face directory: tokenizer.json, tokenizer_config.json and a chat template.

Encoding and decoding are the `tokenizers` library's. transformers, which takes seconds to import, is not
needed: a saved directory is one that plain `AutoTokenizer` loads with the same ids, which a test checks.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from transllm_jax.disk import read_model_json
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.beside import check_tokens
from transllm_jax.tokenizer.formats import no_tokenizer_json, refuse_other_format
from transllm_jax.tokenizer.metadata import completed, config_to_write, extended_config, read_config

# Roles of tokens that a chat template may name; of the rare ones nothing else depends on them.
RARE_ROLES = ("cls_token", "sep_token", "mask_token")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", *RARE_ROLES)
# What ends a document in the pre-training of chat models, whose eos ends an answer: ChatML's and Llama 3's.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


class Tokenizer:
    """Text to token ids and back, with the special tokens and the chat template of a chat model."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any],
        chat_template: str | None,
        source: str = "tokenizer",
        *,
        model_ends: Iterable[int] = (),
        model_type: str | None = None,
        today: date | None = None,
    ) -> None:
        """`config` is the content of tokenizer_config.json, `source` the name that error messages use.

        `model_ends`: the ids that the model's own files name as eos (see `tokenizer.ends`). `model_type`: what its
        config.json says, on which depends who reads the tokenizer's ids (see `tokenizer.llama_cpp`). `today`: the date
        that a chat template is told; by default that of this moment, which then stays.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config = config
        self.chat_template = chat_template
        self.source = source
        self.model_ends = tuple(model_ends)
        self.model_type = model_type
        self.today = today or date.today()

    @classmethod
    def load(cls, directory: str | Path, *, model: str | Path | None = None, today: date | None = None) -> Tokenizer:
        """Reads a Hugging Face tokenizer directory.

        model: the directory of the model, where that is another one; its generation_config.json and config.json name
        tokens that end an answer. today: see `Tokenizer`. Raises UserError for a missing or unreadable file.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise no_tokenizer_json(directory)
        refuse_other_format(path)
        config = read_config(directory)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for any broken file
            raise UserError(f"{path} is not a readable tokenizer file ({error}): fetch it again") from error
        check_tokens(directory, config, backend)
        beside = directory if model is None else Path(model)
        return cls(
            backend,
            completed(config, backend),
            _read_template(directory, config),
            str(directory),
            model_ends=_model_ends(beside),
            model_type=model_type_of(beside),
            today=today,
        )

    def derived(
        self,
        backend: tokenizers.Tokenizer | None = None,
        *,
        source: str | None = None,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """A copy with another backend, name, config or chat template; all else is this one's.

        Without a config it says of the new special tokens of a backend what this one's says of its own.
        """
        if config is None:
            config = self.config if backend is None else extended_config(self.config, self.backend, backend)
        return Tokenizer(
            tokenizers.Tokenizer.from_str(self.backend.to_str()) if backend is None else backend,
            copy.deepcopy(config),
            self.chat_template if chat_template is None else chat_template,
            self.source if source is None else source,
            model_ends=self.model_ends,
            model_type=self.model_type,
            today=self.today,
        )

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

        The template also stands in tokenizer_config.json, where readers older than chat_template.jinja look.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self.backend.to_str(pretty=True) + "\n", encoding="utf-8")
        config = config_to_write(self.config)
        named = self.config.get("chat_template")
        if isinstance(named, list):  # for tools, say, beside the default; a file would hide them
            changed = [{**t, "template": self.chat_template} if t["name"] == "default" else t for t in named]
            config["chat_template"] = changed
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @cached_property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, specials: bool = True, *, continuing: bool = False) -> list[int]:
        """The ids of `text`; no special token is put around it, but one that `text` spells out IS parsed.

        For other people's text give `specials=False`: what spells a special token is then ordinary text. `continuing`:
        it follows other text, so that a SentencePiece tokenizer puts no space before it, as it does at a beginning.
        """
        if continuing and self._inner is not None:
            found = self._special_pattern.search(text) if specials else None
            head = text if found is None else text[: found.start()]
            ids = list(self._inner.encode(head, add_special_tokens=False).ids) if head else []
            return ids if found is None else ids + self.encode(text[found.start() :])
        backend = self.backend if specials else self._plain
        return list(backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Iterable[str], specials: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        backend = self.backend if specials else self._plain
        return [list(e.ids) for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy that takes no special token from a text: the switch is the whole object's, not the call's."""
        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _inner(self) -> tokenizers.Tokenizer | None:
        """A copy that puts no space before a text, for ordinary text only; None where the tokenizer puts none."""
        state = json.loads(self.backend.to_str())
        changed = False
        normalizer = state["normalizer"] or {}
        steps = normalizer.get("normalizers", [normalizer])
        if any(step.get("type") == "Prepend" for step in steps):
            kept = [step for step in steps if step["type"] != "Prepend"]
            state["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
            changed = True
        splitter = state["pre_tokenizer"] or {}
        for step in splitter.get("pretokenizers", [splitter]):
            if step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never":
                step["prepend_scheme"] = "never"
                changed = True
        if not changed:
            return None
        inner = tokenizers.Tokenizer.from_str(json.dumps(state))
        inner.encode_special_tokens = True
        return inner

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`. A character of which only a part is there becomes U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """The id of a token written as in tokenizer.json, None if the vocabulary lacks it."""
        found = self.backend.token_to_id(token)
        return None if found is None else int(found)

    def token(self, token_id: int) -> str | None:
        """The token of an id, written as in tokenizer.json, None if there is no such id."""
        found = self.backend.id_to_token(token_id)
        return None if found is None else str(found)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's text and id, in the order of the ids."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: int(i) for i, token in sorted(added.items()) if token.special}

    @cached_property
    def space_takers(self) -> tuple[str, ...]:
        """The special tokens that take the white space behind them to themselves (`rstrip`): it has no ids."""
        added = self.backend.get_added_tokens_decoder()
        return tuple(token.content for token in added.values() if token.special and token.rstrip)

    def role(self, name: str) -> str | None:
        """The token that tokenizer_config.json names for a role such as `eos_token`."""
        value = self.config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return None if value is None else str(value)

    def _role_id(self, name: str) -> int | None:
        token = self.role(name)
        if token is None:
            return None
        found = self.token_id(token)
        if found is None:
            raise UserError(
                f"{self.source}: tokenizer_config.json names {token!r} as {name}, which tokenizer.json "
                f"lacks: correct {name}"
            )
        return found

    @cached_property
    def eos_id(self) -> int:
        """The token that tokenizer_config.json names as eos. What ends an answer, `tokenizer.ends` says.

        Raises UserError where it names none.
        """
        found = self._role_id("eos_token")
        if found is None:
            raise UserError(f"{self.source}: tokenizer_config.json names no eos_token: add the one of the chat model")
        return found

    @cached_property
    def document_end_id(self) -> int:
        """The token that ends a document of plain text: `<|endoftext|>` or `<|end_of_text|>`, or else eos."""
        found = next((token for name in _DOCUMENT_ENDS if (token := self.token_id(name)) is not None), None)
        return self.eos_id if found is None else found

    @property
    def dated(self) -> bool:
        """Whether the chat template writes the date of the day."""
        return "strftime_now" in (self.chat_template or "")

    @cached_property
    def bos_ids(self) -> list[int]:
        """What the tokenizer by itself puts before a text: [] for SmolLM2, [1] for LLaMA-2.

        The post-processor in tokenizer.json says it. `add_bos_token` in tokenizer_config.json does not: beside a
        tokenizer.json transformers 5 reads past it, so that DeepSeek's files, which say true, give no such token.
        """
        plain = list(self.backend.encode("a", add_special_tokens=False).ids)
        whole = list(self.backend.encode("a", add_special_tokens=True).ids)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        return []

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(re.escape(t) for t in longest_first) or r"(?!)")

    def find_special(self, text: str) -> str | None:
        """The first special token that `text` contains, None if it contains none."""
        found = self._special_pattern.search(text)
        return found.group() if found else None

    def without_specials(self, text: str) -> str:
        """A text without special tokens, and without spaces at its ends."""
        while self.find_special(text):
            text = self._special_pattern.sub("", text)
        return text.strip()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over tokenizer.json's canonical content, the roles of tokens, the chat template.

        Of a template that writes the date, over the date too: on another day it makes other tokens of a conversation.
        """
        content = json.loads(self.backend.to_str())
        template = self.chat_template or ""
        roles = {name: self.role(name) for name in ROLES if name not in RARE_ROLES or name in template}
        known = [content, roles, self.chat_template, *([self.today.isoformat()] if self.dated else [])]
        canonical = json.dumps(known, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def model_type_of(directory: Path) -> str | None:
    """What a directory's config.json says of its kind of model; None where there is none."""
    path = directory / "config.json"
    found = read_model_json(path).get("model_type") if path.is_file() else None
    return found if isinstance(found, str) else None


def _model_ends(directory: Path) -> list[int]:
    """The ids that a model's generation_config.json and config.json name as eos, in order; none where neither is."""
    found: list[int] = []
    for path in (directory / "generation_config.json", directory / "config.json"):
        named = read_model_json(path).get("eos_token_id") if path.is_file() else None
        for token in named if isinstance(named, list) else [named]:
            if token is None or token in found:
                continue
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise UserError(f"{path}: eos_token_id is {named!r}; make it a token id or a list of them")
            found.append(token)
    return found


def _read_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template from where transformers looks: chat_template.jinja, then .json, then the config."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    value: Any = config.get("chat_template")
    if (directory / "chat_template.json").is_file():
        value = read_model_json(directory / "chat_template.json").get("chat_template")
    if isinstance(value, list):  # several named templates
        value = {t["name"]: t["template"] for t in value}
    if isinstance(value, dict):
        value = value.get("default")
    return None if value is None else str(value)
