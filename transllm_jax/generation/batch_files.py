"""OpenAI's batch files: requests that are answered later, all together, and the responses to them.

A line of requests is `{"custom_id", "method", "url", "body"}`, a line of responses `{"custom_id", "response":
{"status_code", "body"}, "error"}`. `vllm run-batch` reads and writes the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transllm_jax.disk import write_text
from transllm_jax.errors import UserError
from transllm_jax.generation.endpoint import Reply, Request, parse_reply

# What OpenAI takes in one file.
MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000
_URL = "/v1/chat/completions"


def write_requests(directory: Path, requests: Sequence[Request], name: str = "requests") -> list[Path]:
    """Write `NAME.jsonl`, and `NAME.2.jsonl` and so on where one file would be too large; returns the paths.

    Raises UserError if the directory cannot be written to.
    """
    files: list[list[str]] = [[]]
    size = 0
    for request in requests:
        line = json.dumps(
            {"custom_id": request.id, "method": "POST", "url": _URL, "body": request.body}, ensure_ascii=False
        )
        bytes_ = len(line.encode()) + 1
        if files[-1] and (len(files[-1]) == MOST_REQUESTS or size + bytes_ > MOST_BYTES):
            files.append([])
            size = 0
        files[-1].append(line + "\n")
        size += bytes_
    paths = [directory / f"{name}{f'.{number}' if number > 1 else ''}.jsonl" for number in range(1, len(files) + 1)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, lines in zip(paths, files, strict=True):
            write_text(path, "".join(lines))
    except OSError as error:
        raise UserError(f"{directory} cannot be written to ({error.strerror}); give another directory") from None
    return paths


def read_responses(directory: Path) -> dict[str, Reply]:
    """The replies in all files `responses*.jsonl` of a directory, by id; an answer counts more than an error.

    Raises UserError that names the file and line if one is damaged.
    """
    found: dict[str, Reply] = {}
    for path in sorted(directory.glob("responses*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                reply = _reply(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{path}:{number} is no line of a batch's output ({' '.join(str(error).split())[:200]}); fetch the "
                    "file again"
                ) from None
            if reply.id not in found or found[reply.id].error is not None:
                found[reply.id] = reply
    return found


def _reply(row: Any) -> Reply:
    """The reply in a line of responses. Raises ValueError, TypeError, KeyError or AttributeError for another form."""
    id, response, error = row["custom_id"], row.get("response"), row.get("error")
    if not isinstance(id, str):
        raise ValueError("custom_id is not a text")
    if response is not None and response.get("status_code") == 200 and not error:
        return parse_reply(id, response["body"])
    what = error or (response or {}).get("body") or "no response"
    for key in ("error", "message"):
        if isinstance(what, dict) and what.get(key):
            what = what[key]
    status = f"status {response['status_code']}: " if response and response.get("status_code") else ""
    return Reply(id, error=f"{status}{what}"[:300])
