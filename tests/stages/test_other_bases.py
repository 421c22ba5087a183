"""Whole runs on a SentencePiece base, and on a tokenizer that was expanded before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, write_run_config, write_tiny_model
from tiny_sentencepiece import write_sentencepiece_model

from transllm_jax.commands.open_model import open_source
from transllm_jax.conversion.logits import logits_of
from transllm_jax.tokenizer.chat import render
from transllm_jax.tokenizer.growing.expand import expand, save_expanded
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays

THAI = Path(__file__).parents[2] / "examples" / "thai" / "text.train.txt"


@pytest.mark.full
@pytest.mark.reference
def test_a_run_on_a_sentencepiece_base(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_sentencepiece_model(tmp_path / "model")
    assert call("run", write_run_config(tmp_path, tmp_path / "model")) == 0
    run, out = tmp_path / "run", tmp_path / "run" / "export"
    report = json.loads((run / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert report["kind"] == "sentencepiece" and report["never_produced"] == 0
    assert report["tokens_per_character_after"] < 0.7 * report["tokens_per_character_before"]

    ours, theirs = Tokenizer.load(run / "vocabulary"), AutoTokenizer.from_pretrained(out)
    pieces = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    for line in THAI.read_text(encoding="utf-8").splitlines()[:40]:
        assert ours.encode(line) == theirs(line, add_special_tokens=False)["input_ids"] == pieces.encode(line)
    talk: Any = [{"role": "user", "content": "ประเทศไทย"}, {"role": "assistant", "content": "<EN>a<RESPONSE>b<TH>ค"}]
    assert theirs.apply_chat_template(talk, tokenize=False) == render(ours, talk)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = ours.encode("ประเทศไทย and the capital of France")
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    found = open_source(str(run))
    assert np.abs(logits_of(found.model, ids, found.lora) - wanted).max() < 1e-4
    assert call("chat", run, "ประเทศไทย", "--max-new-tokens", "4") == 0


def test_a_tokenizer_that_was_expanded_before(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same rows and ids as where the stage learns the tokens itself."""
    write_tiny_model(tmp_path / "model")
    base = Tokenizer.load(tmp_path / "model")
    documents = THAI.read_text(encoding="utf-8").split("\n\n")[:60]
    expansion = expand(base, documents, size=140, markers=[])
    save_expanded(expansion.tokenizer, tmp_path / "model", tmp_path / "expanded")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(documents), encoding="utf-8")

    given, learned = tmp_path / "given", tmp_path / "learned"
    for place, section in (
        (given, {"tokenizer": str(tmp_path / "expanded")}),
        (learned, {"size": 140, "corpus": [{"path": str(corpus)}]}),
    ):
        place.mkdir()
        assert (
            call("run", write_run_config(place, tmp_path / "model", vocabulary=section), "--until", "vocabulary") == 0
        )
    rows = [load_arrays(place / "run/vocabulary/trainable") for place in (given, learned)]
    tokenizers = [Tokenizer.load(place / "run/vocabulary") for place in (given, learned)]
    assert tokenizers[0].encode(documents[3]) == tokenizers[1].encode(documents[3])
    assert [tokenizers[0].token_id(marker) for marker in ("<EN>", "<RESPONSE>", "<TH>")] == [540, 541, 542]
    assert rows[0].keys() == rows[1].keys()
    for path, values in rows[1].items():
        np.testing.assert_array_equal(rows[0][path], values, err_msg=path)
    assert call("run", given / "config.yaml", "--until", "vocabulary") == 0, "nothing to redo"

    # Another base's tokenizer, and one whose ids begin within the model's padding rows.
    swapped = json.loads(expansion.tokenizer.backend.to_str())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["and"], vocabulary["ing"] = vocabulary["ing"], vocabulary["and"]
    for name, state, said in (
        ("unexpanded", json.loads(base.backend.to_str()), "has no token 400; expand it again"),
        ("other", swapped, "was not expanded from"),
    ):
        (tmp_path / name).mkdir()
        base.save(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        section = {"tokenizer": str(tmp_path / name)}
        place = tmp_path / f"with-{name}"
        place.mkdir()
        capfd.readouterr()
        config = write_run_config(place, tmp_path / "model", vocabulary=section)
        assert call("run", config, "--until", "vocabulary") == 2
        errors = capfd.readouterr().err
        assert said in errors and errors.startswith("error: vocabulary.tokenizer:") and errors.count("\n") == 1
