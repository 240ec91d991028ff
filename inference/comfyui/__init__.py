"""UltraPixel's nodes for ComfyUI: link this folder into its custom_nodes (docs/comfyui.md)."""

from importlib import import_module
from pathlib import Path

from .as_it_was import process_as_it_was
from .private import private_package

_FOLDER = Path(__file__).resolve().parent  # not that of the link
with process_as_it_was():
    _nodes = import_module(f"{private_package(_FOLDER.parents[1], _FOLDER)}.nodes")

NODE_CLASS_MAPPINGS = _nodes.NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS = _nodes.NODE_DISPLAY_NAME_MAPPINGS
