"""Asks a model in English what the world holds, and writes what it knows: python examples/world/ask.py MODEL OUT

MODEL is a run's directory (its original model is asked) or a Hugging Face directory. OUT gets a line for each question:
{kind, key, question, right, answer}. `make.py --known OUT` then asks only for what was answered rightly, of the kinds
of which at least half was. An answer is right if its first sentence is: what is named by the way in a long answer is
not known. The share of right answers is printed by kind. Answers are greedy; a question is asked in the first of its
ways. `--other-ways` asks in the others, too, and writes the short answers ({kind, key, question, way, answer}): they
say which instructions `make.py` puts first.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from names import facts
from world import Question, messages, questions, world_of

from transllm_jax.commands.open_chat import open_chat_model
from transllm_jax.evaluation.answers import Checkable, Judge
from transllm_jax.generation.chain import ChainChat
from transllm_jax.generation.engine import Engine


def _checkable(row: Question, phrases: bool) -> Checkable:
    """A question in English; one of another kind than is judged has no accepted text."""
    judged = (row.kind == "larger") == phrases
    return Checkable(row.ways[0].english, row.accepted[0] if judged else [], row.kind)


def first_sentence(answer: str) -> str:
    return re.split(r"(?<=[.!?])\s|\n", answer.strip(), maxsplit=1)[0]


# Characters: a longer answer is not one of those that answers.jsonl holds.
SHORT = 90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--other-ways", action="store_true", help="also ask in the other ways")
    given = parser.parse_args()
    asked = list(questions(world_of("en"), list(facts())))
    model = open_chat_model(given.model, base=(given.model / "run.yaml").is_file())
    engine = Engine(model.split, model.config, batch_size=given.batch)
    chat = ChainChat(engine, model.tokenizer, model.markers, max_new_tokens=given.max_new_tokens)
    # The phrases that are accepted of `larger` hold the accepted texts of other kinds, and would hide them there.
    judges = [Judge(_checkable(row, phrases) for row in asked) for phrases in (False, True)]
    turns = [(number, 0) for number in range(len(asked))]
    if given.other_ways:
        turns += [(number, way) for number, row in enumerate(asked) for way in range(1, len(row.ways))]
    total, known = Counter[str](), Counter[str]()
    with given.out.open("w", encoding="utf-8") as out:
        for start in range(0, len(turns), given.batch):
            batch = turns[start : start + given.batch]
            conversations = [
                messages([line.english for line in (*asked[number].history, asked[number].ways[way])])
                for number, way in batch
            ]
            answers = chat.answers(conversations, fallback=False)
            for (number, way), answer in zip(batch, answers, strict=True):
                row = asked[number]
                written: dict[str, object] = {"kind": row.kind, "key": row.fact.key, "question": row.ways[way].english}
                if way == 0:
                    right = judges[row.kind == "larger"].is_right(number, first_sentence(answer.raw))
                    written["right"] = right
                    total[row.kind] += 1
                    known[row.kind] += right
                elif len(answer.raw) > SHORT or answer.cut_off:
                    continue
                else:
                    written["way"] = way
                out.write(json.dumps(written | {"answer": answer.raw}, ensure_ascii=False) + "\n")
            out.flush()
            print(f"{start + len(batch)} of {len(turns)}", file=sys.stderr, flush=True)
    for kind, count in total.items():
        print(f"{kind:20}{known[kind]:5} of {count:4}  {known[kind] / count:.0%}")


if __name__ == "__main__":
    main()
