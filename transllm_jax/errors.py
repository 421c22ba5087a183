"""Exceptions that are not defects: each ends a command with one line and its own exit code."""

from __future__ import annotations

# Exit codes.
PREEMPTED, LOST = 75, 1


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to fix it. The command line exits with code 2."""


class Preempted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved its state. The command line exits with code 75."""


class Diverged(Exception):
    """Too many training losses in a row were not finite. The command line exits with code 1."""


class PeerLost(Exception):
    """Another process of the run died or cannot be reached. The command line exits with code 1."""
