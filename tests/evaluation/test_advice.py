"""The findings of a run: each appears from made-up numbers, not just below its bound, and names keys that exist."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from transllm_jax.config import Config, Section
from transllm_jax.evaluation.advice.findings import MOST, findings
from transllm_jax.evaluation.advice.recorded import PAGE, Finding, Recorded, Training

ROOT = Path(__file__).parents[2]
POINTS = ("base", "vocabulary", "pretrain", "translate", "transfer")
SETTINGS: dict[str, Any] = {
    "language": {"name": "Thai"},
    "vocabulary": {"size": 4000, "initial_rows": "mean"},
    "pretrain": {"learning_rate": 2e-3, "steps": 60, "length": 256, "validation": None},
    "recover": {"max_new_tokens": 64, "keep_unfinished": False},
    "transfer": {"english": 0.1},
    "evaluation": {"max_chain_tokens": 160},
}


def losses(*values: float, padded: float = 0.0) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss, "padded_fraction": padded} for step, loss in enumerate(values, 1)]


def noisy(start: float, end: float, count: int = 60, noise: float = 0.05, seed: int = 0) -> list[float]:
    """Losses along a line, with normal noise that is the same for each seed."""
    draw = random.Random(seed)
    return [start + (end - start) * step / (count - 1) + draw.gauss(0, noise) for step in range(count)]


def validations(*bits: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * place, "bits_per_byte": value} for place, value in enumerate(bits, 1)]


def measured(**by_measure: tuple[float | None, ...]) -> dict[str, dict[str, float | None]]:
    """Values at the points base, vocabulary, pretrain, translate, transfer."""
    return {measure: dict(zip(POINTS, values, strict=True)) for measure, values in by_measure.items()}


def spent(stage: str = "pretrain", lost: float = 0.0, **seconds: float) -> dict[str, Any]:
    return {"stages": {stage: {"total": sum(seconds.values()) + lost, "seconds": seconds, "lost": lost}}}


def chains(answers: int, well_formed: int, different: int, cut_off: int, broken_off: int = 0) -> dict[str, int]:
    return {
        "broken_off": broken_off,
        "answers": answers,
        "well_formed": well_formed,
        "different_questions": different,
        "cut_off": cut_off,
    }


def asked(count: int = 100, **reasons: int) -> dict[str, Any]:
    """Questions of two kinds, half of each count in each."""
    whole = {"asked": count, "asked_in_english": count, "right_in_english": count // 2, **reasons}
    half = {name: number // 2 for name, number in whole.items()}
    return {"asked": {"transfer": {"capital": half, "": {name: whole[name] - half[name] for name in whole}}}}


def stage(name: str = "pretrain", **parts: Any) -> dict[str, Any]:
    return {"training": {name: Training(**parts)}}


def source(epochs: float) -> dict[str, Any]:
    return {"chains": {"epochs": epochs}, "1 text.txt": {"epochs": 0.4}}


def vocabulary(after: float, half: float, rare: int) -> dict[str, Any]:
    report = {"tokens_per_character_after": after, "tokens_per_character_half": half}
    return {"vocabulary": {**report, "new_tokens": 4000, "produced_less_than_10": rare}}


# For each topic, and each way to it: numbers that give it, what it says, and numbers just below the bound.
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    (
        "Updates were skipped",
        stage(losses=losses(*[3.0] * 9), skipped=1),
        "not finite in 1 of 9 steps",
        stage(losses=losses(*[3.0] * 9), skipped=0),
    ),
    (
        "The loss rises",
        stage(losses=losses(*noisy(4, 3, 60), *noisy(3.3, 3.5, 30))),
        r"rose from 3\.[0-2]\d\d to 3\.4\d\d",
        stage(losses=losses(*noisy(4, 3, 60), *noisy(3.03, 3.03, 30))),
    ),
    (
        "The loss does not fall",
        stage(losses=losses(*noisy(3, 3, 60))),
        r"was [23]\.\d+ in the first third of 60 steps and [23]\.\d+ in the last",
        stage(losses=losses(*noisy(3, 2.8, 60))),
    ),
    (
        "Chains do not end",
        {"chains": chains(30, 20, 18, 9, 5)},
        "9 of 30 answers were cut off after 160 tokens",
        {"chains": chains(30, 20, 18, 9, 4)},
    ),
    (
        "Chains do not end",
        {"chains": chains(30, 29, 25, 15)},
        "15 of 30 answers",
        {"chains": chains(30, 29, 25, 14)},
    ),
    (
        "Chains are not well-formed",
        {"chains": chains(30, 26, 20, 9, 1)},
        "86.7 % of 30 answers",
        {"chains": chains(30, 27, 20, 1)},
    ),
    (
        "The chains are alike",
        {"chains": chains(10, 10, 4, 0)},
        "10 well-formed chains have 4 different English questions",
        {"chains": chains(10, 10, 5, 0)},
    ),
    (
        "Questions are misread",
        asked(misread=20, english=19, translation=19),
        "20 % of 100 questions became another question",
        asked(misread=19),
    ),
    (
        "English answers in chains are wrong",
        asked(english=21, misread=20),
        "21 % of 100 questions were understood, and answered wrongly in English; asked in English, 50 of 100 are right",
        asked(english=21, misread=22),
    ),
    (
        "Answers are mistranslated",
        asked(20, translation=4),
        "20 % of 20 questions were answered rightly in English",
        asked(19, translation=19),
    ),
    (
        "Fluency was lost",
        {"metrics": measured(bits_per_byte=(1.6, 1.2, 1.0, 1.06, 1.06))},
        "1.060 bits per byte after translate, 6 % more than before it (1.000)",
        {"metrics": measured(bits_per_byte=(1.6, 1.2, 1.0, 1.04, 1.08))},
    ),
    (
        "Translation was unlearned",
        {"metrics": measured(chrf_to_target=(0, 0, 0, 20, 17.9))},
        "chrF into Thai fell from 20.0 after translate to 17.9",
        {"metrics": measured(chrf_to_target=(0, 0, 0, 20, 18.1), chrf_to_english=(0, 0, 0, 9.9, 1))},
    ),
    (
        "English answers drift",
        {"metrics": measured(english_kl=(0, 0, 0.5, 0.4, 0.31))},
        "KL of 0.310 per token (after translate: 0.400)",
        {"metrics": measured(english_kl=(0, 0, 0.5, 0.4, 0.29))},
    ),
    (
        "New rows begin badly",
        {"metrics": measured(bits_per_byte=(1.5, 1.51, 1.3, None, None))},
        "1.510 bits per byte before any training (initial_rows: mean), and 1.500",
        {"metrics": measured(bits_per_byte=(1.5, 1.51, 1.2, None, None))},
    ),
    (
        "New rows begin badly",
        {"metrics": measured(bits_per_byte=(1.5, 1.51, None, None, None))},
        "1.510",
        {"metrics": measured(bits_per_byte=(1.5, 1.49, None, None, None))},
    ),
    ("The vocabulary is small", vocabulary(0.4, 0.501, 0), "saved 20 %", vocabulary(0.4, 0.499, 0)),
    (
        "The vocabulary is large for its corpus",
        vocabulary(0.4, 0.45, 2001),
        "2,001 of 4,000 new tokens occur less than ten times",
        vocabulary(0.4, 0.45, 2000),
    ),
    (
        "The vocabulary is large for its corpus",
        vocabulary(0.4, 0.41, 0),
        "second half of 4,000 new tokens saves 2.4 %",
        vocabulary(0.4, 0.4125, 0),
    ),
    (
        "Answers were cut off",
        {"recover": {"answers": 100, "unfinished": 11}},
        "11 of 100 answers",
        {"recover": {"answers": 100, "unfinished": 10}},
    ),
    (
        "The best checkpoint came early",
        stage(validation=validations(1.5, 1.0, 1.01, 1.02)),
        "best at step 20 of 40, with 1.000 bits per byte; at the end it was 1.020",
        stage(validation=validations(1.5, 1.2, 1.0, 1.02)),
    ),
    (
        "The best checkpoint came early",
        stage(validation=validations(1.5, 1.0, None, 1.2, 1.02)),
        "best at step 20 of 50",
        stage(validation=validations(1.5, 1.0, 1.0, 1.005)),
    ),
    (
        "Text was read many times",
        stage("transfer", sources=source(4.1)),
        "chains was read 4.1 times",
        stage("transfer", sources=source(4.0)),
    ),
    (
        "Much padding",
        stage(losses=losses(*noisy(4, 3, 50), padded=0.26)),
        "26 % of the computed tokens are padding: the examples do not fill rows of 256",
        stage(losses=losses(*noisy(4, 3, 50), padded=0.24)),
    ),
    *(
        (
            "Time goes elsewhere",
            {**stage(), "ledger": spent(**{kind: 101.0, "step": 1010 / share - 101})},
            what,
            {**stage(), "ledger": spent(**{kind: 99.0, "step": 1010 / share - 99})},
        )
        for kind, what, share in (
            ("data", "waiting for data", 1.01),
            ("save", "10 % of the stage's time went into saving checkpoints", 1.01),
            ("lost", "steps that restarts repeated", 1.01),
        )
    ),
    (
        "Time goes elsewhere",
        {**stage(), "ledger": spent(validate=201.0, step=799.0)},
        "20 % of the stage's time went into validation",
        {**stage(), "ledger": spent(validate=199.0, step=801.0)},
    ),
    (
        "Time goes elsewhere",
        {**stage(), "ledger": spent(compile=201.0, step=799.0)},
        "went into compiling",
        {**stage(), "ledger": spent(compile=120.0, step=479.0)},
    ),
]


def found(parts: dict[str, Any], topic: str) -> list[Finding]:
    record = Recorded(settings=SETTINGS, **parts)
    return [finding for finding in findings(record) if finding.topic == topic]


@pytest.mark.parametrize(("topic", "parts", "says", "below"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)])
def test_a_finding_appears_and_not_below_its_bound(
    topic: str, parts: dict[str, Any], says: str, below: dict[str, Any]
) -> None:
    (finding,) = found(parts, topic)
    assert says in finding.what or re.search(says, finding.what), finding.what
    assert finding.turn.endswith(".")
    assert found(below, topic) == []


def section_of(annotation: Any) -> type[Section] | None:
    """The section in a field's type, such as that of `list[Source]` or of `Validation | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := section_of(part)) is not None), None)


def exists(key: str) -> bool:
    """Whether the config has this dotted key."""
    here: type[Section] | None = Config
    for name in key.split("."):
        if here is None or name not in here.model_fields:
            return False
        here = section_of(here.model_fields[name].annotation)
    return True


def begin_badly(way: str) -> list[Finding]:
    """What is found of new rows with more bits per byte than the original model's, if they began in this way."""
    settings = {**SETTINGS, "vocabulary": {"initial_rows": way}}
    worse = measured(bits_per_byte=(1.5, 1.51, None, None, None))
    return [f for f in findings(Recorded(settings=settings, metrics=worse)) if f.topic == "New rows begin badly"]


def test_rows_that_begin_well_already_are_not_told_to() -> None:
    (finding,) = begin_badly("calibrated")
    assert "aligned" not in finding.turn and "vocabulary.initial_rows" not in str(finding)


def test_aligned_rows_begin_with_more_bits_per_byte_on_purpose() -> None:
    assert begin_badly("mean") and begin_badly("aligned") == []


def test_every_key_exists() -> None:
    assert exists("transfer.validation.every") and not exists("transfer.validation.often") and not exists("seed.x")
    for stage_name in ("pretrain", "translate", "transfer"):
        for topic, parts, _, _ in CASES:
            if "training" in parts:
                (training,) = parts["training"].values()
                parts = {**parts, "training": {stage_name: training}}
                if "ledger" in parts:
                    (times,) = parts["ledger"]["stages"].values()
                    parts["ledger"] = {"stages": {stage_name: times}}
            for finding in found(parts, topic):
                # Compiled programs are kept where an environment variable says.
                assert finding.keys or "JAX_COMPILATION_CACHE_DIR" in finding.turn
                assert [key for key in finding.keys if not exists(key)] == []


def test_the_page_has_a_section_on_each() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    for topic in {topic for topic, *_ in CASES}:
        assert re.search(rf"^### {re.escape(topic)}$", page, re.MULTILINE), topic
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert sorted(headings) == sorted({topic for topic, *_ in CASES}), "a section on something that is never found"


def test_noise_and_short_stages_are_no_finding() -> None:
    """What falls, however noisily, does not count as flat or rising, and neither do a few steps."""
    for start, end, count, noise in ((7.3, 6.9, 50, 0.2), (5, 4.4, 90, 0.8), (3, 2.9, 1000, 0.1)):
        records = [Recorded(**stage(losses=losses(*noisy(start, end, count, noise, seed)))) for seed in range(100)]
        # Now and then, noise hides a fall: in the first of these it is half as large as the fall.
        assert sum(findings(record) != [] for record in records) <= 3, start
    assert findings(Recorded(**stage(losses=losses(*[3.0] * 49)))) == []
    assert findings(Recorded(**stage(losses=losses(*noisy(3, 9, 49))))) == []
    # It fell within its first steps, and then stayed.
    assert findings(Recorded(**stage(losses=losses(*noisy(5, 3, 10), *noisy(3, 3, 600))))) == []


def test_the_demo_before_it_learns_to_read() -> None:
    """The numbers of the demo of version 0.1.0, as docs/reading-a-run.md gives them."""
    record = Recorded(
        settings=SETTINGS,
        metrics=measured(
            bits_per_byte=(1.660, 1.233, 1.160, 1.187, 1.180),
            english_kl=(0, 0, 0.843, 0.786, 0.520),
            chrf_to_target=(0.2, 0.2, 0.0, 3.5, 5.8),
        ),
        chains=chains(30, 30, 1, 0),
        recover={"answers": 160, "unfinished": 71},
        **vocabulary(0.321, 0.392, 565),
    )
    topics = [finding.topic for finding in findings(record)]
    assert topics == ["The chains are alike", "English answers drift", "Answers were cut off"]


def test_nothing_is_found_where_nothing_was_recorded() -> None:
    assert findings(Recorded()) == []
    odd = {name: dict.fromkeys(POINTS) for name in ("bits_per_byte", "english_kl")}
    assert findings(Recorded(metrics=odd, ledger={"stages": None}, chains={"answers": 0}, recover={"answers": 0})) == []


def test_a_patience_or_a_validation_that_improves_needs_no_advice() -> None:
    settings = {"pretrain": {"validation": {"patience": 2}}}
    early = stage(validation=validations(1.5, 1.0, 1.2, 1.3))
    assert findings(Recorded(settings=settings, **early)) == []
    kept = {"recover": {"keep_unfinished": True}}
    assert findings(Recorded(settings=kept, recover={"answers": 9, "unfinished": 9})) == []
    better = stage("transfer", sources=source(9.0), validation=validations(1.5, 1.4))
    assert findings(Recorded(**better)) == []


def test_one_on_each_topic_and_five_at_most() -> None:
    read = {name: Training(sources=source(epochs)) for name, epochs in (("translate", 5.0), ("transfer", 8.0))}
    (finding,) = findings(Recorded(training=read))
    assert (finding.stage, finding.what) == (
        "transfer",
        "chains was read 8.0 times. So was one other source, more than 4 times.",
    )
    everything: dict[str, Any] = {"training": {}}
    for _, parts, _, _ in CASES:
        for name, part in copy.deepcopy(parts).items():
            everything.setdefault(name, {}).update(part)
    topics = [finding.topic for finding in findings(Recorded(settings=SETTINGS, **everything))]
    assert len(topics) == len(set(topics)) == MOST


def test_a_finding_is_written_with_the_present_values_of_its_keys() -> None:
    record = Recorded(settings=SETTINGS, metrics=measured(english_kl=(0, 0, 0.5, 0.4, 0.6)))
    (finding,) = findings(record)
    written = finding.written(record)
    assert written["stage"] == "transfer" and written["keys"]["transfer.english"] == 0.1
    assert written["keys"]["translate.sources"] is None
