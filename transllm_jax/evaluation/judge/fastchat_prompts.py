"""The prompts of FastChat's judge (MT-Bench), word for word, mistakes included: other words would be another measure.

From lm-sys/FastChat, fastchat/llm_judge/data/judge_prompts.jsonl, Apache-2.0 (as this project), by Zheng et al.,
"Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685. Changed only in that sentences which several
prompts share are written once. A test compares each prompt with the SHA-256 of the published one.
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
_REFERENCES = (
    "<|The Start of Reference Answer|>\n\n### User:\n{question_1}\n\n### Reference answer:\n{ref_answer_1}\n\n"
    "### User:\n{question_2}\n\n### Reference answer:\n{ref_answer_2}\n\n<|The End of Reference Answer|>\n\n\n"
)


def _answer(title: str, place: str) -> str:
    return f"[The Start of {title}'s Answer]\n{{{place}}}\n[The End of {title}'s Answer]"


def _conversation(assistant: str, place: str) -> str:
    name = f"Assistant {assistant}"
    return (
        f"<|The Start of {name}'s Conversation with User|>\n\n### User:\n{{question_1}}\n\n### {name}:\n"
        f"{{{place}_1}}\n\n### User:\n{{question_2}}\n\n### {name}:\n{{{place}_2}}\n\n"
        f"<|The End of {name}'s Conversation with User|>"
    )


_PAIR = _answer("Assistant A", "answer_a") + "\n\n" + _answer("Assistant B", "answer_b")
_CONVERSATIONS = _conversation("A", "answer_a") + "\n\n\n" + _conversation("B", "answer_b")

PROMPTS: dict[str, Prompt] = {
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
    "single-v1-multi-turn": Prompt(
        f"{_ONE} displayed below. {_FACTORS}the response. You evaluation should focus on the assistant's answer to the "
        f"second user question. Begin your evaluation by providing a short explanation. {_RATE}",
        _conversation("A", "answer"),
    ),
    "single-math-v1-multi-turn": Prompt(
        f"{_ONE}. {_CORRECTNESS}You will be given a reference answer and the assistant's answer. You evaluation should "
        "focus on the assistant's answer to the second question. Begin your evaluation by comparing the assistant's "
        f"answer with the reference answer. {_MISTAKES}{_RATE}",
        _REFERENCES + _conversation("A", "answer"),
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
    "pair-v2-multi-turn": Prompt(
        f"{_TWO}s. You should choose the assistant that follows the user's instructions and answers the user's "
        f"questions better. {_FACTORS}their responses. You should focus on who provides a better answer to the second "
        "user question. Begin your evaluation by comparing the responses of the two assistants and provide a short "
        f"explanation. {_FAIR}",
        _CONVERSATIONS,
    ),
    "pair-math-v1-multi-turn": Prompt(
        f"{_TWO}s. {_CORRECTNESS}You will be given reference answers, the assistant A's answers, the assistant B's "
        "answers. Your job is to determine which assistant provides correct and helpful answers to the second user "
        f"question. Begin your evaluation by comparing both assistants' answers with the reference answers. {_MISTAKES}"
        f"{_FAIR}",
        _REFERENCES + _CONVERSATIONS,
    ),
}
