"""One run at a time on a store, which has no locks: a lease that its holder renews.

Leases are numbered, and the highest number counts. A run takes over by creating the next number, which the store lets
only one do: if two runs find a stale lease, one gets it. A holder that was stalled finds the higher number and stops.

The clocks of two hosts are never compared: they may differ by minutes. The store gives a lease's age by its own clock;
from then on an observer watches, by its own monotonic clock, whether the lease changes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from transllm_jax.disk import is_alive
from transllm_jax.errors import UserError
from transllm_jax.storage.store import Store

_PLACE = ".lease"
STALE = 180.0  # seconds without a sign of life
RENEW = 30.0  # seconds between two signs of life
_SYSTEM = ("boot", "space")


class Lease:
    """A context manager that reserves a store for this process."""

    def __init__(
        self,
        store: Store,
        *,
        watch: bool = True,
        say: Callable[[str], None] = lambda message: None,
        stale: float = STALE,
        renew: float = RENEW,
    ) -> None:
        """watch: whether to wait, if another lease is fresh, to see whether its holder is still alive.

        A job that is started again after its host died finds its own old lease. If that is fresh, it waits until it is
        stale, and is refused as soon as the lease is renewed. Without `watch` it is refused at once. stale, renew:
        seconds until a lease that is not renewed is stale, and between two renewals.
        """
        self._store, self._watch, self._say, self._stale, self._renew = store, watch, say, stale, renew
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)} | _system()
        self._number = 0
        self._lost: str | None = None
        self._renewals = 0  # written to the lease, so that it changes even if the wall clock does not
        self._seen = 0.0  # time of the last renewal, by `_now`
        self._ended = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        """Take the lease. Raises UserError while another run holds it."""
        first: dict[str, Any] | None = None
        since = 0.0  # the latest time at which `first` can have been renewed, by `_now`
        while True:
            looked = _now()
            number, held = self._top()
            if held is not None and first is None and not self._is_free(held):
                first, since = held, self._renewed(number)
                looked = _now()
                if looked - since <= self._stale and self._watch:
                    most = f"for at most {self._stale:.0f} s"
                    self._say(f"{_described(held)}; waiting to see whether it is still alive, {most}")
            is_stale = held == first and looked - since > self._stale
            if held is None or self._is_free(held) or is_stale:
                if self._take(number + 1):
                    break
                continue
            if not self._watch or held != first:
                raise UserError(f"{self._store.root}: {_described(held)}; wait for it or stop it")
            self._ended.wait(min(self._renew, self._stale) / 3)
        self._thread = threading.Thread(target=self._renew_loop, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease back; does nothing the second time."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None:
            try:
                self._store.write(self._name(self._number), self._content(released=True))
            except Exception as failed:
                # It goes stale by itself. Raising here would hide the error that ended the run.
                self._say(f"the lease of {self._store.root} was not given back ({failed})")

    def check(self) -> None:
        """Raise UserError if another run has taken over. Call it before a write that others rely on."""
        if self._lost is None and _now() - self._seen > self._stale / 2:
            self._renew_lease()
        if self._lost is not None:
            raise UserError(self._lost)

    def _is_free(self, held: dict[str, Any]) -> bool:
        """Whether the lease was given back, or its holder died on this machine."""
        here = all(self._me[key] and self._me[key] == held.get(key) for key in _SYSTEM)
        return held["released"] or (here and not is_alive(held["pid"]))

    def _renewed(self, number: int) -> float:
        """The latest time, by `_now`, at which a lease can have been renewed; now if the store gives no age."""
        age = self._store.age(self._name(number))
        return _now() - (age or 0.0)

    def _top(self) -> tuple[int, dict[str, Any] | None]:
        while True:
            names = sorted(self._store.files(_PLACE))
            if not names:
                return 0, None
            content = self._store.read(f"{_PLACE}/{names[-1]}")
            if content is not None:  # otherwise the holder of a higher number has just removed it
                held: dict[str, Any] = json.loads(content)
                return int(names[-1].removesuffix(".json")), held

    def _take(self, number: int) -> bool:
        if not self._store.create(self._name(number), self._content()):
            return False
        numbers = [int(name.removesuffix(".json")) for name in self._store.files(_PLACE)]
        if max(numbers) > number:
            # Another run had taken this number before, and a later one has removed it.
            self._store.remove(self._name(number))
            return False
        for lower in numbers:
            if lower < number:
                self._store.remove(self._name(lower))
        self._number, self._seen = number, _now()
        return True

    def _renew_loop(self) -> None:
        while not self._ended.wait(self._renew) and self._lost is None:
            try:
                self._renew_lease()
            except Exception as error:
                # `check` renews again, and raises then.
                self._say(f"the lease of {self._store.root} could not be renewed ({error})")

    def _renew_lease(self) -> None:
        with self._guard:
            number, held = self._top()
            if number > self._number:
                who = _described(held) if held is not None else "another run is at work here"
                silence = f"{self._stale:.0f} s without a sign of life from this run"
                self._lost = f"{self._store.root}: {who}; it took over after {silence}"
                return
            now = _now()
            self._store.write(self._name(self._number), self._content())
            self._seen = now

    def _content(self, *, released: bool = False) -> bytes:
        # The time is for messages; it is never compared.
        self._renewals += 1
        about = {"signs": self._renewals, "renewed": time.time(), "released": released}
        return json.dumps({**self._me, **about}).encode()

    @staticmethod
    def _name(number: int) -> str:
        return f"{_PLACE}/{number:08d}.json"


def _system() -> dict[str, str | None]:
    """The boot id and the pid namespace: a process id means the same process only if both are equal."""
    found: dict[str, str | None] = dict.fromkeys(_SYSTEM)
    with suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        found["space"] = os.readlink("/proc/self/ns/pid")
    return found


def _described(held: dict[str, Any]) -> str:
    seen = datetime.fromtimestamp(held["renewed"], UTC)
    who = f"host {held['host']}, process {held['pid']}"
    return f"another run is at work here ({who}, last seen at {seen:%Y-%m-%d %H:%M:%S} UTC by its clock)"


def _now() -> float:
    """Seconds by this machine's monotonic clock, which on Linux also runs while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
