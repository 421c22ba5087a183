"""The config reference: docs/config.md and docs/config.schema.json are what the typed config says."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from transllm_jax.config import (
    ChatModel,
    Checks,
    Cleaning,
    Config,
    Endpoint,
    Evaluation,
    Export,
    Filters,
    Language,
    Lora,
    MarkerNames,
    Pretraining,
    Prompts,
    Recover,
    Section,
    Seq2seq,
    Source,
    TeacherEndpoint,
    Training,
    Transfer,
    Translation,
    TranslatorEndpoint,
    Validation,
    Vocabulary,
    Written,
    load_config,
    meanings,
)
from transllm_jax.config.sections import Mesh

ROOT = Path(__file__).parents[2]
PAGE, SCHEMA = ROOT / "docs" / "config.md", ROOT / "docs" / "config.schema.json"

# Each section, and the headings of the page under which its keys are.
HEADINGS: dict[type[Section], list[str]] = {
    Config: ["The whole run"],
    Language: ["language"],
    MarkerNames: ["markers"],
    ChatModel: ["model"],
    Vocabulary: ["vocabulary"],
    Lora: ["lora"],
    Prompts: ["prompts"],
    Training: ["pretrain"],
    Pretraining: ["pretrain"],
    Validation: ["pretrain.validation"],
    Recover: ["recover"],
    Filters: ["recover.filters"],
    Written: ["recover.written"],
    Endpoint: ["recover.teacher"],
    TeacherEndpoint: ["recover.teacher"],
    Translation: ["recover.translate_instructions"],
    TranslatorEndpoint: ["recover.translate_instructions.translator", "recover.teacher"],
    Checks: ["recover.checks"],
    Seq2seq: ["recover.seq2seq"],
    Transfer: ["transfer", "pretrain"],
    Evaluation: ["evaluation"],
    Export: ["export"],
    Mesh: ["mesh"],
    Source: ["source"],
    Cleaning: ["source.cleaning"],
}


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "docs" / "config_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()


def _subclasses(section: type[Section]) -> set[type[Section]]:
    found = {one for one in section.__subclasses__() if one.__module__.startswith("transllm_jax.")}
    return found.union(*map(_subclasses, found))


SECTIONS = sorted(_subclasses(Section), key=lambda section: section.__name__)


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parts(page: str) -> dict[str, str]:
    """The page's text by heading."""
    places = [*re.finditer(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)]
    text = places[0].string
    ends = [*(place.start() for place in places[1:]), len(text)]
    found = {place[1]: text[place.end() : end] for place, end in zip(places, ends, strict=True)}
    assert len(found) == len(places), "two headings are alike"
    return found


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    found = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize("path", [PAGE, SCHEMA], ids=lambda path: path.name)
def test_the_reference_is_what_the_config_says(path: Path) -> None:
    wanted = GENERATOR.files()
    assert wanted.keys() == {PAGE, SCHEMA}
    fresh = path.is_file() and path.read_text(encoding="utf-8") == wanted[path]
    assert fresh, f"docs/{path.name} is not what the config says: run `python docs/config_reference.py`"


# The meanings


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_has_a_meaning(section: type[Section]) -> None:
    found = meanings(section)
    assert found.keys() == section.model_fields.keys()
    for name, meaning in found.items():
        assert meaning[-1] == "." and meaning == meaning.strip(), f"{section.__name__}.{name}: {meaning!r}"
        assert meaning[0].isupper() or meaning[0] == "`", f"{section.__name__}.{name}: {meaning!r}"
    assert section.__doc__ and section.__doc__.strip().endswith(".")


def test_what_the_meaning_of_a_key_is() -> None:
    found = meanings(Transfer)
    assert found["pairs"] == "The pairs from which translation instructions are made."
    assert found["checkpoint_every"] == "Steps between two checkpoints."  # a base class's
    assert found["remat"].splitlines()[-1] == "- `full`: only the layer's input."
    assert meanings(Language)["code"].endswith("unless they are named.")


# The page


def test_every_section_and_key_is_on_the_page(parts: dict[str, str]) -> None:
    assert HEADINGS.keys() == set(SECTIONS), "name the new section's heading in this test"
    shown = {heading: re.findall(r"^- \*\*`(\w+)`\*\* · ", text, re.MULTILINE) for heading, text in parts.items()}
    for section, headings in HEADINGS.items():
        keys = [key for heading in headings for key in shown[heading]]
        assert set(section.model_fields) <= set(keys), section.__name__
    # Each key once, and no key that there is not.
    for heading, keys in shown.items():
        holders = [section for section, headings in HEADINGS.items() if headings[0] == heading]
        assert len(set(keys)) == len(keys), heading
        assert set(keys) <= {key for section in holders for key in section.model_fields}, heading


def test_sections_are_in_the_order_of_the_config(parts: dict[str, str]) -> None:
    sections = [name for name in Config.model_fields if name in parts]
    assert [heading for heading in parts if heading in Config.model_fields] == sections
    assert {"language", "model", "pretrain", "translate", "transfer", "mesh"} <= set(sections)


@pytest.mark.parametrize(
    ("heading", "line"),
    [
        ("The whole run", "**`title`** · text · **required**"),
        ("The whole run", "**`workdir`** · path · **required**"),
        ("The whole run", "**`seed`** · whole number ≥ 0 and < 2,147,483,648 · default `0`"),
        ("The whole run", "**`date`** · date (YYYY-MM-DD) · optional"),
        ("The whole run", "**`lora`** · [section](#lora) or `none` · optional"),
        ("The whole run", "**`translate`** · [section](#translate) · **required**"),
        ("The whole run", "**`token_cache`** · path · optional"),
        ("language", "**`scripts`** · list of texts · default `[]`"),
        ("lora", "**`dropout`** · number ≥ 0 and < 1 · default `0.0`"),
        (
            "lora",
            "**`targets`** · list of one or more of `q`, `k`, `v`, `o`, `gate`, `up`, `down` · "
            "default `[q, k, v, o, gate, up, down]`",
        ),
        ("prompts", "**`to_target`** · list of texts · default `['Translate into {language}: {text}']`"),
        ("pretrain", "**`sources`** · list of one or more [sources](#source) · **required**"),
        ("pretrain", "**`length`** · whole number ≥ 16 · **required**"),
        ("pretrain", "**`warmup_ratio`** · number from 0 to 1 · optional"),
        ("pretrain", "**`validation`** · [section](#pretrainvalidation) · optional"),
        ("pretrain.validation", "**`source`** · [source](#source) · **required**"),
        ("transfer", "**`chains`** · number ≥ 0 · default `0.5`"),
        ("evaluation", "**`instruction_fields`** · list of two texts · default `[instruction, translation]`"),
        ("source", "**`separator`** · one of `blank line`, `line` · default `blank line`"),
        ("source", "**`cleaning`** · [section](#sourcecleaning) · optional"),
        ("source.cleaning", "**`contamination`** · `true` or `false` · default `true`"),
        ("source.cleaning", "**`near_duplicates`** · number > 0 and ≤ 1 · optional"),
    ],
)
def test_the_type_and_default_of_a_key(parts: dict[str, str], heading: str, line: str) -> None:
    assert f"- {line}\\" in " ".join(parts[heading].split())


def test_all_defaults_are_those_of_the_config(parts: dict[str, str]) -> None:
    found = 0
    for section, (heading, *_) in HEADINGS.items():
        for name, default in re.findall(
            r"\*\*`(\w+)`\*\* [^\\]*? · default `([^`]*)`\\$", parts[heading], re.MULTILINE
        ):
            if name in section.model_fields:
                value = section.model_fields[name].default
                assert yaml.safe_load(default) == (list(value) if isinstance(value, tuple) else value), name
                found += 1
    assert found > 60


def test_links_lead_to_headings_of_the_page(page: str, parts: dict[str, str]) -> None:
    anchors = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in parts}
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert len(links) > 20
    assert [link for link in links if link.removeprefix("#") not in anchors or link[0] != "#"] == []


def test_lines_are_short_and_paragraphs_apart(page: str) -> None:
    lines = page.splitlines()
    assert max(map(len, lines)) <= 120
    assert [line for line in lines if line != line.rstrip()] == []
    # GitHub and MyST need a blank line around headings.
    assert [line for before, line in pairwise(lines) if re.match(r"##+ ", line) and before] == []


def test_the_example_is_a_whole_config(page: str, tmp_path: Path, schema: jsonschema.Draft202012Validator) -> None:
    example = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
    path = tmp_path / "short.yaml"
    path.write_text(example, encoding="utf-8")
    config = load_config(path)
    assert {name for name, field in Config.model_fields.items() if field.is_required()} == config.model_fields_set
    for given in [source.path for source in (*config.vocabulary.sources, *config.translate.sources)] + [
        config.transfer.pairs.path,
        config.recover.instructions,
        config.evaluation.text.path,
        config.evaluation.pairs,
        config.evaluation.instructions,
    ]:
        assert (ROOT / given).is_file(), given
    assert schema.is_valid(json.loads(config.model_dump_json()))


def test_the_example_of_an_override(page: str) -> None:
    (command,) = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert "'export={dtype: bfloat16}'" in command
    config = load_config(ROOT / "configs" / "demo.yaml", ["pretrain.steps=500", "export={dtype: bfloat16}"])
    assert (config.pretrain.steps, config.export.dtype) == (500, "bfloat16")


# The schema


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_valid_by_the_schema(path: Path, schema: jsonschema.Draft202012Validator) -> None:
    # Whole, as run.yaml keeps it; and what the file gives.
    for options in ({}, {"exclude_unset": True}):
        tree = load_config(path).model_dump(mode="json", **options)
        assert [error.message for error in schema.iter_errors(tree)] == []


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"lora": "none"}, True),
        ({"lora": {"rank": 8}}, True),
        ({"lora": None}, False),
        ({"lora": {"rank": 0}}, False),
        ({"seed": "???"}, False),
        ({"sed": 1}, False),
        ({"attention": "fast"}, False),
        ({"date": None}, True),
        ({"title": None}, False),
        ({"workdir": "~/runs"}, True),
        ({"export": {"dtype": "float16"}}, True),
        ({"export": {"quantise": True}}, False),
    ],
    ids=str,
)
def test_what_is_valid_by_the_schema(
    change: dict[str, Any], valid: bool, schema: jsonschema.Draft202012Validator
) -> None:
    tree = load_config(ROOT / "configs" / "demo.yaml").model_dump(mode="json")
    assert schema.is_valid({**tree, **change}) == valid


def test_the_schema_says_what_each_key_means(schema: jsonschema.Draft202012Validator) -> None:
    whole: Any = schema.schema
    assert whole["properties"]["workdir"]["description"] == meanings(Config)["workdir"]
    for section in set(SECTIONS) - {Config, Training, Endpoint}:  # the last two are each the base class of two
        for name, node in whole["$defs"][section.__name__]["properties"].items():
            assert node["description"] == meanings(section)[name]
