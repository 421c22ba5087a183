"""The one exception that means "the user's input is wrong"."""

from __future__ import annotations

PREEMPTED = 75


class UserError(Exception):
    """Bad input: one line that says what, where and how to mend it. The command line exits with code 2."""


class Preempted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved itself. The command line exits with code 75."""
