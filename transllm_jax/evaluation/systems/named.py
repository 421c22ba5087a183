"""How a system is written on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transllm_jax.errors import UserError

Kind = Literal["model", "endpoint", "answers", "bridge", "inside"]
FORMS = (
    "a work directory (WORKDIR, WORKDIR#original or WORKDIR#POINT), a model directory, a server's model (URL#MODEL), "
    "answers:FILE, bridge:WORKDIR or inside:WORKDIR"
)
ORIGINAL = "original"


@dataclass(frozen=True)
class Named:
    """A system as it was written.

    where: a path, or a URL. part: what follows `#`: a point of a run, or a server's model; empty without one.
    """

    kind: Kind
    name: str
    where: str
    part: str = ""


def parse_system(given: str) -> Named:
    """Reads `[NAME=]SYSTEM`. Raises UserError if it has none of the forms."""
    match = re.match(r"^([\w.-]+)=(?!=)(.+)$", given)
    # A path may hold "=" as well.
    if match and not Path(given).exists():
        name, rest = match[1], match[2]
    else:
        name, rest = "", given
    kind: Kind = "model"
    for prefix in ("answers", "bridge", "inside"):
        if rest.startswith(f"{prefix}:"):
            kind, rest = prefix, rest.removeprefix(f"{prefix}:")
    where, _, part = (rest, "", "") if kind == "answers" else rest.partition("#")
    if kind == "model" and re.match(r"^https?://", where):
        kind = "endpoint"
        if not part:
            raise UserError(f"{given}: a server has many models; write URL#MODEL, such as {where}#NAME")
    if not where:
        raise UserError(f"{given!r} is no system; give {FORMS}")
    return Named(kind, name or _name(kind, where, part), where, part)


def parse_systems(given: list[str]) -> list[Named]:
    """Reads all systems of a command. Raises UserError if two have one name."""
    found: dict[str, Named] = {}
    for text in given:
        one = parse_system(text)
        if one.name in found:
            raise UserError(f"two systems have the name {one.name}; name one of them: OTHER={text}")
        found[one.name] = one
    return list(found.values())


def _name(kind: Kind, where: str, part: str) -> str:
    """A short name for tables, which is also a directory's."""
    if kind == "endpoint":
        name = part.rstrip("/").rpartition("/")[2]
    else:
        path = Path(where.rstrip("/"))
        name = path.stem if kind == "answers" else (path.name or path.resolve().name)
        if name in ("", ".", ".."):
            name = path.resolve().name
        if name == "export" and path.resolve().parent.name:
            name = f"{path.resolve().parent.name}-export"
        if kind in ("bridge", "inside"):
            name = f"{kind}-{name}"
        if part:
            name = f"{name}-{part}"
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or kind
