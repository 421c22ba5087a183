"""What `transllm convert to-gguf` does: a model as a GGUF file, with what llama.cpp and Ollama need beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transllm_jax.commands.convert import byte_bar, check_free, describe
from transllm_jax.commands.open_model import open_source
from transllm_jax.conversion.gguf.chat_template import with_english_history
from transllm_jax.conversion.gguf.modelfile import modelfile
from transllm_jax.conversion.gguf.weights import GGUFModel, open_gguf
from transllm_jax.conversion.gguf.write import check_blocks, kind_of, most_common, write_gguf
from transllm_jax.conversion.gguf.write_config import config_notes
from transllm_jax.conversion.gguf.write_tokenizer import CHAT_TEMPLATE, tokenizer_fields
from transllm_jax.conversion.hf.directory import parse_config
from transllm_jax.conversion.hf.export import check_tokenizer, copy_notices
from transllm_jax.conversion.hf.tokenizer_files import readable_tokenizer
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.disk import read_model_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.new_directory import new_directory
from transllm_jax.progress import Progress
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.tokenizer import Tokenizer


def to_gguf(
    source: str,
    dst: Path,
    progress: Progress,
    *,
    type_name: str | None = None,
    stage: str | None = None,
    base: str | None = None,
    pre: str | None = None,
    force: bool = False,
) -> None:
    """Write `DST/NAME-TYPE.gguf`, an Ollama Modelfile and, for a trained model, transllm.json.

    Raises UserError for what cannot be written (see `conversion.gguf.write`), for a model without a tokenizer, and for
    a destination that is not free.
    """
    if dst.suffix == ".gguf":
        raise UserError(f"{dst} is written as a directory, with a Modelfile beside the .gguf file; name it {dst.stem}")
    kind = kind_of(type_name)
    check_free(dst, force, source, base)
    found = open_source(source, base=base, stage=stage)
    if isinstance(found.model, GGUFModel):
        raise UserError(f"{source} is a GGUF file already; llama.cpp's llama-quantize changes its type")
    if found.bare or found.tokenizer is None or found.files is None:
        raise UserError(f"{source} has no tokenizer, which a GGUF file holds; add the model's tokenizer files")
    check_blocks(found.model, kind)
    notes = config_notes(found.model.config)
    about = found.about or _about(found.files)
    with readable_tokenizer(found.tokenizer) as directory:
        assert directory is not None
        _check_rows(found.model, found.files, directory)
        tokenizer = Tokenizer.load(directory, model=found.files)
    tokenizer.source = source
    markers = None if about is None else Markers(**about["markers"])
    visible = () if markers is None else markers.in_order()
    written = tokenizer_fields(tokenizer, found.model.config.vocab_size, visible=visible, pre=pre)
    if markers is not None and tokenizer.chat_template is not None:
        written.fields[CHAT_TEMPLATE] = with_english_history(tokenizer.chat_template, markers)
    notes += written.notes
    name = f"{dst.name}-{most_common(found.model, kind)}.gguf"
    fields = {**written.fields, "general.type": "model", "general.name": dst.name}
    if about is not None:
        fields["general.languages"] = ["en", str(about["language"]["code"])]
    with byte_bar(progress, "writing") as begin, new_directory(dst, overwrite=force) as directory:
        write_gguf(directory / name, found.model, fields, kind, begin=begin)
        if about is not None:
            write_json(directory / "transllm.json", about)
        text, problem = modelfile(tokenizer, name, found.model.config.max_position_embeddings, chains=about is not None)
        (directory / "Modelfile").write_text(text, encoding="utf-8")
        copy_notices(found.files, directory)
    progress.say(f"{dst / name}: {describe(open_gguf(dst / name))}, {(dst / name).stat().st_size / 1e6:,.1f} MB")
    for note in notes if problem is None else [*notes, problem]:
        progress.say(note)


def _check_rows(model: OpenedModel, files: Path, tokenizer: Path) -> None:
    """Raises UserError unless the tokenizer has one token for each new row of a trained model."""
    if isinstance(model, Merged):
        base_rows = parse_config(read_model_json(files / "config.json"), files).vocab_size
        check_tokenizer(tokenizer, base_rows, model.config.vocab_size - base_rows, model.padding)


def _about(directory: Path) -> dict[str, Any] | None:
    """The language and markers of an exported model; None for one that writes no chains."""
    return read_model_json(directory / "transllm.json") if (directory / "transllm.json").is_file() else None
