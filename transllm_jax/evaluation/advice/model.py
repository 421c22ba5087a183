"""Findings about the model where it was evaluated, about its vocabulary, the answers it learns from, and the time."""

from __future__ import annotations

from collections.abc import Iterator

from transllm_jax.evaluation.advice.recorded import Finding, Recorded
from transllm_jax.evaluation.page.measures import number, percent, section, written

# The goal of well-formed chains (stages/report.py).
WELL_FORMED = 0.9
# Of the answers that are not well formed, or of all answers: the share that the limit of tokens cut off.
CUT_OFF = 0.5
# Fewer chains say nothing about how different they are; of more, at least this share should have a question of its own.
LEAST_CHAINS, DIFFERENT = 10, 0.5
# Bits per byte may rise by this share in a stage.
FORGOTTEN = 0.05
# chrF into and out of the language may fall by this share in stage `transfer`, if it was above LEAST_CHRF.
UNLEARNED, LEAST_CHRF = 0.1, 10.0
# English answers may move this far from the original's, in nats per token.
DRIFT = 0.3
# What the second half of the new tokens saves of the text's tokens: less is little, more says that a larger vocabulary
# would save, too.
SAVES_LITTLE, SAVES_MUCH = 0.03, 0.2
# A token that occurs less than ten times in the corpus is rare; this share of the new tokens may be.
RARE = 0.5
# Answers of the original model that were cut off, as a share.
UNFINISHED = 0.1
# Seconds; in a shorter stage, starting and compiling take their minutes whatever one does.
LONG = 600.0
# For each kind of time: the share of a stage that it may take, what it is, and what to turn.
_LOST = {
    "data": (0.1, "waiting for data", "Put tokenised text on a faster disk.", ("token_cache",)),
    "save": (0.1, "saving checkpoints", "Save less often.", ("{stage}.checkpoint_every", "{stage}.keep_checkpoints")),
    "validate": (
        0.2,
        "validation",
        "Validate less often, or on fewer rows.",
        ("{stage}.validation.every", "{stage}.validation.rows"),
    ),
    "lost": (0.1, "steps that restarts repeated", "Save more often.", ("{stage}.checkpoint_every",)),
    "compile": (
        0.2,
        "compiling",
        "Keep compiled programs: let JAX_COMPILATION_CACHE_DIR name a directory that outlives the machine.",
        (),
    ),
}


def chains(run: Recorded) -> Iterator[Finding]:
    """Answers that are cut off, not well-formed, or all the same."""
    answers, good, different = (
        number(run.chains.get(key)) for key in ("answers", "well_formed", "different_questions")
    )
    if not answers or good is None:
        return
    cut, broken_off = (number(run.chains.get(key)) or 0.0 for key in ("cut_off", "broken_off"))
    unfinished = good / answers < WELL_FORMED and broken_off >= CUT_OFF * (answers - good)
    if unfinished or cut >= CUT_OFF * answers:
        limit = run.setting("evaluation.max_chain_tokens")
        yield Finding(
            "Chains do not end",
            "transfer",
            f"{cut:.0f} of {answers:.0f} answers were cut off after {limit} tokens.",
            "If they were still making sense, raise the limit; if they repeat themselves, train on more chains.",
            ("evaluation.max_chain_tokens", "transfer.steps", "transfer.chains"),
        )
    elif good / answers < WELL_FORMED:
        yield Finding(
            "Chains are not well-formed",
            "transfer",
            f"{percent(good / answers)} of {answers:.0f} answers have all three parts of a chain in their order.",
            "Train longer on chains, or give them a larger share of the mixture.",
            ("transfer.steps", "transfer.chains", "recover.instructions"),
        )
    if good >= LEAST_CHAINS and different is not None and different < DIFFERENT * good:
        yield Finding(
            "The chains are alike",
            "transfer",
            f"{good:.0f} well-formed chains have {different:.0f} different English question{'s' * (different != 1)}: "
            "the model knows the form of a chain, but does not read what it is asked.",
            "Teach it to translate first, with more pairs and steps; then give more instructions.",
            ("translate.steps", "translate.sources", "recover.instructions"),
        )


def fluency(run: Recorded) -> Iterator[Finding]:
    """Bits per byte that rise from one stage to the next."""
    for before, after in (("pretrain", "translate"), ("translate", "transfer")):
        old, new = run.measured("bits_per_byte", before), run.measured("bits_per_byte", after)
        if old and new is not None and new > (1 + FORGOTTEN) * old:
            yield Finding(
                "Fluency was lost",
                after,
                f"{run.language()} text takes {written(new)} bits per byte after {after}, {percent(new / old - 1)} "
                f"more than before it ({written(old)}).",
                f"Give {run.language()} text a larger share of the mixture (0.2 or more), or lower the learning rate.",
                (f"{after}.sources", f"{after}.learning_rate"),
            )


def translation(run: Recorded) -> Iterator[Finding]:
    """Translations that were better before stage `transfer`."""
    directions = (("chrf_to_target", f"into {run.language()}"), ("chrf_to_english", "into English"))
    for measure, direction in directions:
        old, new = run.measured(measure, "translate"), run.measured(measure, "transfer")
        if old is not None and new is not None and old >= LEAST_CHRF and new < (1 - UNLEARNED) * old:
            yield Finding(
                "Translation was unlearned",
                "transfer",
                f"chrF {direction} fell from {old:.1f} after translate to {new:.1f}.",
                "Raise the share of translations in the mixture, give more instructions, or lower the learning rate.",
                ("transfer.translations", "recover.instructions", "transfer.learning_rate"),
            )


def english(run: Recorded) -> Iterator[Finding]:
    """English answers that moved away from the original model's."""
    drift = run.measured("english_kl", "transfer")
    if drift is not None and drift > DRIFT:
        before = run.measured("english_kl", "translate")
        since = "" if before is None else f" (after translate: {written(before)})"
        yield Finding(
            "English answers drift",
            "transfer",
            f"English answers differ from the original's by a KL of {written(drift)} per token{since}.",
            "Raise the share of English answers, put English text into stage translate, or lower the learning rates.",
            ("transfer.english", "translate.sources", "transfer.learning_rate", "pretrain.learning_rate"),
        )


def initial_rows(run: Recorded) -> Iterator[Finding]:
    """New rows that make the model worse than the original with its own tokenizer, and training that did not help.

    Aligned rows are meant to begin so: pieces inside words begin less probable, and bits per byte count them all.
    """
    base, new, trained = (run.measured("bits_per_byte", point) for point in ("base", "vocabulary", "pretrain"))
    rows = run.setting("vocabulary.initial_rows")
    made_up_for = trained is not None and base is not None and trained <= 0.8 * base
    if rows != "aligned" and base is not None and new is not None and new > base and not made_up_for:
        advice, keys = (
            ("Give more text, choose fewer tokens, or train longer.", ("vocabulary.corpus", "vocabulary.size"))
            if rows == "calibrated"
            else (
                "Start rows at the English tokens that they are aligned with, which needs pairs, or train longer.",
                ("vocabulary.initial_rows", "vocabulary.corpus"),
            )
        )
        yield Finding(
            "New rows begin badly",
            "vocabulary",
            f"{run.language()} text takes {written(new)} bits per byte before any training (initial_rows: "
            f"{rows}), and {written(base)} with the original model.",
            advice,
            (*keys, "pretrain.steps"),
        )


def vocabulary(run: Recorded) -> Iterator[Finding]:
    """A vocabulary that is too small, or too big for its corpus."""
    report = run.vocabulary
    whole, half = (number(report.get(f"tokens_per_character_{which}")) for which in ("after", "half"))
    size, rare = number(report.get("new_tokens")), number(report.get("produced_less_than_10"))
    if whole and half and size and 1 - whole / half >= SAVES_MUCH:
        yield Finding(
            "The vocabulary is small",
            "vocabulary",
            f"{size:,.0f} new tokens take {written(whole)} tokens per character, half of them {written(half)}: the "
            f"second half saved {percent(round(1 - whole / half, 2))}, so more tokens would save more.",
            "Choose a larger size; transllm tokenizer report --curve shows what each size takes.",
            ("vocabulary.size",),
        )
    elif size and rare is not None and rare > RARE * size:
        yield Finding(
            "The vocabulary is large for its corpus",
            "vocabulary",
            f"{rare:,.0f} of {size:,.0f} new tokens occur less than ten times in the corpus.",
            "Give a larger corpus, or choose a smaller size.",
            ("vocabulary.corpus", "vocabulary.size", "vocabulary.min_count"),
        )
    elif whole and half and size and 1 - whole / half < SAVES_LITTLE:
        yield Finding(
            "The vocabulary is large for its corpus",
            "vocabulary",
            f"The second half of {size:,.0f} new tokens saves {percent(round(1 - whole / half, 3))} of the tokens.",
            "Choose a smaller size: the tokens cost rows and time, and save little.",
            ("vocabulary.size",),
        )


def recovered(run: Recorded) -> Iterator[Finding]:
    """Answers of the original model that were cut off, and so left out."""
    answers, unfinished = number(run.recover.get("answers")), number(run.recover.get("unfinished"))
    kept = run.setting("recover.keep_unfinished") is True
    if answers and unfinished and unfinished > UNFINISHED * answers and not kept:
        yield Finding(
            "Answers were cut off",
            "recover",
            f"{unfinished:,.0f} of {answers:,.0f} answers of the original model were left out, because "
            f"{run.setting('recover.max_new_tokens')} tokens cut them off or they are empty.",
            "Allow longer answers, and rows that hold them.",
            ("recover.max_new_tokens", "transfer.length"),
        )


def time_spent(run: Recorded) -> Iterator[Finding]:
    """Time of long training stages that did not go into training steps."""
    stages = section(run.ledger, "stages")
    found = []
    for stage in run.training:
        spent = section(stages, stage)
        seconds = section(spent, "seconds")
        total = number(spent.get("total")) or 0.0
        for kind, (bound, what, turn, keys) in _LOST.items():
            amount = number(spent.get("lost") if kind == "lost" else seconds.get(kind)) or 0.0
            if total >= LONG and amount > bound * total:
                named = tuple(key.format(stage=stage) for key in keys)
                said = f"{percent(round(amount / total, 2))} of the stage's time went into {what}."
                found.append((amount, Finding("Time goes elsewhere", stage, said, turn, named)))
    yield from (finding for _, finding in sorted(found, key=lambda item: -item[0]))
