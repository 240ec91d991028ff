"""Outlines in pictures, and how well those of two pictures agree."""

from __future__ import annotations

import cv2
import numpy as np
from torch import Tensor

from core.pictures.images import to_image

NEAR, FAR = 2.0, 16.0  # px: within which outlines agree, and the most that counts


def found_by_canny(picture: Tensor, blur: float, thresholds: tuple[int, int]) -> np.ndarray:
    """The outlines (H, W), bool, of a picture (3, H, W) in [0, 1], after a Gaussian of `blur` px."""
    smooth = cv2.GaussianBlur(np.array(to_image(picture)), (0, 0), blur)
    return cv2.Canny(smooth, *thresholds) > 0


def compare(given: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """F1 and distance of two pictures' outlines."""
    if not given.any() or not made.any():
        same = given.any() == made.any()
        return float(same), 0.0 if same else FAR
    there, back = _distances(given, made), _distances(made, given)
    recall, precision = (there <= NEAR).mean(), (back <= NEAR).mean()
    f1 = 2 * precision * recall / max(precision + recall, np.finfo(float).tiny)
    return float(f1), float(there.clip(max=FAR).mean() + back.clip(max=FAR).mean()) / 2


def _distances(lines: np.ndarray, others: np.ndarray) -> np.ndarray:
    """From each pixel of `lines` to the nearest of `others`, px."""
    far = cv2.distanceTransform((~others).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return far[lines]
