"""The commands `transllm convert ...`: they parse arguments and call, nothing else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from transllm_jax.cli.devices import prepare_jax
from transllm_jax.cli.stopping import working

app = typer.Typer(
    help="Convert checkpoints, bit for bit: Hugging Face, GGUF, PEFT.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Force = Annotated[bool, typer.Option("--force", help="Replace the destination if it exists.")]
Stage = Annotated[
    str | None, typer.Option(help="Of a run: base, vocabulary, pretrain, translate or transfer (newest).")
]
Base = Annotated[str | None, typer.Option(help="An adapter's base, if it is not where the adapter says.")]


class RowFormat(StrEnum):
    """How a PEFT adapter holds vocabulary rows."""

    tokens = "tokens"
    tables = "tables"


@app.command("from-hf")
def from_hf(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory, org/name on the hub, or a .gguf file.")],
    dst: Annotated[Path, typer.Argument(help="The directory to write.")],
    mesh: Annotated[str | None, typer.Option(help="Shard for these devices, such as fsdp=8,tensor=2.")] = None,
    sha256: Annotated[str | None, typer.Option(help="The expected hash of the source's weights.")] = None,
    force: Force = False,
) -> None:
    """Convert a model to our checkpoint format: the same bits, stacked by layer, sharded for the devices of a mesh."""
    with working() as progress:
        prepare_jax()
        from transllm_jax.commands import convert

        convert.from_hf(source, dst, progress, mesh=mesh, sha256=sha256, force=force)


@app.command("to-hf")
def to_hf(
    source: Annotated[str, typer.Argument(help="A run, an adapter (ours or PEFT's) or a model directory.")],
    dst: Annotated[Path, typer.Argument(help="The directory to write.")],
    stage: Stage = None,
    base: Base = None,
    unmerged: Annotated[
        bool, typer.Option("--unmerged", help="Write the adapters apart, in DST/adapter, in PEFT's format.")
    ] = False,
    adapter_scale: Annotated[
        str | None,
        typer.Option(metavar="FACTORS", help="Merge adapters in part: 0.5, or a factor for each layer, 0.2,0.4,..."),
    ] = None,
    onto: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Put adapters onto this model of the same shape and tokens.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (each tensor's type in the base).")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file, such as 5GB.")] = "5GB",
    check: Annotated[bool, typer.Option(help="Measure what merging did to the logits of a prompt.")] = True,
    force: Force = False,
) -> None:
    """Write a Hugging Face directory, adapters merged and new rows appended, for transformers, vLLM and, where text is
    cut as the base cuts it, llama.cpp."""
    with working() as progress:
        prepare_jax()
        from transllm_jax.commands import convert

        convert.to_hf(
            source,
            dst,
            progress,
            base=base,
            stage=stage,
            merge=not unmerged,
            adapter_scale=adapter_scale,
            onto=onto,
            dtype=dtype,
            max_shard_size=max_shard_size,
            check=check,
            force=force,
        )


@app.command("to-gguf")
def to_gguf(
    source: Annotated[str, typer.Argument(help="A run, an adapter (ours or PEFT's) or a model directory.")],
    dst: Annotated[Path, typer.Argument(help="The directory to write.")],
    type_name: Annotated[
        str | None,
        typer.Option("--type", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 (each tensor's type in the base)."),
    ] = None,
    stage: Stage = None,
    base: Base = None,
    pre: Annotated[
        str | None, typer.Option("--pre", help="llama.cpp's name of the pre-tokenizer, if it is not recognised.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a GGUF file for llama.cpp and Ollama, adapters merged, with the grown tokenizer; and a Modelfile."""
    with working() as progress:
        prepare_jax()
        from transllm_jax.commands.to_gguf import to_gguf as write

        write(source, dst, progress, type_name=type_name, stage=stage, base=base, pre=pre, force=force)


@app.command("to-peft")
def to_peft(
    source: Annotated[str, typer.Argument(help="A run's directory, or an adapter of ours.")],
    dst: Annotated[Path, typer.Argument(help="The directory to write.")],
    stage: Stage = None,
    base_model: Annotated[str | None, typer.Option(help="The base that the adapter names (the run's own).")] = None,
    rows: Annotated[
        RowFormat | None,
        typer.Option(help="tokens: only new rows (PEFT 0.15 and later). tables: whole tables (all versions)."),
    ] = None,
    force: Force = False,
) -> None:
    """Write an adapter directory for PEFT, new rows included."""
    with working() as progress:
        prepare_jax()
        from transllm_jax.commands import convert

        convert.to_peft(
            source,
            dst,
            progress,
            stage=stage,
            base_model=base_model,
            rows=None if rows is None else rows.value,
            force=force,
        )


@app.command("from-peft")
def from_peft(
    base: Annotated[str, typer.Argument(help="The base model: a directory, org/name on the hub, or a .gguf file.")],
    adapter: Annotated[Path, typer.Argument(help="The PEFT adapter's directory.")],
    dst: Annotated[Path, typer.Argument(help="The directory to write.")],
    force: Force = False,
) -> None:
    """Convert an adapter that PEFT trained, so that a run can go on from it (vocabulary.adapter)."""
    with working() as progress:
        prepare_jax()
        from transllm_jax.commands import convert

        convert.from_peft(base, adapter, dst, progress, force=force)


@app.command("verify")
def verify(
    a: Annotated[str, typer.Argument(help="A model: any directory or file that convert reads or writes.")],
    b: Annotated[str, typer.Argument(help="Another model.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="The largest difference of a weight or logit that passes.")
    ] = 0.0,
    prompt: Annotated[str | None, typer.Option(help="The text whose logits are compared.")] = None,
    logits: Annotated[bool, typer.Option(help="Compare logits.")] = True,
    base_a: Annotated[str | None, typer.Option(help="The base of A, an adapter.")] = None,
    base_b: Annotated[str | None, typer.Option(help="The base of B, an adapter.")] = None,
    stage_a: Annotated[str | None, typer.Option(help="The stage of A, a run.")] = None,
    stage_b: Annotated[str | None, typer.Option(help="The stage of B, a run.")] = None,
) -> None:
    """Compare two models, tensor by tensor and by the logits of a prompt; exit code 1 if they differ."""
    with working() as progress:
        prepare_jax()
        from transllm_jax.commands import convert

        same = convert.verify(
            a,
            b,
            progress,
            bases=(base_a, base_b),
            stages=(stage_a, stage_b),
            prompt=convert.PROMPT if prompt is None else prompt,
            logits=logits,
            tolerance=tolerance,
        )
    if not same:
        raise typer.Exit(1)
