"""The settings and the job of a picture, under the short name that callers from Python use."""

from core.config.settings import Job, Settings

__all__ = ["Job", "Settings"]
