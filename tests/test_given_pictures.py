"""Given pictures: read with all their levels and all that stands beside them, and written alike."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, PngImagePlugin
from test_images import exchanged, grey, icc

from core.pictures.alike import read_given, write_alike
from core.pictures.images import TURNS, read_image_metadata
from core.pictures.profiles import srgb_profile

NOISE = np.random.default_rng(0).integers(0, 65536, (20, 24, 4), dtype=np.uint16)
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<r:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
    'tiff:Orientation="{}" dc:source="a camera"/></r:RDF></x:xmpmeta>'
)


def png16(levels: np.ndarray, before: bytes = b"") -> bytes:
    """A PNG of 16 bits, without filters."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width, channels = levels.shape
    header = struct.pack(">2I5B", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in levels.astype(">u2"))
    if before:
        before = chunk(before[:4], before[4:])
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + chunk(b"IEND", b"")


def tiff16(levels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, levels, **options)
    return file.getvalue()


def in_16_bits(pixels: np.ndarray) -> np.ndarray:
    return (pixels * 65535).round().astype(np.uint16)


def stored(path: Path) -> np.ndarray:
    """The levels of a file as OpenCV reads them, RGB."""
    levels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return levels if levels.ndim == 2 else np.concatenate([levels[..., 2::-1], levels[..., 3:]], -1)


# --------------------------------------------------------------------------------------- levels and modes


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_of_a_png_are_exact_there_and_back(tmp_path, channels):
    levels = NOISE[..., :channels]
    (tmp_path / "a.png").write_bytes(png16(levels))
    picture = read_given(tmp_path / "a.png")
    colours = levels[..., : 1 if channels < 3 else 3]
    assert picture.bits == 16 and picture.colours.dtype == np.float32
    assert (in_16_bits(picture.colours) == colours).all() and picture.colours.shape == (20, 24, 3)
    assert (picture.alpha is None) == (channels in (1, 3))
    for suffix in ("png", "tiff"):
        path = write_alike(tmp_path / f"b.{suffix}", picture.colours, picture, picture.alpha)
        again = read_given(path)
        assert (again.colours == picture.colours).all() and again.bits == 16
        assert picture.alpha is None or (again.alpha == picture.alpha).all()
        assert (stored(path)[..., :3] == colours).all()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"compression": "zlib"}, {"byteorder": ">"}, {"tile": (16, 16)}, {"bigtiff": True},
    ],
    ids=str,
)  # fmt: skip
def test_16_bits_of_a_tiff(tmp_path, options):
    for turn in (1, 6):
        tags = [(274, "H", 1, turn, True)]
        content = tiff16(NOISE[..., :3], photometric="rgb", extratags=tags, **options)
        (tmp_path / "a.tif").write_bytes(content)
        picture = read_given(tmp_path / "a.tif")
        upright = NOISE[..., :3] if turn == 1 else np.rot90(NOISE[..., :3], -1)
        assert picture.bits == 16 and (in_16_bits(picture.colours) == upright).all()


def test_grey_tiffs_of_16_bits_begin_with_black_or_white(tmp_path):
    for kind, levels in (("minisblack", NOISE[..., 0]), ("miniswhite", 65535 - NOISE[..., 0])):
        (tmp_path / "a.tif").write_bytes(tiff16(levels, photometric=kind))
        assert (in_16_bits(read_given(tmp_path / "a.tif").colours[..., 1]) == NOISE[..., 0]).all()


def test_colours_of_a_tiff_may_be_multiplied_by_its_alpha(tmp_path):
    levels = np.full((16, 16, 4), 20000, np.uint16)
    levels[..., 3] = 40000
    for kind, value in (("assocalpha", 0.5), ("unassalpha", 20000 / 65535)):
        (tmp_path / "a.tif").write_bytes(tiff16(levels, photometric="rgb", extrasamples=[kind]))
        picture = read_given(tmp_path / "a.tif")
        assert np.allclose(picture.colours, value, atol=1e-5)
        assert np.allclose(picture.alpha, 40000 / 65535, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_transparent_colour_of_16_bits_is_alpha(tmp_path, channels):
    levels = NOISE[..., :channels]
    (tmp_path / "a.png").write_bytes(png16(levels, b"tRNS" + levels[3, 4].astype(">u2").tobytes()))
    picture = read_given(tmp_path / "a.png")
    assert picture.alpha[3, 4] == 0 and picture.alpha.sum() >= 20 * 24 - 2
    assert (in_16_bits(picture.colours) == levels).all()


@pytest.mark.parametrize(
    "name, top", [("a.ppm", 65535), ("b.ppm", 1023), ("c.pgm", 1023), ("d.jp2", 65535), ("e.avif", 1023)]
)
def test_other_formats_keep_more_than_256_levels(tmp_path, name, top):
    levels = np.broadcast_to(np.linspace(0, top, 640).astype(np.uint16)[None, :, None], (64, 640, 3)).copy()
    path = tmp_path / name
    if path.suffix in (".ppm", ".pgm"):
        kind, levels = ("P6", levels) if name.endswith("ppm") else ("P5", levels[..., :1])
        path.write_bytes(f"{kind} 640 64 {top}\n".encode() + levels.astype(">u2").tobytes())
    else:
        options = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
        if name.endswith("avif"):
            options = [cv2.IMWRITE_AVIF_DEPTH, 10, cv2.IMWRITE_AVIF_QUALITY, 100]
        cv2.imwrite(str(path), levels, options)
    picture = read_given(path)
    assert picture.bits == 16 and abs(picture.colours - levels / np.float32(top)).max() < 1e-3
    assert len(np.unique(picture.colours)) > 500


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_8_bits(tmp_path, mode):
    ramp = Image.linear_gradient("L").resize((32, 24)).convert("RGBA" if mode.endswith("A") else "RGB")
    image = (
        ramp.convert("P" if mode == "PA" else mode)
        if mode != "LAB"
        else Image.new("LAB", (32, 24), (200, 128, 128))
    )
    if mode == "PA":
        image.info["transparency"] = 0
    suffix = {"YCbCr": "jpg", "CMYK": "tif", "LAB": "tif"}.get(mode, "png")
    image.save(tmp_path / f"a.{suffix}")
    picture = read_given(tmp_path / f"a.{suffix}")
    assert picture.bits == 8 and picture.colours.shape == (24, 32, 3)
    assert (picture.alpha is not None) == mode.endswith("A")
    assert mode in ("1", "LAB") or abs(picture.colours[..., 1] - np.asarray(ramp)[..., 1] / 255).mean() < 0.1


@settings(max_examples=25, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(16, 20), st.integers(16, 20), st.sampled_from([3, 4]))))
def test_8_bits_are_exact_there_and_back(tmp_path_factory, levels):
    folder = tmp_path_factory.mktemp("a")
    Image.fromarray(levels).save(folder / "a.png")
    picture = read_given(folder / "a.png")
    path = write_alike(folder / "b.png", picture.colours, picture, picture.alpha)
    assert np.array_equal(np.asarray(Image.open(path)), levels)
    again = write_alike(folder / "c.png", picture.colours, picture, picture.alpha)
    assert path.read_bytes() == again.read_bytes()


# ----------------------------------------------------------------------------------------------- profiles


def gamma_profile(gamma: float, space: bytes = b"RGB ") -> bytes:
    """Primaries of Adobe RGB (1998), or grey, and a curve of one number."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    if space == b"GRAY":
        return icc(space, {b"wtpt": xyz(0.9642, 1, 0.8249), b"kTRC": curve})
    primaries = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    tags = {name: xyz(*values) for name, values in primaries.items()}
    return icc(
        space, {b"wtpt": xyz(0.9642, 1, 0.8249), **tags, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)}
    )


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


@pytest.mark.parametrize("profile", [gamma_profile(2.2), exchanged()], ids=["wide", "exchanged"])
def test_16_bits_follow_the_profile_as_8_bits_do(tmp_path, profile):
    eight_bit = np.random.default_rng(1).integers(40, 215, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(eight_bit).save(tmp_path / "a.png", icc_profile=profile)
    iccp = b"iCCPa\0\0" + zlib.compress(profile)
    (tmp_path / "b.png").write_bytes(png16(eight_bit.astype(np.uint16) * 257, iccp))
    plain, deep = read_given(tmp_path / "a.png"), read_given(tmp_path / "b.png")
    assert (plain.bits, deep.bits) == (8, 16) and plain.profile == deep.profile == profile
    assert abs(plain.colours - deep.colours).max() < 2.5 / 255
    assert abs(plain.colours - eight_bit / np.float32(255)).max() > 0.02


@pytest.mark.parametrize("channels", [1, 2])
def test_grey_of_16_bits_follows_its_profile(tmp_path, channels):
    levels = np.full((16, 16, channels), 55 * 257, np.uint16)
    (tmp_path / "a.png").write_bytes(png16(levels, b"iCCPa\0\0" + zlib.compress(grey())))
    assert abs(read_given(tmp_path / "a.png").colours * 255 - 128).max() < 2


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_keep_profile_gives_the_pictures_own_values_back(tmp_path, channels):
    profile = gamma_profile(1.8, b"RGB " if channels > 2 else b"GRAY")
    levels = 20000 + NOISE[..., :channels] // 4  # inside of sRGB
    (tmp_path / "a.png").write_bytes(png16(levels, b"iCCPa\0\0" + zlib.compress(profile)))
    picture = read_given(tmp_path / "a.png")
    for suffix in ("png", "tiff") if channels != 2 else ("png",):  # Pillow reads no such TIFF
        path = write_alike(
            tmp_path / f"b.{suffix}", picture.colours, picture, picture.alpha, keep_profile=True
        )
        again = read_given(path)
        assert again.profile == profile and abs(again.colours - picture.colours).max() < 1e-4
        assert again.mode == picture.mode and (again.alpha is None) == (picture.alpha is None)
        plain = read_given(write_alike(tmp_path / f"c.{suffix}", picture.colours, picture))
        assert plain.profile == srgb_profile() and abs(plain.colours - picture.colours).max() < 1e-4


def test_keep_profile_of_8_bits(tmp_path):
    eight_bit = np.random.default_rng(1).integers(110, 145, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(eight_bit).save(tmp_path / "a.png", icc_profile=gamma_profile(2.2))
    picture = read_given(tmp_path / "a.png")
    path = write_alike(tmp_path / "b.png", picture.colours, picture, keep_profile=True)
    with Image.open(path) as image:
        assert image.info["icc_profile"] == gamma_profile(2.2)
        assert abs(np.asarray(image).astype(int) - eight_bit).max() <= 2


def test_profiles_that_cannot_be_kept_leave_srgb_and_a_warning(tmp_path):
    Image.new("CMYK", (16, 16)).save(tmp_path / "a.tif", icc_profile=icc(b"CMYK", {}))
    picture = read_given(tmp_path / "a.tif")
    assert (picture.mode, picture.profile) == ("CMYK", icc(b"CMYK", {}))
    with pytest.warns(UserWarning, match="a.tif: its profile cannot be kept in a png picture"):
        path = write_alike(tmp_path / "b.png", picture.colours, picture, keep_profile=True)
    assert read_given(path).profile == srgb_profile()


def test_unusable_profiles_are_none(tmp_path):
    for profile in (b"no profile", exchanged()[:200], icc(b"CMYK", {})):
        (tmp_path / "a.png").write_bytes(png16(NOISE[..., :3], b"iCCPa\0\0" + zlib.compress(profile)))
        picture = read_given(tmp_path / "a.png")
        assert picture.profile is None and (in_16_bits(picture.colours) == NOISE[..., :3]).all()


def test_a_profile_made_of_a_table_keeps_what_lies_between_levels(tmp_path):
    profile = icc(b"RGB ", {b"wtpt": xyz(0.9642, 1, 0.8249), b"A2B0": lut()})
    levels = np.broadcast_to(np.linspace(9000, 50000, 640).astype(np.uint16)[None, :, None], (16, 640, 3))
    (tmp_path / "a.png").write_bytes(png16(levels, b"iCCPa\0\0" + zlib.compress(profile)))
    picture = read_given(tmp_path / "a.png")
    assert picture.profile == profile and len(np.unique(picture.colours)) > 500


def lut() -> bytes:
    """A table from RGB to XYZ with two points a channel: XYZ is half of RGB."""
    identity = struct.pack(">9i", *(0x10000 if i % 4 == 0 else 0 for i in range(9)))
    curves = struct.pack(">2H", 0, 65535) * 3
    grid = b"".join(struct.pack(">3H", *(16000 * int(bit) for bit in f"{i:03b}")) for i in range(8))
    return (
        b"mft2"
        + bytes(4)
        + bytes([3, 3, 2, 0])
        + identity
        + struct.pack(">2H", 2, 2)
        + curves
        + grid
        + curves
    )


# ------------------------------------------------------------------------------------------ EXIF and XMP


def turned_file(folder: Path, suffix: str, turn: int, deep: bool) -> Path:
    """A picture that is stored turned, with EXIF and XMP that say so."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8298] = turn, "a camera", "somebody"
    exif.get_ifd(0x8769)[0x9003] = "2024:01:02 03:04:05"
    exif.get_ifd(0x8825)[0x001D] = "2024:01:02"
    path = folder / f"a.{suffix}"
    corner = Image.new("RGB", (24, 16), (0, 0, 200))
    corner.paste((200, 0, 0), (0, 0, 12, 8))
    if turn != 1:  # how it must lie to be upright once turned
        corner = corner.transpose({6: TURNS[8], 8: TURNS[6]}.get(turn, TURNS[turn]))
    if deep:
        levels = np.asarray(corner).astype(np.uint16) * 257
        path.write_bytes(png16(levels, b"eXIf" + exif.tobytes()[6:]))
        return path
    if suffix == "tif":
        exif[700] = XMP.format(turn).encode()
    options = {"pnginfo": PngImagePlugin.PngInfo()} if suffix == "png" else {"xmp": XMP.format(turn).encode()}
    if suffix == "png":
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.format(turn))
    corner.save(path, exif=exif.tobytes(), **options)
    return path


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize(
    "suffix, deep",
    [("png", False), ("png", True), ("jpg", False), ("webp", False), ("tif", False), ("avif", False)],
)
def test_pictures_are_upright_and_say_so(tmp_path, suffix, deep, turn):
    picture = read_given(turned_file(tmp_path, suffix, turn, deep))
    assert (picture.height, picture.width) == (16, 24)
    assert picture.colours[3, 5, 0] > 0.6 > 0.3 > picture.colours[12, 20, 0]
    path = write_alike(tmp_path / "b.png", picture.colours, picture)
    with Image.open(path) as image:
        image.load()
        exif = image.getexif()
        assert exif.get(0x0112, 1) == 1 and (exif[0x010F], exif[0x8298]) == ("a camera", "somebody")
        assert exif.get_ifd(0x8769)[0x9003] == "2024:01:02 03:04:05"
        assert exif.get_ifd(0x8825)[0x001D] == "2024:01:02"
        assert 0x0111 not in exif
        assert deep or b"a camera" in image.info["xmp"]
        assert deep or not re.search(rb'tiff:Orientation="[^1]', image.info["xmp"])
    again = read_given(path)
    assert (again.colours == picture.colours).all()
    assert again.exif == picture.exif and again.xmp == picture.xmp


def test_exif_keeps_every_byte_but_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    exif.get_ifd(0x8769)[0x927C] = bytes(range(256))  # a maker's own note
    content = exif.tobytes()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", exif=content)
    kept = read_given(tmp_path / "a.jpg").exif
    differing = [i for i, (a, b) in enumerate(zip(kept, content[6:], strict=True)) if a != b]
    assert len(differing) == 1


def test_profiles_of_imagemagick_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    chunks = PngImagePlugin.PngInfo()
    for kind, content in (("exif", exif.tobytes()), ("xmp", XMP.format(1).encode())):
        chunks.add_text(f"Raw profile type {kind}", f"\n{kind}\n{len(content):8}\n{content.hex()}\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", pnginfo=chunks)
    picture = read_given(tmp_path / "a.png")
    assert b"a camera" in picture.exif and b"a camera" in picture.xmp


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "avif", "jxl"])
def test_settings_and_provenance_stand_beside_what_was_there(tmp_path, suffix):
    if suffix == "jxl":
        pytest.importorskip("pillow_jxl")
    picture = read_given(turned_file(tmp_path, "jpg", 6, False))
    path = write_alike(
        tmp_path / f"b.{suffix}", picture.colours, picture,
        metadata={"seed": 3}, text="a fox", provenance=True,
    )  # fmt: skip
    again = read_given(path)
    assert read_image_metadata(path) == {"seed": 3}
    assert b"a camera" in again.xmp and b"trainedAlgorithmicMedia" in again.xmp
    assert b"somebody" in again.exif
    twice = write_alike(
        tmp_path / f"c.{suffix}", picture.colours, again, metadata={"seed": 4}, provenance=True
    )
    assert read_image_metadata(twice) == {"seed": 4}
    assert read_given(twice).xmp.count(b"trainedAlgorithmicMedia") == 1


# -------------------------------------------------------------------------------------------- bad pictures


def test_what_is_wrong_is_one_sentence_with_the_files_name(tmp_path):
    path = tmp_path / "a.png"
    content = png16(NOISE[..., :3])
    separate = tiff16(np.moveaxis(NOISE[..., :3], -1, 0), photometric="rgb", planarconfig="separate")
    small = png16(NOISE[:15, :, :3])
    for bad, sentence in (
        (b"", "not a picture"), (content[:-600], "damaged"), (content[:40], "not a picture"),
        (separate, "save it as a png"), (small, "24 x 15 pixels, and at least 16 a side"),
    ):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=sentence) as caught:
            read_given(path)
        assert str(caught.value).count(str(path)) == 1 and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_given(tmp_path / "b.png")
    with pytest.raises(ValueError, match="cannot be read"):
        read_given(tmp_path)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    Image.new("RGBA", (16, 16)).save(tmp_path / "a.png")
    picture = read_given(tmp_path / "a.png")
    with pytest.raises(ValueError, match="NaN"):
        write_alike(tmp_path / "b.png", picture.colours * np.nan, picture)
    with pytest.raises(ValueError, match="transparent"):
        write_alike(tmp_path / "b.jpg", picture.colours, picture, picture.alpha)
    with pytest.raises(ValueError, match="ends in one of"):
        write_alike(tmp_path / "b.gif", picture.colours, picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_damaged_tags_are_no_reason_to_refuse(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", exif=b"Exif\0\0damaged", xmp=b"<damaged")
    picture = read_given(tmp_path / "a.jpg")
    for suffix in ("png", "tiff", "webp"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_alike(tmp_path / f"b.{suffix}", picture.colours, picture, text="a fox", metadata={"a": 1})
