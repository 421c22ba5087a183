"""TFDS datasets, prepared on disk as ArrayRecord files. TFDS is imported only here.

Neither TensorFlow nor a dataset's code is needed: the files on disk describe themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.data.read.files import Collector, Place
from transllm_jax.data.read.records import Record
from transllm_jax.errors import UserError

_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CLASS = re.compile(r'"pythonClassName"\s*:\s*"([^"]*)"')


@dataclass(frozen=True)
class TfdsPart:
    """The records of a split that are in one file: `count` records from number `first` of the split on, from 0."""

    directory: str
    split: str
    first: int
    count: int
    name: str
    key: str
    size: int

    def records(self, collector: Collector) -> Iterator[tuple[Record, Place]]:
        """The records, with their numbers in the split, from 1. UTF-8 bytes become strings."""
        place = Place(f"{self.directory} ({self.split})", self.first + 1, "record")
        source = _open(_library(self.directory), Path(self.directory)).as_data_source(split=self.split)
        for index in range(self.first, self.first + self.count):
            place = place._replace(line=index + 1)
            try:
                record = source[index]
            except (OSError, ValueError, RuntimeError, IndexError) as error:
                message = " ".join(str(error).split())[:300]
                raise UserError(f"{place} cannot be read ({message}): prepare the dataset again") from error
            yield _plain(record), place


def parts_of(name: str, split: str, data_dir: str | None, hash_of: Callable[[Path], str]) -> list[TfdsPart]:
    """The parts of a split of the dataset `name[/config][:version]`, one for each of its files.

    data_dir: where datasets are prepared (by default TFDS's own directory). hash_of: returns a file's SHA-256. Nothing
    is downloaded or prepared. Raises UserError if the dataset is not prepared, if it lacks the split, and if TFDS is
    not installed.
    """
    tfds = _library(name)
    directory, fix = _prepared(name, Path(data_dir or str(tfds.core.constants.DATA_DIR)))
    builder = _open(tfds, directory)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = builder.info.file_format.value
        raise UserError(f"{directory} is prepared as {found}, but only array_record is read: {fix}")
    try:
        pieces = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        has = ", ".join(builder.info.splits) or "none"
        raise UserError(f"{directory} has no split {split!r} (it has: {has}): set split") from error
    described = hash_of(directory / "features.json")
    parts: list[TfdsPart] = []
    first = 0
    for piece in pieces:
        file = Path(str(piece.filename))
        origin = [builder.info.full_name, described, hash_of(file), piece.skip, piece.take]
        key = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
        parts.append(TfdsPart(str(directory), split, first, piece.take, file.name, key, file.stat().st_size))
        first += piece.take
    return parts


def _prepared(name: str, data_dir: Path) -> tuple[Path, str]:
    """The directory of a dataset (of its newest version if `name` has none), and how to prepare it.

    Found by the directories' names: TFDS would first look for the dataset's code.
    """
    named = _NAME.fullmatch(name)
    if named is None:
        raise UserError(f"{name} is not the name of a TFDS dataset: write NAME, NAME/CONFIG or NAME/CONFIG:1.0.0")
    base, config, version = named.groups()
    full = f"{base}/{config}" if config else base
    call = f"tfds.builder({full!r}, data_dir={str(data_dir)!r}).download_and_prepare(file_format='array_record')"
    fix = f"prepare it by {call}"
    root = data_dir / full
    versions = {
        tuple(map(int, path.parent.name.split("."))): path.parent
        for path in root.glob("*/dataset_info.json")
        if _VERSION.fullmatch(path.parent.name)
    }
    if version is not None and tuple(map(int, version.split("."))) in versions:
        return root / version, fix
    if versions and version is None:
        return versions[max(versions)], fix
    if versions:
        raise UserError(f"{root} has no version {version}, but {_listed(versions.values())}: name one, or {fix}")
    configs = {path.parent.parent for path in root.glob("*/*/dataset_info.json")} if config is None else set()
    if configs:
        raise UserError(f"{root} has configs: name one of {_listed(configs)}, as {base}/CONFIG")
    raise UserError(f"TFDS dataset {name} is not prepared in {data_dir}: {fix}, or set data_dir")


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(sorted(path.name for path in paths))


def _open(tfds: Any, directory: Path) -> Any:
    """The dataset as its files describe it, without the code that made it."""
    features = directory / "features.json"
    if not features.is_file():
        raise UserError(f"{directory} has no features.json: prepare the dataset again")
    # TFDS imports the modules that this file names.
    foreign = sorted(
        {
            found
            for found in _CLASS.findall(features.read_text(encoding="utf-8"))
            if not found.startswith("tensorflow_datasets.core.features.")
        }
    )
    if foreign:
        raise UserError(f"{features} names code outside of TFDS ({', '.join(foreign)}): use a dataset that does not")
    return tfds.builder_from_directory(directory)


def _plain(value: Any) -> Any:
    """A TFDS value as strings, numbers, lists and dicts."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value  # an image, say; refused by its type if it is read as text
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _library(name: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"{name}: container tfds needs `tensorflow-datasets`; pip install 'transllm-jax[data]'"
        ) from error
    return tfds
