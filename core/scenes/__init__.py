"""The drawn world of the embedded family: scenes, their captions, and their pictures."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    scene=("ATTRIBUTES", "Scene", "sample_scene"),
    captions=("caption",),
    drawing=("render",),
)
