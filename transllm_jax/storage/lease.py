"""One run at a time on a store, where no kernel holds a lock: a lease that its holder renews.

Leases are numbered and the highest counts. Whoever takes over creates the next number, which a store lets only one
do, so of two that find a stale lease one gets it; a holder that was stalled finds the higher number, and stops.

The clocks of two hosts are never compared: they may differ by minutes. How old a lease is, the store says by its own
clock; from then on an observer looks, by its own clock that only runs forward, whether the lease changes.
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
    """A context that holds a store for this process."""

    def __init__(
        self,
        store: Store,
        *,
        watch: bool = True,
        say: Callable[[str], None] = lambda message: None,
        stale: float = STALE,
        renew: float = RENEW,
    ) -> None:
        """watch: whether to look, where a lease is fresh, if its holder still lives.

        A job that is started again after its host died finds its own lease: if that is fresh, it waits until it is
        stale, and is refused as soon as the lease is renewed. Without `watch` it is refused at once.
        """
        self._store, self._watch, self._say, self._stale, self._renew = store, watch, say, stale, renew
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)} | _system()
        self._number = 0
        self._lost: str | None = None
        self._signs = 0  # renewals so far, so that each changes the lease whatever the wall clock says
        self._seen = 0.0  # when the lease was renewed last, by `_now`
        self._ended = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        """Take the lease. Raises UserError while another run holds it."""
        first: dict[str, Any] | None = None
        since = 0.0  # the latest moment at which `first` can have been renewed, by our clock
        while True:
            looked = _now()
            number, held = self._top()
            if held is not None and first is None and not self._is_free(held):
                first, since = held, self._renewed(number)
                looked = _now()
                if looked - since <= self._stale and self._watch:
                    self._say(f"{_described(held)}; looking whether it still lives, for {self._stale:.0f} s at most")
            if held is None or self._is_free(held) or (held == first and looked - since > self._stale):
                if self._take(number + 1):
                    break
                continue
            if not self._watch or held != first:
                raise UserError(f"{self._store.root}: {_described(held)}; wait for it or stop it")
            self._ended.wait(min(self._renew, self._stale) / 3)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give it back. Nothing, where that was done."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None:
            try:
                self._store.write(self._name(self._number), self._content(released=True))
            except Exception as failed:
                # It goes stale by itself; what ended the run is to be heard, not this.
                self._say(f"the lease of {self._store.root} was not given back ({failed})")

    def check(self) -> None:
        """Raise UserError where another run has taken over; called before anything is made to count."""
        if self._lost is None and _now() - self._seen > self._stale / 2:
            self._sign()
        if self._lost is not None:
            raise UserError(self._lost)

    def _is_free(self, held: dict[str, Any]) -> bool:
        """Whether it was given back, or its holder died on this machine."""
        here = all(self._me[key] and self._me[key] == held.get(key) for key in _SYSTEM)
        return held["released"] or (here and not is_alive(held["pid"]))

    def _renewed(self, number: int) -> float:
        """The latest moment, by our clock, at which a lease can have been renewed; now, if the store cannot tell."""
        age = self._store.age(self._name(number))
        return _now() - (age or 0.0)

    def _top(self) -> tuple[int, dict[str, Any] | None]:
        while True:
            names = sorted(self._store.files(_PLACE))
            if not names:
                return 0, None
            content = self._store.read(f"{_PLACE}/{names[-1]}")
            if content is not None:  # otherwise cleared away just now by one that holds a higher one
                held: dict[str, Any] = json.loads(content)
                return int(names[-1].removesuffix(".json")), held

    def _take(self, number: int) -> bool:
        if not self._store.create(self._name(number), self._content()):
            return False
        numbers = [int(name.removesuffix(".json")) for name in self._store.files(_PLACE)]
        if max(numbers) > number:
            # A slow one: the number had been taken and cleared away before.
            self._store.remove(self._name(number))
            return False
        for lower in numbers:
            if lower < number:
                self._store.remove(self._name(lower))
        self._number, self._seen = number, _now()
        return True

    def _keep(self) -> None:
        while not self._ended.wait(self._renew) and self._lost is None:
            try:
                self._sign()
            except Exception as error:
                # `check` asks again, and raises it where it counts.
                self._say(f"the lease of {self._store.root} could not be renewed ({error})")

    def _sign(self) -> None:
        with self._guard:
            number, held = self._top()
            if number > self._number:
                who = _described(held) if held is not None else "another run is at work here"
                self._lost = f"{self._store.root}: {who}; it took over after {self._stale:.0f} s without a sign of this"
                return
            signed = _now()
            self._store.write(self._name(self._number), self._content())
            self._seen = signed

    def _content(self, *, released: bool = False) -> bytes:
        # The time is for people, and for no comparison.
        self._signs += 1
        about = {"signs": self._signs, "renewed": time.time(), "released": released}
        return json.dumps({**self._me, **about}).encode()

    @staticmethod
    def _name(number: int) -> str:
        return f"{_PLACE}/{number:08d}.json"


def _system() -> dict[str, str | None]:
    """What tells whether a process number is one of ours: this start of the machine, and the space of numbers."""
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
    """Seconds by a clock of this machine that only runs forward, on Linux also while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
