"""Datasets of Hugging Face and of TFDS as sources."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_sources import CHAT, THAI, hash_of, items, jsonl, places, write

from transllm_jax.data.read import hub
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import Reading, Shard, shards
from transllm_jax.errors import UserError


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return pytest.importorskip("datasets")


def keys(found: list[Shard]) -> list[str]:
    return [shard.key for shard in found]


def test_a_local_dataset_is_read(tmp_path: Path, datasets: Any) -> None:
    root = tmp_path / "corpus"
    for number in range(3):
        jsonl(root / f"train-{number}.jsonl", [{"text": f"{THAI} {number}.{n}"} for n in range(2)])
    jsonl(root / "test.jsonl", [{"text": "held out"}])
    reading = Reading(str(root), container="datasets")
    found = shards(reading, hash_of)
    assert [shard.name for shard in found] == ["corpus-train-0", "corpus-train-1", "corpus-train-2"]
    assert len(set(keys(found))) == 3 and all(shard.size > 0 for shard in found)
    assert sorted(items(reading)) == [f"{THAI} {number}.{n}" for number in range(3) for n in range(2)]  # type: ignore[type-var]
    assert items(Reading(str(root), container="datasets", split="test")) == ["held out"]
    again = pickle.loads(pickle.dumps(found[1]))
    assert [str(place) for _, place in again.items(Collector("refuse"))][1].endswith("(train, shard 2 of 3):record 2")
    assert [item for item, _ in again.items(Collector("refuse"))] == [f"{THAI} 1.{n}" for n in range(2)]
    (limited,) = shards(Reading(str(root), container="datasets", max_bytes=1), hash_of)
    assert len(list(limited.items(Collector("refuse")))) == 1
    # Only the files of the split count.
    before = keys(found)
    jsonl(root / "test.jsonl", [{"text": "changed"}])
    assert keys(shards(reading, hash_of)) == before
    jsonl(root / "train-2.jsonl", [{"text": "changed"}])
    assert not set(keys(shards(reading, hash_of))) & set(before)
    with pytest.raises(UserError, match=r"corpus.*\"?dev"):
        shards(Reading(str(root), container="datasets", split="dev"), hash_of)
    with pytest.raises(UserError, match=r"corpus \(test\):record 1 has no field 'body'"):
        items(Reading(str(root), container="datasets", split="test", fields=("body",)))


def test_a_dataset_saved_to_disk_is_read(tmp_path: Path, datasets: Any) -> None:
    root = tmp_path / "saved"
    whole = datasets.Dataset.from_list([{"messages": CHAT[:2]}, {"messages": CHAT}])
    datasets.DatasetDict({"train": whole}).save_to_disk(root)
    reading = Reading(str(root), "conversations", container="datasets")
    assert items(reading) == [CHAT[:2], CHAT]
    with pytest.raises(UserError, match="no such split; it has train"):
        shards(Reading(str(root), "conversations", container="datasets", split="dev"), hash_of)
    whole.save_to_disk(tmp_path / "one")
    assert items(Reading(str(tmp_path / "one"), "conversations", container="datasets")) == [CHAT[:2], CHAT]


def test_a_directory_may_have_the_name_of_a_format(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "json" / "train.jsonl", [{"text": "one"}])
    assert items(Reading("json", container="datasets")) == ["one"]


def test_datasets_that_are_damaged_or_no_text_are_refused(tmp_path: Path, datasets: Any) -> None:
    write(tmp_path / "bad" / "train.jsonl", '{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad") as caught:
        items(Reading(str(tmp_path / "bad"), container="datasets"))
    assert "\n" not in str(caught.value)
    write(tmp_path / "pictures" / "a.png", b"x")
    with pytest.raises(UserError, match="kind 'imagefolder', which is not supported"):
        shards(Reading(str(tmp_path / "pictures"), container="datasets"), hash_of)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        shards(Reading(str(tmp_path / "empty"), container="datasets"), hash_of)


def test_a_dataset_of_the_hub_is_pinned_to_its_revision(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, str | None]] = []
    head = ["a" * 40]
    real = datasets.load_dataset_builder
    jsonl(tmp_path / "corpus" / "train.jsonl", [{"text": "one"}])
    local = real(str(tmp_path / "corpus"))

    def load(path: str, name: str | None, *, revision: str | None = None, **options: Any) -> Any:
        assert options == {"data_dir": None}  # and never trust_remote_code
        asked.append((path, name, revision))
        return Builder(hash=revision or head[0], as_streaming_dataset=local.as_streaming_dataset)

    class Builder(SimpleNamespace):
        __module__ = "datasets.packaged_modules.json.json"

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    reading = Reading("owner/name/thai", container="datasets")
    (first,) = shards(reading, hash_of)
    assert asked[0] == ("owner/name", "thai", None) and first.size == 0
    head[0] = "b" * 40
    asked.clear()
    # A shard that was made before a change still reads the revision that it was made for.
    assert [item for item, _ in first.items(Collector("refuse"))] == ["one"]
    assert set(asked) == {("owner/name", "thai", "a" * 40)}
    (second,) = shards(reading, hash_of)
    (pinned,) = shards(Reading(f"owner/name/thai@{'a' * 40}", container="datasets"), hash_of)
    assert second.key != first.key == pinned.key
    head[0] = "main"
    with pytest.raises(UserError, match="its revision on the hub cannot be found out"):
        shards(reading, hash_of)


def test_without_a_network_one_line_says_so(datasets: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^owner/name: .*Couldn't reach.*; check the network, or download") as caught:
        shards(Reading("owner/name/thai", container="datasets"), hash_of)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")
    # The attempts of a machine that only has no network are not printed either.
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
    ("module", "container", "package"),
    [("datasets", "datasets", "datasets"), ("tensorflow_datasets", "tfds", "tensorflow-datasets")],
)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, container: Any, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"needs `{package}`; pip install 'transllm-jax\[data\]'"):
        shards(Reading(str(tmp_path), container=container), hash_of)


def test_an_empty_shard_is_skipped(tmp_path: Path, datasets: Any) -> None:
    root = tmp_path / "corpus"
    for number, text in enumerate(("a\n", "")):
        write(root / f"train-{number}.csv", f"text\n{text}")
    reading = Reading(str(root), container="datasets")
    assert len(shards(reading, hash_of)) == 2 and items(reading) == ["a"]
    (root / "train-0.csv").unlink()
    with pytest.raises(UserError, match="has no documents"):
        items(reading)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of prepared datasets. It holds one dataset in two files."""
    tfds = pytest.importorskip("tensorflow_datasets")
    directory = tmp_path_factory.mktemp("tfds")
    text = tfds.features.Text()

    class TinyThai(tfds.core.GeneratorBasedBuilder):
        name = "tiny_thai"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {
                "text": text,
                "translation": tfds.features.Translation(["en", "th"]),
                "messages": tfds.features.Sequence({"role": text, "content": text}),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> Mapping[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for number in range(6):
                translation = {"en": f"text {number}", "th": f"ข้อความ {number}"}
                yield number, {"text": f"{THAI} {number}", "translation": translation, "messages": CHAT}

    builder = TinyThai(data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return directory


def test_a_tfds_dataset_is_read(prepared: Path) -> None:
    reading = Reading("tiny_thai", container="tfds", data_dir=str(prepared))
    found = shards(reading, hash_of)
    assert len(found) == 2 and len(set(keys(found))) == 2 and all(shard.size for shard in found)
    texts = items(reading)
    assert sorted(texts) == [f"{THAI} {n}" for n in range(6)]  # type: ignore[type-var]
    assert [int(place.rpartition(" ")[2]) for place in places(reading)] == [1, 2, 3, 4, 5, 6]
    again = pickle.loads(pickle.dumps(found[1]))
    assert [item for item, _ in again.items(Collector("refuse"))] == texts[3:]
    options: dict[str, Any] = {"container": "tfds", "data_dir": str(prepared)}
    part = Reading("tiny_thai:1.0.0", split="train[1:5]", **options)
    assert items(part) == texts[1:5] and not set(keys(shards(part, hash_of))) & set(keys(found))
    assert items(Reading("tiny_thai", max_bytes=1, **options)) == texts[:1]
    pairs = items(Reading("tiny_thai", "pairs", fields=("translation.en", "translation.th"), **options))
    assert ("text 3", "ข้อความ 3") in pairs and len(pairs) == 6
    assert items(Reading("tiny_thai", "conversations", **options)) == [CHAT] * 6
    with pytest.raises(UserError, match=r"1\.0\.0 \(train\):record 1 has no field 'body'"):
        items(Reading("tiny_thai", fields=("body",), **options))
    with pytest.raises(UserError, match=r"has no split 'dev' \(it has: train\)"):
        shards(Reading("tiny_thai", split="dev", **options), hash_of)
    with pytest.raises(UserError, match="TFDS dataset no_such_thai is not prepared in"):
        shards(Reading("no_such_thai", **options), hash_of)


def test_tfds_loads_no_code_that_a_dataset_names(prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny_thai" / "1.0.0"
    root.mkdir(parents=True)
    for file in (prepared / "tiny_thai" / "1.0.0").iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    reading = Reading("tiny_thai", container="tfds", data_dir=str(tmp_path))
    assert len(items(reading)) == 6
    features = root / "features.json"
    features.write_text(features.read_text().replace("tensorflow_datasets.core.features.text_feature", "antigravity"))
    with pytest.raises(UserError, match=r"names code outside of TFDS \(antigravity\.Text\)"):
        shards(reading, hash_of)


def test_names_of_tfds_datasets(prepared: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"container": "tfds", "data_dir": str(tmp_path)}
    for version in ("1.0.0", "9.0.0", "10.0.0"):
        root = tmp_path / "tiny_thai" / version
        root.mkdir(parents=True)
        for file in (prepared / "tiny_thai" / "1.0.0").iterdir():
            (root / file.name).write_bytes(file.read_bytes())
    assert "/10.0.0 (" in places(Reading("tiny_thai", **options))[0]
    assert "/9.0.0 (" in places(Reading("tiny_thai:9.0.0", **options))[0]
    for config in ("b", "a"):
        (tmp_path / "other" / config / "1.0.0").mkdir(parents=True)
        write(tmp_path / "other" / config / "1.0.0" / "dataset_info.json", "{}")
    for name, message in (
        ("tiny_thai:2.0.0", r"has no version 2\.0\.0, but 1\.0\.0, 10\.0\.0, 9\.0\.0: name one, or prepare it by"),
        ("other", "has configs: name one of a, b, as other/CONFIG"),
        ("other/a", "has no features.json"),
        ("../tiny_thai", "is not the name of a TFDS dataset"),
        ("huggingface:name", "is not the name of a TFDS dataset"),
    ):
        with pytest.raises(UserError, match=message):
            shards(Reading(name, **options), hash_of)
    info = tmp_path / "tiny_thai" / "10.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"prepared as tfrecord, but only array_record is read: prepare it by"):
        shards(Reading("tiny_thai", **options), hash_of)


def test_bad_names_of_the_hub_are_refused() -> None:
    for path in ("../owner/name", "a/b/c/d", "/nowhere/at/all", "owner", "s3://bucket/x"):
        with pytest.raises(UserError, match="neither a directory nor a name on the hub"):
            hub.parts_of(path, "train", None, hash_of)
