"""The import graph: one direction, one door to each library that moves fast, and no module larger than one idea."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "transllm_jax"
# The folder conversion/ is the package transllm_jax.conversion, through a symbolic link, which rglob does not follow.
FOLDERS = {"transllm_jax": PACKAGE, "conversion": f"{PACKAGE}.conversion"}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {module_of(path): path for path in FILES}


def imports_of(source: str, module: str = "", *, allow: bool = False) -> set[str]:
    """The full names of what a module's source imports, wherever in it: `from a import b` is a.b, whatever b is.

    allow: imports by a computed name are passed over; else they are an error.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute, so that this test sees them"
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif (
            not allow
            and isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("__import__", "importlib.import_module")
        ):
            raise AssertionError(f"{module}:{node.lineno} imports by a name that this test cannot see")
    return found


IMPORTS = {module: imports_of(path.read_text(encoding="utf-8"), module) for module, path in MODULES.items()}


def within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def importing(packages: Iterable[str]) -> set[str]:
    """The modules that import one of these packages or something in them."""
    return {module for module, names in IMPORTS.items() if any(within(name, packages) for name in names)}


def test_the_walk_sees_the_package() -> None:
    assert len(MODULES) > 50 and "transllm_jax.stages.recover" in MODULES and "transllm_jax" in MODULES
    assert "transllm_jax.errors.UserError" in IMPORTS["transllm_jax.config.load"]
    assert "transllm_jax.stages.pipeline.run_pipeline" in IMPORTS["transllm_jax.cli.main"]  # inside a function
    assert imports_of("import a.b\nfrom c import d as e\ndef f():\n    import g") == {"a.b", "c.d", "g"}


# What each part of the package may import of the package, itself aside: cli -> commands -> stages -> the rest.
BOTTOM = {"errors", "hub_name", "choices", "words", "disk", "new_directory"}
TOOLS = {"model", "data", "tokenizer"}
COMMON = BOTTOM | {"config", "progress", "hosts"}
ALLOWED = {
    "errors": set(),
    "hub_name": set(),
    "choices": set(),
    "words": set(),
    "disk": {"errors"},
    "new_directory": {"errors", "disk"},
    "progress": BOTTOM,
    "config": BOTTOM | {"tokenizer"},
    "model": BOTTOM,
    "tokenizer": BOTTOM,
    "data": BOTTOM | {"tokenizer"},
    "storage": BOTTOM,
    "hosts": BOTTOM | {"storage"},
    "training": COMMON | TOOLS,
    "generation": COMMON | TOOLS,
    "evaluation": COMMON | TOOLS | {"training", "generation"},
    "conversion": BOTTOM | {"model", "tokenizer"},
    "stages": COMMON | TOOLS | {"training", "generation", "evaluation", "conversion"},
    "ablation": COMMON | TOOLS | {"stages", "training", "evaluation", "conversion"},
    "preflight": COMMON | TOOLS | {"stages", "training", "generation", "conversion"},
    "serving": COMMON | TOOLS | {"generation"},
    "commands": COMMON
    | TOOLS
    | {"ablation", "serving", "stages", "training", "generation", "evaluation", "conversion", "storage"},
    # The doors: they parse, call, and say how it ended.
    "cli": COMMON | {"commands", "serving", "stages", "preflight", "generation", "evaluation", "conversion", "storage"},
    # `from transllm_jax import __version__`
    "": set(),
}


def part_of(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def test_every_part_has_its_place() -> None:
    parts = {part_of(module) for module in MODULES}
    assert parts == ALLOWED.keys(), "a new part of the package belongs into ALLOWED"


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_run_one_way(part: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if part_of(module) == part
        for name in IMPORTS[module]
        if within(name, [PACKAGE])
        and name != "transllm_jax.__version__"
        and part_of(name) not in ALLOWED[part] | {part}
    ]
    assert not wrong


def test_conversion_has_one_name() -> None:
    """As a package of its own it would be in everybody's site-packages, and twice in memory."""
    wrong = [
        str(path.relative_to(ROOT))
        for folder in (*FOLDERS, "tests", "bench", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if any(within(name, ["conversion"]) for name in imports_of(path.read_text(encoding="utf-8"), allow=True))
    ]
    assert not wrong


def test_a_stage_never_imports_another_stage() -> None:
    shared = tuple(
        f"transllm_jax.stages.{name}"
        for name in (
            *("alignment", "bad_rows", "chains", "endpoint", "endpoint_check", "endpoint_rows", "filters"),
            *("generated", "initial_rows", "inputs", "manifest", "models", "new_rows", "points", "recorded"),
            *("run", "token_rows", "training", "translations"),
        )
    )
    stages = [module for module in MODULES if within(module, ["transllm_jax.stages"])]
    # These put them in their order.
    stages = [
        module for module in stages if module not in ("transllm_jax.stages.steps", "transllm_jax.stages.pipeline")
    ]
    wrong = [
        f"{module} imports {name}"
        for module in stages
        for name in IMPORTS[module]
        if within(name, ["transllm_jax.stages"]) and not within(name, shared)
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = {
        module: {other for name in names for other in (name, name.rpartition(".")[0]) if other in MODULES} - {module}
        for module, names in IMPORTS.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in edges[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


# Libraries that move fast, or that cost much to import: where each may be imported.
DOORS = {
    "orbax": {"transllm_jax.training.checkpoint", "transllm_jax.training.arrays"},
    "grain": {"transllm_jax.data.rows.batches"},
    "array_record": {"transllm_jax.data.rows.token_cache"},
    "optax": {"transllm_jax.training.optimizer", "transllm_jax.training.step"},
    "tokenizers": {
        "transllm_jax.tokenizer",
        "transllm_jax.conversion.gguf.tokenizer",
        "transllm_jax.conversion.hf.sentencepiece_tokenizer",
    },
    "safetensors": {"transllm_jax.conversion.hf.safetensors_io"},
    "tensorstore": {"transllm_jax.conversion.store"},
    "gguf": {
        "transllm_jax.conversion.gguf.header",
        "transllm_jax.conversion.gguf.weights",
        "transllm_jax.conversion.gguf.write",
    },
    "huggingface_hub": {"transllm_jax.conversion.fetch"},
    "fsspec": {"transllm_jax.storage"},
    "etils": {"transllm_jax.storage"},
    "flax": {"transllm_jax.model"},
    "jax": {
        "transllm_jax.model",
        "transllm_jax.hosts",
        "transllm_jax.preflight",
        "transllm_jax.training",
        "transllm_jax.generation",
        "transllm_jax.evaluation.likelihood",
        "transllm_jax.stages.new_rows",
        "transllm_jax.stages.models",
        "transllm_jax.stages.training",
        "transllm_jax.ablation.work",
        "transllm_jax.commands.open_chat",
        "transllm_jax.commands.dry_run",
        "transllm_jax.cli.main",
        "transllm_jax.cli.devices",
    },
    "sacrebleu": {
        "transllm_jax.evaluation.point",
        "transllm_jax.evaluation.translation_scores",
        "transllm_jax.generation.checks",
    },
    "matplotlib": {"transllm_jax.evaluation.page.plots", "transllm_jax.ablation.plot"},
    "pydantic": {"transllm_jax.config"},
    "yaml": {"transllm_jax.config"},
    "typer": {
        "transllm_jax.cli.main",
        "transllm_jax.cli.options",
        "transllm_jax.cli.ablate",
        "transllm_jax.cli.convert",
        "transllm_jax.cli.init",
        "transllm_jax.cli.evaluate",
        "transllm_jax.cli.sheets",
        "transllm_jax.cli.generate",
        "transllm_jax.cli.serve",
        "transllm_jax.cli.preflight",
        "transllm_jax.cli.tokenizer",
        "transllm_jax.cli.stopping",
    },
    "babel": {"transllm_jax.tokenizer.scripts"},
    "fontTools": {"transllm_jax.tokenizer.scripts"},
    "httpx2": {"transllm_jax.generation.endpoint"},
    "tenacity": {"transllm_jax.generation.endpoint"},
    "starlette": {"transllm_jax.serving", "transllm_jax.cli.serve"},
    "uvicorn": {"transllm_jax.commands.serve", "transllm_jax.cli.serve"},
    "thot": {"transllm_jax.stages.alignment"},
    "icu4py": {"transllm_jax.tokenizer.growing.icu_words", "transllm_jax.commands.lines"},
    "regex": {"transllm_jax.commands.lines"},
    "torch": {"transllm_jax.generation.seq2seq"},
    "transformers": {"transllm_jax.generation.seq2seq"},
    "datasets": {"transllm_jax.data.read.hub"},
    "tensorflow_datasets": {"transllm_jax.data.read.catalog"},
    "pyarrow": {"transllm_jax.data.read.parquet"},
    "zstandard": {"transllm_jax.data.read.files"},
    "tensorboardX": {"transllm_jax.training.record.board"},
    "sentencepiece": {"transllm_jax.tokenizer.sentencepiece_model"},
    "openpyxl": {"transllm_jax.evaluation.people.files"},
    "krippendorff": {"transllm_jax.evaluation.people.agreement"},
    "scipy": {"transllm_jax.evaluation.statistics"},
    "peft": set(),
    "pickle": set(),
}


@pytest.mark.parametrize("library", DOORS)
def test_one_door(library: str) -> None:
    wrong = {module for module in importing([library]) if not within(module, DOORS[library])}
    assert not wrong
    # A door that nobody uses is to be taken out of the table.
    assert all(any(within(module, [door]) for module in importing([library])) for door in DOORS[library])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_is_one_idea(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 500


def test_every_module_has_a_docstring() -> None:
    missing = [
        module
        for module, path in MODULES.items()
        if (source := path.read_text(encoding="utf-8")).strip() and not ast.get_docstring(ast.parse(source))
    ]
    assert not missing


HEAVY = ("jax", "flax", "optax", "orbax", "grain", "numpy", "transformers", "torch", "tokenizers", "matplotlib")


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded after `code`."""
    code += f"\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_help_is_fast() -> None:
    assert loaded_by("import transllm_jax.cli.main") == set()
    assert loaded_by("import transllm_jax.config, transllm_jax.stages.manifest") == set()


def test_no_stage_loads_transformers_or_torch() -> None:
    loaded = loaded_by("import transllm_jax.stages.pipeline, transllm_jax.commands.chat, transllm_jax.conversion.fetch")
    assert "jax" in loaded and not loaded & {"transformers", "torch", "matplotlib"}


def test_the_modules_that_others_import_from_are_documented_by_name() -> None:
    """No underscore name crosses a module's border."""
    wrong = defaultdict(list)
    for module, names in IMPORTS.items():
        for name in names:
            last = name.rpartition(".")[2]
            if within(name, [PACKAGE]) and last.startswith("_") and last != "__version__":
                wrong[module].append(name)
    assert not wrong
