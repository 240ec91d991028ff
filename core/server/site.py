"""The whole site as one ASGI app: the guard, the API, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from fastapi import FastAPI

from core.server.accounts import Accounts, Keys
from core.server.api import add_api
from core.server.guard import Guard, Hosts
from core.server.page import add_page
from core.server.service import Service


def build_site(
    service: Service,
    host: str,
    allowed: Collection[str] = (),
    accounts: Accounts | None = None,
    keys: Keys | None = None,
) -> Guard:
    """The app of a service that listens at `host`; `allowed` are other names under which it is asked."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with service.running():
            yield

    app = FastAPI(title="UltraPixel", version="0.1.0", lifespan=lifespan, redoc_url=None)
    add_api(app, service)
    site = add_page(app, service)
    return Guard(site, Hosts(host, allowed), service.limits.request_bytes, accounts, keys)
