"""Opens what is evaluated: systems as they are written on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transllm_jax.choices import POINTS
from transllm_jax.commands.model_identity import of_files, of_point
from transllm_jax.commands.open_chat import ChatModel, at_point, open_chat_model, open_run
from transllm_jax.config import Endpoint, TranslatorEndpoint, load_section
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.suite_run import SuiteOptions
from transllm_jax.evaluation.systems.answers_file import AnswersFile
from transllm_jax.evaluation.systems.bridge import Bridge, EndpointTranslator, PairTranslator, TextTranslator
from transllm_jax.evaluation.systems.endpoint import EndpointSystem
from transllm_jax.evaluation.systems.local import LocalSystem, Weights
from transllm_jax.evaluation.systems.named import ORIGINAL, Named, parse_system
from transllm_jax.evaluation.systems.system import System
from transllm_jax.stages.points import newest_point
from transllm_jax.stages.translations import NO_SPACE
from transllm_jax.tokenizer.scripts import script_of


@dataclass
class Systems:
    """Opens systems. Those of one run share its frozen weights.

    options: for the language and the limits of a bridge. endpoint: `key=value` of the config's section `Endpoint`, for
    every server. translator: what translates for bridges; None: a run's own stage `translate`. batch_size: answers of a
    local model at a time.
    """

    say: Callable[[str], None]
    options: SuiteOptions
    endpoint: Sequence[str] = ()
    translator: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        self._run = cache(open_run)

    def open(self, named: Named) -> System:
        """The system. Raises UserError if it is not there."""
        if named.kind == "endpoint":
            # A request that a server refuses is a question without an answer; it counts.
            given = {"refused": "drop", "endpoint": named.where, "model": named.part}
            return EndpointSystem(named.name, load_section(Endpoint, given, self.endpoint, named.name), self.say)
        if named.kind == "answers":
            return AnswersFile(named.name, Path(named.where).expanduser())
        if named.kind == "bridge":
            return self._bridge(named)
        if named.kind == "inside":
            return self._inside(named)
        return self.model(named)

    def _bridge(self, named: Named) -> Bridge:
        """The original of a run between translations by its stage `translate`, or by the translator."""
        translator = self._translator(named)
        part = named.part or (ORIGINAL if is_run(named.where) else "")
        return Bridge(named.name, self.model(replace(named, kind="model", part=part)), translator)

    def _inside(self, named: Named) -> LocalSystem:
        """A run's chains with English answers by its original. Raises UserError if it answers in no chains."""
        if not is_run(named.where):
            raise UserError(f"inside:{named.where} is no work directory, and has no original in it; give a run's")
        model = self.model(replace(named, kind="model"))
        if not model.weights.in_chains or model.original is None:
            raise UserError(
                f"inside:{named.where}: its newest point answers in no chains; this needs a run that has done stage "
                "transfer, with transfer.answers: chains"
            )
        identity = {**model.identity, "english": model.original().identity}
        return replace(model, identity=identity, inside=True)

    def _translator(self, named: Named) -> TextTranslator:
        options, limit = self.options, self.options.max_new_tokens
        if self.translator is None and not is_run(named.where):
            raise UserError(f"bridge:{named.where} is no work directory, and has no stage translate; give --translator")
        given = parse_system(self.translator or f"{named.where}#translate")
        if given.kind == "endpoint":
            keys = {"refused": "drop", "endpoint": given.where, "model": given.part}
            settings = load_section(TranslatorEndpoint, keys, self.endpoint, "--translator")
            return EndpointTranslator(settings, options.language.name, limit, self.say)
        if given.kind != "model" or not is_run(given.where) or given.part != "translate":
            raise UserError("--translator: give a server's model (URL#MODEL), or WORKDIR#translate")
        language = options.language
        scripts = script_of(language.code, language.scripts).scripts
        return PairTranslator(self.model(given), limit, "" if NO_SPACE & set(scripts) else " ")

    def model(self, named: Named) -> LocalSystem:
        """A run at a point, or a model directory. Raises UserError for another path or point."""
        path = Path(named.where).expanduser()
        if is_run(named.where):
            return self._of_run(named, path)
        if named.part:
            raise UserError(f"{named.where} is not a run's work directory, so it has no #{named.part}; leave it out")
        opened = open_chat_model(named.where)
        return self._system(named.name, opened, of_files(opened))

    def _of_run(self, named: Named, workdir: Path) -> LocalSystem:
        run = self._run(workdir)
        point = {ORIGINAL: "base", "": newest_point(workdir)}.get(named.part, named.part)
        if point not in POINTS:
            raise UserError(
                f"{named.where}#{named.part}: a run has no point of this name; use {ORIGINAL} or one of "
                f"{', '.join(POINTS[1:])}"
            )
        if point != "base" and not run.models.trainable(point).is_dir():
            raise UserError(f"{workdir}: stage {point} is not done yet; the newest is {newest_point(workdir)}")
        system = self._system(
            named.name,
            at_point(run, point),
            of_point(run, point),
            in_pairs=point == "translate",
        )
        original = cache(lambda: self._of_run(replace(named, part=ORIGINAL), workdir))
        system.original = (lambda: system) if point == "base" else original
        return system

    def _system(
        self, name: str, opened: ChatModel, identity: Mapping[str, Any], *, in_pairs: bool = False
    ) -> LocalSystem:
        weights = Weights(
            opened.split,
            opened.config,
            opened.tokenizer,
            opened.markers,
            tuned=opened.tuned,
            in_chains=opened.in_chains,
            in_pairs=in_pairs,
        )
        return LocalSystem(name, weights, identity, self.batch_size)


def is_run(where: str) -> bool:
    """Whether a path is a run's work directory."""
    return (Path(where).expanduser() / "run.yaml").is_file()
