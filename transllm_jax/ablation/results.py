"""What each run of an ablation found, as ablation.json keeps it: a file that machines can give to each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transllm_jax.ablation.overlay import tokens_of
from transllm_jax.ablation.plan import Variant
from transllm_jax.ablation.table import BRIDGE, ORIGINAL
from transllm_jax.choices import TRAININGS
from transllm_jax.disk import read_json, sha256_of_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.stages.recorded import MANIFEST
from transllm_jax.stages.steps import artifact

FORMAT = "transllm-ablation-1"
# Measures of a run that are one number, and not one for each question.
NUMBERS = ("english_kl", "bits_per_byte", "chrf_to_target", "chrf_to_english")


@dataclass(frozen=True)
class Asked:
    """How one question was answered; None for what was not asked for or cannot be known. english: asked in English."""

    id: str
    kind: str
    right: bool
    understood: bool | None = None
    chain_english: bool | None = None
    reason: str | None = None
    english: bool | None = None


@dataclass(frozen=True)
class Found:
    """What a run found.

    config: the hash of its config. data: that of the files it read. tokens: it trained on, padding included (None if
    not known). seconds: that it took, without what it shared. shared: the steps it took from other runs.
    """

    name: str
    seed: int | None
    config: str
    data: str
    made_with: Mapping[str, Any]
    tokens: int | None
    seconds: float
    metrics: Mapping[str, float | None]
    counts: Mapping[str, int]
    questions: Sequence[Asked]
    shared: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int | None]:
        """By which results are told apart."""
        return self.name, self.seed


def found_by(variant: Variant, shared: Mapping[str, str], made_with: Mapping[str, Any]) -> Found:
    """What a finished run found."""
    workdir = variant.workdir
    seconds = _seconds(variant, shared)
    if variant.start is not None:
        seconds += _seconds(variant.start.variant, {})
    return Found(
        variant.overlay.name,
        variant.seed,
        variant.config_hash,
        data_hash(workdir),
        made_with,
        _tokens(variant),
        seconds,
        **_measured(workdir / "evaluation" / "transfer"),
        shared=dict(shared),
    )


def original_of(variant: Variant, made_with: Mapping[str, Any]) -> Found:
    """What the original model found, which any run has measured."""
    workdir = variant.workdir
    measured = _measured(workdir / "evaluation" / "base")
    # It does not know the runs' own config.
    return Found(ORIGINAL, None, "", data_hash(workdir), made_with, 0, 0.0, **measured)


def through_of(
    name: str, variant: Variant, items: Sequence[Mapping[str, Any]], seconds: float, made_with: Mapping[str, Any]
) -> Found:
    """What the original found, asked through a run. name: of `table.THROUGH`. variant: the full method. items: the
    answers, in the form of `Asking.judged`."""
    counts = {"questions": len(items)}
    # A bridge needs no more than the stage that translates.
    tokens = tokens_of(variant.config, ("pretrain", "translate")) if name == BRIDGE else _tokens(variant)
    of = variant.config_hash, data_hash(variant.workdir)
    return Found(name, variant.seed, *of, made_with, tokens, seconds, {}, counts, _asked(items))


def _measured(directory: Path) -> dict[str, Any]:
    results = read_json(directory / "results.json")
    metrics = {name: results["metrics"].get(name) for name in NUMBERS}
    return {"metrics": metrics, "counts": results["counts"], "questions": _asked(results["asked"]["questions"])}


def _asked(rows: Iterable[Mapping[str, Any]]) -> list[Asked]:
    found = []
    for number, row in enumerate(rows):
        english = row["english"]
        found.append(
            Asked(
                id=f"{number}-{sha256_of_json([row['question'], row['kind']])[:8]}",
                kind=row["kind"],
                right=row["right"],
                understood=row.get("understood"),
                chain_english=row.get("chain_english"),
                reason=row.get("reason"),
                english=None if english is None else english["right"],
            )
        )
    return found


def _tokens(variant: Variant) -> int | None:
    if variant.start is not None:
        return tokens_of(variant.start.variant.config)
    known = tokens_of(variant.config)
    if known is not None:
        return known
    done = [read_json(variant.workdir / name / MANIFEST)["summary"]["tokens"] for name in TRAININGS]
    return int(sum(done))


def _seconds(variant: Variant, shared: Mapping[str, str]) -> float:
    """The seconds of the steps that a run did itself."""
    total = 0.0
    for step in variant.steps:
        manifest = artifact(variant.workdir, step.name).manifest()
        if manifest is not None and step.name not in shared:
            total += manifest.get("summary", {}).get("seconds", 0.0)
    return total


def data_hash(workdir: Path) -> str:
    """A hash of the held-out files, by content: results can only be compared if these are the same."""
    return data_of((artifact(workdir, "evaluation/base").manifest() or {"inputs": {}})["inputs"])


def data_of(inputs: Mapping[str, Any]) -> str:
    """`data_hash` of the inputs of `evaluation/base`."""
    files = sorted(str(value) for key, value in inputs.items() if " " in key and not key.startswith("after "))
    return sha256_of_json(files)[:16]


def write_found(path: Path, found: Iterable[Found], config: str, does_not_apply: Mapping[str, str]) -> None:
    """Write ablation.json."""
    runs = [asdict(one) for one in found]
    write_json(path, {"format": FORMAT, "config": config, "does_not_apply": dict(does_not_apply), "runs": runs})


def read_found(path: Path) -> list[Found]:
    """The results in an ablation.json. Raises UserError if it is missing, damaged or something else."""
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is not of the format {FORMAT}; give an ablation.json of transllm ablate")
    try:
        return [
            Found(**{**run, "questions": [Asked(**question) for question in run["questions"]]})
            for run in content["runs"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again with transllm ablate") from None


def require_same(found: Found, data: str, where: Path | str) -> None:
    """Raises UserError if results were measured on other held-out files."""
    if found.data != data:
        raise UserError(
            f"{where}: {found.name} was measured on other held-out files than the config names now; only results on "
            "the same files can be compared"
        )
