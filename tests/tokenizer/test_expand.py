from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import build_tiny_tokenizer
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.atoms import ends_between_characters, token_bytes
from transllm_jax.tokenizer.growing.expand import Expansion, expand, tokens_per_character
from transllm_jax.tokenizer.scripts import script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer

MARKERS = ["<EN>", "<TH>", "<RESPONSE>"]
SIZE = 150

THAI = [
    "วันนี้อากาศดีมาก เราจึงออกไปเดินเล่นที่สวนสาธารณะใกล้บ้าน",
    "แม่ของฉันทำอาหารอร่อยที่สุด โดยเฉพาะแกงเขียวหวานไก่และข้าวผัด",
    "เด็กๆ กำลังเล่นฟุตบอลอยู่ในสนามหญ้าหน้าโรงเรียน",
    "เขาทำงานที่กรุงเทพฯ มา 12 ปีแล้ว ตั้งแต่ พ.ศ. ๒๕๕๕",
    "ประเทศไทยมีภูเขา แม่น้ำ และทะเลที่สวยงามมาก นักท่องเที่ยวจึงมาเที่ยวประเทศไทยทุกปี",
    "ครูสอนให้นักเรียนอ่านหนังสือทุกวัน เพราะการอ่านหนังสือทำให้เรามีความรู้",
    "ที่ตลาดมีผลไม้มากมาย เช่น มะม่วง ทุเรียน และส้ม ราคาไม่แพง",
    "ฉันชอบฟังเพลงไทยตอนทำงาน และชอบดูหนังกับเพื่อนในวันหยุด",
    "น้องสาวของเขาเรียนภาษาอังกฤษ English ที่มหาวิทยาลัย",
    "การเดินทางไปทำงานทุกวันใช้เวลาประมาณหนึ่งชั่วโมง",
]
THAI = THAI + [line.replace(" ", "  ") for line in THAI]


def _byte_level(path: Path, steps: list[object], text: list[str], specials_apart: bool = False) -> Path:
    """A byte-level BPE directory with other pre-tokenizer steps than SmolLM2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[] if specials_apart else specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    if specials_apart:  # as LLaMA-3 and Qwen: the special tokens follow the vocabulary and are not in it
        backend.add_special_tokens(specials)
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
        )
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return path


ENGLISH = ["the quick brown fox's tail, and the lazy dog's tail", "she said that it is 12,345 dollars" * 2]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BASES = ["smollm2", "gpt2_without_thai", "llama3", "cuts_inside_characters"]


def _build(kind: str, path: Path) -> Path:
    if kind == "smollm2":
        return build_tiny_tokenizer(path)
    if kind == "gpt2_without_thai":  # each Thai character is three pieces
        return _byte_level(path, [pre_tokenizers.ByteLevel(add_prefix_space=False)], ENGLISH)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
        return _byte_level(path, [split, whole], ENGLISH + THAI[:2], specials_apart=True)
    return _byte_level(path, [whole], THAI[:4] * 3)  # no cuts at all: pieces begin and end inside characters


@functools.lru_cache
def made(kind: str) -> tuple[Tokenizer, Expansion]:
    with tempfile.TemporaryDirectory() as directory:
        base = Tokenizer.load(_build(kind, Path(directory)))
    return base, expand(base, THAI, size=SIZE, markers=MARKERS)


@pytest.fixture(params=BASES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_bases_are_what_the_names_say() -> None:
    def cut(kind: str, text: str) -> list[str]:
        base = made(kind)[0]
        return [str(base.token(i)) for i in base.encode(text)]

    assert len(cut("gpt2_without_thai", "ท")) == 3
    assert any(
        not ends_between_characters(t) and len(token_bytes(t)) > 3 for t in cut("cuts_inside_characters", THAI[0])
    )
    assert made("llama3")[0].bos_ids == [made("llama3")[0].vocab_size - 2]


def test_sizes_and_ids(kind: str) -> None:
    base, expansion = made(kind)
    new = expansion.tokenizer
    assert new.vocab_size == base.vocab_size + SIZE + len(MARKERS)
    assert len(expansion.new_tokens) == len(expansion.pieces) == SIZE + len(MARKERS)
    assert [base.token(i) for i in range(base.vocab_size)] == [new.token(i) for i in range(base.vocab_size)]
    assert [new.token_id(m) for m in MARKERS] == list(range(new.vocab_size - 3, new.vocab_size))
    assert new.bos_ids == base.bos_ids
    assert new.eos_id == base.eos_id
    assert expansion.new_tokens[-3:] == MARKERS


# Everything but the Thai block, with much of what pre-tokenizers care about.
no_thai = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters=[chr(c) for c in range(0xE00, 0xE80)]), max_size=8),
        st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "'s", "don't", "12", "3,000", "the", "\u200b", "🎉", "ລາວ"]),
    ),
    max_size=12,
).map("".join)
mixed = st.lists(
    st.one_of(
        no_thai,
        st.text(st.characters(min_codepoint=0xE00, max_codepoint=0xE7F), max_size=8),
        st.sampled_from(THAI),
        st.sampled_from([" ", "   ", "\u200b", "๑๒", "ๆ", "👩‍👩‍👧", "ที่", "a", "ก", "\r\n", "฿"]),
    ),
    max_size=10,
).map("".join)


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=150, deadline=None)
@given(text=no_thai)
def test_text_without_the_script_keeps_its_ids(kind: str, text: str) -> None:
    base, expansion = made(kind)
    if expansion.tokenizer.find_special(text) is None:
        assert expansion.tokenizer.encode(text) == base.encode(text)


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=150, deadline=None)
@given(text=mixed)
def test_decoding_gives_the_text_back(kind: str, text: str) -> None:
    new = made(kind)[1].tokenizer
    if new.find_special(text) is None:
        assert new.decode(new.encode(text)) == text


def test_english_next_to_thai_is_cut_as_when_alone() -> None:
    base, expansion = made("smollm2")
    new = expansion.tokenizer
    thai = new.encode("ไทย")
    assert new.encode("the capitalไทยof France\n\n") == base.encode("the capital") + thai + base.encode("of France\n\n")
    spaced = new.encode("the capital  ไทย")
    assert spaced[: len(base.encode("the capital "))] == base.encode("the capital ")


def test_every_new_token_is_used(kind: str) -> None:
    """No dead tokens: counted on the documents themselves, not on what the expansion says about itself."""
    base, expansion = made(kind)
    counts = Counter(i for ids in expansion.tokenizer.encode_batch(THAI) for i in ids)
    ids = range(base.vocab_size, base.vocab_size + SIZE)
    parts = [i for i in ids if not ends_between_characters(str(expansion.tokenizer.token(i)))]
    assert [i for i in ids if counts[i] < 2 and i not in parts] == []
    assert expansion.report["never_produced"] == sum(counts[i] == 0 for i in ids)
    assert expansion.report["produced_less_than_10"] == sum(counts[i] < 10 for i in ids) > 0


def test_new_tokens_begin_and_end_between_characters(kind: str) -> None:
    base, expansion = made(kind)
    new = expansion.tokenizer
    tokens = [str(new.token(base.vocab_size + i)) for i in range(SIZE)]
    parts = [t for t in tokens if not ends_between_characters(t)]
    merges = [tuple(m) for m in json.loads(new.backend.to_str())["model"]["merges"]]
    for token in tokens:
        assert token_bytes(token)[0] & 0xC0 != 0x80
    for part in parts:  # needed on the way to a character
        assert any(left == part for left, _ in merges)
    if kind == "gpt2_without_thai":
        assert len(parts) == 2  # the first two bytes of the two halves of the Thai block


def test_pieces_are_the_base_ids_of_the_same_text(kind: str) -> None:
    base, expansion = made(kind)
    for i, pieces in enumerate(expansion.pieces[:SIZE]):
        whole = token_bytes(str(expansion.tokenizer.token(base.vocab_size + i)))
        assert b"".join(token_bytes(str(base.token(p))) for p in pieces) == whole
        assert max(pieces) < base.vocab_size
    assert [base.decode(p) for p in expansion.pieces[SIZE:]] == [" English", " Thai", " Response"]


def test_a_marker_is_one_id_and_keeps_what_stands_around_it() -> None:
    base, expansion = made("smollm2")
    new = expansion.tokenizer
    en, th, response = (int(new.token_id(m) or 0) for m in MARKERS)
    expected = [en, *base.encode("a"), response, *base.encode("b"), th, *new.encode("ไทย")]
    assert new.encode("<EN>a<RESPONSE>b<TH>ไทย") == expected
    spaced = "assistant\n<EN> a <RESPONSE> b <TH>\n ไทย"
    assert new.decode(new.encode(spaced)) == spaced
    assert new.find_special("x <TH> y") == "<TH>"
    assert new.decode(expected, skip_special_tokens=True) == "abไทย"


def test_the_same_corpus_gives_the_same_files(tmp_path: Path) -> None:
    base, expansion = made("smollm2")
    expansion.tokenizer.save(tmp_path / "a")
    expand(base, iter(THAI), size=SIZE, markers=MARKERS).tokenizer.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_base_is_left_as_it_was() -> None:
    base, _ = made("smollm2")
    before = base.fingerprint, base.backend.to_str()
    expand(base, THAI, size=SIZE, markers=MARKERS)
    assert (Tokenizer(base.backend, base.config, base.chat_template).fingerprint, base.backend.to_str()) == before


def test_auto_tokenizer_loads_the_saved_directory_with_equal_ids(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    new = made(kind)[1].tokenizer
    new.save(tmp_path)
    texts = [*THAI, *ENGLISH, "<EN> a <RESPONSE> b <TH> ไทย ๑๒ 345\n\n 🎉\u200b"]
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == new.fingerprint
    for with_model in (False, True):
        if with_model:  # beside a model, AutoTokenizer also looks at the model's type
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert len(auto) == new.vocab_size
        assert auto.eos_token_id == new.eos_id
        for text in texts:
            assert auto(text, add_special_tokens=False).input_ids == new.encode(text) == again.encode(text)
            assert auto(text).input_ids == new.bos_ids + new.encode(text)
            assert auto.decode(new.encode(text)) == new.decode(new.encode(text))


def test_report() -> None:
    base, expansion = made("smollm2")
    report = expansion.report
    assert report["tokens_per_character_before"] == pytest.approx(tokens_per_character(base, THAI))
    assert report["tokens_per_character_after"] == pytest.approx(tokens_per_character(expansion.tokenizer, THAI))
    assert report["tokens_per_character_after"] < 0.5 * report["tokens_per_character_before"]
    half = tokens_per_character(expansion.at(report["new_tokens"] // 2), THAI)
    assert report["tokens_per_character_half"] == pytest.approx(half)
    assert report["tokens_per_character_after"] < half < report["tokens_per_character_before"]
    json.dumps(report)


def test_more_tokens_than_the_corpus_supports_names_the_number_that_works() -> None:
    base, _ = made("smollm2")
    with pytest.raises(UserError, match="supports") as error:
        expand(base, THAI, size=5000, markers=MARKERS)
    supported = int(str(error.value).split("supports ")[1].split()[0])
    assert expand(base, THAI, size=supported, markers=MARKERS).report["new_tokens"] == supported
    with pytest.raises(UserError, match="supports"):
        expand(base, THAI, size=2 * supported, markers=MARKERS)
    # None of its tokens is dead, but for the first bytes of a character that the base cannot even begin.
    report = expand(base, THAI, size=supported, markers=MARKERS).report
    assert report["never_produced"] <= report["parts_of_characters"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": ["only English here"]}, "no Thai characters"),
        ({"documents": []}, "no Thai characters"),
        ({"language": "xx"}, "'xx' is not supported.*th"),
        ({"markers": ["<|im_end|>"]}, "has the marker '<|im_end|>' already"),
        ({"markers": ["<TH>", "<TH>"]}, "not all different"),
        ({"markers": ["< TH>"]}, "white space"),
        ({"size": 0}, "at least 1"),
        ({"size": 5}, "too few"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    given_: dict[str, object] = {"documents": THAI, "size": SIZE, "markers": MARKERS} | arguments
    with pytest.raises(UserError, match=message):
        expand(made("smollm2")[0], **given_)  # type: ignore[arg-type]


def test_other_kinds_of_base_are_refused_by_name(tmp_path: Path) -> None:
    spm = tokenizers.Tokenizer(models.BPE())
    spm.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram = tokenizers.Tokenizer(models.Unigram([("a", 0.0)]))
    punctuation = tokenizers.Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    punctuation.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), whole])
    for backend, message in ((spm, "SentencePiece"), (unigram, "Unigram"), (punctuation, "Punctuation")):
        with pytest.raises(UserError, match=message):
            expand(Tokenizer(backend, {}, None, "it"), THAI, size=SIZE, markers=MARKERS)


def test_three_byte_blocks_are_closed_under_their_first_two_bytes() -> None:
    for script in map(script_of, ("ar", "el", "he", "hi", "km", "lo", "ru", "ta", "th")):
        for first, last in script.blocks:
            if last >= 0x800:
                assert first % 64 == 0 and last % 64 == 63


def test_another_language() -> None:
    base, _ = made("smollm2")
    russian = ["сегодня хорошая погода, и мы идём гулять", "погода сегодня хорошая, 12 градусов"] * 3
    expansion = expand(base, russian, size=24, language="ru", markers=["<EN>", "<RU>", "<RESPONSE>"])
    assert base.decode(expansion.pieces[-2]) == " Russian"
    assert expansion.tokenizer.encode(THAI[0]) == base.encode(THAI[0])
    assert len(expansion.tokenizer.encode(russian[0])) < len(base.encode(russian[0])) / 2
