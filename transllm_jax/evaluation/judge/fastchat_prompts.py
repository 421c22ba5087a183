"""The prompts of FastChat's judge (MT-Bench), word for word, mistakes included: other words would be another measure.

From lm-sys/FastChat, fastchat/llm_judge/data/judge_prompts.jsonl, Apache-2.0 (as this project), by Zheng et al.,
"Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685. Changed only in that sentences which several
prompts share are written once. A test compares each prompt with the SHA-256 of the published one. There are none for
more than two turns; those for more say all of the conversation in the same form.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A judge's prompt. system: the system message. template: the user's message, with places as `{answer}`."""

    system: str
    template: str


_FACTORS = (
    "Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and "
    "level of detail of "
)
_CORRECTNESS = "Your evaluation should consider correctness and helpfulness. "
_RATE = (
    "Be as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 "
    'by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".\n\n'
)
_FAIR = (
    "Avoid any position biases and ensure that the order in which the responses were presented does not influence your "
    "decision. Do not allow the length of the responses to influence your evaluation. Do not favor certain names of "
    "the assistants. Be as objective as possible. After providing your explanation, output your final verdict by "
    'strictly following this format: "[[A]]" if assistant A is better, "[[B]]" if assistant B is better, and "[[C]]" '
    "for a tie."
)
_ONE = (
    "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user "
    "question"
)
_TWO = (
    "Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to the "
    "user question"
)
_MISTAKES = "Identify and correct any mistakes. "

# Blocks of the templates.
_QUESTION = "{question}\n\n"
_REFERENCE = "[The Start of Reference Answer]\n{ref_answer_1}\n[The End of Reference Answer]\n\n"


def _answer(title: str, place: str) -> str:
    return f"[The Start of {title}'s Answer]\n{{{place}}}\n[The End of {title}'s Answer]"


def _conversation(assistant: str, place: str, turns: int) -> str:
    name = f"Assistant {assistant}"
    said = "".join(
        f"### User:\n{{question_{turn}}}\n\n### {name}:\n{{{place}_{turn}}}\n\n" for turn in range(1, turns + 1)
    )
    return f"<|The Start of {name}'s Conversation with User|>\n\n{said}<|The End of {name}'s Conversation with User|>"


def _references(turns: int) -> str:
    said = "".join(
        f"### User:\n{{question_{turn}}}\n\n### Reference answer:\n{{ref_answer_{turn}}}\n\n"
        for turn in range(1, turns + 1)
    )
    return f"<|The Start of Reference Answer|>\n\n{said}<|The End of Reference Answer|>\n\n\n"


_PAIR = _answer("Assistant A", "answer_a") + "\n\n" + _answer("Assistant B", "answer_b")

_ONE_TURN: dict[str, Prompt] = {
    "single-v1": Prompt(
        "You are a helpful assistant.",
        f"[Instruction]\n{_ONE} displayed below. {_FACTORS}the response. Begin your evaluation by providing a short "
        f"explanation. {_RATE}[Question]\n{_QUESTION}{_answer('Assistant', 'answer')}",
    ),
    "single-math-v1": Prompt(
        "You are a helpful assistant.",
        f"[Instruction]\n{_ONE} displayed below. {_CORRECTNESS}You will be given a reference answer and the "
        "assistant's answer. Begin your evaluation by comparing the assistant's answer with the reference answer. "
        f"{_MISTAKES}{_RATE}[Question]\n{_QUESTION}{_REFERENCE}{_answer('Assistant', 'answer')}",
    ),
    "pair-v2": Prompt(
        f"{_TWO} displayed below. You should choose the assistant that follows the user's instructions and answers the "
        f"user's question better. {_FACTORS}their responses. Begin your evaluation by comparing the two responses and "
        f"provide a short explanation. {_FAIR}",
        f"[User Question]\n{_QUESTION}{_PAIR}",
    ),
    "pair-math-v1": Prompt(
        f"{_TWO} displayed below. {_CORRECTNESS}You will be given a reference answer, assistant A's answer, and "
        "assistant B's answer. Your job is to evaluate which assistant's answer is better. Begin your evaluation by "
        f"comparing both assistants' answers with the reference answer. {_MISTAKES}{_FAIR}",
        f"[User Question]\n{_QUESTION}{_REFERENCE}{_PAIR}",
    ),
}


def _of_turns(turns: int) -> dict[str, Prompt]:
    """The prompts for conversations. The published ones have two turns and speak of the second; longer ones, of the
    last."""
    place = "second" if turns == 2 else "last"
    both = _conversation("A", "answer_a", turns) + "\n\n\n" + _conversation("B", "answer_b", turns)
    return {
        "single-v1-multi-turn": Prompt(
            f"{_ONE} displayed below. {_FACTORS}the response. You evaluation should focus on the assistant's answer to "
            f"the {place} user question. Begin your evaluation by providing a short explanation. {_RATE}",
            _conversation("A", "answer", turns),
        ),
        "single-math-v1-multi-turn": Prompt(
            f"{_ONE}. {_CORRECTNESS}You will be given a reference answer and the assistant's answer. You evaluation "
            f"should focus on the assistant's answer to the {place} question. Begin your evaluation by comparing the "
            f"assistant's answer with the reference answer. {_MISTAKES}{_RATE}",
            _references(turns) + _conversation("A", "answer", turns),
        ),
        "pair-v2-multi-turn": Prompt(
            f"{_TWO}s. You should choose the assistant that follows the user's instructions and answers the user's "
            f"questions better. {_FACTORS}their responses. You should focus on who provides a better answer to the "
            f"{place} user question. Begin your evaluation by comparing the responses of the two assistants and "
            f"provide a short explanation. {_FAIR}",
            both,
        ),
        "pair-math-v1-multi-turn": Prompt(
            f"{_TWO}s. {_CORRECTNESS}You will be given reference answers, the assistant A's answers, the assistant B's "
            "answers. Your job is to determine which assistant provides correct and helpful answers to the "
            f"{place} user question. Begin your evaluation by comparing both assistants' answers with the reference "
            f"answers. {_MISTAKES}{_FAIR}",
            _references(turns) + both,
        ),
    }


PROMPTS: dict[str, Prompt] = {**_ONE_TURN, **_of_turns(2)}


def prompt_named(name: str, turns: int) -> Prompt:
    """The prompt of a name, for a conversation of so many turns."""
    return PROMPTS[name] if turns <= 2 else _of_turns(turns)[name]
