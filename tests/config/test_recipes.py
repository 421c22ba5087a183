"""The configs of the project: each path that one names is here, or it is said where it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from tiny_recipes import FILES
from world_text import TARGETS, TEXT, command, printed_by_make, write_world

from transllm_jax.config import Config, Source, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = [ROOT / "docs" / name for name in ("data-thai.md", "data-languages.md")]


def paths_of(config: Config) -> set[str]:
    """The files, globs and directories that a config names."""

    def found(tree: Any, key: str = "") -> Iterator[str]:
        if isinstance(tree, dict):
            for name, value in tree.items():
                yield from found(value, name)
        elif isinstance(tree, list | tuple):
            for value in tree:
                yield from found(value, key)
        elif (
            key in ("path", "target_path", "file", "pairs", "instructions", "answers", "shape", "tokenizer", "adapter")
            and tree
        ):
            yield tree

    paths = set(found(config.model_dump(exclude={"workdir"})))
    return paths if re.match(r"pypi:|[\w-]+/[\w.-]+$", config.model.source) else paths | {config.model.source}


def in_repository(path: str) -> bool:
    return bool(list(ROOT.glob(path))) and not path.startswith(("data/", "runs/"))


@pytest.fixture(scope="module")
def world_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_path_of_a_config_is_here_or_said_where_it_comes_from(path: Path, world_text: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines[: lines.index(next(one for one in lines if not one.startswith("#")))])
    page = PAGES[0].read_text(encoding="utf-8")
    for named in paths_of(load_config(path)):
        assert not Path(named).is_absolute() and ".." not in Path(named).parts, named
        if in_repository(named):
            continue
        if named.startswith(f"{TEXT}/"):
            language = Path(named).parts[2]
            assert command(language) in " ".join(header.replace("#", "").replace("\\", "").split()), named
            assert (world_text / Path(named).relative_to(TEXT)).is_file(), f"make.py does not write {named}"
            continue
        # The header names the directory, or the file; the page's commands and its entries of configs name the files.
        places = [named, *(f"{parent}/" for parent in Path(named).parents if str(parent) not in (".", "data"))]
        assert any(f"#   {place} " in header for place in (*places, f"{named}/")), f"{named} is not in the header"
        if named.startswith("data/"):
            assert named in page, f"{named} is not in {PAGES[0].name}"
            assert any(fnmatch(file, named) for file in FILES), f"{named} matches no file of the data sets"


@pytest.mark.parametrize("language", TARGETS)
def test_a_target_writes_the_text_and_then_runs_the_config(language: str) -> None:
    lines = printed_by_make(TARGETS[language], language).splitlines()
    (place,) = (place for place, line in enumerate(lines) if line.startswith("./bin/python examples/world/make.py"))
    config = f"configs/{TARGETS[language]}.yaml"
    given = "" if TARGETS[language] == "demo" else f" language.code={language}"
    assert lines[place + 1] == f"./bin/transllm run {config}{given}"
    assert command(language).startswith(f"python examples/world/make.py {language} {TEXT}/{language} ")
    # Both targets write the same text of a language: a run that was stopped finds what it read.
    assert command(language, "world") == command(language)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_entries_of_configs_on_a_page_are_ones(page: Path) -> None:
    found = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    assert found
    for text in found:
        entry = yaml.safe_load(text)
        if set(entry) == {"sources"}:
            TypeAdapter(list[Source]).validate_python(entry["sources"])
        else:
            Config.model_validate({**demo, **{key: {**demo[key], **value} for key, value in entry.items()}})
