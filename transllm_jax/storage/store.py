"""The objects of a run in a store: whole files in and out, tried again when the network fails, errors in one line.

It calls the fsspec filesystem that epath itself uses, not epath: an object that epath was writing when an error came
is left cut short under its name, a listing costs one request a file, and nothing can be created only where it is not
there yet.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from transllm_jax.errors import UserError

T = TypeVar("T")

_TRIES = 5
_TRANSIENT = {"408", "429", "500", "502", "503", "504"}  # HTTP
_REFUSED = {"401", "403"}


@dataclass(frozen=True)
class Entry:
    """An object as a listing shows it: its size in bytes, and a tag that every writing of it changes."""

    size: int
    tag: str


class Store:
    """The objects below one path of a store. Names are relative to it, with `/` between their parts.

    Every method raises UserError where there is no such bucket, no permission or no credentials, and the store's own
    error when it cannot be reached after all tries.
    """

    def __init__(self, root: str, *, wait: Callable[[float], None] = time.sleep) -> None:
        """root: gs://bucket/path, or a local directory. wait: how to let seconds pass between two tries."""
        self.root = root.rstrip("/")
        self._wait = wait
        self._local = "://" not in self.root
        # Listings are not kept, here and where orbax lists through epath: other hosts write here too.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        try:
            self._fs: Any = fsspec.filesystem("file", auto_mkdir=True) if self._local else fsspec.filesystem("gcs")
        except ImportError:
            raise UserError(f"{self.root} needs gcsfs; pip install 'transllm-jax[gcs]'") from None
        # It prints a traceback for each error that it also raises.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

    def files(self, name: str = "") -> dict[str, Entry]:
        """What lies below a name, by the path relative to it; a lone object of that name has the path ""."""
        path = self._path(name)
        try:
            found = self._do("list", lambda: self._fs.find(path, detail=True))
        except FileNotFoundError:
            if self._local:
                return {}
            raise self._no_bucket() from None
        start = len(self._fs._strip_protocol(path))
        return {
            key[start:].lstrip("/"): Entry(int(info["size"]), _tag(info))
            for key, info in found.items()
            # A folder's placeholder, which some tools make.
            if not key.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """A small object, or None where there is none."""
        try:
            content: bytes = self._do("read", lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        return content

    def age(self, name: str) -> float | None:
        """Seconds since an object was written, by the store's clock alone; None where there is none, or it cannot tell.

        One request: an answer of the store has its time in its header. A local file is compared with a new one.
        """
        try:
            return self._do("read", lambda: self._age_here(name) if self._local else self._age_there(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small object; it is there whole or not at all."""
        self._put("write", lambda: self._place(name, content, "overwrite"))

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object where there is none, and say whether that was so; one of two at once succeeds."""
        try:
            self._put("write", lambda: self._place(name, content, "create"))
        except FileExistsError:
            # Ours, when an answer was lost and the library asked twice.
            return self.read(name) == content
        return True

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file of any size into the store, piece by piece; it is there whole or not at all."""
        file.stat()
        self._put("write", lambda: self._fs.put_file(str(file), self._path(name)))

    def download(self, name: str, file: Path) -> None:
        """Copy an object of any size into a local file, piece by piece. Raises FileNotFoundError where there is none.

        The file is cut short when this is cut short.
        """
        self._do("read", lambda: self._fs.get_file(self._path(name), str(file)))

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with suppress(FileNotFoundError):
            self._do("delete", lambda: self._fs.rm_file(self._path(name)))

    def _age_there(self, name: str) -> float | None:
        bucket, key, _ = self._fs.split_path(self._path(name))
        headers, content = self._fs.call("GET", "b/{}/o/{}", bucket, key)
        date, written = headers.get("Date"), json.loads(content).get("updated")
        if date is None or written is None:
            return None
        return max(0.0, (parsedate_to_datetime(date) - datetime.fromisoformat(written)).total_seconds())

    def _age_here(self, name: str) -> float:
        with tempfile.NamedTemporaryFile(dir=self._parts()) as now:
            return max(0.0, os.stat(now.name).st_mtime - os.stat(self._path(name)).st_mtime)

    def _parts(self) -> Path:
        directory = Path(f"{self.root}.parts")
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _place(self, name: str, content: bytes, mode: str) -> None:
        if not self._local:
            self._fs.pipe_file(self._path(name), content, mode=mode)
            return
        # fsspec looks whether a local file is there, and then writes it: two could, and a reader could see it empty.
        path, part = Path(self._path(name)), self._parts() / secrets.token_hex(8)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        try:
            (os.replace if mode == "overwrite" else os.link)(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _put(self, what: str, call: Callable[[], T]) -> T:
        try:
            return self._do(what, call)
        except FileNotFoundError:
            # The only thing that can be missing for a writer.
            raise self._no_bucket() from None

    def _no_bucket(self) -> UserError:
        bucket = "/".join(self.root.split("/")[:3])
        return UserError(f"{bucket}: no such bucket; create it, or correct --workdir")

    def _do(self, what: str, call: Callable[[], T]) -> T:
        for tried in range(1, _TRIES + 1):
            try:
                return call()
            except Exception as error:
                if (reason := _refusal(error)) is not None:
                    raise UserError(
                        f"{self.root}: no permission to {what} ({reason}); log in (gcloud auth application-default "
                        "login), or give the account the role Storage Object Admin on the bucket"
                    ) from error
                if not _transient(error) or tried == _TRIES:
                    raise
            # Not all hosts at once.
            self._wait(2 ** (tried - 1) * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")


def _tag(info: dict[str, Any]) -> str:
    # GCS counts generations; a local file has an inode and a time.
    return str(info["generation"]) if "generation" in info else f"{info.get('ino')}-{info.get('mtime')}"


def _codes(error: BaseException) -> set[str]:
    return {str(getattr(error, name, "")) for name in ("code", "status")}


def _from(error: BaseException, package: str) -> bool:
    return any(kind.__module__.startswith(package) for kind in type(error).__mro__)


def _refusal(error: Exception) -> str | None:
    """Why the store refused, in one line, or None where it did not."""
    # gcsfs makes a plain OSError of code 403.
    forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden")
    without = _from(error, "google.auth") and not getattr(error, "retryable", False)
    if forbidden or without or _codes(error) & _REFUSED:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first line of a 403 is the request's address.
        return (lines[-1] if lines else type(error).__name__)[:200]
    return None


def _transient(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)) or getattr(error, "retryable", False) is True:
        return True
    if known := {code for code in _codes(error) if code.isdigit()}:
        return bool(known & _TRANSIENT)
    checksum = _from(error, "gcsfs") and "Checksum" in type(error).__name__
    return checksum or _from(error, "aiohttp") or _from(error, "requests")
