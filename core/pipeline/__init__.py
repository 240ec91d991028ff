"""The way of a prompt to a picture."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    pipeline=("UltraPixelPipeline",),
    going_on=("decode", "go_on"),
    made=("Picture", "Pictures"),
    progress=("Progress", "Stopped"),
    resolution=("Plan", "plan"),
    steering=("Steering",),
    controls=("GivenControl",),
)
