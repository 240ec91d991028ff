"""Training data from tar shards: splitting, buckets, captions, broken members, resuming."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from shutil import which
from threading import Thread

import pytest
import torch
from PIL import Image

from core.data.buckets import make_buckets
from core.data.folder import Broken
from core.data.loader import LoaderSettings, Position
from core.data.shards import ShardData, is_shards, open_shards, samples, shard_batches

BUCKETS = make_buckets(32, ("1/1",))
TWO = make_buckets(64, ("1/1", "1/2"))


def jpeg(number: int, height: int = 40, width: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (number * 37 % 256, number * 11 % 256, 90)).save(stream, "JPEG")
    return stream.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def members(numbers: range, height: int = 40, width: int = 40) -> dict[str, bytes]:
    """Pictures with captions, the odd ones as text."""
    found = {}
    for i in numbers:
        found[f"{i:04}.v1.jpg"] = jpeg(i, height, width)
        caption = f"number {i}"
        content = caption if i % 2 else json.dumps({"caption": caption})
        found[f"{i:04}.v1.{'txt' if i % 2 else 'json'}"] = content.encode()
    return found


@pytest.fixture
def shards(tmp_path) -> str:
    """Six shards of seven pictures."""
    for shard in range(6):
        write_shard(tmp_path / f"part-{shard}.tar", members(range(7 * shard, 7 * shard + 7)))
    return str(tmp_path / "part-{0..5}.tar")


def take(data: ShardData, number: int, start: Position | None = None, **values: int):
    settings = LoaderSettings(**{"batch_size": 1, "num_workers": 0, **values})
    return list(islice(shard_batches(data, settings, start), number))


def captions(taken) -> list[list[str]]:
    return [batch.captions for batch, _ in taken]


def test_paths_are_told_from_folders(tmp_path, shards):
    assert is_shards(shards) and is_shards(str(tmp_path)) and is_shards("https://a.b/{0..3}")
    assert not is_shards(str(tmp_path / "none"))
    for path in (shards, str(tmp_path), str(tmp_path / "part-*.tar")):
        assert [Path(url).name for url in open_shards(path, BUCKETS).urls] == [
            f"part-{i}.tar" for i in range(6)
        ]
    with pytest.raises(FileNotFoundError, match="part-6.tar: this shard does not exist"):
        open_shards(str(tmp_path / "part-{0..6}.tar"), BUCKETS)
    with pytest.raises(FileNotFoundError, match="none"):
        open_shards(str(tmp_path / "none*.tar"), BUCKETS)


def test_folders_of_shards_are_told_from_folders_of_pictures(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", members(range(3)))
    for name in (".cache/x.jpg", "preview.jpg", "a/README.md", "a/b/._0.tar", "00000.parquet"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(0))
    assert is_shards(str(tmp_path))
    data = open_shards(str(tmp_path), BUCKETS)
    assert data.urls == (str(folder / "0.tar"),) == open_shards(f"{tmp_path}/**/*.tar", BUCKETS).urls
    assert data.left_out == {".jpg": 1, ".md": 1, ".parquet": 1, "hidden": 1}
    for i in range(20):  # the archive is no longer twice as large
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    assert is_shards(str(tmp_path)) and not is_shards(str(tmp_path), captions=False)
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("a boat")
    assert not is_shards(str(tmp_path))


@pytest.mark.parametrize("count", [6, 1])
def test_parts_of_an_epoch_hold_every_sample_once(tmp_path, shards, count):
    data = ShardData(shards, open_shards(shards, BUCKETS).urls[:count], BUCKETS)
    for epoch in (0, 1):
        parts = [[s.caption for s in samples(data, epoch, 0, part, 4)] for part in range(4)]
        together = [caption for part in parts for caption in part]
        assert sorted(together) == sorted(f"number {i}" for i in range(7 * count))
        assert together != sorted(together)


def test_two_ranks_with_two_workers_lose_and_repeat_nothing(tmp_path):
    for shard in range(8):
        write_shard(tmp_path / f"{shard}.tar", members(range(6 * shard, 6 * shard + 6)))
    data = open_shards(str(tmp_path), BUCKETS)
    seen = Counter()
    for rank in (0, 1):
        # A worker passes over 2 shards of 6 pictures: 6 batches of 2, from the workers in turn.
        for batch in captions(take(data, 12, batch_size=2, rank=rank, world_size=2, num_workers=2)):
            seen.update(batch)
    assert seen == Counter(f"number {i}" for i in range(48))


def test_buckets_fill_in_a_stream_and_their_rests_are_completed(tmp_path, caplog):
    write_shard(tmp_path / "a.tar", {**members(range(5)), **members(range(10, 11), 40, 80)})
    data = open_shards(str(tmp_path), TWO)
    taken = take(data, 8, batch_size=3)
    for some in (taken[:3], taken[3:6]):  # 5 square pictures make two batches, one wide picture one
        assert sorted(batch.images.shape[-2:] for batch, _ in some) == [(32, 64), (64, 64), (64, 64)]
        assert {c for batch, _ in some for c in batch.captions} == {
            f"number {i}" for i in (0, 1, 2, 3, 4, 10)
        }
    assert ["number 10"] * 3 in captions(taken)
    assert caplog.text.count("repeats them: 32 x 64 (1)") == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_the_same_batches(shards, num_workers):
    data = open_shards(shards, BUCKETS)
    values = {"batch_size": 2, "num_workers": num_workers, "seed": 4, "rank": 1, "world_size": 2}
    whole = take(data, 30, **values)
    assert whole[-1][1] == Position(0, 30)
    for done in (1, 17) if num_workers else (1, 8, 12, 25):
        rest = take(data, 30 - done, whole[done - 1][1], **values)
        for (a, after_a), (b, after_b) in zip(rest, whole[done:], strict=True):
            assert a.names == b.names and torch.equal(a.images, b.images) and after_a == after_b


def test_broken_members_are_skipped_by_name(tmp_path, caplog):
    content = members(range(20))
    content["0003.v1.jpg"] = b"no picture"
    content["0004.v1.json"] = b"{"
    del content["0006.v1.json"]
    del content["0008.v1.jpg"]
    write_shard(tmp_path / "a.tar", content)
    data = open_shards(str(tmp_path), BUCKETS)
    settings = LoaderSettings(1, num_workers=0, max_broken=0.5)
    seen = {c for batch, _ in islice(shard_batches(data, settings), 33) for c in batch.captions}
    assert seen == {f"number {i}" for i in range(20) if i not in (3, 4, 6, 8)}
    for name in (
        "0003.v1.jpg: this file is not",
        "0004.v1.jpg: the caption is not JSON",
        "0006.v1.jpg: it has no",
    ):
        assert caplog.text.count(f"skipped a.tar/{name}") == 1
    assert caplog.text.count(f"{tmp_path}: left out: 1 .v1.json") == 1  # of 0008
    with pytest.raises(ValueError, match="3 of 19 pictures cannot be used"):
        take(data, 40)


def found_in(path: Path, content: Mapping[str, bytes], **values: object) -> tuple[set[str], str, dict]:
    """Captions, reasons and what is left out of a shard."""
    path.parent.mkdir(exist_ok=True)
    write_shard(path, content)
    entries = list(samples(replace(open_shards(str(path), BUCKETS), **values), 0, 0, 0, 1))
    left_out = next((entry.counts for entry in entries if hasattr(entry, "counts")), {})
    broken = [f"{entry.name}: {entry.reason}" for entry in entries if isinstance(entry, Broken)]
    return {entry.caption for entry in entries if hasattr(entry, "caption")}, "; ".join(broken), left_out


PICTURE, FORK = jpeg(1), b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(144)
OTHERS = {  # the files of a sample whose caption is "a boat", and what is left out
    "AppleDouble": ({"._0.jpg": FORK, "0.jpg": PICTURE, "._0.txt": FORK, "0.txt": b"a boat"}, {"hidden": 2}),
    "other modalities": (
        {"0.jpg": PICTURE, "0.depth.png": b"-", "0.txt": b"a boat", "0.clip.npy": b"1"},
        {".depth.png": 1, ".clip.npy": 1},
    ),
    "double suffixes": ({"0.input.jpg": PICTURE, "0.caption.txt": b"a boat"}, {}),
    "any one text": ({"0.image.jpg": PICTURE, "0.prompt.txt": b"a boat"}, {}),
    "other texts": ({"0.jpg": PICTURE, "0.tags.txt": b"tags", "0.text.txt": b"a boat"}, {}),
    "json of other things": ({"0.jpg": PICTURE, "0.json": b'{"url": "-"}', "0.txt": b"a boat"}, {}),
    "other files": (
        {"README.md": b"-", ".DS_Store": b"-", "info.json": b"{}", "0.jpg": PICTURE, "0.txt": b"a boat"},
        {".md": 1, "hidden": 1, ".json": 1},
    ),
    "folders": ({"./v1.0/0.jpg": PICTURE, "v1.0/0.txt": b"a boat", "__MACOSX/1.jpg": FORK}, {"hidden": 1}),
    "Windows": ({"x\\0.JPG": PICTURE, "x\\0.TXT": b"a boat"}, {}),
    "two formats": ({"0.png": b"-", "0.jpg": PICTURE, "0.caption": b"a boat"}, {".png": 1}),
    "a format that is not read": (
        {"0.jpg": PICTURE, "0.txt": b"a boat", "1.heic": b"-", "1.txt": b"-"},
        {".heic": 1, ".txt": 1},
    ),
    "not UTF-8": ({"\udcff.jpg": PICTURE, "\udcff.txt": b"a boat"}, {}),
}


@pytest.mark.parametrize("content, left_out", OTHERS.values(), ids=OTHERS)
def test_samples_are_found_among_other_members(tmp_path, content, left_out):
    assert found_in(tmp_path / "in" / "0.tar", content) == ({"a boat"}, "", left_out)
    data = open_shards(str(tmp_path / "in"), BUCKETS)
    assert captions(take(data, 2, batch_size=1)) == [["a boat"]] * 2


def test_captions_of_shards_can_be_given_or_missing(tmp_path):
    content = {"0.jpg": PICTURE, "0.json": b"{}", "0.ocr.txt": b"-", "0.tags.txt": b"-"}
    found, broken, _ = found_in(tmp_path / "0.tar", content)
    assert not found and "0.tar/0.jpg: it has no caption" in broken and ".ocr.txt, .tags.txt" in broken
    assert found_in(tmp_path / "0.tar", content, empty_captions=True) == ({" "}, "", {})
    assert found_in(tmp_path / "0.tar", content, caption="a boat") == ({"a boat"}, "", {})


def test_shards_of_one_name_in_several_folders_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", members(range(2)))
    found = [entry.name for entry in samples(open_shards(str(tmp_path), BUCKETS), 0, 0, 0, 1)]
    assert sorted(found) == [f"{name}/0.tar/000{i}.v1.jpg" for name in "ab" for i in (0, 1)]


def test_a_sample_of_several_pictures_is_not_guessed(tmp_path):
    content = {"0.input.jpg": PICTURE, "0.target.jpg": PICTURE, "0.txt": b"a boat"}
    assert "several pictures, and none is the plain one" in found_in(tmp_path / "0.tar", content)[1]


def test_an_unsorted_shard_says_how_to_sort_it(tmp_path, caplog):
    pictures = {f"{i}.jpg": PICTURE for i in range(8)}
    texts = {f"{i}.txt": b"a boat" for i in range(8)}
    for content in ({**pictures, **texts}, {**texts, **pictures}):
        found, broken, _ = found_in(tmp_path / "0.tar", content)
        assert not found and broken.count("the shard is not sorted") == 1 and "sort | tar -cf" in broken
        with pytest.raises(ValueError, match="cannot be used.*the shard is not sorted .*sort [|] tar -cf"):
            take(open_shards(str(tmp_path / "0.tar"), BUCKETS), 1)
    found, broken, _ = found_in(tmp_path / "0.tar", dict(sorted({**pictures, **texts}.items())))
    assert found == {"a boat"} and not broken


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz", "TAR"])
def test_compressed_shards(tmp_path, suffix):
    write_shard(tmp_path / "0.tar", members(range(3)))
    content = (tmp_path / "0.tar").read_bytes()
    pack = {"z": gzip.compress, "2": bz2.compress, "R": bytes}.get(suffix[-1], gzip.compress)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"0.{suffix}").write_bytes((lzma.compress if suffix[-2:] == "xz" else pack)(content))
    assert is_shards(str(tmp_path / "in"))
    assert len(list(samples(open_shards(str(tmp_path / "in"), BUCKETS), 0, 0, 0, 1))) == 3


def test_empty_shards_are_counted_and_damaged_ones_named(tmp_path):
    assert found_in(tmp_path / "0.tar", {}) == (set(), "", {"shard without pictures": 1})
    write_shard(tmp_path / "0.tar", members(range(4)))
    content = bytearray((tmp_path / "0.tar").read_bytes())
    with tarfile.open(tmp_path / "0.tar") as archive:
        offset = archive.getmembers()[4].offset
    content[offset : offset + 512] = b"w" * 512  # which tarfile itself takes for the end
    for damaged in (b"", b"<html>" * 200, bytes(content), bytes(content[: offset + 600])):
        (tmp_path / "0.tar").write_bytes(damaged)
        entries = list(samples(open_shards(str(tmp_path / "0.tar"), BUCKETS), 0, 0, 0, 1))
        assert [entry.name for entry in entries if isinstance(entry, Broken)] == ["0.tar"]
        assert len(entries) == (3 if len(damaged) > 2000 else 1)


def test_a_truncated_picture_leaves_its_batch_full(tmp_path, caplog):
    content = members(range(12))
    content["0003.v1.jpg"] = content["0003.v1.jpg"][:-30]
    write_shard(tmp_path / "a.tar", content)
    taken = take(open_shards(str(tmp_path), BUCKETS), 24)
    assert "number 3" not in {c for batch in captions(taken) for c in batch}
    assert caplog.text.count("skipped a.tar/0003.v1.jpg: the picture is damaged") == 1


def test_a_truncated_shard_gives_what_it_has(shards, tmp_path):
    path = tmp_path / "part-0.tar"
    path.write_bytes(path.read_bytes()[:4000])
    entries = list(samples(open_shards(shards, BUCKETS), 0, 0, 0, 1))
    broken = [entry for entry in entries if isinstance(entry, Broken)]
    assert "part-0.tar" in {entry.name for entry in broken} and 35 < len(entries) < 44


def test_shards_without_any_picture_end_with_a_sentence(tmp_path):
    write_shard(tmp_path / "a.tar", {})
    with pytest.raises(ValueError, match="no picture in it can be used"):
        take(open_shards(str(tmp_path), BUCKETS), 1)
    write_shard(tmp_path / "a.tar", {"a.jpg": b"x", "a.txt": b"a"})
    with pytest.raises(ValueError, match="1 of 1 pictures cannot be used"):
        take(open_shards(str(tmp_path), BUCKETS), 1, num_workers=2)


@pytest.mark.skipif(which("curl") is None, reason="webdataset reads URLs through curl")
def test_shards_are_read_by_url(shards, tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/part-{{0..2}}.tar"
        found = list(samples(open_shards(url, BUCKETS), 0, 0, 0, 1))
        server.shutdown()
    assert sorted(entry.caption for entry in found) == sorted(f"number {i}" for i in range(21))
