"""The base class of every section of a config, and the types that sections share."""

from __future__ import annotations

import ast
import inspect
import os
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

# A path in which `~` is the home directory, as in a shell.
Location = Annotated[str, AfterValidator(os.path.expanduser), Field(json_schema_extra={"format": "path"})]
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
    """A part of the config; frozen, and strict about its keys.

    The string below a field is its meaning, in Markdown: see `meanings`.
    newer: keys that are written only where they differ from their defaults. A stage's inputs are its config, and those
    of runs that were made before there were these keys stay as they were.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    newer: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = {name for name in self.newer if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in dump(self).items() if name not in idle}

    @model_validator(mode="before")
    @classmethod
    def _no_truth_as_number(cls, given: Any) -> Any:
        # YAML reads yes, no, on and off as true and false, and pydantic would read those as 1 and 0.
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} cannot be {str(value).lower()} (yes, no, on and off mean that in YAML)")
        return given


def meanings(section: type[Section]) -> dict[str, str]:
    """The meaning of each key of a section, in Markdown: the string below the field, in the class that defines it.

    docs/config.md and docs/config.schema.json are made from them. They are read from the source, when they are asked
    for: pydantic's `use_attribute_docstrings` reads it at each import, which then takes twice as long.
    Raises OSError if the source is not there.
    """
    found = {}
    for base in reversed(section.__mro__):
        if not issubclass(base, Section):
            continue
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                    found[name] = inspect.cleandoc(meaning).strip()
    return found
