"""What the commands `transllm convert ...` do: open a model, whatever its format, and write or compare it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.table import Table

from transllm_jax.commands.move_adapter import moved_source
from transllm_jax.commands.open_model import open_source, tokenizer_of
from transllm_jax.conversion.adapter import AdapterDescription, write_adapter
from transllm_jax.conversion.gguf.tokenizer import write_tokenizer
from transllm_jax.conversion.gguf.weights import GGUFModel
from transllm_jax.conversion.hf.directory import open_hf
from transllm_jax.conversion.hf.export import Rounding, check_tokenizer, export_hf
from transllm_jax.conversion.hf.tokenizer_files import (
    copy_or_make_tokenizer,
    copy_tokenizer,
    readable_tokenizer,
    token_ids,
)
from transllm_jax.conversion.import_base import import_base
from transllm_jax.conversion.logits import logits_of
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import tensors
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.conversion.opened import OpenedModel, size_of
from transllm_jax.conversion.peft.config import CONFIG
from transllm_jax.conversion.peft.read import read_peft
from transllm_jax.conversion.peft.write import Rows, write_peft
from transllm_jax.conversion.verify import Comparison, compare
from transllm_jax.disk import parse_size, read_model_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.mesh import parse_mesh
from transllm_jax.new_directory import check_destination, new_directory
from transllm_jax.progress import Progress
from transllm_jax.tokenizer.llama_cpp import misread_message, readers_of
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import save_arrays

# A text with letters, digits, punctuation and another script: the default for comparing logits.
PROMPT = "The capital of France is Paris, and 2 + 2 = 4. ประเทศไทยมีเมืองหลวงชื่อกรุงเทพ"
PROMPT_TOKENS = 64


def from_hf(source: str, dst: Path, progress: Progress, *, mesh: str | None, sha256: str | None, force: bool) -> None:
    """Write a model as a checkpoint of ours (see `transllm_jax.conversion.import_base`)."""
    check_free(dst, force, source)
    with byte_bar(progress, "converting") as begin:
        import_base(
            source,
            dst,
            sha256=sha256,
            overwrite=force,
            layout="store",
            mesh=None if mesh is None else parse_mesh(mesh),
            say=lambda line: progress.say(line),
            begin=begin,
        )
    progress.say(f"{dst}: {describe(open_directory(dst))}")


def to_hf(
    source: str,
    dst: Path,
    progress: Progress,
    *,
    base: str | None = None,
    stage: str | None = None,
    merge: bool = True,
    adapter_scale: str | None = None,
    onto: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    check: bool = True,
    force: bool = False,
) -> None:
    """Write a Hugging Face directory; report what merging changed, in weights and in logits.

    adapter_scale, onto: write what was trained in part, or put onto another model (`conversion/moved.py`).
    """
    size = parse_size(max_shard_size)
    check_free(dst, force, source, base, onto)
    found = open_source(source, base=base, stage=stage)
    if adapter_scale is not None or onto is not None:
        found = moved_source(found, source, adapter_scale or "1", onto)
    if found.files is None:
        raise UserError(f"{source} is a GGUF file; bring it in with transllm convert from-hf, then out with to-hf")
    model = found.model
    if not merge:
        if not isinstance(model, Merged) or found.lora is None:
            raise UserError(f"{source} has no adapters to keep apart{_why_no_adapters(model)}; leave --unmerged out")
        model = Merged(model.base, model.trainable, found.lora.scale, merge_adapters=False)

    def also(directory: Path) -> None:
        if found.about is not None:
            write_json(directory / "transllm.json", {**found.about, "readers": readers_of(directory)})
        if not merge and isinstance(model, Merged) and found.lora is not None:
            adapters = {path: array for path, array in model.trainable.items() if path.startswith("blocks.")}
            write_peft(directory / "adapter", model, adapters, found.lora, base_model=str(dst.absolute()))

    with byte_bar(progress, "writing") as begin, readable_tokenizer(found.tokenizer) as tokenizer:
        rounding = export_hf(
            model,
            found.files,
            dst,
            tokenizer_dir=tokenizer,
            dtype=dtype,
            max_shard_bytes=size,
            overwrite=force,
            begin=begin,
            also=also,
        )
    written = open_hf(dst)
    progress.say(f"{dst}: {describe(written)}")
    if warning := misread_message(dst):
        progress.say(warning)
    if not merge:
        progress.say(f"{dst / 'adapter'}: the adapters, as PEFT loads them on it")
    elif isinstance(model, Merged) and (model.full or found.lora is not None):
        progress.say(_merging_line(rounding, written, full=model.full))
        if check:
            progress.say(_logits_line(model, written, dst, found.lora))


def _why_no_adapters(model: OpenedModel) -> str:
    """For a message: why a trained model has no adapters; empty for a model that was not trained."""
    return " (all of its weights were trained: lora is none)" if isinstance(model, Merged) and model.full else ""


def _merging_line(rounding: Rounding, written: OpenedModel, *, full: bool) -> str:
    types = ", ".join(sorted({written.dtype(tensor).name for tensor in tensors(written.config)}))
    return (
        f"{'all weights trained' if full else 'merged'} in float32, rounded once to {types}: no weight moved by more "
        f"than {rounding.largest:.2g}, all together by {rounding.share:.2%} of what "
        f"{'training' if full else 'the adapters'} changed"
    )


def _logits_line(model: OpenedModel, written: OpenedModel, tokenizer: Path, lora: LoraConfig | None) -> str:
    """Compare the logits of the trained and the written model, in words. Without `lora`, all weights were trained."""
    tokens = prompt_tokens(Tokenizer.load(tokenizer), PROMPT)
    trained, merged = logits_of(model, tokens, lora), logits_of(written, tokens)
    same = np.mean(np.argmax(trained, axis=1) == np.argmax(merged, axis=1))
    pair = "written against trained" if lora is None else "merged against unmerged"
    return (
        f"{pair}, logits of {len(tokens)} tokens: largest difference "
        f"{np.max(np.abs(trained - merged)):.2g} (their standard deviation is {trained.std():.2g}), "
        f"same best token at {same:.0%} of the positions"
    )


def to_peft(
    source: str,
    dst: Path,
    progress: Progress,
    *,
    stage: str | None = None,
    base_model: str | None = None,
    rows: Rows | None = None,
    force: bool = False,
) -> None:
    """Write a run's adapter, at a stage, as a PEFT adapter directory."""
    check_free(dst, force, source)
    found = open_source(source, stage=stage)
    if not isinstance(found.model, Merged) or found.lora is None:
        at = f"stage {stage} of {source}" if stage else source
        if why := _why_no_adapters(found.model):
            raise UserError(f"{at} has no adapters{why}; write the whole model, with transllm convert to-hf")
        raise UserError(f"{at} has no adapters; give a run's work directory, after stage vocabulary or later")
    with readable_tokenizer(found.tokenizer) as tokenizer:
        write_peft(
            dst,
            found.model.base,
            found.model.trainable,
            found.lora,
            base_model=base_model or str((found.files or Path()).resolve()),
            tokenizer_dir=tokenizer,
            rows=rows,
            overwrite=force,
        )
    size = (dst / "adapter_model.safetensors").stat().st_size
    progress.say(f"{dst}: rank {found.lora.rank}, {found.model.new_rows} new tokens, {size / 1e6:,.1f} MB")
    if found.model.new_rows:
        progress.say(
            f"load it: base.resize_token_embeddings({found.model.config.vocab_size}), "
            f"then peft.PeftModel.from_pretrained(base, {str(dst)!r})",
        )


def from_peft(base: str, adapter: Path, dst: Path, progress: Progress, *, force: bool = False) -> None:
    """Write a PEFT adapter as one that a run can begin with (`vocabulary.adapter`)."""
    if not (adapter / CONFIG).is_file():
        raise UserError(f"{adapter} has no {CONFIG}; give the directory of a PEFT adapter")
    check_free(dst, force, base, adapter)
    below = open_source(base)
    found = read_peft(adapter, below.model)
    named = read_model_json(adapter / CONFIG).get("base_model_name_or_path")
    if named and _lasting_name(str(named)) != _lasting_name(base):
        progress.say(f"the adapter names {named} as its base; it is read on {base}, whose shapes fit")
    if found.new_rows and found.tokenizer_dir is None:
        raise UserError(f"{adapter} has {found.new_rows} new rows but no tokenizer; save the tokenizer beside it")
    trainable, padding = dict(found.trainable), 0
    with readable_tokenizer(found.tokenizer_dir) as own:
        if own is not None and found.new_rows:
            # A table is often padded to a round number of rows; rows after the last token have no meaning.
            tokens = max(token_ids(own), default=-1) + 1 - below.model.config.vocab_size
            padding = max(found.new_rows - max(tokens, 0), 0)
            for path in ("vocabulary.new", "vocabulary.output_new"):
                if path in trainable:
                    trainable[path] = trainable[path][: found.new_rows - padding]
            check_tokenizer(own, below.model.config.vocab_size, found.new_rows - padding)
        with new_directory(dst, overwrite=force) as directory:
            save_arrays(directory / "trainable", trainable)
            if own is not None:
                copy_tokenizer(own, directory)
            elif below.files is not None:
                copy_or_make_tokenizer(below.files, directory)
            elif isinstance(below.model, GGUFModel):
                write_tokenizer(below.model.fields, directory, below.model.where)
            write_adapter(
                directory,
                AdapterDescription.of(below.model, found.lora, base_name=_lasting_name(base), source=str(adapter)),
            )
    lora = found.lora
    if padding:
        progress.say(f"{padding} new rows have no token: padding, left out")
    progress.say(
        f"{dst}: rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.targets)}; "
        f"{found.new_rows - padding} new tokens\n"
        f"go on training: 'vocabulary={{adapter: {dst}}}' lora.rank={lora.rank} lora.alpha={lora.alpha:g} "
        f"lora.rslora={str(lora.rslora).lower()} 'lora.targets=[{', '.join(lora.targets)}]'"
        + (" embeddings=all" if "vocabulary.base_trained" in trainable else ""),
    )


def _lasting_name(source: str) -> str:
    """A source by a name that is valid from every directory: an absolute path, or the name itself."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def check_free(dst: Path, force: bool, *reads: str | Path | None) -> None:
    """Check the destination before anything is read. Raises UserError."""
    paths = [Path(path) for path in reads if path is not None]
    check_destination(dst, overwrite=force, reads=[path for path in paths if path.exists()])


def verify(
    a: str,
    b: str,
    progress: Progress,
    *,
    bases: tuple[str | None, str | None] = (None, None),
    stages: tuple[str | None, str | None] = (None, None),
    prompt: str = PROMPT,
    logits: bool = True,
    tolerance: float = 0.0,
) -> bool:
    """Compare any two models that can be opened; print the differences. True if all are within the tolerance."""
    left, right = (open_source(x, base=y, stage=z) for x, y, z in zip((a, b), bases, stages, strict=True))
    ids = None
    notes = []
    if logits:
        cuts = [None if found.bare else prompt_tokens(tokenizer_of(found), prompt) for found in (left, right)]
        ids = cuts[0] or cuts[1] or list(range(1, PROMPT_TOKENS + 1))
        if cuts[0] is None or cuts[1] is None:
            notes.append("not both have a tokenizer; both models are given the same ids")
        elif cuts[0] != cuts[1]:
            notes.append("the tokenizers cut the prompt differently; both models are given the first one's ids")
        limit = min(left.model.config.vocab_size, right.model.config.vocab_size)
        ids = [number for number in ids if number < limit]
    with byte_bar(progress, "comparing") as begin:
        result = compare(left.model, right.model, ids, begin(size_of(left.model) + size_of(right.model)))
    progress.say(comparison_table(result))
    faults = [fault for group in result.groups for fault in group.faults]
    for line in (*result.missing, *faults, *(f"config: {line}" for line in result.config), *notes):
        progress.say(line)
    worst = max(result.groups, key=lambda group: group.largest)
    if worst.worst is not None:
        progress.say(f"weights: largest difference {worst.largest:.3g}, in {worst.worst}")
    if result.logits is not None:
        progress.say(
            f"logits of {len(ids or ())} tokens: largest difference {result.logits:.3g}, "
            f"same best token at {result.same_best:.0%} of the positions, KL {result.divergence:.3g} nats a token",
        )
    good = result.within(tolerance)
    if good and result.largest > 0:
        progress.say(f"within the tolerance of {tolerance:g}")
    else:
        progress.say("the same" if good else f"they differ by more than the tolerance of {tolerance:g}")
    return good


def comparison_table(result: Comparison) -> Table:
    """A table with a row for each kind of tensor."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("weights", "tensors", "identical", "largest", "mean", "types"):
        numbers = heading in ("tensors", "identical", "largest", "mean")
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=heading == "weights")
    for group in result.groups:
        table.add_row(
            group.path,
            str(group.tensors),
            str(group.identical),
            f"{group.largest:.3g}",
            f"{group.mean:.3g}",
            ", ".join(sorted(group.types)),
        )
    return table


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The first PROMPT_TOKENS ids of a prompt, as a model is given them. Raises UserError for an empty text."""
    ids = [*tokenizer.bos_ids, *tokenizer.encode(prompt)][:PROMPT_TOKENS]
    if not ids:
        raise UserError("the prompt is empty; give a text")
    return ids


def describe(model: OpenedModel) -> str:
    """A model's family, sizes and types in one line."""
    config = model.config
    table = tensors(config)
    types = sorted({model.dtype(tensor).name for tensor in table})
    count = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in table)
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary "
        f"{config.vocab_size}, {count / 1e6:,.1f} million parameters in {', '.join(types)}"
    )


@contextmanager
def byte_bar(progress: Progress, name: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A progress bar in bytes. Yields `begin(total)`, which starts the bar and returns `advance(bytes)`."""
    bars = []

    def begin(total: int) -> Callable[[int], None]:
        bar = progress.bytes(name, total)
        bars.append(bar)

        def advance(size: int) -> None:
            progress.check()
            bar.add(size)

        return advance

    try:
        yield begin
    finally:
        for bar in bars:
            bar.close()
