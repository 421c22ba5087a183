"""The base class of every section of a config, and the types that sections share."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# A path in which `~` is the home directory, as in a shell.
Location = Annotated[str, AfterValidator(os.path.expanduser)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def without_limit(given: Any, successor: str) -> Any:
    """A section's input without `limit: null`, which the run.yaml of an older run may have.

    Raises ValueError for any other `limit`; the message says what it counted and which key replaces it.
    """
    if not isinstance(given, dict) or "limit" not in given:
        return given
    if given["limit"] is not None:
        raise ValueError(f"limit counted {successor}")
    return {key: value for key, value in given.items() if key != "limit"}


class Section(BaseModel):
    """A part of the config; frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_as_number(cls, given: Any) -> Any:
        # YAML reads yes, no, on and off as true and false, and pydantic would read those as 1 and 0.
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} cannot be {str(value).lower()} (yes, no, on and off mean that in YAML)")
        return given
