"""What stands before the page and the API: foreign hosts and pages, strangers and large requests are refused.

A web page that somebody has open must not drive a server on the same machine. Browsers send it the Host that
was asked for and the Origin of the page that asks, and both must be the server's own.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.server.accounts import Accounts, Keys

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANYWHERE = ("0.0.0.0", "::")
CLIENT = "ultrapixel.client"  # in the scope: whose request it is
OPEN_PATHS = ("/health",)
API = "/v1/"
SAFE_HEADERS = (
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Refusal(Exception):
    """Why a request is not answered; `asks` for a name and a password."""

    def __init__(self, status: int, message: str, asks: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.asks = status, message, asks


@dataclass(frozen=True)
class Hosts:
    """The names under which the server may be asked: where it listens, and those that are allowed besides."""

    bound: str
    allowed: Collection[str] = ()

    def own(self, host: str) -> bool:
        """Whether a Host header names this server."""
        name = _host_name(host)
        if name is None:
            return False
        if name in (self.bound.lower(), *(each.lower() for each in self.allowed)):
            return True
        anywhere = self.bound in ANYWHERE
        if name in LOOPBACK:
            return anywhere or self.bound in LOOPBACK
        return anywhere and (_is_address(name) or name == socket.gethostname().lower())


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    rest = parts.path or parts.query or parts.fragment or parts.username is not None
    return None if rest else parts.hostname


def _is_address(name: str) -> bool:
    """Whether it is an address: unlike a name, nobody can let one lead to another machine."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """An ASGI app that passes on what may pass."""

    def __init__(
        self, app: ASGIApp, hosts: Hosts, most_bytes: int, accounts: Accounts | None, keys: Keys | None
    ) -> None:
        self._app, self._hosts, self._most_bytes = app, hosts, most_bytes
        self._accounts, self._keys = accounts, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        answering = _Answering(send)
        try:
            await self._check(scope)
            await self._app(scope, answering.bounded(receive, self._most_bytes), answering.send)
        except Refusal as refusal:
            answering.refusal = refusal
        except Exception:
            if answering.refusal is None:
                raise
        if answering.refusal is not None and not answering.started:
            await _answer(scope, send, answering.refusal)

    async def _check(self, scope: Scope) -> None:
        """Raise the Refusal of a request that may not pass; else name its client in the scope."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._hosts.own(hosts[0]):
            raise Refusal(
                403, f"this server is not called {', '.join(hosts) or 'nothing'}: open the address that it "
                "printed, or start it with --allow_host NAME",
            )  # fmt: skip
        if not _is_own_page(scope, headers, hosts[0]):
            raise Refusal(403, "requests from other web pages are refused")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most_bytes:
            raise Refusal(413, f"the request has more than {self._most_bytes} bytes, the most that is taken")
        address = (scope.get("client") or ("unknown",))[0]
        scope[CLIENT] = await self._user(scope["path"], headers) or address

    async def _user(self, path: str, headers: Headers) -> str | None:
        """Who asks; None where nobody has to say so. Refusal for those who may not."""
        if path in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        is_api = path.startswith(API)
        if is_api and self._keys is not None and kind.lower() == "bearer":
            if self._keys.has(given.strip()):
                return "key " + given.strip()[:4]
        elif self._accounts is not None and kind.lower() == "basic":
            name, password = _credentials(given)
            if await asyncio.to_thread(self._accounts.knows, name, password):
                return name
        elif self._accounts is None and not (is_api and self._keys is not None):
            return None
        way = "a key of --api_key_file as a Bearer token" if is_api and self._keys is not None else ""
        other = "a name and its password" if self._accounts is not None else ""
        needed = " or ".join(filter(None, (way, other)))
        raise Refusal(401, f"this server needs {needed}", asks=self._accounts is not None)


class _Answering:
    """What is sent of an answer: safe headers are added, and nothing follows once the request is refused."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.refusal: Refusal | None = None

    async def send(self, message: Message) -> None:
        """Pass on a message of the app."""
        if self.refusal is not None and not self.started:
            return  # what the app makes of the refusal
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": [*message.get("headers", ()), *SAFE_HEADERS]}
        await self._send(message)

    def bounded(self, receive: Receive, most_bytes: int) -> Receive:
        """The same messages, until their bytes are too many."""
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most_bytes:
                self.refusal = Refusal(413, f"the request has more than {most_bytes} bytes")
                raise self.refusal
            return message

        return counted


def _is_own_page(scope: Scope, headers: Headers, host: str) -> bool:
    """Whether no other web page makes this request; following a link to this one is allowed."""
    origins = headers.getlist("origin")
    if origins:
        parts = urlsplit(origins[0]) if len(origins) == 1 else urlsplit("")
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return True
    follows = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return follows and scope.get("method") == "GET"


def _credentials(given: str) -> tuple[str, str]:
    try:
        name, _, password = base64.b64decode(given, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return "", ""
    return name, password


async def _answer(scope: Scope, send: Send, refusal: Refusal) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps(error_body(refusal.message)).encode()
    headers = [(b"content-type", b"application/json"), *SAFE_HEADERS]
    if refusal.asks:
        headers.append((b"www-authenticate", b'Basic realm="UltraPixel", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(message: str, kind: str = "invalid_request_error", key: str | None = None) -> dict:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": key, "code": None}}
