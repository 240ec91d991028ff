"""Training data from tar shards: splitting, buckets, captions, broken members, resuming."""

import io
import json
import tarfile
from collections import Counter
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
    (tmp_path / "pictures").mkdir()
    assert not is_shards(str(tmp_path))  # a folder of folders, in which an archive was left


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
    seen = {c for batch, _ in islice(shard_batches(data, settings), 32) for c in batch.captions}
    assert seen == {f"number {i}" for i in range(20) if i not in (3, 4, 6, 8)}
    for name in (
        "0003.v1.jpg: this file is not",
        "0004.v1.jpg: the caption is not JSON",
        "0006.v1.jpg: it has no",
    ):
        assert caplog.text.count(f"skipped a.tar/{name}") == 1
    assert caplog.text.count("skipped a.tar/0008.v1: it has no picture") == 1
    with pytest.raises(ValueError, match="4 of 20 pictures cannot be used"):
        take(data, 40)


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
