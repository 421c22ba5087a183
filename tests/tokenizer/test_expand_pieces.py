"""Expanding a SentencePiece-BPE base: new pieces below the base's, and two files that agree."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb2
from test_expand import ENGLISH, MARKERS, THAI, mixed, no_thai
from tiny_sentencepiece import build_tiny_sentencepiece

from transllm_jax.conversion.hf.sentencepiece_tokenizer import write_tokenizer_json
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.expand import Expansion, expand, save_expanded, with_markers
from transllm_jax.tokenizer.growing.pieces import PieceTable, split_priority
from transllm_jax.tokenizer.tokenizer import Tokenizer

SIZE = 120
KINDS = ["prepend", "metaspace"]


@functools.lru_cache
def made(kind: str) -> tuple[Tokenizer, Expansion]:
    with tempfile.TemporaryDirectory() as directory:
        base = Tokenizer.load(build_tiny_sentencepiece(Path(directory), metaspace=kind == "metaspace"))
    return base, expand(base, THAI, size=SIZE, markers=MARKERS, english=ENGLISH)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base's, and the expanded one's with both files."""
    base = build_tiny_sentencepiece(tmp_path_factory.mktemp("spm") / "base")
    new = base.with_name("new")
    assert save_expanded(made("prepend")[1].tokenizer, base, new) == ["tokenizer.json", "tokenizer.model"]
    return base, new


@pytest.fixture(scope="module")
def theirs(directories: tuple[Path, Path]) -> Any:
    return spm.SentencePieceProcessor(model_file=str(directories[1] / "tokenizer.model"))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_sizes_and_ids(kind: str) -> None:
    base, expansion = made(kind)
    new = expansion.tokenizer
    assert new.vocab_size == base.vocab_size + SIZE + len(MARKERS)
    assert [base.token(i) for i in range(base.vocab_size)] == [new.token(i) for i in range(base.vocab_size)]
    assert [new.token_id(m) for m in MARKERS] == list(range(new.vocab_size - 3, new.vocab_size))
    assert (new.bos_ids, new.eos_id) == (base.bos_ids, base.eos_id) == ([1], 2)
    assert expansion.report["english_changed"] == {"changed": 0, "texts": len(ENGLISH), "more_tokens": 0}
    assert expansion.report["kind"] == "sentencepiece"
    assert expansion.report["tokens_per_character_after"] < 0.5 * expansion.report["tokens_per_character_before"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=no_thai)
def test_text_without_the_script_keeps_its_ids(kind: str, text: str) -> None:
    base, expansion = made(kind)
    assert expansion.tokenizer.encode(text, specials=False) == base.encode(text, specials=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=mixed)
def test_decoding_gives_back_what_the_base_gives(kind: str, text: str) -> None:
    base, expansion = made(kind)
    back = expansion.tokenizer.decode(expansion.tokenizer.encode(text, specials=False))
    assert back == base.decode(base.encode(text, specials=False))
    if kind == "prepend":  # "▁" is SentencePiece's space; nothing can tell it from one
        assert back == text.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(text=mixed)
def test_both_files_give_the_same_ids(theirs: Any, text: str) -> None:
    assert made("prepend")[1].tokenizer.encode(text, specials=False) == theirs.encode(text)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from(sorted({w for line in THAI for w in (line[:5], line[4:9], line)} | set(" ก")))))
def test_both_files_give_the_same_ids_of_thai(theirs: Any, words: list[str]) -> None:
    text = "".join(words)
    assert made("prepend")[1].tokenizer.encode(text, specials=False) == theirs.encode(text)


def test_the_files_agree_on_every_token(directories: tuple[Path, Path], theirs: Any) -> None:
    new = Tokenizer.load(directories[1])
    assert theirs.vocab_size() == new.vocab_size
    assert [theirs.id_to_piece(i) for i in range(new.vocab_size)] == [new.token(i) for i in range(new.vocab_size)]
    assert [theirs.is_control(int(new.token_id(m) or 0)) for m in MARKERS] == [True] * 3
    base = spm.SentencePieceProcessor(model_file=str(directories[0] / "tokenizer.model"))
    lowest = min(base.get_score(i) for i in range(base.vocab_size()))
    scores = [theirs.get_score(i) for i in range(base.vocab_size(), base.vocab_size() + SIZE)]
    assert scores == sorted(set(scores), reverse=True) and scores[0] < lowest


def test_every_new_piece_is_used(kind: str) -> None:
    base, expansion = made(kind)
    counts = Counter(i for ids in expansion.tokenizer.encode_batch(THAI) for i in ids)
    assert [i for i in range(base.vocab_size, base.vocab_size + SIZE) if counts[i] < 2] == []
    assert expansion.report["never_produced"] == expansion.report["produced_less_than_min_count"] == 0
    rarest = expansion.report["least_frequent"][-1]
    assert rarest["count"] == min(counts[i] for i in range(base.vocab_size, base.vocab_size + SIZE))


def test_new_pieces_are_of_the_script_with_at_most_a_space_before(kind: str) -> None:
    base, expansion = made(kind)
    new = [str(expansion.tokenizer.token(base.vocab_size + i)) for i in range(SIZE)]
    assert all(0xE00 <= ord(c) < 0xE80 for piece in new for c in piece.removeprefix("▁"))
    assert any(piece.startswith("▁") and len(piece) > 2 for piece in new)
    single = [piece for piece in new if len(piece) == 1]
    assert single and new[: len(single)] == single  # characters come first
    assert expansion.new_tokens[: len(new)] == [piece.replace("▁", " ") for piece in new]


def test_pieces_are_the_base_ids_of_the_same_text(kind: str) -> None:
    base, expansion = made(kind)
    for i, pieces in enumerate(expansion.pieces[:SIZE]):
        piece = str(expansion.tokenizer.token(base.vocab_size + i))
        written = b"".join(
            bytes([int(t[3:5], 16)]) if (t := str(base.token(p))).startswith("<0x") else t.encode() for p in pieces
        )
        assert written.decode() == piece and max(pieces) < base.vocab_size
    assert [base.decode(p) for p in expansion.pieces[SIZE:]] == ["English", "Thai", "Response"]


def test_few_letters_make_many_overlaps(tmp_path: Path) -> None:
    """Of three letters, one unknown to the base, nearly every pair of neighbours is a piece in both files."""
    rng = random.Random(0)

    def text(letters: str) -> str:
        return "".join(rng.choices(letters, k=rng.randrange(60)))

    base = build_tiny_sentencepiece(tmp_path / "base", text=[text("กข ") for _ in range(60)], vocab_size=300)
    documents = [text("กกขขค ") for _ in range(400)]
    expansion = expand(Tokenizer.load(base), documents, size=150, markers=MARKERS)
    assert expansion.report["produced_less_than_min_count"] == 0
    save_expanded(expansion.tokenizer, base, tmp_path / "new")
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "new" / "tokenizer.model"))
    for _ in range(300):
        line = text("กกขขคa  ")
        assert expansion.tokenizer.encode(line) == theirs.encode(line)


def test_the_new_model_read_again_gives_the_same_merges(directories: tuple[Path, Path], tmp_path: Path) -> None:
    write_tokenizer_json(directories[1] / "tokenizer.model", tmp_path)
    ours, again = (json.loads((d / "tokenizer.json").read_text()) for d in (directories[1], tmp_path))
    assert ours["model"] == again["model"]


def test_markers_are_single_ids_and_text_never_makes_one(kind: str, theirs: Any) -> None:
    new = made(kind)[1].tokenizer
    ids = [new.token_id(m) for m in MARKERS]
    assert [new.encode(m) for m in MARKERS] == [[i] for i in ids]
    text = "<EN> a <RESPONSE>b<TH>ไทย</s><s> <unk>"
    plain = new.encode(text, specials=False)
    assert not {*ids, *new.special_tokens.values()}.intersection(plain)
    assert new.decode(plain) == text
    assert not set(ids).intersection(theirs.encode(text))


def test_auto_tokenizer_loads_both_files_with_equal_ids(directories: tuple[Path, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    new = Tokenizer.load(directories[1])
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directories[1] / name).read_bytes())
    for with_model in (False, True):
        if with_model:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert len(auto) == new.vocab_size
        for text in [*THAI, *ENGLISH, "<EN> a <RESPONSE> b <TH> ไทย ๑๒ 345\n\n 🎉\u200b", "  ไทย  "]:
            assert auto(text, add_special_tokens=False).input_ids == new.encode(text)
            assert auto(text).input_ids == [1, *new.encode(text)]


def test_a_base_of_tokenizer_json_alone(tmp_path: Path) -> None:
    base = build_tiny_sentencepiece(tmp_path / "base", model=False)
    new = made("prepend")[1].tokenizer
    (tmp_path / "new").mkdir()
    assert save_expanded(new, base, tmp_path / "new") == ["tokenizer.json"]
    assert not (tmp_path / "new" / "tokenizer.model").exists()
    assert Tokenizer.load(tmp_path / "new").fingerprint == new.fingerprint


def test_ids_behind_padding_rows(tmp_path: Path) -> None:
    base = build_tiny_sentencepiece(tmp_path / "base")
    loaded = Tokenizer.load(base)
    first = loaded.vocab_size + 5
    expansion = expand(loaded, THAI, size=SIZE, markers=MARKERS, first_id=first)
    new = expansion.tokenizer
    assert expansion.report["first_new_id"] == first
    assert new.vocab_size == first + SIZE + 3 and new.token_id("<EN>") == first + SIZE
    assert expansion.new_tokens == made("prepend")[1].new_tokens
    save_expanded(new, base, tmp_path / "new")
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "new" / "tokenizer.model"))
    gap = set(range(loaded.vocab_size, first))
    assert all(theirs.is_unused(i) for i in gap)
    for text in [*THAI, "<unused 421> <unused", *(str(new.token(i)) for i in gap)]:
        ids = new.encode(text)
        assert ids == theirs.encode(text) and not gap.intersection(ids)


def test_markers_can_be_added_later() -> None:
    base = made("prepend")[0]
    new, words = with_markers(base, ["<TH>"])
    assert new.token_id("<TH>") == base.vocab_size
    assert [base.decode(ids) for ids in words] == ["Thai"]
    assert new.encode("the fox") == base.encode("the fox")


def test_a_marker_is_never_a_learned_piece() -> None:
    base = made("prepend")[0]
    with_word = expand(base, THAI, size=SIZE, markers=["<EN>", "การ์ตูน", "<RESPONSE>"])
    assert with_word.new_tokens.count("การ์ตูน") == 1
    learned = made("prepend")[1].new_tokens[60]
    again = expand(base, THAI, size=SIZE, markers=["<EN>", learned, "<RESPONSE>"])
    assert again.new_tokens.index(learned) == SIZE + 1


def test_merges_are_all_ways_to_make_a_piece() -> None:
    """Against the plain definition: every split of every piece into two known ones, new pieces behind the base's."""
    base, expansion = made("prepend")
    state = json.loads(expansion.tokenizer.backend.to_str())
    merges = [tuple(m) for m in state["model"]["merges"]]
    table = PieceTable(json.loads(base.backend.to_str()))
    new = [str(expansion.tokenizer.token(base.vocab_size + i)) for i in range(SIZE)]
    known = table.known | set(new)
    wanted = {
        (p[:i], p[i:]) for p in known for i in range(1, len(p)) if p[:i] in known and p[i:] in known
    }  # fmt: skip
    assert len(merges) == len(set(merges)) and set(merges) == wanted
    assert [m for m in merges if m in set(table.merges)] == table.merges
    tail = ["".join(m) for m in merges if "".join(m) in set(new)]
    assert list(dict.fromkeys(tail)) == [p for p in new if p in tail] and merges[-1][0] + merges[-1][1] == tail[-1]
    assert split_priority("ere", 2) > split_priority("ere", 1)


def test_a_size_curve_comes_from_one_training(theirs: Any) -> None:
    base, expansion = made("prepend")
    whole = expansion.tokenizer
    assert expansion.at(SIZE).backend.to_str() == whole.backend.to_str()
    lengths = []
    for size in (0, 40, 80, SIZE):
        new = expansion.at(size)
        assert new.vocab_size == base.vocab_size + size + 3
        assert [new.token(base.vocab_size + i) for i in range(size)] == [
            whole.token(base.vocab_size + i) for i in range(size)
        ]
        lengths.append(sum(map(len, new.encode_batch(THAI))))
    assert lengths == sorted(set(lengths), reverse=True)
    for wrong in (-1, SIZE + 1):
        with pytest.raises(UserError, match=f"0 to {SIZE}"):
            expansion.at(wrong)


def edited(directory: Path, change: Callable[[Any], None]) -> Path:
    """The directory, its tokenizer.model changed."""
    message = pb2.ModelProto()
    message.ParseFromString((directory / "tokenizer.model").read_bytes())
    change(message)
    (directory / "tokenizer.model").write_bytes(message.SerializeToString())
    return directory


def test_two_files_that_disagree_are_refused(tmp_path: Path) -> None:
    new = made("prepend")[1].tokenizer

    def rename(message: Any) -> None:
        message.pieces[300].piece = "other"

    def unigram(message: Any) -> None:
        message.trainer_spec.model_type = 1

    for number, (change, match) in enumerate([(rename, "id 300 is 'other'"), (unigram, "UNIGRAM")]):
        base = edited(build_tiny_sentencepiece(tmp_path / str(number)), change)
        with pytest.raises(UserError, match=match):
            save_expanded(new, base, tmp_path / "new")
    (base / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="truncated or not"):
        save_expanded(new, base, tmp_path / "new")


def test_scores_go_on_below_a_score_that_no_longer_changes_by_one(tmp_path: Path) -> None:
    def lower(message: Any) -> None:
        next(p for p in message.pieces if p.type == 1 and len(p.piece) > 1).score = -1e9

    base = edited(build_tiny_sentencepiece(tmp_path / "base"), lower)
    new = made("prepend")[1].tokenizer
    save_expanded(new, base, tmp_path / "new")
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "new" / "tokenizer.model"))
    scores = [theirs.get_score(i) for i in range(new.vocab_size - 3 - SIZE, new.vocab_size - 3)]
    assert scores == sorted(set(scores), reverse=True) and scores[0] < -1e9


def test_pieces_that_join_the_script_with_other_characters(tmp_path: Path) -> None:
    """Some bases have them; the runs then reach to the next space, so that counts are still those of whole texts."""
    text = ["(ก ก) (ก) การ(ดี) ดี(มา" * 3]
    base = Tokenizer.load(build_tiny_sentencepiece(tmp_path / "base", split_by_unicode_script=False, vocab_size=460))
    assert base.token_id("(") is not None
    documents = [line.replace(" ", " (", 1).replace("าร", "า)ร") for line in THAI + text]
    expansion = expand(base, documents, size=80, markers=MARKERS)
    counts = Counter(i for ids in expansion.tokenizer.encode_batch(documents) for i in ids)
    found = {i: counts[i] for i in range(base.vocab_size, base.vocab_size + 80)}
    listed = {row["token"]: row["count"] for row in expansion.report["least_frequent"]}
    assert min(found.values()) >= 2
    assert listed.items() <= {expansion.new_tokens[i - base.vocab_size]: n for i, n in found.items()}.items()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"normalizer": {"type": "NFC"}}, "NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"normalizer": None}, "normalizer null"),
    ],
)
def test_other_processing_is_refused_by_name(change: dict[str, Any], match: str) -> None:
    import tokenizers

    state = json.loads(made("prepend")[0].backend.to_str()) | change
    base = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), {}, None, "it")
    with pytest.raises(UserError, match=match):
        expand(base, THAI, size=SIZE, markers=MARKERS)


def test_bad_sizes() -> None:
    base = made("prepend")[0]
    with pytest.raises(UserError, match="too few"):
        expand(base, THAI, size=5, markers=MARKERS)
    with pytest.raises(UserError, match="supports") as error:
        expand(base, THAI, size=5000, markers=MARKERS)
    supported = int(str(error.value).split("supports ")[1].split()[0])
    assert expand(base, THAI, size=supported, markers=MARKERS).report["new_tokens"] == supported
    with pytest.raises(UserError, match="cannot begin at 100"):
        expand(base, THAI, size=SIZE, markers=MARKERS, first_id=100)
