"""What one may ask for: frozen dataclasses, and YAML to them; nothing in this room loads torch."""

from core.lazily import exporting

__getattr__, __dir__, __all__ = exporting(
    __name__,
    schema=(
        "LatentGeometry",
        "StageCConfig",
        "StageBConfig",
        "ControlConfig",
        "RunConfig",
        "TrainConfig",
        "PersonalizedTrainConfig",
        "ControlTrainConfig",
        "StageATrainConfig",
        "StageBTrainConfig",
        "StageCTrainConfig",
        "PreviewerTrainConfig",
    ),
    yaml=("load", "load_control", "load_stage_b", "load_stage_c"),
    presets=("PRESETS", "Preset"),
    settings=("Job", "Settings"),
)
