"""What goes into picture files beside the pixels: XMP with the settings, EXIF, how a picture is turned."""

from __future__ import annotations

import re
import struct
from contextlib import suppress
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import ExifTags, Image

XMP_SPACE = "urn:ultrapixel"  # of the settings in XMP
XMP_KEY = f"{{{XMP_SPACE}}}settings"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
XMP_HEAD = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="{RDF}">'
).encode()
XMP_TAIL = b"</rdf:RDF></x:xmpmeta><?xpacket end='w'?>"
# Each says what rdf: means, for given packets that call it otherwise.
SETTINGS_START = (
    f'<rdf:Description xmlns:rdf="{RDF}" rdf:about="" xmlns:ultrapixel="{XMP_SPACE}"><ultrapixel:settings>'
).encode()
SETTINGS_END = b"</ultrapixel:settings></rdf:Description>"
XMP_START, XMP_END = XMP_HEAD + SETTINGS_START, SETTINGS_END + XMP_TAIL
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PROVENANCE = (
    f'<rdf:Description xmlns:rdf="{RDF}" rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<Iptc4xmpExt:DigitalSourceType>{MADE_BY_A_MODEL}</Iptc4xmpExt:DigitalSourceType></rdf:Description>"
).encode()
EXIF_UNICODE, EXIF_ASCII = b"UNICODE\0", b"ASCII\0\0\0"  # how the Exif standard begins a UserComment
EXIF_START = b"Exif\0\0"  # which some formats want before it, and others not
SUB_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
# Tags of a TIFF that tell how its pixels lie in the file, or are read otherwise.
OF_THE_FILE = {
    254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 290, 291, 292, 293, 297,
    317, 318, 319, 320, 322, 323, 324, 325, 330, 332, 338, 339, 340, 341, 347, 512, 513, 514, 529, 530, 531,
    532, 700, 33723, 34377, 34675, 37724, *SUB_IFDS,
}  # fmt: skip
ORIENTATION = 0x0112
SHORT = 3  # TIFF's name of a 16-bit number


# -------------------------------------------------------------------------------------------------- XMP


def xmp_packet(settings: str = "", provenance: bool = False, given: bytes = b"") -> bytes:
    """An XMP packet with these settings, and with where the picture comes from; b"" if it would hold nothing.

    What is added goes into a `given` packet, in the place of what it tells of the same.
    """
    name = re.search(rb"xmlns:(\w+)=[\"']" + XMP_SPACE.encode(), given)
    given = _without(given, name[1] + b":settings") if name else given
    added = b""
    if settings:
        added += SETTINGS_START + escape(settings).encode() + SETTINGS_END
    if provenance:
        given = _without(given, rb"\w+:DigitalSourceType")
        added += PROVENANCE
    if not added:
        return given
    *_, end = [None, *re.finditer(rb"</\w+:RDF\s*>", given)]
    if end is None:
        return XMP_HEAD + added + XMP_TAIL
    return given[: end.start()] + added + given[end.start() :]


def _without(packet: bytes, name: bytes) -> bytes:
    """A packet without the attributes and elements of a name, a regular expression."""
    packet = re.sub(rb"\s" + name + rb"\s*=\s*(\"[^\"]*\"|'[^']*')", b"", packet)
    return re.sub(rb"<(" + name + rb")\b[^>]*?(/>|>.*?</\1\s*>)", b"", packet, flags=re.DOTALL)


def stored_xmp(image: Image.Image) -> bytes:
    """The XMP packet of an opened picture; b"" where it has none."""
    packet = image.info.get("xmp") or _raw_profile(image, "xmp")
    if image.format == "JXL":  # whose plugin reads the EXIF alone
        packet = _box(getattr(image, "fc", b""), b"xml ")
    return packet.encode() if isinstance(packet, str) else packet


def settings_in_xmp(packet: bytes) -> str | None:
    """The settings in a packet, as an element or an attribute; SyntaxError if it is damaged."""
    if not packet:
        return None
    elements = ElementTree.fromstring(packet).iter()  # its ParseError is a SyntaxError
    found = (e.text if e.tag == XMP_KEY else e.get(XMP_KEY) for e in elements)
    return next(filter(None, found), None)


def upright_xmp(packet: bytes) -> bytes:
    """A packet that calls its picture upright, if it says how it is turned."""
    return re.sub(rb"(tiff:Orientation\s*(?:=\s*[\"']|>)\s*)\d", rb"\g<1>1", packet)


def _box(content: bytes, name: bytes) -> bytes:
    """What the box of a name holds in a file made of boxes, as JPEG XL's are."""
    start = 0
    while start + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1 and start + 16 <= len(content):
            (size,), head = struct.unpack_from(">Q", content, start + 8), 16
        end = start + size if size else len(content)
        if kind == name:
            return content[start + head : end]
        if end < start + head:
            break
        start = end
    return b""


def _raw_profile(image: Image.Image, kind: str) -> bytes:
    """What ImageMagick writes into a PNG as text: a name, a length, and hexadecimal digits."""
    with suppress(LookupError, ValueError, AttributeError):
        return bytes.fromhex("".join(image.info[f"Raw profile type {kind}"].split("\n")[3:]))
    return b""


# ------------------------------------------------------------------------------------------------- EXIF


def stored_exif(image: Image.Image) -> bytes:
    """The EXIF of an opened picture, that of a TIFF without what tells of its file; b"" where it has none."""
    if image.format == "TIFF":
        return _described(image.getexif())
    return (image.info.get("exif") or _raw_profile(image, "exif")).removeprefix(EXIF_START)


def _described(tags: Image.Exif) -> bytes:
    kept = Image.Exif()
    kept.update({tag: value for tag, value in tags.items() if tag not in OF_THE_FILE})
    for number, inner in inner_tags(tags).items():
        kept.get_ifd(number).update(inner)
    return kept.tobytes().removeprefix(EXIF_START) if len(kept) or inner_tags(kept) else b""


def inner_tags(tags: Image.Exif) -> dict[int, dict[int, Any]]:
    """The tags that stand apart in EXIF, those of the picture taken and of the place, without pointers."""
    found = {number: dict(tags.get_ifd(number)) for number in SUB_IFDS}
    for inner in found.values():
        inner.pop(ExifTags.IFD.Interop, None)
    return {number: inner for number, inner in found.items() if inner}


def upright(tiff: bytes) -> bytes:
    """EXIF, or a TIFF, which begins alike, that calls its picture upright if it says how it is turned.

    Nothing else of it changes. What is damaged comes back as it was.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    content = bytearray(tiff)
    with suppress(struct.error):
        big = struct.unpack_from(f"{order}H", tiff, 2) == (43,)
        (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", tiff, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", tiff, start)
        first, size = start + (8 if big else 2), 20 if big else 12
        for entry in range(first, min(first + size * count, len(tiff)), size) if order else ():
            if struct.unpack_from(f"{order}H", tiff, entry) == (ORIENTATION,):
                field = f"{order}HH{'Q' if big else 'I'}H"
                struct.pack_into(field, content, entry, ORIENTATION, SHORT, 1, 1)
    return bytes(content)


def with_comment(exif: bytes, text: str) -> bytes:
    """EXIF with a text as its UserComment."""
    tags = Image.Exif()
    with suppress(SyntaxError, OSError, struct.error):
        tags.load(exif)
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = EXIF_UNICODE + text.encode("utf-16-be")
    return tags.tobytes().removeprefix(EXIF_START)
