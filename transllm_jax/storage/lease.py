"""One run at a time on a store, where no kernel holds a lock: a lease that its holder renews.

Leases are numbered and the highest counts. Whoever takes over creates the next number, which a store lets only one
do, so of two that find a stale lease one gets it; a holder that was stalled finds the higher number, and stops.
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
from pathlib import Path
from types import TracebackType
from typing import Any

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

        A job that is started again after its host died finds its own fresh lease: it waits until that is stale, and
        is refused as soon as the lease is renewed. Without `watch` it is refused at once.
        """
        self._store, self._watch, self._say, self._stale, self._renew = store, watch, say, stale, renew
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)} | _system()
        self._number = 0
        self._lost: str | None = None
        self._seen = 0.0  # when the lease was renewed last, by time.monotonic
        self._ended = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        """Take the lease. Raises UserError while another run holds it."""
        first: dict[str, Any] | None = None
        began = time.monotonic()
        while True:
            number, held = self._top()
            if held is None or held["released"] or self._is_stale(held, first, began):
                if self._take(number + 1):
                    break
                continue
            if not self._watch or (first is not None and held != first):
                raise UserError(f"{self._store.root}: {_described(held)}; wait for it or stop it")
            if first is None:
                self._say(f"{_described(held)}; looking whether it still lives, for {self._stale:.0f} s at most")
                first, began = held, time.monotonic()
            self._ended.wait(min(self._renew, self._stale) / 6)
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
        if self._lost is None and time.monotonic() - self._seen > self._stale / 2:
            self._sign()
        if self._lost is not None:
            raise UserError(self._lost)

    def _is_stale(self, held: dict[str, Any], first: dict[str, Any] | None, began: float) -> bool:
        if all(self._me[key] and self._me[key] == held.get(key) for key in _SYSTEM) and _dead(held["pid"]):
            return True
        # By its time, or by our own watching: hosts' clocks may differ.
        unchanged = held == first and time.monotonic() - began > self._stale
        return unchanged or time.time() - held["renewed"] > self._stale

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
        self._number, self._seen = number, time.monotonic()
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
            self._store.write(self._name(self._number), self._content())
            self._seen = time.monotonic()

    def _content(self, *, released: bool = False) -> bytes:
        return json.dumps({**self._me, "renewed": time.time(), "released": released}).encode()

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


def _dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # somebody else's
    return False


def _described(held: dict[str, Any]) -> str:
    ago = max(0.0, time.time() - held["renewed"])
    return f"another run is at work here (host {held['host']}, process {held['pid']}, seen {ago:.0f} s ago)"
