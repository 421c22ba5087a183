"""What counts as a right answer, and why a chain's is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from transllm_jax.data.read.questions import Question
from transllm_jax.evaluation.answers import Checkable, Judge, count, is_understood, reason_of, total
from transllm_jax.evaluation.asked import Asking, metrics_of

# By language: questions as (question, kind, accepted).
FILE: dict[str, list[tuple[str, str, list[str]]]] = {
    "en": [
        ("Is Tokyo in Japan?", "yes_no", ["Yes"]),
        ("Is Lyon in Spain?", "yes_no", ["No"]),
        ("Is Rome in Italy?", "yes_no", ["Yes"]),
        ("What is 2 plus 2?", "sum", ["four", "4"]),
        ("What is 20 plus 4?", "sum", ["twenty-four", "24"]),
        ("Which is larger, 5 or 7?", "larger", ["seven", "7"]),
        ("Which is larger, 5 or 3?", "larger", ["five", "5"]),
        ("Which is larger, 3 or 2?", "larger", ["three", "3"]),
        ("Which country is Tijuana in?", "country", ["Mexico"]),
        ("What is the capital of Mexico?", "capital", ["Mexico City"]),
        ("What money do people use in the USA?", "currency", ["US dollar", "dollar"]),
        ("What money do people use in Australia?", "currency", ["Australian dollar"]),
    ],
    "th": [
        ("โตเกียวอยู่ในประเทศญี่ปุ่นใช่ไหม", "yes_no", ["ใช่"]),
        ("ปารีสอยู่ในประเทศญี่ปุ่นใช่ไหม", "yes_no", ["ไม่ใช่"]),
        ("โรมอยู่ในประเทศอิตาลีใช่ไหม", "yes_no", ["ใช่"]),
        ("สองบวกสองเท่ากับเท่าไร", "sum", ["สี่", "4"]),
        ("สิบบวกสี่เท่ากับเท่าไร", "sum", ["สิบสี่", "14"]),
    ],
    "ar": [("ما عاصمة فرنسا؟", "capital", ["باريس"]), ("كم يساوي ٣ زائد ٤؟", "sum", ["سبعة", "7"])],
    "hi": [("भारत की राजधानी क्या है?", "capital", ["नई दिल्ली", "दिल्ली"]), ("", "country", ["नेपाल"])],
    "am": [("የጃፓን ዋና ከተማ ማን ይባላል?", "capital", ["ቶኪዮ"]), ("", "yes_no", ["አዎ"])],
    "vi": [("Mười cộng bốn bằng mấy?", "sum", ["mười bốn", "14"]), ("Hai cộng hai bằng mấy?", "sum", ["bốn", "4"])],
    "zh": [("二加二等于几?", "sum", ["四", "4"]), ("十加四等于几?", "sum", ["十四", "14"])],
}
JUDGES = {code: Judge(Checkable(text, accepted, kind) for text, kind, accepted in rows) for code, rows in FILE.items()}


@pytest.mark.parametrize(
    ("code", "number", "answer", "right"),
    [
        ("en", 0, "Yes, Tokyo is in Japan.", True),
        ("en", 0, "yes", True),
        ("en", 0, "No, it is not. Yes?", False),
        ("en", 0, "Yes, there is no doubt.", True),
        ("en", 0, "I know yesterday's news.", False),
        ("en", 1, "Nothing is known.", False),
        ("en", 1, "No.", True),
        ("en", 1, "Yes, no problem.", False),
        ("en", 3, "It is four.", True),
        ("en", 3, "It is fourteen.", False),
        ("en", 3, "It is twenty-four.", False),
        ("en", 3, "It is ４.", True),
        ("en", 3, "It is 4.5.", False),
        ("en", 3, "It is 24.", False),
        ("en", 4, "Twenty-four", True),
        ("en", 4, "24.0", True),
        ("en", 5, "7 is larger than 5.", True),
        ("en", 5, "5 is larger than 7.", False),
        ("en", 5, "Of 5 and 7, the larger is 7.", True),
        ("en", 5, "Of 5 and 7, the larger is 5.", False),
        ("en", 5, "The larger number is seven.", True),
        ("en", 8, "Tijuana is in Mexico.", True),
        ("en", 8, "Tijuana is in Mexico City.", False),
        ("en", 9, "The capital of Mexico is Mexico City.", True),
        ("en", 10, "They use the Dollar.", True),
        ("en", 10, "They use the Australian dollar.", False),
        ("en", 11, "They use the Australian dollar.", True),
        ("en", 11, "They use the dollar.", False),
        ("th", 0, "ใช่ครับ", True),
        ("th", 0, "ไม่ใช่", False),
        ("th", 0, "ไม่ใช่ ใช่", False),
        ("th", 1, "ไม่ใช่ ปารีสไม่ได้อยู่ในประเทศญี่ปุ่น", True),
        ("th", 1, "ใช่", False),
        ("th", 3, "สองบวกสองเท่ากับสี่", True),
        ("th", 3, "สองบวกสองเท่ากับสิบสี่", False),
        ("th", 3, "๔", True),
        ("th", 3, "๑๔", False),
        ("th", 4, "เท่ากับสิบสี่", True),
        ("ar", 0, "عاصمة فرنسا هي مدينة باريس.", True),
        ("ar", 0, "عاصمة فرنسا هي مدينة لندن.", False),
        ("ar", 0, "وباريس", True),
        ("ar", 1, "الناتج ٧", True),
        ("ar", 1, "الناتج ١٧", False),
        ("ar", 1, "الناتج سبعةٌ", True),
        ("hi", 0, "भारत की राजधानी दिल्ली है।", True),
        ("hi", 0, "राजधानी मुंबई है।", False),
        ("hi", 1, "वह नेपाली है", False),
        ("am", 0, "የጃፓን ዋና ከተማ ቶኪዮ ነው።", True),
        ("am", 0, "በቶኪዮ፣", True),
        ("am", 0, "ኪዮቶ", False),
        ("vi", 0, "bằng Mười Bốn", True),
        ("vi", 1, "bằng mười bốn", False),
        ("vi", 1, "bằng bốn", True),
        ("vi", 1, "bằng bon", False),
        ("zh", 0, "等于四。", True),
        ("zh", 0, "等于十四。", False),
        ("zh", 1, "等于十四。", True),
        ("zh", 1, "等于四。", False),
    ],
)
def test_what_is_right(code: str, number: int, answer: str, right: bool) -> None:
    assert JUDGES[code].is_right(number, answer) is right


def test_two_questions_of_a_kind_are_no_choice() -> None:
    capitals = Judge([Checkable("Of Japan?", ["Tokyo"], "capital"), Checkable("Of France?", ["Paris"], "capital")])
    assert capitals.is_right(1, "Not Tokyo but Paris.") and not capitals.is_right(1, "Tokyo")


def test_questions_without_an_answer_in_a_language_do_not_count_there() -> None:
    asked = [("Is it?", ["Yes"]), ("Is it not?", ["No"]), ("Is it so?", ["Yes"]), ("", [])]
    judge = Judge(Checkable(text, accepted, "yes_no") for text, accepted in asked)
    assert not judge.is_right(0, "No. Yes?") and judge.is_right(1, "No. Yes?") and not judge.is_right(3, "Yes")


def test_a_question_is_understood_in_any_of_its_wordings() -> None:
    wordings = ["What is 3 + 4?", "How much is three and four?"]
    assert is_understood("what is  3+4", wordings) and is_understood("How much is Three and four", wordings)
    assert not is_understood("What is 3 - 4?", wordings) and not is_understood("What is 3 + 41?", wordings)
    assert not is_understood("", wordings)
    for asked, wording, same in (
        ("What is 3*4?", "What is 34?", False),
        ("What is 3 × 4?", "what is 3*4", True),
        ("What is 12/3?", "What is 123?", False),
        ("What is 1.5 + 2?", "What is 15 + 2?", False),
        ("What is 10% of 50?", "What is 10 of 50?", False),
        ("Which is larger, 1 or 23?", "Which is larger, 12 or 3?", False),
        ("Add 1 23", "Add 12 3", False),
        ("What is 1,000 + 1?", "What is 1000+1?", True),
    ):
        assert is_understood(asked, [wording]) is same, asked


def test_numbers_as_they_are_set() -> None:
    judge = Judge([Checkable("How many?", ["1000"]), Checkable("How many?", ["1"]), Checkable("How many?", ["102"])])
    assert judge.is_right(0, "1\u202f000 people") and not judge.is_right(1, "1\u00a0000 people")
    assert not judge.is_right(2, "It is 10².") and judge.is_right(1, "1 000 is not said so often")


@pytest.mark.parametrize(
    ("in_form", "understood", "english", "reason"),
    [
        (False, True, True, "form"),
        (False, None, None, "form"),
        (True, True, True, "translation"),
        (True, False, True, "translation"),
        (True, False, False, "misread"),
        (True, True, False, "english"),
        (True, None, None, "unknown"),
    ],
)
def test_each_wrong_answer_has_one_reason(
    in_form: bool, understood: bool | None, english: bool | None, reason: str
) -> None:
    assert reason_of(in_form=in_form, understood=understood, english_right=english) == reason


QUESTIONS = [
    Question("เมืองหลวงของไทยคือ", ("กรุงเทพ",), "capital", (), ("The capital of Thailand?",), ("Bangkok",)),
    Question("เมืองหลวงของญี่ปุ่นคือ", ("โตเกียว",), "capital", (), ("The capital of Japan?",), ("Tokyo",)),
    Question("สองบวกสอง", ("สี่",)),
]


def chain(question: str, english: str, target: str, *, cut_off: bool = False) -> dict[str, Any]:
    parts = {"question_en": question, "answer_en": english, "answer_target": target}
    return {"raw": "raw", "visible": target, "chain": parts, "cut_off": cut_off}


def test_chains_are_judged_step_by_step() -> None:
    asking = Asking(QUESTIONS, 10, in_chains=True)
    target = [
        chain("the capital of thailand", "It is Bangkok.", "กรุงเทพ"),
        chain("The capital of China?", "Beijing.", "ปักกิ่ง"),
        {"raw": "สี่", "visible": "สี่", "chain": None, "cut_off": False},
    ]
    rows = asking.judged(target, ["Bangkok", "Kyoto", None])
    assert [row["right"] for row in rows] == [True, False, True]
    assert [row["reason"] for row in rows] == [None, "misread", None]
    assert [row["understood"] for row in rows] == [True, False, None]
    assert rows[1]["english"] == {"question": "The capital of Japan?", "raw": "Kyoto", "right": False}
    assert metrics_of(rows) == {
        "answers": pytest.approx(2 / 3),
        "answers_in_english": 0.5,
        "understood": 0.5,
        "answers_chain_english": 0.5,
    }
    counts = count(rows)
    assert list(counts) == ["capital", ""]
    capital = {"asked": 2, "right": 1, "asked_in_english": 2, "right_in_english": 1, "understood": 1}
    assert counts["capital"].items() >= (capital | {"chain_english": 1, "misread": 1, "form": 0}).items()
    assert total(counts)["asked"] == 3 and total(counts)["right"] == 2 and total(counts)["unknown"] == 0
    # An answer that the limit cut off is wrong in its form, if it is wrong.
    cut = [chain("The capital of Thailand?", "Bangkok", target, cut_off=True) for target in ("กรุง", "กรุงเทพ")]
    assert [row["reason"] for row in Asking(QUESTIONS[:1] * 2, 2, in_chains=True).judged(cut, ["", ""])] == [
        "form",
        None,
    ]


def test_a_model_without_chains_has_no_reasons() -> None:
    plain = {"raw": "สี่", "visible": "สี่", "chain": None, "cut_off": False}
    rows = Asking(QUESTIONS[2:], 1, in_chains=False).judged([plain], [None])
    assert "reason" not in rows[0] and metrics_of(rows) == {"answers": 1.0, "answers_in_english": None}
