"""Commands that must be refused, and the files that a refusal must leave unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import call, tiny_run

Refused = Callable[..., str]


def refusing(capfd: pytest.CaptureFixture[str]) -> Refused:
    """A function that runs `transllm ARGUMENTS`, fails unless they are refused in one line, and returns this line."""

    def run(*arguments: object, code: int = 2) -> str:
        capfd.readouterr()
        ended = call(*arguments)
        printed, errors = capfd.readouterr()
        assert ended == code
        assert "Traceback" not in printed + errors
        assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
        return errors.removeprefix("error: ").strip()

    return run


def says(message: str, *words: str) -> None:
    """Fails unless the message contains each of the words."""
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# Files that each run writes again.
WRITTEN_BY_EACH_RUN = (".lock", "run.yaml", "versions.json", "ledger.jsonl", "hashes.json")


def contents(workdir: Path) -> dict[Path, str]:
    """The hash of each file of the stages: of all but those that each run writes again."""
    files = [path for path in workdir.rglob("*") if path.is_file()]
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(workdir).as_posix() not in WRITTEN_BY_EACH_RUN
    }


def changed(before: dict[Path, str], workdir: Path) -> list[Path]:
    """The files whose contents are not what they were, or that are missing."""
    after = contents(workdir)
    return [path for path, digest in before.items() if after.get(path) != digest]


def small_run(model: Path, workdir: Path, **changes: Any) -> dict[str, Any]:
    """The tiny run with the smallest evaluation."""
    config: dict[str, Any] = tiny_run(model, workdir, **changes)
    config["evaluation"] |= {"max_documents": 1, "max_pairs": 1, "max_chats": 1, "max_new_tokens": 2}
    return config


def write(path: Path, config: Any) -> Path:
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path
