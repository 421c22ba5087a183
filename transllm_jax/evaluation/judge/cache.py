"""What judges have said so far: a file to which each reply is appended, so that none is paid for twice."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from transllm_jax.disk import cut_behind, sha256_of_json, whole_lines
from transllm_jax.errors import UserError
from transllm_jax.generation.endpoint import Reply
from transllm_jax.tokenizer.chat import Message


def key_of(judge: Mapping[str, Any], messages: Sequence[Message], parameters: Mapping[str, Any]) -> str:
    """What a reply depends on, as a SHA-256: the judge, the prompt with the answers in it, and the parameters."""
    return sha256_of_json({"judge": judge, "messages": list(messages), "parameters": parameters})


class Cache:
    """Replies by `key_of`, with their raw text. Several processes may add to one file at the same time."""

    def __init__(self, path: Path, file: BinaryIO, known: dict[str, Reply]) -> None:
        self.path, self._file, self._known = path, file, known

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Reply | None:
        """The reply that is known; None if there is none."""
        return self._known.get(key)

    def add(self, key: str, reply: Reply, asked: Mapping[str, Any]) -> None:
        """Keep a reply. It is in the file when this returns. asked: what it was asked, for people who read the file."""
        line = json.dumps({"key": key, **asked, "reply": reply.record()}, ensure_ascii=False)
        with _locked(self._file):
            # Nobody else writes now: what is behind the last line break was left by a killed process.
            cut_behind(self.path, whole_lines(self.path))
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        self._known[key] = reply


@contextmanager
def open_cache(path: Path) -> Iterator[Cache]:
    """Open a file of replies; a missing one is made. Raises UserError for a line that is no reply."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        with _locked(file):
            lines = whole_lines(path)
        known: dict[str, Reply] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                known[row["key"]] = Reply(**row["reply"])
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}:{number} is no reply of a judge; remove the line") from None
        yield Cache(path, file, known)


@contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
