"""The exceptions that are no defects: each ends a command with one line and an exit code of its own."""

from __future__ import annotations

PREEMPTED, LOST = 75, 1


class UserError(Exception):
    """Bad input: one line that says what, where and how to mend it. The command line exits with code 2."""


class Preempted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved itself. The command line exits with code 75."""


class Diverged(Exception):
    """Training met too many losses in a row that are not finite. The command line exits with code 1."""


class PeerLost(Exception):
    """Another process of the run died or cannot be reached. The command line exits with code 1."""
