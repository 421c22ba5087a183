"""Sizes and times as people read them."""

from __future__ import annotations


def size(amount: float) -> str:
    """Bytes as "1.53 GiB", "340.00 MiB" or "12 KiB"."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if amount >= 2**power / 8:
            return f"{amount / 2**power:.2f} {unit}"
    return f"{amount / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """Seconds as "4.8 s", "48 s", "3 min 30 s", "2 h 5 min" or "3 d 7 h"."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours = whole // 3600
    return f"{hours} h {whole % 3600 // 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
