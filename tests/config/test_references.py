"""References in a config, `${language.code}`, and the name that follows from a language's code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from transllm_jax.config import Config, load_config
from transllm_jax.config.load import recorded_settings
from transllm_jax.config.marks import require_values
from transllm_jax.errors import UserError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


def loaded(*overrides: str) -> Config:
    return load_config(DEMO, overrides)


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        loaded(*overrides)
    assert str(error.value).startswith(f"{DEMO}: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{DEMO}: ")


def test_one_file_serves_many_languages(tmp_path: Path) -> None:
    tree = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    tree |= {"workdir": "runs/world-${language.code}", "title": "SmolLM2 to ${language.name}"}
    tree["language"] = {"code": "th"}
    tree["evaluation"]["text"]["path"] = "text/${language.code}/${language.code}.txt"
    tree["pretrain"]["sources"] = [{"path": "${evaluation.text.path}"}]
    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    for code, name in (("th", "Thai"), ("ar", "Arabic"), ("zh-Hant", "Traditional Chinese")):
        config = load_config(path, [f"language.code={code}"])
        assert (config.workdir, config.title) == (f"runs/world-{code}", f"SmolLM2 to {name}")
        assert config.evaluation.text.path == config.pretrain.sources[0].path == f"text/{code}/{code}.txt"
        # run.yaml is a record: what it says does not depend on another key.
        (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
        assert "${" not in config.to_yaml()
        assert load_config(tmp_path / "run.yaml") == config
        assert recorded_settings(tmp_path / "run.yaml")["workdir"] == f"runs/world-{code}"


def test_the_type_of_a_value_stays_where_it_is_the_whole_text() -> None:
    config = loaded(
        "seed=${pretrain.steps}", "pretrain.steps=7", "title=${seed}.${seed}", "lora.rslora=${recover.contamination}"
    )
    assert (config.seed, config.title, config.lora and config.lora.rslora) == (7, "7.7", True)


def test_values_in_a_text_are_written_as_in_yaml() -> None:
    given = "title=${export.dtype} ${recover.contamination} ${date} ${transfer.chains} ${ seed }"
    config = loaded(
        given,
        "export.dtype=bfloat16",
        "recover.contamination=false",
        "date=2026-01-02",
        "seed=3",
        "transfer.chains=0.4",
    )
    assert config.title == "bfloat16 false 2026-01-02 0.4 3"


def test_a_key_that_the_file_lacks_has_its_default() -> None:
    assert "markers" not in yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    assert loaded("title=${markers.english} ${mesh.tensor}").title == "<EN> 1"
    # The name is not in the file, and follows from a code that is itself a reference.
    config = loaded("title=${language.name}", "language={code: '${markers.response}'}", "markers.response=lo")
    assert (config.title, config.language.name) == ("Lao", "Lao")
    assert loaded("title=${language.name}", "language={name: null}").title == "Thai"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("$${language.code}", "${language.code}"),
        ("a $$ $x {text} $", "a $$ $x {text} $"),
        ("$$${seed}${seed}", "$${seed}0"),
    ],
)
def test_a_plain_dollar_and_brace(text: str, meant: str, tmp_path: Path) -> None:
    config = loaded(f"title='{text}'", "seed=0")
    assert config.title == meant
    again = tmp_path / "run.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["title=${language.cod}"],
            "title refers to language.cod: there is no key 'cod' in language; did you mean 'code'",
        ),
        (["title=${code}"], "title refers to code: there is no key 'code' at the top; it is in language"),
        (["title=${seed.x}"], "title refers to seed.x: seed is a value, not a section"),
        (["pretrain.sources=[{path: '${x}'}]"], "pretrain.sources.0.path refers to x: there is no key 'x'"),
        (["title=${language}"], "title refers to language, which is not a single value; refer to a key that is"),
        (["title=${mesh}"], "title refers to mesh, which is not a single value"),  # not in the file
        (["title=${pretrain.sources}"], "title refers to pretrain.sources, which is not a single value"),
        (["title=${lora.targets}"], "title refers to lora.targets, which is not a single value"),  # not in the file
        (["title=${pretrain.sources.0.path}"], "but pretrain.sources.0 is not a section here; give title a value"),
        (["title=${lora.rank}", "lora=none"], "title refers to lora.rank, but lora is not a section here"),
        (
            ["title=${date}"],
            "title refers to date, which has no value; give it one in the file, or on the command line",
        ),
        (["title=${vocabulary.tokenizer}"], "vocabulary.tokenizer, which has no value"),
        (["title=${model.source}", "model={}"], "title refers to model.source, which has no value"),
        (["title=${title}"], "title refers to title in a circle (title -> title); give one of them a value"),
        (
            ["title=a ${workdir}", "workdir=${token_cache}", "token_cache=${workdir}/b"],
            "token_cache refers to workdir in a circle (workdir -> token_cache -> workdir)",
        ),
        (["language={code: '${language.name}'}"], "in a circle (language.code -> language.name -> language.code)"),
        (["title='${'"], "title: `${` begins a reference such as ${language.code}; write $${ for a plain ${"),
        (["title='${}'"], "title: `${` begins a reference"),
        (["title='${a.${b}}'"], "title: `${` begins a reference"),
        (["pretrain.steps=${title}"], "pretrain.steps: Input should be a valid integer"),
    ],
)
def test_a_reference_that_leads_nowhere(given: list[str], said: str) -> None:
    assert said in refused(*given)


def test_only_the_key_that_is_still_to_be_given_is_named() -> None:
    config = loaded("language={code: '???'}", "workdir=runs/${language.code}", "title=to ${language.name}")
    with pytest.raises(UserError, match=re.escape("this key is still ???: language.code; give it a value")):
        require_values(config.model_dump(mode="json"), "demo.yaml")
    # A number cannot be read before it is given, nor one that refers to it.
    assert refused("seed=???", "pretrain.steps=${seed}").startswith("this key is still ???: seed; give it a value")


# The language's name


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("{code: ar}", "Arabic"),
        ("{code: lo, name: null}", "Lao"),
        ("{code: th, name: Siamese}", "Siamese"),
        ("{code: xx, name: Exish}", "Exish"),  # of a code that CLDR does not know
        ("{code: 'no'}", "Norwegian"),
        ("{}", "Thai"),
    ],
)
def test_the_name_of_a_language(given: str, name: str) -> None:
    assert loaded(f"language={given}").language.name == name


def test_the_fingerprint_of_a_thai_run_is_as_before() -> None:
    """`language` is an input of the stages' manifests, so its dump must not change."""
    assert loaded("language={}").language.model_dump() == {"code": "th", "name": "Thai", "scripts": []}
    assert loaded("language={}") == loaded("language={code: th}") == loaded()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{code: xx}", "language: CLDR has no English name for the code 'xx'; correct it, or give language.name"),
        ("{code: th, name: ''}", "or give language.name"),
        ("{code: 5}", "language.code: Input should be a valid string (it is 5)"),  # and nothing about the name
        ("{code: no}", "language: code cannot be false (yes, no, on and off mean that in YAML)"),
        ("th", "language: Input should be a valid dictionary"),
    ],
)
def test_a_language_without_a_name(given: str, said: str) -> None:
    message = refused(f"language={given}")
    assert said in message and ";" not in message.replace("; correct it", "")
    if given.startswith("{"):  # the name is not asked for where the code is wrong
        refused(f"language={given}", "title=${language.name}")


def test_babel_is_read_only_for_a_name_that_is_not_given() -> None:
    code = "import sys; from pathlib import Path; from transllm_jax.config import load_config; "
    code += "load_config(Path('configs/demo.yaml')); print('babel' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"
