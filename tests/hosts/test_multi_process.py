"""The helper that starts several processes: a slow machine fails no test, and a hang is found."""

from __future__ import annotations

import time

import pytest
from multi_process import run_processes

STILL = 1.5
# Longer than STILL, in which it is at work all the time.
COMPUTES = "import time\nend = time.process_time() + 4\nwhile time.process_time() < end: pass"
IN_A_CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {COMPUTES!r}], check=True)"
WRITES = "import time\nfor _ in range(8): time.sleep(0.5); print('.', flush=True)"


@pytest.mark.parametrize("work", [COMPUTES, IN_A_CHILD, WRITES])
def test_what_goes_on_is_waited_for(work: str) -> None:
    # The other one does nothing but wait.
    ended = run_processes(2, lambda number: work if number else "import time; time.sleep(4)", still=STILL)
    assert [one.code for one in ended] == [0, 0]
    assert ended[1].seconds > 2 * STILL


def test_a_hang_is_found() -> None:
    begin = time.monotonic()
    # As one that waits for another: it wakes up to look, and finds nothing.
    hangs = "import time; print('here', flush=True)\nwhile True: time.sleep(0.2)"
    with pytest.raises(AssertionError, match=r"processes \[0, 1\] did nothing for 1.5 s: .*here"):
        run_processes(2, hangs, still=STILL)
    assert time.monotonic() - begin > STILL


def test_one_that_spins_is_given_up_at_last() -> None:
    with pytest.raises(AssertionError, match=r"processes \[1\] still run after 3 s"):
        run_processes(2, lambda number: "while True: pass" if number else "", still=STILL, total=3)
