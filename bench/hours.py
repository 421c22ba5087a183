"""Memory, speed and hours of stage `pretrain` for models of 1B to 70B, on slices of TPUs and on GPUs: the tables of
docs/speed.md.

    python bench/hours.py [--compile] [--minutes 40] [--results bench/hours.json]

Runs on a CPU. Every model trains as in configs/llama2_7b_thai.yaml: LoRA of rank 64 on all projections, 21,008 new
rows, bfloat16, 1,024 rows of 512 tokens a step; the mesh is `fsdp` over all devices.

TPUs: `--compile` compiles the real step of each pair in WAYS with `transllm preflight` (libtpu, no TPU; one to three
minutes each on two cores) and writes what it finds into the results after each program, so that the command can be
stopped and started again. `--minutes` bounds the time in which a compilation may begin. Where a pair has several ways,
they are tried in order until one fits.

GPUs: calculated, not measured, by `gpu_memory` and `gpu_hours`, from exact counts of the arrays and from the
activations of the compiled TPU programs. Disk: from exact counts and the format of the token cache. Prints all tables
as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transllm_jax.choices import Remat

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "llama2_7b_thai.yaml"
BATCH, LENGTH = 1024, 512
GIB = 2**30
# Bytes of each trained value: itself, its gradient and two moments, in float32.
TRAINED_BYTES = 16
MODELS = {
    "llama3_2_1b": "Llama-3.2-1B",
    "llama3_2_3b": "Llama-3.2-3B",
    "llama2_7b": "LLaMA-2-7B",
    "llama3_1_8b": "Llama-3.1-8B",
    "qwen3_8b": "Qwen3-8B",
    "llama2_13b": "LLaMA-2-13B",
    "llama2_70b": "LLaMA-2-70B",
}


class Way(NamedTuple):
    """How a step is computed: `rows` of LENGTH tokens at once on a device, and what is computed again."""

    model: str
    slice: str
    remat: Remat
    rows: int

    @property
    def key(self) -> str:
        return f"{self.model} {self.slice} {self.remat} {self.rows}"


# The most useful first.
WAYS = [
    Way("llama3_1_8b", "v5e:4x4", "projections", 4),
    Way("llama3_2_1b", "v5e:1x1", "projections", 8),
    Way("llama3_1_8b", "v6e:1x1", "queries", 4),
    Way("llama3_1_8b", "v6e:1x1", "attention", 4),
    Way("llama3_2_3b", "v5e:1x1", "projections", 4),
    Way("llama3_2_3b", "v5e:1x1", "full", 4),
    Way("llama2_70b", "v5e:8x8", "full", 4),
    Way("llama3_1_8b", "v5e:2x2", "attention", 4),
    Way("llama2_13b", "v5e:4x4", "queries", 4),
    Way("llama2_7b", "v5e:4x4", "queries", 8),
    Way("llama3_1_8b", "v5p:2x2x1", "projections", 32),
    Way("llama2_70b", "v5p:2x2x4", "projections", 8),
    Way("llama3_1_8b", "v5e:2x4", "projections", 4),
    Way("llama3_1_8b", "v5e:2x4", "queries", 4),
    Way("llama3_1_8b", "v6e:2x2", "projections", 8),
    Way("qwen3_8b", "v5e:4x4", "projections", 4),
    Way("llama2_13b", "v5p:2x2x1", "projections", 16),
    Way("llama3_2_3b", "v5e:2x2", "projections", 8),
    Way("llama3_2_1b", "v5e:2x2", "projections", 16),
    Way("llama2_7b", "v5e:2x2", "attention", 4),
    Way("llama2_13b", "v5e:8x8", "projections", 4),
    Way("llama2_7b", "v6e:2x2", "queries", 8),
    Way("llama3_1_8b", "v6e:4x4", "projections", 8),
]


def compile_all(results: Path, minutes: float) -> None:
    """Compile what the results lack, and write each program's numbers into them."""
    found = read(results)
    began = time.monotonic()
    for way in WAYS:
        fits = {(entry["model"], entry["topology"]) for entry in found.values() if entry["fits"]}
        if way.key in found or (way.model, way.slice) in fits:
            continue
        if time.monotonic() - began > 60 * minutes:
            print(f"{minutes:g} minutes are over; start it again to go on", file=sys.stderr)
            return
        print(f"compiling {way.key}", file=sys.stderr, flush=True)
        found[way.key] = {"model": way.model, "rows": way.rows, "remat": way.remat, **compiled(way)}
        partial = results.with_name(results.name + ".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, results)
        entry = found[way.key]
        print(f"  {entry['needed_bytes'] / GIB:.2f} GiB, fits: {entry['fits']}", file=sys.stderr, flush=True)


def compiled(way: Way) -> dict[str, Any]:
    """What preflight finds for a way."""
    from transllm_jax.model.mesh import make_layout
    from transllm_jax.preflight.measure import measure
    from transllm_jax.preflight.program.chips import parse_topology, topology_devices
    from transllm_jax.preflight.programs import training_program
    from transllm_jax.preflight.show import as_json

    topology, devices = parse_topology(way.slice), topology_devices(way.slice)
    model = shapes(way.model)
    layout = make_layout((1, topology.devices, 1), model.config.attention, devices)
    program = training_program(
        model,
        "pretrain",
        layout,
        remat=way.remat,
        batch_size=BATCH,
        accumulate=BATCH // (way.rows * topology.devices),
        length=LENGTH,
    )
    told = as_json(measure(program, topology))
    return {**told, "chips": topology.chips, "hbm_bytes_usable": topology.chip.usable_hbm_bytes}


def shapes(name: str, *overrides: str) -> Any:
    """The ModelShapes of a model of configs/models, trained as the recipe says but for the overrides."""
    from transllm_jax.config import load_config
    from transllm_jax.preflight.programs import model_shapes

    config = load_config(RECIPE, [f"model.shape={ROOT}/configs/models/{name}.json", *overrides])
    return model_shapes(config, Path("no work directory"))


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The results by `Way.key`; empty if there are none yet."""
    found: dict[str, dict[str, Any]] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    return found


def tpu_table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The rows of Markdown for the pairs that fit, models and slices in order of size."""
    yield (
        "| model | slice (chips) | remat, rows at once on a chip, parts | memory a chip | tokens/s/chip "
        "| 1 billion tokens: hours | chip-hours | 11 billion: days | chip-hours |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    models = list(MODELS)

    def order(entry: dict[str, Any]) -> tuple[int, str, int]:
        return models.index(entry["model"]), entry["topology"].partition(":")[0], entry["chips"]

    for entry in sorted((entry for entry in found.values() if entry["fits"]), key=order):
        chips = entry["chips"]
        rates = [entry["tokens_per_step"] / entry[key] for key in ("step_seconds", "step_seconds_ordinary")]
        hours = [1e9 / rate / 3600 for rate in rates]
        parts = BATCH // (entry["rows"] * chips)
        cells = (
            MODELS[entry["model"]],
            f"{entry['topology']} ({chips})",
            f"{entry['remat']}, {entry['rows']} x {LENGTH}, {parts}",
            f"{entry['needed_bytes'] / GIB:.1f} of {entry['hbm_bytes_usable'] / GIB:.2f} GiB",
            f"{rates[1] / chips:,.0f} to {rates[0] / chips:,.0f}",
            span(hours),
            span([chips * hour for hour in hours]),
            span([11 * hour / 24 for hour in hours]),
            span([11 * chips * hour for hour in hours]),
        )
        yield f"| {' | '.join(cells)} |"


class Gpu(NamedTuple):
    """A GPU by its data sheet: GiB, dense bfloat16 FLOP/s with sums in float32, bytes/s to others in one direction."""

    name: str
    memory: float
    peak: float
    link: float


# A share of the memory that arrays may take: the rest is for CUDA, the libraries' workspaces and gaps between arrays.
USABLE = 0.92
# Shares of the peak: of an ordinary run, and around it.
UTILISATION = (0.5, 0.4, 0.3)
# PCIe 4.0 x16 moves 32 GB/s; cards without NVLink send through the host's memory, which halves it.
GPUS = [
    Gpu("RTX 4090", 24, 165e12, 16e9),
    Gpu("A100", 40, 312e12, 300e9),
    Gpu("A100", 80, 312e12, 300e9),
    Gpu("H100", 80, 989e12, 450e9),
]


@dataclass(frozen=True)
class Counts:
    """A model's exact bytes of frozen weights, number of trained values, and FLOPs a token.

    gathered: bytes of two layers and of the vocabulary's tables, which `fsdp` gathers.
    """

    frozen: int
    trained: int
    flops: float
    gathered: int = 0


def counts(name: str, *overrides: str) -> Counts:
    """The counts of a model of configs/models."""
    from transllm_jax.model.layout import SINGLE
    from transllm_jax.model.parameters import count_parameters
    from transllm_jax.training.flops import train_flops_per_token

    model = shapes(name, *overrides)
    split = model.split(SINGLE)
    frozen = sum(leaf.size * leaf.dtype.itemsize for leaf in split.frozen.values())
    flops = train_flops_per_token(model.shape, model.lora, model.new_rows, LENGTH)
    tables = sum(leaf.size * leaf.dtype.itemsize for path, leaf in split.frozen.items() if "vocabulary" in path)
    gathered = tables + 2 * (frozen - tables) // model.shape.num_hidden_layers
    return Counts(frozen, count_parameters(split.trainable), flops, gathered)


def gpu_memory(model: Counts, devices: int, activations: float) -> float:
    """Bytes on each of `devices` GPUs, all arrays divided over them but the activations."""
    return (model.frozen + TRAINED_BYTES * model.trained) / devices + activations


def activations(entry: dict[str, Any], compiled: Counts, times: float, devices: int) -> float:
    """Bytes of a compiled program's temporaries but the gradients, with `times` its rows: an upper bound.

    What is kept for the backward pass grows with the rows. Nothing is taken off the rest for fewer rows, since it holds
    gathered weights and the vocabulary's tables, too. A program of one chip has none; they are added for several GPUs.
    """
    other = entry["temporary_bytes"] - entry["kept_bytes"] - 4 * compiled.trained / entry["chips"]
    other += compiled.gathered if devices > 1 and entry["chips"] == 1 else 0
    return float(times * entry["kept_bytes"] + max(1, times) * other)


def gpu_hours(model: Counts, gpu: Gpu, devices: int, executed: float, rows: int, utilisation: float) -> float:
    """Hours for a billion tokens: the longer of computing and of gathering the frozen weights twice for each part."""
    tokens = rows * LENGTH * devices
    computing = tokens * model.flops * executed / (devices * gpu.peak * utilisation)
    gathering = 2 * model.frozen * (devices - 1) / devices / gpu.link
    return 1e9 / tokens * max(computing, gathering) / 3600


# For a small GPU: fewer trained values.
SMALLER = "rank 16, 4,000 new tokens", ("lora.rank=16", "lora.alpha=32", "vocabulary.size=4000")
# Times the rows of a compiled way that are tried.
TIMES = (0.25, 0.5, 1, 2, 4)


def gpu_table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The rows of Markdown for GPUs: of the compiled ways that fit, the one with the fewest hours."""
    yield (
        "| model | GPU | on one: remat, rows at once | memory | hours | on eight: remat, rows at once on each "
        "| memory of each | hours | GPU-hours |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, title in MODELS.items():
        ways = [entry for entry in found.values() if entry["model"] == name and entry["executed_ratio"]]
        if not ways:
            continue
        whole = counts(name)
        # GPUs that differ in their memory alone may have equal rows.
        rows: dict[tuple[str, ...], list[str]] = {}
        for gpu in GPUS:
            one, eight = (fastest(whole, whole, ways, gpu, devices) for devices in (1, 8))
            rows.setdefault((title, gpu.name, *gpu_cells(one)[:3], *gpu_cells(eight)), []).append(f"{gpu.memory:g}")
            if not one.fits and whole.frozen < USABLE * gpu.memory * GIB:
                less = fastest(counts(name, *SMALLER[1]), whole, ways, gpu, 1)
                rows[f"{title}, {SMALLER[0]}", gpu.name, *gpu_cells(less)[:3], "", "", "", ""] = [f"{gpu.memory:g}"]
        for (about, gpu_name, *cells), sizes in rows.items():
            label = f"{gpu_name}, {' or '.join(sizes)} GiB"
            yield f"| {' | '.join((about, label, *cells))} |"


class OnGpus(NamedTuple):
    """A way on GPUs: bytes on each, and hours for a billion tokens at each share of UTILISATION."""

    fits: bool
    hours: list[float]
    memory: float
    devices: int
    rows: int
    remat: str
    times: float


def fastest(model: Counts, compiled: Counts, ways: list[dict[str, Any]], gpu: Gpu, devices: int) -> OnGpus:
    """The fastest way that fits, with rows as compiled if others are no faster; if none fits, the smallest.

    compiled: the counts of the model in `ways`, which may train more than `model`.
    """
    tried = []
    for entry in ways:
        for times in TIMES:
            memory = gpu_memory(model, devices, activations(entry, compiled, times, devices))
            rows, executed = round(times * entry["rows"]), entry["executed_ratio"]
            hours = [gpu_hours(model, gpu, devices, executed, rows, share) for share in UTILISATION]
            fits = memory <= USABLE * gpu.memory * GIB
            tried.append(OnGpus(fits, hours, memory, devices, rows, entry["remat"], times))

    def order(way: OnGpus) -> tuple[float, ...]:
        return (0, way.hours[1], abs(way.times - 1), way.memory) if way.fits else (1, way.memory)

    return min(tried, key=order)


def gpu_cells(way: OnGpus) -> tuple[str, str, str, str]:
    """What the table says of a way."""
    memory, about = f"{way.memory / GIB:.1f} GiB", f"{way.remat}, {way.rows} x {LENGTH}"
    if not way.fits:
        return about, f"{memory}: **does not fit**", "", ""
    ends, middle = span([way.hours[0], way.hours[2]]), number(way.hours[1])
    hours = f"{middle}, bound by links" if ends == middle else f"{middle} ({ends})"
    return about, memory, hours, number(way.devices * way.hours[1])


def disk_table() -> Iterator[str]:
    """The rows of Markdown for disk, in GB of 10^9 bytes."""
    yield (
        "| model | trained values | `base/`, bfloat16 | a checkpoint | `trainable/` of a stage | `export/`, bfloat16 "
        "| together | tokens, a billion |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, title in MODELS.items():
        model, given = counts(name), shapes(name)
        export = model.frozen + 2 * given.new_rows * given.shape.hidden_size * (2 - given.shape.tie_word_embeddings)
        # Ids are written as 16 bits if all fit, and a bit says whether a token is trained on.
        tokens = (2 if given.shape.vocab_size + given.new_rows <= 1 << 16 else 4) + 1 / 8
        checkpoint, trainable = 12 * model.trained, 4 * model.trained
        # Each of the three training stages keeps its two newest checkpoints; while one is written there is one more.
        together = model.frozen + 7 * checkpoint + 3 * trainable + export
        sizes = (model.frozen, checkpoint, trainable, export, together, tokens * 1e9)
        cells = [title, f"{model.trained / 1e6:,.0f} million", *(f"{size / 1e9:.1f} GB" for size in sizes)]
        yield f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Two significant digits below 100, none after the point above."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def span(values: list[float]) -> str:
    """`A to B`, or one number if both read the same."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile what the results lack")
    parser.add_argument("--minutes", type=float, default=40, help="in which a compilation may begin")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "hours.json")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.compile:
        compile_all(options.results, options.minutes)
    found = read(options.results)
    for table in (tpu_table(found), gpu_table(found), disk_table()):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
