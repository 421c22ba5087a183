"""Findings about the training stages: losses, skipped updates, validation, and how often text was read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median

from transllm_jax.evaluation.advice.recorded import Finding, Recorded, Training
from transllm_jax.evaluation.page.measures import number, percent, section, written

# Fewer logged steps say nothing about a trend.
LEAST_STEPS = 50
# How many standard errors a difference must exceed to count: to have fallen; and to have risen, or to be sure that no
# fall hides in the noise (more, because a false alarm costs a run).
FALLEN, SURE = 2.0, 3.0
# "Does not fall": the fall is certainly below this share of the loss. "Rises": it rose by at least this share.
FLAT, RISE = 0.05, 0.02
# The best validation came within this share of the steps, and the last one is worse by this share.
EARLY, WORSE, LEAST_VALIDATIONS = 0.7, 0.01, 4
# How often text can be read before more of it would do more.
EPOCHS = 4.0
# Share of the computed tokens that are padding.
PADDED = 0.25


def skipped(run: Recorded) -> Iterator[Finding]:
    """Updates that were skipped because they were not finite."""
    for stage, training in sorted(run.training.items(), key=lambda item: -item[1].skipped):
        if training.skipped:
            steps = _last_step(training)
            yield Finding(
                "Updates were skipped",
                stage,
                f"The loss or its gradient was not finite in {training.skipped:,} of {steps:,} steps.",
                f"Look at the texts that {stage}/skipped.jsonl names; if they are good, lower the learning rate.",
                (f"{stage}.learning_rate", f"{stage}.clip_norm", f"{stage}.warmup_ratio"),
            )


def rising_loss(run: Recorded) -> Iterator[Finding]:
    """A loss that was lower before than it is at the end."""
    for stage, training in run.training.items():
        rise = _rise(_losses(training))
        if rise is not None:
            before, after = rise
            yield Finding(
                "The loss rises",
                stage,
                f"The loss rose from {written(before)} to {written(after)}, more than single steps differ.",
                "Lower the learning rate, or clip gradients at a smaller norm.",
                (f"{stage}.learning_rate", f"{stage}.clip_norm", f"{stage}.warmup_ratio"),
            )


def flat_loss(run: Recorded) -> Iterator[Finding]:
    """A loss that neither rises nor falls."""
    for stage, training in run.training.items():
        losses = _losses(training)
        if _rise(losses) is None and _is_flat(losses):
            first, last = _parts(losses, 3)[0], _parts(losses, 3)[-1]
            yield Finding(
                "The loss does not fall",
                stage,
                f"The loss was {written(median(first))} in the first third of {_last_step(training):,} steps and "
                f"{written(median(last))} in the last.",
                "Raise the learning rate, five times at first; then train for more steps.",
                (f"{stage}.learning_rate", f"{stage}.new_rows_multiplier", f"{stage}.steps"),
            )


def early_best(run: Recorded) -> Iterator[Finding]:
    """A best validation long before the end."""
    for stage, training in run.training.items():
        rows = _validations(training)
        if len(rows) < LEAST_VALIDATIONS or run.setting(f"{stage}.validation.patience") is not None:
            continue
        bits, best = min((bits, -step) for step, bits in rows)
        step, (last, after) = -best, rows[-1]
        if step <= EARLY * last and after >= (1 + WORSE) * bits:
            yield Finding(
                "The best checkpoint came early",
                stage,
                f"Validation was best at step {step:,} of {last:,}, with {written(bits)} bits per byte; at the end it "
                f"was {written(after)}. The steps after it did not help.",
                "Stop there with a patience or fewer steps, or give the stage more text.",
                (f"{stage}.validation.patience", f"{stage}.steps", f"{stage}.{_text_key(stage)}"),
            )


def repeated_text(run: Recorded) -> Iterator[Finding]:
    """Sources that were read many times, unless validation says that the model still gets better."""
    found = []
    for stage, training in run.training.items():
        rows = _validations(training)
        if rows and rows[-1][1] <= min(bits for _, bits in rows):
            continue
        for name in training.sources:
            epochs = number(section(training.sources, name).get("epochs"))
            if epochs is not None and epochs > EPOCHS:
                found.append((epochs, stage, name))
    for epochs, stage, name in sorted(found, key=lambda item: -item[0]):
        more = f" {_others(len(found) - 1)}" if len(found) > 1 else ""
        yield Finding(
            "Text was read many times",
            stage,
            f"{name} was read {epochs:.1f} times.{more}",
            "Give more of it, or read it less often: fewer steps, or a smaller weight.",
            tuple(dict.fromkeys((_more_of(stage, name), f"{stage}.steps", _weight_of(stage, name)))),
        )


def padding(run: Recorded) -> Iterator[Finding]:
    """Computation spent on padding."""
    found = []
    for stage, training in run.training.items():
        shares = [share for row in training.losses if (share := number(row.get("padded_fraction"))) is not None]
        if len(shares) >= LEAST_STEPS and mean(shares) > PADDED:
            found.append((mean(shares), stage))
    for share, stage in sorted(found, reverse=True):
        length = number(run.setting(f"{stage}.length"))
        rows = "" if length is None else f" of {length:.0f}"
        yield Finding(
            "Much padding",
            stage,
            f"{percent(round(share, 2))} of the computed tokens are padding: the examples do not fill rows{rows}.",
            "Choose a length that holds several examples; if the source is small, a shorter one.",
            (f"{stage}.length",),
        )


def _losses(training: Training) -> list[float]:
    return [loss for row in training.losses if (loss := number(row.get("loss"))) is not None]


def _last_step(training: Training) -> int:
    return max((int(number(row.get("step")) or 0) for row in training.losses), default=0)


def _validations(training: Training) -> list[tuple[int, float]]:
    """Step and bits per byte of each validation that gave a number."""
    return [
        (int(row["step"]), bits)
        for row in training.validation
        if (bits := number(row.get("bits_per_byte"))) is not None
    ]


def _parts(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """The values in this many parts of one size, in order; a rest at the start is left out."""
    size = len(values) // count
    return [values[len(values) - (count - part) * size :][:size] for part in range(count)]


def _noise(parts: Sequence[Sequence[float]]) -> float:
    """The standard deviation of single losses about the median of their part, from median deviations, which single
    outliers do not move."""
    apart = [abs(value - middle) for part in parts for middle in (median(part),) for value in part]
    # A part's own median lies closer to its values than the true one does.
    return 1.4826 * median(apart) * math.sqrt(len(apart) / (len(apart) - len(parts)))


def _error(noise: float, before: Sequence[float], after: Sequence[float]) -> float:
    """The standard error of the difference between the medians of two parts."""
    return math.sqrt(math.pi / 2) * noise * math.sqrt(1 / len(before) + 1 / len(after))


def _trend(losses: Sequence[float]) -> float:
    """By how many standard errors the losses rise with the steps, below 0 if they fall: Spearman's rank correlation."""
    ranks = {place: rank for rank, place in enumerate(sorted(range(len(losses)), key=lambda place: losses[place]))}
    count = len(losses)
    apart = sum((place - rank) ** 2 for place, rank in ranks.items())
    return (1 - 6 * apart / (count * (count**2 - 1))) * math.sqrt(count - 1)


def _rise(losses: Sequence[float]) -> tuple[float, float] | None:
    """The median loss of the best quarter and of the last one, if the last is clearly higher."""
    if len(losses) < LEAST_STEPS:
        return None
    parts = _parts(losses, 4)
    last, lowest = parts[-1], min(parts[:-1], key=median)
    before, after = median(lowest), median(last)
    clear = max(SURE * _error(_noise(parts), lowest, last), RISE * abs(before))
    return (before, after) if after - before > clear else None


def _is_flat(losses: Sequence[float]) -> bool:
    """Whether the loss certainly fell little: noise alone, in which a fall could hide, is not enough."""
    if len(losses) < LEAST_STEPS:
        return False
    parts = _parts(losses, 3)
    # A long stage may have fallen within its first steps.
    start, first, last = losses[: LEAST_STEPS // 5], parts[0], parts[-1]
    noise = _noise(parts)
    fell = median(first) - median(last)
    error = _error(noise, first, last)
    has_fallen = -_trend(losses) > FALLEN or median(start) - median(last) > FALLEN * _error(noise, start, last)
    return not has_fallen and fell + SURE * error <= FLAT * abs(median(first))


# What the parts of stage `transfer` are made from: the key that gives more of it, and the part's weight.
_PARTS: Mapping[str, tuple[str, str]] = {
    "chains": ("recover.instructions", "transfer.chains"),
    "english": ("recover.instructions", "transfer.english"),
    "translations": ("transfer.pairs", "transfer.translations"),
}


def _text_key(stage: str) -> str:
    return "pairs" if stage == "transfer" else "sources"


def _more_of(stage: str, name: str) -> str:
    return _PARTS[name][0] if stage == "transfer" and name in _PARTS else f"{stage}.sources"


def _weight_of(stage: str, name: str) -> str:
    return _PARTS[name][1] if stage == "transfer" and name in _PARTS else f"{stage}.sources"


def _others(count: int) -> str:
    return (
        f"So {'was one other source' if count == 1 else f'were {count} other sources'}, more than {EPOCHS:.0f} times."
    )
