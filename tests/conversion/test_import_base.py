"""Import of a base: its files are checked, and copied as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import pytest
from tiny_directories import IDS, edit_json, write_directory, write_tokenizer

from transllm_jax.conversion.import_base import base_fingerprint, fingerprint_of, import_base
from transllm_jax.disk import sha256_of
from transllm_jax.errors import UserError


@pytest.mark.parametrize("shards", [1, 2])
def test_import_copies_a_directory_byte_for_byte(tmp_path: Path, shards: int) -> None:
    src, dst = tmp_path / "m", tmp_path / "runs/base"
    write_directory(src, dtype=ml_dtypes.bfloat16, shards=shards)
    (src / "modeling_evil.py").write_text("raise SystemExit")
    (src / "LICENSE").write_text("Apache-2.0")
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    import_base(str(src), dst)
    after = {path.name: path.read_bytes() for path in dst.iterdir()}
    assert after.keys() - before.keys() == {"source.json", "generation_config.json"}
    assert before.keys() - after.keys() == {"modeling_evil.py"}
    assert all(after[name] == before[name] for name in after.keys() & before.keys())
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before
    assert json.loads(after["generation_config.json"]) == IDS
    source = json.loads(after["source.json"])
    hashes = {path.name: sha256_of(path) for path in sorted(src.glob("*.safetensors"))}
    assert source["weights_sha256"] == hashes and source["source"] == str(src)
    assert source["fingerprint"] == base_fingerprint(dst) == fingerprint_of(hashes)
    # The files are copied, not linked: to train the source further in place must not change the base.
    assert not any(os.path.samefile(path, src / path.name) for path in dst.glob("*.safetensors"))
    import_base(str(src), tmp_path / "again", sha256=source["fingerprint"].upper())
    with pytest.raises(UserError, match="have SHA-256"):
        import_base(str(src), tmp_path / "third", sha256="0" * 64)
    assert not (tmp_path / "third").exists()


def test_import_keeps_a_generation_config_and_needs_an_end_token(tmp_path: Path) -> None:
    src = tmp_path / "m"
    write_directory(src)
    (src / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    import_base(str(src), tmp_path / "base")
    assert json.loads((tmp_path / "base/generation_config.json").read_text()) == {"eos_token_id": [2, 0]}
    (src / "generation_config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        import_base(str(src), tmp_path / "other")
    assert str(caught.value).startswith(f"{src / 'generation_config.json'} is not valid JSON")
    (src / "generation_config.json").unlink()
    edit_json("config.json", lambda config: config.pop("eos_token_id"))(src)
    with pytest.raises(UserError, match="eos_token_id"):
        import_base(str(src), tmp_path / "other")


def test_import_compares_the_tokenizer_with_the_embedding(tmp_path: Path) -> None:
    write_directory(tmp_path / "m")
    write_tokenizer(tmp_path / "m", 290)  # a padded embedding is normal
    said: list[str] = []
    import_base(str(tmp_path / "m"), tmp_path / "base", say=said.append)
    assert "10 embedding rows have no token: padding, kept as it is" in said
    write_tokenizer(tmp_path / "m", 301)
    with pytest.raises(UserError, match="ids up to 300, the embedding has 300 rows"):
        import_base(str(tmp_path / "m"), tmp_path / "other")
    (tmp_path / "m/tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="no vocabulary"):
        import_base(str(tmp_path / "m"), tmp_path / "other")
    (tmp_path / "m/tokenizer.json").rename(tmp_path / "m/tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer\.model is truncated or not a SentencePiece model"):
        import_base(str(tmp_path / "m"), tmp_path / "other")
    (tmp_path / "m/tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json; fetch the tokenizer's files"):
        import_base(str(tmp_path / "m"), tmp_path / "other")


def test_import_does_not_overwrite(tmp_path: Path) -> None:
    write_directory(tmp_path / "m")
    with pytest.raises(UserError, match="the directory that the import would write"):
        import_base(str(tmp_path / "m"), tmp_path / "m", overwrite=True)
    (tmp_path / "base").mkdir()
    import_base(str(tmp_path / "m"), tmp_path / "base")  # an empty directory is no obstacle
    with pytest.raises(UserError, match="not empty"):
        import_base(str(tmp_path / "m"), tmp_path / "base")
    import_base(str(tmp_path / "m"), tmp_path / "base", overwrite=True)
