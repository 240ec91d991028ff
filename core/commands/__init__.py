"""What the scripts share: their flags, what they tell, and their runs."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    flags=("run",),
    pictures=("make_pictures",),
)
