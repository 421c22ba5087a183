"""A separate process that relays bytes between this process's jax and the primary's coordination service.

Run as `python -I -S relay.py FD HOST PORT`: FD is a listening socket. It ends when its standard input closes, that is
when the process that started it has ended for any reason.

Why it is needed: when the primary dies, jax aborts every other process as soon as its connection to the coordination
service closes, with a page of log and the exit code of a crash, before any message can be printed. The relay keeps the
near side open when the far side closes, so that the run's own message is printed instead. It is a process and not a
thread because jax may hold the interpreter's lock while it waits for the service.
"""

import signal
import socket
import sys
import threading
import time

# Seconds that the primary may take to start its service.
PATIENCE = 120


def reach(host: str, port: int) -> socket.socket:
    """A connection to the primary's service, once it is up."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection((host, port), timeout=10)
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def carry(near: socket.socket, far: socket.socket) -> None:
    """Copy bytes from the near side to the far side, and close both at the end."""
    try:
        while data := near.recv(1 << 16):
            far.sendall(data)
    except OSError:
        pass
    for end in (far, near):
        end.close()


def bring(far: socket.socket, near: socket.socket) -> None:
    """Copy bytes from the far side to the near side, which stays open when the far side closes."""
    try:
        while data := far.recv(1 << 16):
            near.sendall(data)
    except OSError:
        pass


def serve(near: socket.socket, host: str, port: int) -> None:
    """Relay one connection."""
    try:
        far = reach(host, port)
    except OSError:
        near.close()
        return
    far.settimeout(None)
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=bring, args=(far, near), daemon=True).start()
    carry(near, far)


def accept(listener: socket.socket, host: str, port: int) -> None:
    """Relay all connections, for ever."""
    while True:
        near, _ = listener.accept()
        threading.Thread(target=serve, args=(near, host, port), daemon=True).start()


if __name__ == "__main__":
    # A signal that stops the run may reach all its processes; the relay has to outlive the process that started it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    fd, to_host, to_port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    threading.Thread(target=accept, args=(socket.socket(fileno=fd), to_host, to_port), daemon=True).start()
    sys.stdin.buffer.read()
