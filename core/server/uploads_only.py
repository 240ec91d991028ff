"""What stands before gradio's own routes: those that the page needs, and of files those that were uploaded.

Left to itself, gradio opens any path that a client names as a file of a component, and fetches any URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.server.guard import Refusal

API = "/gradio_api/"
READ = re.compile(
    r"(config|info|startup-events|theme\.css|upload_progress|queue/(data|status)|heartbeat/\w+"
    r"|call/\w+/\w+|file=(?!.*://).+)/?"
)
WRITTEN = re.compile(r"(queue/join|call/(v2/)?\w+|cancel|reset)/?")
UPLOAD = re.compile(r"upload/?")
ABOVE = re.compile(
    r"/(monitoring|login_check|token|dev|deep_link|vibe)(/|$)"
)  # of its routes beside /gradio_api


class UploadsOnly:
    """An ASGI app that passes on what the page needs; `folder` is where uploads lie."""

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder = app, folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "websocket" or ABOVE.match(path):
            raise Refusal(404, "there is nothing here")
        if scope["type"] == "http" and path.startswith(API):
            receive = await self._checked(path.removeprefix(API), scope["method"], receive)
        await self._app(scope, receive, send)

    async def _checked(self, name: str, method: str, receive: Receive) -> Receive:
        """What the app receives; Refusal for what it should not."""
        if method in ("GET", "HEAD") and READ.fullmatch(name) or method == "POST" and UPLOAD.fullmatch(name):
            return receive
        if method != "POST" or not WRITTEN.fullmatch(name):
            raise Refusal(404, "there is nothing here")
        body = await _whole(receive)
        for place in _named_files(_parsed(body)):
            if not self._is_upload(place):
                raise Refusal(400, "a file must be uploaded: no path is opened, and no URL fetched")
        return _replayed(body, receive)

    def _is_upload(self, place: Any) -> bool:
        if not isinstance(place, str) or "://" in place or "\0" in place:
            return False
        path = Path(place).resolve()
        return path.is_relative_to(self._folder) and path.is_file()


async def _whole(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body or b"null")
    except (ValueError, RecursionError):
        raise Refusal(400, "the body must be JSON") from None


def _named_files(value: Any) -> Iterator[Any]:
    """The places of all files in JSON."""
    ahead = [value]
    while ahead:
        one = ahead.pop()
        if isinstance(one, dict):
            if "path" in one:
                yield one["path"]
            ahead += one.values()
        elif isinstance(one, list):
            ahead += one


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Receives the body once, and then what follows."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
