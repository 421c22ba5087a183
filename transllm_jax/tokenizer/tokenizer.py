"""A tokenizer in a Hugging Face directory: tokenizer.json, tokenizer_config.json and a chat template.

The `tokenizers` library encodes and decodes; transformers, which takes seconds to import, is not needed. A saved
directory loads in plain `AutoTokenizer` with the same ids, which a test checks.
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
from transllm_jax.tokenizer.metadata import config_to_write, extended_config, read_config, with_implied_settings

# Roles of tokens that a chat template may name; the rare ones are used by nothing else.
RARE_ROLES = ("cls_token", "sep_token", "mask_token")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", *RARE_ROLES)
# What ends a document in pre-training, if eos ends an answer: ChatML's and Llama 3's tokens.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
# So often special tokens are looked for in what others leave.
_NESTED = 8


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
        """`config` is the content of tokenizer_config.json, `source` the name in error messages.

        `model_ends`: the ids that the model's own files name as eos (see `tokenizer.ends`). `model_type`: that of the
        model's config.json, which decides which programs read the same ids (see `tokenizer.llama_cpp`). `today`: the
        date that a chat template gets; by default the date of the call, which is kept.
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

        model: the model's directory, if that is another one; its generation_config.json and config.json name tokens
        that end an answer. today: see `Tokenizer`. Raises UserError for a missing or unreadable file.
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
        model_directory = directory if model is None else Path(model)
        return cls(
            backend,
            with_implied_settings(config, backend),
            _read_template(directory, config),
            str(directory),
            model_ends=_model_ends(model_directory),
            model_type=model_type_of(model_directory),
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
        """A copy with another backend, name, config or chat template; everything else is as in this one.

        With a backend but no config, this one's config is extended by the backend's new special tokens.
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

        The template is written to tokenizer_config.json too, for readers older than chat_template.jinja.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self.backend.to_str(pretty=True) + "\n", encoding="utf-8")
        config = config_to_write(self.config)
        named = self.config.get("chat_template")
        if isinstance(
            named, list
        ):  # a default and others, such as one for tools; a template file would hide the others
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
        """The ids of `text`; no special token is added around it, but one that `text` spells out IS parsed.

        For other people's text give `specials=False`: then a special token that is spelled out is ordinary text.
        `continuing`: the text follows other text, so a SentencePiece tokenizer must not put a space before it, as it
        does at the beginning of a text.
        """
        if continuing and self._without_prefix_space is not None:
            found = self._special_pattern.search(text) if specials else None
            head = text if found is None else text[: found.start()]
            ids = list(self._without_prefix_space.encode(head, add_special_tokens=False).ids) if head else []
            return ids if found is None else ids + self.encode(text[found.start() :])
        backend = self.backend if specials else self._without_parsing_specials
        return list(backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Iterable[str], specials: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        backend = self.backend if specials else self._without_parsing_specials
        return [list(e.ids) for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _without_parsing_specials(self) -> tokenizers.Tokenizer:
        """A copy that parses no special tokens: the library has a switch per object, not per call."""
        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _without_prefix_space(self) -> tokenizers.Tokenizer | None:
        """A copy that puts no space before a text, for ordinary text only; None if the tokenizer itself puts none."""
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
        """The text of `ids`. An incomplete character becomes U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """The id of a token written as in tokenizer.json; None if the vocabulary lacks it."""
        found = self.backend.token_to_id(token)
        return None if found is None else int(found)

    def token(self, token_id: int) -> str | None:
        """The token of an id, written as in tokenizer.json; None if there is no such id."""
        found = self.backend.id_to_token(token_id)
        return None if found is None else str(found)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's text and id, in the order of the ids."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: int(i) for i, token in sorted(added.items()) if token.special}

    @cached_property
    def right_stripping_tokens(self) -> tuple[str, ...]:
        """The special tokens that absorb the white space after them (`rstrip`), which gets no ids."""
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
        """The token that tokenizer_config.json names as eos. For what ends an answer see `tokenizer.ends`.

        Raises UserError if it names none.
        """
        found = self._role_id("eos_token")
        if found is None:
            raise UserError(f"{self.source}: tokenizer_config.json names no eos_token: add the one of the chat model")
        return found

    @cached_property
    def document_end_id(self) -> int:
        """The token that ends a document of plain text: `<|endoftext|>` or `<|end_of_text|>`, else eos."""
        found = next((token for name in _DOCUMENT_ENDS if (token := self.token_id(name)) is not None), None)
        return self.eos_id if found is None else found

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes the current date."""
        return "strftime_now" in (self.chat_template or "")

    @cached_property
    def bos_ids(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text: [] for SmolLM2, [1] for LLaMA-2.

        The post-processor in tokenizer.json decides. transformers 5 ignores `add_bos_token` in tokenizer_config.json if
        there is a tokenizer.json, so DeepSeek's files, which say true, give no such token.
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
        """The first special token that `text` contains; None if it contains none."""
        found = self._special_pattern.search(text)
        return found.group() if found else None

    def without_specials(self, text: str) -> str:
        """The text without special tokens and without white space at its ends."""
        for _ in range(_NESTED):
            if not self.find_special(text):
                return text.strip()
            # What is left around one may be another one.
            text = self._special_pattern.sub("", text)
        # Nested on purpose: a space in its place makes no new ones.
        return self._special_pattern.sub(" ", text).strip()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokenizer.json's canonical content, the roles of tokens and the chat template.

        And of the date, if the template writes it: on another day a conversation has other tokens.
        """
        content = json.loads(self.backend.to_str())
        template = self.chat_template or ""
        roles = {name: self.role(name) for name in ROLES if name not in RARE_ROLES or name in template}
        known = [content, roles, self.chat_template, *([self.today.isoformat()] if self.writes_date else [])]
        canonical = json.dumps(known, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def model_type_of(directory: Path) -> str | None:
    """The `model_type` in a directory's config.json; None if there is none."""
    path = directory / "config.json"
    found = read_model_json(path).get("model_type") if path.is_file() else None
    return found if isinstance(found, str) else None


def _model_ends(directory: Path) -> list[int]:
    """The ids that a model's generation_config.json and config.json name as eos, in order; empty if neither does."""
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
    """The chat template, looked up as in transformers: chat_template.jinja, then .json, then the config."""
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
