"""Asks a model in English what the world holds, and writes what it knows: python examples/world/ask.py MODEL OUT

MODEL is a run's directory (its original model is asked) or a Hugging Face directory. OUT gets a line for each question
that was answered rightly: {kind, key}. `make.py --known OUT` then asks only for these. The
share of right answers is printed by kind. Answers are greedy; a question is asked in the first of its ways.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from make import World, in_the_first_way, questions
from names import HERE, Names, facts

from transllm_jax.commands.chat import open_session
from transllm_jax.evaluation.answers import Checkable, Judge
from transllm_jax.tokenizer.chat import Message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    english = yaml.safe_load((HERE / "english.yaml").read_text(encoding="utf-8"))
    world = World(Names("en", english), Names("en", english))
    asked = in_the_first_way(list(questions(world, list(facts()))))
    session = open_session(given.model, base=(given.model / "run.yaml").is_file(), max_new_tokens=given.max_new_tokens)
    judge = Judge(Checkable(row["question_en"], row["answers_en"], row["kind"]) for row in asked)
    total, known = Counter[str](), Counter[str]()
    with given.out.open("w", encoding="utf-8") as out:
        for start in range(0, len(asked), given.batch):
            rows = asked[start : start + given.batch]
            conversations: list[list[Message]] = [
                [*row.get("history_en", []), {"role": "user", "content": row["question_en"]}] for row in rows
            ]
            answers = session.chat.answers(conversations, fallback=False)
            for number, (row, answer) in enumerate(zip(rows, answers, strict=True), start):
                total[row["kind"]] += 1
                if judge.is_right(number, answer.raw):
                    known[row["kind"]] += 1
                    out.write(json.dumps({"kind": row["kind"], "key": row["key"]}) + "\n")
            out.flush()
            print(f"{start + len(rows)} of {len(asked)}", file=sys.stderr, flush=True)
    for kind, count in total.items():
        print(f"{kind:20}{known[kind]:5} of {count:4}  {known[kind] / count:.0%}")


if __name__ == "__main__":
    main()
