"""Names and addresses of hosts, as people, SLURM and TPU pods write them. Functions raise ValueError if unreadable."""

from __future__ import annotations

import ipaddress
import itertools
import re
import shutil
import subprocess

# The most hosts of a list: as many as SLURM itself allows in one range.
MOST = 1 << 16
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_RANGES = r"\[[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*\]"
_LISTED = re.compile(rf"(?:[A-Za-z0-9_.-]|{_RANGES})+")
_PORT = re.compile(r"[0-9]{1,5}")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address has brackets, which are not part of the host."""
    host, _, port = text.strip().rpartition(":")
    if not _PORT.fullmatch(port) or not 0 < int(port) < 1 << 16:
        raise ValueError("no port from 1 to 65535 after the last ':'")
    if host.startswith("[") and host.endswith("]"):
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    if ":" in host:
        raise ValueError("an IPv6 address needs brackets, such as [fe80::1]:8482")
    if not re.fullmatch(_NAME, host):
        raise ValueError("no name of a host before the ':'")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def slurm_hosts(text: str) -> list[str]:
    """The hosts of a SLURM node list, in its order: `rack[1-2]n[08-10]-ib,login`.

    Ranges keep the leading zeros of their first number. The last of several brackets varies fastest. Other forms are
    left to `scontrol show hostnames` if it is installed.
    """
    try:
        return _expanded(text)
    except ValueError:
        if (found := _by_scontrol(text)) is None:
            raise
        return found


def _expanded(text: str) -> list[str]:
    hosts: list[str] = []
    for item in re.split(r",(?![^\[\]]*\])", text):
        if not _LISTED.fullmatch(item):
            raise ValueError(f"{item!r} is no name with ranges such as n[01-04]")
        parts = [_numbers(part) if part.startswith("[") else [part] for part in re.split(rf"({_RANGES})", item) if part]
        count = 1
        for part in parts:
            count *= len(part)
        if len(hosts) + count > MOST:
            raise ValueError(f"more than {MOST} hosts")
        hosts += ["".join(chosen) for chosen in itertools.product(*parts)]
    if wrong := next((host for host in hosts if not re.fullmatch(_NAME, host)), None):
        raise ValueError(f"{wrong!r} is no name of a host")
    return hosts


def _numbers(ranges: str) -> list[str]:
    """`[01-03,7]` as 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in ranges[1:-1].split(","):
        first, _, last = part.partition("-")
        begin, end = int(first), int(last or first)
        if end < begin:
            raise ValueError(f"the range {part} ends before it begins")
        if len(numbers) + end - begin >= MOST:
            raise ValueError(f"more than {MOST} hosts")
        numbers += [str(number).zfill(len(first)) for number in range(begin, end + 1)]
    return numbers


def _by_scontrol(text: str) -> list[str] | None:
    """SLURM's own answer; None if it has none or is not installed."""
    if (tool := shutil.which("scontrol")) is None:
        return None
    try:
        done = subprocess.run([tool, "show", "hostnames", text], capture_output=True, text=True, timeout=60)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    hosts = done.stdout.split()
    return hosts if done.returncode == 0 and hosts and all(re.fullmatch(_NAME, host) for host in hosts) else None


def worker_hosts(text: str) -> list[str]:
    """The workers of a TPU slice, `HOST` or `HOST:PORT` each, with commas or spaces between them."""
    workers = re.split(r"\s*,\s*|\s+", text.strip())
    if "" in workers:
        raise ValueError("a name is missing")
    if wrong := next((worker for worker in workers if not re.fullmatch(rf"{_NAME}(?::[0-9]{{1,5}})?", worker)), None):
        raise ValueError(f"{wrong!r} is no HOST or HOST:PORT")
    return workers
