"""The settings and the job of a picture, under the short name that callers from Python use."""

from core.config.settings import FAST, Job, Settings

__all__ = ["FAST", "Job", "Settings"]
