"""`transllm evaluate`: suites on systems, each kept on disk as it goes, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transllm_jax.commands.contaminated import Contamination
from transllm_jax.commands.open_systems import Systems, is_run
from transllm_jax.config import Config, Language, load_config
from transllm_jax.data.read.shards import Reading
from transllm_jax.disk import write_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.registry import Suite, suite_named
from transllm_jax.evaluation.suites.suite_run import RESULTS, SuiteOptions, SuiteRun
from transllm_jax.evaluation.suites.table import compared, remarks, shown
from transllm_jax.evaluation.systems.named import Named, parse_systems
from transllm_jax.evaluation.systems.system import System
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages.inputs import reading

# Where the results of a work directory are kept, and those of other systems.
IN_WORKDIR, ELSEWHERE = Path("evaluation") / "suites", Path("evaluation")
# All comparisons of a command.
TABLE = "table.json"


@dataclass(frozen=True)
class Given:
    """What the user gave. What is None, or empty, comes from the config of the first work directory."""

    systems: Sequence[str]
    suites: Sequence[str]
    out: Path | None = None
    questions: Path | None = None
    text: tuple[str, ...] = ()
    english_text: tuple[str, ...] = ()
    pairs: Path | None = None
    instructions: Path | None = None
    language: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    max_answer_tokens: int | None = None
    endpoint: Sequence[str] = ()
    translator: str | None = None
    batch_size: int = 32
    contamination: bool = True


def evaluate(given: Given, progress: Progress) -> dict[str, Any]:
    """Run the suites on the systems, and write `DIR/SYSTEM/SUITE/` and `DIR/table.json`, which is returned.

    A suite that was stopped or killed goes on with what it has. Raises UserError for a system, suite or file that is
    not there or does not fit; Preempted if a stop was requested.
    """
    named = parse_systems(list(given.systems))
    suites = {name: suite_named(name) for name in dict.fromkeys(given.suites)}
    if not suites:
        raise UserError("give a suite, such as --suite answers")
    config = _config_of(named)
    options = options_of(given, config)
    for suite in suites.values():
        suite.check(options)
    out = given.out or _default_out(named)
    opener = Systems(progress.say, options, given.endpoint, given.translator, given.batch_size)
    systems = {one.name: opener.open(one) for one in named}
    for suite in suites.values():
        for system in systems.values():
            suite.check_system(system)
    contamination = Contamination(out / "contamination.json", progress) if given.contamination else None
    found = []
    with Interrupt() as interrupt:
        for name, suite in suites.items():
            comparison = _compare(
                name, suite, systems, {one.name: one for one in named}, out, options, contamination, progress, interrupt
            )
            found.append(comparison)
            progress.say(shown(comparison))
            for remark in remarks(comparison):
                progress.say(f"  {remark}")
    table = {"suites": found}
    write_json(out / TABLE, table)
    progress.say(f"results  {out}", style=None)
    return table


def _compare(
    name: str,
    suite: Suite,
    systems: Mapping[str, System],
    named: Mapping[str, Named],
    out: Path,
    options: SuiteOptions,
    contamination: Contamination | None,
    progress: Progress,
    interrupt: Interrupt,
) -> dict[str, Any]:
    """A suite on all systems."""
    directories = {of: out / of / name for of in systems}
    first = next(iter(directories))
    results: dict[str, Mapping[str, Any]] = {}
    for of, system in systems.items():
        work = SuiteRun(
            suite=name,
            system=system,
            directory=directories[of],
            options=options,
            progress=progress,
            stop=interrupt.check,
            first=None if of == first else directories[first],
        )
        found = suite.run(work)
        if contamination is not None and is_run(named[of].where):
            seen = contamination.of(Path(named[of].where).expanduser(), suite.texts(options), whole=suite.whole)
            found = replace(found, contamination=seen)
            write_json(directories[of] / RESULTS, found.recorded())
        results[of] = found.recorded()
    return compared(name, suite.measures, directories, results)


def _config_of(named: Sequence[Named]) -> Config | None:
    """The config of the first work directory."""
    for one in named:
        if one.kind in ("model", "bridge") and is_run(one.where):
            return load_config(Path(one.where).expanduser() / "run.yaml")
    return None


def _default_out(named: Sequence[Named]) -> Path:
    for one in named:
        if one.kind in ("model", "bridge") and is_run(one.where):
            return Path(one.where).expanduser() / IN_WORKDIR
    return ELSEWHERE


def options_of(given: Given, config: Config | None) -> SuiteOptions:
    """The options of the suites. Raises UserError for a language that is none."""
    options = SuiteOptions(
        questions=given.questions,
        text=tuple(Reading(path) for path in given.text),
        english_text=tuple(Reading(path) for path in given.english_text),
        pairs=given.pairs,
        instructions=given.instructions,
        limit=given.limit,
    )
    if config is not None:
        section = config.evaluation
        options = replace(
            options,
            questions=options.questions or (None if section.answers is None else Path(section.answers)),
            text=options.text or (reading(section.text),),
            pairs=options.pairs or Path(section.pairs),
            instructions=options.instructions or Path(section.instructions),
            instruction_field=section.instruction_fields[0] if given.instructions is None else "instruction",
            max_new_tokens=section.max_chain_tokens,
            max_answer_tokens=section.max_answer_tokens,
            length=section.length,
            language=config.language,
            prompts=config.prompts,
        )
    if given.language is not None:
        options = replace(options, language=_language(given.language))
    if given.max_new_tokens is not None:
        options = replace(options, max_new_tokens=given.max_new_tokens)
    if given.max_answer_tokens is not None:
        options = replace(options, max_answer_tokens=given.max_answer_tokens)
    return options


def _language(code: str) -> Language:
    from transllm_jax.config import load_section

    return load_section(Language, {"code": code}, (), "--language")
