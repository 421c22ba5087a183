"""Imports a model: converts any source to a Hugging Face directory, or to our own checkpoint."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from transllm_jax.conversion.fetch import Fetched, fetch
from transllm_jax.conversion.gguf.tokenizer import end_ids, special_ids, write_tokenizer
from transllm_jax.conversion.gguf.weights import open_gguf
from transllm_jax.conversion.hf.directory import HFModel, parse_config, require_all_finite, write_config
from transllm_jax.conversion.hf.export import copy_generation_config, copy_notices
from transllm_jax.conversion.hf.safetensors_io import (
    INDEX,
    MAX_SHARD_BYTES,
    is_indexed,
    weight_files,
    widest,
    write_tensors,
)
from transllm_jax.conversion.hf.tokenizer_files import copy_or_make_tokenizer, has_tokenizer, token_ids
from transllm_jax.conversion.names import Tensor, collapse, tensors
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.conversion.opened import OpenedModel, size_of
from transllm_jax.conversion.store import write_store
from transllm_jax.disk import read_model_json, sha256_of, write_json
from transllm_jax.errors import UserError
from transllm_jax.new_directory import new_directory

Format = Literal["hf", "store"]
SOURCE = "source.json"


@dataclass(frozen=True)
class _Options:
    layout: Format
    sha256: str | None
    mesh: Mapping[str, int] | None
    say: Callable[[str], None]
    # Called with the number of bytes in all; returns a function that is called with the bytes done.
    begin: Callable[[int], Callable[[int], None]]


def import_base(
    source: str,
    dst: str | Path,
    *,
    sha256: str | None = None,
    overwrite: bool = False,
    layout: Format = "hf",
    mesh: Mapping[str, int] | None = None,
    say: Callable[[str], None] | None = None,
    begin: Callable[[int], Callable[[int], None]] | None = None,
) -> None:
    """Fetch a model and write it to `dst`: weights, config, tokenizer, and `source.json`, which records the source.

    `source`: see `conversion/fetch.py`. `layout` "hf" is a Hugging Face directory: the safetensors of a directory
    or repository are copied byte for byte, with their types and shards. "store" is our own checkpoint
    (`conversion/store.py`), cut for `mesh`. A quantised tensor of a GGUF file becomes float32. `sha256` is the expected
    hash of the source's weights: of the GGUF file or the one safetensors file; of several files, it is what
    `sha256sum *.safetensors | sha256sum` prints.

    Every tensor's name, shape and finiteness is checked here. Atomic: `dst` is complete or unchanged. `say` is called
    with one line before each slow step and for each finding. `begin` is called with the number of bytes in all, and
    the function that it returns with the bytes done. Raises UserError for anything wrong with the source, and if `dst`
    is not empty and `overwrite` is false.
    """
    say = say or (lambda line: None)
    options = _Options(layout, sha256, mesh, say, begin or (lambda total: lambda size: None))
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"the SHA-256 {sha256!r} is not 64 hexadecimal digits; correct it")
    fetched = fetch(source, sha256=sha256, say=say)
    dst = Path(dst)
    if fetched.path.is_dir() and dst.exists() and dst.samefile(fetched.path):
        raise UserError(f"model source {source} is the directory that the import would write; give another")
    with new_directory(dst, overwrite=overwrite) as directory:
        if fetched.kind == "gguf":
            say(f"reading {fetched.path.name}")
            origin = _import_gguf(fetched, directory, options)
        else:
            say(f"checking the weights of {source}")
            origin = _import_directory(fetched, directory, options)
        if has_tokenizer(directory) and (padding := padding_rows(directory, source)):
            say(f"{padding} embedding rows have no token: padding, kept as it is")
        record = {"source": source, **origin}
        if layout == "hf":
            files = {file.name: sha256_of(file) for file in weight_files(directory)}
            record |= {"weights_sha256": files, "fingerprint": fingerprint_of(files)}
        record["versions"] = {name: version(name) for name in ("numpy", "safetensors", "gguf", "tokenizers")}
        write_json(directory / SOURCE, record)


def base_fingerprint(directory: str | Path) -> str:
    """The SHA-256 that identifies the weights of an imported base, from its `source.json`."""
    path = Path(directory) / SOURCE
    fingerprint = read_model_json(path).get("fingerprint")
    if not isinstance(fingerprint, str):
        raise UserError(f"{path} has no fingerprint; import the base model again")
    return fingerprint


def padding_rows(directory: Path, source: str | None = None) -> int:
    """How many of the embedding's rows are above the tokenizer's highest id.

    An embedding is often padded to a round number of rows. Raises UserError if the tokenizer has ids for which the
    embedding has no row.
    """
    vocab_size = parse_config(read_model_json(directory / "config.json"), directory).vocab_size
    highest = max(token_ids(directory, source), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{source or directory}: the tokenizer has ids up to {highest}, the embedding has {vocab_size} rows; "
            "the tokenizer is not this model's"
        )
    return vocab_size - highest - 1


def _import_gguf(fetched: Fetched, directory: Path, options: _Options) -> dict[str, Any]:
    model = open_gguf(fetched.path)
    ids = special_ids(model.fields)
    if "eos_token_id" not in ids:
        raise UserError(f"{fetched.path} has no tokenizer.ggml.eos_token_id; use another file of the model")
    write_tokenizer(model.fields, directory, fetched.path)
    narrow = _Narrowed(model)
    ids.pop("unk_token_id", None)  # not a field of a model's config
    ends = end_ids(model.fields)
    generation = {**ids, "eos_token_id": ends} if len(ends) > 1 else None
    named = widest(map(narrow.dtype, tensors(model.config))).name
    write_config(directory, {**model.config.to_hf(), **ids}, named, generation)
    _write(narrow, directory, options)
    return {"kind": "gguf", "source_sha256": fetched.sha256 or sha256_of(fetched.path)}


class _Narrowed:
    """A GGUF file whose norms and biases are converted to the type of its matrices, if that is exact.

    llama.cpp stores them as float32, whatever the model's type was. So a bfloat16 model stays bfloat16.
    """

    def __init__(self, model: OpenedModel) -> None:
        self.where, self.config, self._model = model.where, model.config, model
        self._main = widest({model.dtype(tensor) for tensor in tensors(model.config) if len(tensor.shape) == 2})
        self._small = {
            tensor.name: self._fit(model.read(tensor)) for tensor in tensors(model.config) if len(tensor.shape) == 1
        }

    def _fit(self, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            narrow = array.astype(self._main)
        return narrow if np.array_equal(narrow.astype(array.dtype), array) else array

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        small = self._small.get(tensor.name)
        return self._model.dtype(tensor) if small is None else small.dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        small = self._small.get(tensor.name)
        return self._model.read(tensor) if small is None else small


def _import_directory(fetched: Fetched, directory: Path, options: _Options) -> dict[str, Any]:
    src = fetched.path
    model = open_directory(src)
    for note in model.notes if isinstance(model, HFModel) else ():
        options.say(note)
    if options.layout == "store" and not has_tokenizer(src):
        options.say(f"{src} has no tokenizer; the weights alone are converted")
    else:
        copy_or_make_tokenizer(src, directory)  # before the weights, so that its errors are reported at once
    raw = read_model_json(src / "config.json")
    if isinstance(model, HFModel) and options.layout == "hf":
        _copy_weights(fetched, model, directory, options)
    else:
        if options.sha256 is not None:
            require_sha256(src, weight_files(src) if isinstance(model, HFModel) else [], options.sha256)
        _write(model, directory, options)
        if isinstance(model, HFModel) and model.dropped:
            options.say(f"left out, because other tensors determine them: {collapse(model.dropped)}")
    shutil.copyfile(src / "config.json", directory / "config.json")
    # Read from the source and not from the copy, so that an error names a file that the user has.
    source_generation = src / "generation_config.json"
    configs = (read_model_json(source_generation) if source_generation.is_file() else {}, raw)
    copy_generation_config(src, directory)
    if options.layout == "hf" and all(fields.get("eos_token_id") is None for fields in configs):
        raise UserError(f"{src}: neither generation_config.json nor config.json has eos_token_id; add it")
    copy_notices(src, directory)
    return {"kind": fetched.kind, "revision": fetched.revision}


def _copy_weights(fetched: Fetched, model: HFModel, directory: Path, options: _Options) -> None:
    """Copy the source's safetensors files unchanged, after a check that every value is finite."""
    files = weight_files(fetched.path)
    require_all_finite(model, options.begin(size_of(model)))
    for file in files:
        _link_or_copy(file, directory / file.name, link=fetched.kind == "hub")
    if is_indexed(fetched.path, files):
        shutil.copyfile(fetched.path / INDEX, directory / INDEX)
    if options.sha256 is not None:
        require_sha256(fetched.path, [directory / file.name for file in files], options.sha256)


def _write(model: OpenedModel, directory: Path, options: _Options) -> None:
    advance = options.begin(size_of(model))
    if options.layout == "store":
        write_store(directory, model, mesh=options.mesh, advance=advance)
        return
    write_tensors(
        directory, tensors(model.config), model.read, model.dtype, max_shard_bytes=MAX_SHARD_BYTES, advance=advance
    )


def fingerprint_of(files: dict[str, str]) -> str:
    """One SHA-256 for a set of files, given `{name: sha256}`.

    A single file's own; of several, that of the lines `sha256  name` in name order, which is what
    `sha256sum *.safetensors | sha256sum` prints.
    """
    if len(files) == 1:
        return next(iter(files.values()))
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def require_sha256(where: Path, files: list[Path], sha256: str) -> None:
    """Raises UserError unless the files have the expected SHA-256 (see `fingerprint_of`)."""
    if not files:
        raise UserError(f"{where} has no safetensors files, of which a SHA-256 could be checked; leave it out")
    found = fingerprint_of({file.name: sha256_of(file) for file in files})
    if found != sha256.lower():
        raise UserError(f"the weights of {where} have SHA-256 {found}, expected {sha256}; correct one or the other")


def _link_or_copy(src: Path, dst: Path, *, link: bool) -> None:
    """Hard-link a file of the hub's cache, which never changes in place; copy everything else."""
    if link:
        try:
            os.link(src.resolve(), dst)
            return
        except OSError:
            pass  # another file system, so it is copied
    shutil.copyfile(src, dst)
