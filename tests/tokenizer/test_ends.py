"""What ends an answer: one set of tokens, whichever of a model's files names them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import END, EOS, build_tiny_tokenizer, change

from transllm_jax.conversion.gguf.tokenizer import end_ids as gguf_ends
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import encode_conversation
from transllm_jax.tokenizer.ends import answer_end_id, end_ids, unnamed_end
from transllm_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tokenizer of the first Meta-Llama-3-8B-Instruct's kind: its eos is not what its template ends answers with."""
    build_tiny_tokenizer(tmp_path / "model")
    change(tmp_path / "model" / "tokenizer_config.json", eos_token=EOS)
    return tmp_path / "model"


def test_all_that_any_file_of_a_model_names_ends_an_answer(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    eos, end = tokenizer.token_id(EOS), tokenizer.token_id(END)
    # The template says it, and no file.
    assert end_ids(tokenizer) == (end, eos) and answer_end_id(tokenizer) == end and unnamed_end(tokenizer) == END
    # As the published files have it.
    change(model / "generation_config.json", eos_token_id=[eos, end])
    named = Tokenizer.load(model)
    assert end_ids(named) == (end, eos) and unnamed_end(named) is None
    # config.json counts, too, and ids that only it names.
    change(model / "generation_config.json", eos_token_id=None)
    change(model / "config.json", eos_token_id=[end, 7])
    assert end_ids(Tokenizer.load(model)) == (end, 7, eos)


def test_the_models_files_may_lie_elsewhere(model: Path, tmp_path: Path) -> None:
    change(model / "generation_config.json", eos_token_id=[5])
    shutil.copytree(model, tmp_path / "vocabulary")
    (tmp_path / "vocabulary" / "generation_config.json").unlink()
    assert 5 not in end_ids(Tokenizer.load(tmp_path / "vocabulary"))
    assert 5 in end_ids(Tokenizer.load(tmp_path / "vocabulary", model=model))


def test_training_ends_an_answer_with_one_of_them(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    [(ids, mask, _)] = encode_conversation(
        tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    )
    assert [token for token, trained in zip(ids, mask, strict=True) if trained][-1] in end_ids(tokenizer)


@pytest.mark.parametrize("wrong", ["</s>", [1, "2"], -1, True])
def test_an_eos_that_is_no_id_is_refused(model: Path, wrong: Any) -> None:
    change(model / "generation_config.json", eos_token_id=wrong)
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is .*; make it a token id or a list"):
        Tokenizer.load(model)


def test_a_document_ends_with_its_own_token(model: Path) -> None:
    state = (model / "tokenizer.json").read_text(encoding="utf-8").replace(EOS, "<|end_of_text|>")
    (model / "tokenizer.json").write_text(state, encoding="utf-8")
    change(model / "tokenizer_config.json", eos_token=END, unk_token=None)
    tokenizer = Tokenizer.load(model)
    assert tokenizer.token(tokenizer.document_end_id) == "<|end_of_text|>" != tokenizer.token(tokenizer.eos_id)


def test_a_gguf_file_may_name_an_end_of_turn_beside_eos() -> None:
    fields = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 3}
    assert gguf_ends(fields) == [3, 9]
    with pytest.raises(UserError, match="end tokens"):
        gguf_ends({"tokenizer.ggml.eot_token_id": "9"})
