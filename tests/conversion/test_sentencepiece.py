"""SentencePiece BPE models as tokenizer.json: the same ids as SentencePiece's own, on whatever text."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb2
from tokenizers import Tokenizer

from transllm_jax.conversion.hf.sentencepiece_tokenizer import build_tokenizer, write_tokenizer_json
from transllm_jax.conversion.hf.tokenizer_files import copy_or_make_tokenizer
from transllm_jax.errors import UserError

LINES = [
    "the cat sat on the mat, there and then; the other cats were here or there",
    "    def area(width):\n        return width * width  # ere re er",
    "แมวนั่งบนเสื่อ แล้วแมวก็หลับไป แมวตัวอื่นอยู่ที่นั่น",
    "--- == ---- ======  haha hahaha abab ababab aaa aaaa ..... ",
]
# Made so that overlapping pieces, runs, spaces, and characters that are no piece come often.
LETTERS = [
    *"aehrt t-=. \n\t", "  ", "the", "ha", "แมว", "ำ", "é", "e\u0301", "中",
    "🙂", "👩\u200d👧", "▁", "\0", "\u2028", "<0x0A>",
]  # fmt: skip


def train(directory: Path, *, lines: list[str] = LINES, size: int = 420, **options: Any) -> Path:
    """A model of LLaMA-2's kind: no normalisation, whitespace kept, byte fallback."""
    given = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_by_whitespace": True,
    }
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
        **given | options,
    )
    return directory / "tokenizer.model"


def pair(model: Path, directory: Path, *, add_bos: bool = False) -> tuple[Any, Tokenizer]:
    write_tokenizer_json(model, directory, add_bos=add_bos)
    return spm.SentencePieceProcessor(model_file=str(model)), Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    directory = tmp_path_factory.mktemp("sentencepiece")
    return pair(train(directory), directory)


def same(theirs: Any, ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text), text
    # "▁" is SentencePiece's space; nothing can tell it from one.
    assert ours.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(LETTERS), max_size=25).map("".join))
def test_ids_are_those_of_sentencepiece(tiny: tuple[Any, Tokenizer], text: str) -> None:
    same(*tiny, text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_ids_of_any_text(tiny: tuple[Any, Tokenizer], text: str) -> None:
    same(*tiny, text)


def test_long_runs_and_the_lines_themselves(tiny: tuple[Any, Tokenizer]) -> None:
    for length in range(40):
        for letter in " -=a\n":
            same(*tiny, letter * length)
            same(*tiny, f"a{letter * length}b{letter}")
    for line in LINES:
        same(*tiny, line)


@pytest.mark.parametrize("across_words", [False, True])
def test_few_letters_make_many_overlaps(tmp_path: Path, across_words: bool) -> None:
    """Of two letters nearly every pair of neighbours is a piece, and many a piece has several splits."""
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choices("ab ", k=rng.randrange(60)))

    model = train(tmp_path, lines=[text() for _ in range(100)], size=350, split_by_whitespace=not across_words)
    theirs, ours = pair(model, tmp_path)
    assert sum(len(piece) > 4 for piece in ours.get_vocab()) > 30
    for _ in range(300):
        same(theirs, ours, text())


def edited(model: Path, change: Callable[[Any], None]) -> Path:
    """The model with a change, beside it."""
    message = pb2.ModelProto()
    message.ParseFromString(model.read_bytes())
    change(message)
    path = model.with_name("edited.model")
    path.write_bytes(message.SerializeToString())
    return path


def test_runs_of_spaces_that_all_have_one_score(tmp_path: Path) -> None:
    """As in LLaMA-2: pieces of 2 to 8 spaces that SentencePiece joins from the left, the longest first."""

    def change(message: Any) -> None:
        for length in range(2, 9):
            piece = next((p for p in message.pieces if p.piece == "▁" * length), None) or message.pieces.add()
            piece.piece, piece.score, piece.type = "▁" * length, -1e9, 1

    theirs, ours = pair(edited(train(tmp_path), change), tmp_path)
    for length in range(40):
        same(theirs, ours, " " * length)
        same(theirs, ours, f"the{' ' * length}cat{' ' * (length // 2)}\n")


def test_overlapping_splits_of_one_piece() -> None:
    """SentencePiece takes the left of two places; no order by length is right for all."""
    words = ["▁", *"erab", "er", "re", "ere", "ab", "ba", "aba", "ababa"]
    scores = {word: -float(number) for number, word in enumerate(words)} | {"ere": -50.0, "aba": -1.5, "ababa": -60.0}
    pieces = ["<unk>", *words]
    tokenizer = build_tokenizer(
        pieces, [0.0, *(scores[word] for word in words)], [2, *[1] * len(words)], "x.model", bos=None
    )
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    # `er e re`: the longer left part first; `ab aba ba`: the shorter.
    assert merges.index(("er", "e")) < merges.index(("e", "re"))
    assert merges.index(("ab", "aba")) < merges.index(("aba", "ba"))


def test_bos_and_special_tokens(tmp_path: Path) -> None:
    model = train(tmp_path)
    theirs, ours = pair(model, tmp_path, add_bos=True)
    assert ours.encode("the cat").ids == [theirs.bos_id(), *theirs.encode("the cat")]
    assert ours.encode("the", add_special_tokens=False).ids == theirs.encode("the")
    # As Hugging Face's LLaMA tokenizer: special tokens are found in a text, and a "▁" stands after them.
    assert ours.encode("</s>the<unk>").ids == [1, 2, *theirs.encode("the"), 0]
    assert ours.decode([1, *theirs.encode("the cat"), 2]) == "the cat"
    assert ours.get_vocab_size() == theirs.get_piece_size()


def test_what_the_config_puts_around_a_text(tmp_path: Path) -> None:
    """A tokenizer.json that is made of a model carries it: beside one transformers 5 does not read these keys."""
    from transformers import AutoTokenizer

    (tmp_path / "src").mkdir()
    train(tmp_path / "src")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    for bos, eos in ((True, True), (False, True), (True, False)):
        config = {**names, "add_bos_token": bos, "add_eos_token": eos}
        (tmp_path / "src/tokenizer_config.json").write_text(json.dumps(config))
        out = tmp_path / f"out{bos}{eos}"
        out.mkdir()
        copy_or_make_tokenizer(tmp_path / "src", out)
        theirs = AutoTokenizer.from_pretrained(tmp_path / "src")
        ours = Tokenizer.from_file(str(out / "tokenizer.json"))
        for pair in (("the cat",), ("the cat", "the")):
            assert ours.encode(*pair).ids == theirs(*pair).input_ids, (config, pair)
    with pytest.raises(UserError, match=r"no EOS piece; set add_eos_token: false"):
        write_tokenizer_json(train(tmp_path, eos_id=-1), tmp_path, add_eos=True)


def test_without_a_prefix(tmp_path: Path) -> None:
    theirs, ours = pair(train(tmp_path, add_dummy_prefix=False), tmp_path)
    for text in ("the cat", " the", "", "  ", *LINES):
        same(theirs, ours, text)


def test_without_byte_fallback(tmp_path: Path) -> None:
    theirs, ours = pair(train(tmp_path, byte_fallback=False, size=150), tmp_path)
    for text in ("the cat 🙂🙂中 cat", "中", "🙂 中", "é"):
        assert ours.encode(text).ids == theirs.encode(text)


def test_user_defined_pieces(tmp_path: Path) -> None:
    theirs, ours = pair(train(tmp_path, add_dummy_prefix=False, user_defined_symbols=["<think>", "the"]), tmp_path)
    for text in ("a<think>there the<think>", "<think>", "lathe thethe"):
        same(theirs, ours, text)
    assert ours.decode(ours.encode("<think>").ids) == "<think>"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "unigram", "size": 330}, "has model type UNIGRAM, which"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"a normaliser \(precompiled_charsmap\)"),
        ({"remove_extra_whitespaces": True, "treat_whitespace_as_suffix": True}, "extra_whitespaces, treat_whitespace"),
        ({"user_defined_symbols": ["<think>"]}, "user-defined pieces with add_dummy_prefix"),
        ({"bos_id": -1}, "no BOS piece"),
    ],
)
def test_models_that_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    model = train(tmp_path, **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=said) as caught:
        write_tokenizer_json(model, tmp_path / "out")
    assert "tokenizer.model" in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_pieces_that_no_list_of_merges_can_tell(tmp_path: Path) -> None:
    model = train(tmp_path)
    theirs = spm.SentencePieceProcessor(model_file=str(model))
    at = theirs.piece_to_id("▁the")
    other = next(i for i in range(at + 1, at + 50) if len(set(theirs.id_to_piece(i))) > 1)
    letter = theirs.piece_to_id("t")

    def tie(message: Any) -> None:
        message.pieces[at].score = message.pieces[other].score

    def unused(message: Any) -> None:
        message.pieces[at].type = 5

    def uncovered(message: Any) -> None:
        message.pieces[letter].piece = "𝔘"

    def twice(message: Any) -> None:
        message.pieces[at].piece = message.pieces[other].piece

    for change, said in (
        (tie, "'▁the', '.+' have the score of another piece"),
        (unused, "'▁the' are of type unused"),
        (uncovered, r"'▁the'.* and \d+ more have a character that is not a piece"),
        (twice, "the same piece twice"),
    ):
        with pytest.raises(UserError, match=said):
            write_tokenizer_json(edited(model, change), tmp_path)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read \(No such file"):
        write_tokenizer_json(path, tmp_path)
    for data in (b"", b"not a model" * 9, b"\x0a\xff\xff\xff\xff\x0f"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"tokenizer\.model is .*not a SentencePiece model"):
            write_tokenizer_json(path, tmp_path)


def test_agrees_with_transformers(tmp_path: Path) -> None:
    """`PreTrainedTokenizerFast` takes tokenizer.json as it is."""
    from transformers import PreTrainedTokenizerFast

    theirs, ours = pair(train(tmp_path), tmp_path, add_bos=True)
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in LINES:
        assert loaded.encode(text) == ours.encode(text).ids == [1, *theirs.encode(text)]


def test_the_real_llama2_tokenizer(tmp_path: Path) -> None:
    path = os.environ.get("TRANSLLM_LLAMA2_TOKENIZER")
    if not path:
        pytest.skip("TRANSLLM_LLAMA2_TOKENIZER does not name LLaMA-2's tokenizer.model")
    theirs, ours = pair(Path(path), tmp_path)
    assert ours.get_vocab_size() == 32000
    rng = random.Random(0)
    texts = ["".join(rng.choices([*LETTERS, " " * 20], k=rng.randrange(25))) for _ in range(2000)]
    for text in [*texts, *LINES, *(" " * length for length in range(60))]:
        same(theirs, ours, text)
