"""Sockets between the processes of a run, and the lines of JSON that they send."""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

from transllm_jax.errors import PeerLost, UserError
from transllm_jax.hosts.names import format_address

# Seconds: a silent host is probed after IDLE and then every INTERVAL, PROBES times: it is lost after 20.
IDLE, INTERVAL, PROBES = 5, 5, 3
# Seconds until a send that the other side does not accept fails.
STUCK = 20
# The most bytes of a line. The processes' own lines are far shorter; this stops a sender that never ends its line.
LONGEST = 1 << 28


def with_keepalive(connection: socket.socket) -> socket.socket:
    """Turn on keepalive, so that a vanished host is noticed after IDLE + INTERVAL * PROBES seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    seconds = IDLE + INTERVAL * PROBES
    options = {"TCP_KEEPIDLE": IDLE, "TCP_KEEPALIVE": IDLE, "TCP_KEEPINTVL": INTERVAL, "TCP_KEEPCNT": PROBES}
    for name, value in (options | {"TCP_USER_TIMEOUT": seconds * 1000}).items():
        # Not every system has all of them.
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def listen(host: str, port: int, patience: float = 10) -> socket.socket:
    """A socket to which the other processes connect, on the address of `host` if that is an address of this machine.

    Otherwise (its port may be forwarded), or if `host` is a loopback address only here (some systems resolve their own
    name to 127.0.1.1), it listens on all addresses; see `listens_everywhere`. Tries for `patience` seconds.
    """
    give_up = time.monotonic() + patience
    while True:
        try:
            return _listener(host, port)
        except OSError as error:
            # The previous run may still be ending.
            if time.monotonic() > give_up:
                raise UserError(f"--coordinator: cannot listen on port {port} here: {error}; give another") from None
            time.sleep(0.2)


def _listener(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    for family, _, _, _, address in found:
        if not is_loopback(host) and ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            continue
        try:
            return socket.create_server(address, family=family, backlog=1024)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    if is_loopback(host):
        raise OSError(errno.EADDRNOTAVAIL, f"{host} is no address of this machine")
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def listens_everywhere(listener: socket.socket) -> bool:
    """Whether the socket listens on all addresses of this machine."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_unspecified


def free_port(host: str) -> int:
    """A port of `host` that is free now."""
    with listen(host, 0) as found:
        return int(found.getsockname()[1])


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach this host."""
    return host in ("localhost", "::1") or host.startswith("127.")


def reach(host: str, port: int, patience: float) -> socket.socket:
    """A connection to the hub. Waits for the primary for `patience` seconds, then raises PeerLost."""
    give_up = time.monotonic() + patience
    while True:
        try:
            found = socket.create_connection((host, port), timeout=5)
            # Without a listener, a connection within this machine can connect to itself.
            if found.getsockname() != found.getpeername():
                return with_keepalive(found)
            found.close()
            error: OSError = ConnectionRefusedError("nobody listens")
        except OSError as raised:
            error = raised
        if time.monotonic() > give_up:
            raise PeerLost(
                f"process 0 is absent: no answer at {format_address(host, port)} in {patience:.0f} s ({error}); "
                "is the command running on that host, and is the port open?"
            )
        time.sleep(0.1)


def lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """The other side's messages, until it disconnects, times out, or sends a line that is no message: that gives {}."""
    kept = b""
    while True:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            return
        if not data:
            return
        *whole, kept = (kept + data).split(b"\n")
        for line in whole:
            message = message_of(line)
            yield message or {}
            if not message:
                return
        if len(kept) > LONGEST:
            return


def message_of(line: bytes) -> dict[str, Any] | None:
    """The message in a line, or None if it is not a JSON object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def say(connection: socket.socket, message: dict[str, Any]) -> bool:
    """Send a message; whether that worked."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return False
    return True


def sign(key: bytes, role: str, *said: Any) -> str:
    """HMAC-SHA256 by the run's key, as the hub or as a member (`role`), over what both have said."""
    return hmac.new(key, json.dumps([role, *said]).encode(), hashlib.sha256).hexdigest()


def is_signed(signature: Any, key: bytes, role: str, *said: Any) -> bool:
    """Whether `signature` is the one that `sign` gives."""
    wanted = sign(key, role, *said)
    return isinstance(signature, str) and hmac.compare_digest(signature.encode(errors="replace"), wanted.encode())
