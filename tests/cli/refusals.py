"""Commands that must be refused, and what a refusal leaves as it was, for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import call, tiny_run

# Gives the one line of a refusal.
Refused = Callable[..., str]


def refusing(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused, and gives the one line that says why."""

    def run(*arguments: object, code: int = 2) -> str:
        capfd.readouterr()
        ended = call(*arguments)
        printed, errors = capfd.readouterr()
        assert ended == code
        assert "Traceback" not in printed + errors
        assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
        return errors.removeprefix("error: ").strip()

    return run


def holds(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# What each run writes anew.
KEPT_ANEW = (".lock", "run.yaml", "versions.json", "ledger.jsonl", "hashes.json")


def contents(workdir: Path) -> dict[Path, str]:
    """The hash of every file that a step made. What each run keeps account of is rewritten by each."""
    files = [path for path in workdir.rglob("*") if path.is_file()]
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(workdir).as_posix() not in KEPT_ANEW
    }


def lost(before: dict[Path, str], workdir: Path) -> list[Path]:
    after = contents(workdir)
    return [path for path, digest in before.items() if after.get(path) != digest]


def small_run(model: Path, workdir: Path, **changes: Any) -> dict[str, Any]:
    """The tiny run with the least of an evaluation."""
    config: dict[str, Any] = tiny_run(model, workdir, **changes)
    config["evaluation"] |= {"max_documents": 1, "max_pairs": 1, "max_chats": 1, "max_new_tokens": 2}
    return config


def write(path: Path, config: Any) -> Path:
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path
