"""Picture files in and out: formats, colours, and what stands beside the pixels."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    images=("load_image", "read_image_metadata", "save_image", "to_image"),
    alike=("GivenPicture", "read_given", "write_alike"),
    sheets=("contact_sheet", "grid_sheet"),
)
