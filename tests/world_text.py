"""The text of examples/world that configs name, as `make demo` and `make world` write it: for tests only."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

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
