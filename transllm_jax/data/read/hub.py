"""Datasets of Hugging Face `datasets`: local directories and names on the hub. The library is imported only here."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.data.read.files import Collector, Place
from transllm_jax.data.read.records import Record
from transllm_jax.errors import UserError
from transllm_jax.hub_name import hub_name_problem

# Readers of the library that read text and run no code.
_READERS = ("arrow", "csv", "json", "parquet", "text")
_REVISION = re.compile("[0-9a-f]{40}")
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Dataset:
    """A split of a dataset: in a local directory, or under a name and revision on the hub."""

    path: str
    split: str
    data_dir: str | None
    config: str | None = None
    revision: str | None = None

    @property
    def saved(self) -> bool:
        """Whether it was written by `save_to_disk`."""
        return any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json"))

    def builder(self) -> Any:
        """The library's builder. Raises UserError if it refuses the dataset, or if its reader does not read text."""
        datasets = _library(self.path)
        local = Path(self.path).is_dir()
        missing = "" if local else ": there is no such directory here, and on the hub it"
        with _faults(f"{self.path}{missing} cannot be opened by `datasets`"):
            # An absolute path: a relative one such as `json` would mean the library's reader of that name.
            path = str(Path(self.path).absolute()) if local else self.path
            built = datasets.load_dataset_builder(path, self.config, data_dir=self.data_dir, revision=self.revision)
        reader = type(built).__module__.rpartition(".")[2]
        if reader not in _READERS:
            raise UserError(
                f"{self.path} is a dataset of the kind {reader!r}, which is not supported: use one of "
                f"{', '.join(_READERS)}"
            )
        return built

    def stream(self) -> Any:
        """The split as an iterable. Raises UserError if there is no such split."""
        datasets = _library(self.path)
        where = f"{self.path}, split {self.split!r}"
        if self.saved:
            with _faults(where):
                whole = datasets.load_from_disk(self.path)
                if isinstance(whole, dict):
                    if self.split not in whole:
                        raise UserError(f"{where}: there is no such split; it has {', '.join(whole)}")
                    whole = whole[self.split]
                elif self.split != "train":
                    raise UserError(f"{where}: the saved dataset has no splits; leave split out")
                return whole.to_iterable_dataset()
        builder = self.builder()
        with _faults(where):
            return builder.as_streaming_dataset(split=self.split)


@dataclass(frozen=True)
class HubPart:
    """A shard of a dataset. key: changes if its records may have changed. size: bytes on disk, or 0 if unknown."""

    dataset: Dataset
    index: int
    count: int
    key: str
    size: int

    @property
    def name(self) -> str:
        path = self.dataset.path
        name = path.replace("/", "-") if self.dataset.revision else Path(path).absolute().name
        return f"{name}-{self.dataset.split}" + (f"-{self.index}" if self.count > 1 else "")

    def records(self, collector: Collector) -> Iterator[tuple[Record, Place]]:
        """The shard's records, with their numbers in it, from 1."""
        part = f", shard {self.index + 1} of {self.count}" if self.count > 1 else ""
        where = f"{self.dataset.path} ({self.dataset.split}{part})"
        stream = self.dataset.stream()
        place = Place(where, 1, "record")
        with _faults(where):
            rows = iter(stream.shard(num_shards=self.count, index=self.index) if self.count > 1 else stream)
        while True:
            with _faults(str(place)):
                row = next(rows, None)
            if row is None:
                return
            yield row, place
            place = place._replace(line=place.line + 1)


def parts_of(path: str, split: str, data_dir: str | None, hash_of: Callable[[Path], str]) -> list[HubPart]:
    """The shards of a dataset's split.

    path: a local directory, or on the hub OWNER/NAME or OWNER/NAME/CONFIG, either with @REVISION. hash_of: returns a
    file's SHA-256. A change of any of the split's local files changes the keys of all shards; on the hub, a new
    revision does. Raises UserError if there is no such dataset, and if `datasets` is not installed.
    """
    dataset = _dataset(path, split, data_dir)
    size = 0
    origin: list[Any] = []
    if dataset.revision is None:
        files = _files(dataset)
        size = sum(file.stat().st_size for file in files)
        origin = [hash_of(file) for file in files]
    count = dataset.stream().num_shards
    # A repository on the hub can be renamed or copied: only its revision counts, which is a hash of the content.
    origin += [dataset.revision, dataset.config, dataset.data_dir, dataset.split, count]
    return [
        HubPart(dataset, index, count, hashlib.sha256(json.dumps([*origin, index]).encode()).hexdigest(), size // count)
        for index in range(count)
    ]


def _dataset(path: str, split: str, data_dir: str | None) -> Dataset:
    if Path(path).is_dir():
        return Dataset(path, split, data_dir)
    named = _NAME.fullmatch(path)
    if named is None or path.startswith("."):
        raise UserError(f"{path} is neither a directory nor a name on the hub: write OWNER/NAME or OWNER/NAME/CONFIG")
    if wrong := hub_name_problem(path):
        raise UserError(f"{path} does not exist: {wrong}")
    name, config, revision = named.groups()
    revision = Dataset(name, split, data_dir, config, revision).builder().hash
    if not _REVISION.fullmatch(revision or ""):
        raise UserError(f"{path}: its revision on the hub cannot be found out; download it and give the directory")
    return Dataset(name, split, data_dir, config, revision)


def _files(dataset: Dataset) -> list[Path]:
    """The files that a local dataset's split is read from, in the library's order, and those that describe it."""
    root = Path(dataset.path)
    if dataset.saved:
        below = root / dataset.split if (root / "dataset_dict.json").is_file() else root
        return sorted(file for file in below.rglob("*") if file.is_file())
    found = (dataset.builder().config.data_files or {}).get(dataset.split, [])
    described = [root / name for name in ("README.md", "dataset_infos.json", ".huggingface.yaml")]
    files = [Path(str(file)) for file in found]
    if outside := [str(file) for file in files if not file.is_file()]:
        raise UserError(f"{dataset.path}: its data is elsewhere ({', '.join(outside)}); give a directory that holds it")
    return [*files, *(file for file in described if file.is_file())]


def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: container datasets needs `datasets`; pip install 'transllm-jax[data]'") from error
    # Without a network, each of its attempts would print two lines before ours.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    return datasets


@contextmanager
def _faults(where: str) -> Iterator[None]:
    """Turns the library's errors about data, names and connections into a UserError of one line."""
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
        message = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "fix the dataset, its name or its split"
        if isinstance(error, ConnectionError):
            fix = "check the network, or download the dataset and give its files or directory"
        raise UserError(f"{where}: {message}; {fix}") from error
