import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from kit.data import images, lists, sources
from kit.data.images import decode
from kit.data.readers import Folder, Tars, open_reader
from kit.data.shards import pack, shrunk

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(80, 120), (120, 80), (40, 60), (39, 60), (41, 60), (40, 40), (200, 41)]


@pytest.fixture
def source(tmp_path):
    """Pictures of several sizes and kinds, two unreadable ones; their paths."""
    root = tmp_path / "root"
    paths = [f"train/ü/{n}.jpg" for n in range(len(SIZES))]
    (root / "train/ü").mkdir(parents=True)
    for n, (height, width) in enumerate(SIZES):
        noise = np.random.default_rng(n).integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(cv2.GaussianBlur(noise, (9, 9), 3))
        tags = Image.Exif()
        tags[0x0112] = 6 if n == 1 else 1
        image.save(root / paths[n], "PNG" if n == 2 else "JPEG", exif=tags, quality=95)
    (root / "train/cut.jpg").write_bytes((root / paths[0]).read_bytes()[:-99])
    paths.insert(3, "train/cut.jpg")
    paths.append("train/none.jpg")
    return root, paths


def good(paths):
    return [path for path in paths if "ü" in path]


def test_shards_hold_each_picture_shrunk_under_its_path(source, tmp_path):
    root, paths = source
    out = pack(Folder(root), paths, tmp_path / "out", side=40, quality=95, per_shard=3)
    assert out == tmp_path / "out"
    reader = open_reader(out)
    assert isinstance(reader, Tars)
    for path in good(paths):
        whole, packed = images.read(root / path), decode(reader.read(path), path)
        expected = shrunk(whole, 40)
        assert packed.shape == expected.shape
        assert min(packed.shape[:2]) == min(40, *whole.shape[:2])
        assert np.abs(packed.astype(int) - expected).mean() < 4
        assert Image.open(io.BytesIO(reader.read(path))).format == "JPEG"
    assert not reader.exists("train/cut.jpg") and not reader.exists("train/none.jpg")


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((600, 800), 512, (512, 683)),
        ((800, 600), 512, (683, 512)),
        ((512, 512), 512, (512, 512)),
        ((511, 9000), 512, (511, 9000)),
        ((1024, 1024), 512, (512, 512)),
        ((513, 5000), 512, (512, 4990)),
    ],
)
def test_the_shorter_side_shrinks_to_the_one_asked_for(size, side, expected):
    image = np.zeros((*size, 3), np.uint8)
    assert shrunk(image, side).shape == (*expected, 3)


def test_shrinking_averages_and_does_not_skip_pixels():
    image = np.indices((80, 120)).sum(0)[..., None].repeat(3, 2) % 2 * 200
    assert (shrunk(image.astype(np.uint8), 40) == 100).all()


def test_shards_are_plain_tars_in_the_lists_order(source, tmp_path):
    root, paths = source
    twice = paths + paths[:4]  # a list may hold an image under two labels
    out = pack(Folder(root), twice, tmp_path / "out", side=40, per_shard=4)
    found = sorted(out.glob("*.tar"))
    assert [path.name for path in found] == [f"shard_0000{n}.tar" for n in range(3)]
    held = []
    for path in found:
        with tarfile.open(path) as archive:
            assert len(archive.getnames()) <= 4
            held += archive.getnames()
    assert held == good(paths)


def test_unreadable_images_are_recorded_and_not_fatal(source, tmp_path):
    root, paths = source
    out = pack(Folder(root), paths, tmp_path / "out", side=40, per_shard=2)
    with (out / "unreadable.csv").open(newline="", encoding="utf-8") as table:
        assert list(csv.reader(table)) == [
            ["path", "reason"],
            ["train/cut.jpg", "train/cut.jpg: cut short"],
            [
                "train/none.jpg",
                f"{root / 'train/none.jpg'}: No such file or directory",
            ],
        ]
    out = pack(Folder(root), good(paths), tmp_path / "fine", side=40)
    assert (out / "unreadable.csv").read_text() == "path,reason\n"
    out = pack(Folder(root), ["train/cut.jpg"], tmp_path / "bad", side=40)
    assert not open_reader(out).exists("train/cut.jpg")


class Stops(Folder):
    """A reader that breaks off before an image."""

    def __init__(self, root, before):
        super().__init__(root)
        self.before = before

    def read(self, path):
        if path == self.before:
            raise KeyboardInterrupt
        return super().read(path)


def test_packing_goes_on_after_the_last_whole_shard(source, tmp_path):
    root, paths = source
    whole = pack(Folder(root), paths, tmp_path / "whole", side=40, per_shard=2)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack(Stops(root, paths[5]), paths, out, side=40, per_shard=2, workers=1)
    assert sorted(path.name for path in out.glob("*.tar")) == [
        "shard_00000.tar",
        "shard_00001.tar",
    ]
    assert not (out / "tar_index").exists()
    assert not list(out.glob(".*part"))
    for path in good(paths)[:3]:
        (root / path).unlink()  # of finished shards: not read again
    pack(Folder(root), paths, out, side=40, per_shard=2)
    names = ["unreadable.csv", "shards.json", *(p.name for p in whole.glob("*.tar"))]
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    pack(Folder(root), paths, out, side=40, per_shard=2)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def test_a_lost_shard_is_packed_again(source, tmp_path):
    root, paths = source
    out = pack(Folder(root), paths, tmp_path / "out", side=40, per_shard=2)
    lost = out / "shard_00002.tar"
    data = lost.read_bytes()
    lost.unlink()
    pack(Folder(root), paths, out, side=40, per_shard=2)
    assert lost.read_bytes() == data
    assert open_reader(out).read(good(paths)[-1])


def test_a_lower_quality_is_smaller_and_further_from_the_picture(source, tmp_path):
    root, paths = source
    size, error = [], []
    whole = shrunk(images.read(root / paths[0]), 40).astype(int)
    for quality in (20, 60, 95):
        out = pack(Folder(root), paths[:1], tmp_path / str(quality), 40, quality)
        data = open_reader(out).read(paths[0])
        size.append(len(data))
        error.append(np.abs(decode(data, "x") - whole).mean())
    assert size == sorted(size) and error == sorted(error, reverse=True)
    assert len(set(size)) == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_shards_do_not_depend_on_the_number_of_threads(source, tmp_path, workers):
    root, paths = source
    one = pack(Folder(root), paths, tmp_path / "one", side=40)
    many = pack(Folder(root), paths, tmp_path / "many", side=40, workers=workers)
    name = "shard_00000.tar"
    assert (one / name).read_bytes() == (many / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"side": 41}, "side"),
        ({"quality": 80}, "quality"),
        ({"per_shard": 3}, "per_shard"),
        ({"paths": ["train/cut.jpg"]}, "paths"),
    ],
)
def test_a_folder_with_other_shards_is_refused(source, tmp_path, changed, named):
    root, paths = source
    given = {"paths": paths, "out": tmp_path / "out", "side": 40, "per_shard": 2}
    pack(Folder(root), **given)
    with pytest.raises(ValueError) as error:
        pack(Folder(root), **given | changed)
    assert str(error.value) == (
        f"{tmp_path / 'out'} holds shards of other images or settings ({named} differs); "
        "give an empty folder"
    )


@pytest.mark.parametrize(
    "wrong", [{"side": 0}, {"quality": 0}, {"quality": 101}, {"per_shard": 0}]
)
def test_settings_out_of_range_are_refused(source, tmp_path, wrong):
    root, paths = source
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} "):
        pack(Folder(root), paths, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "a//b.jpg"]
)
def test_a_path_outside_the_folder_is_refused(source, tmp_path, path):
    with pytest.raises(ValueError, match="is not a path inside"):
        pack(Folder(source[0]), [path], tmp_path / "out")


def test_shards_can_be_packed_from_shards(source, tmp_path):
    root, paths = source
    one = pack(Folder(root), good(paths), tmp_path / "one", side=60)
    two = pack(open_reader(one), good(paths), tmp_path / "two", side=30)
    for path in good(paths):
        assert min(decode(open_reader(two).read(path), path).shape[:2]) == 30


def test_the_command_packs_a_list(gldv2, tmp_path):
    facts = sources.official(gldv2)
    lists.build(facts, gldv2, tmp_path / "lists")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kit.data.shards", gldv2, tmp_path / "lists"]
    options = [out, "--side", "16", "--per-shard", "3", "--workers", "1"]
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([*command, "full", *options], check=False, **run)
    assert done.returncode == 0, done.stderr
    rows = lists.load(tmp_path / "lists", "full").rows
    reader = open_reader(out)
    missing = [path for path in rows["path"] if not reader.exists(path)]
    assert missing == ["train/a/a/a/aaaa000000000004.jpg"]
    there = rows[rows["path"] != missing[0]]
    for path, height, width in there[["path", "height", "width"]].to_numpy():
        shape = decode(reader.read(path), path).shape
        assert min(shape[:2]) == min(16, height, width)
    assert json.loads((out / "shards.json").read_text())["side"] == 16
    done = subprocess.run([*command, "none", *options], check=False, **run)
    assert done.returncode == 1 and done.stderr.startswith("no list none in ")


def test_an_image_too_long_for_a_jpeg_is_recorded(tmp_path):
    (tmp_path / "root").mkdir()
    Image.new("RGB", (66_000, 1)).save(tmp_path / "root/long.png")
    out = pack(Folder(tmp_path / "root"), ["long.png"], tmp_path / "out", workers=1)
    report = (out / "unreadable.csv").read_text()
    assert report == "path,reason\nlong.png,long.png: too long for a JPEG\n"
