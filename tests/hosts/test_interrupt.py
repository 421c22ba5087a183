"""How a command is asked to stop: by signals, by a terminal that is closed, by a reader that goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from transllm_jax.hosts.interrupt import Interrupt


def test_a_second_sigterm_means_nothing_new(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupt() as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
        # Ctrl-C, once with the cluster's signal and once by a hand that does not want to wait.
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("stopping after the piece of work at hand") == 1


def test_nohup_stays_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# A piece of work that tells of itself, and is asked to stop.
WORKING = """
import sys, time
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
with Progress() as progress, Interrupt() as interrupt:
    with progress.task("work", total=2000) as bar:
        for number in range(2000):
            bar.update(number)
            progress.say("x" * 500)
            time.sleep(0.01)
            if interrupt.requested:
                progress.say("saved")
                sys.exit(75)
"""
# Runs it in a terminal of its own, which is closed once something was said there.
IN_A_TERMINAL = f"""
import os, pty, sys
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, "-c", {WORKING!r}])
while b"xxx" not in os.read(terminal, 1000):
    pass
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_terminal_that_is_closed_stops_the_work_as_sigterm_does() -> None:
    assert subprocess.run([sys.executable, "-c", IN_A_TERMINAL], check=False, timeout=60).returncode == 75


def test_who_stops_reading_stops_no_work() -> None:
    work = subprocess.Popen([sys.executable, "-c", WORKING], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert work.stdout is not None and work.stderr is not None
    work.stdout.readline()
    work.stdout.close()
    assert b"nobody reads" in work.stderr.readline()
    work.send_signal(signal.SIGTERM)
    assert work.wait(60) == 75
