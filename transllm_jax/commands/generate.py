"""Answers to a file of records, one line each, written as they finish. A stopped or killed run goes on from there."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from transllm_jax.commands.asked_records import ADDED, Item, messages_of, prompt_of, read_items
from transllm_jax.commands.model_identity import of_files
from transllm_jax.commands.open_chat import ChatModel, English, open_chat_model, original_of
from transllm_jax.disk import appending, cut_behind, read_json, whole_lines, write_json, write_text
from transllm_jax.errors import UserError
from transllm_jax.generation.answer import Answer
from transllm_jax.generation.chain import ask_original
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.request import Reason, Request, Result
from transllm_jax.generation.sampling import GREEDY, Sampling
from transllm_jax.generation.writing import Leg, Writing, next_legs
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress, counted
from transllm_jax.tokenizer.ends import end_ids

# Beside the answers: lines that cannot be answered, and what the answers were made with.
REJECTED, SETTINGS = "rejected.jsonl", "settings.json"
# Answers are forced to the disk so often: a loss of power costs no more.
SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class GenerateOptions:
    """How answers are generated; `batch_size` at a time, which is no part of what is asked for.

    share: (2, 8) is the second of eight shares of the records, for eight machines; (1, 1) is all of them. english:
    which model writes the English answers.
    """

    max_new_tokens: int = 512
    sampling: Sampling = field(default=GREEDY)
    batch_size: int = 32
    base: bool = False
    share: tuple[int, int] = (1, 1)
    english: English = "model"


def parse_share(text: str) -> tuple[int, int]:
    """Parse a share such as `2/8`. Raises UserError."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--share {text}: give the number of a share, from 1, and how many there are, such as 2/8")
    return int(found[1]), int(found[2])


def generate(model: str, source: Path, target: Path, options: GenerateOptions, progress: Progress) -> int:
    """Answer the records of `source` (jsonl) in `target` (jsonl), in the order in which answers finish.

    Lines that cannot be answered are in `TARGET.rejected.jsonl` (without the `.jsonl` of the target), each with its
    number, the reason and the text. `TARGET.settings.json` keeps what the answers were made with. Returns the number of
    rejected lines. Raises UserError for input that is not there or does not belong to the target; Preempted if the run
    was asked to stop. The answers of one share of several are in `TARGET.2-of-8.jsonl`.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such file; give a file of records, one JSON object a line")
    number, of = options.share
    if of > 1:
        target = _beside(target, f"{number}-of-{of}.jsonl")
    for written in (target, *(_beside(target, name) for name in (REJECTED, SETTINGS))):
        if source.resolve() == written.resolve():
            raise UserError(f"{written}, which is written, is the input; name another file for the answers")
    _check_place(target)
    with Interrupt() as interrupt, ExitStack() as stack:
        opened = open_chat_model(model, base=options.base)
        original = original_of(opened, options.english)
        target.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(appending(target))
        stack.enter_context(_removed_if_refused(target))
        interrupt.check("generate: before the first answer")
        _require_settings(target, {**_identity(opened), **_settings(model, options)})
        items, rejected = read_items(source, opened, options.share, options.max_new_tokens)
        done = _done(target, {item.key: item for item in items})
        place = _beside(target, REJECTED)
        _write_rejected(place, rejected)
        if not items and of == 1:
            what = f"none of its {len(rejected)} lines can be answered; see {place}"
            raise UserError(f"{source}: {what if rejected else 'it is empty; give records, one JSON object a line'}")
        waiting = [item for item in items if item.key not in done]
        if rejected:
            progress.say(f"  {counted(len(rejected), 'line')} not answered: {place}", style="yellow")
        _answer(opened, original, waiting, len(done), file, options, progress, interrupt)
    progress.say(f"  {counted(len(items), 'answer')} in {target}")
    return len(rejected)


def _answer(
    opened: ChatModel,
    original: ChatModel | None,
    waiting: list[Item],
    done: int,
    file: BinaryIO,
    options: GenerateOptions,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """Answer the items, and write each answer when it is there."""
    if not waiting:
        return
    total, began, first, tokens = done + len(waiting), time.monotonic(), done, 0
    synced = began

    answerer = _Answerer(opened, original, options, total, interrupt)
    with progress.task("answers", total=total, done=done, unit="answer") as bar:

        def speed() -> str:
            elapsed = max(time.monotonic() - began, 1e-3)
            return f"{(done - first) / elapsed:,.2f} answers/s, {tokens / elapsed:,.0f} tokens/s"

        def count(more: int) -> None:
            nonlocal tokens
            tokens += more
            bar.update(done, speed())

        def so_far() -> str:
            return f"generate: {done} of {total} answers"

        for row in answerer.rows(waiting, count, so_far):
            # One call, so that a killed process leaves whole lines and at most a part of the last one.
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            if time.monotonic() - synced > SYNC_SECONDS:
                os.fsync(file.fileno())
                synced = time.monotonic()
            done += 1
            bar.update(done, speed())


class _Answerer:
    """Makes rows with answers. original: the model that writes the English answers; None if `opened` itself does.
    total: how many answers the whole file has."""

    def __init__(
        self,
        opened: ChatModel,
        original: ChatModel | None,
        options: GenerateOptions,
        total: int,
        interrupt: Interrupt,
    ) -> None:
        self._opened, self._original, self._options = opened, original, options
        self._total, self._interrupt = total, interrupt
        self._engine = Engine(opened.split, opened.config, batch_size=options.batch_size)
        # The weights are shared.
        self._of_original = self._engine
        if original is not None:
            self._of_original = Engine(original.split, original.config, batch_size=options.batch_size)

    def rows(
        self, items: list[Item], count: Callable[[int], None], so_far: Callable[[], str]
    ) -> Iterator[dict[str, Any]]:
        """Yield rows as answers finish. Those that are written in several legs come last.

        count: is given the number of new tokens. so_far: what to say if the command is stopped.
        """
        limit, context = self._options.max_new_tokens, self._opened.config.context
        writings: dict[int, Writing] = {}
        longest = max(item.tokens for item in items) + limit

        def first_legs() -> Iterator[tuple[Item, Leg]]:
            # One at a time: a file may hold more prompts than memory does.
            for number, item in enumerate(items):
                writings[number] = self._begun(item)
                yield item, writings[number].leg

        def has_room(leg: Leg) -> bool:
            return len(leg.prompt) + limit <= context

        legs: Iterable[tuple[Item, Leg]] = first_legs()
        numbers, by_original = list(range(len(items))), False
        while numbers:
            for row, result in self._run(legs, by_original, longest, count, so_far):
                number = numbers[row]
                item, writing = items[number], writings[number]
                writing.grow(result.ids)
                cut_off = result.finish_reason == "length"
                answer = writing.end(cut_off=cut_off, stopped_by=result.stopped_by, has_room=has_room)
                if answer is not None:
                    yield self._answered(item, writing, answer)
                    del writings[number]
            by_original, numbers = next_legs(writings)
            legs = [(items[number], writings[number].leg) for number in numbers]
            longest = max((len(leg.prompt) for _, leg in legs), default=0) + limit

    def _begun(self, item: Item) -> Writing:
        """The answer to a record, of which nothing is written yet."""
        tokenizer, markers = self._opened.tokenizer, self._opened.markers
        prompt = prompt_of(self._opened, item.record)
        if "prompt" in item.record:
            return Writing(tokenizer, None, prompt, raw=True, hidden=frozenset(tokenizer.special_tokens.values()))
        ask = None if self._original is None else ask_original(self._original.tokenizer, messages_of(item.record))
        return Writing(tokenizer, markers, prompt, ask_original=ask)

    def _run(
        self,
        legs: Iterable[tuple[Item, Leg]],
        by_original: bool,
        longest: int,
        count: Callable[[int], None],
        so_far: Callable[[], str],
    ) -> Iterator[tuple[int, Result]]:
        options = self._options
        requests = (
            Request(leg.prompt, options.max_new_tokens, leg.stop, sampling=options.sampling.for_row(item.key))
            for item, leg in legs
        )
        engine = self._of_original if by_original else self._engine
        return engine.run(
            requests,
            longest=longest,
            # One more than the end tokens: the marker at which the original takes over.
            stops=1 + max(len(end_ids(one.tokenizer)) for one in (self._opened, self._original) if one is not None),
            # The slots of all answers, so that those of a resumed run are rounded as in an undisturbed one.
            at_once=self._total,
            on_tokens=count,
            between=lambda: self._interrupt.check(so_far()),
        )

    def _answered(self, item: Item, writing: Writing, answer: Answer) -> dict[str, Any]:
        reason: Reason = "length" if answer.cut_off else "stop"
        if "prompt" in item.record:
            return _row(item.record, answer.raw, reason, len(writing.ids))
        text = self._opened.tokenizer.without_specials(answer.visible)
        row = _row(item.record, text, reason, len(writing.ids)) | {"how": answer.how}
        return row if answer.chain is None else row | {"chain": vars(answer.chain)}


def _row(record: Mapping[str, Any], text: str, reason: Reason, tokens: int) -> dict[str, Any]:
    """A record with its answer."""
    kept = {name: value for name, value in record.items() if name not in ADDED}
    return {**kept, "text": text, "finish_reason": reason, "tokens": tokens}


# --- the files ------------------------------------------------------------------------------------------------------


def _check_place(target: Path) -> None:
    """Raises UserError if no file can be at a path: before a model is opened for minutes."""
    if target.exists() and not target.is_file():
        raise UserError(f"{target} is no file; name one for the answers")
    above = next(path for path in target.resolve().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{above} is no directory; name another file for the answers")


def _beside(target: Path, name: str) -> Path:
    return target.with_name(f"{target.name.removesuffix('.jsonl')}.{name}")


def _identity(opened: ChatModel) -> dict[str, Any]:
    found = {"model": opened.name, **of_files(opened)}
    if opened.tokenizer.writes_date:
        # A run that goes on tomorrow has another date; the files say what the tokenizer is.
        del found["tokenizer"]
    return found


def _settings(model: str, options: GenerateOptions) -> dict[str, Any]:
    return {
        "path": model if "://" in model else str(Path(model).resolve()),
        "base": options.base,
        **({"english": options.english} if options.english != "model" else {}),
        "max_new_tokens": options.max_new_tokens,
        **asdict(options.sampling),
    }


def _require_settings(target: Path, wanted: Mapping[str, Any]) -> None:
    """Keep the settings beside the target. Raises UserError if its answers were made with others."""
    path = _beside(target, SETTINGS)
    if path.exists():
        known = read_json(path)
        other = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
        if other and target.stat().st_size:
            changes = ", ".join(f"{name} was {known.get(name)!r} and is {wanted.get(name)!r}" for name in other)
            raise UserError(f"{target} has answers of other settings ({changes}); use these, or name another file")
    elif target.stat().st_size:
        raise UserError(f"{target} exists, and {path.name}, which says how it was made, does not; name another file")
    write_json(path, dict(wanted))


@contextmanager
def _removed_if_refused(target: Path) -> Iterator[None]:
    """A command that is refused leaves no file without answers that the next one would go on with."""
    try:
        yield
    except UserError:
        if not target.stat().st_size:
            target.unlink()
            _beside(target, SETTINGS).unlink(missing_ok=True)
        raise


def _write_rejected(path: Path, rejected: list[dict[str, Any]]) -> None:
    if rejected:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected))
    else:
        path.unlink(missing_ok=True)


def _done(target: Path, items: Mapping[str, Item]) -> set[str]:
    """The ids of the answers in the target. A line that a killed process did not finish is cut off.

    Raises UserError for a line that is no answer to one of the items; the file is then left as it is.
    """
    lines = whole_lines(target)
    done: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key = json.dumps(row["id"])
            asked = items[key].record
            right = key not in done and all(row.get(name) == asked[name] for name in asked if name not in ADDED)
        except (ValueError, TypeError, KeyError):
            right = False
        if not right:
            raise UserError(
                f"{target}:{number} answers no record of the input, or one that another line answers; correct the "
                "line, or name another file"
            )
        done.add(key)
    cut_behind(target, lines)
    return done
