"""Imports torchvision also where its compiled operators cannot load, as beside a CPU build of torch.

torchvision registers shape functions for ``nms`` and ``qnms`` as it is imported and fails when its compiled
library is missing. Nothing here calls either, so declaring their schemas is enough. Import this module
before torchvision, or before transformers and diffusers, which import it. Where torchvision loads by itself
this is a plain import.
"""

from __future__ import annotations

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # declarations live as long as this object


def _declare_missing_operators() -> None:
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(name + _SCHEMA)


try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    _declare_missing_operators()
    import torchvision  # noqa: F401
