"""Who may ask the server, and how much a request may bring."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from transllm_jax.serving.protocol import ApiError
from transllm_jax.serving.stream import ClientGone

MIB = 2**20
# A body above the limit is read and thrown away up to this size, so that its sender gets to read the answer.
MOST_READ = 64 * MIB
# A body has to be there after this many seconds.
BODY_SECONDS = 60.0


@dataclass(frozen=True)
class Access:
    """What a request is checked by before it is read.

    key: what clients have to send; None if anybody may ask. origins: of other pages that may ask from a browser. local:
    whether the address is one that this machine alone reaches. most_bytes: of a body.
    """

    key: str | None
    origins: tuple[str, ...]
    local: bool
    most_bytes: int

    def authorise(self, request: Request) -> None:
        """Raises ApiError for a page of another origin, a name that is not this machine's, and a wrong key."""
        host, origin = request.headers.get("host", "").lower(), request.headers.get("origin")
        known = [one.lower() for one in self.origins]
        own = {f"http://{host}", f"https://{host}"}
        # A browser asks before it shows a page the answer, but not before it sends a plain text.
        if origin is not None and "*" not in known and origin.lower() not in {*known, *own}:
            raise ApiError(
                403, f"pages of {origin[:200]} may not ask; start the server with --cors {origin[:200]}", code="origin"
            )
        named = not host or _is_local(host) or "*" in known or host in {urlsplit(one).netloc for one in known}
        # Any name on the web can be made to lead to this machine, and a page under it has the same origin.
        if self.local and self.key is None and not named:
            raise ApiError(
                403,
                f"{host[:200]} is not a name of this machine; ask at localhost, or start the server with --api-key, or "
                "with --cors and this origin",
                code="host",
            )
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key is not None and not hmac.compare_digest(given.encode("latin-1"), self.key.encode()):
            raise ApiError(
                401,
                "the key is wrong or missing; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def body(self, request: Request) -> bytes:
        """The bytes of a request's body. Raises ApiError, also if they are too many or too slow; ClientGone."""
        self.authorise(request)
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size <= self.most_bytes:
                        parts.append(part)
                    elif size > MOST_READ:
                        break
        except ClientDisconnect:
            raise ClientGone from None
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from None
        if size > self.most_bytes:
            most = self.most_bytes // MIB
            raise ApiError(413, f"the body is larger than {most} MiB; shorten it", code="body_too_large")
        return b"".join(parts)


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine alone."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
