"""Translation instructions: pairs as conversations in which a user asks for a translation (stage 4).

TransLLM, arXiv 2405.13923.
"""

from __future__ import annotations

from dataclasses import dataclass

from transllm_jax.tokenizer.chain import Markers, build_translation
from transllm_jax.tokenizer.chat import Message


@dataclass(frozen=True)
class Instructions:
    """How pairs become instructions. `{language}` and `{text}` in a prompt stand for the language and the sentence."""

    to_target: tuple[str, ...]
    to_english: tuple[str, ...]
    language: str

    def conversation(self, english: str, target: str, number: int, markers: Markers) -> list[Message]:
        """Pair `number` of a source. Directions alternate, and the prompts of each direction take turns."""
        place, backwards = divmod(number, 2)
        if backwards:
            prompt = self.to_english[place % len(self.to_english)]
            question, answer = target, build_translation(english, markers.english, markers)
        else:
            prompt = self.to_target[place % len(self.to_target)]
            question, answer = english, build_translation(target, markers.target, markers)
        asked = prompt.replace("{language}", self.language).replace("{text}", question)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
