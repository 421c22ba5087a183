"""What another engine answers for a stage: a server, whose replies are kept as they come, or batch files.

The replies of a server are appended to a file in the stage's directory, each when it comes, so that a stopped run asks
for none of them again. A run that has several processes asks in the primary alone.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transllm_jax.config import Endpoint
from transllm_jax.disk import cut_behind, sha256_of_json, whole_lines
from transllm_jax.errors import UserError
from transllm_jax.generation.batch_files import read_responses, write_requests
from transllm_jax.generation.endpoint import Client, Reply, Request, check_client, read_key, request_body
from transllm_jax.stages.generated import Keeper
from transllm_jax.stages.run import Run

# Keys of an endpoint that may change while a stage goes on, and when it is done: where the model is served, and how it
# is asked. Its name and the requests may not.
MAY_CHANGE = ("endpoint", "batch", "key", "concurrency", "timeout", "attempts", "refused", "check")
# Seconds after which the primary tells the other processes of the run how far it is.
_SLICE = 2.0
# Requests without an answer that a message names.
_SHOWN = 5


def check_endpoint(settings: Endpoint, where: str) -> None:
    """Find what is wrong on this side before a run begins. Raises UserError. where: the config's section."""
    if settings.endpoint is not None:
        check_client()
        read_key(settings, where)


def requests_of(settings: Endpoint, what: str, texts: Sequence[str], max_tokens: int, seed: int) -> list[Request]:
    """A request for each text, as the only message of a conversation. Each id holds a hash of the request."""
    bodies = [request_body(settings, [{"role": "user", "content": text}], max_tokens, seed) for text in texts]
    return [Request(f"{what}-{number:06d}-{sha256_of_json(body)[:12]}", body) for number, body in enumerate(bodies, 1)]


def replies_to(
    run: Run,
    directory: Path,
    requests: Sequence[Request],
    settings: Endpoint,
    *,
    stage: str,
    where: str,
    what: str,
    unit: str,
) -> list[Reply]:
    """The replies to requests, in their order, in all processes of the run.

    directory: of the stage; it gets a file of a server's replies, named after `what`. where: the config's section, for
    messages. Raises Preempted when asked to stop; UserError if a server fails, or if batch files are still to be
    answered.
    """
    if settings.endpoint is None:
        rows = run.peers.run_on_primary(f"the batch of {what}", lambda: _of_batch(requests, settings, where))
        found = {row["id"]: Reply(**row) for row in rows or []}
    else:
        path = directory / f"{what.replace(' ', '_')}.replies.jsonl"
        found = _of_server(run, path, requests, settings, stage=stage, where=where, what=what, unit=unit)
    replies = [found[request.id] for request in requests]
    without = [reply for reply in replies if reply.error is not None]
    if without:
        run.progress.say(
            f"  {stage}: {settings.place} has no answer to {len(without)} of {len(replies)} requests, left out; the "
            f"first, {without[0].id}: {without[0].error}",
            style="yellow",
        )
    return replies


def _of_server(
    run: Run,
    path: Path,
    requests: Sequence[Request],
    settings: Endpoint,
    *,
    stage: str,
    where: str,
    what: str,
    unit: str,
) -> dict[str, Reply]:
    """The replies that the file holds, and a server's to the other requests, by id."""
    rows = run.peers.run_on_primary(f"the {what} so far", lambda: _kept(path, requests, stage)) or []
    found = {row["id"]: Reply(**row) for row in rows}
    missing = [request for request in requests if request.id not in found]
    if not missing:
        return found
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(run.progress.task(what, total=len(requests), done=len(found), unit=unit))
        if run.primary:
            client = Client(settings, where, lambda line: run.progress.say(line, style="yellow"))
            coming = stack.enter_context(contextlib.closing(client.replies(missing)))
            file = stack.enter_context(path.open("ab"))

        def proceed() -> list[dict[str, Any]]:
            """The replies of the next seconds, which are in the file then."""
            new: list[dict[str, Any]] = []
            until = time.monotonic() + _SLICE
            while len(found) + len(new) < len(requests) and time.monotonic() < until and not run.interrupt.requested:
                reply = next(coming)
                if reply is None:
                    continue
                new.append(reply.record())
                file.write(json.dumps(new[-1], ensure_ascii=False).encode() + b"\n")
                file.flush()
                bar.update(len(found) + len(new))
                bar.tokens(reply.completion_tokens or 0)
            return new

        keeper = Keeper(run, stage)
        try:
            while len(found) < len(requests):
                new = run.peers.run_on_primary(what, proceed) or []
                found.update({row["id"]: Reply(**row) for row in new})
                bar.update(len(found))
                keeper.look(f"{len(found)} of {len(requests)} {what}")
        except UserError:
            # What came before a server failed is kept on a run's store, too.
            with contextlib.suppress(UserError, OSError):
                run.push(stage)
            raise
    return found


def _kept(path: Path, requests: Sequence[Request], stage: str) -> list[dict[str, Any]]:
    """The replies that a stopped run left. A line that a killed process did not finish is cut off.

    Raises UserError for a line that is damaged, or that is a reply to no request of this run; the file stays as it is.
    """
    lines = whole_lines(path)
    wanted, rows = {request.id for request in requests}, []
    for number, line in enumerate(lines, 1):
        try:
            row = Reply(**json.loads(line)).record()
            wanted.remove(row["id"])
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}:{number} is not a reply to a request of this run; correct the line, remove the file to ask "
                f"for all of them again, or redo the stage with --force {stage}"
            ) from None
        rows.append(row)
    cut_behind(path, lines)
    return rows


class BatchWanted(UserError):
    """Batch files are written, and are to be answered before the run can go on."""


def _of_batch(requests: Sequence[Request], settings: Endpoint, where: str) -> list[dict[str, Any]]:
    """The replies in the batch files. Raises UserError if some are missing, after the requests were written."""
    assert settings.batch is not None
    if not requests:
        return []
    directory = Path(settings.batch)
    found = read_responses(directory)
    known = [found.get(request.id, Reply(request.id, error="it has no response")) for request in requests]
    others = len(found.keys() - {request.id for request in requests})
    if all(request.id not in found for request in requests):
        paths = write_requests(directory, requests)
        stale = f" (the {others} responses that are there are to other requests: remove them)" if others else ""
        raise BatchWanted(
            f"{where}: {len(requests)} requests are in {' and '.join(map(str, paths))}{stale}; have them answered as a "
            f"batch, put its output into {directory}/responses.jsonl, and start the run again"
        )
    without = {request.id: (request, reply) for request, reply in zip(requests, known, strict=True) if reply.error}
    if without and settings.refused == "stop":
        paths = write_requests(directory, [request for request, _ in without.values()], "requests.again")
        absent = [id for id in without if id not in found]
        failed = [f"{id} ({reply.error})" for id, (_, reply) in without.items() if id in found]
        counts = [f"{len(ids)} {how}: {_some(ids)}" for how, ids in (("missing", absent), ("failed", failed)) if ids]
        raise BatchWanted(
            f"{where}: {directory}/responses*.jsonl: no answer to {len(without)} of {len(requests)} requests; "
            f"{'; '.join(counts)}; have {' and '.join(map(str, paths))} answered, and put the output beside it as "
            f"responses.again.jsonl, or set {where}.refused to drop to leave them out"
        )
    return [reply.record() for reply in known]


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(ids[:_SHOWN]) + more
