"""Who may talk to the station: a guard in front of the whole page, by the rules of docs/faults.md, section "The station's page".

The station listens on one machine for one person, but every page in that person's browser can send requests to it, and a
name that an attacker owns can be made to point to it. So nothing is answered that does not name this address as its host;
nothing without the token of this start; nothing is changed by a request that another page has sent.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qs

__all__ = ["HEADERS", "MAX_FORM", "MAX_IMPORT", "MAX_PROMPTS", "Guard", "hosts_of"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_FORM = 256 * 1024
"""Bytes of a form: a click with its reason."""
MAX_PROMPTS = 1024 * 1024
"""Bytes of the form that asks, and all that Starlette takes of one field. Its 100,000 characters are up to nine bytes each on the
way: three of UTF-8, each written as ``%E6``.
"""
MAX_IMPORT = 32 * 1024 * 1024
"""Bytes of an imported file."""
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not no-referrer: with it a browser sends `Origin: null` with a form of this very page. To others neither says anything.
    "referrer-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-store",
}
"""Sent with every answer."""


def hosts_of(address: str, port: int) -> tuple[str, ...]:
    """The values of the Host header under which a station is reached: its address and, on loopback, ``localhost``.

    Browsers leave the port of http, 80, out.
    """
    name = f"[{address}]" if ":" in address else address
    names = (name, "localhost") if address in ("127.0.0.1", "::1") else (name,)
    return tuple(f"{known}:{port}" for known in names) + (names if port == 80 else ())


class Guard:
    """Refuses what does not come from the station's own page. hosts: see ``hosts_of``. cookie: its name.

    token: stands in the address that the person opens, and is exchanged at once for a cookie of another value. Requests of other
    sites' pages do not carry it; a server at another port of this machine receives it when the person goes there, since browsers
    do not keep the cookies of two ports apart. once: another token, which does this a single time. limits: paths whose
    forms may be longer than ``MAX_FORM``, with their bytes.
    """

    def __init__(
        self,
        app: App,
        token: str,
        hosts: Sequence[str],
        cookie: str,
        limits: Mapping[str, int] | None = None,
        once: str = "",
    ) -> None:
        self.app = app
        self.tokens = [token, once] if once else [token]
        self.once = once
        self.hosts = frozenset(hosts)
        self.cookie = cookie
        self.limits = dict(limits or {})
        self.session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no WebSockets: the server answers 403
        headers = _headers(scope)
        send = _with_headers(send)
        if self._brings_token(scope, headers):
            await _answer(send, 303, "", {"location": "/", "set-cookie": self._set_cookie()})
        elif refused := self._refusal(scope, headers):
            await _answer(send, *refused)
        else:
            await self.app(scope, receive, send)

    def _brings_token(self, scope: Scope, headers: dict[str, list[str]]) -> bool:
        """Whether this is the address that the terminal has printed."""
        if scope["method"] != "GET" or scope["path"] != "/" or self._other_host(headers):
            return False
        query = scope["query_string"].decode("latin-1")
        given = parse_qs(query, max_num_fields=8).get("token", []) if len(query) < 1000 else []
        if len(given) != 1 or not any(_same(given[0], token) for token in self.tokens):
            return False
        if self.once and _same(given[0], self.once):
            self.tokens.remove(self.once)
        return True

    def _refusal(self, scope: Scope, headers: dict[str, list[str]]) -> tuple[int, str] | None:
        """Status and reason, or None for a request that may pass."""
        method, path = scope["method"], scope["path"]
        if self._other_host(headers):
            return 421, "This is not the address of the station."
        if method not in ("GET", "HEAD", "POST"):
            return 405, "The station knows GET and POST only."
        if not self._has_cookie(headers):
            return 403, (
                "This address needs its token. Open the address that the station has printed in the terminal, up to its last "
                "letter. After a new start it is a new one."
            )
        site = headers.get("sec-fetch-site", ["same-origin"])  # older browsers do not say
        if site not in (["same-origin"], ["none"]):
            return 403, "Another page has sent this request."
        if method != "POST":
            return None
        if headers.get("origin") != [f"http://{headers['host'][0].lower()}"] or site == ["none"]:
            return 403, "Another page has sent this request."
        lengths = headers.get("content-length", [])
        limit = self.limits.get(path, MAX_FORM)
        known = (
            len(lengths) == 1 and lengths[0].isascii() and lengths[0].isdigit() and "transfer-encoding" not in headers
        )
        if not known:
            return 413, "The request does not say how long it is."
        if len(lengths[0]) > 12 or int(lengths[0]) > limit:
            return 413, f"This is longer than {limit // 1024} KiB. Take a part of it at a time."
        kinds = headers.get("content-type", [])
        if len(kinds) != 1 or kinds[0].split(";")[0].strip().lower() not in FORMS:
            return 415, "The station takes forms only."
        return None

    def _other_host(self, headers: dict[str, list[str]]) -> bool:
        hosts = headers.get("host", [])
        return len(hosts) != 1 or hosts[0].lower() not in self.hosts

    def _has_cookie(self, headers: dict[str, list[str]]) -> bool:
        """Other programs of this machine share the browser's cookies, so theirs may be here too, in any form."""
        pairs = (part.strip().partition("=") for line in headers.get("cookie", []) for part in line.split(";"))
        return any(name == self.cookie and _same(value, self.session) for name, _, value in pairs)

    def _set_cookie(self) -> str:
        return f"{self.cookie}={self.session}; Path=/; HttpOnly; SameSite=Strict"


def _same(given: str, expected: str) -> bool:
    """Equal, in a time that does not say how much of it is."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _with_headers(send: Send) -> Send:
    """Every answer carries ``HEADERS``, whoever gives it."""

    async def guarded(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", []) if pair[0].decode("latin-1").lower() not in HEADERS]
            message["headers"] = kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        await send(message)

    return guarded


async def _answer(send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    """A page without style, for people who are not let in: the texts are ours alone."""
    body = b""
    if text:
        body = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            '<meta name="viewport" content="width=device-width"><title>fedbiscuit station</title></head>'
            f"<body><main><h1>Not let in</h1><p>{text}</p></main></body></html>"
        ).encode()
    sent = {"content-type": "text/html; charset=utf-8", "content-length": str(len(body)), **(headers or {})}
    start = [(name.encode(), value.encode()) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
