"""`transllm evaluate`: suites on systems, each kept on disk as it goes, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transllm_jax.commands.contaminated import Contamination
from transllm_jax.commands.open_judge import JudgeGiven, judging_of, opened
from transllm_jax.commands.open_systems import Systems, is_run
from transllm_jax.config import Config, Language, load_config
from transllm_jax.data.read.shards import Reading
from transllm_jax.disk import write_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.page.report import report_beside
from transllm_jax.evaluation.page.suites import IN_WORKDIR, TABLE
from transllm_jax.evaluation.people.kept import kept
from transllm_jax.evaluation.people.numbers import in_a_sentence
from transllm_jax.evaluation.suites.judged import MT_BENCH
from transllm_jax.evaluation.suites.registry import SUITES, Suite, suite_named
from transllm_jax.evaluation.suites.suite_run import RESULTS, SuiteOptions, SuiteRun
from transllm_jax.evaluation.suites.table import compared, remarks, shown
from transllm_jax.evaluation.systems.named import ORIGINAL, Named, parse_systems
from transllm_jax.evaluation.systems.system import System
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages.inputs import reading

# Where the results of systems without a work directory are kept.
ELSEWHERE = Path("evaluation")


@dataclass(frozen=True)
class Given:
    """What the user gave. What is None, or empty, comes from the config of the first work directory.

    questions_of: files of questions for single suites, in place of `questions`.
    """

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
    questions_of: Mapping[str, Path] = field(default_factory=dict)
    judge: JudgeGiven = field(default_factory=JudgeGiven)


def evaluate(given: Given, progress: Progress) -> dict[str, Any]:
    """Run the suites on the systems, and write `DIR/SYSTEM/SUITE/` and `DIR/table.json`, which is returned.

    A suite that was stopped or killed goes on with what it has. Raises UserError for a system, suite or file that is
    not there or does not fit; Preempted if a stop was requested.
    """
    named = parse_systems(list(given.systems))
    suites = {name: suite_named(name) for name in dict.fromkeys(given.suites)}
    if not suites:
        raise UserError("give a suite, such as --suite answers")
    if given.judge.reference_file is not None and MT_BENCH.name not in suites:
        raise UserError(
            f"--reference-file is for the suite {MT_BENCH.name}; other questions have `references` in their own file: "
            "leave it out"
        )
    config = _config_of(named)
    out = given.out or _default_out(named)
    judging = judging_of(given.judge, out)
    options = replace(options_of(given, config), judging=judging)
    for name, suite in suites.items():
        suite.check(_own(options, given, name, suite))
    opener = Systems(progress.say, options, given.endpoint, given.translator, given.batch_size)
    systems = {one.name: opener.open(one) for one in named}
    for suite in suites.values():
        for system in systems.values():
            suite.check_system(system)
    options = replace(options, judging=opened(judging, given.judge, opener, systems, named))
    contamination = Contamination(out / "contamination.json", progress) if given.contamination else None
    found = []
    with Interrupt() as interrupt:
        for name, suite in suites.items():
            own, by_name = _own(options, given, name, suite), {one.name: one for one in named}
            comparison = _compare(name, suite, systems, by_name, out, own, contamination, progress, interrupt)
            found.append(comparison)
            progress.say(shown(comparison))
            by_people = [in_a_sentence(name, one.pair) for one in kept(out, name) if one.changed != "answers"]
            for remark in (*remarks(comparison), *by_people):
                progress.say(f"  {remark}")
    table = {"suites": found}
    write_json(out / TABLE, table)
    progress.say(f"results  {out}", style=None)
    if report := report_beside(out):
        progress.say(f"report   {report}", style=None)
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
        one = named[of]
        # The original inside a run was not trained by it; a bridge's translator was.
        if contamination is not None and is_run(one.where) and one.part != ORIGINAL:
            point = "translate" if one.kind == "bridge" else one.part
            seen = contamination.of(Path(one.where).expanduser(), point, suite.texts(options), whole=suite.whole)
            found = replace(found, contamination=seen)
            write_json(directories[of] / RESULTS, found.recorded())
        results[of] = found.recorded()
    return compared(name, suite.measures, directories, results)


def questions_given(given: Sequence[str]) -> tuple[Path | None, dict[str, Path]]:
    """Files of questions, as FILE for all suites and SUITE=FILE for single ones.

    Raises UserError for two files for one suite.
    """
    usual: Path | None = None
    own: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if equals and name in SUITES and not Path(one).exists():
            if name in own:
                raise UserError(f"--questions: {name} has two files, {own[name]} and {path}; give one")
            own[name] = Path(path)
        elif usual is not None:
            raise UserError(f"--questions: {usual} and {one} are both for all suites; write SUITE=FILE")
        else:
            usual = Path(one)
    return usual, own


def _own(options: SuiteOptions, given: Given, name: str, suite: Suite) -> SuiteOptions:
    """The options of one suite: a config's questions have known answers, and are of no use to suites with a judge."""
    usual = given.questions if suite.open else options.questions
    return replace(options, questions=given.questions_of.get(name, usual))


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
