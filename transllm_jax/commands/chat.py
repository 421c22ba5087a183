"""A conversation with a run's model, its original, or an exported model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from transllm_jax.choices import POINTS
from transllm_jax.config import load_config
from transllm_jax.config.sections import Mesh
from transllm_jax.conversion.hf.tokenizer_files import load_tokenizer
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.disk import is_utf8, read_json
from transllm_jax.errors import UserError
from transllm_jax.generation.chain import Answer, ChainChat, remembered
from transllm_jax.generation.engine import Engine, Mode
from transllm_jax.generation.sampling import GREEDY, Sampling
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.parameters import assemble, load_frozen
from transllm_jax.progress import Progress
from transllm_jax.stages.manifest import Artifact
from transllm_jax.stages.points import ids_without_token, newest_point
from transllm_jax.stages.run import Run
from transllm_jax.storage import open_workdir
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass
class Session:
    """One conversation with a model, and the turns that it remembers (in English where there were chains).

    forgotten: how many of the oldest turns were dropped because the model's context was full. early: whether the model
    is that of a run whose last stage, which teaches chains, is not done.
    """

    name: str
    chat: ChainChat
    tokenizer: Tokenizer
    history: list[Message] = field(default_factory=list)
    forgotten: int = 0
    early: bool = False

    def ask(self, question: str) -> Iterator[Answer]:
        """Yield the answer as it grows. The turn is remembered once the whole answer has been taken.

        Raises UserError for a question with a special token in it, or one that does not fit the context.
        """
        if not is_utf8(question):
            raise UserError("the question is not UTF-8; use a UTF-8 locale, such as LANG=C.UTF-8")
        found = self.tokenizer.find_special(question)
        if found:
            raise UserError(f"the question contains the special token {found}; write it in another way")
        if not question.strip():
            raise UserError("the question is empty; ask something")
        asked: Message = {"role": "user", "content": question}
        while self.history and not self.chat.fits([*self.history, asked]):
            del self.history[:2]
            self.forgotten += 1
        answer = None
        for answer in self.chat.stream([*self.history, asked]):
            yield answer
        if answer is not None:
            self.history += remembered(question, answer, self.tokenizer)


def open_session(
    given: Path | str, *, base: bool = False, max_new_tokens: int = 256, sampling: Sampling = GREEDY
) -> Session:
    """Open a session with a work directory's newest point (or its original model), or with an exported model.

    given: a directory, or the URL of a run on an object store. Raises UserError for a directory that is neither.
    """
    early = False
    mode, path = Mode(sampling=sampling), _fetched(str(given), base) if "://" in str(given) else Path(given)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a work directory or a model directory")
    if (path / "run.yaml").is_file():
        # The devices here may differ from those of the training.
        config = load_config(path / "run.yaml").model_copy(update={"mesh": Mesh()})
        run = Run(config, path, Progress(quiet=True), Interrupt())
        newest = newest_point(path)
        point = "base" if base else newest
        engine = Engine(run.models.split(point), run.models.config)
        tokenizer, markers = run.models.tokenizer(point), run.markers
        name = "the original model" if base else f"the model after {point}"
        if early := point not in ("base", POINTS[-1]):
            name += f", which has learned no chains yet: {POINTS[-1]} is not done"
    elif (path / "config.json").is_file():
        if base:
            raise UserError(f"{path} is an exported model, without the original model in it; give the work directory")
        known = read_json(path / "transllm.json") if (path / "transllm.json").exists() else None
        markers = Markers(**known["markers"]) if known else Markers()
        model = open_directory(path)
        tokenizer, name = load_tokenizer(path), path.name
        frozen = load_frozen(model.config, model.weights(), jnp.dtype("float32"))
        padding = ids_without_token(tokenizer, model.config.vocab_size)
        engine = Engine(assemble(model.config, frozen, padding=padding), model.config)
    else:
        raise UserError(f"{path} is neither a work directory (run.yaml) nor a model directory (config.json)")
    chat = ChainChat(engine, tokenizer, markers, max_new_tokens=max_new_tokens, mode=mode)
    return Session(name, chat, tokenizer, early=early)


def _fetched(url: str, base: bool) -> Path:
    """Mirror the parts of a run on a store that a conversation needs; return the mirror's directory."""
    place = open_workdir(url)
    if not place.pull("run.yaml"):
        raise UserError(f"{url} is not a run's work directory (it has no run.yaml)")
    for name in ("base", "vocabulary"):
        place.pull(name)
    for point in reversed(POINTS):
        place.pull(point)
        manifest = Artifact(place.local / point, point).manifest()
        if base or (manifest is not None and manifest["state"] == "done"):
            break
    return place.local


def show(console: Console, answers: Iterator[Answer], *, show_chain: bool) -> None:
    """Print an answer while it grows: its visible part, with `show_chain` also the chain before it."""
    printed = ""

    def print_more(text: str) -> None:
        nonlocal printed
        if text.startswith(printed):
            console.print(text[len(printed) :], end="", soft_wrap=True)
            printed = text

    answer = None
    for answer in answers:
        print_more(_steady(answer, show_chain))
    if answer is not None:
        # Print the rest: an answer without a chain is printed only now, and so is what was held back.
        whole = answer.raw if show_chain else answer.visible
        if not whole.startswith(printed):
            console.print()
            printed = ""
        print_more(whole)
    console.print()


def _steady(answer: Answer, show_chain: bool) -> str:
    """The part of a growing answer that can be printed: without `show_chain`, only the chain's last part.

    An incomplete character at the end is held back, since the next tokens will change it.
    """
    if show_chain:
        return answer.raw.rstrip("\ufffd")
    return answer.chain.answer_target.rstrip("\ufffd") if answer.chain is not None else ""
