"""Read and check a config file and dotted overrides. An unknown key is an error that names it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from transllm_jax.config.marks import MARK, require_values
from transllm_jax.config.references import resolved
from transllm_jax.config.run import Config
from transllm_jax.config.section import Section
from transllm_jax.errors import UserError

# A section holds one key of each pair. One that is given on the command line takes the place of both in the file.
_EITHER = (("steps", "epochs"), ("warmup_steps", "warmup_ratio"))


class _Loader(yaml.SafeLoader):
    """A safe YAML loader with YAML 1.2 numbers, which raises UserError for a duplicate key.

    PyYAML reads YAML 1.1 numbers: `1e-3` as text, `010` as 8 and `1:30` as 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise UserError(f"line {node.value[place][0].start_mark.line + 1}: the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] not in ("int", "float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$|^0x[0-9a-fA-F]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN)$"),
    list("-+0123456789."),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `key.path=value` overrides (values are YAML), then resolve `${key.path}`.

    Raises UserError that names the file and the key path, and says how to fix it.
    """
    if not path.is_file():
        raise UserError(f"{path}: {_no_config(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return parse_config(text, path, overrides)


def parse_config(text: str, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a text; `path` names it in messages. Raises UserError as `load_config`."""
    try:
        tree = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except UserError as error:
        raise UserError(f"{path}: {error}; remove one of the two") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise UserError(f"{path}: not YAML: {where}; correct it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values; see configs/demo.yaml")
    given = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        _override(tree, override, given)
    try:
        return Config.model_validate(resolved(tree))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        if any(fault["input"] == MARK for fault in error.errors()):
            require_values(tree, str(path))
        raise UserError(f"{path}: {_explain(error)}") from None


S = TypeVar("S", bound=Section)


def load_section(kind: type[S], values: Mapping[str, Any], overrides: Sequence[str], where: str) -> S:
    """A section alone, from values and then `key=value` overrides (values are YAML), as commands take it.

    Raises UserError that begins with `where`.
    """
    tree = dict(values)
    for override in overrides:
        _override(tree, override, set())
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, kind)}") from None


def recorded_date(path: Path) -> date | None:
    """The `date` in a run.yaml that an earlier session wrote, or None.

    Raises UserError if the file is damaged.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")).get("date")
        return None if found is None else date.fromisoformat(str(found))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())}); give date=YYYY-MM-DD, the day on which the run "
            "began, and remove the file"
        ) from None


def recorded_settings(path: Path) -> dict[str, Any]:
    """The content of a run.yaml as it is, without a check of its keys, which may be those of another version.

    Empty if the file is. Raises UserError if it is damaged.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())}); `transllm run` with the run's config writes it again"
        ) from None
    if not isinstance(found, dict | None):
        raise UserError(f"{path} is damaged; `transllm run` with the run's config writes it again")
    return found or {}


def _no_config(path: Path) -> str:
    if (own := path / "run.yaml").is_file():
        return f"this is a run's directory; transllm run {own} --workdir {path} goes on with it"
    if path.is_dir():
        return "this is a directory; give a config file"
    import difflib

    near = difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*.y*ml")], n=1)
    if near:
        return f"no such config file; did you mean {path.with_name(near[0])}?"
    return f"no such config file; `transllm init {path}` writes one"


def _override(tree: dict[str, Any], override: str, given: Set[str]) -> None:
    """Put an override into the tree. given: the keys of all overrides."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write it as key.path=value, such as pretrain.steps=10")
    if not text.strip():
        # As from an empty variable of a shell.
        raise UserError(f"override {override!r}: it has no value; write {key}=null to take the key away")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML; quote it") from None
    except UserError as error:
        raise UserError(f"override {override!r}: {error}; remove one of the two") from None
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {name!r} is a value, not a section of the config")
    node[last] = value
    other = next((pair[1 - pair.index(last)] for pair in _EITHER if last in pair), None)
    if other is not None and value is not None and ".".join([*parents, other]) not in given:
        node.pop(other, None)


def _explain(error: ValidationError, section: type[Section] = Config) -> str:
    """All errors in one line, each with its key path; for a misspelt key, also the closest known key."""
    import difflib

    faults = []
    for fault in error.errors():
        if fault["type"] == "default_factory_not_called":  # it follows from another key, which is a fault itself
            continue
        path = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            known = _fields(fault["loc"][:-1], section)
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}"
            faults.append(f"{path}: unknown key; {hint}")
        elif fault["type"] == "missing":
            faults.append(f"{path}: missing; add it")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            given = repr(fault["input"])
            # The input of an error in a whole section is not shown: the message says enough.
            faults.append(f"{path}: {message}" + ("" if isinstance(fault["input"], dict) else f" (it is {given[:60]})"))
    return "; ".join(faults)


def _fields(path: Sequence[str | int], section: Any) -> list[str]:
    """The keys of the section at a path below a section."""
    for name in path:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        # The Source in `list[Annotated[Source, ...]]`.
        arguments = [getattr(argument, "__origin__", argument) for argument in getattr(annotation, "__args__", ())]
        section = next((a for a in arguments if isinstance(a, type) and issubclass(a, Section)), annotation)
    return list(section.model_fields)
