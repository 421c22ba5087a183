"""Sections of `recover`: which answers and translations are left out, and the translation model of another kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from transllm_jax.config.section import Location, Positive, Section, Share

KEPT: tuple[Literal["code", "urls", "numbers", "markup"], ...] = ("code", "urls", "numbers", "markup")


class Filters(Section):
    """Which answers of the original model are left out. Empty answers always are; `recover/dropped.jsonl` lists all."""

    max_repeated: Share = 0.5
    """Leave out an answer of which more than this share of the characters repeats what it said before, in stretches of
    24 characters: what is said three times has 0.67. Of 9,571 answers to instructions and mathematics questions in
    public data sets, 3 have more than 0.5. Translations by a model are left out by the same measure. With 1, none is.
    """
    min_latin_share: Share = 0.5
    """Leave out an answer of whose letters less than this share is Latin: it is not English. Another language in Latin
    letters is not found. With 0, none is left out.
    """


class Written(Section):
    """Answers of another writer, in place of the original model's: then there is no Recovery KD."""

    file: Location
    """A jsonl file of instructions and their answers in English."""
    fields: tuple[str, str] = ("instruction", "answer")
    """The names of the file's two fields: the instruction (with its input, if it has one), and the answer."""
    missing: Literal["drop", "error"] = "error"
    """What to do with an instruction that the file has no answer to: leave it out, or stop the run."""


class Checks(Section):
    """Which translations by a model are rejected, sentence by sentence. `recover/dropped.jsonl` lists them.

    Those by an endpoint are checked as whole texts, and are not translated back. Those from a file are not checked.
    """

    max_length_factor: Annotated[float, Field(gt=1)] | None = 2.5
    """Reject a sentence that is more than this many times longer or shorter than the run's sentences are for their
    length in English, by the median. Of human translations of news into 129 languages, it rejects 0.3 % at most. With
    null, none is rejected.
    """
    min_script_share: Share = 0.3
    """Reject a sentence of whose letters less than this share is of the language's scripts, and a sentence of more than
    three words that stayed English. Of the human translations, a share of 0.3 rejects 0.2 % of the Thai and 0.8 % of
    the traditional Chinese sentences: they have names in Latin letters. Languages in Latin letters cannot be told from
    English. With 0, none is rejected.
    """
    keep: list[Literal["code", "urls", "numbers", "markup"]] = list(KEPT)
    """Reject a sentence that lost something of these kinds: `code` in backquotes, `urls` and e-mail addresses,
    `numbers` in digits, `markup` (marks of bold text). People write some numbers in words or in other units: their
    translations lose one in 3 % (Thai), 7 % (the median of 129 languages) or 15 % (Chinese) of the sentences with a
    number. Blocks of code, list markers, headings and tables need no check: they are copied.
    """
    min_round_trip: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Translate translations back, and reject a text whose sentences have a mean chrF with the original ones below
    this. By default nothing is translated back: it takes as long as the translation, and the value that tells good from
    bad depends on the model. Unrelated English sentences have 16 on average, and one in twenty more than 22.
    """

    @field_validator("keep")
    @classmethod
    def _in_order(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a kind is named twice; name each once")
        return sorted(value, key=KEPT.index)


class Seq2seq(Section):
    """An encoder-decoder of transformers that translates, such as NLLB-200, MADLAD-400 or an OPUS-MT model.

    It runs in PyTorch, on a GPU if PyTorch has one (`pip install 'transllm-jax[seq2seq]'`).
    """

    model: str
    """A local directory, or a hub name with or without a revision: OWNER/NAME[@REVISION]. Mind the model's licence,
    which its translations may be under: NLLB-200's forbids commercial use, MADLAD-400's (Apache-2.0) does not.
    """
    source: str | None = None
    """The model's own name of English, such as `eng_Latn` (NLLB-200) or `<2en>` (MADLAD-400); none for a model of one
    pair of languages. It is given to the tokenizer as its language or, if that has none, put before the text.
    """
    target: str | None = None
    """The model's own name of the target language, such as `tha_Thai` or `<2th>`."""
    beams: Positive = 1
    """The width of the beam search. 1 is greedy; more is slower, and often a little better."""

    @model_validator(mode="after")
    def _has_both_names(self) -> Seq2seq:
        if self.source is not None and self.target is None:
            raise ValueError("source is the name of English; give target, the name of the target language, too")
        return self
