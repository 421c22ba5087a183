"""An adapter that PEFT began goes on training in a run: `convert from-peft`, then `vocabulary.adapter`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import call, tiny_run, write_tiny_model

from transllm_jax.commands.open_model import open_source
from transllm_jax.conversion.adapter import read_adapter
from transllm_jax.conversion.logits import logits_of
from transllm_jax.disk import read_json, write_json
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays

IDS = [1, 65, 70, 99, 300, 400, 401, 402, 7]
LORA = {"rank": 3, "alpha": 8, "rslora": True, "targets": ["q", "v", "down"]}


def write_config(path: Path, model: Path, workdir: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = tiny_run(model, workdir, **changes)
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["tied", pytest.param("untied", marks=pytest.mark.full)])
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A base and, beside it, an adapter as PEFT users train it: tokens added, whole tables saved; and its logits.

    The table is padded to a multiple of 8 rows, as they do for speed.
    """
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here = tmp_path_factory.mktemp(request.param)
    write_tiny_model(here / "base", tied=request.param == "tied")
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    tokenizer.add_tokens(["ภาษาไทย", "สวัสดี", "ครับ"])
    base = AutoModelForCausalLM.from_pretrained(str(here / "base"), dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=request.param == "tied",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "modules_to_save" in name and values.requires_grad:
                values += 0.02 * torch.randn(values.shape)
    model.save_pretrained(here / "peft")
    tokenizer.save_pretrained(here / "peft")
    with torch.no_grad():
        return here, model.eval()(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.reference
def test_an_adapter_goes_on_training(begun: tuple[Path, np.ndarray], tmp_path: Path, capfd: Any) -> None:
    here, wanted = begun
    assert call("convert", "from-peft", here / "base", here / "peft", tmp_path / "ours") == 0
    printed = capfd.readouterr().out.replace("\n", " ")
    assert "5 new rows have no token: padding, left out" in printed and "3 new tokens" in printed
    assert "lora.rank=3" in printed and "embeddings=all" in printed
    found = open_source(str(tmp_path / "ours"))
    assert np.abs(logits_of(found.model, IDS, found.lora) - wanted[:, :403]).max() < 1e-4

    # Input rows train where their tokens are read: each document has one of them.
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"สวัสดี ภาษาไทย {number}" for number in range(64)) + "\n", encoding="utf-8")
    config = write_config(
        tmp_path / "config.yaml",
        here / "base",
        tmp_path / "run",
        vocabulary={"adapter": str(tmp_path / "ours")},
        lora={**LORA, "dropout": 0.0},
        embeddings="all",
    )
    assert call("run", config, f"pretrain.sources=[{{path: {text}}}]", "--until", "pretrain") == 0
    begin = open_source(str(tmp_path / "run"), stage="vocabulary")
    # What PEFT had computed is where training begins; the three markers came behind.
    logits = logits_of(begin.model, IDS, begin.lora)
    assert begin.model.config.vocab_size == 406
    assert np.abs(logits[:, :403] - wanted[:, :403]).max() < 1e-4
    tokenizer = Tokenizer.load(tmp_path / "run/vocabulary")
    assert [tokenizer.token_id(text) for text in ("ภาษาไทย", "<EN>", "<RESPONSE>", "<TH>")] == [400, 403, 404, 405]
    assert tokenizer.encode("สวัสดี") == [401]
    before, after = (load_arrays(tmp_path / "run" / point / "trainable") for point in ("vocabulary", "pretrain"))
    assert before.keys() == after.keys()
    assert not [path for path in before if not np.abs(after[path] - before[path]).max() > 0]
    assert not any(path.startswith("blocks.attention.k") for path in before)


@pytest.mark.reference
def test_a_damaged_adapter_is_refused(begun: tuple[Path, np.ndarray], tmp_path: Path, capfd: Any) -> None:
    here, _ = begun
    for number, (damage, said) in enumerate(
        (
            (lambda data: data[: len(data) // 2], "is not complete or damaged"),
            (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], ""),
        )
    ):
        ours = tmp_path / str(number)
        assert call("convert", "from-peft", here / "base", here / "peft", ours) == 0
        files = [path for path in (ours / "trainable").rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(damage(largest.read_bytes()))
        capfd.readouterr()
        assert call("convert", "to-hf", ours, tmp_path / "out") == 2
        errors = capfd.readouterr().err
        assert said in errors and str(ours) in errors and errors.count("\n") == 1
    (ours / "trainable/sha256.json").unlink()
    assert call("convert", "to-hf", ours, tmp_path / "out") == 2


@pytest.mark.reference
def test_an_adapter_finds_its_base_from_everywhere(
    begun: tuple[Path, np.ndarray], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = begun
    monkeypatch.chdir(here)
    assert call("convert", "from-peft", "base", "peft", tmp_path / "ours") == 0
    assert "the adapter names" not in capfd.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert call("convert", "to-hf", "ours", "out") == 0
    (here / "base").rename(here / "moved")
    capfd.readouterr()
    try:
        assert call("convert", "to-hf", "ours", "out2") == 2
        assert "give it with --base" in capfd.readouterr().err
        assert call("convert", "to-hf", "ours", "out2", "--base", here / "moved") == 0
    finally:
        (here / "moved").rename(here / "base")
    shutil.copytree(here / "base", tmp_path / "copy")
    assert call("convert", "from-peft", "copy", here / "peft", "ours2") == 0
    assert "as its base; it is read on copy" in capfd.readouterr().out


@pytest.mark.reference
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {**LORA, "rank": 4}}, "needs lora.rank=3; set it"),
        ({"lora": {"rank": 3, "alpha": 9}}, "lora.alpha=8.0 lora.rslora=True lora.targets=[q,v,down]"),
        ({"embeddings": "new"}, "embeddings=all"),
        ({"model": "other"}, "was made for another base"),
        ({"vocabulary": {"adapter": "nowhere"}}, "nowhere"),
        ({"vocabulary": {"adapter": "OURS", "size": 4}}, "an adapter brings its tokens"),
        ({"vocabulary": {"min_count": 3}}, "size and corpus are needed"),
    ],
    ids=str,
)
def test_a_run_that_does_not_fit_the_adapter_is_refused(
    begun: tuple[Path, np.ndarray], tmp_path: Path, capfd: Any, changes: dict[str, Any], said: str
) -> None:
    here, _ = begun
    assert call("convert", "from-peft", here / "base", here / "peft", tmp_path / "ours") == 0
    ours = str(tmp_path / "ours")
    options: dict[str, Any] = {"vocabulary": {"adapter": ours}, "lora": LORA, "embeddings": "all", **changes}
    if options["vocabulary"].get("adapter") == "OURS":
        options["vocabulary"] = {**options["vocabulary"], "adapter": ours}
    model = here / "base"
    if options.pop("model", None):
        model = tmp_path / "other"
        write_tiny_model(model, tied=read_json(here / "base/config.json")["tie_word_embeddings"], seed=9)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "run", **options)
    capfd.readouterr()
    assert call("run", config, "--until", "vocabulary") == 2
    errors = capfd.readouterr().err
    assert said in errors and errors.count("\n") == 1


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    from transllm_jax.errors import UserError

    for damage, said in (
        ({"format": "transllm-adapter-9"}, "not of the format"),
        ({"lora": {"rank": 3, "alpha": 8, "targets": ["q", "x"]}}, "targets"),
        ({"lora": {"rank": 3, "beta": 8, "targets": ["q"]}}, "beta"),
        ({"embedding_sha256": None, "more": 1}, "more"),
    ):
        good = {"format": "transllm-adapter-1", "base": "b", "embedding_sha256": "0", "source": "s"}
        write_json(tmp_path / "adapter.json", {**good, "lora": {"rank": 3, "alpha": 8, "targets": ["q"]}, **damage})
        with pytest.raises(UserError, match=said):
            read_adapter(tmp_path)
