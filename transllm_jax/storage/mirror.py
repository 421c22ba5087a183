"""A local mirror of a run's files on a store; files are written and removed in an order that never misleads a reader.

With a step's files the store keeps an index of them: size, SHA-256, and the tag of the object. If a step's manifest
says that the step is done, all of its files are as the index lists them; so the manifest is written last and removed
first. A manifest that says `running`, and a single file, say nothing about other files. These are updated in place, so
that a training that is killed during an update never loses its progress.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any

from transllm_jax.disk import FileHashes, read_json, sha256_of, whole, write_bytes, write_json
from transllm_jax.errors import UserError
from transllm_jax.storage.store import Entry, Store

MANIFEST, INDEX, CHECKPOINTS = "manifest.json", ".mirror.json", "checkpoints"

# Parts of a step's directory that are on the store alone: checkpoints, and those that were found damaged.
_STORE_ONLY = (CHECKPOINTS, "damaged")
# States of a local copy.
_SAME = "same"  # equal to the store's when last compared
_PUSHING = "ahead"  # newer than the store's: a push began
_PULLING = "behind"  # incomplete: a pull began
_TRANSFERS = 8  # in parallel
_TRIES = 3  # to read files that another host is writing
# Suffixes of files that another process is writing, or was writing when it died.
_UNFINISHED = (".part", ".partial")


def check_name(name: str) -> str:
    """The name itself. Raises ValueError if it is no path below the run's directory."""
    if not name or name != PurePosixPath(name).as_posix() or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{name!r} is no path below a run's directory")
    return name


class _Changed(Exception):
    """An object differs from the index: another host is writing it, or it is damaged."""


class Mirror:
    """Pushes and pulls files and steps' directories by name. Call it from one thread; it transfers in several."""

    def __init__(self, store: Store, local: Path, *, wait: Callable[[float], None] = time.sleep) -> None:
        """Raises UserError if `local` mirrors another store."""
        self.store, self._local, self._wait = store, local, wait
        # Called before each write that others rely on; raises if the lease is lost.
        self.check: Callable[[], None] = lambda: None
        self._path = local / INDEX
        self._hashes = FileHashes(local / ".mirror-hashes.json")
        self._record: dict[str, Any] = {"url": store.root, "units": {}}
        if self._path.exists():
            self._record = read_json(self._path)
            if self._record["url"] != store.root:
                raise UserError(
                    f"{local} mirrors {self._record['url']}, not {store.root}; set TRANSLLM_MIRROR to another directory"
                )

    def push(self, name: str) -> int:
        """See `Workdir.push`."""
        path = self._local / name
        if self._record["units"].get(name, {}).get("state") == _PULLING and path.exists():
            raise RuntimeError(f"{path} was not pulled to its end, so it cannot be pushed")
        if path.is_dir():
            pushed = self._push_directory(name, self._files_here(path))
        elif path.is_file():
            pushed = self._push_file(name, path)
        elif name in self._record["units"]:
            self._empty(name, checkpoints=False)
            self._set_state(name, None)
            pushed = 0
        else:
            raise ValueError(f"{path} is not there and never was, so it cannot be pushed")
        self._hashes.write()
        return pushed

    def pull(self, name: str) -> bool:
        """See `Workdir.pull`."""
        for tried in range(1, _TRIES + 1):
            try:
                there = self._pull(name, strict=True)
                break
            except _Changed as changed:
                if tried == _TRIES:
                    there = self._pull_running(name, changed)
                else:
                    self._wait(2.0**tried)
        self._hashes.write()
        return there

    def remove(self, name: str) -> None:
        """See `Workdir.remove`."""
        self._empty(name, checkpoints=True)
        # So that a pull removes the local copy if this is interrupted.
        self._set_state(name, {"state": _SAME})

    def add(self, folder: str, *groups: Iterable[str]) -> None:
        """See `Workdir.add`."""
        there = self.store.files(folder)
        self.check()
        for group in groups:
            missing = sorted(name for name in set(group) if name not in there)
            self._each(missing, lambda name: self.store.upload(self._local / folder / name, f"{folder}/{name}"))

    def fetch(self, folder: str, *groups: Iterable[str]) -> None:
        """See `Workdir.fetch`."""
        there, place = self.store.files(folder), self._local / folder
        for group in groups:
            wanted = sorted(name for name in set(group) if name in there and not (place / name).exists())
            self._each(wanted, lambda name: self._download(f"{folder}/{name}", place / name, None))

    # -- to the store

    def _push_file(self, name: str, path: Path) -> int:
        stat, digest, known = path.stat(), self._hashes(path), self._record["units"].get(name, {})
        entry = self.store.files(name).get("")
        if entry is not None and known.get("sha256") == digest and known.get("tag") == entry.tag:
            return 0
        self.check()
        self._set_state(name, {"state": _PUSHING})
        self._upload(path, name, stat)
        self._set_state(name, {"state": _SAME, "sha256": digest, "tag": self.store.files(name)[""].tag})
        return 1

    def _push_directory(self, name: str, here: dict[str, Path]) -> int:
        there = self._files_there(name)
        index = self._index(name, there)
        stats = {file: path.stat() for file, path in here.items()}
        digests = {file: self._hashes(path) for file, path in here.items()}
        manifest = self.store.read(f"{name}/{MANIFEST}") if MANIFEST in there else None
        changed = {
            file
            for file in here.keys() - {MANIFEST}
            if file not in there
            or index.get(file, {}).get("sha256") != digests[file]
            or index[file].get("tag") != there[file].tag
        }
        removed = there.keys() - here.keys() - {INDEX}
        manifest_here = here[MANIFEST].read_bytes() if MANIFEST in here else None
        listed = {file: entry["sha256"] for file, entry in index.items()} == digests
        if not changed and not removed and listed and manifest == manifest_here:
            self._set_state(name, {"state": _SAME})
            return 0
        self.check()
        self._set_state(name, {"state": _PUSHING})
        in_place = _is_running(manifest) and manifest_here is not None
        if not in_place and (changed or removed or not listed):
            self._withdraw(name)
        self._each(sorted(changed), lambda file: self._upload(here[file], f"{name}/{file}", stats[file]))
        self._each(sorted(removed - {MANIFEST}), lambda file: self.store.remove(f"{name}/{file}"))
        self.check()
        # List again for the tags, by which a later push sees that an object was replaced.
        there = self._files_there(name)
        entries = {
            file: {"size": stats[file].st_size, "sha256": digests[file]}
            | ({} if file == MANIFEST else {"tag": there[file].tag})
            for file in sorted(here)
        }
        self.store.write(f"{name}/{INDEX}", json.dumps({"files": entries}, indent=1).encode())
        if manifest_here is not None:
            self.check()
            self.store.write(f"{name}/{MANIFEST}", manifest_here)
        self._set_state(name, {"state": _SAME})
        return len(changed) + (manifest != manifest_here and manifest_here is not None)

    def _upload(self, path: Path, name: str, hashed: os.stat_result) -> None:
        """hashed: the file's stat before it was hashed, as it may change between hashing and uploading."""
        self.store.upload(path, name)
        now = path.stat()
        if (hashed.st_size, hashed.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
            raise RuntimeError(f"{path} changed while it was pushed")

    def _withdraw(self, name: str) -> None:
        for file in (MANIFEST, INDEX):
            self.store.remove(f"{name}/{file}")

    def _empty(self, name: str, *, checkpoints: bool) -> None:
        self.check()
        self._withdraw(name)
        there = self.store.files(name) if checkpoints else self._files_there(name)
        self._each(sorted(there), lambda file: self.store.remove(f"{name}/{file}".rstrip("/")))

    # -- from the store

    def _pull(self, name: str, *, strict: bool) -> bool:
        there = self._files_there(name)
        if "" in there:
            return self._pull_file(name, there[""])
        index = self._index(name, there)
        manifest = self.store.read(f"{name}/{MANIFEST}") if MANIFEST in there else None
        if not index or (MANIFEST in index and manifest is None):
            return self._pull_incomplete(name, there)
        # The index of a running step may be older than its files.
        files = (
            {file: entry["sha256"] for file, entry in index.items() if file != MANIFEST}
            if strict
            else dict.fromkeys(there.keys() - {MANIFEST, INDEX})
        )
        if strict and MANIFEST in index and _digest(manifest) != index[MANIFEST]["sha256"]:
            raise _Changed(f"{name}/{MANIFEST}")
        place = self._local / name
        here = self._files_here(place)
        wanted = {file for file, digest in files.items() if file not in here or self._hashes(here[file]) != digest}
        extra = here.keys() - files.keys() - {MANIFEST}
        old = here[MANIFEST].read_bytes() if MANIFEST in here else None
        if wanted or extra or old != manifest:
            self._set_state(name, {"state": _PULLING})
            (place / MANIFEST).unlink(missing_ok=True)
            for file in extra:
                (place / file).unlink(missing_ok=True)
            self._each(
                sorted(wanted),
                lambda file: self._download(f"{name}/{file}", place / file, files[file]),
            )
            if manifest is not None:
                write_bytes(place / MANIFEST, manifest)
        self._set_state(name, {"state": _SAME})
        return True

    def _pull_running(self, name: str, changed: _Changed) -> bool:
        """Pull without the index a running step whose push was interrupted: each of its files is complete."""
        if _is_running(self.store.read(f"{name}/{MANIFEST}")):
            return self._pull(name, strict=False)
        raise UserError(
            f"{self.store.root}/{changed} is not what was pushed; wait if another run writes it, otherwise remove "
            f"{self.store.root}/{name} and run again"
        )

    def _pull_file(self, name: str, entry: Entry) -> bool:
        path, known = self._local / name, self._record["units"].get(name, {})
        if path.is_file() and known.get("tag") == entry.tag and self._hashes(path) == known.get("sha256"):
            return True
        digest = self._download(name, path, None)
        if self.store.files(name).get("") != entry or path.stat().st_size != entry.size:
            raise _Changed(name)
        self._set_state(name, {"state": _SAME, "sha256": digest, "tag": entry.tag})
        return True

    def _pull_incomplete(self, name: str, there: dict[str, Entry]) -> bool:
        path = self._local / name
        if self._record["units"].get(name, {}).get("state") not in (_SAME, _PULLING):
            # It never was on the store, or the local copy is newer.
            return False
        if path.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)
        if not there:
            # It was removed from the store after it had been copied here.
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            self._set_state(name, None)
        return False

    def _download(self, name: str, path: Path, digest: str | None) -> str:
        try:
            with whole(path) as part:
                self.store.download(name, part)
                found = sha256_of(part)
                if digest is not None and found != digest:
                    raise _Changed(name)
        except FileNotFoundError:
            raise _Changed(name) from None
        return found

    # -- both

    def _files_here(self, directory: Path) -> dict[str, Path]:
        found = {}
        for folder, folders, files in os.walk(directory, followlinks=True):
            if Path(folder) == directory:
                folders[:] = [name for name in folders if name not in _STORE_ONLY]
            for file in files:
                path = Path(folder, file)
                if not file.endswith(_UNFINISHED) and file != INDEX:
                    found[path.relative_to(directory).as_posix()] = path
        return found

    def _files_there(self, name: str) -> dict[str, Entry]:
        found = self.store.files(name)
        return {file: entry for file, entry in found.items() if file.partition("/")[0] not in _STORE_ONLY}

    def _index(self, name: str, there: dict[str, Entry]) -> dict[str, dict[str, Any]]:
        content = self.store.read(f"{name}/{INDEX}") if INDEX in there else None
        return {} if content is None else dict(json.loads(content)["files"])

    def _set_state(self, name: str, unit: dict[str, str] | None) -> None:
        units = self._record["units"]
        if units.get(name) == unit:
            return
        units.pop(name, None)
        if unit is not None:
            units[name] = unit
        write_json(self._path, self._record)

    def _each(self, files: Iterable[str], move: Callable[[str], Any]) -> None:
        """Transfer files in parallel. After an error no further transfer is started, and the error is raised."""
        with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="mirror") as pool:
            moves = [pool.submit(move, file) for file in files]
            try:
                done, _ = wait(moves, return_when=FIRST_EXCEPTION)
                for moved in done:
                    moved.result()
            finally:
                for moved in moves:
                    moved.cancel()


def _is_running(manifest: bytes | None) -> bool:
    return manifest is not None and json.loads(manifest).get("state") == "running"


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()
