"""The wheel, installed where nothing of the checkout can be imported, and what people see of it on PyPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from email.message import Message
from email.parser import Parser
from importlib.metadata import metadata, packages_distributions
from pathlib import Path

import pytest
from conftest import EXAMPLES
from test_imports import imports_of

from transllm_jax import __version__

ROOT = Path(__file__).parents[1]
# What the build reads. It is copied, because a build leaves files behind, of which a later one would take old modules.
READ = ("transllm_jax", "conversion", "setup.cfg", "pyproject.toml", "MANIFEST.in", "PYPI.md", "README.md", "LICENSE")
# So that a run to the first stage takes seconds.
SMALL = (
    "vocabulary.size=200",
    *(f"evaluation.max_{name}=2" for name in ("documents", "pairs", "chats")),
    *("evaluation.max_new_tokens=4", "evaluation.max_chain_tokens=8", "evaluation.batch_size=2"),
)


def build(kind: str, source: Path, out: Path) -> Path:
    """Builds the wheel or the sdist of a directory with the setuptools of this environment."""
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, env=alone())
    return next(out.iterdir())


def alone() -> dict[str, str]:
    """An environment in which no variable names the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist of the checkout."""
    here = tmp_path_factory.mktemp("built")
    source = here / "source"
    source.mkdir()
    for name in READ:
        if (ROOT / name).is_dir():
            # The package transllm_jax.conversion is a link to the folder.
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copyfile(ROOT / name, source / name)
    return build("wheel", source, here / "wheel"), build("sdist", source, here / "sdist")


@pytest.fixture(scope="module")
def transllm(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a fresh virtual environment with the wheel, and with what this environment has besides."""
    place = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    pip = (sys.executable, "-m", "pip", "--python", place / "bin" / "python", "--disable-pip-version-check")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", built[0]], check=True, env=alone())
    # In a directory that a .pth file adds, .pth files are not read: the checkout's, of its editable installation.
    packages = Path(pytest.__file__).parents[1]
    next(place.glob("lib/python*/site-packages")).joinpath("others.pth").write_text(f"{packages}\n")
    return place / "bin" / "transllm"


def test_what_is_in_the_wheel(built: tuple[Path, Path]) -> None:
    names = contents(built[0]).keys()
    assert {name.split("/")[0] for name in names} == {"transllm_jax", f"transllm_jax-{__version__}.dist-info"}
    folders = {"transllm_jax": ROOT / "transllm_jax", "transllm_jax/conversion": ROOT / "conversion"}
    modules = {f"{top}/{path.relative_to(at)}" for top, at in folders.items() for path in at.rglob("*.py")}
    templates = {
        f"transllm_jax/{path.relative_to(ROOT / 'transllm_jax')}" for path in ROOT.glob("transllm_jax/**/*.j2")
    }
    assert "transllm_jax/conversion/hf/export.py" in modules and len(templates) > 1
    wanted = modules | templates | {"transllm_jax/py.typed", "transllm_jax/serving/page.html"}
    assert {name for name in names if "dist-info" not in name} == wanted


def test_the_sdist_gives_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    assert (source / "LICENSE").is_file()
    assert contents(build("wheel", source, tmp_path / "wheel")) == contents(wheel)


def test_the_page_on_pypi(built: tuple[Path, Path]) -> None:
    """It is the only file of the project there: links and pictures are addresses, and the description is not cut."""
    page: Message = Parser().parsestr(contents(built[0])[f"transllm_jax-{__version__}.dist-info/METADATA"].decode())
    assert page["Name"] == "transllm-jax" and page["Version"] == __version__
    assert page["Description-Content-Type"] == "text/markdown" and page["Keywords"] and page["Author"]
    text = str(page.get_payload())
    assert text.strip() == (ROOT / "PYPI.md").read_text(encoding="utf-8").strip()
    targets = re.findall(r"\]\(([^)]*)\)|(?:src|href)=[\"']([^\"']*)", text)
    assert targets and all("".join(target).startswith("https://") for target in targets)
    # What the page tells people to install is there.
    extras = set(page.get_all("Provides-Extra") or [])
    assert (
        set(re.findall(r"transllm-jax\[(\w+)\]", text))
        == {"tpu", "gcs", "align", "icu", "seq2seq", "data", "endpoint", "serve", "sheets"}
        <= extras
    )


@pytest.mark.slow
def test_the_commands_work_outside_of_the_checkout(transllm: Path, tiny_model: Path, tmp_path: Path) -> None:
    def run(*command: object) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=alone(), capture_output=True, text=True, timeout=300
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return done.stdout

    python = transllm.with_name("python")
    found = run(
        python, "-c", "import transllm_jax, transllm_jax.conversion as c; print(transllm_jax.__file__, c.__file__)"
    )
    assert all(Path(path).is_relative_to(transllm.parents[1]) for path in found.split())
    assert run(python, "-c", "import importlib.util as u; print(u.find_spec('conversion'))") == "None\n"
    assert run(transllm, "--version") == f"transllm-jax {__version__}\n"
    assert "100%" in run(transllm, "tokenizer", "report", tiny_model, EXAMPLES / "text.heldout.txt")
    run(transllm, "convert", "from-hf", tiny_model, "ours")
    files = {"text": "text.train.txt", "pairs": "pairs.train.tsv", "instructions": "instructions.train.jsonl"}
    given = [part for name, file in files.items() for part in (f"--{name}", EXAMPLES / file)]
    run(transllm, "init", "mine.yaml", "--model", "ours", "--language", "th", *given)
    run(transllm, "run", "mine.yaml", *SMALL, "--until", "vocabulary")
    assert (tmp_path / "runs" / "mine" / "vocabulary" / "report.json").is_file()


def test_what_is_imported_is_required(built: tuple[Path, Path]) -> None:
    """By the package itself, so that it does not depend on what other packages happen to bring; and the reverse."""
    files = contents(built[0])
    page = Parser().parsestr(files[f"transllm_jax-{__version__}.dist-info/METADATA"].decode())
    required: dict[str, set[str]] = defaultdict(set)
    for line in page.get_all("Requires-Dist") or []:
        extra = (re.findall(r"extra == .(\w+)", line) or ["core"])[0]
        required[extra].add(canonical(re.split(r"[^\w.-]", line)[0]))
    # A name of a package such as google belongs to several projects.
    projects = {name: {canonical(project) for project in found} for name, found in packages_distributions().items()}
    imported = {
        name.partition(".")[0]
        for file, content in files.items()
        if file.endswith(".py")
        for name in imports_of(content.decode(), file)
    }
    outside = imported - set(sys.stdlib_module_names) - {"transllm_jax"}
    known = set().union(
        *(required[extra] for extra in ("core", "data", "icu", "align", "seq2seq", "endpoint", "serve", "sheets"))
    )
    assert not {name for name in outside if not projects.get(name, set()) & known}
    used = {project for name in outside for project in projects.get(name, ())}
    assert required["core"] <= used


def canonical(project: str) -> str:
    """A project's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", project).lower()


def test_this_environment_has_the_metadata_of_the_checkout() -> None:
    """A run compares versions by it."""
    assert metadata("transllm-jax")["Version"] == __version__
