"""Writes a training stage's numbers as TensorBoard event files. The only module that imports tensorboardX."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from transllm_jax.errors import UserError

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter


class Board:
    """Writes numbers for TensorBoard; each row is flushed at once.

    directory: made if it does not exist; it gets one event file per session. step: the step from which the session
    goes on. TensorBoard then drops the later steps of earlier sessions, so that no step is shown twice.
    Raises UserError if the files cannot be written.
    """

    def __init__(self, directory: Path, *, step: int) -> None:
        self._directory = directory
        # Not SummaryWriter: its thread dies silently on a full disk, and the training loop then waits for it forever.
        writer, self._events, self._summaries = _tensorboardx()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files in order of name. A name has whole seconds only, which two sessions may share.
            number = sum(1 for _ in directory.glob("events.out.tfevents.*"))
            # An absolute path: the library takes a path that begins with "s3:" for a bucket.
            prefix = directory.resolve() / "events"
            self._writer: EventsWriter = writer.EventsWriter(str(prefix), f".{number:06d}")
        except OSError as error:
            raise self._refusal(error) from None
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(self._events.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step by name. Raises UserError if they cannot be written."""
        summary = self._summaries.Summary(
            value=[self._summaries.Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        )
        self._write(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Close the file."""
        try:
            self._writer.close()
        except OSError as error:
            raise self._refusal(error) from None

    def _write(self, event: object) -> None:
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: OSError) -> UserError:
        return UserError(
            f"{self._directory}: TensorBoard's events cannot be written ({error.strerror}); free space or correct its "
            "permissions, then run again to go on from the last checkpoint"
        )


def _tensorboardx() -> tuple[ModuleType, ModuleType, ModuleType]:
    """tensorboardX's writer of event files, and the modules of the two kinds of message in them."""
    # tensorboardX imports torch if it is installed, only to recognise its tensors. That costs seconds and memory. A
    # module that is None in sys.modules counts as not installed.
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2
    finally:
        if hide:
            del sys.modules["torch"]
    return event_file_writer, event_pb2, summary_pb2
