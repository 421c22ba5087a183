"""An overlay: what a variant of a run changes in its config. It is data; the stages are the same for all variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transllm_jax.choices import TRAININGS
from transllm_jax.config import Config, load_section
from transllm_jax.errors import UserError

Tree = dict[str, Any]
# What a user has to give for some overlays.
GIVEN = {
    "writer": "--writer FILE, a jsonl file of instructions and another writer's answers",
    "base_model": "--base-model SOURCE, the model from which the chat model was made, with a chat template",
}


class DoesNotApply(Exception):
    """An overlay makes no sense for a config; the message says why."""


@dataclass(frozen=True)
class Sources:
    """A change of the sources of training stages whose keys have one of these values: keys to set, or leave out."""

    where: Mapping[str, tuple[Any, ...]]
    set: Mapping[str, Any] = field(default_factory=dict)
    leave_out: bool = False
    stages: tuple[str, ...] = TRAININGS


@dataclass(frozen=True)
class Start:
    """A run before the run: what it trains by stage `until` is the adapter that the run begins with.

    scale: a factor of that adapter. The run itself is on the config's own model.
    """

    overlay: Overlay
    until: str
    scale: float = 1.0


@dataclass(frozen=True)
class Overlay:
    """A variant of a config. label: its row in the table. tests: the question that it answers.

    set: dotted keys. multiply: dotted keys whose numbers are multiplied. sources: changes of sources. tokens_into: the
    one training stage that gets the tokens of all three; the others get no steps. needs: what the user has to give;
    `{writer}` in a value stands for it, and `{adapter}` for the adapter of `start`. unless: dotted keys with a value
    for which the overlay makes no sense, and why.
    """

    name: str
    label: str
    tests: str
    set: Mapping[str, Any] = field(default_factory=dict)
    multiply: Mapping[str, float] = field(default_factory=dict)
    sources: tuple[Sources, ...] = ()
    tokens_into: str | None = None
    needs: tuple[str, ...] = ()
    unless: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    start: Start | None = None


def applied(overlay: Overlay, config: Config, given: Mapping[str, str], *, seed: int) -> Config:
    """The config of a variant. given: what the user gave, by the names of `GIVEN`, and `adapter`.

    Raises DoesNotApply if the overlay makes no sense for this config or lacks something that the user has to give.
    """
    for name in overlay.needs:
        if name not in given:
            raise DoesNotApply(f"give {GIVEN[name]}")
    tree: Tree = config.model_dump(mode="json")
    for key, (value, why) in overlay.unless.items():
        if _get(tree, key) == value:
            raise DoesNotApply(f"{key} is {value}: {why}")
    if overlay.tokens_into is not None:
        _move_tokens(tree, overlay.tokens_into)
    for rule in overlay.sources:
        _change_sources(tree, rule)
    for key, factor in overlay.multiply.items():
        _set(tree, key, _get(tree, key) * factor)
    for key, value in overlay.set.items():
        _set(tree, key, _filled(value, given))
    try:
        made = load_section(Config, tree, [], overlay.name)
    except UserError as error:
        raise DoesNotApply(str(error).removeprefix(f"{overlay.name}: ")) from None
    changes = overlay.set or overlay.sources or overlay.multiply or overlay.tokens_into
    if changes and made == config:
        raise DoesNotApply("the config is this already")
    return made.model_copy(update={"seed": seed})


def tokens_of(config: Config, stages: Sequence[str] = TRAININGS) -> int | None:
    """The tokens that training stages train on, padding included; None if one is counted in epochs."""
    counts = [_tokens(getattr(config, name).model_dump()) for name in stages]
    return None if None in counts else sum(count for count in counts if count is not None)


def _tokens(section: Tree) -> int | None:
    steps = section["steps"]
    return None if steps is None else int(steps * section["batch_size"] * section["length"])


def _move_tokens(tree: Tree, stage: str) -> None:
    counts = {name: _tokens(tree[name]) for name in TRAININGS}
    in_epochs = [name for name, count in counts.items() if count is None]
    if in_epochs:
        raise DoesNotApply(f"{in_epochs[0]} is counted in epochs; give {in_epochs[0]}.steps, so that tokens are equal")
    section = tree[stage]
    total = sum(count for count in counts.values() if count is not None)
    section["steps"] = round(total / (section["batch_size"] * section["length"]))
    for name in TRAININGS:
        if name != stage:
            tree[name].update(steps=0, warmup_steps=None)


def _change_sources(tree: Tree, rule: Sources) -> None:
    for stage in rule.stages:
        kept = []
        for source in tree[stage]["sources"]:
            # A key that is idle is not written; no rule names one by its default.
            fits = all(source.get(key) in values for key, values in rule.where.items())
            if fits and rule.leave_out:
                continue
            kept.append({**source, **rule.set} if fits else source)
        tree[stage]["sources"] = kept


def _get(tree: Tree, key: str) -> Any:
    node: Any = tree
    for name in key.split("."):
        node = None if node is None else node.get(name)
    return node


def _set(tree: Tree, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node[name]
    node[last] = value


def _filled(value: Any, given: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _filled(inner, given) for name, inner in value.items()}
    if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
        return given[value[1:-1]]
    return value
