"""An emulator of Google Cloud Storage, and the fixture that starts it: for tests only."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import fsspec
import pytest
from etils import epath


class Emulator:
    """The emulator, with the two things that it lacks: refusing, and creating only what is not there yet."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.refuses = False

    def patched(self, handler: Callable[..., None]) -> Callable[..., None]:
        from gcp_storage_emulator.exceptions import NotFound

        def handle(request: Any, response: Any, storage: Any) -> None:
            if self.refuses:
                response.status = HTTPStatus.FORBIDDEN
                response.json({"error": {"code": 403, "message": "me does not have storage.objects.list access."}})
                return
            if request.query.get("ifGenerationMatch") == ["0"]:
                name = request.query["name"][0] if "name" in request.query else request.data["meta"]["name"]
                try:
                    storage.get_file_obj(request.params["bucket_name"], name)
                except NotFound:
                    pass
                else:
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    return
            handler(request, response, storage)

        return handle


def exact(server: Any) -> Callable[..., Any]:
    """The emulator's reading of a request, byte for byte.

    By itself it reads an upload as an email, in which a file that ends with a carriage return loses it.
    """
    read = server._read_data

    def read_data(handler: Any, query: Any) -> Any:
        kind = handler.headers.get("Content-Type") or ""
        if not kind.startswith("multipart/related"):
            return read(handler, query)
        whole = server._decode_raw_data(server._read_raw_data(handler), handler)
        mark = b"--" + kind.split("boundary=")[1].strip('"').encode()
        end = b"\r\n" if whole.startswith(mark + b"\r\n") else b"\n"
        _, described, rest = whole.split(mark, 2)
        head, content = rest.rsplit(end + mark + b"--", 1)[0].split(end * 2, 1)
        return {
            "meta": json.loads(described.split(end * 2, 1)[1]),
            "content": content,
            "content-type": head.partition(b":")[2].strip().decode(),
        }

    return read_data


@pytest.fixture(scope="module")
def gcs() -> Iterator[Emulator]:
    """An emulator with a bucket named `bucket`, where gs:// leads."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    emulator = Emulator(f"http://127.0.0.1:{port}")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", emulator.url)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
        patch.setattr(server, "_read_data", exact(server))
        for _, handlers in server.HANDLERS:
            for method, handler in handlers.items():
                patch.setitem(handlers, method, emulator.patched(handler))
        running.start()
        yield emulator
        running.stop()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()
