"""Damage to our checkpoint: it is refused on opening, or reported when the weights are read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
from tiny_store import BF16, CONFIG, edited, finish, refused, source_of, written

from transllm_jax.conversion import store
from transllm_jax.conversion.names import tensors, weight_shapes
from transllm_jax.conversion.store import MANIFEST, Store, open_store
from transllm_jax.disk import read_json, write_json
from transllm_jax.errors import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("store") / "ours", source_of())


@pytest.fixture
def ours(finished: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged. To copy is quicker than to write one."""
    return shutil.copytree(finished, tmp_path / "ours")


def test_weights_are_checked_as_they_are_read(ours: Path) -> None:
    open_store(ours).arrays["blocks.mlp_norm.scale"][1].write(np.full(48, np.nan, BF16)).result()
    with pytest.raises(UserError, match=r"48 values are NaN.*model\.layers\.1\.post_attention_layernorm\.weight"):
        open_store(ours).weights()


@pytest.mark.parametrize("place", [0, 3000, -1])
def test_a_flipped_bit_is_found(ours: Path, place: int) -> None:
    chunk = ours / "weights/blocks.mlp.up.kernel/c/1/0/0"
    data = bytearray(chunk.read_bytes())
    data[place] ^= 1
    chunk.write_bytes(data)
    store = open_store(ours)
    for read in (store.weights, lambda: store.read_array("blocks.mlp.up.kernel", (slice(1, 2), slice(0, 1)))):
        with pytest.raises(UserError, match=r"blocks\.mlp\.up\.kernel cannot be read.*convert or copy"):
            read()
    store.read_array("blocks.mlp.up.kernel", (slice(0, 1),))  # the other layer is whole


def test_an_unfinished_checkpoint_is_refused(ours: Path) -> None:
    (ours / MANIFEST).unlink()
    assert "has no weights.json: it is not a checkpoint of ours, or was not finished" in refused(ours)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"format": "other"}, "format is 'other', not 'transllm-jax weights'"),
        ({"version": 2}, "version is 2, this program reads 1"),
        ({"version": None}, "version is None"),
        ({"arrays": []}, "arrays or mesh are not objects"),
        ({"mesh": 4}, "arrays or mesh are not objects"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(ours: Path, change: dict[str, Any], wrong: str) -> None:
    edited(ours, lambda manifest: manifest.update(change))
    assert wrong in refused(ours)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_broken_manifest_is_refused(ours: Path, text: str) -> None:
    (ours / MANIFEST).write_text(text)
    assert MANIFEST in refused(ours)


def test_all_faults_are_listed_in_one_line(ours: Path) -> None:
    """One fault of each kind, each in another array."""
    weights = ours / "weights"
    (weights / "blocks.mlp.up.kernel/c/1/0/0").unlink()
    with (weights / "blocks.mlp.gate.kernel/c/0/0/0").open("r+b") as file:
        file.truncate(48 * 80 * 2 - 2)
    with (weights / "blocks.attention_norm.scale/c/0/0").open("ab") as file:
        file.write(b"\0\0")
    (weights / "final_norm.scale/zarr.json").unlink()
    (weights / "vocabulary.base/zarr.json").write_text("{")
    zarr = read_json(weights / "blocks.attention.v.kernel/zarr.json")
    write_json(weights / "blocks.attention.v.kernel/zarr.json", {**zarr, "data_type": "float16"})

    def change(manifest: dict[str, Any]) -> None:
        entries = manifest["arrays"]
        entries["blocks.other"] = entries.pop("blocks.mlp.down.kernel")
        entries["blocks.attention.o.kernel"]["shape"] = [2, 48, 64]
        entries["blocks.attention.k.kernel"]["dtype"] = "int8"
        entries["blocks.attention.q.kernel"]["chunks"] = [1, 48]
        entries["blocks.mlp_norm.scale"] = 3

    edited(ours, change)
    message = refused(ours)
    for part in (
        "not part of the model: blocks.other;",
        "missing: blocks.mlp.down.kernel;",
        "blocks.mlp.up.kernel: 1 of 2 chunks are missing or unreadable (c/1/0/0)",
        "blocks.mlp.gate.kernel: 1 of 2 chunks are not of 7684 bytes (c/0/0/0)",
        "blocks.attention_norm.scale: 1 of 2 chunks are not of 100 bytes (c/0/0)",
        "final_norm.scale: ",
        "vocabulary.base: ",
        "blocks.attention.v.kernel: ",
        "blocks.attention.o.kernel: the shape is [2, 48, 64], config.json says [2, 64, 48]",
        "blocks.attention.k.kernel: dtype is 'int8'",
        "blocks.attention.q.kernel: chunks are [1, 48]",
        "blocks.mlp_norm.scale: the entry is not an object",
    ):
        assert part in message
    assert "vocabulary.output_base" not in message


@pytest.mark.parametrize("chunks", [[0, 48, 80], [1, 48, 81], [1.0, 48, 80], [True, 48, 80], "1", None, [2, 24, 80]])
def test_impossible_chunks_are_refused(ours: Path, chunks: Any) -> None:
    edited(ours, lambda manifest: manifest["arrays"]["blocks.mlp.up.kernel"].update(chunks=chunks))
    assert "blocks.mlp.up.kernel: " in refused(ours)


def test_a_config_of_another_model_is_refused(ours: Path) -> None:
    finish(ours, replace(CONFIG, num_hidden_layers=3))
    message = refused(ours)
    assert message.count("config.json says [3, ") == 9 and "vocabulary.base" not in message
    (ours / "config.json").unlink()
    assert "config.json is missing" in refused(ours)


@pytest.mark.parametrize("path", ["../../outside", "/etc/passwd", "a/../../../b", "..", ""])
def test_no_path_of_the_manifest_becomes_a_file_name(ours: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(ours, lambda manifest: manifest["arrays"].update({path: manifest["arrays"]["final_norm.scale"]}))
    shutil.copytree(ours / "weights/final_norm.scale", ours.parent / "outside")  # where the first path leads
    asked: list[str] = []
    real = tensorstore.open

    def watch(spec: dict[str, Any], **options: Any) -> Any:
        asked.append(spec["kvstore"]["path"])
        return real(spec, **options)

    monkeypatch.setattr(store.tensorstore, "open", watch)
    assert f"not part of the model: {path}" in refused(ours)
    assert {Path(name).parent for name in asked} == {ours / "weights"}
    assert len(asked) == len(weight_shapes(CONFIG))


def test_damage_after_opening_is_reported(ours: Path) -> None:
    opened: Store = open_store(ours)
    (ours / "weights/blocks.mlp.up.kernel/c/1/0/0").write_bytes(b"short")
    (ours / "weights/blocks.mlp.gate.kernel/c/0/0/0").unlink()
    whole = {t.name: t for t in tensors(CONFIG)}
    for name, path in (("1.mlp.up_proj", "blocks.mlp.up"), ("0.mlp.gate_proj", "blocks.mlp.gate")):
        with pytest.raises(UserError, match=rf"{path}\.kernel cannot be read") as caught:
            opened.read(whole[f"model.layers.{name}.weight"])
        assert str(ours) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"blocks\.mlp\.(up|gate)\.kernel cannot be read"):
            opened.weights()
