"""What is wrong with an answer or a translation, as far as its characters say it. No model judges it.

Each measure is a number of one text, or of a text and its translation, so that a threshold can be chosen from data.
"""

from __future__ import annotations

from collections.abc import Sequence

from transllm_jax.data.clean.cleaning import script_share

# Characters of which a repetition consists: about five words of English, one short sentence of Thai.
WINDOW = 24
# Characters that are added to both lengths: "Yes." may be translated by two letters, or by a whole word.
SLACK = 10
# Words that may stay as they are: a name, a title, a place.
UNTRANSLATED = 3


def repeated_share(text: str) -> float:
    """The share of a text's characters that are in a stretch of `WINDOW` characters that occurred before, 0 to 1.

    A text that says the same n times has (n - 1) / n, without regard to where the repetition begins, to words or to
    language. White space of any kind and length counts as one character.
    """
    text = " ".join(text.split())
    seen: set[str] = set()
    covered, end = 0, 0  # the characters before `end` are counted
    for start in range(len(text) - WINDOW + 1):
        stretch = text[start : start + WINDOW]
        if stretch in seen:
            covered += start + WINDOW - max(start, end)
            end = start + WINDOW
        else:
            seen.add(stretch)
    return covered / len(text) if text else 0.0


def letters_share(text: str, scripts: Sequence[str]) -> float | None:
    """The share of a text's letters that are of these scripts, 0 to 1; None for a text without letters."""
    return script_share(text, tuple(scripts)) if any(map(str.isalpha, text)) else None


def length_factor(source: str, translation: str, usual: float) -> float:
    """How many times a translation is longer or shorter than usual, at least 1.

    usual: characters of a translation for one character of its source.
    """
    ratio = (len(translation) + SLACK) / (usual * len(source) + SLACK)
    return max(ratio, 1 / ratio)


def is_untranslated(source: str, translation: str) -> bool:
    """Whether a translation repeats its source, of more than `UNTRANSLATED` words."""
    words = source.casefold().split()
    return len(words) > UNTRANSLATED and words == translation.casefold().split()


def round_trip(source: str, back: str) -> float:
    """chrF (Popović 2015, as in sacrebleu) of a sentence that was translated and translated back, 0 to 100."""
    import sacrebleu  # slow to import

    return float(sacrebleu.sentence_chrf(back, [source]).score)
