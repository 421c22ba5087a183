"""Runs `transllm ARGUMENTS` and writes down what happens, event by event; does harm at the event that it is told.

    python recorded.py LOG HARM ARGUMENTS...

LOG: a line for each event, `KIND DETAIL`, written before the event takes place. HARM: JSON, null for none, or

- "kind", "number": at the number-th event of this kind, counted from 1,
- "do": "kill" (SIGKILL), "term", "int" (the signals), "int twice", "full" (the disk is full from now on: whatever
  writes fails), "wait" (until the process is killed: the event is never begun), "poison" (this step's
  loss is not finite),
- "after": seconds later, for the signals; a thread sends them whatever the main thread is in.

Kinds:

- batch: a step is begun; its detail is the stage, the state's step and the SHA-256 of the batch's tokens,
- save, tokenise, plan, arrays, manifest, file: a file is opened for writing, renamed or removed, or a directory made
  or removed, in checkpoints/, of the token cache, of a plan, in trainable/, a manifest, and any other,
- line: a line is written to metrics.jsonl, validation.jsonl, skipped.jsonl or speed.jsonl,
- validate: a validation is begun; stage, evaluation: a stage or an evaluation is begun or ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}


class Events:
    """Writes events down, and does the harm when its time has come."""

    def __init__(self, log: str, harm: Mapping[str, Any] | None, workdir: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._harm, self._workdir = harm, os.path.abspath(workdir) + os.sep
        self._counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self.full = self.poison = False

    def happens(self, kind: str, detail: str, *, writes: bool = False, path: str | None = None) -> None:
        """Note an event that is about to take place. Raises OSError where it `writes` (to `path`) on a full disk."""
        with self._lock:
            self._counts[kind] += 1
            os.write(self._log, f"{kind} {detail}\n".encode())
            harm = self._harm
            if harm is not None and harm["kind"] == kind and harm["number"] == self._counts[kind]:
                self._do(harm)
        if writes and self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def _do(self, harm: Mapping[str, Any]) -> None:
        os.write(self._log, f"harm {harm['do']} at {harm['kind']} {harm['number']}\n".encode())
        if harm["do"] == "full":
            self.full = True
        elif harm["do"] == "poison":
            self.poison = True
        elif harm["do"] == "wait":
            time.sleep(3600)
        elif harm.get("after"):
            threading.Thread(target=self._send, args=(harm,), daemon=True).start()
        else:
            self._send(harm)

    def _send(self, harm: Mapping[str, Any]) -> None:
        time.sleep(harm.get("after", 0))
        if harm["do"] == "int twice":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        os.kill(os.getpid(), SIGNALS[harm["do"].removesuffix(" twice")])

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python tells of what touches files before it does it, whichever thread and library asks."""
        if event == "open":
            path, mode, flags = arguments
            if not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not set(mode or "") & set("wax+"):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.abspath(os.fsdecode(path))
        if name.startswith(self._workdir):
            inside = name.removeprefix(self._workdir)
            # Removing needs no space.
            self.happens(_kind(inside), f"{event} {inside}", writes=event in ("open", "os.mkdir"), path=name)


def _kind(name: str) -> str:
    first, *_ = parts = Path(name).parts
    if first == "tokens":
        return "plan" if "plan-" in name else "tokenise"
    if "checkpoints" in parts:
        return "save"
    if any(part.startswith("trainable") for part in parts):
        return "arrays"
    return "manifest" if "manifest.json" in name else "file"


def watch(events: Events) -> None:
    """Have the package tell of steps, stages, validations and lines."""
    import numpy as np

    from transllm_jax.training import loop
    from transllm_jax.training.record import metrics
    from transllm_jax.training.record.ledger import Ledger

    stages: list[str] = []
    whole_stage, whole_spend, whole_write = Ledger.stage, Ledger.spend, metrics.MetricsLog.write
    make_step = loop.make_step

    @contextmanager
    def stage(self: Ledger, name: str, **given: Any) -> Iterator[None]:
        kind = "evaluation" if name.startswith("evaluation/") else "stage"
        stages.append(name)
        events.happens(kind, f"{name} begins")
        with whole_stage(self, name, **given):
            yield
        events.happens(kind, f"{name} ends")

    @contextmanager
    def spend(self: Ledger, category: str) -> Iterator[None]:
        if category == "validate" and not stages[-1].startswith("evaluation/"):
            events.happens("validate", stages[-1])
        with whole_spend(self, category):
            yield

    def write(self: metrics.MetricsLog, row: Mapping[str, Any]) -> None:
        events.happens("line", json.dumps(row), writes=True)
        whole_write(self, row)

    @wraps(make_step)
    def told(*arguments: Any, **given: Any) -> Any:
        step = make_step(*arguments, **given)

        def run(state: Any, frozen: Any, batch: Any) -> Any:
            found = hashlib.sha256()
            for field in sorted(batch):
                found.update(np.asarray(batch[field]).tobytes())
            events.happens("batch", f"{stages[-1]} {int(state.step)} {found.hexdigest()[:16]}")
            if events.poison:
                first = min(frozen)
                events.poison, frozen = False, {**frozen, first: frozen[first] * np.float32(np.nan)}
            return step(state, frozen, batch)

        return run

    Ledger.stage, Ledger.spend = stage, spend  # type: ignore[method-assign]
    metrics.MetricsLog.write = write  # type: ignore[method-assign]
    loop.make_step = told


def main() -> None:
    """Runs the command with everything watched."""
    log, harm, *arguments = sys.argv[1:]
    workdir = arguments[arguments.index("--workdir") + 1]
    events = Events(log, json.loads(harm), workdir)
    watch(events)
    sys.addaudithook(events.audit)
    from transllm_jax.cli import main as cli

    sys.argv = ["transllm", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
