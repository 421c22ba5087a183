"""`transllm serve` as a process: two models from one run, an end by SIGTERM that loses nothing, what it refuses."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from conftest import Command
from serving_setup import chat, events


@pytest.mark.slow
def test_a_run_and_its_original_are_served_until_a_signal(finished_run: Path) -> None:
    command = [sys.executable, "-m", "transllm_jax.cli.main", "serve", str(finished_run), "--port", "0"]
    command += ["--slots", "2", "--context", "256", "--name", "tiny"]
    environment = {**os.environ, "TRANSLLM_API_KEY": "", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = [server.stdout.readline(), server.stdout.readline()]
            found = re.match(r"(http://127\.0\.0\.1:\d+) serves tiny and tiny-original;", said[1])
            assert found, (said, server.poll())
            address = found.group(1)
            assert [one["id"] for one in httpx2.get(f"{address}/v1/models").json()["data"]] == ["tiny", "tiny-original"]
            for name in ("tiny", "tiny-original"):
                assert chat(address, "Who?", model=name, max_tokens=5).status_code == 200
            # Told to end, it finishes what was asked, and takes nothing new.
            body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 100, "stream": True, "seed": 1}
            with httpx2.stream(
                "POST", f"{address}/v1/chat/completions", json={**body, "temperature": 2.0}, timeout=60
            ) as stream:
                lines = stream.iter_lines()
                first = next(lines)
                server.send_signal(signal.SIGTERM)
                told = events("\n".join([first, *lines]))
            assert told[-1] == "[DONE]" and told[-2]["choices"][0]["finish_reason"] in ("stop", "length")
            out, errors = server.communicate(timeout=60)
            assert server.returncode == 0 and "Traceback" not in errors and "finishing the answers" in out
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(address)
        finally:
            server.kill()


@pytest.mark.slow
def test_a_server_whose_reader_is_gone_answers_and_ends(tiny_model: Path) -> None:
    """As `transllm serve ... | tee log`, of which Ctrl-C ends both."""
    command = [sys.executable, "-m", "transllm_jax.cli.main", "serve", str(tiny_model), "--port", "0"]
    environment = {**os.environ, "TRANSLLM_API_KEY": "", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--slots", "2", "--context", "128"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            said = [server.stdout.readline().decode(), server.stdout.readline().decode()]
            found = re.match(r"(http://127\.0\.0\.1:\d+) serves", said[1])
            assert found, said
            server.stdout.close()
            # At once: it listens when it says so.
            assert chat(found.group(1), "Who?", max_tokens=2).status_code == 200
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
            assert b"Traceback" not in server.stderr.read()
        finally:
            server.kill()


def test_what_cannot_be_served_is_one_line(transllm: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, printed = transllm("serve", tmp_path, "--port", port)
        assert code == 2 and f"127.0.0.1:{port} cannot be used" in printed and "--port" in printed
    code, printed = transllm("serve", tmp_path, "--port", 0)
    assert code == 2 and "neither a work directory" in printed
    code, printed = transllm("serve", tmp_path, "--temperature", -1)
    assert code == 2 and "temperature" in printed
