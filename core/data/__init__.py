"""The way of a training picture: found, decoded, sorted by shape, put into batches."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    sources=("open_data", "stream"),
    folder=("index_folder",),
    loader=("Batch", "LoaderSettings"),
    buckets=("make_buckets",),
)
