"""Reads the vocabulary of a PEFT adapter, whole tables or single rows, as our trainable rows.

PEFT has three forms. `modules_to_save` stores a table as `X.weight`. `trainable_token_indices` stores rows as
`X.token_adapter.trainable_tokens_delta` (values, despite the name). A table that was resized but not trained is stored
as `X.weight`, too. PEFT may also store copies: of the table that was replaced, and of a tied table's other end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transllm_jax.conversion.hf.safetensors_io import Entry, read_tensor, require_finite
from transllm_jax.conversion.names import EMBEDDING, OUTPUT, tensors
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.conversion.peft.config import EMBED_MODULE, HEAD_MODULE, PREFIX, WEIGHTS, PeftConfig
from transllm_jax.errors import UserError

_WHOLE = ".weight"
_COPY = ".modules_to_save.weight"
_REPLACED = ".original_module.weight"
_BASE_LAYER = ".token_adapter.base_layer.weight"
_ROWS = ".token_adapter.trainable_tokens_delta"
_NAMES = {EMBED_MODULE: EMBEDDING, HEAD_MODULE: OUTPUT}
_BOTH = "train both, embed_tokens and lm_head, in one of PEFT's ways"


@dataclass(frozen=True)
class _Table:
    """One table, in float32: all base rows if some were trained, else None; and new rows [n, D]."""

    trained: np.ndarray | None
    new: np.ndarray


class Tables:
    """The vocabulary's tensors in an adapter file.

    `shapes` are the tensors that may be there, with their expected shapes; `required` are those that must be there;
    `faults` are messages about the config. Call `read` only if there are no faults.
    """

    def __init__(self, base: OpenedModel, config: PeftConfig, entries: dict[str, Entry], directory: Path) -> None:
        self.base, self.config, self.entries, self.directory = base, config, entries, directory
        self.model_tied = base.config.tie_word_embeddings
        self.size, self.hidden = base.config.vocab_size, base.config.hidden_size
        self.saved = config.saved
        if self.saved and config.tied and self.model_tied:
            self.saved = frozenset(_NAMES)
        self.tokens = dict(config.tokens)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.required: set[str] = set()
        self.faults: list[str] = []
        if self.model_tied and self.tokens:
            if self.tokens.get(HEAD_MODULE, self.tokens.get(EMBED_MODULE)) != self.tokens.get(EMBED_MODULE):
                self.faults.append(
                    "trainable_token_indices names other tokens for lm_head than for embed_tokens, "
                    "and the base ties the two; name the same"
                )
            self.tokens = dict.fromkeys(_NAMES, self.tokens.get(EMBED_MODULE, self.tokens.get(HEAD_MODULE, [])))
        for module in _NAMES:
            self._expect(module)

    def _expect(self, module: str) -> None:
        forms = [_WHOLE]
        if module in self.saved:
            forms = [_WHOLE, _COPY, _REPLACED]
        elif module in self.tokens:
            forms = [_BASE_LAYER]
        shapes = [entry.shape for form in forms if (entry := self._entry(module, form))]
        rows = max([shape[0] for shape in shapes if len(shape) == 2] + [self.size])
        self.shapes |= {_name(module, form): (rows, self.hidden) for form in forms}
        if module in self.tokens:
            self.shapes[_name(module, _ROWS)] = (len(self.tokens[module]), self.hidden)
        # The other end of a tied table may be missing.
        if module == EMBED_MODULE or not self.model_tied or (module in self.saved and not self.config.tied):
            self.required |= {_name(module, _WHOLE)} if module in self.saved else set()
            self.required |= {_name(module, _ROWS)} if module in self.tokens else set()

    def read(self) -> dict[str, np.ndarray]:
        """Our arrays of the vocabulary, float32: new rows, and all base rows if at least one was trained.

        Raises UserError for new rows that are not stored, and for tables that differ although the base ties them.
        """
        embed, head = self._table(EMBED_MODULE), None
        stored = any(name in self.entries for name in self.shapes if name.startswith(f"{PREFIX}{HEAD_MODULE}."))
        if stored or not self.model_tied:
            head = self._table(HEAD_MODULE)
        self._raise_faults()
        if self.model_tied:
            self._require_tied(embed, head)
            head = None
        elif head is not None and len(embed.new) != len(head.new):
            self.faults.append(
                f"the adapter has {len(embed.new)} new rows of embed_tokens and {len(head.new)} of lm_head, "
                f"which the base does not tie; {_BOTH}"
            )
        self._raise_faults()
        ends = [(EMBED_MODULE, embed, "")] + ([(HEAD_MODULE, head, "output_")] if head is not None else [])
        arrays = {}
        trained = any(table.trained is not None for _, table, _ in ends)
        for module, table, prefix in ends:
            if len(table.new):
                arrays[f"vocabulary.{prefix}new"] = table.new
            if trained:
                rows = table.trained
                arrays[f"vocabulary.{prefix}base_trained"] = self._base(module) if rows is None else rows
        return arrays

    def _table(self, module: str) -> _Table:
        """A module's table from the adapter's whole table and single rows; adds to `faults`."""
        entry = self._entry(module, _WHOLE) or self._entry(module, _BASE_LAYER)
        table = None if entry is None else self._whole_table(module, read_tensor(entry))
        rows = self._entry(module, _ROWS)
        if rows is not None:
            return self._with_rows(module, table, read_tensor(rows).astype(np.float32))
        return self._zeros(0) if table is None else table

    def _whole_table(self, module: str, table: np.ndarray) -> _Table:
        copy, replaced = self._entry(module, _COPY), self._entry(module, _REPLACED)
        if copy is not None and not _same(read_tensor(copy), table):
            self.faults.append(f"{module}{_COPY} differs from {module}{_WHOLE}; remove the wrong one")
        if replaced is not None and not self._is_base(module, read_tensor(replaced)):
            self.faults.append(f"{module}{_REPLACED} is not the table of {self.base.where}; give the adapter's own")
        trained = None if self._is_base(module, table) else table[: self.size].astype(np.float32)
        return _Table(trained, table[self.size :].astype(np.float32))

    def _with_rows(self, module: str, table: _Table | None, values: np.ndarray) -> _Table:
        """The table (None if none is stored) with the rows of `tokens` replaced by `values`, float32 [n, D]."""
        ids = np.array(self.tokens[module])
        is_new = ids >= self.size
        new_rows = sorted(ids[is_new] - self.size)
        if table is None:
            if new_rows != list(range(len(new_rows))):
                self.faults.append(
                    f"trainable_token_indices of {module} leaves out new tokens: {len(new_rows)} ids from {self.size} "
                    f"on, up to {new_rows[-1] + self.size}; train all new tokens, because their rows are stored "
                    "nowhere else"
                )
                return self._zeros(0)
            table = self._zeros(len(new_rows))
        elif new_rows and new_rows[-1] >= len(table.new):
            self.faults.append(f"trainable_token_indices of {module} names {new_rows[-1] + self.size}, above the table")
            return table
        table.new[ids[is_new] - self.size] = values[is_new]
        if is_new.all():
            return table
        trained = self._base(module) if table.trained is None else table.trained
        trained[ids[~is_new]] = values[~is_new]
        return _Table(trained, table.new)

    def _zeros(self, new_rows: int) -> _Table:
        return _Table(None, np.zeros((new_rows, self.hidden), np.float32))

    def _require_tied(self, embed: _Table, head: _Table | None) -> None:
        if head is not None:
            if not (_same(embed.new, head.new) and _same(embed.trained, head.trained)):
                self.faults.append(
                    "lm_head differs from embed_tokens, and the base ties the two; train them as one "
                    "(ensure_weight_tying), or take a base with tie_word_embeddings false"
                )
        elif EMBED_MODULE in self.saved and not self.config.tied and (embed.trained is not None or len(embed.new)):
            self.faults.append(
                "embed_tokens was trained without lm_head, which PEFT then leaves unchanged, but the base ties them; "
                "train them as one (ensure_weight_tying)"
            )

    def _base(self, module: str) -> np.ndarray:
        """A copy of the base's table [V, D], float32."""
        name = EMBEDDING if self.model_tied else _NAMES[module]
        table = self.base.read(next(tensor for tensor in tensors(self.base.config) if tensor.name == name))
        require_finite(table, name, self.base.where)
        return table.astype(np.float32)

    def _is_base(self, module: str, table: np.ndarray) -> bool:
        """Whether a table's first V rows are the base's rows, rounded to the table's type, bit for bit."""
        with np.errstate(over="ignore"):
            return _same(self._base(module).astype(table.dtype), table[: self.size])

    def _entry(self, module: str, form: str) -> Entry | None:
        return self.entries.get(_name(module, form))

    def _raise_faults(self) -> None:
        if self.faults:
            raise UserError(f"{self.directory / WEIGHTS}: {'; '.join(self.faults)}")


def _name(module: str, form: str) -> str:
    return f"{PREFIX}{module}{form}"


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Whether two arrays have the same bits, or are both None."""
    if a is None or b is None:
        return a is None and b is None
    bits = np.uint16 if a.dtype.itemsize == 2 else np.uint32
    return a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits))
