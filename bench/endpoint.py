"""Whether a server serves a model as this package's own engine runs it: the check of `recover.teacher`, by itself.

python bench/endpoint.py RUN/base http://localhost:8000/v1 NAME

The model is a Hugging Face directory, such as the `base` of a run. Prints how many of the instructions have the same
number of prompt tokens, and how many answers begin with the same 8 tokens; or what differs, and why it may.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from transllm_jax.config import load_config
from transllm_jax.errors import UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages.endpoint_check import check_teacher
from transllm_jax.stages.run import Run

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("endpoint", help="the server's URL, up to /chat/completions")
    parser.add_argument("name", help="the model's name, as the server knows it")
    parser.add_argument("--instructions", type=Path, default=ROOT / "examples/thai/instructions.train.jsonl")
    parser.add_argument("--key", help="the environment variable with the server's key")
    parser.add_argument("--body", help="more keys of each request, as JSON")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our own engine")
    options = parser.parse_args()
    with options.instructions.open(encoding="utf-8") as lines:
        instructions = [json.loads(line)["instruction"] for line in lines]
    teacher = {"endpoint": options.endpoint, "model": options.name, "key": options.key}
    teacher["body"] = json.loads(options.body or "{}")
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory)
        (workdir / "base").symlink_to(options.model.resolve())
        given = [f"recover.teacher={json.dumps(teacher)}", f"model.dtype={options.dtype}", "recover.max_new_tokens=64"]
        config = load_config(ROOT / "configs" / "demo.yaml", given)
        assert config.recover.teacher is not None
        started = time.monotonic()
        try:
            run = Run(config, workdir, Progress(), Interrupt())
            check_teacher(run, workdir, instructions, config.recover.teacher, "recover.teacher", [])
        except UserError as error:
            print(f"  {error}")
        print(f"  {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
