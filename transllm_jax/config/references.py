"""References in a config: `${language.code}` in a text stands for the value of that key of the same config."""

from __future__ import annotations

import re
from datetime import date
from itertools import takewhile
from typing import Any

from transllm_jax.config.describe import section_at, sections_in
from transllm_jax.errors import UserError

# As in OmegaConf, but of one value alone. `$${` is a `${` that begins no reference.
_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)(\}?)")


def resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config's tree in which each reference is replaced by the value of its key.

    A text that is a reference and nothing else takes the value with its type. A key that the tree lacks has its
    default. Raises UserError that names both keys, for a reference to a key that the config does not have, that has no
    value, or that is not a single value, and for references in a circle.
    """
    return {name: _resolved(value, tree, str(name), ()) for name, value in tree.items()}


def _resolved(node: Any, tree: dict[str, Any], place: str, trail: tuple[str, ...]) -> Any:
    """place: the key of the node. trail: the keys whose references led to it."""
    if isinstance(node, dict):
        return {name: _resolved(value, tree, f"{place}.{name}", trail) for name, value in node.items()}
    if isinstance(node, list):
        return [_resolved(value, tree, f"{place}.{number}", trail) for number, value in enumerate(node)]
    if not isinstance(node, str):
        return node

    def value_of(found: re.Match[str]) -> Any:
        if found[0] == "$${":
            return "${"
        if not found[2] or not found[1].strip():
            raise UserError(f"{place}: `${{` begins a reference such as ${{language.code}}; write $${{ for a plain ${{")
        return _referred(found[1].strip(), tree, (*trail, place))

    whole = _REFERENCE.fullmatch(node)
    return value_of(whole) if whole else _REFERENCE.sub(lambda found: _as_text(value_of(found)), node)


def _referred(key: str, tree: dict[str, Any], trail: tuple[str, ...]) -> Any:
    """The value of a key, in the tree or by default. trail: the keys that led to it; the last one refers to it."""
    where = f"{trail[-1]} refers to {key}"
    if key in trail:
        circle = " -> ".join([*trail[trail.index(key) :], key])
        raise UserError(f"{where} in a circle ({circle}); give one of them a value")
    try:
        section, last = section_at(key)
    except UserError as error:
        raise UserError(f"{trail[-1]} refers to {error}") from None
    *parents, _ = key.split(".")
    node: Any = tree
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else node
    if not isinstance(node, dict | None):
        raise UserError(f"{where}, but {'.'.join(parents)} is not a section here; give {trail[-1]} a value")
    field, value = section.model_fields[last], (node or {}).get(last)
    single = not sections_in(field.annotation)
    if single and value is None and not field.is_required():
        # A default that is computed follows from the keys before it in the section, as that of language.name does.
        earlier = takewhile(lambda name: name != last, section.model_fields)
        before = earlier if field.default_factory is not None else ()
        given = {name: _referred(".".join([*parents, name]), tree, (*trail, key)) for name in before}
        value = field.get_default(call_default_factory=True, validated_data=given)
    if not single or not isinstance(value, str | int | float | date | None):
        raise UserError(f"{where}, which is not a single value; refer to a key that is, such as language.code")
    if value is None:
        raise UserError(f"{where}, which has no value; give it one in the file, or on the command line as {key}=VALUE")
    return _resolved(value, tree, key, trail)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
