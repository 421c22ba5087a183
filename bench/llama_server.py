"""llama.cpp's server on a GGUF file, for the measurements beside it. It needs a Python interpreter that has xllamacpp,
llama.cpp's server as a wheel: `python -m venv V; V/bin/pip install xllamacpp`.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.cpuparams.n_threads = sys.argv[1], int(sys.argv[2])
params.n_parallel, params.n_ctx = int(sys.argv[3]), int(sys.argv[3]) * 2048
server = xllamacpp.Server(params)
print("ready", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_cpp(python: str, file: Path, threads: int, slots: int = 1) -> Iterator[str]:
    """llama.cpp's server on a file, which answers `slots` requests at once; yields its address."""
    command = [python, "-c", SERVER, str(file), str(threads), str(slots)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        address = next((line.split()[1] for line in process.stdout if line.startswith("ready ")), None)
        if address is None:
            raise SystemExit(f"llama.cpp does not load {file}")
        try:
            yield address
        finally:
            process.kill()


def ask(address: str, path: str, body: dict[str, Any]) -> Any:
    """The server's answer to a request."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
