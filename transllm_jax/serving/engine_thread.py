"""The engine in a thread of its own. Requests of many clients share its slots, and two models can share its weights.

In each round a model that has something to do reads one piece of a prompt and generates a few tokens. So a long prompt
does not hold up the answers that are being generated, and a client that goes away frees its slot within a round.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from transllm_jax.generation.engine import BURST, Batch, Engine, Mode, Request
from transllm_jax.generation.request import Reason
from transllm_jax.generation.row import Row

# Tokens between two looks at what else is to be done, on a CPU, where a token takes longer than a look.
CPU_STEPS = 4


class Told(NamedTuple):
    """What the engine tells about a job: more ids; and, at last, why the answer ended, or that the engine failed.

    stopped_by: the stop token that ended it, if one did.
    """

    ids: list[int]
    reason: Reason | None = None
    failed: bool = False
    stopped_by: int | None = None


class Job:
    """A request to an engine. tell: is called in the engine's thread, and must return at once."""

    def __init__(self, request: Request, tell: Callable[[Told], None]) -> None:
        self.request, self.tell = request, tell
        self.cancelled = False
        self._given = 0

    def more(self, row: Row) -> Told:
        """What is new in its row."""
        new = row.ids[self._given :]
        self._given = len(row.ids)
        return Told(new, row.reason, stopped_by=row.stopped_by)


class Lane:
    """The slots of one model, and who waits for them.

    longest: the most tokens of a prompt and its answer. Jobs come from other threads; everything else happens in the
    engine's thread.
    """

    def __init__(self, engine: Engine, mode: Mode, longest: int, stops: int) -> None:
        self.engine, self.longest = engine, longest
        self._mode, self._stops = mode, stops
        self._batch: Batch | None = None
        self._jobs: dict[Row, Job] = {}
        self._waiting: deque[Job] = deque()
        self._lock = threading.Lock()
        self._reading: Iterator[None] | None = None
        self._entering: list[Row] = []
        on_cpu = engine.split.layout.platform == "cpu"
        self._steps = CPU_STEPS if on_cpu else BURST

    @property
    def size(self) -> int:
        """The number of slots."""
        return self.engine.batch_size

    @property
    def waiting(self) -> int:
        """How many jobs have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs are read or answered."""
        return len(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._jobs or self._waiting)

    def open(self) -> Batch:
        """The slots on the devices."""
        if self._batch is None:
            self._batch = self.engine.batch(self.longest, mode=self._mode, stops=self._stops)
        return self._batch

    def put(self, job: Job, *, ahead: bool) -> None:
        """Let a job wait for a slot; `ahead` of all others if it goes on with an answer that had one."""
        with self._lock:
            (self._waiting.appendleft if ahead else self._waiting.append)(job)

    def round(self) -> None:
        """One piece of a prompt, and a few tokens for all answers."""
        batch = self.open()
        for row, job in list(self._jobs.items()):
            if job.cancelled:
                batch.take_back(row)
                del self._jobs[row]
        if self._reading is None:
            self._entering = self._next_rows(batch.room)
            self._reading = batch.admitting(self._entering) if self._entering else None
        if self._reading is not None:
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None
                self._tell(self._entering)
        if batch.running:
            self._tell(batch.burst(hurry=bool(self._waiting), steps=self._steps))

    def fail(self) -> None:
        """Tell all who wait that the engine failed, and forget what is on the devices."""
        with self._lock:
            jobs = [*self._jobs.values(), *self._waiting]
            self._waiting.clear()
        self._jobs.clear()
        self._batch = self._reading = None
        for job in jobs:
            job.tell(Told([], failed=True))

    def _next_rows(self, room: int) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < room:
            with self._lock:
                job = self._waiting.popleft() if self._waiting else None
            if job is None:
                break
            if not job.cancelled:
                row = Row(0, job.request)
                self._jobs[row] = job
                rows.append(row)
        return rows

    def _tell(self, rows: list[Row]) -> None:
        for row in rows:
            job = self._jobs.get(row)
            if job is not None:
                job.tell(job.more(row))
                if row.reason is not None:
                    del self._jobs[row]


class EngineThread:
    """Works for its lanes in turn until it is closed."""

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        # How often a round failed.
        self.failures = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Compile all programs, and begin."""
        for lane in self.lanes:
            lane.open().device.warm_up()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are worked on."""
        return self._thread.is_alive()

    def submit(self, lane: Lane, job: Job, *, ahead: bool = False) -> None:
        """Give a lane a job, whose request has to fit into `Lane.longest`."""
        lane.engine.check(job.request)
        if len(job.request.prompt) + job.request.max_new_tokens > lane.longest:
            raise ValueError(f"a request is longer than the {lane.longest} tokens that a slot has")
        lane.put(job, ahead=ahead)
        with self._changed:
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give a job up: it frees its slot, and is told nothing more. One that has ended stays as it is."""
        job.cancelled = True

    def close(self) -> None:
        """End the thread; jobs that are left fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        for lane in self.lanes:
            lane.fail()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closing and not any(lane.busy for lane in self.lanes):
                    self._changed.wait()
                if self._closing:
                    return
            for lane in self.lanes:
                if lane.busy:
                    try:
                        lane.round()
                    except Exception as error:
                        self.failures += 1
                        report(error)
                        lane.fail()


def report(error: BaseException) -> None:
    """Print where a defect is. Its message may hold a user's text, which belongs in no log."""
    lines = traceback.format_tb(error.__traceback__)
    text = "".join(["Traceback (most recent call last):\n", *lines, type(error).__qualname__])
    with suppress(OSError):  # whoever read it has gone
        print(text, file=sys.stderr, flush=True)
