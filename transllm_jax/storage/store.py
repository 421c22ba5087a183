"""A run's objects in a store: whole files in and out, retries after network errors, and errors in one line.

It calls the fsspec filesystem that epath uses, not epath itself. epath leaves a truncated object if an error interrupts
a write, makes one request for each file of a listing, and cannot create an object only if it does not exist.
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
    """An object in a listing: its size in bytes, and a tag that changes with every write."""

    size: int
    tag: str


class Store:
    """The objects below one path of a store. Names are relative to it, with `/` between their parts.

    Every method raises UserError if the bucket, the permission or the credentials are missing, and the store's own
    error if the store cannot be reached after all tries.
    """

    def __init__(self, root: str, *, wait: Callable[[float], None] = time.sleep) -> None:
        """root: gs://bucket/path, or a local directory. wait: called with the seconds to sleep between two tries."""
        self.root = root.rstrip("/")
        self._wait = wait
        self._local = "://" not in self.root
        # No cached listings, here or where orbax lists through epath: other hosts write here too.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        try:
            self._fs: Any = fsspec.filesystem("file", auto_mkdir=True) if self._local else fsspec.filesystem("gcs")
        except ImportError:
            raise UserError(f"{self.root} needs gcsfs; pip install 'transllm-jax[gcs]'") from None
        # gcsfs logs a traceback for each error that it also raises.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

    def files(self, name: str = "") -> dict[str, Entry]:
        """The objects below a name, by their path relative to it; an object of that very name has the path ""."""
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
            # Some tools create an object as a placeholder for a folder.
            if not key.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """The content of a small object, or None if it does not exist."""
        try:
            content: bytes = self._do("read", lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        return content

    def age(self, name: str) -> float | None:
        """Seconds since an object was written, by the store's clock alone; None if it does not exist or gives no time.

        It takes one request: the header of the store's answer has its current time. A local file is compared with a
        new one.
        """
        try:
            return self._do("read", lambda: self._age_here(name) if self._local else self._age_there(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, atomically."""
        self._put("write", lambda: self._place(name, content, "overwrite"))

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object unless it exists; returns whether it was written. Only one of two callers succeeds."""
        try:
            self._put("write", lambda: self._place(name, content, "create"))
        except FileExistsError:
            # It is ours if the first answer was lost and the library asked again.
            return self.read(name) == content
        return True

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file of any size into the store, in pieces; the object appears atomically."""
        file.stat()
        self._put("write", lambda: self._fs.put_file(str(file), self._path(name)))

    def download(self, name: str, file: Path) -> None:
        """Copy an object of any size into a local file, in pieces. Raises FileNotFoundError if it does not exist.

        If this is interrupted, the file is truncated.
        """
        self._do("read", lambda: self._fs.get_file(self._path(name), str(file)))

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
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
        # fsspec first checks for a local file and then writes it: two calls could write, a reader could see it empty.
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
            # Nothing but the bucket can be missing for a write.
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
            # Random, so that the hosts do not retry all at once.
            self._wait(2 ** (tried - 1) * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")


def _tag(info: dict[str, Any]) -> str:
    # GCS numbers an object's generations; a local file has its inode and time.
    return str(info["generation"]) if "generation" in info else f"{info.get('ino')}-{info.get('mtime')}"


def _codes(error: BaseException) -> set[str]:
    return {str(getattr(error, name, "")) for name in ("code", "status")}


def _from(error: BaseException, package: str) -> bool:
    return any(kind.__module__.startswith(package) for kind in type(error).__mro__)


def _refusal(error: Exception) -> str | None:
    """One line with the reason if the error is a refusal (permission, credentials), else None."""
    # gcsfs raises a plain OSError for status 403.
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
