"""Import of the original chat model: any source becomes `base/`, a Hugging Face directory, written once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from conversion.directories import fingerprint_of, new_directory, read_json, sha256_of, write_json
from conversion.fetch import Fetched, fetch
from conversion.gguf_tokenizer import special_ids, write_tokenizer
from conversion.gguf_weights import open_gguf
from conversion.hf import check_weights, parse_config, write_config
from conversion.names import tensors
from conversion.safetensors_io import INDEX, SINGLE, weight_files, write_tensors
from conversion.tokenizer_files import copy_tokenizer, require_tokenizer, token_ids
from transllm_jax.errors import UserError

SOURCE = "source.json"


def import_base(
    source: str,
    dst: str | Path,
    *,
    sha256: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> None:
    """Fetch a model and write it to `dst` as a Hugging Face directory with one more file, `source.json`.

    `source`: see `conversion.fetch.fetch`. A GGUF file is dequantised to float32; the safetensors of a
    directory or repository are taken over byte for byte, in the type and the shards that they have.
    `sha256` is the expected hash of the source's weights: of the GGUF file or the one safetensors file, or,
    of several, what `sha256sum *.safetensors | sha256sum` prints.

    Every tensor's name, shape and finiteness is checked here. Atomic: `dst` is there whole or as it was.
    Raises UserError for whatever is wrong with the source, and if `dst` is not empty and `overwrite` is
    false.
    """
    fetched = fetch(source, sha256=sha256, say=say)
    say = say or (lambda line: None)
    dst = Path(dst)
    if fetched.path.is_dir() and dst.exists() and dst.samefile(fetched.path):
        raise UserError(f"model source {source} is the directory that the import would write; give another")
    with new_directory(dst, overwrite=overwrite) as directory:
        if fetched.kind == "gguf":
            say(f"reading {fetched.path.name}")
            origin = _import_gguf(fetched, directory)
        else:
            say(f"checking the weights of {source}")
            origin = _import_directory(fetched, directory, sha256)
        require_matching_tokenizer(directory, source)
        files = {file.name: sha256_of(file) for file in weight_files(directory)}
        record = {
            "source": source,
            **origin,
            "weights_sha256": files,
            "fingerprint": fingerprint_of(files),
            "versions": {name: version(name) for name in ("numpy", "safetensors", "gguf", "tokenizers")},
        }
        write_json(directory / SOURCE, record)


def base_fingerprint(directory: str | Path) -> str:
    """The SHA-256 that identifies the weights of an imported base, from its `source.json`."""
    path = Path(directory) / SOURCE
    fingerprint = read_json(path).get("fingerprint")
    if not isinstance(fingerprint, str):
        raise UserError(f"{path} has no fingerprint; import the base model again")
    return fingerprint


def require_matching_tokenizer(directory: Path, source: str | None = None) -> None:
    """Raises UserError if the tokenizer has ids that the embedding has no row for.

    The other way round is normal: an embedding is often padded to a round number of rows.
    """
    vocab_size = parse_config(read_json(directory / "config.json"), directory).vocab_size
    highest = max(token_ids(directory), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{source or directory}: the tokenizer has ids up to {highest}, the embedding has {vocab_size} rows; "
            "the tokenizer is not this model's"
        )


def _import_gguf(fetched: Fetched, directory: Path) -> dict[str, Any]:
    model = open_gguf(fetched.path)
    ids = special_ids(model.fields)
    if "eos_token_id" not in ids:
        raise UserError(f"{fetched.path} has no tokenizer.ggml.eos_token_id; use another file of the model")
    write_tokenizer(model.fields, directory, fetched.path)
    write_tensors(directory, tensors(model.config), model.read, np.dtype(np.float32))
    ids.pop("unk_token_id", None)  # not a field of a model's config
    write_config(directory, {**model.config.to_hf(), **ids}, "float32")
    return {"kind": "gguf", "source_sha256": fetched.sha256 or sha256_of(fetched.path)}


def _import_directory(fetched: Fetched, directory: Path, sha256: str | None) -> dict[str, Any]:
    src = fetched.path
    raw = read_json(src / "config.json")
    config = parse_config(raw, src)
    require_tokenizer(src)
    files = weight_files(src)
    check_weights(src, config)
    for file in files:
        _take(file, directory / file.name, link=fetched.kind == "hub")
    if files[0].name != SINGLE:
        shutil.copyfile(src / INDEX, directory / INDEX)
    if sha256 is not None:
        found = fingerprint_of({file.name: sha256_of(directory / file.name) for file in files})
        if found != sha256.lower():
            raise UserError(f"the weights of {src} have SHA-256 {found}, expected {sha256}; correct one or the other")
    shutil.copyfile(src / "config.json", directory / "config.json")
    if (src / "generation_config.json").is_file():
        shutil.copyfile(src / "generation_config.json", directory / "generation_config.json")
    else:
        ids = {
            name: raw[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(name) is not None
        }
        write_json(directory / "generation_config.json", ids)
    if read_json(directory / "generation_config.json").get("eos_token_id") is None and raw.get("eos_token_id") is None:
        raise UserError(f"{src}: neither generation_config.json nor config.json has eos_token_id; add it")
    copy_tokenizer(src, directory)
    for notice in sorted([*src.glob("LICENSE*"), *src.glob("NOTICE*")]):
        shutil.copyfile(notice, directory / notice.name)
    return {"kind": fetched.kind, "revision": fetched.revision}


def _take(src: Path, dst: Path, *, link: bool) -> None:
    """Hard-link a file of the hub's cache, which never changes in place; copy everything else."""
    if link:
        try:
            os.link(src.resolve(), dst)
            return
        except OSError:
            pass  # another file system: a copy serves as well
    shutil.copyfile(src, dst)
