"""Trainings: one loop, what stands around it, and a recipe for each network."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    trainer=("Recipe", "StepLoss", "Trainer"),
    run=("Run", "train"),
)
