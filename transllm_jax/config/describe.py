"""The config in words: each key's type, default and meaning, for docs/config.md, editors and `transllm config`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from transllm_jax.config.run import Config
from transllm_jax.config.section import Section, meanings
from transllm_jax.errors import UserError


@dataclass(frozen=True)
class Key:
    """A key of a section, in words.

    kind: its type. given: "required", "optional" or "default 64". section: the one that it holds, or holds a list of.
    """

    name: str
    kind: str
    given: str
    meaning: str
    section: type[Section] | None


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections in a field's annotation: `Lora` in `Lora | None`, `Source` in `list[Annotated[Source, ...]]`."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def walk(section: type[Section] = Config, path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted key, section) of each place in the config that holds a section, in the order of the config."""
    for name, field in section.model_fields.items():
        for inner in sections_in(field.annotation):
            yield f"{path}{name}", inner
            yield from walk(inner, f"{path}{name}.")


def schema() -> dict[str, Any]:
    """The config's JSON schema, with the meaning of each key as its description."""
    whole = Config.model_json_schema()
    sections: list[type[Section]] = [Config, *(section for _, section in walk())]
    for section in dict.fromkeys(sections):
        for name, meaning in meanings(section).items():
            node_of(whole, section)["properties"][name]["description"] = meaning
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def node_of(whole: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """A section's part of the schema."""
    node: dict[str, Any] = whole if section is Config else whole["$defs"][section.__name__]
    return node


def keys(section: type[Section], whole: dict[str, Any], section_words: Callable[[str, str], str]) -> list[Key]:
    """The keys of a section in order, from the schema.

    section_words(key, name): how a section of this name, which the key holds, is called.
    """
    parent, found = node_of(whole, section), []
    for name, field in section.model_fields.items():
        node = parent["properties"][name]
        default = node.get("default")
        if name in parent.get("required", ()):
            given = "required"
        elif default is None or isinstance(default, dict):
            given = "optional"
        else:
            given = f"default `{_inline(default)}`"
        type_ = _type_in_words(node, lambda of, key=name: section_words(key, of))  # type: ignore[misc]
        inside = sections_in(field.annotation)
        found.append(Key(name, type_, given, node["description"], inside[0] if inside else None))
    return found


def section_at(key: str) -> tuple[type[Section], str]:
    """The section that holds a dotted key, and the key's own name; numbers of lists may be left out.

    Raises UserError, with the nearest key, for one that the config does not have.
    """
    section: type[Section] = Config
    *parents, last = [name for name in key.split(".") if not name.isdigit()] or [""]
    for depth, name in enumerate([*parents, last]):
        if name not in section.model_fields:
            before = ".".join([*parents, last][:depth])
            elsewhere = [path for path, found in walk() if name in found.model_fields]
            if elsewhere and not before:
                raise UserError(f"{key}: there is no key {name!r} at the top; it is in {', '.join(elsewhere)}")
            near = difflib.get_close_matches(name, section.model_fields, n=1)
            there = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(section.model_fields)}"
            raise UserError(f"{key}: there is no key {name!r}{f' in {before}' if before else ''}; {there}")
        if depth < len(parents):
            inside = sections_in(section.model_fields[name].annotation)
            if not inside:
                raise UserError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a section of the config")
            section = inside[0]
    return section, last


def doc(section: type[Section]) -> str:
    """A section's docstring."""
    return inspect.cleandoc(section.__doc__ or "")


def _type_in_words(node: dict[str, Any], section_words: Callable[[str], str]) -> str:
    """A JSON schema's type in words. Raises KeyError for a type that has no words yet."""
    if "$ref" in node:
        return section_words(node["$ref"].rpartition("/")[2])
    if "anyOf" in node:
        return " or ".join(_type_in_words(one, section_words) for one in node["anyOf"] if one.get("type") != "null")
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return "one of " + ", ".join(f"`{value}`" for value in node["enum"])
    if node["type"] == "array":
        if "prefixItems" in node:
            return {2: "list of two texts"}[node["maxItems"]]
        some = "list of one or more" if node.get("minItems") else "list"
        items = _type_in_words(node["items"], section_words)
        if "enum" in node["items"]:
            return f"{some} {items.removeprefix('one ')}"
        plural = items.replace("text", "texts").replace("[source]", "[sources]")
        return f"{some} {plural}" if "more" in some else f"{some} of {plural}"
    if node["type"] == "string":
        return {None: "text", "path": "path", "date": "date (YYYY-MM-DD)"}[node.get("format")]
    if node["type"] == "object":
        return "mapping"
    if node["type"] == "boolean":
        return "`true` or `false`"
    return {"integer": "whole number", "number": "number"}[node["type"]] + _bounds(node)


def _bounds(node: dict[str, Any]) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']:g} to {node['maximum']:g}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    found = [f"{sign} {node[name]:,}" for name, sign in signs.items() if name in node]
    return f" {' and '.join(found)}" if found else ""


def _inline(value: Any) -> str:
    """A value in one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
