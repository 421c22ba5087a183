"""An answer while it is written: in one go, or in several legs.

A chain that breaks off goes on once, after its missing marker (TransLLM, arXiv 2405.13923). Where the original model
writes the English answers, it takes over when the trained model begins one, and the trained model goes on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transllm_jax.generation.answer import Answer, answer_of
from transllm_jax.tokenizer.chain import Markers, Parts, missing_marker
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.text_stream import TextStream
from transllm_jax.tokenizer.tokenizer import Tokenizer


class Leg(NamedTuple):
    """What one model writes of an answer in one go.

    prompt: the ids that it goes on from. stop: the ids that end it. original: whether the original model writes it.
    """

    prompt: Sequence[int]
    stop: Sequence[int]
    original: bool = False


# Tokens of a prompt that the first ones of its continuation are decoded with.
_BEFORE = 4

# How the original is asked: from the question in English (empty: as the user asked it), its prompt and its end tokens.
AskOriginal = Callable[[str], Leg]


@dataclass(frozen=True)
class _Next:
    """The leg that follows. appended: the ids of the marker before it. continued: whether it mends a broken chain."""

    leg: Leg
    appended: list[int]
    continued: bool = False


class Writing:
    """An answer while its tokens come, and how it goes on where its chain breaks off.

    markers: None for a model that writes no chains: all its text is the answer. raw: the prompt's text is continued,
    and a space at the beginning belongs to it. hidden: ids that are left out of the text, such as special tokens.
    mends: whether a broken chain goes on. ask_original: given where the original writes the English answers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        markers: Markers | None,
        prompt: Sequence[int],
        *,
        raw: bool = False,
        hidden: Container[int] = (),
        mends: bool = True,
        ask_original: AskOriginal | None = None,
    ) -> None:
        self._tokenizer, self._markers, self._prompt, self._hidden = tokenizer, markers, prompt, hidden
        self._mends, self._ask_original = mends, ask_original
        before = [token for token in prompt[-_BEFORE:] if token not in hidden] if raw else []
        self._text = TextStream(tokenizer, before)
        self._begun = 0
        self._cut_off = self._continued = False
        self._stopped_by: int | None = None
        self._ends = end_ids(tokenizer)
        # All tokens, with the markers that were appended.
        self.ids: list[int] = []
        takes_over = ask_original is not None and markers is not None
        self._response = tokenizer.encode(markers.response) if markers is not None and takes_over else []
        # What is being written.
        self.leg = Leg(prompt, (*self._ends, *self._response))

    def grow(self, ids: Sequence[int]) -> Answer:
        """The answer as far as it is known, given all tokens of the present leg so far.

        The raw text and the parts only grow (see `Deltas` for the exception): an incomplete character, or marker, at
        the end is held back.
        """
        self._add(ids[len(self.ids) - self._begun :])
        return self._answer(self._text.text, whole=False)

    def end(
        self, *, cut_off: bool, stopped_by: int | None = None, has_room: Callable[[Leg], bool] = lambda leg: True
    ) -> Answer | None:
        """End the present leg: the whole answer; or None if it goes on, in another leg, which has begun.

        cut_off: the limit of new tokens ended it; stopped_by: this token did. has_room: whether there is room to write
        a leg. Without it a broken chain stays as it is, and a whole one is cut off there.
        """
        self._cut_off, self._stopped_by = self._cut_off or cut_off, stopped_by
        following = self._next()
        if following is None:
            return self._answer(self._text.whole)
        if not has_room(following.leg):
            self._cut_off = self._cut_off or not following.continued
            return self._answer(self._text.whole)
        self.leg, self._continued = following.leg, self._continued or following.continued
        self._add(following.appended)
        self._begun = len(self.ids)
        return None

    def _next(self) -> _Next | None:
        markers = self._markers
        if markers is None:
            return None
        answer = self._answer(self._text.whole)
        if self.leg.original:
            # An English question has its answer then; and nothing is translated into nothing.
            whole_so_far = answer.question_en and answer.answer_en
            return self._after(self._tokenizer.encode(markers.target)) if whole_so_far else None
        if self._ask_original is not None and self._stopped_by not in (None, *self._ends):
            # The text ends with the question in English, if there is one.
            question = self._tokenizer.without_specials(self._answer(self._text.whole, whole=False).question_en)
            return _Next(self._ask_original(question), self._response)
        if self._mends and not self._continued and _breaks_off(answer, markers):
            return self._after(self._tokenizer.encode(missing_marker(answer.raw, markers) or ""), continued=True)
        return None

    def _after(self, appended: list[int], *, continued: bool = False) -> _Next:
        return _Next(Leg([*self._prompt, *self.ids, *appended], self._ends), appended, continued)

    def _add(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self._text.add([token for token in ids if token not in self._hidden])

    def _answer(self, text: str, *, whole: bool = True) -> Answer:
        options: dict[str, Any] = {"continued": self._continued, "cut_off": whole and self._cut_off}
        if self._markers is None:
            return Answer(text, None, text, **options, parts=Parts(answer=text))
        return answer_of(text, self._markers, whole=whole, **options)


def next_legs(writings: Mapping[int, Writing]) -> tuple[bool, list[int]]:
    """Of answers on their way, those whose legs are written next, and whether the original writes them.

    One model's at a time, those of the original last. In order: an answer does not depend on which one was done first.
    """
    by_original = all(writing.leg.original for writing in writings.values())
    return by_original, sorted(number for number, one in writings.items() if one.leg.original is by_original)


def _breaks_off(answer: Answer, markers: Markers) -> bool:
    """Whether a chain lacks only its last marker. An English answer, or a translation, is complete as it is."""
    english, response, target = markers.in_order()
    begun = answer.raw.startswith(english) and response in answer.raw and target not in answer.raw
    return begun and missing_marker(answer.raw, markers) == target
