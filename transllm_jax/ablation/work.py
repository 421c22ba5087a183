"""Carries out an ablation: run after run, each with what others have made already; resumable at any point."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transllm_jax.ablation.adapter import write_scaled_adapter
from transllm_jax.ablation.overlay import Overlay
from transllm_jax.ablation.page import LABELS, by_variant, page
from transllm_jax.ablation.plan import Plan, Variant
from transllm_jax.ablation.plot import write_plot
from transllm_jax.ablation.results import Found, data_of, found_by, original_of, through_of, write_found
from transllm_jax.ablation.sharing import Shelf, begin_with_answers, drop_checkpoints, link_step
from transllm_jax.ablation.table import BRIDGE, FULL, ORIGINAL
from transllm_jax.config import Config
from transllm_jax.config.load import recorded_date
from transllm_jax.disk import read_json, write_json, write_text
from transllm_jax.errors import Diverged, UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages.pipeline import run_pipeline
from transllm_jax.stages.recorded import RUN
from transllm_jax.stages.run import Run
from transllm_jax.stages.steps import Inputs, all_inputs, artifact

RESULTS, PAGE, PLOT, LOG, DAY, SHARED = (
    "ablation.json",
    "ablation.md",
    "ablation.svg",
    "log.jsonl",
    "date.json",
    "shared.json",
)


@dataclass
class Ablation:
    """An ablation in a directory, which is locked.

    config: the config's name. of: the config itself. ask: answers the questions through a finished run, in a way of
    `table.THROUGH`. known: what this ablation and others, on other machines, found.
    """

    config: str
    of: Config
    directory: Path
    plan: Plan
    progress: Progress
    interrupt: Interrupt
    ask: Callable[[str, Variant], list[dict[str, Any]]]
    known: dict[tuple[str, int | None], Found] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shelf = Shelf()
        for workdir in (Path(self.of.workdir), *sorted(self.directory.glob("*/seed-*"))):
            self.shelf.add(workdir)

    def carry_out(self) -> list[str]:
        """Make every run that is not done; returns the variants that failed. Raises Preempted when asked to stop."""
        failed: dict[str, str] = {}
        for number, variant in enumerate(self.plan.variants, 1):
            key = (variant.overlay.name, variant.seed)
            if self.is_known(variant.overlay.name, variant):
                continue
            self.interrupt.check(f"before {variant.name}")
            self.progress.say(f"\n{number} of {len(self.plan.variants)}: {variant.name}: {variant.overlay.label}")
            self._log("begun", variant)
            try:
                shared = self._make(variant)
            except (Diverged, UserError) as error:
                # What is wrong with the full method is wrong with all.
                if variant.overlay is FULL:
                    raise
                failed[variant.overlay.name] = f"seed {variant.seed}: {error}"
                self._log("failed", variant, error=str(error))
                self.progress.say(f"  {variant.name} failed: {error}; the others go on", style="red")
                continue
            self.known[key] = found_by(variant, shared, made_with())
            # What the newest run has measured: it may have been asked otherwise before.
            self.known[ORIGINAL, None] = original_of(variant, made_with())
            self._log("done", variant, seconds=self.known[key].seconds)
            self.write(failed)
        # At the end: it takes as long as a training, and tells less.
        for name, variant in self.through():
            self._make_through(name, variant)
        self.write(failed)
        return list(failed)

    def through(self) -> list[tuple[str, Variant]]:
        """The rows that are asked through the full method's runs: their names, and these runs."""
        runs = [variant for variant in self.plan.variants if variant.overlay is FULL]
        return [(name, run) for run in runs for name in self.plan.through if _can_ask(name, run.config)]

    def _make_through(self, name: str, variant: Variant) -> None:
        """Ask the original through the full method's run, if that is not done."""
        key, last = (name, variant.seed), variant.workdir / "transfer"
        if self.is_known(name, variant):
            return
        if not last.is_dir():
            # The full method's result came from another machine, or from the config's own run, which is linked.
            self.take(variant)
        if not last.is_dir() and not self.plan.by_name:
            what = f"{name}, seed {variant.seed}: its run is elsewhere"
            self.progress.say(f"{what}; --only {name} makes it", style="yellow")
            return
        if not (last.is_dir() and (variant.workdir / RUN).is_file()):
            # Of linked steps alone this makes a run, and trains nothing.
            self._make(variant)
        self.progress.say(f"\n{LABELS[name]}, seed {variant.seed}")
        started = time.monotonic()
        items = self.ask(name, variant)
        self.known[key] = through_of(name, variant, items, time.monotonic() - started, made_with())
        forget_compiled()

    def is_known(self, name: str, variant: Variant) -> bool:
        """Whether a row's result is that of this config and of the held-out files as they are now. name: the variant's,
        or that of a row that is asked through it."""
        known = self.known.get((name, variant.seed))
        return known is not None and (known.config, known.data) == (variant.config_hash, self.data)

    @cached_property
    def data(self) -> str:
        """The hash of the held-out files as they are now. Raises UserError for a missing file."""
        first = self.plan.variants[0]
        # A run that begins with another's adapter has no inputs before that is made; the held-out files are the same.
        return data_of(inputs_of(first if first.start is None else first.start.variant)["evaluation/base"])

    def shown(self) -> list[Found]:
        """The results that can be compared: those on the held-out files as they are now, of the config as it is."""
        planned: dict[tuple[str, int | None], str] = {
            (one.overlay.name, one.seed): one.config_hash for one in self.plan.variants
        }
        planned |= {(name, run.seed): run.config_hash for name, run in self.through()}
        return [
            one
            for one in self.known.values()
            if one.data == self.data and one.config == planned.get(one.key, one.config)
        ]

    def _make(self, variant: Variant) -> Mapping[str, str]:
        """Do a run's steps that are not done or made elsewhere; returns where those were made."""
        if variant.start is not None and not (variant.start.adapter / "adapter.json").is_file():
            self._make_adapter(variant)
        shared = self.take(variant)
        run_pipeline(
            variant.config,
            variant.workdir,
            self.progress,
            self.interrupt,
            until=variant.until,
            left_out=variant.left_out,
        )
        self.shelf.add(variant.workdir)
        drop_checkpoints(variant.workdir)
        forget_compiled()
        return shared

    def _make_adapter(self, variant: Variant) -> None:
        start = variant.start
        assert start is not None
        self.progress.say(f"  first, what it begins with: {start.variant.overlay.tests}")
        self._make(start.variant)
        # The model that the adapter is put onto.
        of = FULL.name
        base = Variant(Overlay(of, "", ""), variant.seed, self.of, self.directory / "model" / "seed-0", until="base")
        self._make(base)
        write_scaled_adapter(start.variant.workdir, start.until, base.workdir / "base", start.adapter, start.scale)

    def take(self, variant: Variant) -> Mapping[str, str]:
        """Link what other runs have made into a run's directory; returns where each linked step was made."""
        path = variant.workdir / SHARED
        shared: dict[str, str] = dict(read_json(path)) if path.is_file() else {}
        variant.workdir.mkdir(parents=True, exist_ok=True)
        inputs = inputs_of(variant)
        for step in variant.steps:
            if artifact(variant.workdir, step.name).manifest() is not None:
                continue
            made = self.shelf.find(step.name, inputs[step.name])
            if made is not None and made.workdir != variant.workdir:
                link_step(step, made, variant.workdir)
                shared[step.name] = str(made.workdir)
                write_json(path, shared)
                self.progress.say(f"  {step.name}: as in {made.workdir}", style="dim")
            elif step.name == "recover":
                answers = self.shelf.answers(inputs)
                if answers is not None:
                    begin_with_answers(answers, variant.workdir, inputs[step.name])
                    self.progress.say(f"  recover: begins with the answers of {answers.parent.parent}", style="dim")
        return shared

    def write(self, failed: Mapping[str, str]) -> None:
        """Write ablation.json, the page and the plot."""
        if not self.known:
            return
        why_not = {**self.plan.does_not_apply, **{name: f"failed: {why}" for name, why in failed.items()}}
        write_found(self.directory / RESULTS, list(self.known.values()), self.config, why_not)
        if found := self.shown():
            write_plot(self.directory / PLOT, by_variant(found))
            write_text(self.directory / PAGE, page(found, why_not, PLOT))

    def _log(self, what: str, variant: Variant, **more: Any) -> None:
        """Add a line to the one log of what was done."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, **variant.recorded, **more}
        with (self.directory / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _can_ask(name: str, config: Config) -> bool:
    """Whether runs of a config have what the original is asked through: a model that translates, or chains."""
    if name == BRIDGE:
        return config.translate.steps != 0
    return config.transfer.steps != 0 and config.transfer.answers == "chains"


def inputs_of(variant: Variant) -> dict[str, Inputs]:
    """The inputs of each step of a run, as the run itself computes them. Raises UserError for a missing file."""
    run = Run(variant.config, variant.workdir, Progress(quiet=True), Interrupt())
    return all_inputs(run)


def day_of(config: Config, directory: Path) -> date:
    """The date of all runs for chat templates: the config's, that of its own run, or the day the ablation began."""
    if config.date is not None:
        return config.date
    kept = directory / DAY
    if kept.is_file():
        return date.fromisoformat(str(read_json(kept)["date"]))
    own = Path(config.workdir) / RUN
    day = (recorded_date(own) if own.is_file() else None) or date.today()
    write_json(kept, {"date": day.isoformat()})
    return day


def made_with() -> dict[str, Any]:
    """What the results were made with: version, commit (None outside a repository), and machine."""
    return {"version": version("transllm-jax"), "commit": commit(), "machine": machine()}


def commit() -> str | None:
    """The commit of the code, with a + if files were changed since; None outside a repository."""
    here = Path(__file__).parent
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=10"]
        found = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def machine() -> str:
    """The devices that jax computes on, such as `2 cores, x86_64`."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    return f"{len(jax.devices())} {device.device_kind}"


def forget_compiled() -> None:
    """Forget compiled programs, which the next run reads from disk: a process may only have so many in memory."""
    import jax

    jax.clear_caches()
    gc.collect()
