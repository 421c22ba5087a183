"""sacrebleu's scores as sums over sentences, so that a corpus score can be resampled without scoring texts again."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# chrF: characters alone; chrF++: words of up to two as well; spBLEU: pieces of FLORES-200's sentencepiece model.
SCORERS = ("chrF", "chrF++", "spBLEU")
_TIMEOUT = 20.0  # seconds for the download of spBLEU's model


class Unavailable(Exception):
    """Why a score cannot be computed here."""


class Scorer:
    """One of sacrebleu's metrics. Its corpus score is a function of counts that are summed over sentences."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def statistics(self, hypothesis: str, reference: str) -> list[float]:
        """A sentence's counts."""
        # sacrebleu's own bootstrap uses the same two private methods; a test compares with corpus_score.
        (counts,) = self._metric._extract_corpus_statistics([hypothesis], [[reference]])
        return [float(count) for count in counts]

    def score(self, sums: Sequence[float] | np.ndarray) -> float:
        """The corpus score, 0 to 100, of summed counts."""
        return float(self._metric._compute_score_from_stats([float(count) for count in sums]).score)

    def of(self, hypothesis: str, reference: str) -> float:
        """The score of one sentence, for a person who reads it; the mean of these is not the corpus score."""
        return self.score(self.statistics(hypothesis, reference))

    @property
    def signature(self) -> str:
        """sacrebleu's signature: its version and all settings."""
        self._metric._extract_corpus_statistics(["a"], [["a"]])  # it counts the references
        return str(self._metric.get_signature())


@cache
def scorer(name: str) -> Scorer:
    """The scorer of a name. Raises Unavailable."""
    from sacrebleu.metrics import BLEU, CHRF

    if name == "chrF":
        return Scorer(CHRF())
    if name == "chrF++":
        return Scorer(CHRF(word_order=2))
    try:
        with _short_downloads(), contextlib.redirect_stderr(io.StringIO()):
            return Scorer(BLEU(tokenize="flores200", force=True))
    except ImportError as error:
        raise Unavailable(f"it needs the package {error.name or 'sentencepiece'}") from None
    except (OSError, SystemExit, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(
            f"its sentencepiece model could not be downloaded or read ({reason}); sacrebleu keeps it as {_model()}"
        ) from None


def signature(name: str) -> str:
    """The signature of a scorer."""
    return scorer(name).signature


def _model() -> str:
    """Where sacrebleu keeps the model of spBLEU."""
    from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
    from sacrebleu.utils import SACREBLEU_DIR

    return str(Path(SACREBLEU_DIR) / "models" / SPM_MODELS["flores200"]["url"].rpartition("/")[2])


@contextlib.contextmanager
def _short_downloads() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
