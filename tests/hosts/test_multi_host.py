"""`transllm run` as several real processes, on one directory or with a mirror each of a store; and when one is lost."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import EXAMPLES, tiny_run
from gcs_emulator import Emulator
from multi_process import Ended, run_processes
from reliability.harness import FILES, require_same, results
from rich.console import Console

from transllm_jax.commands.chat import open_session
from transllm_jax.commands.status import status_table
from transllm_jax.disk import read_json
from transllm_jax.storage.store import Store
from transllm_jax.training.arrays import load_arrays
from transllm_jax.training.record.metrics import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.full]
HOST = socket.gethostname()
AGAIN = "run the same command on all hosts again to go on"
STAGES = ("pretrain", "translate", "transfer")
STEPS, EVERY = 8, 2
UNTIL = ("--until", "pretrain")
# What comes before the first training.
BEFORE = ("base", "vocabulary", "evaluation/base", "evaluation/vocabulary")

# `transllm ARGUMENTS`, which sends itself a signal when a step was dispatched.
HARMED = """
import os, sys
from transllm_jax.hosts.agreement import Agreement

tell = Agreement.tell

def harmed(self, step, flag):
    if step == {step}:
        os.kill(os.getpid(), {signal})
    return tell(self, step, flag)

Agreement.tell = harmed
from transllm_jax.cli import main as cli
sys.argv = ["transllm", *{arguments}]
cli.main()
"""
# Which process gets which signal, at which step.
Harm = tuple[int, signal.Signals, int]


def start(
    config: Path,
    workdir: Path | str | Callable[[int], Path],
    count: int,
    *arguments: str | Callable[[int], str],
    devices: int = 1,
    harm: Harm | None = None,
    **options: Any,
) -> list[Ended]:
    """Runs the command as `count` processes. What is a function gives each process its own."""

    def command(number: int) -> Sequence[str] | str:
        place = workdir(number) if callable(workdir) else workdir
        more = [argument(number) if callable(argument) else argument for argument in arguments]
        line = ["run", str(config), *more, "--workdir", str(place)]
        if harm is not None and harm[0] == number:
            return HARMED.format(step=harm[2], signal=int(harm[1]), arguments=line)
        return ["-m", "transllm_jax.cli.main", *line]

    return run_processes(count, command, devices=devices, **options)


def said(ended: Sequence[Ended]) -> str:
    return "\n".join(f"=== {one.code}\n{one.out[-3000:]}\n---\n{one.err[-3000:]}" for one in ended)


def require_done(ended: Sequence[Ended]) -> None:
    assert [one.code for one in ended] == [0] * len(ended), said(ended)
    for one in ended:
        assert not own_lines(one), said(ended)
    for one in ended[1:]:
        # Gloo itself greets.
        assert not [line for line in one.out.splitlines() if not line.startswith("[Gloo]")], said(ended)


def own_lines(ended: Ended) -> list[str]:
    """What it wrote on stderr; tensorstore looks for credentials, of which an emulator needs none."""
    return [line for line in ended.lines() if "google_auth_provider" not in line]


def losses(workdir: Path, stage: str) -> list[float]:
    return [row["loss"] for row in read_rows(workdir / stage / "metrics.jsonl")]


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training on 1, 2 or 4 devices, with checkpoints and a validation in its midst."""
    tree: dict[str, Any] = tiny_run(tiny_model, Path("never"))
    for stage in STAGES:
        tree[stage]["batch_size"] = 4
    held_out = {"source": {"path": str(EXAMPLES / "text.heldout.txt"), "max_bytes": 4000}, "every": 3, "rows": 3}
    tree["pretrain"] |= {"steps": STEPS, "checkpoint_every": EVERY, "validation": held_out}
    # Nothing is clipped: the gradient's norm is a sum over processes in an order that is gloo's own, so that its last
    # digits, and all that is scaled by it, differ between processes and devices.
    tree["pretrain"]["clip_norm"] = 1e6
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    english = {"question_en": "What is the capital of Thailand?", "answers_en": ["Bangkok"]}
    question = {"question": "เมืองหลวงของไทยคือเมืองอะไร", "answers": ["กรุงเทพ"], **english}
    path.with_name("questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    tree["evaluation"] |= {"answers": str(path.with_name("questions.jsonl")), "max_answer_tokens": 6}
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a whole run of two processes with a device each."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    require_done(start(config, workdir, 2))
    return workdir


@pytest.fixture
def prepared(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a work directory with all that comes before the first training."""

    def make(name: str) -> Path:
        for part in BEFORE:
            shutil.copytree(whole / part, tmp_path / name / part)
        shutil.copy(whole / "evaluation" / "original_answers.json", tmp_path / name / "evaluation")
        return tmp_path / name

    return make


def test_two_processes_are_one_with_two_devices(config: Path, whole: Path, tmp_path: Path) -> None:
    require_done(start(config, tmp_path / "one", 1, devices=2))
    # The compiled program is the same, and a sum of two numbers has one order: arrays, checkpoints, losses, answers.
    require_same(results(whole), results(tmp_path / "one"))
    asked = [
        read_json(place / "evaluation" / "transfer" / "results.json")["asked"] for place in (whole, tmp_path / "one")
    ]
    assert asked[0] == asked[1] and asked[0]["counts"][""]["asked"] == 1
    # Nothing is left of the others, and no line stands twice.
    here, there = ({str(p.relative_to(d)) for p in d.rglob("*")} for d in (whole, tmp_path / "one"))
    # Names with a time, or of orbax's own making.
    differ = {name for name in here ^ there if not any(own in name for own in ("tfevents", "checkpoints", "trainable"))}
    assert not differ
    assert [row["step"] for row in read_rows(whole / "pretrain" / "metrics.jsonl")] == list(range(1, STEPS + 1))
    sessions = {row["session"] for row in read_rows(whole / "ledger.jsonl")}
    assert len(sessions) == 1


def test_the_losses_are_those_of_one_device(config: Path, whole: Path, prepared: Callable[[str], Path]) -> None:
    # A float32 sum over a batch in another order differs by about 1e-7 of it; 8 steps with a high rate make more of it.
    tolerance = {"rtol": 2e-5}
    alone = prepared("alone")
    require_done(start(config, alone, 1, *UNTIL))
    wanted = losses(alone, "pretrain")
    assert len(wanted) == STEPS
    np.testing.assert_allclose(losses(whole, "pretrain"), wanted, **tolerance)
    four, one = prepared("four"), prepared("one")
    require_done(start(config, four, 4, *UNTIL))
    require_done(start(config, one, 1, *UNTIL, devices=4))
    for place in (four, one):
        np.testing.assert_allclose(losses(place, "pretrain"), wanted, **tolerance)
    # Four processes add numbers in another order than four devices of one: what is told of a loss may differ in its
    # last digits. What is trained does not: gradients are summed by a ring, in the same order on both.
    told = ("metrics.jsonl", "validation.jsonl", "results.json")
    arrays = [
        {name: value for name, value in results(place, ["pretrain"]).items() if not name.endswith(told)}
        for place in (four, one)
    ]
    assert any("trainable" in name or "checkpoint" in name for name in arrays[0])
    require_same(*arrays)


def test_one_is_lost_or_stopped_and_the_job_goes_on(config: Path, whole: Path, prepared: Callable[[str], Path]) -> None:
    workdir = prepared("run")

    def lost(number: int, step: int) -> str:
        """The line of the other process, after this one was killed at a step."""
        ended = start(config, workdir, 2, *UNTIL, harm=(number, signal.SIGKILL, step))
        other = ended[1 - number]
        assert (ended[number].code, other.code) == (-signal.SIGKILL, 1), said(ended)
        assert len(other.lines()) == 1, said(ended)
        assert other.seconds - ended[number].seconds < 60, said(ended)
        return other.lines()[0]

    line = lost(1, step=5)
    assert line in [
        f"error: process 1 of 2 (host {HOST}) was lost; pretrain: the checkpoint of step {step} is kept; {AGAIN}"
        for step in (2, 3, 4)
    ]
    ended = start(config, workdir, 2, *UNTIL, harm=(1, signal.SIGTERM, 4))
    assert [one.code for one in ended] == [75, 75], said(ended)
    for one in ended:
        # It comes in step 4, is told in the next, and known to all in the one after.
        assert "pretrain: stopped at step 6 of 8, saved; run the same command again to go on" in one.lines(), said(
            ended
        )
    newest = max(int(path.name) for path in (workdir / "pretrain/checkpoints").iterdir() if path.name.isdigit())
    assert newest == 6
    # The first process, where all is written and the others meet.
    line = lost(0, step=7)
    assert line == f"error: process 0 of 2 (host {HOST}) was lost; pretrain: the checkpoint of step 6 is kept; {AGAIN}"
    require_done(start(config, workdir, 2, *UNTIL))
    require_same(results(workdir, ["pretrain"]), of_pretraining(whole))


def of_pretraining(whole: Path) -> dict[str, Any]:
    later = ("translate", "transfer", "recover")
    found = results(whole, ["pretrain"])
    return {name: value for name, value in found.items() if not name.removeprefix("evaluation/").startswith(later)}


def test_processes_that_do_not_belong_together(config: Path, tmp_path: Path) -> None:
    def own_seed(number: int) -> str:
        return f"seed={number}"

    ended = start(config, tmp_path / "run", 2, own_seed)
    for one in ended:
        assert one.code == 2 and len(one.lines()) == 1, said(ended)
        assert one.lines()[0].startswith("error: the processes of this run differ: the config's hash is "), said(ended)
    assert not (tmp_path / "run").exists()
    ended = start(config, lambda number: tmp_path / str(number), 2)
    for number, one in enumerate(ended):
        assert one.code == 2, said(ended)
        assert one.lines() == [
            f"error: {tmp_path / '0'} on host {HOST} (process 1) is not the directory of that name on host {HOST}; "
            "give a --workdir that all hosts share, or gs://BUCKET/PATH"
        ], (number, said(ended))
    # A file that one of them lacks is that one's error, and the end of all.
    ended = start(tmp_path / "none.yaml", tmp_path / "run", 2)
    for one in ended:
        assert one.code == 2 and len(one.lines()) == 1 and "no such config file" in one.lines()[0], said(ended)


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """An emulator of Google Cloud Storage for several clients: it serves one at a time, and a slow one stops it."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    lock, handle = threading.Lock(), emulator.Router.handle

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed is none of the emulator's errors."""

    def one_by_one(self: Any, method: str) -> None:
        with lock:
            handle(self, method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator.server, "HTTPServer", Server)
        patch.setattr(emulator.Router, "handle", one_by_one)
        yield


@pytest.fixture(scope="module")
def store(threads: None, gcs: Emulator) -> Iterator[Emulator]:
    """The emulator, which now knows of generations: what tensorstore reads and writes hangs on them."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound

    def knowing(handler: Callable[..., None]) -> Callable[..., None]:
        def handle(request: Any, response: Any, storage: Any) -> None:
            name = request.params.get("object_id") or request.query.get("name", [None])[0]
            try:
                generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"] if name else None
            except NotFound:
                generation = None
            if request.query.get("alt") == ["media"] and generation is not None:
                if request.query.get("ifGenerationNotMatch") == [generation]:
                    response.status = HTTPStatus.NOT_MODIFIED
                    return
                response["x-goog-generation"] = generation
            elif request.query.get("ifGenerationMatch", ["0"]) not in (["0"], [generation]):
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            handler(request, response, storage)

        return handle

    with pytest.MonkeyPatch.context() as patch:
        for _, handlers in server.HANDLERS:
            for method, handler in handlers.items():
                patch.setitem(handlers, method, knowing(handler))
        yield gcs


@pytest.mark.usefixtures("store")
def test_new_hosts_go_on_from_the_store(
    config: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"gs://bucket/{tmp_path.name}"

    def mirrors(name: str) -> Callable[[int], dict[str, str]]:
        return lambda number: {"TRANSLLM_MIRROR": str(tmp_path / f"{name}-{number}")}

    ended = start(config, url, 2, *UNTIL, env=mirrors("first"), harm=(1, signal.SIGKILL, 7))
    assert [one.code for one in ended] == [1, -signal.SIGKILL], said(ended)
    # That of step 6 may have been at work, and complete a moment later.
    (line,) = own_lines(ended[0])
    assert any(f"pretrain: the checkpoint of step {step} is kept" in line for step in (4, 6)), line
    # The newest one is damaged, in a part that the second process wrote; the one before it is used.
    store = Store(f"{url}/pretrain/checkpoints")
    files = store.files()
    whole_ones = [found[1] for name in files if (found := re.fullmatch(r"(\d+)/commit_success.txt", name))]
    before, newest = sorted(map(int, whole_ones))[-2:]
    parts = [name for name in files if name.startswith(f"{newest}/state/ocdbt.process_1/d/")]
    largest = max(parts, key=lambda name: files[name].size)
    content = bytearray(store.read(largest) or b"")
    content[len(content) // 2] ^= 4
    store.write(largest, bytes(content))
    ended = start(config, url, 2, *UNTIL, env=mirrors("second"))
    require_done(ended)
    assert "pretrain goes on" in ended[0].out and f"goes on from step {before}" in ended[0].out, said(ended)
    assert f"{newest} is damaged (" in ended[0].out and f"put aside, step {before} is used" in ended[0].out, said(ended)
    assert f"{newest}-0/{largest.removeprefix(f'{newest}/')}" in Store(f"{url}/pretrain/damaged").files()
    # What each new host has now, the checkpoints aside, which lie in the store alone.
    wanted = {name: value for name, value in of_pretraining(whole).items() if "checkpoint" not in name and value}
    for number in (0, 1):
        place = tmp_path / f"second-{number}"
        assert not (place / "pretrain" / "checkpoints").exists()
        found = arrays_and_files(place)
        require_same(found, {name: value for name, value in wanted.items() if name in found})
        assert found.keys() == wanted.keys()
    # A third host asks how it stands, and talks to the model.
    console = Console(file=io.StringIO(), width=200)
    console.print(status_table(url))
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(
        any(line.startswith(step) and "done" in line for line in told.splitlines()) for step in ("base", "pretrain")
    )
    monkeypatch.setenv("TRANSLLM_MIRROR", str(tmp_path / "third"))
    answers = [list(open_session(run, max_new_tokens=4).ask("ฝนตกไหม"))[-1].raw for run in (url, tmp_path / "second-0")]
    assert answers[0] == answers[1]


def arrays_and_files(workdir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"pretrain {k}": v.tobytes() for k, v in load_arrays(workdir / "pretrain/trainable").items()
    }
    return found | {name: (workdir / name).read_bytes() for name in FILES if (workdir / name).exists()}
