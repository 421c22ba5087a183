"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from transllm_jax.tokenizer.tokenizer import Tokenizer

# What `decode` writes for bytes that are no whole character.
INCOMPLETE = "\ufffd"


class TextStream:
    """The text of tokens, to which more are added. Text that was given is never changed.

    The text of all tokens may change when one is added: where a character is not whole yet, and with byte fallback (as
    in LLaMA-2) also before it, because there one incomplete character makes all bytes next to it unreadable. So only a
    few tokens are decoded at a time, from the end of a character on, and an incomplete one is held back.

    before: the last tokens of a text that goes on, whose text is no part of this one's.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = list(before)
        # The tokens before `_done` are in `text`. Those from `_context` to `_done` are decoded with the ones after
        # them: a decoder may drop the space at the beginning of what it is given.
        self._context, self._done = 0, len(self.ids)
        self.text = ""

    def add(self, ids: Sequence[int]) -> str:
        """The text so far, after `ids` more tokens, without an incomplete character at its end."""
        for token in ids:
            self.ids.append(token)
            more = self._more()
            if not more.endswith(INCOMPLETE):
                self.text += more
                self._context, self._done = self._done, len(self.ids)
        return self.text

    @property
    def whole(self) -> str:
        """The text of all tokens, with what is held back."""
        return self.text + self._more()

    def _more(self) -> str:
        before = self._tokenizer.decode(self.ids[self._context : self._done])
        whole = self._tokenizer.decode(self.ids[self._context :])
        if whole.startswith(before):
            return whole[len(before) :]
        # A byte that fits into no character makes those before it unreadable, too.
        return self._tokenizer.decode(self.ids[self._done :])


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of all tokens: what `TextStream` gives, whose many calls are made only if a character is incomplete."""
    text = tokenizer.decode(ids)
    if INCOMPLETE not in text:
        return text
    stream = TextStream(tokenizer)
    stream.add(ids)
    return stream.whole
