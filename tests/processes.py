"""Other processes, watched: for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def alive(process: int) -> bool:
    try:
        # One that has ended and that nobody has asked after is a zombie.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


# A device waits for the others in a collective operation: on a busy machine longer than the 40 seconds after which XLA
# aborts the process.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=500"


def virtual_devices(count: int) -> str:
    """XLA_FLAGS for this many CPU devices."""
    return f"--xla_force_host_platform_device_count={count} {PATIENT}"
