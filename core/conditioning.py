"""Text and image conditioning: CLIP through transformers, from a local folder or a hub id (paper section 3, Stage C)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

import modules.torchvision_operators  # noqa: F401  (before torchvision and transformers)

from torchvision.transforms import functional as pictures  # isort: skip
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection  # isort: skip
