"""Which runs an ablation has: each variant with each seed, in order, with its config and its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from transllm_jax.ablation.overlay import DoesNotApply, Overlay, applied
from transllm_jax.ablation.table import FULL, NAMES, OVERLAYS, THROUGH
from transllm_jax.config import Config
from transllm_jax.disk import sha256_of_json
from transllm_jax.errors import UserError
from transllm_jax.stages.steps import STEPS, Step, steps_until

# What no result depends on: where a run is, what it is called, how its work is divided, and what is written afterwards.
_NO_RESULT = {"workdir", "title", "date", "token_cache", "mesh", "attention", "export"}


@dataclass(frozen=True)
class Start:
    """The run that makes the adapter with which another run begins. until: its last stage. scale: of the adapter."""

    variant: Variant
    until: str
    scale: float
    adapter: Path


@dataclass(frozen=True)
class Variant:
    """A run of an ablation."""

    overlay: Overlay
    seed: int
    config: Config
    workdir: Path
    start: Start | None = None
    until: str = "transfer"

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.overlay.name}, seed {self.seed}"

    @property
    def left_out(self) -> frozenset[str]:
        """The steps that are not done: evaluations before the last, and what the run does not need."""
        names = {step.name for step in STEPS if step.name.startswith("evaluation/")}
        names -= {"evaluation/base", "evaluation/transfer"} if self.until == "transfer" else set()
        if self.config.transfer.steps == 0:
            names.add("recover")
        return frozenset(names)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that are done, in order."""
        return tuple(step for step in steps_until(self.until) if step.name not in self.left_out)

    @property
    def config_hash(self) -> str:
        """A hash of all keys on which its result depends."""
        tree = json.loads(json.dumps(self.config.model_dump(mode="json", exclude=_NO_RESULT)))
        if self.start is not None:
            # Where the adapter is says nothing; what it was made with does.
            start = self.start
            tree["vocabulary"]["adapter"] = [start.variant.config_hash, start.until, start.scale]
        return sha256_of_json(tree)[:16]

    @property
    def recorded(self) -> dict[str, Any]:
        """What identifies it in a file of results."""
        return {"name": self.overlay.name, "seed": self.seed, "config": self.config_hash}


@dataclass(frozen=True)
class Plan:
    """The runs in order, and why some variants have none. through: the rows that are asked through the full method's
    runs; by_name: that these were asked for by their own names."""

    variants: Sequence[Variant]
    does_not_apply: Mapping[str, str]
    through: Sequence[str]
    by_name: bool


def plan_of(
    config: Config,
    directory: Path,
    seeds: Sequence[int],
    only: Sequence[str],
    given: Mapping[str, str],
    day: date,
) -> Plan:
    """The plan of an ablation in a directory. day: the date of all runs. only: names of variants; none for all. Rows
    that are asked through the full method come with `full`, and alone by their own names; then `full` is made, too.

    Raises UserError for a name that there is not, for a variant that was asked for and does not apply, and for
    questions that are missing.
    """
    names = (*NAMES, *THROUGH)
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: there is no such variant; the variants are {', '.join(names)}")
    require_questions(config)
    update = {"date": day, "token_cache": config.token_cache or str(directory / "tokens")}
    config = config.model_copy(update=update)
    through = THROUGH if not only or FULL.name in only else tuple(name for name in THROUGH if name in only)
    wanted = {*only, FULL.name} if through else set(only)
    chosen = [overlay for overlay in OVERLAYS if not only or overlay.name in wanted]
    why_not: dict[str, str] = {}
    variants = []
    for seed in seeds:
        for overlay in chosen:
            try:
                variants.append(_variant(overlay, config, directory / overlay.name / f"seed-{seed}", given, seed))
            except DoesNotApply as reason:
                why_not[overlay.name] = str(reason)
    for name in only:
        if name in why_not:
            raise UserError(f"--only {name}: it does not apply to this config: {why_not[name]}")
    return Plan(variants, why_not, through, by_name=not set(through).isdisjoint(only))


def require_questions(config: Config) -> None:
    """Raises UserError if a config has no questions with known answers."""
    if config.evaluation.answers is None:
        raise UserError(
            "evaluation.answers is not given: an ablation is measured on questions with known answers, a jsonl file "
            "whose lines have question and answers"
        )


def _variant(overlay: Overlay, config: Config, workdir: Path, given: Mapping[str, str], seed: int) -> Variant:
    if overlay.start is None:
        return Variant(overlay, seed, _placed(applied(overlay, config, given, seed=seed), workdir), workdir)
    place = workdir.with_name(f"{workdir.name}-start")
    before = _variant(overlay.start.overlay, config, place, given, seed)
    before = Variant(before.overlay, seed, before.config, place, until=overlay.start.until)
    adapter = workdir.with_name(f"{workdir.name}-adapter")
    made = applied(overlay, config, {**given, "adapter": str(adapter)}, seed=seed)
    start = Start(before, overlay.start.until, overlay.start.scale, adapter)
    return Variant(overlay, seed, _placed(made, workdir), workdir, start)


def _placed(config: Config, workdir: Path) -> Config:
    return config.model_copy(update={"workdir": str(workdir)})
