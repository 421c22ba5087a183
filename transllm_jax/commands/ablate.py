"""What `transllm ablate` does: plan the variants, carry them out, and show what they found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from rich.table import Table

from transllm_jax.ablation.page import by_variant, page
from transllm_jax.ablation.plan import Variant, plan_of, require_questions
from transllm_jax.ablation.results import Found, read_found, require_same
from transllm_jax.ablation.sharing import answers_key
from transllm_jax.ablation.work import PAGE, PLOT, RESULTS, Ablation, day_of, inputs_of
from transllm_jax.choices import TRAININGS
from transllm_jax.commands.open_systems import Systems
from transllm_jax.config import load_config
from transllm_jax.config.marks import require_values
from transllm_jax.disk import locked, write_text
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.registry import suite_named
from transllm_jax.evaluation.suites.suite_run import SuiteOptions, SuiteRun, read_items
from transllm_jax.evaluation.systems.named import parse_system
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages.manifest import fingerprint
from transllm_jax.stages.steps import STEPS, artifact
from transllm_jax.words import duration


@dataclass(frozen=True)
class AblateOptions:
    """The command's options. given: by the names of `ablation.overlay.GIVEN`. others: ablation.json of others."""

    only: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    out: Path | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[Path] = ()
    markdown: Path | None = None
    dry_run: bool = False


def ablate(
    config: Path, overrides: Sequence[str], options: AblateOptions, progress: Progress, interrupt: Interrupt
) -> list[str]:
    """Run what is not done, and write ablation.json, ablation.md and ablation.svg; returns the variants that failed.

    Raises UserError for bad input, before anything is run; Preempted when asked to stop.
    """
    of = load_config(config, overrides)
    require_values(of.model_dump(mode="json"), str(config))
    if "://" in of.workdir:
        raise UserError(f"workdir is {of.workdir}: an ablation is on this machine's disk; give another workdir")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds: give each seed once, such as --seeds 0 1 2")
    for path in options.given.values():
        if not Path(path).exists() and "/" in path and not path.startswith("pypi:"):
            raise UserError(f"{path}: there is no such file or directory; correct the path")
    require_questions(of)
    directory = options.out or Path(f"{of.workdir.rstrip('/')}-ablation")
    with locked(directory):
        plan = plan_of(of, directory, options.seeds, options.only, options.given, day_of(of, directory))
        ask = partial(_through, directory, progress, interrupt)
        ablation = Ablation(str(config), of, directory, plan, progress, interrupt, ask)
        _add_known(ablation, options.others)
        if options.dry_run:
            show_plan(ablation)
            return []
        failed = ablation.carry_out()
        _show(ablation, failed, options.markdown)
    return failed


def _through(
    directory: Path, progress: Progress, interrupt: Interrupt, way: str, variant: Variant
) -> list[dict[str, object]]:
    """The answers of a run's original that is asked through the run, judged. way: a kind of system: bridge, inside."""
    section = variant.config.evaluation
    options = SuiteOptions(
        questions=Path(section.answers or ""),
        limit=section.max_questions,
        max_new_tokens=section.max_chain_tokens,
        max_answer_tokens=section.max_answer_tokens,
        language=variant.config.language,
        prompts=variant.config.prompts,
    )
    system = Systems(progress.say, options, batch_size=section.batch_size).open(
        parse_system(f"{way}:{variant.workdir}")
    )
    place = directory / way / f"seed-{variant.seed}"
    suite_named("answers").run(SuiteRun("answers", system, place, options, progress, interrupt.check))
    return read_items(place)


def _add_known(ablation: Ablation, others: Sequence[Path]) -> None:
    """What this ablation has found, and what others have, which must be on the same held-out files."""
    own = ablation.directory / RESULTS
    for found in read_found(own) if own.is_file() else ():
        ablation.known[found.key] = found
    for path in others:
        for found in read_found(path):
            require_same(found, ablation.data, path)
            known = ablation.known.get(found.key)
            if known is None or known.data != ablation.data:
                ablation.known[found.key] = found
    shown = {found.key for found in ablation.shown()}
    stale = [found for found in ablation.known.values() if found.key not in shown]
    if stale:
        names = ", ".join(dict.fromkeys(found.name for found in stale))
        ablation.progress.say(
            f"{len(stale)} results are of another config or other held-out files, and not shown: {names}",
            style="yellow",
        )


def _show(ablation: Ablation, failed: Sequence[str], markdown: Path | None) -> None:
    say, found = ablation.progress.say, ablation.shown()
    if not found:
        return
    if markdown is not None:
        plot = ablation.directory / PLOT
        target = markdown.with_name(f"{markdown.stem}.svg")
        target.write_bytes(plot.read_bytes())
        write_text(markdown, page(found, ablation.plan.does_not_apply, target.name))
    ablation.progress.console.print(_summary(found))
    for name in failed:
        say(f"{name} failed; see {ablation.directory / PAGE}", style="red")
    say(f"table    {ablation.directory / PAGE}")
    say(f"plot     {ablation.directory / PLOT}")
    say(f"results  {ablation.directory / RESULTS}")


def _summary(found: Sequence[Found]) -> Table:
    """A short table for a terminal; the page has all of it."""
    from transllm_jax.ablation import numbers

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("variant", "seeds", "right in the language", "asked in English", "English KL", "bits/byte"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, runs in by_variant(found).items():
        shares = [numbers.share(runs, holds) for holds in (numbers.right, numbers.english)]
        values = [numbers.number(runs, key) for key in ("english_kl", "bits_per_byte")]
        table.add_row(
            name,
            "" if runs[0].seed is None else str(len(runs)),
            *("" if one is None else f"{one.value:.0%} ({one.low:.0%}-{one.high:.0%})" for one in shares),
            *("" if one is None else f"{one.value:.3f}" for one in values),
        )
    return table


def show_plan(ablation: Ablation) -> None:
    """Print each run's steps: which are done, shared or to be done, and how long all of it takes by what was done."""
    console, say = ablation.progress.console, ablation.progress.say
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("run", "done or shared", "to be done", "time"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("run", "time"))
    planned: set[tuple[str, str]] = set()
    cost, total = Cost(ablation), 0.0
    for variant in ablation.plan.variants:
        if ablation.is_known(variant.overlay.name, variant):
            table.add_row(variant.name, "all of it", "", "")
            continue
        runs = [variant] if variant.start is None else [variant.start.variant, variant]
        done: list[str] = []
        todo: list[str] = []
        seconds = 0.0
        for one in runs:
            if one.start is not None:
                # Its first step reads an adapter that is not made yet.
                todo += [f"{step.name} (0 steps)" if step.name in TRAININGS else step.name for step in one.steps]
                continue
            inputs = inputs_of(one)
            for step in one.steps:
                key = step.name, fingerprint(inputs[step.name])
                manifest = artifact(one.workdir, step.name).manifest()
                made = manifest is not None and manifest["state"] == "done"
                if made or key in planned or ablation.shelf.find(step.name, inputs[step.name]) is not None:
                    done.append(step.name)
                    continue
                planned.add(key)
                if step.name == "recover":
                    answered = "recover", answers_key(inputs)
                    if answered in planned or ablation.shelf.answers(inputs) is not None:
                        todo.append("recover (its answers are shared)")
                        continue
                    planned.add(answered)
                steps = getattr(one.config, step.name).steps if step.name in TRAININGS else None
                todo.append(step.name if steps is None else f"{step.name} ({steps:,} steps)")
                seconds += cost.of(one, step.name) or 0.0
        total += seconds
        table.add_row(variant.name, ", ".join(done), ", ".join(todo), duration(seconds) if cost.known else "")
    for name, variant in ablation.through():
        made = ablation.is_known(name, variant)
        table.add_row(
            f"{name}, seed {variant.seed}",
            "all of it" if made else "",
            "" if made else f"asked through {variant.name}",
            "",
        )
    console.print(table)
    for name, why in ablation.plan.does_not_apply.items():
        say(f"{name} is not run: {why}", style="yellow")
    if cost.known:
        say(f"about {duration(total)} in all, by what runs here took; full fine-tuning takes longer than adapters")
    else:
        say("how long it takes is known once a run is done: start one, or run the config itself")


class Cost:
    """What a step takes, by the finished ones of the runs that are there."""

    def __init__(self, ablation: Ablation) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._per_step: list[float] = []
        for workdir in (Path(ablation.of.workdir), *ablation.directory.glob("*/seed-*")):
            for step in STEPS:
                manifest = artifact(workdir, step.name).manifest()
                summary = (manifest or {}).get("summary") or {}
                if manifest is None or manifest["state"] != "done" or "seconds" not in summary:
                    continue
                if summary.get("steps"):
                    self._per_step.append(summary["seconds"] / summary["steps"])
                elif step.name not in TRAININGS:
                    self._seconds.setdefault(step.name, []).append(summary["seconds"])

    @property
    def known(self) -> bool:
        """Whether any training is done."""
        return bool(self._per_step)

    def of(self, variant: Variant, step: str) -> float | None:
        """Seconds of a step; None if nothing is known."""
        if step in TRAININGS:
            steps = getattr(variant.config, step).steps
            return None if steps is None or not self._per_step else steps * median(self._per_step)
        return median(self._seconds[step]) if step in self._seconds else None
