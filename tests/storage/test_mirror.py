"""Pushes to a store and pulls from it: what another host sees at every moment, also after a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from etils import epath
from pods import AFTER, BEFORE, DONE, RUNNING, Killed, Pod, kill_at, mirror_of, read, write

from transllm_jax.errors import UserError
from transllm_jax.storage.store import Store


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_another_host_pulls_what_was_pushed(pod: Pod) -> None:
    first, second = pod.host("first"), pod.host("second")
    write(first.local / "step", BEFORE)
    write(first.local / "evaluation/base", {"results.json": "{}", "manifest.json": DONE})
    (first.local / "run.yaml").write_text("seed: 1\n")
    assert [first.push(name) for name in ("step", "evaluation/base", "run.yaml")] == [4, 2, 1]
    assert [first.push(name) for name in ("step", "evaluation/base", "run.yaml")] == [0, 0, 0]
    assert all(second.pull(name) for name in ("step", "evaluation/base", "run.yaml")) and not second.pull("other")
    for name in ("step", "evaluation/base"):
        assert read(second.local / name) == read(first.local / name) == read(pod.store / name)
    assert (second.local / "run.yaml").read_text() == "seed: 1\n"

    write(first.local / "step", AFTER)
    (first.local / "run.yaml").write_text("seed: 2\n")
    assert [pod.host("first").push(name) for name in ("step", "run.yaml")] == [3, 1]  # a, b/new, the manifest
    assert all(second.pull(name) for name in ("step", "run.yaml"))
    assert read(second.local / "step") == AFTER and (second.local / "run.yaml").read_text() == "seed: 2\n"


def test_a_pull_downloads_only_files_that_differ(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pod.host("first"), pod.host("second")
    write(first.local / "step", BEFORE)
    first.push("step")
    second.pull("step")
    (second.local / "step/a").write_text("bad")  # of the same size
    (second.local / "step/left").write_text("over")
    downloaded: list[str] = []
    download = Store.download
    monkeypatch.setattr(
        Store, "download", lambda self, name, file: downloaded.append(name) or download(self, name, file)
    )
    assert second.pull("step") and second.pull("step")
    assert downloaded == ["step/a"] and read(second.local / "step") == BEFORE


def test_the_index_has_sizes_and_hashes(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    host.push("step")
    index = json.loads((pod.store / "step/.mirror.json").read_text())["files"]
    assert index.keys() == BEFORE.keys()
    for name, text in BEFORE.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert (index[name]["size"], index[name]["sha256"]) == (len(text), digest)


def test_unfinished_files_and_checkpoints_are_not_pushed(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", {**BEFORE, "checkpoints/5/x": "here", "m.json.part": "", ".t.host-1-ab.partial": ""})
    write(pod.store / "step/checkpoints/7", {"state": "there"})
    host.push("step")
    assert read(pod.store / "step") == {**BEFORE, "checkpoints/7/state": "there"}
    assert pod.seen() == BEFORE
    assert host.checkpoints("step") == epath.Path(pod.store / "step/checkpoints")
    host.remove("step")
    assert read(pod.store) == {} and not pod.host("other").pull("step")


def test_a_removed_step_is_removed_everywhere(pod: Pod) -> None:
    first, second = pod.host("first"), pod.host("second")
    write(first.local / "step", BEFORE)
    first.push("step")
    second.pull("step")
    write(pod.store / "step/checkpoints/7", {"state": "there"})
    shutil.rmtree(first.local / "step")
    order: list[str] = []
    remove = mirror_of(first).store.remove
    mirror_of(first).store.remove = lambda name: order.append(name) or remove(name)  # type: ignore[method-assign]
    first.push("step")
    assert order[0] == "step/manifest.json"
    assert read(pod.store / "step") == {"checkpoints/7/state": "there"}
    assert not second.pull("step") and not (second.local / "step").exists()


def test_a_step_that_was_never_pushed_is_kept(pod: Pod) -> None:
    host, other = pod.host("first"), pod.host("other")
    write(host.local / "step", BEFORE)
    assert not host.pull("step") and read(host.local / "step") == BEFORE
    host.push("step")
    with pytest.raises(ValueError, match="never was"):
        other.push("step")
    assert read(pod.store / "step") == BEFORE


def test_local_files_are_kept_after_a_killed_push(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    host.push("step")
    for pushed in (True, False):
        write(host.local / "step", AFTER | {"again": str(pushed)})
        dying = pod.host("first")
        kill_at(dying, 4)  # manifest and index are removed, two files are uploaded
        with pytest.raises(Killed):
            dying.push("step")
        restarted = pod.host("first")
        assert not restarted.pull("step") and read(restarted.local / "step") == AFTER | {"again": str(pushed)}
        if pushed:
            restarted.push("step")
            assert pod.seen() == AFTER | {"again": "True"}
        else:
            restarted.remove("step")
            # The step is to be redone, so the local files must not count as done.
            assert not pod.host("first").pull("step") and not (restarted.local / "step").exists()


def killed_pushes(
    pod: Pod, before: dict[str, str], after: dict[str, str]
) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Kill a push of `after` over `before` at every moment, and check that the next push completes it.

    Yields, for each moment, the files of the store and those that a new host pulls.
    """
    moment = 0
    while True:
        for name in ("store", "first"):
            shutil.rmtree(pod.directory / name, ignore_errors=True)
        host = pod.host("first")
        if before:
            write(host.local / "step", before)
            host.push("step")
        write(host.local / "step", after)
        calls = kill_at(host, moment)
        try:
            host.push("step")
        except Killed:
            yield read(pod.store / "step"), pod.seen()
            restarted = pod.host("first")
            restarted.push("step")
            assert pod.seen() == after == read(pod.store / "step")
            moment += 1
            continue
        # At least one call for each file, the index and the manifest.
        assert calls() == moment >= len(after)
        return


@pytest.mark.parametrize("before", [BEFORE, {}], ids=["over another", "first"])
def test_a_killed_push_never_shows_part_of_a_done_step(pod: Pod, before: dict[str, str]) -> None:
    for stored, pulled in killed_pushes(pod, before, AFTER):
        assert "manifest.json" not in stored or stored in (before, AFTER)
        assert pulled in (before, AFTER, {})


def test_a_killed_push_of_a_running_step_keeps_its_files(pod: Pod) -> None:
    before = {"metrics.jsonl": "1\n", "speed.jsonl": "1\n", "manifest.json": RUNNING}
    after = {"metrics.jsonl": "2\n", "speed.jsonl": "1\n2\n", "new.jsonl": "", "manifest.json": RUNNING}
    for last in (after, {**after, "manifest.json": DONE}):
        for seen in chain.from_iterable(killed_pushes(pod, before, last)):
            state = seen.pop("manifest.json")
            assert state in (RUNNING, last["manifest.json"])
            if state == DONE:
                assert seen == {name: text for name, text in last.items() if name != "manifest.json"}
            else:
                assert all(seen[name] in (before[name], last[name]) for name in before if name in seen)
                assert before.keys() - {"manifest.json"} <= seen.keys() <= last.keys()


def test_a_killed_pull_never_leaves_part_of_a_done_step(pod: Pod) -> None:
    first = pod.host("first")
    write(first.local / "step", BEFORE)
    first.push("step")
    old = pod.host("old")
    old.pull("step")
    write(first.local / "step", {**AFTER, "more": "z"})
    first.push("step")
    for start in ("old", None):
        for moment in range(4 if start is None else 3):
            shutil.rmtree(pod.directory / "second", ignore_errors=True)
            if start is not None:
                shutil.copytree(pod.directory / start, pod.directory / "second")
            second = pod.host("second")
            kill_at(second, moment, ("download",))
            with pytest.raises(Killed):
                second.pull("step")
            assert "manifest.json" not in read(second.local / "step")
            assert not list(second.local.rglob("*.part"))
            restarted = pod.host("second")
            with pytest.raises(RuntimeError, match="not pulled to its end"):
                restarted.push("step")
            assert restarted.pull("step") and read(second.local / "step") == {**AFTER, "more": "z"}


def test_a_killed_download_leaves_no_partial_file(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    (host.local / "run.yaml").write_text("old")
    host.push("step")
    host.push("run.yaml")
    (pod.store / "run.yaml").write_text("new and longer")

    def cut_off(self: Store, name: str, file: Path) -> None:
        file.write_text("hal")
        raise Killed

    monkeypatch.setattr(Store, "download", cut_off)
    (host.local / "step/a").unlink()
    for name in ("step", "run.yaml"):
        with pytest.raises(Killed):
            host.pull(name)
    assert not (host.local / "step/a").exists() and (host.local / "run.yaml").read_text() == "old"


def test_a_damaged_object_is_found(pod: Pod) -> None:
    host, other = pod.host("first"), pod.host("other")
    write(host.local / "step", BEFORE)
    host.push("step")
    (pod.store / "step/a").write_text("bad")
    with pytest.raises(UserError, match="step/a is not what was pushed") as error:
        other.pull("step")
    assert "\n" not in str(error.value) and not (other.local / "step/manifest.json").exists()
    # The tag shows that the object was replaced, although its size and the hash in the index are the same.
    assert host.push("step") > 0 and pod.seen() == BEFORE


def test_a_pull_waits_for_a_push_to_end(pod: Pod) -> None:
    host, other = pod.host("first"), pod.host("other")
    write(host.local / "step", BEFORE)
    host.push("step")
    mirror = mirror_of(other)
    download = mirror.store.download

    def late(name: str, file: Path) -> None:
        if not pod.waited and name == "step/a":
            write(host.local / "step", AFTER)
            host.push("step")
        download(name, file)

    mirror.store.download = late  # type: ignore[method-assign]
    assert other.pull("step") and read(other.local / "step") == AFTER and len(pod.waited) == 1


def test_a_file_that_changes_during_a_push_is_an_error(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    store = mirror_of(host).store
    upload = store.upload

    def appended(file: Path, name: str) -> None:
        upload(file, name)
        with file.open("a") as opened:
            opened.write("more")

    store.upload = appended  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="changed while it was pushed"):
        host.push("step")
    assert pod.seen() == {}


def test_add_and_fetch_keep_the_order_of_files(pod: Pod) -> None:
    first, second = pod.host("first"), pod.host("second")
    write(first.local / "tokens", {"a.records": "1", "a": "2", "b.records": "3", "b": "4"})
    first.add("tokens", ["a.records", "b.records"], ["a", "b"])
    assert read(pod.store / "tokens") == read(first.local / "tokens")
    write(second.local / "tokens", {"b.records": "own"})
    second.fetch("tokens", ["a.records", "b.records", "c.records"], ["a", "c"])
    # Local files stay, missing ones are skipped, and only the named files are downloaded.
    assert read(second.local / "tokens") == {"a.records": "1", "a": "2", "b.records": "own"}
    write(second.local / "tokens", {"a": "other", "d": "5"})
    second.add("tokens", ["a"], ["d"])
    assert read(pod.store / "tokens") == read(first.local / "tokens") | {"d": "5"}
    # A killed `add` never leaves the file that says that a shard is complete without the shard.
    for moment in range(2):
        write(first.local / "tokens", {f"{moment}.records": "1", f"{moment}": "2"})
        dying = pod.host("first")
        kill_at(dying, moment)
        with pytest.raises(Killed):
            dying.add("tokens", [f"{moment}.records"], [f"{moment}"])
        assert not (pod.store / "tokens" / f"{moment}").exists()
