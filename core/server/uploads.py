"""Pictures that clients send, decoded within bounds: from their bytes alone, never from a path or a URL."""

from __future__ import annotations

import base64
import binascii

from PIL import Image, ImageOps

from core.pictures.images import NamedBytes, open_image, upright_parts
from core.server.limits import MEGA, Limits


def read_upload(content: bytes, what: str, limits: Limits) -> Image.Image:
    """The picture, upright: RGB, or RGBA where parts of it are transparent; errors call it `what`.

    ValueError for what is no picture, is damaged, or has more bytes or pixels than are allowed.
    """
    if len(content) > limits.upload_mb * MEGA:
        raise ValueError(f"{what} has more than {limits.upload_mb} MB, the most that is taken")
    source = NamedBytes(content, what)
    with open_image(source) as image:
        if image.width * image.height > limits.upload_mp * MEGA:
            raise ValueError(
                f"{what} has {image.width} x {image.height} pixels (width x height), more than the "
                f"{limits.upload_mp} million that are taken"
            )
        rgb, alpha = upright_parts(image, source)
    if alpha is not None and alpha.getextrema()[0] < 255:
        rgb.putalpha(alpha)
    return rgb


def from_base64(text: str, what: str) -> bytes:
    """The bytes of base64, also where it is a data: URL; ValueError for what is none."""
    head, comma, data = text.partition(",")
    if "://" in head or (comma and not head.startswith("data:")):
        raise ValueError(f"{what} must be the picture itself, as base64: no URL is fetched, no file opened")
    try:
        return base64.b64decode(data if comma else text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{what} is no base64") from None


def hole_of(picture: Image.Image, mask: Image.Image | None) -> Image.Image:
    """What is to be filled, white on black, of the picture's size.

    As the mask's transparent parts show it or, where it has none, its white; without a mask, what is
    transparent in the picture. ValueError where there is nothing to fill, or the mask has another size.
    """
    given = picture if mask is None else mask
    if given.size != picture.size:
        raise ValueError(
            f"the mask has {mask.width} x {mask.height} pixels, but the picture {picture.width} x "
            f"{picture.height}: send a mask of the picture's size"
        )
    if given.mode == "RGBA":
        return ImageOps.invert(given.getchannel("A"))
    if mask is None:
        raise ValueError("there is nothing to fill: draw or send a mask, or a picture with transparent parts")
    return mask.convert("L")
