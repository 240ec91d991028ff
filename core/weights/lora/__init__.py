"""LoRA files of every layout: read into one form, merged with a network, and written."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    files=("LoraFile", "write_lora"),
    reading=("read_lora",),
    merging=("WeightedLora", "load_loras"),
    tokens=("MergedTokens",),
)
