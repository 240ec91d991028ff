"""Weight files in, tensors and networks out, and back."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    checkpoint=("load_module", "read_tensors", "save_tensors"),
    clip=("ImageEncoder", "TextCondition", "TextEncoder"),
    layouts=("guidance_names", "identify"),
)
