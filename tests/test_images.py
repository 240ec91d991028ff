"""Pictures: rounding, reading, file names, and settings that survive the file."""

import json
import os
import string
import struct
import warnings
import zlib

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from core.pictures import images
from core.pictures.files import FORMATS, JPEG_LIMITS, check_format
from core.pictures.images import (
    load_image,
    picture_stem,
    prepare_folder,
    read_image_metadata,
    safe_stem,
    save_image,
    save_new_image,
    take_path,
    to_image,
)
from core.pictures.metadata import XMP_END, XMP_START
from core.pipeline.control import read_source

BEFORE = ROOT / "tests" / "pictures"  # made by commit f1c274f

RED = Image.new("RGB", (8, 5), (200, 30, 30))
any_text = st.text(st.characters(), max_size=60)  # lone surrogates and NUL too
one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)


# ---------------------------------------------------------------------------------- tensors to pictures


def test_to_image_keeps_every_8_bit_value():
    levels = torch.arange(256).repeat(3, 1, 1)  # (3, 1, 256)
    image = to_image(levels / 255)
    assert image.mode == "RGB" and image.size == (256, 1)
    assert list(image.getchannel("R").tobytes()) == list(range(256))


@pytest.mark.parametrize(
    "value, level", [(-0.2, 0), (1.7, 255), (0.4 / 255, 0), (0.6 / 255, 1), (127.6 / 255, 128)]
)
def test_to_image_clamps_and_rounds_to_nearest(value, level):
    assert to_image(torch.full((3, 2, 2), value)).getpixel((1, 1)) == (level,) * 3


def test_to_image_keeps_orientation_and_channel_order():
    pixels = torch.zeros(3, 2, 4, dtype=torch.bfloat16)
    pixels[2, 0, 3] = 1
    image = to_image(pixels)
    assert image.size == (4, 2)
    assert image.getpixel((3, 0)) == (0, 0, 255) and image.getpixel((0, 0)) == (0, 0, 0)


def test_to_image_refuses_nan():
    pixels = torch.zeros(3, 4, 4)
    pixels[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN; .* bfloat16 or float32"):
        to_image(pixels)


# --------------------------------------------------------------------------------------- reading pictures


def test_load_image_is_rgb_upright_and_white_where_transparent(tmp_path):
    transparent = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    transparent.putpixel((1, 0), (0, 255, 0, 255))
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned clockwise
    transparent.save(tmp_path / "a.png", exif=orientation)
    image = load_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.size == (2, 4)
    assert image.getpixel((1, 1)) == (0, 255, 0) and image.getpixel((0, 0)) == (255, 255, 255)


def test_load_image_scales_16_bits(tmp_path):
    for level in (0, 100 * 257, 65535):
        Image.new("I;16", (3, 3), level).save(tmp_path / "grey.png")
        assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (level // 257,) * 3


def test_16_bit_masks_have_transparent_parts_too(tmp_path):
    image = Image.new("I;16", (2, 1), 100 * 257)
    for level in (0, 65535):
        image.putpixel((1, 0), level)
        image.save(tmp_path / "mask.png", transparency=level)
        for ground in ("black", "white"):
            read = load_image(tmp_path / "mask.png", ground)
            assert read.getpixel((0, 0)) == (100,) * 3
            assert read.getpixel((1, 0)) == ((0,) * 3 if ground == "black" else (255,) * 3)


def icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile with these tags."""
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    size = struct.pack(">I", start + len(data))
    white = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    head = size + bytes(4) + b"\2\x40\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + table + data


def exchanged() -> bytes:
    """sRGB's profile with red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    entries = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * count, 12)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def near(image: Image.Image, colour: tuple[int, int, int]) -> bool:
    return max(abs(a - b) for a, b in zip(image.getpixel((2, 2)), colour, strict=True)) < 4


@pytest.mark.parametrize("suffix, mode", [("png", "RGB"), ("jpg", "RGB"), ("webp", "RGB"), ("tif", "RGBA")])
def test_colours_follow_the_profile(tmp_path, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    RED.convert(mode).save(path, icc_profile=exchanged(), quality=95)
    image = load_image(path)
    assert near(image, (30, 200, 30))
    image.save(tmp_path / "again.png")
    assert near(load_image(tmp_path / "again.png"), (30, 200, 30))  # not exchanged once more


def grey() -> bytes:
    """A profile of grey with gamma 1."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256)
    return icc(b"GRAY", {b"wtpt": b"XYZ " + bytes(16), b"kTRC": curve})


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(tmp_path, mode):
    level = {"L": 55, "LA": (55, 255), "I;16": 55 * 257}[mode]
    Image.new(mode, (5, 5), level).save(tmp_path / "a.png", icc_profile=grey())
    assert near(load_image(tmp_path / "a.png"), (128,) * 3)


def test_colours_of_transparent_parts_are_read_alike(tmp_path):
    image = Image.new("LA", (5, 5), (55, 0))
    image.save(tmp_path / "a.png", icc_profile=grey(), exif=b"Exif\0\0damaged")
    source = read_source(tmp_path / "a.png")
    assert near(source.unmixed, (128,) * 3) and near(source.picture, (255,) * 3)
    assert source.hole.getpixel((2, 2)) == 255


def test_profiles_that_are_damaged_or_of_another_mode_are_ignored(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"no profile", srgb[:200], icc(b"CMYK", {}), b"", srgb):
        RED.save(tmp_path / "a.png", icc_profile=profile)
        assert load_image(tmp_path / "a.png").tobytes() == RED.tobytes()
    Image.new("L", (5, 5), 55).save(tmp_path / "a.png", icc_profile=exchanged())
    assert load_image(tmp_path / "a.png").getpixel((2, 2)) == (55,) * 3


def test_long_texts_and_damaged_exif_are_no_reason_to_refuse(tmp_path):
    for compressed in (True, False):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("workflow", "x" * (70 << 20), zip=compressed)
        RED.save(tmp_path / "a.png", pnginfo=chunks)
        assert load_image(tmp_path / "a.png").tobytes() == RED.tobytes()
    for suffix in ("png", "webp", "jpg"):
        RED.save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0damaged", quality=95)
        assert near(load_image(tmp_path / f"a.{suffix}"), RED.getpixel((0, 0)))


@pytest.mark.parametrize("kind", [0, 2])  # grey, RGB
def test_one_transparent_colour_of_16_bits_is_white(tmp_path, kind):
    def chunk(name: bytes, content: bytes) -> bytes:
        rest = name + content
        return struct.pack(">I", len(content)) + rest + struct.pack(">I", zlib.crc32(rest))

    colour = struct.pack(">H", 0x1234) * (kind + 1)
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0), b"tRNS": colour}
    chunks |= {b"IDAT": zlib.compress(b"\0" + colour), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, chunks, chunks.values()))
    (tmp_path / "a.png").write_bytes(content)
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_grey_of_more_than_8_bits_is_scaled(tmp_path):
    for number, content in enumerate((b"P5 1 1 65535\n" + struct.pack(">H", 88 * 257), None)):
        path = tmp_path / f"{number}.pgm"
        if content is None:
            Image.new("F", (1, 1), 88 / 255).save(path, "TIFF")
        else:
            path.write_bytes(content)
        assert load_image(path).getpixel((0, 0)) == (88,) * 3


def test_load_image_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png: this picture does not exist"):
        load_image(tmp_path / "none.png")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="page.png: this file is not a picture"):
        load_image(tmp_path / "page.png")
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png: this is a pipe or a device"):
        load_image(tmp_path / "pipe.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.png: the picture is damaged"):
        load_image(tmp_path / "cut.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_load_image_states_its_limit(tmp_path, monkeypatch):
    Image.new("L", (40, 25)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert load_image(tmp_path / "a.png").size == (40, 25)
    for limit in (999, 300):  # Pillow warns about the one and refuses the other
        monkeypatch.setattr(images, "MAX_PIXELS", limit)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=f"more than {limit} pixels"):
            load_image(tmp_path / "a.png")


def test_the_largest_picture_can_be_read():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image._decompression_bomb_check((16384, 16384))


# ---------------------------------------------------------------------------------------------- file names


@given(any_text)
def test_safe_stem_is_safe_everywhere(prompt):
    stem = safe_stem(prompt)
    assert 0 < len(stem.encode()) <= 66
    assert not set(stem) & set('<>:"/\\|?*.~$% \0\n\r\t')
    assert not stem.startswith(("-", "_")) and not stem.endswith("_")
    assert stem.isprintable() and stem.casefold() not in {"con", "nul", "aux", "prn", "com1", "lpt9"}


@pytest.mark.parametrize(
    "prompt, stem",
    [
        ("a red fox, in snow", "a_red_fox_in_snow"),
        ("", "image"),
        ("🐈‍⬛ ❤️", "image"),
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\a.", "C_a"),
        ("CON", "image_CON"),
        ("nul.", "image_nul"),
        ("COM¹", "image_COM1"),
        ("--help", "help"),
        ("日本の山", "日本の山"),
        ("cafe\u0301", "café"),
        ("x" * 400, "x" * 60),
        ("é" * 400, "é" * 30),
    ],
)
def test_safe_stem_examples(prompt, stem):
    assert safe_stem(prompt) == stem


@given(any_text)
@one_folder
def test_a_name_can_be_created_and_is_never_taken(tmp_path, prompt):
    stem = picture_stem(prompt, 16384, 16384, 2**63 - 1)
    for format in FORMATS:
        before = set(tmp_path.iterdir())
        path = take_path(tmp_path, stem, format)
        assert path.parent == tmp_path and len(path.name.encode()) < 140
        assert set(tmp_path.iterdir()) - before == {path}


def test_new_pictures_replace_nothing(tmp_path):
    stem = picture_stem("a cat", 1024, 2048, 7)
    (tmp_path / f"{stem}.png").write_text("mine")
    (tmp_path / f"{stem}_2.png").symlink_to("nowhere")
    (tmp_path / f"{stem}_3.png").mkdir()
    names = [save_new_image(RED, tmp_path, stem, "png", {}).name for _ in range(2)]
    assert names == ["a_cat_1024x2048_7_4.png", "a_cat_1024x2048_7_5.png"]
    assert (tmp_path / f"{stem}.png").read_text() == "mine" and len(list(tmp_path.iterdir())) == 5


def test_a_name_that_is_taken_while_a_picture_is_written_is_left_alone(tmp_path, monkeypatch):
    write = Image.Image.save

    def slowly(image, name, *args, **kwargs):
        (tmp_path / "a.png").write_text("of another run")
        write(image, name, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", slowly)
    assert save_new_image(RED, tmp_path, "a", "png", {}).name == "a_2.png"
    assert (tmp_path / "a.png").read_text() == "of another run"


def test_a_picture_that_cannot_be_placed_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    for name in ("link", "replace"):
        monkeypatch.setattr(images.os, name, fail)
    with pytest.raises(OSError, match="no space left"):
        save_new_image(RED, tmp_path, "a", "png", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_and_tried(tmp_path):
    prepare_folder(tmp_path / "deep" / "er")
    prepare_folder(tmp_path / "deep" / "er")
    assert not list((tmp_path / "deep" / "er").iterdir())
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match=f"{name} cannot be the output folder: a file is in its place"):
            prepare_folder(tmp_path / name)
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(ValueError, match="nothing can be written to this output folder"):
            prepare_folder(tmp_path / name)


def test_a_folder_on_a_full_disk_is_refused(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "NamedTemporaryFile", full)
    with pytest.raises(ValueError, match="nothing can be written .*No space left"):
        prepare_folder(tmp_path)


# ----------------------------------------------------------------------------------- files with metadata


@pytest.mark.parametrize("format", FORMATS)
@given(prompt=any_text, seed=st.integers(0, 2**64), cfg=st.floats(allow_nan=False))
@one_folder
def test_settings_survive_the_file(tmp_path, format, prompt, seed, cfg):
    if format == "jxl":
        pytest.importorskip("pillow_jxl")
    metadata = {"prompt": prompt, "seed": seed, "cfg": cfg, "negative_prompt": None, "size": [1, 2]}
    path = save_image(RED, tmp_path / f"a.{format}", format, metadata)
    assert read_image_metadata(path) == metadata
    with Image.open(path) as image:
        assert image.size == RED.size


def test_png_is_exact_and_readable_by_people(tmp_path):
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    text = "ein Fuchs 狐\ud800\0\nSteps: 3"
    path = save_image(noise, tmp_path / "a.png", "png", {"seed": 3}, text)
    assert load_image(path).tobytes() == noise.tobytes()
    with Image.open(path) as image:
        assert image.text["parameters"] == "ein Fuchs 狐?\nSteps: 3"
        assert json.loads(image.text["ultrapixel"])["seed"] == 3


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_the_text_is_the_user_comment_as_others_write_it(tmp_path, format):
    text = "a <fox> & 狐 🦊\nSteps: 3"
    metadata = {"prompt": "]]> <!-- & \x00 🦊", "seed": 3}
    path = save_image(RED, tmp_path / f"a.{format}", format, metadata, text)
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + text.encode("utf-16-be")
    assert read_image_metadata(path) == metadata


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_settings_are_found_in_xmp_that_another_program_rewrote(tmp_path, format):
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<r:Description xmlns:u="urn:ultrapixel" u:settings="{&quot;seed&quot;: 3}"/></r:RDF></x:xmpmeta>'
    )
    RED.save(tmp_path / f"a.{format}", xmp=packet.encode())
    assert read_image_metadata(tmp_path / f"a.{format}") == {"seed": 3}
    RED.save(tmp_path / f"a.{format}", xmp=packet[:-5].encode())
    with pytest.raises(ValueError, match="carries no settings"):
        read_image_metadata(tmp_path / f"a.{format}")


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_pictures_of_before_the_infotext_keep_their_settings(format):
    stored = read_image_metadata(BEFORE / f"settings_before_infotext.{format}")
    assert stored["prompt"] == 'a red house, "old" (left); 風車 🦁\nby the sea'
    assert (stored["negative_prompt"], stored["seed"], stored["cfg"]) == ("night, fog", 7, 2.5)


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_lossy_formats_stay_close(tmp_path, format):
    ramp = Image.merge(
        "RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256))]
    )
    path = save_image(ramp, tmp_path / f"a.{format}", format, {})
    with Image.open(path) as image:
        assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[format]
    difference = torch.tensor(list(ramp.tobytes())).sub(torch.tensor(list(load_image(path).tobytes())))
    assert difference.float().abs().mean() < 2


def test_jpg_colours_are_not_subsampled(tmp_path):
    stripes = Image.new("RGB", (16, 16))
    for x in range(0, 16, 2):
        stripes.paste((255, 0, 0), (x, 0, x + 1, 16))
    image = load_image(save_image(stripes, tmp_path / "a.jpg", "jpg", {}))
    assert image.getpixel((4, 8))[0] > 230 and image.getpixel((5, 8))[0] < 25


def test_settings_too_long_for_jpg_do_not_cost_the_picture(tmp_path):
    room = JPEG_LIMITS["xmp"] - len(XMP_START + XMP_END + b'{"prompt": ""}')
    for length, warned in ((room, False), (room + 1, True)):  # the last that fits, the first that does not
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = save_image(RED, tmp_path / "a.jpg", "jpg", {"prompt": "x" * length}, "text")
        assert bool(caught) == warned and load_image(path).size == RED.size
        assert Image.open(path).getexif().get_ifd(0x8769)
    with pytest.raises(ValueError, match="carries no settings"):
        read_image_metadata(path)


def test_a_text_too_long_for_jpg_costs_neither_picture_nor_settings(tmp_path):
    room = (JPEG_LIMITS["exif"] - 58) // 2  # 58: of EXIF around the text
    for length, warned in ((room, False), (room + 1, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = save_image(RED, tmp_path / "a.jpg", "jpg", {"seed": 3}, "x" * length)
        assert bool(caught) == warned and load_image(path).size == RED.size
        assert read_image_metadata(path) == {"seed": 3}
    for format in ("png", "webp"):
        path = save_image(RED, tmp_path / f"a.{format}", format, {"prompt": "x" * 200_000}, "x" * 200_000)
        assert len(read_image_metadata(path)["prompt"]) == 200_000


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = save_image(RED, tmp_path / "deep" / "a.png", "png", {"seed": 0})
    os.link(path, tmp_path / "old.png")
    save_image(RED, path, "png", {"seed": 1})
    assert read_image_metadata(tmp_path / "old.png") == {"seed": 0}  # replaced, not written over
    before = path.read_bytes()

    def break_off(self, name, *args, **kwargs):
        name.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OSError, match="no space left"):
        save_image(RED, path, "png", {"seed": 2})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("format, side", [("jpg", 65500), ("webp", 16383)])
def test_format_limits(tmp_path, format, side):
    path = save_image(Image.new("RGB", (side, 1)), tmp_path / f"a.{format}", format, {})
    assert load_image(path).size == (side, 1)
    with pytest.raises(ValueError, match=f"at most {side} pixels a side, not {side + 1} x 1"):
        save_image(Image.new("RGB", (1, side + 1)), tmp_path / f"b.{format}", format, {})
    check_format("png", side + 1, side + 1)


def test_unknown_format_names_the_nearest():
    with pytest.raises(ValueError, match="'JPEG' is not known; the nearest of png, .* is jpg"):
        check_format("JPEG", 8, 8)
    with pytest.raises(ValueError, match="'gif' is not known; use png, png16, jpg"):
        check_format("gif", 8, 8)


def test_reading_settings_names_what_is_wrong(tmp_path):
    RED.save(tmp_path / "plain.png")
    RED.save(tmp_path / "plain.jpg")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a camera's comment"
    RED.save(tmp_path / "camera.jpg", exif=exif)
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0[1]"
    RED.save(tmp_path / "list.webp", exif=exif)
    for name in ("plain.png", "plain.jpg", "camera.jpg", "list.webp"):
        with pytest.raises(ValueError, match=f"{name}: the picture carries no settings"):
            read_image_metadata(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_image_metadata(tmp_path / "none.png")


def test_alphabet_survives_in_names():
    assert safe_stem(string.ascii_letters + string.digits, limit=62) == string.ascii_letters + string.digits
