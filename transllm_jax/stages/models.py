"""The models and tokenizers of a run's points. The frozen weights are read once and shared by all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from transllm_jax.config import Config
from transllm_jax.conversion.hf.directory import open_hf, read_config, read_parts
from transllm_jax.data.read.files import Place
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import Index, Layout
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.mesh import make_layout, mesh_shape
from transllm_jax.model.parameters import Flat, Split, assemble, read_frozen
from transllm_jax.stages.points import ids_without_token, lora_of
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays


class Models:
    """Weights, splits and tokenizers by point, read from a work directory on first use."""

    def __init__(self, config: Config, workdir: Path, today: date) -> None:
        """today: the date for chat templates."""
        self._config, self._workdir, self._today = config, workdir, today
        self._tokenizers: dict[str, Tokenizer] = {}

    @property
    def base(self) -> Path:
        """The imported chat model: a Hugging Face directory."""
        return self._workdir / "base"

    @cached_property
    def config(self) -> LlamaConfig:
        """The base model's shape."""
        return read_config(self.base)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters' shape; None where all weights train."""
        return lora_of(self._config)

    @property
    def scale(self) -> float:
        """The factor of the adapters' output; 1 where there are none."""
        return 1.0 if self.lora is None else self.lora.scale

    @cached_property
    def layout(self) -> Layout:
        """How arrays are sharded over the devices. Raises UserError if the mesh is for another number of devices."""
        mesh = self._config.mesh
        shape = mesh_shape(len(jax.devices()), mesh.data, mesh.fsdp, mesh.tensor)
        return make_layout(shape, self._config.attention)

    @cached_property
    def frozen(self) -> Flat:
        """The base model's weights, on the devices."""
        dtype = jnp.dtype(self._config.model.dtype)
        model = open_hf(self.base)

        def read(path: str, parts: Sequence[Index]) -> list[np.ndarray]:
            return read_parts(model, path, parts, dtype)

        return read_frozen(self.config, read, dtype, self.layout)

    def tokenizer(self, point: str) -> Tokenizer:
        """The tokenizer at a point: the base's own, or the expanded one."""
        name = "base" if point == "base" else "vocabulary"
        if name not in self._tokenizers:
            self._tokenizers[name] = Tokenizer.load(self._workdir / name, model=self.base, today=self._today)
        return self._tokenizers[name]

    def trainable(self, point: str) -> Path:
        """The directory of a point's adapters and new rows."""
        return self._workdir / point / "trainable"

    def split(self, point: str) -> Split:
        """The model at a point."""
        rows, lora, trainable = self.config.vocab_size, None, None
        if point != "base":
            lora, trainable = self.lora, load_arrays(self.trainable(point))
            rows += len(trainable.get("vocabulary.new", ()))
        padding = ids_without_token(self.tokenizer(point), rows)
        return assemble(self.config, self.frozen, lora=lora, trainable=trainable, padding=padding, layout=self.layout)

    def check_length(self, key: str, length: int) -> None:
        """Refuse a length in tokens above the model's context. Raises UserError that names the config's key."""
        context = self.config.context
        if length > context:
            raise UserError(f"{key} is {length}, the model's context is {context} tokens; lower {key}")

    def check_room(
        self,
        questions: Iterable[tuple[str | Sequence[Message], Place]],
        key: str,
        new_tokens: int,
        *,
        chat: bool = True,
    ) -> None:
        """Refuse a question that exceeds the model's context together with an answer of `new_tokens`.

        questions: texts, or conversations that end with one. chat: a text is asked in a conversation; if not, it is
        translated between two markers. Tokens are those of the base's tokenizer; the expanded one needs no more. Raises
        UserError that names the question's place and the config's key, or says why a conversation is refused.
        """
        tokenizer, context = self.tokenizer("base"), self.config.context

        def length(text: str | Sequence[Message]) -> int:
            if not isinstance(text, str):
                return len(encode_prompt(tokenizer, text))
            if not chat:
                return len(tokenizer.bos_ids) + len(tokenizer.encode(text.strip())) + 2
            return len(encode_prompt(tokenizer, [{"role": "user", "content": text}]))

        frame = length("a")
        for text, place in questions:
            # A token has at least one byte, so most questions need not be encoded.
            if isinstance(text, str) and frame + len(text.encode()) + new_tokens <= context:
                continue
            try:
                tokens = length(text)
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            if tokens + new_tokens > context:
                raise UserError(
                    f"{place}: a prompt of {tokens} tokens and {key} {new_tokens} exceed the model's context of "
                    f"{context}; shorten the text or lower {key}"
                )
