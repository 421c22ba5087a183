"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class EnglishBy(StrEnum):
    """Which model writes the English answers."""

    model = "model"
    original = "original"


English = Annotated[
    EnglishBy,
    typer.Option(help="Which model writes the English answers, within chains, too: this one, or the original in it."),
]
