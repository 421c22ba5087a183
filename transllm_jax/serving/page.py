"""The page on `/`: one static file, and the headers that confine it.

The page loads nothing and connects to nothing but the server that it came from. Its Content-Security-Policy says so to
the browser: only the one script and the one style of the file run, which are named by their SHA-256, so that nothing
that a model writes can become code.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Page:
    """What answers `GET /`: the file in UTF-8, and the headers of the response."""

    html: bytes
    headers: dict[str, str]


@cache
def page() -> Page:
    """The page, read once."""
    html = files("transllm_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # After an upgrade of the server, a reload shows the new page.
        "Cache-Control": "no-cache",
    }
    return Page(html.encode(), headers)


def policy(html: str) -> str:
    """The Content-Security-Policy of a page whose only script and only style are inline."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(html, 'script')}",
            f"style-src {_hash(html, 'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash(html: str, tag: str) -> str:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
