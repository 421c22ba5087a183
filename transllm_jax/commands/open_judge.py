"""Opens the judge of an evaluation, with its baseline, as they are written on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from transllm_jax.commands.open_systems import Systems
from transllm_jax.config import Endpoint, load_section
from transllm_jax.errors import UserError
from transllm_jax.evaluation.judge.cost import Spending, parse_limit, parse_prices
from transllm_jax.evaluation.judge.model import MAX_TOKENS, WHERE, EndpointModel, Model, SystemModel, refuse_own_judge
from transllm_jax.evaluation.judge.prompts import PRESETS
from transllm_jax.evaluation.judge.references import CHOICES
from transllm_jax.evaluation.suites.judging import CACHE, Judging
from transllm_jax.evaluation.systems.named import Named, parse_system
from transllm_jax.evaluation.systems.system import Language, System

T = TypeVar("T", bound=str)


@dataclass(frozen=True)
class JudgeGiven:
    """What the user gave about the judge.

    endpoint: `key=value` of the config's section `Endpoint`, for the judge's server. max_cost, prices: as text.
    """

    judge: str | None = None
    endpoint: Sequence[str] = ()
    max_tokens: int = MAX_TOKENS
    preset: str = PRESETS[0]
    repeats: int = 1
    references: str = CHOICES[0]
    reference_file: Path | None = None
    baseline: str | None = None
    max_cost: str | None = None
    prices: str | None = None
    is_system: bool = False
    asked_in: str | None = None


def judging_of(given: JudgeGiven, out: Path) -> Judging:
    """The settings, before anything is opened. out: where the judge's replies are kept.

    Raises UserError for a choice that does not exist, or a limit or price that cannot be read.
    """
    languages: tuple[Language, ...] = get_args(Language)
    return Judging(
        judge=given.judge,
        against=given.baseline,
        cache=out / CACHE,
        spending=Spending(
            None if given.prices is None else parse_prices(given.prices),
            None if given.max_cost is None else parse_limit(given.max_cost),
        ),
        preset=_choice(given.preset, PRESETS, "--preset"),
        repeats=given.repeats,
        references=_choice(given.references, CHOICES, "--references"),
        reference_file=given.reference_file,
        asked_in=None if given.asked_in is None else _choice(given.asked_in, languages, "--asked-in"),
    )


def opened(
    judging: Judging, given: JudgeGiven, opener: Systems, systems: Mapping[str, System], named: Sequence[Named]
) -> Judging:
    """The same with the judge and the baseline, which may be one of the systems.

    systems: by name, as they are written in `named`. Raises UserError for a judge or a baseline that is not there, and
    for a judge that is one of the systems without a confirmation.
    """
    baseline = None if given.baseline is None else _baseline(given.baseline, opener, systems, named)
    model = None if given.judge is None else _model(given, opener)
    if model is not None:
        candidates = [*systems.values(), *([] if baseline is None else [baseline])]
        refuse_own_judge(model, candidates, confirmed=given.is_system)
    # Before answers are made for hours; what it has said before needs no server.
    if isinstance(model, EndpointModel) and not judging.cache.exists():
        model.reach()
    return replace(judging, model=model, baseline=baseline)


def _baseline(given: str, opener: Systems, systems: Mapping[str, System], named: Sequence[Named]) -> System:
    """The baseline: one of the systems, by its name or written in the same way, or another one."""
    if given in systems:
        return systems[given]
    wanted = parse_system(given)
    for one in named:
        if (one.kind, one.where, one.part) == (wanted.kind, wanted.where, wanted.part):
            return systems[one.name]
    if wanted.name in systems:
        raise UserError(f"--baseline {given}: a system has the name {wanted.name}, too; write NAME={given}")
    return opener.open(wanted)


def _model(given: JudgeGiven, opener: Systems) -> Model:
    assert given.judge is not None
    named = parse_system(given.judge)
    if named.kind == "endpoint":
        values: dict[str, Any] = {"endpoint": named.where, "model": named.part}
        return EndpointModel(load_section(Endpoint, values, given.endpoint, WHERE), opener.say, given.max_tokens)
    if named.kind == "model":
        return SystemModel(opener.open(named), given.max_tokens)
    raise UserError(f"--judge {given.judge}: a judge is a server's model (URL#MODEL) or a local model; give one")


def _choice(given: str, choices: Sequence[T], option: str) -> T:
    found = next((choice for choice in choices if choice == given), None)
    if found is None:
        raise UserError(f"{option} {given!r} does not exist; choose from {', '.join(choices)}")
    return found
