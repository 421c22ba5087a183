from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tiny_tokenizer

from transllm_jax.commands.open_tokenizer import open_tokenizer
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.expand import with_markers
from transllm_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def _edited(directory: Path, where: Path, file: str, **changes: object) -> Path:
    """A copy of the directory with changes to the top level of one JSON file (None removes a key)."""
    where.mkdir()
    for path in directory.iterdir():
        (where / path.name).write_bytes(path.read_bytes())
    content = json.loads((where / file).read_text()) | changes
    (where / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return where


def pad_id(tokenizer: Tokenizer) -> int | None:
    """The padding token; the end token where there is none."""
    role = tokenizer.role("pad_token")
    return tokenizer.eos_id if role is None else tokenizer.token_id(role)


def test_ids_and_roles(tiny: Tokenizer) -> None:
    assert tiny.vocab_size == 400
    assert [tiny.token_id(t) for t in SPECIAL_TOKENS] == [0, 1, 2]
    assert (tiny.eos_id, pad_id(tiny), tiny.document_end_id, tiny.bos_ids) == (2, 2, 0, [])
    assert tiny.special_tokens == {t: i for i, t in enumerate(SPECIAL_TOKENS)}
    assert tiny.token_id("no such token") is None
    assert tiny.token(10**6) is None


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_decoding_gives_the_text_back(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


def test_special_tokens_are_parsed_in_text_and_skipped_on_request(tiny: Tokenizer) -> None:
    ids = tiny.encode("hello<|im_end|>")
    assert ids[-1] == 2
    assert tiny.decode(ids) == "hello<|im_end|>"
    assert tiny.decode(ids, skip_special_tokens=True) == "hello"


def test_find_special(tiny: Tokenizer) -> None:
    assert tiny.find_special("a <|im_end|> b <|endoftext|>") == "<|im_end|>"
    assert tiny.find_special("a <|im_ end|> b") is None


def test_encode_batch_is_encode(tiny: Tokenizer) -> None:
    texts = ["hello", "", "the weather\n is nice", "ภาษาไทย"]
    assert tiny.encode_batch(iter(texts)) == [tiny.encode(t) for t in texts]


def test_truncation_and_padding_of_the_file_do_not_apply(directory: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    where = _edited(directory, tmp_path / "t", "tokenizer.json", truncation=truncation)
    assert len(Tokenizer.load(where).encode("the quick brown fox jumps")) > 2


def test_what_the_tokenizer_puts_before_a_text(directory: Path, tmp_path: Path) -> None:
    def special(name: str) -> dict[str, object]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    processor = {
        "type": "TemplateProcessing",
        "single": [special("<|im_start|>"), {"Sequence": {"id": "A", "type_id": 0}}, special("<|im_end|>")],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for i, name in enumerate(SPECIAL_TOKENS) if i
        },
    }
    tokenizer = Tokenizer.load(_edited(directory, tmp_path / "bos", "tokenizer.json", post_processor=processor))
    assert tokenizer.bos_ids == [1]
    assert 1 not in tokenizer.encode("hello")


def test_a_saved_directory_is_the_same_tokenizer(directory: Path, tiny: Tokenizer, tmp_path: Path) -> None:
    tiny.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == tiny.fingerprint
    assert again.chat_template == CHAT_TEMPLATE
    again.save(tmp_path / "twice")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


def test_a_class_that_would_change_the_ids_is_not_kept(directory: Path, tmp_path: Path) -> None:
    """GPT2Tokenizer of transformers 5 puts its own pre-tokenizer in the place of the file's."""
    transformers = pytest.importorskip("transformers")
    where = _edited(directory, tmp_path / "gpt2", "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    tokenizer = Tokenizer.load(where)
    tokenizer.save(tmp_path / "saved")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("in 12,345 days\n\n  it's", "ภาษาไทย ๑๒", "a<|im_end|>\nb"):
        assert auto(text).input_ids == tokenizer.encode(text)
    assert str(auto.backend_tokenizer.pre_tokenizer) == str(tokenizer.backend.pre_tokenizer)
    assert (auto.eos_token_id, auto.pad_token_id) == (tokenizer.eos_id, pad_id(tokenizer))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"chat_template": "{{ messages[0]['content'] }}"}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}),
    ],
)
def test_the_fingerprint_tells_what_differs(
    directory: Path, tiny: Tokenizer, tmp_path: Path, file: str, changes: dict[str, object]
) -> None:
    other = Tokenizer.load(_edited(directory, tmp_path / "other", file, **changes))
    assert other.fingerprint != tiny.fingerprint
    assert Tokenizer.load(directory).fingerprint == tiny.fingerprint


def test_where_the_chat_template_is_found(directory: Path, tmp_path: Path) -> None:
    where = _edited(directory, tmp_path / "x", "tokenizer_config.json", chat_template=None)
    assert Tokenizer.load(where).chat_template is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    named_dir = _edited(directory, tmp_path / "named", "tokenizer_config.json", chat_template=named)
    assert Tokenizer.load(named_dir).chat_template == "named"
    by_name = _edited(
        directory, tmp_path / "by", "tokenizer_config.json", chat_template={"default": "by name", "x": "no"}
    )
    assert Tokenizer.load(by_name).chat_template == "by name"
    (where / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer.load(where).chat_template == "json"
    (where / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.load(where).chat_template == "jinja"


USER = {"content": "<|user|>", "special": True}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}, "400": USER}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|im_start|>", "<|user|>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"user_token": "<|user|>"}}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|user|>"]}),
        ("added_tokens.json", {"<|user|>": 400}),
    ],
)
def test_a_token_that_only_another_file_names_is_not_cut_as_text(
    directory: Path, tmp_path: Path, file: str, content: dict[str, object]
) -> None:
    where = _edited(directory, tmp_path / "a", "tokenizer_config.json", **content if "config" in file else {})
    if "config" not in file:
        (where / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{file} names the token '<\|user\|>', which tokenizer.json lacks"):
        Tokenizer.load(where)
    transformers = pytest.importorskip("transformers")
    # As the message has it mended.
    transformers.AutoTokenizer.from_pretrained(where).save_pretrained(tmp_path / "b")
    mended = Tokenizer.load(tmp_path / "b")
    assert mended.encode("a<|user|>") == [*mended.encode("a"), 400]


def test_a_role_that_only_the_special_tokens_map_gives(directory: Path, tmp_path: Path) -> None:
    where = _edited(directory, tmp_path / "a", "tokenizer_config.json", bos_token=None, eos_token=None)
    roles = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (where / "special_tokens_map.json").write_text(json.dumps(roles))
    tokenizer = Tokenizer.load(where)
    assert (tokenizer.role("bos_token"), tokenizer.eos_id) == ("<|im_start|>", 2)
    assert pad_id(tokenizer) == 0  # where no added tokens are listed transformers reads this file last
    tokenizer.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").fingerprint == tokenizer.fingerprint


def test_a_role_may_be_an_object(directory: Path, tmp_path: Path) -> None:
    role = {"content": "<|endoftext|>", "lstrip": False}
    where = _edited(directory, tmp_path / "x", "tokenizer_config.json", eos_token=role, pad_token=None)
    assert (Tokenizer.load(where).eos_id, pad_id(Tokenizer.load(where))) == (0, 0)


def test_bad_directories(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a readable"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.load(tmp_path)
    unknown = _edited(directory, tmp_path / "u", "tokenizer_config.json", eos_token="<|nothing|>")
    with pytest.raises(UserError, match=r"<\|nothing\|>.*correct eos_token"):
        _ = Tokenizer.load(unknown).eos_id
    without = _edited(directory, tmp_path / "w", "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="names no eos_token"):
        _ = Tokenizer.load(without).eos_id


def _with_specials(directory: Path, where: Path, **config: object) -> Path:
    """A copy with two more special tokens in tokenizer.json, as Qwen2.5 has them, and changes to the config."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state = json.loads((directory / "tokenizer.json").read_text())
    added = [{"id": 400 + i, "content": f"<|box_{name}|>", **flags} for i, name in enumerate(("start", "end"))]
    where = _edited(directory, where, "tokenizer.json", added_tokens=state["added_tokens"] + added)
    content = json.loads((where / "tokenizer_config.json").read_text()) | config
    (where / "tokenizer_config.json").write_text(json.dumps(content))
    return where


_LISTED = ["<|im_start|>", "<|box_start|>", "<|box_end|>"]
_MARKERS = ["<EN>", "<TH>"]
_DECODER = {
    "0": {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"additional_special_tokens": _LISTED},
        {"extra_special_tokens": _LISTED},
        {"additional_special_tokens": _LISTED, "extra_special_tokens": []},
        {"additional_special_tokens": _LISTED, "extra_special_tokens": {"box_token": "<|box_start|>"}},
        {"extra_special_tokens": {"box_token": "<|box_start|>"}},
        {"additional_special_tokens": [{"__type": "AddedToken", "content": "<|box_end|>"}]},
        {
            "added_tokens_decoder": _DECODER,
            "padding_side": "left",
            "truncation_side": "left",
            "add_prefix_space": False,
        },
        {"add_bos_token": True, "add_eos_token": True, "tokenizer_class": "LlamaTokenizerFast"},
        {"add_bos_token": False, "bos_token": None, "tokenizer_class": "Qwen2Tokenizer", "split_special_tokens": False},
        {"model_max_length": 7, "errors": "replace", "legacy": True, "sp_model_kwargs": {}},
    ],
)
def test_metadata_comes_back_extended(directory: Path, tmp_path: Path, config: dict[str, object]) -> None:
    """All that AutoTokenizer says of an expanded tokenizer is what it says of the base, and the markers."""
    transformers = pytest.importorskip("transformers")
    base = Tokenizer.load(_with_specials(directory, tmp_path / "base", **config))
    new, _ = with_markers(base, _MARKERS)
    new.save(tmp_path / "new")
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "new"))
    assert after.all_special_tokens == before.all_special_tokens + _MARKERS
    assert after.extra_special_tokens == before.extra_special_tokens + _MARKERS
    same = ("special_tokens_map", "model_max_length", "padding_side", "truncation_side", "chat_template")
    for name in (*same, "model_input_names", "split_special_tokens"):
        assert getattr(after, name) == getattr(before, name), name
    grown = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
    ours = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    saved = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    for key, value in (base.config | ours).items():
        if key not in grown:
            assert saved[key] == value, key
        elif isinstance(value, list):
            assert saved[key][: len(value)] == value, key
        else:
            assert saved[key].items() >= value.items(), key
    if "added_tokens_decoder" in config:
        assert [saved["added_tokens_decoder"][str(new.token_id(m))]["content"] for m in _MARKERS] == _MARKERS
    for text in ("The weather is nice today.", " in 12 days\n\n it's", "a<|box_end|>\nb"):
        assert after(text).input_ids == before(text).input_ids == base.bos_ids + base.encode(text), text
        assert after(text + "<EN>").input_ids[-1] == new.token_id("<EN>")


def test_a_bos_token_that_only_the_config_asks_for(directory: Path, tmp_path: Path) -> None:
    """transformers 5 takes what stands around a text from tokenizer.json alone; a config that says more keeps it."""
    transformers = pytest.importorskip("transformers")
    where = _edited(directory, tmp_path / "base", "tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    for name, post in (("without", None), ("with", _TEMPLATE)):
        state = json.loads((where / "tokenizer.json").read_text()) | {"post_processor": post}
        (where / "tokenizer.json").write_text(json.dumps(state))
        tokenizer = Tokenizer.load(where)
        with_markers(tokenizer, _MARKERS)[0].save(tmp_path / name)
        both = [
            transformers.AutoTokenizer.from_pretrained(place)("hello").input_ids for place in (where, tmp_path / name)
        ]
        assert both[0] == both[1] == tokenizer.bos_ids + tokenizer.encode("hello")
        assert tokenizer.bos_ids == ([] if post is None else [1])
        saved = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert saved["add_bos_token"] is saved["add_eos_token"] is True


_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}


def test_roles_and_tokens_of_special_tokens_map(directory: Path, tmp_path: Path) -> None:
    """What older versions wrote beside the config counts, as in transformers, unless the config lists all tokens."""
    transformers = pytest.importorskip("transformers")
    where = _with_specials(directory, tmp_path / "base", eos_token="<|endoftext|>")
    eos = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {"eos_token": eos, "additional_special_tokens": _LISTED}
    (where / "special_tokens_map.json").write_text(json.dumps(special))
    base = Tokenizer.load(where)
    assert base.role("eos_token") == "<|im_end|>"
    with_markers(base, _MARKERS)[0].save(tmp_path / "new")
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "new"))
    assert before.eos_token == after.eos_token == "<|im_end|>"
    assert after.all_special_tokens == before.all_special_tokens + _MARKERS
    where = _edited(where, tmp_path / "listed", "tokenizer_config.json", added_tokens_decoder=_DECODER)
    assert Tokenizer.load(where).role("eos_token") == "<|endoftext|>"


def test_padding_of_the_file_and_of_the_class_stay_known(directory: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    padding = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 2}
    padding |= {"pad_type_id": 0, "pad_token": "<|im_end|>"}
    where = _edited(directory, tmp_path / "file", "tokenizer.json", padding=padding)
    Tokenizer.load(where).save(tmp_path / "saved-file")
    gemma = _edited(directory, tmp_path / "class", "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    Tokenizer.load(gemma).save(tmp_path / "saved-class")
    llama = _edited(directory, tmp_path / "bytes", "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    Tokenizer.load(llama).save(tmp_path / "saved-bytes")
    found = {
        name: transformers.AutoTokenizer.from_pretrained(tmp_path / name).padding_side
        for name in ("file", "saved-file", "saved-class", "bytes", "saved-bytes")
    }
    assert found == {
        "file": "left",
        "saved-file": "left",
        "saved-class": "left",
        "bytes": "right",
        "saved-bytes": "right",
    }


def test_other_chat_templates_stay(directory: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
    where = _edited(directory, tmp_path / "base", "tokenizer_config.json", chat_template=named)
    Tokenizer.load(where).save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").chat_template == CHAT_TEMPLATE
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template
    assert found == {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.model": "IQ== 0\nIg== 1\nIw== 2\n"}, "tokenizer.model is a tiktoken file (LLaMA-3's own format)"),
        ({"tekken.json": '{"config": {}}'}, "has no tokenizer.json, but tekken.json, Mistral's own format"),
        (
            {"vocab.json": "{}", "merges.txt": ""},
            "has no tokenizer.json, but vocab.json and merges.txt, which do not say",
        ),
        ({"vocab.txt": "[PAD]"}, "but vocab.txt, a WordPiece vocabulary: only BPE tokenizers are read"),
        ({"qwen.tiktoken": "IQ== 0", "tokenization_qwen.py": ""}, "but qwen.tiktoken and tokenization_qwen.py, a tok"),
        ({"tokenizer.model": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, "is a Git LFS pointer"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, "is a Git LFS pointer"),
        ({}, "has no tokenizer.json; fetch the tokenizer's files"),
    ],
)
def test_sound_files_of_other_formats_are_not_called_damaged(tmp_path: Path, files: dict[str, str], said: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name, text in files.items():
        (base / name).write_text(text)
    for config in (False, True):
        if config:
            (base / "tokenizer_config.json").write_text("{}")
        with pytest.raises(UserError) as error:
            open_tokenizer(str(base), tmp_path / "scratch")
        message = str(error.value)
        assert said in message and str(base) in message and "\n" not in message
        assert "damaged" not in message and "truncated" not in message and "fetch it again" not in message
