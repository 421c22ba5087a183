"""Whether an answer is in the wanted language, as far as its letters say it."""

from __future__ import annotations

from collections.abc import Sequence

from transllm_jax.generation.checks import letters_share
from transllm_jax.tokenizer.scripts import script_of

ENGLISH = ("Latin",)


class Letters:
    """The letters of a language. code, scripts: as in the config's section `language`."""

    def __init__(self, code: str, scripts: Sequence[str] = ()) -> None:
        script = script_of(code, tuple(scripts))
        self._scripts = script.scripts
        # Letters do not tell such a language from English, so they say nothing of either.
        self.tell = not script.latin

    def mostly(self, text: str) -> bool | None:
        """Whether most letters of a text are of the language; None if it has none, or if letters do not tell."""
        share = letters_share(text, self._scripts) if self.tell else None
        return None if share is None else share >= 0.5

    def are_english(self, text: str) -> bool | None:
        """Whether most letters of a text are Latin; None as `mostly`."""
        share = letters_share(text, ENGLISH) if self.tell else None
        return None if share is None else share >= 0.5
