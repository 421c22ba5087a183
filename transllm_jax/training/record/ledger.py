"""ledger.jsonl: where every second of a run's processes went, and how much was lost to restarts.

Each process is one session. A line holds the seconds that a session has spent in a stage so far, by category, and its
first and last step there; only the last line of a session and stage counts. A killed process loses at most the seconds
since its last line. Time is counted in whole microseconds, so that the categories add up exactly to the clock.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from transllm_jax.disk import write_text
from transllm_jax.errors import UserError

LEDGER = "ledger.jsonl"
CATEGORIES = ("init", "compile", "step", "save", "data", "validate", "other")
# The stage name for time outside all stages.
OUTSIDE = "run"
# Seconds between two lines; and lines after which the file is compacted to the last line of each session and stage.
FLUSH_EVERY = 5.0
COMPACT_AFTER = 5_000

_MICRO = 1_000_000
_KEYS = ("session", "stage", "seconds", "first", "step", "anew", "done")


@dataclass
class _Account:
    """What a session has spent in one stage, in microseconds."""

    spent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    first: int | None = None
    step: int | None = None
    anew: bool = False
    done: bool = False
    changed: bool = False


class Ledger:
    """Records how one process spends its time. Use it from one thread, in the process that holds the work directory's
    lock.

    path: WORKDIR/ledger.jsonl; earlier sessions may have begun it. clock: seconds, never going back. since: the clock
    when the process began (default: now); the time from then until now counts as "init".
    Raises UserError if the file cannot be written, or has a line that is not a ledger's.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic, since: float | None = None) -> None:
        self._path, self._clock = path, clock
        self._session = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(3)}"
        self._began = clock() if since is None else since
        self._counted = self._flushed = 0
        self._accounts = {OUTSIDE: _Account()}
        self._stack = [(self._accounts[OUTSIDE], "init")]
        self._lock = threading.RLock()
        self._lines = 0
        with self._reported():
            self._file = self._compacted()
        self._count()
        self._stack = [(self._accounts[OUTSIDE], "other")]
        # One piece of work may take an hour; a thread writes the time spent so far all the same.
        self._closed = threading.Event()
        threading.Thread(target=self._flush_regularly, name="ledger", daemon=True).start()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._unless(error):
            self.close()

    @contextlib.contextmanager
    def stage(self, name: str, *, anew: bool = False) -> Iterator[None]:
        """All time inside belongs to this stage. anew: the stage uses nothing that earlier sessions did in it."""
        account = self._accounts.setdefault(name, _Account())
        account.anew = account.anew or anew
        self._enter(account, "other")
        self._flush()
        try:
            yield
        except BaseException as error:
            self._leave()
            # The error that ended the stage matters more than one from writing its time.
            with self._unless(error):
                self._flush()
            raise
        account.done = True
        self._leave()
        self._flush()

    @contextlib.contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Time inside goes to this category of the current stage, except the time of a `spend` nested in it."""
        if category not in CATEGORIES:
            raise ValueError(f"no such category: {category!r}; the categories are {', '.join(CATEGORIES)}")
        self._enter(self._stack[-1][0], category)
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Write all time so far, and nothing inside the context, so that the file can be copied."""
        with self._lock:
            self._flush()
            yield

    def mark(self, step: int) -> None:
        """Record that the current stage has reached this step. Call it first with the step that the stage starts from.

        Raises UserError if a line is due and cannot be written.
        """
        with self._lock:
            account = self._stack[-1][0]
            account.first = step if account.first is None else account.first
            account.step = step
            account.changed = True
            self._count()
            if self._counted - self._flushed >= FLUSH_EVERY * _MICRO:
                self._flush()

    def close(self) -> None:
        """Write the rest and stop counting. Raises UserError if it cannot be written."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._flush()
        finally:
            self._file.close()

    def _enter(self, account: _Account, category: str) -> None:
        with self._lock:
            self._count()
            self._stack.append((account, category))

    def _leave(self) -> None:
        with self._lock:
            self._count()
            self._stack.pop()

    def _count(self) -> None:
        """Add the time since the last call to the current account."""
        now = round((self._clock() - self._began) * _MICRO)
        account, category = self._stack[-1]
        account.spent[category] += now - self._counted
        account.changed = True
        self._counted = now

    def _flush(self) -> None:
        with self._lock, self._reported():
            self._count()
            self._flushed = self._counted
            changed = [(name, account) for name, account in self._accounts.items() if account.changed]
            data = "".join(json.dumps(self._row(name, account)) + "\n" for name, account in changed).encode()
            # The file is unbuffered, so a forked child process has no buffer to write a second time.
            while data:
                data = data[self._file.write(data) :]
            for _, account in changed:
                account.changed = False
            self._lines += len(changed)
            if self._lines >= COMPACT_AFTER:
                # If this fails, the old file stays in use.
                old, self._file = self._file, self._compacted()
                old.close()

    def _row(self, name: str, account: _Account) -> dict[str, Any]:
        seconds = {category: spent / _MICRO for category, spent in account.spent.items() if spent}
        values = (self._session, name, seconds, account.first, account.step, account.anew, account.done)
        return dict(zip(_KEYS, values, strict=True))

    def _compacted(self) -> FileIO:
        """Compact the file to the last line of each session and stage; return it, open for appending."""
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in _rows(self._path)))
        self._lines = 0
        return self._path.open("ab", buffering=0)

    def _flush_regularly(self) -> None:
        while not self._closed.wait(FLUSH_EVERY):
            # A failure is ignored here: the main thread, which can end the run, fails in the same way at its next line.
            with contextlib.suppress(UserError), self._lock:
                if not self._closed.is_set():
                    self._flush()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror}); free space or correct its permissions, then run "
                "again to go on from the last checkpoint"
            ) from None

    @staticmethod
    def _unless(error: BaseException | None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if error is None else contextlib.suppress(UserError)


def summarise(path: Path) -> dict[str, Any]:
    """Where the time of a run went, from its ledger; no time if there is no ledger.

    For the whole run, and under "stages" for each stage in order, in seconds:

    - "total": the time of all sessions: the sum of "seconds" (by category), "lost" and "redone".
    - "lost" to restarts: training steps that a later session repeated, and all the time of a stage that was interrupted
      and started from scratch. "restarts": how often a stage was interrupted and continued by another session.
    - "redone": all the time of a stage that was finished and then started from scratch.
    - "trained": the share of the total in training steps that were kept; None if the total is 0.
    - "sessions": the number of processes.

    Raises UserError that names a line which is not a ledger's.
    """
    stages: dict[str, list[dict[str, Any]]] = {}
    rows = _rows(path)
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    counted = {name: _summarise_stage(sessions) for name, sessions in stages.items()}
    if OUTSIDE in counted:
        # Work outside all stages is never continued by another session.
        counted[OUTSIDE].restarts = 0
    whole = _Summary(sessions=len({row["session"] for row in rows}))
    for summary in counted.values():
        whole.add(summary)
    return {**whole.written(), "stages": {name: summary.written() for name, summary in counted.items()}}


@dataclass
class _Summary:
    """The summary of a stage or of the whole run, in microseconds."""

    sessions: int
    spent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    lost: int = 0
    redone: int = 0
    restarts: int = 0

    def add(self, other: _Summary) -> None:
        for category, spent in other.spent.items():
            self.spent[category] += spent
        self.lost += other.lost
        self.redone += other.redone
        self.restarts += other.restarts

    def written(self) -> dict[str, Any]:
        total = sum(self.spent.values()) + self.lost + self.redone
        return {
            "total": total / _MICRO,
            "seconds": {category: spent / _MICRO for category, spent in self.spent.items()},
            "lost": self.lost / _MICRO,
            "redone": self.redone / _MICRO,
            "trained": self.spent["step"] / total if total else None,
            "sessions": self.sessions,
            "restarts": self.restarts,
        }


def _summarise_stage(sessions: Sequence[Mapping[str, Any]]) -> _Summary:
    summary = _Summary(sessions=len(sessions))
    # The work of all sessions before this one was thrown away.
    begun = max((place for place, row in enumerate(sessions) if row["anew"]), default=0)
    # The lowest step from which a later session went on: steps beyond it were done again.
    redone_from: int | None = None
    finished = True
    for place in reversed(range(len(sessions))):
        row = sessions[place]
        spent = {category: round(seconds * _MICRO) for category, seconds in row["seconds"].items()}
        if place < len(sessions) - 1 and not row["done"]:
            summary.restarts += 1
        if place < begun:
            if place == begun - 1 or sessions[place + 1]["anew"]:
                finished = row["done"]
            if finished:
                summary.redone += sum(spent.values())
            else:
                summary.lost += sum(spent.values())
            continue
        first, step = row["first"], row["step"]
        if redone_from is not None and first is not None:
            steps = max(step - first, 0)
            repeated = min(max(step - redone_from, 0), steps)
            # If a session finished no step, the time of its first one is lost.
            lost = round(spent.get("step", 0) * repeated / steps) if steps else spent.get("step", 0)
            spent["step"] = spent.get("step", 0) - lost
            summary.lost += lost
        for category, value in spent.items():
            summary.spent[category] += value
        if first is not None:
            redone_from = first if redone_from is None else min(redone_from, first)
    return summary


def _rows(path: Path) -> list[dict[str, Any]]:
    """The last row of each session and stage, in order of first appearance. Unfinished lines are skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            # Cut off by a kill or a full disk. Lines hold totals, so the session's next line makes up for it.
            continue
        if not isinstance(row, dict) or row.keys() != set(_KEYS) or not row["seconds"].keys() <= set(CATEGORIES):
            raise UserError(f"{path}, line {number} is not a ledger's line; move the file away (it holds times only)")
        rows[row["session"], row["stage"]] = row
    return list(rows.values())
