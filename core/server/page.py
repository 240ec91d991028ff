"""The page."""

from __future__ import annotations

from fastapi import FastAPI

from core.server.service import Service


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page at /."""
