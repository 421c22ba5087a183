"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from transllm_jax.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` or `2GiB`. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not match or (size := int(float(match[1]) * _UNITS[match[2] or ""])) < 1:
        raise UserError(f"the size {text!r} is not of the form 5GB, 500MB or 2GiB; correct it")
    return size
