"""Samples documents from a corpus of any size in bounded memory; the sample does not depend on the number of processes.

Each document has a priority, a hash of the seed, its file's name, its line and its text. The sample consists of the
documents of the lowest priorities whose bytes fit. Each file is read once for its own lowest ones: its share of the
sample by size, and some more. If the lowest priority that a file left out shows that this was too little, the file is
read again.

What was taken from a file is kept in the cache directory until the sample is complete and replaces it: an interrupted
pass resumes with the next file.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transllm_jax.choices import Controls, Separator
from transllm_jax.data.pool import add_progress, cores, run_in_processes
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import Reading, iter_texts, text_files
from transllm_jax.disk import sha256_of_json, whole
from transllm_jax.errors import UserError

_FORMAT = 2  # of the files in the cache
_MARGIN = 4  # a file may give this many times its share of the sample
_LEAST = 1 << 20  # bytes that a file may give in any case
_WORTH = 16 << 20  # bytes of files below which starting processes takes longer than reading

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class SampleReport:
    """What was read and what was kept, in documents and UTF-8 bytes.

    normalised: documents that were not in NFC. removed: control characters taken out. too_long: documents that are
    larger than the whole sample may be; they are left out and not counted in `bytes`.
    """

    files: int = 0
    documents: int = 0
    bytes: int = 0
    normalised: int = 0
    removed: int = 0
    too_long: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True)
class Sample:
    """Documents in the order of their priorities, which is random, and counts of what was read."""

    documents: list[str]
    report: SampleReport


@dataclass(frozen=True)
class _Job:
    """One file to be read, and everything that its part of the sample depends on. limit: bytes that it may give."""

    path: str
    size: int
    mtime: int
    seed: int
    max_bytes: int
    limit: int
    reading: Reading

    @property
    def key(self) -> str:
        return sha256_of_json([_FORMAT, asdict(self)])[:32]


def sample_documents(
    paths: Sequence[str | Path],
    *,
    max_bytes: int,
    seed: int = 0,
    separator: Separator = "blank line",
    controls: Controls = "refuse",
    field: str | None = None,
    cache: Path | None = None,
    processes: int | None = None,
    on_progress: OnProgress | None = None,
) -> Sample:
    """A sample of at most `max_bytes` UTF-8 bytes from the texts of files and globs; all texts if they fit.

    It depends only on the files' names and content, `max_bytes`, `seed`, and `separator`, `controls` and `field` (see
    `data.read.shards.text_files`). Texts are normalised to NFC. cache: a directory that keeps the part of each file
    until the sample is complete, and then the sample; None keeps nothing. processes: by default one per core.
    on_progress: called now and then with (bytes read, bytes of all files), on disk.

    Each process holds at most `max_bytes` of text and one document in memory. Raises UserError as the readers do, and
    if the files have no document or none that fits.
    """
    if max_bytes < 1:
        raise UserError(f"a sample of {max_bytes} bytes holds nothing: ask for at least 1")
    readings = {
        str(file.absolute()): replace(reading, path=str(file.absolute()))
        for path in paths
        for file, reading in text_files(path, separator=separator, controls=controls, field=field).items()
    }
    jobs = _jobs(readings, max_bytes, seed)
    key = hashlib.sha256(" ".join(job.key for job in jobs).encode()).hexdigest()[:32]
    with tempfile.TemporaryDirectory() if cache is None else nullcontext(str(cache)) as directory:
        sample = Path(directory) / f"sample-{key}.jsonl"
        sample.parent.mkdir(parents=True, exist_ok=True)
        if not sample.is_file():
            _make_sample(sample, jobs, max_bytes, processes, on_progress)
        report = SampleReport(**_header(sample)["report"])
        texts = [json.loads(text) for _, _, text in _items(sample)]
    if on_progress is not None:
        total = sum(job.size for job in jobs)
        on_progress(total, total)
    if not texts:
        what = f"only documents of more than {max_bytes:,} bytes" if report.documents else "no documents"
        fix = "take a larger sample, or a document a line" if report.documents else "give files with text in them"
        raise UserError(f"{', '.join(map(str, paths))} has {what}: {fix}")
    return Sample(texts, report)


def _jobs(readings: dict[str, Reading], max_bytes: int, seed: int) -> list[_Job]:
    """A job for each file of `readings` (path -> reading), in the order of their paths."""
    files = sorted(readings)
    stats = [os.stat(file) for file in files]
    total = sum(stat.st_size for stat in stats)
    return [
        _Job(
            file,
            stat.st_size,
            stat.st_mtime_ns,
            seed,
            max_bytes,
            min(max_bytes, _LEAST + _MARGIN * max_bytes * stat.st_size // max(total, 1)),
            readings[file],
        )
        for file, stat in zip(files, stats, strict=True)
    ]


def _make_sample(
    sample: Path, jobs: list[_Job], max_bytes: int, processes: int | None, on_progress: OnProgress | None
) -> None:
    """Write the sample of all jobs to `sample`; the parts of the files are next to it until it is complete."""

    def part_of(job: _Job) -> Path:
        return sample.with_name(f"part-{job.key}.jsonl")

    parts = {job: part_of(job) for job in jobs}
    _read_all(jobs, parts, processes, on_progress)
    cut, short = _merged(jobs, parts, max_bytes)
    if short:
        again = {job: replace(job, limit=max_bytes) for job in short}
        parts |= {job: part_of(job) for job in again.values()}
        _read_all(list(again.values()), parts, processes, on_progress)
        jobs = [again.get(job, job) for job in jobs]
        cut, _ = _merged(jobs, parts, max_bytes)
    _write_sample(sample, [parts[job] for job in jobs], cut)
    for part in parts.values():
        part.unlink(missing_ok=True)


# --- one file -------------------------------------------------------------------------------------------------------


class _Lowest:
    """The items of the lowest priorities whose sizes add up to at most `limit`, and the lowest that was left out."""

    def __init__(self, limit: int) -> None:
        self.cut: int | None = None
        self._limit, self._size = limit, 0
        self._heap: list[tuple[int, int, str]] = []  # minus the priority: the highest is at the top

    def add(self, priority: int, size: int, text: str = "") -> None:
        if self.cut is not None and priority >= self.cut:
            return
        heapq.heappush(self._heap, (-priority, size, text))
        self._size += size
        while self._size > self._limit:
            highest, removed, _ = heapq.heappop(self._heap)
            self.cut = -highest
            self._size -= removed

    def items(self) -> list[tuple[int, int, str]]:
        """(priority, size, text) in the order of priorities, all below `cut`."""
        kept = ((-negative, size, text) for negative, size, text in self._heap)
        return sorted(item for item in kept if self.cut is None or item[0] < self.cut)


def _priority(seed: int, name: str, line: int, text: bytes) -> int:
    # The name without its directory, as a corpus may be moved.
    head = json.dumps([seed, name, line]).encode()
    return int.from_bytes(hashlib.blake2b(head + b"\0" + text, digest_size=16).digest())


def _read_file(job: _Job, part: Path, on_read: Callable[[int], None]) -> None:
    """Write the part of one file: a line with its counts, then its documents in the order of priorities."""
    collector = Collector(job.reading.controls)
    lowest = _Lowest(job.limit)
    name = Path(job.path).name
    documents = size = normalised = too_long = 0
    for found, place in iter_texts(Path(job.path), job.reading, collector, longest=job.max_bytes, on_read=on_read):
        documents += 1
        if found is None:
            too_long += 1
            continue
        text = unicodedata.normalize("NFC", found)
        normalised += text != found
        data = text.encode()
        if len(data) > job.max_bytes:
            too_long += 1
            continue
        size += len(data)
        lowest.add(_priority(job.seed, name, place.line, data), len(data), text)
    report = SampleReport(1, documents, size, normalised, collector.removed, too_long)
    _write(part, report, lowest.cut, lowest.items())


def _write(path: Path, report: SampleReport, cut: int | None, items: Iterable[tuple[int, int, str]]) -> None:
    with whole(path, shared=True) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"report": asdict(report), "cut": cut}) + "\n")
        for priority, size, text in items:
            file.write(f"{priority} {size} {json.dumps(text, ensure_ascii=False)}\n")


def _header(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        header: dict[str, Any] = json.loads(file.readline())
    return header


def _items(path: Path) -> Iterator[tuple[int, int, str]]:
    """(priority, size, text as JSON) of a file that `_write` wrote."""
    with path.open(encoding="utf-8", newline="\n") as file:
        file.readline()
        for line in file:
            priority, size, text = line.split(" ", 2)
            yield int(priority), int(size), text


# --- all files ------------------------------------------------------------------------------------------------------


def _read_all(
    jobs: Sequence[_Job], parts: dict[_Job, Path], processes: int | None, on_progress: OnProgress | None
) -> None:
    """Write the parts that do not exist yet, in several processes if that is worth it."""
    total = sum(job.size for job in jobs)
    todo = [job for job in jobs if not parts[job].is_file()]
    done = total - sum(job.size for job in todo)

    def report(read: int) -> None:
        if on_progress is not None:
            on_progress(done + read, total)

    report(0)
    if processes is None:
        processes = cores() if total >= _WORTH else 1
    if min(processes, len(todo)) <= 1:
        for job in todo:
            _read_file(job, parts[job], report)
            done += job.size
        return
    run_in_processes(
        _read_in_process,
        # The largest first, so that no core is left working alone on a large one at the end.
        sorted(todo, key=lambda job: -job.size),
        min(processes, len(todo)),
        arguments=(parts,),
        on_progress=lambda _, read: report(read),
        if_killed="run again, with more memory, or with a smaller sample",
    )


def _read_in_process(job: _Job, parts: dict[_Job, Path]) -> None:
    counted = 0

    def on_read(read: int) -> None:
        nonlocal counted
        add_progress(read - counted)
        counted = read

    _read_file(job, parts[job], on_read)
    on_read(job.size)


def _merged(jobs: Sequence[_Job], parts: dict[_Job, Path], max_bytes: int) -> tuple[int | None, list[_Job]]:
    """The lowest priority that the sample has no room for, and the files that left out a lower one."""
    lowest = _Lowest(max_bytes)
    for job in jobs:
        for priority, size, _ in _items(parts[job]):
            lowest.add(priority, size)
    cuts = {job: _header(parts[job])["cut"] for job in jobs}
    short = [job for job, cut in cuts.items() if cut is not None and (lowest.cut is None or cut < lowest.cut)]
    return lowest.cut, short


def _write_sample(path: Path, parts: Sequence[Path], cut: int | None) -> None:
    reports = [SampleReport(**_header(part)["report"]) for part in parts]
    found = [item for part in parts for item in _items(part) if cut is None or item[0] < cut]
    kept = [(priority, size, json.loads(text)) for priority, size, text in sorted(found)]
    sums = {name: sum(getattr(report, name) for report in reports) for name in asdict(reports[0])}
    sums |= {"kept_documents": len(kept), "kept_bytes": sum(size for _, size, _ in kept)}
    _write(path, SampleReport(**sums), cut, kept)
