"""Translation by encoder-decoders of transformers: tiny random ones, with and without names of languages."""

from __future__ import annotations

import string
import sys
from pathlib import Path
from typing import Any

import pytest

from transllm_jax.config import Seq2seq
from transllm_jax.errors import UserError
from transllm_jax.generation.seq2seq import Seq2seqTranslator, check_seq2seq

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEXTS = ["the cat sat", "a", "on the mat, and then it slept"]
NEW = 12


def _small(size: int) -> dict[str, Any]:
    return {
        "vocab_size": size,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 64,
        # A random model hardly says the same twice.
        "init_std": 1.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of NLLB-200's kind."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("nllb")
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, "▁", *string.ascii_lowercase, ",", "."])}
    tokenizer = transformers.NllbTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=["eng_Latn", "tha_Thai"])
    tokenizer.save_pretrained(directory)
    torch.manual_seed(4)
    model = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**_small(len(tokenizer))))
    # So that some texts come to an end.
    model.model.shared.weight.data[2] *= 2.5
    model.save_pretrained(directory)
    return directory


def by_transformers(directory: Path, text: str, source: str, target: str, **options: Any) -> Any:
    """One text at a time, as NLLB's page says."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, src_lang=source)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
    given = tokenizer(text, return_tensors="pt")
    start = tokenizer.convert_tokens_to_ids(target)
    return model.generate(**given, forced_bos_token_id=start, max_new_tokens=NEW, do_sample=False, **options)[0]


@pytest.mark.reference
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_translated_as_transformers_translates_each_text(nllb: Path, beams: int) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(nllb)
    config = Seq2seq(model=str(nllb), source="eng_Latn", target="tha_Thai", beams=beams)
    translator = Seq2seqTranslator(config, max_new_tokens=NEW)
    assert translator.make([], "to_target") == []
    found = {}
    for direction, names in (("to_target", ("eng_Latn", "tha_Thai")), ("to_english", ("tha_Thai", "eng_Latn"))):
        made = translator.make(TEXTS, direction)  # type: ignore[arg-type]
        for text, one in zip(TEXTS, made, strict=True):
            ids = by_transformers(nllb, text, *names, num_beams=beams)
            assert (one.text or "") == tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert one.finished == (2 in ids[1:].tolist())
        found[direction] = made
    # The names make a difference, and the texts do.
    assert found["to_target"] != found["to_english"]
    assert len({one.text for one in found["to_target"]}) > 1
    if beams == 1:
        assert {one.finished for one in found["to_target"]} == {True, False}


@pytest.mark.reference
def test_a_model_without_names_is_given_the_name_before_the_text(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<pad>", "</s>", "<unk>", "<2th>", "<2en>", *string.ascii_lowercase, " "]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>")
    )
    backend.add_special_tokens(["<pad>", "</s>", "<2th>", "<2en>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(1)
    config = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    asked: list[str] = []
    translator = Seq2seqTranslator(Seq2seq(model=str(tmp_path), source="<2en>", target="<2th>"), max_new_tokens=NEW)
    whole = translator._tokenizer.__class__.__call__

    def listen(tokenizer: Any, texts: list[str], **options: Any) -> Any:
        asked.extend(texts)
        return whole(tokenizer, texts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translator._tokenizer.__class__, "__call__", listen)
        translator.make(["a b"], "to_target")
        translator.make(["a b"], "to_english")
    assert asked == ["<2th> a b", "<2en> a b"]
    # A model of one pair of languages needs no names, and has no way back.
    translator = Seq2seqTranslator(Seq2seq(model=str(tmp_path)), max_new_tokens=NEW)
    assert len(translator.make(["a b"], "to_target")) == 1
    with pytest.raises(UserError, match="translates in one direction; give source"):
        translator.make(["a b"], "to_english")


@pytest.mark.reference
def test_a_model_that_cannot_be_used_is_refused(nllb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has many languages; give source and target"):
        Seq2seqTranslator(Seq2seq(model=str(nllb)), max_new_tokens=NEW)
    named = Seq2seqTranslator(Seq2seq(model=str(nllb), source="eng_Latn", target="thai"), max_new_tokens=NEW)
    with pytest.raises(UserError, match="has no language 'thai'; see the model's page"):
        named.make(["a"], "to_target")
    check_seq2seq(Seq2seq(model=str(nllb)))
    (tmp_path / "model").mkdir()
    local = Seq2seq(model=str(tmp_path / "model"))
    for content in (None, "{}"):
        if content is not None:
            (tmp_path / "model" / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"recover\.seq2seq\.model: .*model cannot be loaded: \w+"):
            check_seq2seq(local)
        with pytest.raises(UserError, match="cannot be loaded"):
            Seq2seqTranslator(local, max_new_tokens=NEW)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(UserError, match="is no encoder-decoder; give a translation model"):
        check_seq2seq(local)
    with pytest.raises(UserError, match="there is no such directory; correct it"):
        check_seq2seq(Seq2seq(model=f"{tmp_path}/other"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is a directory model here, and no other in it"):
        check_seq2seq(Seq2seq(model="model/other"))


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_the_extra_one_line_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None if missing == "torch" else sys)
    monkeypatch.setitem(sys.modules, "transformers", None if missing == "transformers" else sys)
    with pytest.raises(UserError, match=rf"{missing}.* is missing.*; pip install 'transllm-jax\[seq2seq\]'$"):
        check_seq2seq(Seq2seq(model="facebook/nllb-200-distilled-600M"))
