"""The text of examples/world that configs name, as `make demo` and `make world` write it: for tests only."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from conftest import EXAMPLES

ROOT = Path(__file__).parents[1]
TEXT = "runs/text"
# The languages whose text configs name, each with the Makefile's target that writes it.
TARGETS = {"ar": "world", "th": "demo"}


@cache
def printed_by_make(target: str, language: str = "") -> str:
    """The commands of a target of the Makefile, which are not run."""
    words = ["make", "-n", target, "VENV=.", *([f"LANGUAGE={language}"] if language else [])]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def command(language: str, target: str = "") -> str:
    """What writes the text of a language, as a reader types it: what the Makefile does."""
    printed = printed_by_make(target or TARGETS[language], language)
    (found,) = re.findall(r"^\S*(python examples/world/make\.py .*)$", printed, re.MULTILINE)
    return " ".join(found.split())


def write_world(directory: Path) -> Path:
    """Write the text of each language to `directory`/CODE; returns the directory. Takes seconds."""
    for language in TARGETS:
        _, script, _, _, *options = shlex.split(command(language))
        words = [sys.executable, script, language, str(directory / language), *options]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return directory


# Files of examples/thai, and those of the world that are read in the same way.
_INSTEAD = {
    "text.train.txt": "text.txt",
    "pairs.train.tsv": "pairs.tsv",
    "english.train.txt": "english.txt",
    "instructions.train.jsonl": "instructions.jsonl",
    "text.heldout.txt": "heldout.txt",
    "pairs.heldout.tsv": "heldout.tsv",
    "instructions.heldout.jsonl": "conversations.jsonl",
}


def on_world_text(tree: Mapping[str, object]) -> dict[str, Any]:
    """The content of a config that reads examples/thai, changed to read the text of the world in its language."""
    text = json.dumps(tree)
    for thai, world in _INSTEAD.items():
        text = text.replace(json.dumps(str(EXAMPLES / thai)), json.dumps(f"{TEXT}/${{language.code}}/{world}"))
    found: dict[str, Any] = json.loads(text)
    return found
