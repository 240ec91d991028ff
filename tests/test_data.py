"""Training data from a folder: buckets, layouts, broken files, decoding, order, resuming, check_data."""

import importlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2.functional import resize

from core.commands.flags import run
from core.data.buckets import Buckets, cover_size, draw_counts, make_buckets
from core.data.folder import DAMAGED, decode, header_size, index_folder
from core.data.loader import FolderData, LoaderSettings, Position, batches, into_buckets, thin_buckets
from core.pictures.images import NamedBytes

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "figures" / "example_dataset"
RATIOS = ("1/1", "1/2", "3/4")
SMALL = make_buckets(64, RATIOS)
REFERENCE = json.loads((ROOT / "tests" / "reference" / "buckets.json").read_text())
PUBLISHED = make_buckets(REFERENCE["image_size"], REFERENCE["ratios"])


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours that differ everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (20 + 7 * c) + seed) + np.cos(y / (15 + 5 * c) + seed * c) for c in range(3)]
    return Image.fromarray(np.uint8((np.stack(waves, -1) + 2) * 63))


def write(folder: Path, name: str, height: int, width: int, caption: str | None = "a wave", seed: int = 0):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(height, width, seed).save(path)
    path.with_suffix(".json").write_text(json.dumps({"caption": caption}))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eleven square, four wide pictures and a tall one."""
    for i in range(11):
        write(tmp_path, f"a/{i:02}.jpg", 64 + i, 64 + i, f"square {i}", i)
    for i in range(4):
        write(tmp_path, f"b/{i}.png", 40, 80 + i, f"wide {i}", i)
    write(tmp_path, "c/d/tall.webp", 200, 100, "tall")
    return tmp_path


def data_of(folder: Path, buckets: Buckets = SMALL) -> FolderData:
    return into_buckets(index_folder(folder), buckets)


def take(data: FolderData, number: int, start: Position | None = None, **values: int):
    return list(islice(batches(data, LoaderSettings(**{"num_workers": 0, **values}), start), number))


def names(taken) -> list[list[str]]:
    return [batch.names for batch, _ in taken]


# --- buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: f"{case['height']}x{case['width']}")
def test_buckets_agree_with_the_reference(case):
    bucket = PUBLISHED.nearest(case["height"], case["width"])
    assert bucket == tuple(case["bucket"])
    assert min(cover_size(case["height"], case["width"], bucket)) == case["resize_short_side"]


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_every_size_has_a_bucket_of_the_nearest_ratio_which_its_resized_picture_covers(height, width):
    bucket = PUBLISHED.nearest(height, width)
    by_ratio = dict(PUBLISHED.by_ratio)
    ratios = sorted(by_ratio, key=lambda ratio: abs(ratio - width / height))
    assert bucket in by_ratio[ratios[0]] and not (bucket[0] % 32 or bucket[1] % 32)
    cover = cover_size(height, width, bucket)
    scale = max(Fraction(bucket[0], height), Fraction(bucket[1], width))
    assert all(side <= covered for side, covered in zip(bucket, cover, strict=True))
    assert cover[0] - 1 < height * scale <= cover[0] and cover[1] - 1 < width * scale <= cover[1]


def test_a_bucket_with_a_side_of_nothing_names_the_size_to_choose():
    with pytest.raises(ValueError, match="image_size 64 is too small .* choose at least 79"):
        make_buckets((128, 64), ("1/1", "1/6"))
    assert make_buckets(79, ("1/6",)).nearest(9, 1)[1] == 32


def test_counts_are_drawn_a_row_per_bucket():
    one, three = (
        draw_counts(dict.fromkeys(sizes, 2)).height for sizes in ([(32, 64)], [(1, 2), (2, 1), (2, 2)])
    )
    assert three > one and draw_counts({}).height < one


# --- layouts, captions, broken files --------------------------------------------------------------


def captions(folder: Path, **values: object) -> dict[str, str]:
    return {sample.name: sample.caption for sample in index_folder(folder, **values).samples}


def reasons(folder: Path, **values: object) -> dict[str, str]:
    return {entry.name: entry.reason for entry in index_folder(folder, max_broken=1, **values).broken}


def put(folder: Path, pictures: Sequence[str], files: Mapping[str, str | bytes]) -> Path:
    """A folder with these pictures and other files."""
    for name in pictures:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(9, 9).save(folder / name)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_published_layout_is_searched_through(tmp_path):
    write(tmp_path, "one/a.jpg", 30, 40, "ä cat")
    write(tmp_path, "one/two/B.PNG", 30, 40)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.jpg").write_bytes(b"")
    (tmp_path / "._a.jpg").write_bytes(b"")
    assert captions(tmp_path) == {"one/a.jpg": "ä cat", "one/two/B.PNG": "a wave"}


BESIDE = {  # of 0.jpg, the files beside it; its caption is always "a boat"
    "text": {"0.txt": b"\xef\xbb\xbfa boat\r\n"},
    "caption": {"0.caption": "a boat"},
    "letter case": {"0.TXT": "a boat"},
    "json in capitals": {"0.Json": '{"text": "a boat"}'},
    "whole name": {"0.jpg.json": '{"caption": "a boat"}'},
    "UTF-16": {"0.txt": "a boat".encode("utf-16")},
    "UTF-16 without a mark": {"0.txt": "a boat".encode("utf-16-le")},
    "json in UTF-16": {"0.json": '{"caption": "a boat"}'.encode("utf-16")},
    "json of other things": {"0.json": '{"url": "https://a.b/0.jpg", "tags": []}', "0.txt": "a boat"},
    "null": {"0.json": '{"caption": null}', "0.txt": "a boat"},
    "blank, then text": {"0.json": '{"caption": " ", "text": "a boat"}'},
    "no JSON": {"0.json": "{", "0.txt": "a boat"},
    "empty text": {"0.txt": "\r\n", "0.caption": "a boat"},
    "metadata": {"0.txt": "", "metadata.jsonl": '{"file_name": "0.jpg", "text": "a boat"}'},
}


@pytest.mark.parametrize("files", BESIDE.values(), ids=BESIDE)
def test_captions_are_found_beside_pictures(tmp_path, files):
    assert captions(put(tmp_path, ["0.jpg"], files)) == {"0.jpg": "a boat"}


UNUSABLE = {  # the files beside 0.jpg, and the reason
    "none": ({}, "it has no caption: no .json, .txt or .caption beside it"),
    "null": ({"0.json": '{"caption": null}'}, "it has no caption: its .json has no text under 'caption'"),
    "other keys": ({"0.json": '{"prompt": "a", "n": 1}'}, "under 'caption' or 'text', but under 'prompt'$"),
    "unseen": ({"0.txt": "\u200b \ufeff"}, "it has no caption: its .txt is empty"),
    "blank": ({"0.txt": " \r\n", "0.json": "{}"}, "it has no caption: .*'text'; its .txt is empty"),
    "a number": ({"0.json": '{"caption": 3}'}, "the caption is not text but 3"),
    "a list": ({"0.json": '{"caption": ["a", "b"]}'}, r"the caption is not text but \['a', 'b'\]"),
    "a list of objects": ({"0.json": '[{"caption": "a"}]'}, "the caption's JSON is not an object"),
    "Latin-1": ({"0.txt": b"\xe9t\xe9"}, "the text is not UTF-8"),
    "metadata": ({"metadata.csv": "file_name,prompt\n0.jpg,a\n"}, "its metadata.csv:2 has no .*'prompt'"),
}


@pytest.mark.parametrize("files, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_a_picture_without_a_usable_caption_is_broken(tmp_path, files, reason):
    assert re.search(reason, reasons(put(tmp_path, ["0.jpg"], files))["0.jpg"])
    assert captions(tmp_path, caption="a boat") == {"0.jpg": "a boat"}
    if "it has no caption" in reason:
        assert captions(tmp_path, empty_captions=True) == {"0.jpg": " "}
        with pytest.raises(ValueError, match="1 of 1 pictures .*tmp_prompt=.* empty_captions=true"):
            index_folder(tmp_path)


def test_each_picture_has_the_caption_that_is_named_most_like_it(tmp_path):
    files = {"a.txt": "lower", "A.TXT": "upper", "B.txt": "b", "c.txt": "c", "é.txt": "composed"}
    put(tmp_path, ["A.JPG", "a.jpg", "a.png", "b.jpg", "c.jpg", "C.jpg", "e\u0301.jpg"], files)
    found = {"A.JPG": "upper", "a.jpg": "lower", "a.png": "lower", "b.jpg": "b", "c.jpg": "c"}
    assert captions(tmp_path, max_broken=0.5) == {**found, "e\u0301.jpg": "composed"}
    assert list(reasons(tmp_path)) == ["C.jpg"]  # c.txt is of c.jpg


def test_half_a_surrogate_pair_cannot_stop_a_training(tmp_path):
    put(tmp_path, ["0.jpg"], {"0.json": '{"caption": "a \\ud83d boat \\ud83d\\udea2"}'})
    assert captions(tmp_path) == {"0.jpg": "a \ufffd boat \U0001f6a2"}


def test_imagefolder_with_metadata(tmp_path):
    lines = ['{"file_name": "a.jpg", "text": "first"}', '{"file_name": "y/b.jpg", "caption": "second"}', ""]
    lines += ['{"file_name": "c.jpg", "text": null}', '{"file_name": "gone.jpg", "text": "-"}', "{", "[]"]
    lines += ['{"text": "-"}', '{"file_name": "a.jpg", "text": "other"}', lines[1]]
    pictures = ("x/a.jpg", "x/y/b.jpg", "x/c.jpg", "x/d.jpg")
    put(tmp_path, pictures, {"x/metadata.jsonl": "\n".join(lines)})
    assert captions(tmp_path, max_broken=0.9) == {"x/a.jpg": "first", "x/y/b.jpg": "second"}
    broken = reasons(tmp_path)
    assert sorted(broken) == ["x/c.jpg", "x/d.jpg"] + [f"x/metadata.jsonl:{i}" for i in (5, 6, 7, 8, 9)]
    assert "no caption" in broken["x/d.jpg"] and "gone.jpg does not exist" in broken["x/metadata.jsonl:5"]
    assert "a.jpg has another caption in x/metadata.jsonl:1" in broken["x/metadata.jsonl:9"]


LISTED = {  # the picture on the disk, and its name in metadata.jsonl
    "Windows": ("images/a.jpg", "images\\a.jpg"),
    "a dot": ("images/a.jpg", ".\\images\\a.jpg"),
    "absolute": ("images/a.jpg", "{folder}/images/a.jpg"),
    "absolute of another machine": ("images/a.jpg", "C:\\Users\\me\\set\\images\\a.jpg"),
    "composed": ("e\u0301.jpg", "é.jpg"),
    "decomposed": ("é.jpg", "e\u0301.jpg"),
    "letter case": ("images/a.jpg", "Images/A.JPG"),
    "escaped": ("my house.jpg", "my%20house.jpg"),
    "a backslash of its own": ("a\\b.jpg", "a\\b.jpg"),
}


@pytest.mark.parametrize("name, listed", LISTED.values(), ids=LISTED)
def test_metadata_of_other_systems(tmp_path, name, listed):
    line = json.dumps({"file_name": listed.format(folder=tmp_path), "text": "a boat"}, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        put(tmp_path, [name], {"metadata.jsonl": (line + "\r\n").encode(encoding)})
        assert captions(tmp_path) == {name: "a boat"}


def test_a_name_in_metadata_that_may_be_two_pictures_is_not_guessed(tmp_path):
    put(tmp_path, ["a.jpg", "A.jpg"], {"metadata.jsonl": '{"file_name": "a.JPG", "text": "a boat"}'})
    assert reasons(tmp_path)["metadata.jsonl:1"] == "a.JPG may be A.jpg or a.jpg"


TABLES = {
    "plain": "file_name,text\na.jpg,a boat\n",
    "mark": "\ufefffile_name,text\na.jpg,a boat\n",
    "semicolons": "file_name;n;text\r\na.jpg;1;a boat\r\n",
    "tabs": "file_name\ttext\na.jpg\ta boat\n",
    "quoted": '"file_name";"caption"\r\n".\\a.jpg";"a boat"\r\n',
    "spaces": "file_name , text\na.jpg , a boat\n",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_metadata_as_a_table(tmp_path, table):
    assert captions(put(tmp_path, ["a.jpg"], {"metadata.csv": table})) == {"a.jpg": "a boat"}


def test_a_table_keeps_quotes_and_lines_and_names_what_is_wrong(tmp_path):
    table = 'file_name,text\na.jpg,"a ""big"", red\nboat"\n'
    assert captions(put(tmp_path, ["a.jpg"], {"metadata.csv": table})) == {"a.jpg": 'a "big", red\nboat'}
    put(tmp_path, [], {"metadata.csv": "a.jpg,a boat\n"})
    assert "no column file_name" in reasons(tmp_path)["metadata.csv:1"]
    put(tmp_path, [], {"metadata.csv": "file_name,text\na.jpg,\xe9t\xe9\n".encode("latin-1")})
    assert "not UTF-8" in reasons(tmp_path)["metadata.csv"]


def test_what_is_left_out_is_counted(tmp_path, caplog):
    others = ("b.heic", "c.heic", "0.npz", "README.txt", "x.pdf", "0-masklabel.png", ".DS_Store", "Thumbs.db")
    hidden = ("__MACOSX/0.jpg", "@eaDir/0.jpg/THUMB.jpg", ".cache/0.jpg")
    put(tmp_path, ["0.jpg"], dict.fromkeys((*others, *hidden), b"-") | {"0.txt": "a boat", "0.json": "{}"})
    index = index_folder(tmp_path)
    assert [sample.name for sample in index.samples] == ["0.jpg"] and not index.broken
    assert "left out: 2 .heic, 1 .db, 1 .npz, 1 .pdf, 1 .png, 1 .txt, 1 hidden" in caplog.text
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(ValueError, match="holds no picture in a format that is read; it holds 2 .heic, "):
        index_folder(tmp_path)


SUFFIXES = {".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".gif": "GIF"}


def test_every_format_is_read(tmp_path):
    for suffix, format in SUFFIXES.items():
        picture(9, 9).save(tmp_path / f"a{suffix}", format)
    assert sorted(captions(tmp_path, caption="a boat")) == sorted(f"a{suffix}" for suffix in SUFFIXES)


def test_names_that_are_not_utf8_are_read(tmp_path):
    try:
        put(tmp_path, ["\udcff.jpg"], {"\udcff.txt": "a boat"})
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    assert captions(tmp_path) == {"\udcff.jpg": "a boat"}


def test_what_is_broken_is_skipped_and_named_with_its_reason(tmp_path, caplog):
    for i in range(30):
        write(tmp_path, f"{i}.jpg", 20, 20)
    (tmp_path / "1.json").write_text("{broken")
    (tmp_path / "2.json").write_text('{"caption": 3}')
    (tmp_path / "3.json").write_bytes(b'{"caption": "\xff"}')
    (tmp_path / "4.json").unlink()
    (tmp_path / "5.jpg").write_bytes(b"")
    (tmp_path / "6.jpg").write_text("<html>")
    (tmp_path / "7.json").write_text("[" * 100000)
    index = index_folder(tmp_path, max_broken=0.25)
    assert [entry.name for entry in index.broken] == [f"{i}.jpg" for i in range(1, 8)]
    assert len(index.samples) == 23
    assert all(f"skipped {i}.jpg: " in caplog.text for i in range(1, 8))
    assert str(tmp_path) not in caplog.text
    with pytest.raises(ValueError, match="7 of 30 pictures cannot be used, more than the share of 0.2 "):
        index_folder(tmp_path, max_broken=0.2)


def test_folders_without_anything_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        index_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no picture"):
        index_folder(tmp_path)


def test_links_that_go_in_circles_end(tmp_path):
    write(tmp_path, "a/1.jpg", 9, 9)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert list(captions(tmp_path)) == ["a/1.jpg"]


def test_a_picture_of_too_many_pixels_is_refused_unread(tmp_path):
    header = bytearray(encoded(picture(8, 8), "PNG"))
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match="bomb.png: the picture has more than 268435456 pixels"):
        header_size(NamedBytes(bytes(header), "bomb.png"))


# --- decoding -------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixels_of(content: bytes, bucket: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return decode(NamedBytes(content, "it"), bucket, np.random.default_rng(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(0, 5))
def test_decoding_is_a_crop_of_the_antialiased_picture(height, width, seed):
    image = picture(height, width)
    bucket = SMALL.nearest(height, width)
    pixels = pixels_of(encoded(image, "PNG"), bucket, seed)
    assert pixels.shape == (3, *bucket) and pixels.dtype == torch.uint8
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    whole = resize(whole, list(cover_size(height, width, bucket)), antialias=True).int()
    crops = whole.unfold(1, bucket[0], 1).unfold(2, bucket[1], 1)  # (3, rooms, rooms, H, W)
    assert (crops - pixels.int()[:, None, None]).abs().amax((0, 3, 4)).min() <= 1


def test_crops_vary_with_the_generator_and_repeat_with_its_seed():
    content = encoded(picture(64, 150), "PNG")
    crops = [pixels_of(content, (64, 64), seed) for seed in range(8)]
    assert torch.equal(crops[3], pixels_of(content, (64, 64), 3))
    assert len({crop.numpy().tobytes() for crop in crops}) > 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_size_and_pixels(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored, upright = picture(600, 1200), (1200, 600) if orientation >= 5 else (600, 1200)
    content = encoded(stored, "JPEG", exif=exif, quality=95)
    assert header_size(NamedBytes(content, "it")) == upright
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's Transpose for each
    expected = stored.transpose(Image.Transpose(turn[orientation])) if orientation > 1 else stored
    bucket = (upright[0] // 8, upright[1] // 8)  # read at reduced scale
    expected = torch.from_numpy(np.array(expected.resize(bucket[::-1], Image.Resampling.BILINEAR)))
    assert (pixels_of(content, bucket).int() - expected.permute(2, 0, 1).int()).abs().max() < 12


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_turned_upright(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(32, 64), format, exif=exif)
    assert header_size(NamedBytes(content, "it")) == (64, 32)
    expected = np.array(picture(32, 64).transpose(Image.Transpose.ROTATE_270)).transpose(2, 0, 1)
    assert (pixels_of(content, (64, 32)).int() - torch.from_numpy(expected).int()).abs().float().mean() < 3


def test_large_jpegs_are_read_at_reduced_scale(monkeypatch):
    content, sizes = encoded(picture(1600, 1200), "JPEG"), []
    plain = Image.Image.resize

    def noted(self, *arguments, **values):
        sizes.append(self.size)
        return plain(self, *arguments, **values)

    monkeypatch.setattr(Image.Image, "resize", noted)
    for bucket in ((128, 96), (1024, 768), (1600, 1200)):
        pixels_of(content, bucket)
    assert sizes == [(150, 200), (1200, 1600), (1200, 1600)]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_any_mode_becomes_rgb(mode):
    image = picture(70, 70).convert("L").convert("I;16") if mode == "I;16" else picture(70, 70).convert(mode)
    assert pixels_of(encoded(image, "TIFF"), (64, 64)).shape == (3, 64, 64)


def test_a_sliver_is_cropped_without_being_blown_up_whole():
    assert pixels_of(encoded(picture(2, 9000), "PNG"), (64, 64)).shape == (3, 64, 64)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "QOI"])
def test_damaged_files_raise_one_sentence_of_a_known_kind(format):
    content, rng = encoded(picture(50, 60), format), random.Random(format)
    with pytest.raises(ValueError, match="it: "):
        pixels_of(content[: len(content) // 2], (32, 32))
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 12)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            header_size(NamedBytes(bytes(damaged), "it"))
            pixels_of(bytes(damaged), (32, 32))
        except ValueError as error:
            assert str(error).startswith("it: ")
    assert MemoryError not in DAMAGED


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_has_one_shape_and_its_captions(folder):
    taken = take(data_of(folder), 12, batch_size=2)
    for batch, _ in taken:
        assert batch.images.dtype == torch.float32 and 0 <= batch.images.min() <= batch.images.max() <= 1
        assert batch.images.shape in {(2, 3, 64, 64), (2, 3, 32, 64), (2, 3, 64, 32)}
        kinds = {"a": "square", "b": "wide", "c": "tall"}
        assert all(kinds[n[0]] in c for n, c in zip(batch.names, batch.captions, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 40])
def test_every_epoch_shows_every_picture_and_thin_buckets_never_hang(folder, batch_size, caplog):
    data = data_of(folder)
    per_epoch = sum(-(-count // batch_size) for count in (11, 4, 1))
    taken = take(data, 2 * per_epoch, batch_size=batch_size)
    for epoch in (taken[:per_epoch], taken[per_epoch:]):
        assert {name for batch in names(epoch) for name in batch} == {s.name for s in data.index.samples}
        assert all(len(batch) == batch_size for batch in names(epoch))
    assert taken[per_epoch - 1][1] == Position(1) and taken[-1][1] == Position(2)
    assert batch_size == 40 or names(taken[:per_epoch]) != names(taken[per_epoch:])
    assert ("64 x 32 (1)" in caplog.text) == (batch_size > 1)
    assert len(thin_buckets(data, batch_size)) == sum(count < batch_size for count in (11, 4, 1))


def test_two_ranks_together_see_the_batches_of_one_with_twice_the_batch(folder):
    data = data_of(folder)
    whole = take(data, 15, batch_size=4, seed=3)
    halves = [take(data, 15, batch_size=2, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for (full, after), (first, after_first), (second, _) in zip(whole, *halves, strict=True):
        assert full.names == first.names + second.names and after == after_first
        assert torch.equal(full.images, torch.cat((first.images, second.images)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_the_same_batches(folder, num_workers):
    data = data_of(folder)
    whole = take(data, 14, batch_size=2, seed=1)
    for done in (1, 5, 9, 10):
        rest = take(data, 14 - done, whole[done - 1][1], batch_size=2, seed=1, num_workers=num_workers)
        assert [after for _, after in rest] == [after for _, after in whole[done:]]
        for (a, _), (b, _) in zip(rest, whole[done:], strict=True):
            assert a.names == b.names and torch.equal(a.images, b.images)
        if num_workers:
            break


def test_the_order_depends_on_the_seed_and_no_global_random_state(folder):
    data = data_of(folder)
    before = torch.get_rng_state()
    first = names(take(data, 9, batch_size=2, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    assert first == names(take(data, 9, batch_size=2, seed=1)) != names(take(data, 9, batch_size=2, seed=2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_picture_is_skipped_by_name_and_its_batch_stays_full(folder, num_workers, caplog):
    path = folder / "a" / "05.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    taken = take(data_of(folder), 20, batch_size=2, num_workers=num_workers)
    assert all(len(batch.images) == 2 for batch, _ in taken)
    assert "a/05.jpg" not in {name for batch in names(taken) for name in batch}
    assert caplog.text.count("skipped a/05.jpg: the picture is damaged") == 1


def test_a_bucket_that_cannot_be_read_is_left_out_and_too_many_stop(folder):
    tall = folder / "c" / "d" / "tall.webp"
    tall.write_bytes(tall.read_bytes()[:200])
    data = data_of(folder)
    taken = take(data, 18, batch_size=2)
    assert {batch.images.shape[-2:] for batch, _ in taken} == {(64, 64), (32, 64)}
    with pytest.raises(ValueError, match="1 of 16 pictures cannot be used"):
        list(islice(batches(data, LoaderSettings(2, num_workers=2, max_broken=0.05)), 18))


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"num_workers": -1}, {"max_broken": 1.0}])
def test_settings_are_checked(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        LoaderSettings(**{"batch_size": 1, **values})


# --- check_data -----------------------------------------------------------------------------------


def check_data(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "train/check_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_check_data_reports_the_example(tmp_path):
    done = check_data(EXAMPLE, "image_size=[256,512]", "--output", tmp_path, "--decode")
    assert done.returncode == 0, done.stderr
    assert "12 pictures, 0 broken" in done.stdout and "512 x 512" in done.stdout and "thin" in done.stdout
    assert Image.open(tmp_path / "buckets.png").width > 500
    assert (tmp_path / "broken.txt").read_text() == ""
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*")) < 1e6


@pytest.fixture
def script(monkeypatch):
    """check_data's module, to be run here: starting Python anew takes seconds."""
    monkeypatch.syspath_prepend(str(ROOT / "train"))
    monkeypatch.chdir(ROOT)
    yield importlib.import_module("check_data")


def run_here(script, monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check_data", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        run(script.main)
    return done.value.code


def test_check_data_names_what_is_broken(folder, tmp_path_factory, script, monkeypatch, capsys):
    (folder / "a" / "03.json").write_text("no")
    path = folder / "a" / "05.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    output = tmp_path_factory.mktemp("out")
    values = ("image_size=64", "multi_aspect_ratio=[1/1,1/2]")
    assert run_here(script, monkeypatch, folder, *values, "--output", output) == 0
    assert run_here(script, monkeypatch, folder, *values, "--output", output, "--decode") == 2  # above 10 %
    printed = capsys.readouterr()
    assert printed.out.count("broken: a/03.jpg: the caption is not JSON") == 2
    assert printed.out.count("broken: a/05.jpg: the picture is damaged") == 1
    assert printed.err.count("\n") == 1 and "2 of 16 pictures cannot be used" in printed.err
    lines = (output / "broken.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["a/03.jpg", "a/05.jpg"]


def test_check_data_reads_shards(folder, tmp_path, script, monkeypatch, capsys):
    with tarfile.open(tmp_path / "it.tar", "w") as archive:
        for path in sorted((folder / "a").iterdir(), key=lambda path: path.stem):
            archive.add(path, path.name)
    output = ("--output", tmp_path / "out")
    assert run_here(script, monkeypatch, tmp_path / "it.tar", "image_size=128", *output) == 0
    assert "11 pictures, 0 broken" in capsys.readouterr().out


def test_check_data_tells_of_a_bad_output_before_it_looks(folder, script, monkeypatch, capsys):
    output = folder / "here.txt"
    output.write_text("")
    assert run_here(script, monkeypatch, folder, "image_size=128", "--output", output) == 2
    told = capsys.readouterr()
    assert not told.out and "here.txt cannot be the output folder: a file is in its place" in told.err


def test_check_data_prints_any_name_on_any_output(tmp_path, script, monkeypatch, capfd):
    put(tmp_path / "in", ["家.jpg", "a.jpg"], {"a.txt": "a boat", "b.heic": b"-"})
    with tarfile.open(tmp_path / "it.tar", "w") as archive:
        archive.add(tmp_path / "in" / "a.jpg", "\udcff.jpg")
        archive.add(tmp_path / "in" / "a.txt", "b.txt")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "ascii"))
    for name in ("in", "it.tar"):
        output = tmp_path / name.replace(".", "_")
        assert run_here(script, monkeypatch, tmp_path / name, "image_size=128", "--output", output) == 2
    sys.stdout.flush()
    printed = capfd.readouterr().out
    assert "broken: \\u5bb6.jpg: it has no caption" in printed and "1 .heic" in printed
    assert "broken: it.tar/\\udcff.jpg: it has no caption" in printed and "1 .txt" in printed
    assert (tmp_path / "it_tar" / "broken.txt").read_text().startswith("it.tar/\\udcff.jpg: ")


def test_check_data_obeys_the_configuration(tmp_path, script, monkeypatch, capsys):
    folder = put(tmp_path / "in", ["a.jpg", "b.jpg"], {"a.txt": "a boat"})
    for values, code in (
        ([], 2),
        (["max_broken=0.5"], 0),
        (["empty_captions=true"], 0),
        (["tmp_prompt=x"], 0),
    ):
        assert run_here(script, monkeypatch, folder, *values, "--output", tmp_path / "out") == code
    printed = capsys.readouterr().out
    assert "captions that are empty: 1" in printed and "formats: 2 .jpg" in printed


@pytest.mark.parametrize("path, said", [("none", "does not exist"), (".", "holds no picture")])
def test_check_data_ends_with_one_sentence_on_bad_input(tmp_path, script, monkeypatch, capsys, path, said):
    assert run_here(script, monkeypatch, tmp_path / path, "--output", tmp_path) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and said in printed
