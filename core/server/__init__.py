"""A page and an API in one process: one queue, one worker that owns the models, and what guards them."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    limits=("Limits",),
    orders=("Order",),
    service=("Service",),
)
