"""What only the embedded family has: its own trainings, and how its pictures are judged."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    evaluation=("Evaluation", "held_out_cases"),
    evaluation_run=("evaluate",),
)
