"""Where the world of checkable facts (examples/world) is, and readers of the files that it writes: for tests only."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

WORLD = Path(__file__).parents[2] / "examples" / "world"
# So that the tests can import its modules.
sys.path.insert(0, str(WORLD))

ENGLISH = yaml.safe_load((WORLD / "english.yaml").read_text(encoding="utf-8"))
LANGUAGES = sorted(path.stem for path in (WORLD / "languages").glob("*.yaml"))
KNOWN = WORLD / "known.smollm2-135m.jsonl"
every_language = pytest.mark.parametrize("language", LANGUAGES)
OF_A_KIND = 11
# Everyday text in Thai, which stays in the mixture.
THAI = WORLD.parent / "thai"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(path: Path) -> list[tuple[str, str]]:
    found = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [(english, target) for english, target in found]


def documents(path: Path) -> list[str]:
    return [text for text in path.read_text(encoding="utf-8").split("\n\n") if text.strip()]


def whole(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)
