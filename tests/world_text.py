"""The text of examples/world that configs name, as `make demo` and `make world` write it: for tests only."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import EXAMPLES

ROOT = Path(__file__).parents[1]
TEXT = "runs/text"
KNOWN = "examples/world/known.smollm2-135m.jsonl"
# The languages that configs name, each with the options of make.py.
LANGUAGES = {"ar": f"--known {KNOWN}", "th": f"--known {KNOWN} --beside examples/thai"}


def command(language: str) -> str:
    """What writes the text of a language, as a reader types it."""
    return f"python examples/world/make.py {language} {TEXT}/{language} {LANGUAGES[language]}"


def write_world(directory: Path) -> Path:
    """Write the text of each language to `directory`/CODE; returns the directory. Takes seconds."""
    for language, options in LANGUAGES.items():
        words = [sys.executable, "examples/world/make.py", language, str(directory / language), *shlex.split(options)]
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
