"""What the commands `transllm tokenizer ...` do: expand a vocabulary, and measure what texts cost in tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transllm_jax.choices import Controls, Cuts, Separator
from transllm_jax.commands.open_tokenizer import OpenedTokenizer, open_tokenizer
from transllm_jax.data.read.files import resolve
from transllm_jax.data.read.sample import Sample, sample_documents
from transllm_jax.data.read.shards import text_files
from transllm_jax.disk import cache_directory, read_model_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.page.plots import cost_plot
from transllm_jax.evaluation.token_cost import WORDS, cost_table, costs, cut, example_table, example_words, texts_of
from transllm_jax.new_directory import check_destination, new_directory
from transllm_jax.progress import Phases, Progress
from transllm_jax.tokenizer.growing.expand import Expansion, changed, expand, save_expanded
from transllm_jax.tokenizer.growing.growth import check_markers
from transllm_jax.tokenizer.growing.icu_words import check_icu
from transllm_jax.tokenizer.growing.runs import check_supported
from transllm_jax.tokenizer.llama_cpp import AS_TRAINED, OTHER_IDS, override_message, rebuilt_message
from transllm_jax.tokenizer.rewritten import rewritten_letters_message
from transllm_jax.tokenizer.scripts import Script, script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer

_CACHED_SAMPLES = 64 << 20  # the sample of a corpus of at least this many bytes is kept in the cache
_SHOWN_TEXT = 4_000_000  # characters of the training text that costs and examples are measured on
_EXAMPLES, _CANDIDATES = 6, 500  # words shown: the first that the base cuts, among the most frequent
_WITHOUT_SCORES = (
    "transformers and vLLM read the ids; llama.cpp takes the order of merges from tokenizer.model, which the base lacks"
)
_PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Learning:
    """What a vocabulary is learned from, and how.

    sample: bytes of UTF-8 text. scripts: names that replace the language's usual scripts. separator, controls, field:
    see `data.read.shards.text_files`. cuts, within_words: see `expand`.
    """

    corpus: Sequence[str]
    language: str
    scripts: Sequence[str] = ()
    markers: Sequence[str] = ()
    min_count: int = 2
    cuts: Cuts | None = None
    within_words: bool = False
    sample: int = 100_000_000
    seed: int = 0
    separator: Separator = "blank line"
    controls: Controls = "refuse"
    field: str | None = None


def expand_vocabulary(
    source: str,
    dst: Path,
    size: int,
    learning: Learning,
    progress: Progress,
    *,
    english: Sequence[str] = (),
    held_out: Sequence[str] = (),
    force: bool = False,
) -> None:
    """Write a tokenizer directory: the base `source` with `size` new tokens, and a report.json.

    english: files in which the texts that get other ids are counted. held_out: files whose cost is measured before and
    after (by default the training text). In records, the text is in `learning.field`. Raises UserError if any of these
    is wrong; then, and after a kill, nothing is at `dst`.
    """
    _check_used([*learning.corpus, *english, *held_out], learning.separator, learning.field)
    reads = [file for path in (*learning.corpus, *english, *held_out) for file in resolve(path)]
    local = Path(source).expanduser()
    check_destination(dst, overwrite=force, reads=[*reads, local] if local.exists() else reads)
    with tempfile.TemporaryDirectory() as scratch, new_directory(dst, overwrite=force) as directory:
        base = open_tokenizer(source, Path(scratch) / "base", _say(progress))
        script = _check_learning(base.tokenizer, [size], learning, [*english, *held_out])
        sample = _read_sample(learning, progress)
        expansion = _learn(base, sample.documents, size, learning, progress)
        new = expansion.tokenizer
        files = save_expanded(new, base.directory, directory)

        def texts(path: str) -> Iterator[str]:
            return texts_of(path, learning.controls, learning.field, learning.separator)

        training_text = _first_documents(sample.documents)
        measured = {path: costs([base.tokenizer, new], texts(path)) for path in held_out}
        if not measured:
            measured = {"the training text": costs([base.tokenizer, new], training_text)}
        frequent = example_words(script, training_text, _CANDIDATES)
        words = [word for word in frequent if len(base.tokenizer.encode(word, specials=False)) > 1][:_EXAMPLES]
        counted = {path: changed(base.tokenizer, new, texts(path)) for path in english}
        report = {
            **expansion.report,
            "base": str(local.resolve()) if local.exists() else source,
            "name": script.language,
            "scripts": list(script.scripts),
            "shared_bytes_with": list(script.shared),
            "corpus": list(learning.corpus),
            "seed": learning.seed,
            "sample": asdict(sample.report),
            "measured": {
                name: {"before": before.as_json(), "after": after.as_json()}
                for name, (before, after) in measured.items()
            },
            "english_changed": _sum(counted) if counted else None,
            "english_files": counted,
            "examples": {word: [cut(t, word) for t in (base.tokenizer, new)] for word in words},
        }
        write_json(directory / "report.json", report)
    _say_expansion(dst, files, expansion, script, sample, progress)
    if lost := rewritten_letters_message(base.tokenizer, script):
        progress.say(lost)
    short = _short_names(list(measured))
    rows = [
        (short[name], label, cost, before)
        for name, (before, after) in measured.items()
        for label, cost in (("before", before), ("after", after))
    ]
    progress.say(cost_table(rows))
    if words:
        progress.say("")
        progress.say(example_table(words, base.tokenizer, new))
    _say_english(counted, script, progress)


def report_costs(
    sources: Sequence[str],
    files: Sequence[str],
    progress: Progress,
    *,
    base: str | None = None,
    curve: Sequence[int] = (),
    learning: Learning | None = None,
    controls: Controls = "refuse",
    field: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Print what the files' texts cost with each tokenizer, compared with the base; plot it against vocabulary size.

    base: the tokenizer that the others are compared with; by default the one that the first of `sources` was expanded
    from, if it is known and exists, or else the first of `sources`. curve: numbers of new tokens by which the base is
    expanded, with `learning`. field: the field of a record that holds the text. out: a .png, .svg or .pdf file. Raises
    UserError if any of these is wrong.
    """
    if out is not None:
        _check_plot(out, force)
    corpus = [] if learning is None else learning.corpus
    _check_used([*files, *corpus], "blank line" if learning is None else learning.separator, field)
    _check_texts(files, controls, field)
    with tempfile.TemporaryDirectory() as scratch:
        opened = _open_with_base(sources, base, Path(scratch), progress)
        first = opened[0][1]
        rows: list[tuple[str, Tokenizer]] = [(name, found.tokenizer) for name, found in opened]
        if curve:
            assert learning is not None
            added = sorted(set(curve))
            _check_learning(first.tokenizer, added, learning, [])
            sample = _read_sample(learning, progress)
            expansion = _learn(first, sample.documents, added[-1], learning, progress)
            rows += [(f"+{size:,}", expansion.at(size)) for size in added]
        tokenizers = [tokenizer for _, tokenizer in rows]
        measured = {path: costs(tokenizers, texts_of(path, controls, field)) for path in files}
    texts, names = _short_names(files), _short_names([name for name, _ in rows])
    table = [
        (texts[path], names[name], cost, by_tokenizer[0])
        for path, by_tokenizer in measured.items()
        for (name, _), cost in zip(rows, by_tokenizer, strict=True)
    ]
    progress.say(cost_table(table))
    progress.say(f"tokens per character, UTF-8 byte and word; {WORDS}")
    if out is not None:
        sizes = [tokenizer.vocab_size for tokenizer in tokenizers]
        points = {
            texts[path]: [
                (size, cost.per_character, cost.per_byte, cost.per_word)
                for size, cost in zip(sizes, by_tokenizer, strict=True)
            ]
            for path, by_tokenizer in measured.items()
        }
        cost_plot(out, points)
        progress.say(f"plot    {out}")


# --- the parts ------------------------------------------------------------------------------------------------------


def _say(progress: Progress) -> Callable[[str], None]:
    return lambda line: progress.say(line)


def _check_learning(base: Tokenizer, sizes: Sequence[int], learning: Learning, files: Sequence[str]) -> Script:
    """Check what can be checked before a corpus is read; return the language's script. Raises UserError."""
    script = script_of(learning.language, learning.scripts)
    check_supported(json.loads(base.backend.to_str()), base.source)
    check_markers(base, list(learning.markers))
    if learning.within_words:
        check_icu()
    small = [size for size in (*sizes, learning.min_count) if size < 1]
    if small:
        raise UserError(f"{small[0]} is too small: numbers of new tokens and --min-count must be at least 1")
    for path in learning.corpus:
        resolve(path)
    _check_texts(files, learning.controls, learning.field)
    return script


def _check_plot(out: Path, force: bool) -> None:
    """Raises UserError if the plot cannot be written to `out`."""
    if out.suffix not in _PLOTS:
        raise UserError(f"--out {out}: the plot is written as {', '.join(_PLOTS)}; choose a name that ends so")
    if out.exists() and not force:
        raise UserError(f"--out {out} exists; choose another name or ask to overwrite it (--force)")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is not a directory; make it or correct the path")


def _check_texts(files: Sequence[str], controls: Controls, field: str | None) -> None:
    """Raises UserError for texts that cannot be read, before learning, which may take hours."""
    for path in files:
        for _ in texts_of(path, controls, field):
            pass


def _check_used(files: Sequence[str], separator: Separator, field: str | None) -> None:
    """Raises UserError for an option that applies to none of the files."""
    kinds = {reading.container for path in files for reading in text_files(path).values()}
    if field is not None and kinds == {"lines"}:
        raise UserError(f"--field {field} is for records (.jsonl, .json, .parquet), and no file has any: leave it out")
    if separator == "line" and "lines" not in kinds:
        raise UserError("--lines is for text in lines, and all files have records: leave it out")


def _open_with_base(
    sources: Sequence[str], base: str | None, scratch: Path, progress: Progress
) -> list[tuple[str, OpenedTokenizer]]:
    """Open the tokenizers and the base to compare them with: (name, tokenizer) each, the base first if there is one."""
    opened = [(source, open_tokenizer(source, scratch / str(n), _say(progress))) for n, source in enumerate(sources)]
    base = base or _base_of(opened[0][1], progress)
    if base is None:
        return opened
    if base not in sources:
        return [(base, open_tokenizer(base, scratch / "base", _say(progress))), *opened]
    return sorted(opened, key=lambda item: item[0] != base)


def _read_sample(learning: Learning, progress: Progress) -> Sample:
    """Sample the corpus, with a progress bar in bytes; the sample of a large corpus is cached. Raises UserError."""
    total = sum(file.stat().st_size for path in learning.corpus for file in resolve(path))
    with progress.bytes("reading", total) as bar:
        shown = 0

        def update(done: int, _: int) -> None:
            nonlocal shown
            bar.add(max(done - shown, 0))
            shown = max(done, shown)

        return sample_documents(
            learning.corpus,
            max_bytes=learning.sample,
            seed=learning.seed,
            separator=learning.separator,
            controls=learning.controls,
            field=learning.field,
            cache=cache_directory() / "samples" if total >= _CACHED_SAMPLES else None,
            on_progress=update,
        )


def _learn(
    base: OpenedTokenizer, documents: Sequence[str], size: int, learning: Learning, progress: Progress
) -> Expansion:
    tokens = len(base.tokenizer.backend.get_vocab(with_added_tokens=True))
    with Phases(progress) as on_progress:
        return expand(
            base.tokenizer,
            documents,
            size=size,
            language=learning.language,
            scripts=list(learning.scripts),
            markers=list(learning.markers),
            min_count=learning.min_count,
            cuts=learning.cuts,
            within_words=learning.within_words,
            # After the rows of the model's embedding table, if it has more rows than tokens.
            first_id=base.rows if base.rows is not None and base.rows > tokens else None,
            on_progress=on_progress,
        )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"


def _usage(report: dict[str, Any]) -> str:
    """How often the training text uses the new tokens, in words."""
    rare, never = report["produced_less_than_min_count"], report["never_produced"]
    if not rare:
        return f"each new token is produced there at least {_count(report['min_count'], 'time')}"
    parts = f", of which {never} never" if never else ""
    return (
        f"{_count(rare, 'new token')} produced there less than {_count(report['min_count'], 'time')}{parts}: the first "
        "bytes of characters that the base has no token for"
    )


def _reader_lines(report: dict[str, Any], files: Sequence[str]) -> list[str]:
    """Lines that say which programs get the new ids. Only tokenizer.model has the scores of SentencePiece's pieces."""
    everyone = "transformers, vLLM and llama.cpp read the ids"
    if report["kind"] == "sentencepiece":
        return [f"{everyone}, llama.cpp from tokenizer.model" if "tokenizer.model" in files else _WITHOUT_SCORES]
    if report["readers"]["transformers"] == OTHER_IDS:
        lines = [f"{rebuilt_message(report['model_type'])} (--cuts base learns tokens that all read)"]
    elif report["readers"]["llama.cpp"] == AS_TRAINED:
        lines = [f"{everyone}: text is cut where the base cuts it"]
    else:
        lines = [
            "transformers and vLLM read the ids; llama.cpp reads others: it cuts text where the base does (--cuts base "
            "learns tokens that it also reads, and a text takes more of them)"
        ]
        if (instead := report["llama_cpp_stand_in"]) is not None:
            lines.append(override_message(instead))
    if not report["passes_for_base"]:
        lines.append(
            "llama.cpp's converter recognises a tokenizer by the ids of one text, which have changed: add this one to "
            "its get_vocab_base_pre, with the base's pre-tokenizer"
        )
    return lines


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """A short name for each path: its last part, or the whole path if two last parts are equal."""
    last = [Path(path).name for path in paths]
    return dict(zip(paths, last, strict=True)) if len(set(last)) == len(last) else {path: path for path in paths}


def _first_documents(documents: Sequence[str]) -> list[str]:
    """The first documents, of about _SHOWN_TEXT characters."""
    first, size = [], 0
    for document in documents:
        if size >= _SHOWN_TEXT:
            break
        first.append(document)
        size += len(document)
    return first


def _sum(counted: dict[str, dict[str, int]]) -> dict[str, int]:
    return {name: sum(found[name] for found in counted.values()) for name in ("changed", "texts", "more_tokens")}


def _base_of(opened: OpenedTokenizer, progress: Progress) -> str | None:
    """What a tokenizer was expanded from, if its report names it and it exists; for a run, its own base."""
    path = opened.directory / "report.json"
    found = read_model_json(path).get("base") if path.is_file() else None
    for workdir in (opened.directory, opened.directory.parent):
        if found is None and (workdir / "run.yaml").is_file():
            found = str(workdir / "base")
    if not isinstance(found, str) or not Path(found).expanduser().exists():
        return None
    progress.say(f"compared with {found}, which {opened.directory} was expanded from (--base chooses another)")
    return found


# --- messages -------------------------------------------------------------------------------------------------------


def _say_expansion(
    dst: Path, files: Sequence[str], expansion: Expansion, script: Script, sample: Sample, progress: Progress
) -> None:
    report, read = expansion.report, sample.report
    part = "all" if read.kept_bytes == read.bytes else f"{read.kept_bytes / 1e6:,.1f} MB"
    lines = [
        f"{dst}: {_count(report['new_tokens'], 'new token')} for {script.language} ({', '.join(script.scripts)} script)"
        + (f" and {_count(len(report['markers']), 'marker')}" if report["markers"] else "")
        + f"; {report['base_vocabulary']:,} -> {report['vocabulary']:,} tokens; {' and '.join(files)}",
        f"learned from {part} of {_size(read.bytes)} in {_count(read.documents, 'document')}; " + _usage(report),
    ]
    if report["within_words"]:
        lines.append(f"no new token crosses the end of a word, as ICU {report['icu']} finds them")
    lines += _reader_lines(report, files)
    if read.documents == 1:
        lines.append("the corpus is one document: if it has no blank lines, --lines makes each line a document")
    if read.too_long:
        lines.append(f"{read.too_long:,} documents were left out: larger than the sample; --lines may cut them")
    if read.removed:
        lines.append(f"{read.removed:,} control characters were removed")
    if script.shared:
        signs = {"Common", "Inherited"}
        others = [name for name in script.shared if name not in signs]
        others += ["signs of all scripts"] if signs.intersection(script.shared) else []
        lines.append(
            f"some characters share their first bytes with {', '.join(others)}: ids of such text can also change"
        )
    for line in lines:
        progress.say(line)


def _say_english(counted: dict[str, dict[str, int]], script: Script, progress: Progress) -> None:
    if counted:
        progress.say("")
    for path, found in counted.items():
        progress.say(
            f"English  {path}: {found['changed']:,} of {found['texts']:,} texts have other ids"
            + (f" ({found['more_tokens']:+,} tokens)" if found["changed"] else ""),
        )
    if script.latin:
        progress.say(
            "The Latin script is that of English, too: not all English ids can stay."
            + ("" if counted else " --english FILE counts which texts change."),
        )
