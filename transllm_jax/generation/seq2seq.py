"""Translation by an encoder-decoder of transformers, in PyTorch. Both are imported only here, when they are needed.

No chat model is involved: a translation model translates sentences better than a small chat model that has just learned
to, and its translations do not repeat that model's own mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transllm_jax.config import Seq2seq
from transllm_jax.errors import UserError
from transllm_jax.generation.translate import Direction, Made
from transllm_jax.hub_name import hub_name_problem


def check_seq2seq(config: Seq2seq) -> None:
    """Find what is wrong before anything is trained: only the model's config.json is read, or fetched.

    Raises UserError if transformers or PyTorch is not installed, and if there is no such model.
    """
    _, transformers = _libraries()
    if not Path(config.model).expanduser().is_dir():
        path = config.model.startswith((".", "/", "~"))
        problem = "there is no such directory; correct it" if path else hub_name_problem(config.model)
        if problem is not None:
            raise UserError(f"recover.seq2seq.model: {config.model}: {problem}")
    if not _load(transformers.AutoConfig, config).is_encoder_decoder:
        raise UserError(
            f"recover.seq2seq.model: {config.model} is no encoder-decoder; give a translation model such as NLLB-200"
        )


def _load(kind: Any, config: Seq2seq, **options: Any) -> Any:
    """What a class of transformers reads of the model. Raises UserError with the first line of its error."""
    local = Path(config.model).expanduser()
    name, _, revision = (str(local), "", "") if local.is_dir() else config.model.partition("@")
    if revision:
        options["revision"] = revision
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"recover.seq2seq.model: {config.model} cannot be loaded: {line}") from error


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"recover.seq2seq needs transformers and PyTorch ({error.name} is missing); "
            "pip install 'transllm-jax[seq2seq]'"
        ) from error
    return torch, transformers


class Seq2seqTranslator:
    """Translates with a model such as NLLB-200, whose languages have names; or with one of a single direction."""

    def __init__(self, config: Seq2seq | None, *, max_new_tokens: int) -> None:
        """Load the model. Raises UserError for one that cannot be loaded and for names that its tokenizer lacks."""
        if config is None:
            raise ValueError("the translation model is not given")
        self._torch, transformers = _libraries()
        self._config, self._max_new_tokens = config, max_new_tokens
        transformers.utils.logging.disable_progress_bar()  # a run has its own
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self._tokenizer = _load(transformers.AutoTokenizer, config)
        # On a CPU, half precision is slow or not there.
        dtype = "auto" if self._device == "cuda" else self._torch.float32
        self._model = _load(transformers.AutoModelForSeq2SeqLM, config, dtype=dtype).to(self._device).eval()
        self._has_languages = hasattr(self._tokenizer, "src_lang")
        if self._has_languages and config.source is None:
            raise UserError(
                f"recover.seq2seq: {config.model} has many languages; give source and target, its names of English "
                "and of the target language"
            )

    def make(self, texts: Sequence[str], direction: Direction) -> list[Made]:
        """The translation of each text, by beam search or greedily. Raises UserError for a direction it lacks."""
        if not texts:
            return []
        config = self._config
        source, target = config.source, config.target
        if direction == "to_english":
            if source is None:
                raise UserError(f"recover.seq2seq: {config.model} translates in one direction; give source")
            source, target = target, source
        options: dict[str, Any] = {}
        if self._has_languages:
            self._tokenizer.src_lang = source
            options["forced_bos_token_id"] = self._language_id(str(target))
        elif target is not None:
            texts = [f"{target} {text}" for text in texts]
        inputs = self._tokenizer(list(texts), return_tensors="pt", padding=True).to(self._device)
        inputs.pop("token_type_ids", None)
        with self._torch.inference_mode():
            out = self._model.generate(
                **inputs,
                max_new_tokens=self._max_new_tokens,
                num_beams=config.beams,
                do_sample=False,
                **options,
            )
        return [self._made(ids) for ids in out.tolist()]

    def _made(self, ids: Sequence[int]) -> Made:
        # The first id only starts the decoder; in some models it is the end token.
        text = self._tokenizer.decode(ids[1:], skip_special_tokens=True).strip()
        return Made(text or None, self._tokenizer.eos_token_id in ids[1:])

    def _language_id(self, name: str) -> int:
        tokenizer = self._tokenizer
        known = tokenizer.get_vocab()
        # M2M-100 writes the language `th` as the token `__th__`.
        for token in (name, f"__{name}__"):
            if token in known:
                return int(known[token])
        raise UserError(f"recover.seq2seq: {self._config.model} has no language {name!r}; see the model's page")
