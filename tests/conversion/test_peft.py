"""PEFT adapters out and in: what PEFT loads of ours, what we read of PEFT's, and what is refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import random_weights, tiny_config
from safetensors.numpy import load_file, save_file
from tiny_tokenizer import build_tiny_tokenizer

from conversion.hf.directory import HFModel, open_hf, read_weights, stacked, write_model
from conversion.peft.read import PeftAdapter, open_peft, read_peft
from conversion.peft.write import Rows, write_peft
from transllm_jax.errors import UserError
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import abstract, assemble, load_frozen, merge

VOCAB, NEW, LENGTH = 61, 5, 14
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.25)
SOME = LoraConfig(rank=2, alpha=5.5, rslora=True, targets=("q", "v", "down"))
IDS = list(range(VOCAB, VOCAB + NEW))
EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
# Float32 sums in another order: measured up to 1e-5 on logits of size 5.
NEAR = 1e-4


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, HFModel]:
    """The tied and the untied base."""
    directory = tmp_path_factory.mktemp("bases")
    for tied in (True, False):
        config = tiny_config(VOCAB, tied=tied)
        write_model(directory / str(tied), config, random_weights(config))
    return {tied: open_hf(directory / str(tied)) for tied in (True, False)}


def random_trainable(
    base: HFModel, lora: LoraConfig, new_rows: int = NEW, *, train_base: bool = False
) -> dict[str, np.ndarray]:
    """Adapters and rows in the middle of training: nothing is zero, and base rows have moved a little."""
    rng = np.random.default_rng(3)
    shapes = abstract(base.config, lora, new_rows, train_base=train_base).trainable
    arrays = {path: 0.2 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in sorted(shapes.items())}
    weights = random_weights(base.config)
    for path in arrays:
        if path.endswith("base_trained"):
            arrays[path] = weights[path.removesuffix("_trained")] + 0.1 * arrays[path]
    return arrays


def tokens(rows: int) -> np.ndarray:
    """One text with ids of all kinds, new ones first."""
    ids = np.random.default_rng(0).integers(0, rows, LENGTH)
    ids[: rows - VOCAB] = np.arange(VOCAB, rows)
    return ids


@partial(jax.jit, static_argnames="structure")
def _logits(trainable: Any, frozen: Any, rows: Any, *, structure: Any) -> jax.Array:
    model = merge(structure, trainable, frozen)
    return model.vocabulary.logits(model(*rows))


def ours(base: HFModel, lora: LoraConfig, trainable: dict[str, np.ndarray]) -> np.ndarray:
    """Our model's logits [T, V + n], adapters beside the kernels as in training."""
    frozen = load_frozen(base.config, read_weights(base.directory))
    split = assemble(base.config, frozen, lora=lora, trainable=trainable)
    ids = tokens(VOCAB + len(trainable.get("vocabulary.new", ())))[None]
    rows = tuple(map(jnp.asarray, (ids, np.arange(ids.size)[None], np.ones_like(ids))))
    return np.asarray(_logits(split.trainable, split.frozen, rows, structure=split.structure))[0]


def theirs(model: Any, rows: int) -> np.ndarray:
    """The logits of a torch model."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return np.asarray(model(torch.tensor(tokens(rows))[None]).logits[0])


def torch_base(base: HFModel, rows: int = VOCAB + NEW) -> Any:
    """The base in transformers, resized; its new rows are random and differ from call to call."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    if rows != VOCAB:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def load_with_peft(base: HFModel, directory: Path, rows: int = VOCAB + NEW) -> Any:
    """The adapter on the base; PEFT has nothing to complain of."""
    peft = pytest.importorskip("peft")
    model = torch_base(base, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's own are of this kind: a missing or an unknown key
        return peft.PeftModel.from_pretrained(model, directory).eval()


def trained_by_peft(base: HFModel, directory: Path, rows: int = VOCAB + NEW, save: Any = "auto", **options: Any) -> Any:
    """A model of PEFT with all that trains moved at random, saved as PEFT saves it; returns its logits."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config |= deepcopy(options)  # PEFT changes the lists that it is given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(torch_base(base, rows), peft.LoraConfig(**config)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(directory, save_embedding_layers=save)
    return theirs(model, rows)


# --- out ----------------------------------------------------------------------------------------------------------


@pytest.mark.reference
@TIED
@pytest.mark.parametrize(
    ("lora", "rows", "train_base"),
    [(LORA, None, False), (SOME, "tables", False), (LORA, None, True)],
    ids=["tokens", "tables", "base rows trained"],
)
def test_peft_loads_what_we_write(
    tmp_path: Path, bases: dict[bool, HFModel], tied: bool, lora: LoraConfig, rows: Rows | None, train_base: bool
) -> None:
    base = bases[tied]
    trainable = random_trainable(base, lora, train_base=train_base)
    write_peft(tmp_path / "a", base, trainable, lora, base_model="me/base", rows=rows)
    wanted = ours(base, lora, trainable)
    loaded = load_with_peft(base, tmp_path / "a")
    got = theirs(loaded, VOCAB + NEW)
    assert np.abs(got - wanted).max() < NEAR and np.abs(got).max() > 2
    assert loaded.peft_config["default"].lora_dropout == lora.dropout
    assert loaded.peft_config["default"].base_model_name_or_path == "me/base"
    with loaded.disable_adapter():
        assert np.abs(theirs(loaded, VOCAB + NEW) - wanted).max() > 0.5, "what is loaded counts"
    # Merged and saved by the user, it is the same model still, and tied if it was.
    merged = loaded.merge_and_unload()
    assert np.abs(theirs(merged, VOCAB + NEW) - wanted).max() < NEAR
    merged.save_pretrained(tmp_path / "merged")
    again = open_hf(tmp_path / "merged")
    assert again.config == replace(base.config, vocab_size=VOCAB + NEW)
    adapter = PeftAdapter(lora, trainable, NEW, None)
    mine = stacked(open_peft(adapter, base))
    for path, array in stacked(again).items():
        assert np.abs(array - mine[path]).max() < 1e-6, path  # one rounding of the merge


@pytest.mark.reference
def test_peft_loads_an_adapter_without_new_rows_on_the_base_as_it_is(
    tmp_path: Path, bases: dict[bool, HFModel]
) -> None:
    trainable = random_trainable(bases[True], LORA, 0)
    write_peft(tmp_path / "a", bases[True], trainable, LORA, base_model="me/base")
    got = theirs(load_with_peft(bases[True], tmp_path / "a", VOCAB), VOCAB)
    assert np.abs(got - ours(bases[True], LORA, trainable)).max() < NEAR


@TIED
@pytest.mark.parametrize("train_base", [False, True], ids=["new rows", "all rows"])
@pytest.mark.parametrize("rows", ["tokens", "tables"])
def test_out_and_in_again_is_bit_identical(
    tmp_path: Path, bases: dict[bool, HFModel], tied: bool, train_base: bool, rows: Rows
) -> None:
    base = bases[tied]
    trainable = random_trainable(base, SOME, train_base=train_base)
    write = partial(write_peft, tmp_path / "a", base, trainable, SOME, base_model="b", rows=rows)
    if train_base and rows == "tokens":
        with pytest.raises(UserError, match=r"base rows of the vocabulary were trained.* choose tables"):
            write()
        assert not list(tmp_path.iterdir())
        return
    write()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    back = read_peft(tmp_path / "a", base)
    assert back.lora == SOME and back.new_rows == NEW and back.tokenizer_dir is None
    assert back.trainable.keys() == trainable.keys()
    for path, array in trainable.items():
        assert back.trainable[path].dtype == np.float32
        assert back.trainable[path].tobytes() == array.tobytes(), path
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    if rows == "tokens":
        # Nothing of the base's: only what was trained.
        assert sum(array.size for array in stored.values()) == sum(array.size for array in trainable.values())
    np.testing.assert_array_equal(stored[f"{Q0}.lora_A.weight"], trainable["blocks.attention.q.a"][0].T)
    np.testing.assert_array_equal(stored[f"{Q0}.lora_B.weight"], trainable["blocks.attention.q.b"][0].T)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_types_are_rounded_once(tmp_path: Path, bases: dict[bool, HFModel], name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    trainable = random_trainable(bases[False], SOME)
    for rows in ("tokens", "tables"):
        write_peft(tmp_path / rows, bases[False], trainable, SOME, base_model="b", dtype=name, rows=rows)
        back = read_peft(tmp_path / rows, bases[False])
        # The base's rows are rounded too in a table, and are known all the same.
        assert back.trainable.keys() == trainable.keys()
        for path, array in trainable.items():
            np.testing.assert_array_equal(back.trainable[path], array.astype(dtype).astype(np.float32))
    big = trainable | {"vocabulary.new": trainable["vocabulary.new"] + np.float32(3e38)}
    if name == "float16":
        with pytest.raises(UserError, match=r"embed_tokens.token_adapter.*float16.*NaN or infinite"):
            write_peft(tmp_path / "big", bases[False], big, SOME, base_model="b", dtype=name)
        assert not (tmp_path / "big").exists()


def test_the_tokenizer_goes_with_it(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    build_tiny_tokenizer(tmp_path / "t")
    vocabulary = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    count = len(vocabulary["model"]["vocab"] | {t["content"]: t["id"] for t in vocabulary["added_tokens"]})
    trainable = random_trainable(bases[True], SOME)
    write = partial(write_peft, tmp_path / "a", bases[True], base_model="b", tokenizer_dir=tmp_path / "t", lora=SOME)
    with pytest.raises(UserError, match=f"the tokenizer has {count - VOCAB} ids from 61 on, the adapter has 5 new"):
        write(trainable=trainable)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    fits = random_trainable(bases[True], SOME, count - VOCAB)
    write(trainable=fits)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "t" / "tokenizer.json").read_bytes()
    assert read_peft(tmp_path / "a", bases[True]).tokenizer_dir == tmp_path / "a"
    with pytest.raises(UserError, match="exists and is not empty"):
        write(trainable=fits)
    write(trainable=fits, overwrite=True)


def test_what_cannot_be_written_is_refused(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    trainable = random_trainable(bases[False], SOME)
    write = partial(write_peft, tmp_path / "a", bases[False], base_model="b")
    with pytest.raises(UserError, match=r"vocabulary\.output_new is missing"):
        write({path: array for path, array in trainable.items() if path != "vocabulary.output_new"}, SOME)
    with pytest.raises(UserError, match="no layer has an adapter"):
        write({path: array for path, array in trainable.items() if "blocks" not in path}, replace(SOME, targets=()))
    with pytest.raises(UserError, match="dtype 'int8'"):
        write(trainable, SOME, dtype="int8")
    # These are no user's mistakes.
    with pytest.raises(ValueError, match="targets"):
        write(trainable, replace(SOME, targets=("q", "v")))
    with pytest.raises(ValueError, match="rank 2, the config 3"):
        write(trainable, replace(SOME, rank=3))
    assert not list(tmp_path.iterdir())


# --- in -----------------------------------------------------------------------------------------------------------

BOTH = ["embed_tokens", "lm_head"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rows": VOCAB},
    "resized and not trained": {},
    "all linear, rslora": {"target_modules": "all-linear", "use_rslora": True},
    "pattern": {"target_modules": r".*\.(k_proj|o_proj)$", "rows": VOCAB, "init_lora_weights": "gaussian"},
    "tables": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "tables, bare": {"modules_to_save": BOTH, "ensure_weight_tying": True, "save": False},
    "tables, no new rows": {"modules_to_save": BOTH, "ensure_weight_tying": True, "rows": VOCAB},
    "tokens": {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
    "tokens, bare": {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}, "save": False},
    "tokens, mixed": {
        "trainable_token_indices": {"embed_tokens": [3, *IDS[::-1], 7], "lm_head": [3, *IDS[::-1], 7]},
        "save": False,
    },
}


@pytest.mark.reference
@TIED
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_of_peft_compute_the_same_here(
    tmp_path: Path, bases: dict[bool, HFModel], tied: bool, variant: str
) -> None:
    base, options = bases[tied], VARIANTS[variant]
    rows = options.get("rows", VOCAB + NEW)
    wanted = trained_by_peft(base, tmp_path / "a", **options)
    adapter = read_peft(tmp_path / "a", base)
    assert adapter.new_rows == rows - VOCAB
    got = ours(base, adapter.lora, adapter.trainable)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() < NEAR and np.abs(wanted).max() > 0.5
    base_rows = "tables" in variant or variant == "tokens, mixed"
    assert ("vocabulary.base_trained" in adapter.trainable) == base_rows
    assert ("vocabulary.output_base_trained" in adapter.trainable) == (base_rows and not tied)
    assert adapter.lora.rslora == ("rslora" in variant)
    targets = {"all linear, rslora": ("q", "k", "v", "o", "gate", "up", "down"), "pattern": ("k", "o")}
    assert adapter.lora.targets == targets.get(variant, ("q", "down"))
    if variant == "tokens, mixed":
        assert list(np.flatnonzero((adapter.trainable["vocabulary.base_trained"] != base_table(base)).any(1))) == [3, 7]
    # And once more through our own hands.
    write_peft(tmp_path / "b", base, adapter.trainable, adapter.lora, base_model=str(base.directory))
    again = theirs(load_with_peft(base, tmp_path / "b", rows), rows)
    assert np.abs(again - wanted).max() < NEAR
    if variant == "tables":
        # An adapter whose base rows are the base's own has new rows only.
        put_base_rows_back(tmp_path / "a", base)
        adapter = read_peft(tmp_path / "a", base)
        assert sum("vocabulary" in path for path in adapter.trainable) == (1 if tied else 2)


def base_table(base: HFModel, name: str = "vocabulary.base") -> np.ndarray:
    return random_weights(base.config)[name]


def put_base_rows_back(directory: Path, base: HFModel) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if name.startswith((EMBED, HEAD)):
                output = name.startswith(HEAD) and not base.config.tie_word_embeddings
                array[:VOCAB] = base_table(base, "vocabulary.output_base" if output else "vocabulary.base")

    change(directory, arrays=edit)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("tied", "options", "said"),
    [
        (True, {"modules_to_save": BOTH}, "lm_head differs from embed_tokens, and the base ties"),
        (True, {"modules_to_save": ["embed_tokens"]}, "lm_head differs from embed_tokens, and the base ties"),
        (True, {"modules_to_save": ["embed_tokens"], "save": False}, "embed_tokens was trained without lm_head"),
        (True, {"modules_to_save": ["lm_head"], "save": False, "rows": VOCAB}, "lm_head differs from embed_tokens"),
        (True, {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS[:2]}}, "names other tokens"),
        (False, {"trainable_token_indices": IDS, "save": False}, "5 new rows of embed_tokens and 0 of lm_head"),
        (False, {"modules_to_save": ["lm_head"], "save": False}, "0 new rows of embed_tokens and 5 of lm_head"),
        (True, {"trainable_token_indices": [5, *IDS[1:]], "save": False}, "leaves out new tokens: 4 ids from 61"),
        (True, {"target_modules": r".*layers\.0.*q_proj"}, r"without an adapter, .*: model\.layers\.1\.self_attn\.q"),
        (True, {"target_modules": ["q_proj"], "layers_to_transform": [0]}, "layers_to_transform=.*some layers only"),
        (True, {"target_modules": ["q_proj", "lm_head"]}, "LoRA on lm_head is not supported"),
        (True, {"target_modules": r".*(q_proj|embed_tokens)"}, r"not part of .*embed_tokens\.lora_embedding_A"),
        (True, {"use_dora": True}, r"use_dora=True is not supported \(DoRA\)"),
        (True, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        (True, {"lora_bias": True}, "lora_bias=True is not supported"),
        (True, {"rank_pattern": {"down_proj": 2}}, "rank_pattern gives some layers another value"),
    ],
)
def test_adapters_of_peft_that_are_refused(
    tmp_path: Path, bases: dict[bool, HFModel], tied: bool, options: dict[str, Any], said: str
) -> None:
    trained_by_peft(bases[tied], tmp_path / "a", **options)
    with pytest.raises(UserError, match=said) as caught:
        read_peft(tmp_path / "a", bases[tied])
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)


@pytest.mark.reference
def test_every_field_of_peft_has_been_looked_at(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    """A field that changes PEFT's computation is refused or read; one that is new in PEFT shows here."""
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=3).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    write_peft(tmp_path / "a", bases[True], random_trainable(bases[True], SOME), SOME, base_model="b")
    written = (tmp_path / "a" / "adapter_config.json").read_text()
    for name in raw:
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(json.loads(written) | {name: {"made": "up"}}))
        try:
            read_peft(tmp_path / "a", bases[True])
        except UserError as error:
            assert f"{name}={{'made': 'up'}} is not known here" not in str(error)


# --- in: damage and options, without PEFT --------------------------------------------------------------------------


def change(
    directory: Path,
    config: Callable[[dict[str, Any]], Any] | None = None,
    arrays: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> None:
    """Edit an adapter's files in place."""
    if config is not None:
        raw = json.loads((directory / "adapter_config.json").read_text())
        config(raw)
        (directory / "adapter_config.json").write_text(json.dumps(raw))
    if arrays is not None:
        held = {name: array.copy() for name, array in load_file(directory / "adapter_model.safetensors").items()}
        arrays(held)
        save_file(held, directory / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, bases: dict[bool, HFModel]) -> Path:
    """Adapters as we write them: tied and untied, in both forms."""
    directory = tmp_path_factory.mktemp("written")
    for tied, base in bases.items():
        for rows in ("tokens", "tables"):
            trainable = random_trainable(base, SOME)
            write_peft(directory / f"{rows}-{tied}", base, trainable, SOME, base_model="b", rows=rows)
    return directory


def refused(
    tmp_path: Path, written: Path, base: HFModel, rows: str = "tokens", *, config: Any = None, arrays: Any = None
) -> str:
    """What is said of an adapter after a change."""
    directory = tmp_path / "a"
    shutil.copytree(written / f"{rows}-{base.config.tie_word_embeddings}", directory, dirs_exist_ok=True)
    change(directory, config, arrays)
    with pytest.raises(UserError) as caught:
        read_peft(directory, base)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("peft_type", "LOHA", "peft_type 'LOHA' is not supported"),
        ("peft_type", None, "peft_type None is not supported"),
        ("task_type", "SEQ_CLS", "task_type='SEQ_CLS' is not supported"),
        ("r", 0, "r is 0"),
        ("r", True, "r is True"),
        ("r", 2.0, "r is 2.0"),
        ("r", None, "r is None"),
        ("lora_alpha", "x", "lora_alpha is 'x'"),
        ("lora_alpha", None, "lora_alpha is None"),
        ("lora_alpha", 0, "lora_alpha is 0"),
        ("lora_dropout", 1, "lora_dropout is 1"),
        ("use_rslora", "yes", "use_rslora is 'yes'"),
        ("ensure_weight_tying", 1, "ensure_weight_tying is 1"),
        ("target_modules", None, "target_modules is None"),
        ("target_modules", [], "target_modules is []"),
        ("target_modules", ["c_attn"], "target_modules names no linear layer of this model"),
        ("target_modules", ["embed_tokens", "q_proj"], "LoRA on model.embed_tokens is not supported"),
        ("modules_to_save", ["score", "embed_tokens"], "modules_to_save: score is not supported"),
        ("modules_to_save", "lm_head", "modules_to_save is 'lm_head'"),
        ("modules_to_save", ["embed_tokens"], "both modules_to_save and trainable_token_indices name model.embed_tok"),
        ("trainable_token_indices", {"wte": [1]}, "trainable_token_indices: wte is not supported"),
        ("trainable_token_indices", [1, -1], "not a list of ids"),
        ("trainable_token_indices", [1, 10**30], "not a list of ids"),
        ("trainable_token_indices", [4, 4], "names 1 ids twice"),
        ("bias", "all", "bias='all' is not supported"),
        ("use_dora", True, "use_dora=True is not supported"),
        ("fan_in_fan_out", True, "fan_in_fan_out=True is not supported"),
        ("lora_bias", True, "lora_bias=True is not supported"),
        ("layers_to_transform", 0, "layers_to_transform=0 is not supported"),
        ("layers_pattern", "layers", "layers_pattern='layers' is not supported"),
        ("layer_replication", [[0, 1]], "layer_replication=[[0, 1]] is not supported"),
        ("megatron_config", {"a": 1}, "megatron_config={'a': 1} is not supported"),
        ("target_parameters", ["x"], "target_parameters=['x'] is not supported"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens=[1] is not supported"),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern gives some layers another value"),
        ("alpha_pattern", {"q_proj": 5.5, "v_proj": 1}, "alpha_pattern gives some layers another value"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights='pissa_niter_4' is not supported"),
        ("init_lora_weights", "olora", "init_lora_weights='olora' is not supported"),
        ("init_lora_weights", "loftq", "init_lora_weights='loftq' is not supported"),
        ("init_lora_weights", "corda", "init_lora_weights='corda' is not supported"),
        ("init_lora_weights", "mica", "init_lora_weights='mica' is not supported"),
        ("init_lora_weights", "lora_ga", "init_lora_weights='lora_ga' is not supported"),
        ("runtime_config", {"faster": 1}, "runtime_config={'faster': 1} is not known here"),
        ("invented_in_2031", 0.5, "invented_in_2031=0.5 is not known here"),
    ],
)
def test_options_that_are_refused_by_name(
    tmp_path: Path, written: Path, bases: dict[bool, HFModel], field: str, value: Any, said: str
) -> None:
    message = refused(tmp_path, written, bases[True], config=lambda raw: raw.update({field: value}))
    assert said in message


def test_all_options_that_are_refused_are_listed(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    message = refused(
        tmp_path, written, bases[True], config=lambda raw: raw.update(use_dora=True, bias="all", r=-1, new_thing=[1])
    )
    for said in ("use_dora=True", "bias='all'", "r is -1", "new_thing=[1]", "merge the adapter with PEFT"):
        assert said in message


def test_options_that_change_nothing_are_accepted(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    before = read_peft(written / "tokens-True", bases[True])
    shutil.copytree(written / "tokens-True", tmp_path / "a")
    change(
        tmp_path / "a",
        lambda raw: raw.update(
            rank_pattern={"q_proj": 2},
            alpha_pattern={"q_proj": 5.5},
            init_lora_weights="eva",
            eva_config={"rho": 1.0},
            runtime_config={"ephemeral_gpu_offload": True},
            task_type=None,
            auto_mapping={"base_model_class": "LlamaForCausalLM"},
            target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
            exclude_modules=["k_proj"],
            invented_in_2031=False,
            trainable_token_indices=IDS,
            layers_pattern=[],
        ),
    )
    after = read_peft(tmp_path / "a", bases[True])
    assert after.lora == before.lora and after.trainable.keys() == before.trainable.keys()


def test_all_wrong_tensors_are_listed(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    down = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"

    def edit(arrays: dict[str, np.ndarray]) -> None:
        del arrays[down.format(0, "B")], arrays[down.format(1, "B")]
        del arrays[f"{EMBED}.token_adapter.trainable_tokens_delta"]
        arrays[f"{Q0}.lora_A.weight"] = np.ones((2, 47), np.float32)
        arrays[f"{Q0}.lora_B.weight"] = np.ones((64, 2), np.int8)
        arrays[f"{Q0}.lora_magnitude_vector"] = np.ones(64, np.float32)
        arrays[f"{Q0.replace('q_proj', 'k_proj')}.lora_A.weight"] = np.ones((2, 48), np.float32)
        arrays["model.layers.0.self_attn.v_proj.lora_A.weight"] = np.ones((2, 48), np.float32)
        arrays["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"][0, 0] = np.nan
        arrays[f"{HEAD}.token_adapter.trainable_tokens_delta"][1, 1] = np.inf

    message = refused(tmp_path, written, bases[False], arrays=edit)
    for said in (
        "missing: model.embed_tokens.token_adapter.trainable_tokens_delta, "
        "model.layers.{0,1}.mlp.down_proj.lora_B.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight has shape [2, 47], expected [2, 48]",
        "model.layers.0.self_attn.q_proj.lora_B.weight has type I8",
        "not part of a LoRA adapter of this model: model.layers.0.self_attn.k_proj.lora_A.weight, "
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector, "
        "model.layers.0.self_attn.v_proj.lora_A.weight (without the prefix base_model.model.)",
        "NaN or infinite: lm_head.token_adapter.trainable_tokens_delta, model.layers.1.self_attn.v_proj.lora_A.weight",
    ):
        assert said in message


def test_half_a_pair_is_refused_where_the_file_decides(
    tmp_path: Path, written: Path, bases: dict[bool, HFModel]
) -> None:
    message = refused(
        tmp_path,
        written,
        bases[True],
        config=lambda raw: raw.update(target_modules="all-linear"),
        arrays=lambda arrays: arrays.pop(f"{Q0}.lora_A.weight"),
    )
    assert "missing: model.layers.0.self_attn.q_proj.lora_A.weight;" in message


def _set(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: value})


@pytest.mark.parametrize(
    ("tied", "rows", "config", "arrays", "said"),
    [
        (True, "tables", None, lambda a: a.pop(f"{EMBED}.weight"), "missing: model.embed_tokens.weight"),
        (False, "tables", None, lambda a: a.pop(f"{HEAD}.weight"), "missing: lm_head.weight"),
        (True, "tables", None, _set(f"{EMBED}.weight", np.ones((60, 48), np.float32)), "shape [60, 48], expected [61"),
        (True, "tables", None, _set(f"{EMBED}.weight", np.ones(48, np.float32)), "shape [48], expected [61, 48]"),
        (True, "tables", None, lambda a: a[f"{HEAD}.weight"].__setitem__((65, 0), 9), "lm_head differs from embed"),
        (
            False,
            "tables",
            None,
            _set(f"{EMBED}.original_module.weight", np.ones((66, 48), np.float32)),
            "model.embed_tokens.original_module.weight is not the table of",
        ),
        (
            False,
            "tables",
            None,
            _set(f"{HEAD}.modules_to_save.weight", np.ones((66, 48), np.float32)),
            "lm_head.modules_to_save.weight differs from lm_head.weight",
        ),
        (
            True,
            "tokens",
            {"trainable_token_indices": [61, 62, 63, 64, 2**31 - 1]},
            None,
            "leaves out new tokens: 5 ids from 61 on, up to 2147483647",
        ),
        (
            True,
            "tokens",
            None,
            _set(f"{EMBED}.token_adapter.base_layer.weight", np.ones((64, 48), np.float32)),
            "trainable_token_indices of model.embed_tokens names 65, above the table",
        ),
        (True, "tokens", {"trainable_token_indices": IDS[:4]}, None, "shape [5, 48], expected [4, 48]"),
        (True, "tokens", {"trainable_token_indices": None}, None, "not part of a LoRA adapter of this model: model.em"),
        (True, "tokens", {"trainable_token_indices": {"lm_head": IDS}}, None, "names other tokens for lm_head"),
    ],
)
def test_tables_that_are_refused(
    tmp_path: Path,
    written: Path,
    bases: dict[bool, HFModel],
    tied: bool,
    rows: str,
    config: dict[str, Any] | None,
    arrays: Any,
    said: str,
) -> None:
    message = refused(tmp_path, written, bases[tied], rows, config=lambda raw: raw.update(config or {}), arrays=arrays)
    assert said in message


def test_one_changed_row_makes_base_rows_trained_at_both_ends(
    tmp_path: Path, written: Path, bases: dict[bool, HFModel]
) -> None:
    shutil.copytree(written / "tables-False", tmp_path / "a")
    change(tmp_path / "a", arrays=lambda arrays: arrays[f"{HEAD}.weight"].__setitem__((7, 0), 2))
    back = read_peft(tmp_path / "a", bases[False]).trainable
    expected = base_table(bases[False], "vocabulary.output_base")
    np.testing.assert_array_equal(back["vocabulary.base_trained"], base_table(bases[False]))
    expected[7, 0] = 2
    np.testing.assert_array_equal(back["vocabulary.output_base_trained"], expected)


def test_a_bfloat16_base_is_known_in_a_float32_adapter(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    config = bases[True].config
    write_model(tmp_path / "base", config, random_weights(config), dtype="bfloat16")
    base = open_hf(tmp_path / "base")
    trainable = random_trainable(base, SOME)
    write_peft(tmp_path / "a", base, trainable, SOME, base_model="b", rows="tables")
    back = read_peft(tmp_path / "a", base)
    assert back.trainable.keys() == trainable.keys()
    # On a base of another type the rows are others: nothing is taken for the base's own by being close.
    assert "vocabulary.base_trained" in read_peft(tmp_path / "a", bases[True]).trainable


def test_files_that_are_refused(tmp_path: Path, written: Path, bases: dict[bool, HFModel]) -> None:
    directory = tmp_path / "a"
    weights = directory / "adapter_model.safetensors"

    def said(damage: Callable[[], Any]) -> str:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(written / "tokens-True", directory)
        damage()
        with pytest.raises(UserError) as caught:
            read_peft(directory, bases[True])
        return str(caught.value)

    assert "pickle file only (adapter_model.bin)" in said(lambda: weights.rename(directory / "adapter_model.bin"))
    assert "adapter_model.safetensors is missing" in said(weights.unlink)
    assert "is truncated or not a safetensors" in said(lambda: weights.write_bytes(weights.read_bytes()[:-1]))
    assert "is truncated or not a safetensors" in said(lambda: weights.write_bytes(b"\xff" * 64))
    assert "adapter_config.json is missing" in said((directory / "adapter_config.json").unlink)
    # A pickle beside the safetensors file is not looked at.
    shutil.copytree(written / "tokens-True", directory, dirs_exist_ok=True)
    (directory / "adapter_model.bin").write_bytes(b"not read")
    assert read_peft(directory, bases[True]).new_rows == NEW


@TIED
def test_the_merged_model_is_the_base_with_the_adapter(written: Path, bases: dict[bool, HFModel], tied: bool) -> None:
    base = bases[tied]
    adapter = read_peft(written / f"tokens-{tied}", base)
    opened = open_peft(adapter, base)
    assert opened.config == replace(base.config, vocab_size=VOCAB + NEW)
    merged, before = stacked(opened), random_weights(base.config)
    product = adapter.trainable["blocks.attention.q.a"] @ adapter.trainable["blocks.attention.q.b"]
    expected = before["blocks.attention.q.kernel"] + np.float32(5.5 / 2**0.5) * product
    assert np.abs(merged["blocks.attention.q.kernel"] - expected).max() < 1e-5
    for path in ("blocks.attention.k.kernel", "final_norm.scale"):
        np.testing.assert_array_equal(merged[path], before[path])
    for table in ("base", "output_base") if not tied else ("base",):
        rows = adapter.trainable[f"vocabulary.{table.removesuffix('base')}new"]
        np.testing.assert_array_equal(merged[f"vocabulary.{table}"][VOCAB:], rows)
        np.testing.assert_array_equal(merged[f"vocabulary.{table}"][:VOCAB], before[f"vocabulary.{table}"])
