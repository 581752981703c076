import csv
import io
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torch.utils.data import DataLoader, Dataset

from kit.data import pixels
from kit.data.augment import Augment
from kit.data.images import (
    EvalImages,
    TrainImages,
    UnreadableImage,
    decode,
    header_size,
    in_worker,
    least_side,
    packed,
    read,
    shrunk,
    thumbnail,
)
from kit.data.inputs import InputSpec, View, prepare
from kit.data.readers import Folder

ORIENTATION = 0x0112


def scene(height, width, seed=0):
    """(H, W, 3) uint8, smooth and different everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return cv2.GaussianBlur(noise.astype(np.uint8), (9, 9), 3)


def encoded(pixels, kind="JPEG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(kind, count, value):
    """A JPEG's EXIF segment whose one entry is an orientation of the given TIFF type."""
    entry = struct.pack(">HHHI", 1, ORIENTATION, kind, count) + value.ljust(4, b"\0")
    return segment(b"MM\0*\0\0\0\x08" + entry + b"\0\0\0\0")


def segment(tiff):
    return b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff


def with_segment(jpeg, part):
    return jpeg[:2] + part + jpeg[2:]


def by_pil(path):
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def assert_close(image, expected, most=2):
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= most


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file of that name and returns its path."""

    def write(data, name="image.jpg"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def refused(path):
    """The message of the refusal, which is one line and names the file."""
    with pytest.raises(UnreadableImage) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


# Reading what is odd but whole

RGB = Image.fromarray(scene(40, 60))
RGBA = np.dstack([scene(40, 60), scene(40, 60, 1)[..., 0]])
WIDE = scene(40, 60)[..., 0].astype(np.uint16) * 257
ODD = {
    "grey.jpg": encoded(RGB.convert("L")),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), quality=95),
    "progressive.jpg": encoded(RGB, progressive=True),
    "full_chroma.jpg": encoded(RGB, subsampling=0, quality=100),
    "png_in_disguise.jpg": encoded(RGB, "PNG"),
    "webp_in_disguise.jpg": encoded(RGB, "WEBP", lossless=True),
    "gif_in_disguise.jpg": encoded(RGB.convert("P"), "GIF"),
    "alpha.png": encoded(RGBA, "PNG"),
    "grey_alpha.png": encoded(RGB.convert("LA"), "PNG"),
    "palette.png": encoded(RGB.convert("P"), "PNG"),
    "one_bit.png": encoded(RGB.convert("1"), "PNG"),
    "plain.bmp": encoded(RGB, "BMP"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_as_rgb(file, name):
    path = file(ODD[name], name)
    image = read(path)
    assert image.dtype == np.uint8
    with Image.open(path) as same:
        assert_close(image, np.asarray(same.convert("RGB")))
    assert header_size(path) == (40, 60)


def test_colours_are_red_green_blue(file):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[...] = (250, 120, 10)
    for kind in ("JPEG", "PNG"):
        assert_close(read(file(encoded(pixels, kind))), pixels, most=3)


def test_an_alpha_channel_leaves_the_colours_as_they_are(file):
    np.testing.assert_array_equal(read(file(ODD["alpha.png"])), RGBA[..., :3])


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_the_upper_eight(file, channels):
    wide = WIDE if channels == 1 else scene(40, 60).astype(np.uint16) * 256 + 77
    data = cv2.imencode(".png", wide)[1].tobytes()
    expected = np.repeat(wide[..., None], 3, 2) if channels == 1 else wide[..., ::-1]
    assert_close(read(file(data, "wide.png")), expected // 256, most=1)
    assert header_size(file(data, "wide.png")) == (40, 60)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(file, orientation, kind):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    path = file(encoded(RGB, kind, exif=tags))
    expected = by_pil(path)
    assert expected.shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))
    assert_close(read(path), expected)
    assert header_size(path) == expected.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_every_format_must_be_turned_and_listed_as_it_is_shown(file, kind, orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    quality = {} if kind in ("PNG", "TIFF") else {"quality": 95}
    path = file(encoded(RGB, kind, exif=tags, **quality))
    assert header_size(path) == read(path).shape[:2]
    assert np.abs(read(path).astype(int) - by_pil(path)).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_an_orientation_in_xmp_alone_must_turn_neither_list_nor_picture(file, kind):
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf='
        b'"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    path = file(encoded(RGB, kind, xmp=xmp))
    assert header_size(path) == read(path).shape[:2] == (40, 60)


@pytest.mark.parametrize("orientation", [0, 9, 90])
def test_an_orientation_that_does_not_exist_turns_nothing(file, orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    path = file(encoded(RGB, exif=tags))
    assert read(path).shape == by_pil(path).shape == (40, 60, 3)
    assert header_size(path) == (40, 60)


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # of Pillow, about what is wrong here
@pytest.mark.parametrize(
    "part",
    [
        exif(1, 1, b"\x06"),
        exif(2, 2, b"6\0"),
        exif(5, 1, b"\0\0\0\x08"),
        exif(7, 1, b"\x06"),
        segment(b""),
        segment(b"MM"),
        segment(b"MM\0*\xff\xff\xff\xff"),
        segment(b"no TIFF at all"),
    ],
    ids=["byte", "text", "ratio", "bytes", "empty", "short", "astray", "foreign"],
)
def test_exif_of_another_form_is_no_obstacle(file, part):
    path = file(with_segment(encoded(RGB), part))
    assert header_size(path) == read(path).shape[:2]


def test_bytes_after_the_end_of_a_whole_jpeg_are_no_obstacle(file):
    jpeg = encoded(RGB)
    for trailer in (b"\0" * 999, b"a film \xff\xda of the same second", jpeg[:-50]):
        assert_close(read(file(jpeg + trailer)), by_pil(file(jpeg, "same.jpg")))


# Reading what is not whole


@pytest.fixture(params=["strict", "lenient"])
def decoder(request, monkeypatch, tmp_path):
    """OpenCV as it is, and as it decodes files: with grey pixels for what is missing."""

    def lenient(buffer, flags):
        (tmp_path / "buffer").write_bytes(buffer.tobytes())
        return cv2.imread(str(tmp_path / "buffer"), flags)

    if request.param == "lenient":
        monkeypatch.setattr(cv2, "imdecode", lenient)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", ["baseline", "progressive", "restarts", "PNG", "WEBP"])
def test_a_file_cut_short_anywhere_is_unreadable(file, kind):
    data = {
        "baseline": lambda: encoded(RGB),
        "progressive": lambda: encoded(RGB, progressive=True),
        "restarts": lambda: encoded(RGB, restart_marker_blocks=1),
        "PNG": lambda: encoded(RGB, "PNG"),
        "WEBP": lambda: encoded(RGB, "WEBP"),
    }[kind]()
    read(file(data))
    for length in {*range(1, len(data) - 12, 13), len(data) - 2}:
        assert refused(file(data[:length])) in ("cut short", "not an image")
    assert refused(file(data[: len(data) * 3 // 4])) in ("cut short", "not an image")


@pytest.mark.usefixtures("decoder")
def test_a_thumbnail_does_not_stand_in_for_a_picture_cut_after_it(file):
    small = encoded(scene(20, 30))
    first = struct.pack(">HHHII", 1, ORIENTATION, 3, 1, 1 << 16) + struct.pack(">I", 26)
    second = struct.pack(">HHHII", 2, 0x0201, 4, 1, 56)
    second += struct.pack(">HHII", 0x0202, 4, 1, len(small)) + struct.pack(">I", 0)
    tiff = b"MM\0*\0\0\0\x08" + first + second + small
    data = with_segment(encoded(scene(80, 120)), segment(tiff))
    assert Image.open(io.BytesIO(tiff[56:])).size == (30, 20)  # where the entry says
    assert read(file(data)).shape == (80, 120, 3)
    end = data.find(small) + len(small)
    cuts = [
        end,
        end + 1,
        end + 40,
        data.rfind(b"\xff\xda"),
        data.rfind(b"\xff\xda") + 2,
    ]
    for length in [*cuts, data.rfind(b"\xff\xda") + 300, len(data) - 2]:
        assert end <= length < len(data)
        assert refused(file(data[:length])) in ("cut short", "not an image")


def test_what_is_no_image_is_unreadable(file, tmp_path):
    assert refused(file(b"")) == "empty"
    assert refused(file(b"<html>404 Not Found</html>")) == "not an image"
    assert refused(file(bytes(1000))) == "not an image"
    assert refused(tmp_path / "none.jpg") == "No such file or directory"
    assert refused(tmp_path) == "Is a directory"
    (tmp_path / "none").mkdir()
    for path in (
        file(b""),
        file(b"text", "t.jpg"),
        tmp_path / "x.jpg",
        tmp_path / "none",
    ):
        assert header_size(path) == (-1, -1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_header_that_claims_an_absurd_size_is_unreadable(file, kind):
    data = bytearray(encoded(RGB, kind))
    if kind == "JPEG":
        at = data.find(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 65000, 65000)
    else:
        data[16:24] = struct.pack(">II", 200_000, 200_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path = file(bytes(data))
    refused(path)
    assert header_size(path) == (-1, -1)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is wrong here
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_is_reported_as_unreadable_and_as_nothing_else(file, kind):
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    whole = encoded(scene(20, 20), kind, exif=tags)
    chance = random.Random(2021)
    # not in a PNG's lengths: OpenCV reserves what they claim, gigabytes
    first = whole.find(b"IDAT") + 4 if kind == "PNG" else 0
    last = len(whole) - 16 if kind == "PNG" else min(len(whole), 300)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 4))):
            data[chance.randrange(first, last)] = chance.randrange(256)
        path = file(bytes(data))
        height, width = header_size(path)
        assert (height > 0) == (width > 0)
        try:
            assert read(path).shape[2] == 3
        except UnreadableImage:
            pass


def test_the_unreadable_real_photos_are_those_that_are_known(photos):
    folder = photos / "packages"
    with (folder / "odd_files.csv").open(newline="") as table:
        odd = {row["id"]: row["kind"] for row in csv.DictReader(table)}
    paths = sorted(folder.rglob("*.jpg"))
    assert len(paths) == 2436

    def shape(path):
        try:
            return read(path).shape
        except UnreadableImage:
            return None

    with ThreadPoolExecutor(2) as pool:
        shapes = dict(zip(paths, pool.map(shape, paths), strict=True))
    bad = {path.stem for path, found in shapes.items() if found is None}
    broken = {"truncated", "empty", "text"}
    assert bad == {name for name, kind in odd.items() if kind in broken}
    headless = {name for name in bad if odd[name] != "truncated"}
    for path, found in shapes.items():
        size = header_size(path)
        if found:
            assert size == found[:2] and found[2] == 3
        else:
            assert (size == (-1, -1)) == (path.stem in headless)


# Headers


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("tagged", [True, False])
def test_a_size_is_read_without_decoding(file, kind, tagged, monkeypatch):
    tags = Image.Exif()
    tags[ORIENTATION] = 1
    path = file(encoded(RGB, kind, **({"exif": tags} if tagged else {})))

    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr(cv2, "imdecode", refuse)
    assert header_size(path) == (40, 60)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_size_of_a_truncated_file_is_that_of_its_header(file, kind):
    data = encoded(scene(400, 600), kind)
    path = file(data[: len(data) // 2])
    refused(path)
    assert header_size(path) == (400, 600)


# Thumbnails


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((400, 200), (160, 80)),
        ((200, 400), (80, 160)),
        ((100, 50), (100, 50)),
        ((2, 900), (1, 160)),
    ],
)
def test_a_thumbnail_fits_and_keeps_its_shape(file, size, expected):
    image = thumbnail(file(encoded(scene(*size), "PNG")))
    assert image.shape == (*expected, 3)
    assert image.dtype == np.uint8


def test_a_thumbnail_of_an_unreadable_file_is_grey(file):
    image = thumbnail(file(b""), side=20)
    assert image.shape == (20, 20, 3)
    assert (image == 128).all()


# Datasets

SPEC = InputSpec(size=32, mean=(0.1, 0.5, 0.8), std=(0.2, 0.3, 0.4))
VIEW = View(SPEC)
ALL = Augment(flip=0.5, crop=0.3, pad=3, jitter=0.4, erase=0.5)


@pytest.fixture
def folder(tmp_path):
    """Ten pictures and their paths; rows 2, 3 and 9 cannot be read."""
    root = tmp_path / "root"
    (root / "ü").mkdir(parents=True)
    paths = [f"ü/{row}.jpg" for row in range(10)]
    for row, path in enumerate(paths):
        (root / path).write_bytes(encoded(scene(40, 50 + row, seed=row)))
    (root / paths[2]).write_bytes(b"")
    (root / paths[3]).unlink()
    (root / paths[9]).write_bytes((root / paths[8]).read_bytes()[:-300])
    return root, np.array(paths, dtype=object)


def train_images(folder, seed=0, how=ALL, **options):
    root, paths = folder
    labels = np.arange(100, 100 + len(paths))
    return TrainImages(root, paths, labels, SPEC, how, seed, **options)


def test_a_row_is_its_own_picture_and_label(folder):
    data = train_images(folder, how=Augment(flip=0), fast=False)
    for row in (0, 1, 4, 5, 6, 7, 8):
        image, label, unreadable, trusted = data[3, row]
        expected = prepare(read(folder[0] / folder[1][row]), SPEC)
        np.testing.assert_array_equal(image, expected)
        assert (label, unreadable, trusted) == (100 + row, -1, True)
        assert type(label) is int and type(trusted) is bool


@pytest.mark.parametrize(("row", "instead"), [(2, 4), (3, 4), (9, 0)])
def test_in_an_unreadable_files_place_stands_the_next_readable_row(
    folder, row, instead
):
    data = train_images(folder, how=Augment(flip=0))
    image, label, unreadable, _ = data[0, row]
    np.testing.assert_array_equal(image, data[0, instead][0])
    assert (label, unreadable) == (100 + instead, row)


def test_a_list_without_a_readable_image_is_refused(folder):
    root, paths = folder
    labels = np.zeros(3, np.int64)
    data = TrainImages(root, paths[[2, 3, 9]], labels, SPEC, ALL, seed=0)
    with pytest.raises(UnreadableImage) as error:
        data[0, 1]
    assert str(error.value) == f"{root}: none of the list's images can be read"


def test_an_augmented_image_is_a_function_of_seed_number_and_row(folder):
    keys = [(number, row) for number in (0, 1) for row in (0, 5)]
    images = {}
    for seed in (0, 1):
        data = train_images(folder, seed)
        forward = [data[key][0] for key in keys]
        np.random.seed(seed)
        again = train_images(folder, seed)
        backward = [again[key][0] for key in reversed(keys)][::-1]
        np.testing.assert_array_equal(forward, backward)
        images |= {
            (seed, *key): image for key, image in zip(keys, forward, strict=True)
        }
    assert len({image.tobytes() for image in images.values()}) == 8


def test_rows_with_the_same_picture_are_augmented_differently(folder):
    root, paths = folder
    data = TrainImages(root, paths[[0, 0]], np.zeros(2, np.int64), SPEC, ALL, seed=0)
    assert not np.array_equal(data[0, 0][0], data[0, 1][0])


def test_batches_do_not_depend_on_the_number_of_workers(folder):
    keys = [(epoch, row % 10) for epoch in (0, 1) for row in range(12)]
    steps = [keys[at : at + 4] for at in range(0, 24, 4)]

    def batches(workers, start=0):
        loader = DataLoader(
            train_images(folder),
            batch_sampler=steps[start:],
            num_workers=workers,
            worker_init_fn=in_worker,
        )
        return list(loader)

    alone, together, resumed = batches(0), batches(2), batches(2, start=2)
    assert len(alone) == len(together) == 6
    assert len(resumed) == 4
    pairs = [*zip(alone, together, strict=True), *zip(alone[2:], resumed, strict=True)]
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
    images, labels, unreadable, trusted = (
        torch.cat(parts) for parts in zip(*alone, strict=True)
    )
    assert trusted.dtype == torch.bool
    assert images.shape == (24, 3, 32, 32) and images.dtype == torch.uint8
    assert set(unreadable.tolist()) == {-1, 2, 3, 9}
    assert set(labels.tolist()) == {100, 101, 104, 105, 106, 107, 108}


def test_what_stands_in_brings_its_own_trust(folder):
    trusted = np.arange(10) % 4 == 0
    data = train_images(folder, trusted=trusted)
    assert [data[0, row][3] for row in range(10)] == [
        *(True, False, True, True, True, False, False, False, True, True)
    ]  # rows 2 and 3 are row 4, row 9 is row 0


def test_a_reader_does_as_well_as_a_folder(folder):
    root, paths = folder
    labels = np.arange(10)
    one = TrainImages(root, paths, labels, SPEC, ALL, 0)
    other = TrainImages(Folder(root), paths, labels, SPEC, ALL, 0)
    assert len(one) == len(other) == 10
    for row in range(10):
        np.testing.assert_array_equal(one[0, row][0], other[0, row][0])
    one, other = (EvalImages(where, paths, [VIEW]) for where in (root, Folder(root)))
    np.testing.assert_array_equal(one[1][0], other[1][0])


# Several views of a picture


def test_a_file_is_read_once_and_each_view_is_made_of_the_picture_itself(folder):
    root, paths = folder
    other = replace(SPEC, size=64, resize="crop", colour="bgr")
    views = [
        VIEW,
        View(other),
        View(SPEC, 0.55, multiple=4),  # 17.6 pixels
        View(SPEC, 1.5, multiple=16, least=90),
        View(replace(SPEC, template="S2", size=448), 0.5, multiple=32),
    ]
    asked = []

    class Counting(Folder):
        def read(self, path):
            asked.append(path)
            return super().read(path)

    sizes = np.array([(40, 54)] * 9 + [(40, 90)])
    data = EvalImages(Counting(root), paths, views, sizes=sizes)
    shapes = {4: (192, 256), 9: (160, 256)}  # 384 x 512 and 352 x 512, halved
    for row, listed in shapes.items():
        images, fine = data[row]
        expected = [(32, 32), (64, 64), (16, 16), (90, 90), listed]
        assert [image.shape for image in images] == [(3, *shape) for shape in expected]
        assert fine is (row == 4)
        for image, view, shape in zip(images, views, expected, strict=True):
            assert image.dtype == np.uint8
            alone = prepare(read(root / paths[4]), view.spec, shape)
            np.testing.assert_array_equal(image, alone if fine else 0 * image)
    assert asked == [paths[4], paths[9]]


def test_paths_are_bytes_whatever_text_they_are_given_as(folder):
    _, paths = folder
    many = np.concatenate([paths] * 7000 + [np.array(["long/" * 9 + "ü.jpg"], object)])
    expected = [path.encode() for path in many]
    for given in (many, many.astype(str), packed(many)):
        assert packed(given).dtype == np.dtype("S51")
        assert packed(given).tolist() == expected
    assert len(packed(many[:0])) == 0


# Shapes by the list's height and width

TEMPLATE = InputSpec(size=384, template="SS2")  # 320 x 480, 384 x 384, 480 x 320, ...
SHAPES = {(40, 60): (320, 480), (50, 50): (384, 384), (60, 40): (480, 320)}


@pytest.fixture
def shaped(tmp_path):
    """Pictures of three shapes in turns, row 3 missing; their paths and sizes."""
    sizes = np.array(list(SHAPES) * 3)
    for row, (height, width) in enumerate(sizes):
        pixels = scene(height, width, seed=row)
        (tmp_path / f"{row}.jpg").write_bytes(encoded(pixels))
    (tmp_path / "3.jpg").unlink()
    return tmp_path, np.array([f"{row}.jpg" for row in range(9)]), sizes


def test_the_list_decides_the_shape_and_not_the_picture(shaped):
    root, paths, sizes = shaped
    told = sizes[[1, 1, 2, 0, 0, 0, 2, 1, 2]]  # not those of the pictures
    how = Augment(flip=0, pad=2, erase=1)
    train = TrainImages(root, paths, np.arange(9), TEMPLATE, how, 0, sizes=told)
    evaluated = EvalImages(root, paths, [View(TEMPLATE)], sizes=told)
    for row in range(9):
        shape = (3, *SHAPES[tuple(told[row])])
        assert evaluated[row][0][0].shape == train[0, row][0].shape == shape
    assert evaluated[3][1] is False and evaluated[4][1] is True


def test_the_next_row_of_the_same_shape_stands_in(shaped):
    root, paths, sizes = shaped
    train = TrainImages(root, paths, np.arange(9), TEMPLATE, Augment(), 0, sizes=sizes)
    image, label, unreadable, _ = train[0, 3]
    assert (label, unreadable) == (6, 3) and image.shape == (3, 320, 480)
    (root / "6.jpg").unlink()
    assert train[0, 3][1] == 0
    (root / "0.jpg").unlink()
    with pytest.raises(UnreadableImage, match="none of the list's images"):
        train[0, 3]


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_template_needs_the_sizes_of_the_list(shaped, kind):
    root, paths, _ = shaped
    with pytest.raises(ValueError) as error:
        if kind == "train":
            TrainImages(root, paths, np.arange(9), TEMPLATE, Augment(), 0)
        else:
            EvalImages(root, paths, [VIEW, View(TEMPLATE)])
    assert "template SS2" in str(error.value) and "give sizes" in str(error.value)


# Decoding at a fraction


@pytest.mark.parametrize(
    ("least", "shape"),
    [
        (0, (601, 803)),
        (302, (601, 803)),
        (301, (301, 402)),
        (152, (301, 402)),
        (151, (151, 201)),
        (77, (151, 201)),
        (76, (76, 101)),
        (1, (76, 101)),
    ],
)
def test_a_jpeg_keeps_the_least_side_that_is_asked_for(least, shape):
    data = encoded(scene(601, 803))
    assert decode(data, "x", least).shape == (*shape, 3)
    assert decode(encoded(scene(803, 601)), "x", least).shape == (*shape[::-1], 3)


def test_only_a_jpeg_is_decoded_at_a_fraction():
    for kind in ("PNG", "WEBP", "BMP"):
        data = encoded(scene(80, 120), kind)
        np.testing.assert_array_equal(decode(data, "x", 8), decode(data, "x"))


@pytest.mark.parametrize("least", [100, 50, 25])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_fraction_is_turned_as_exif_says(orientation, least):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    data = encoded(scene(200, 320), exif=tags, quality=95)
    whole, small = decode(data, "x"), decode(data, "x", least)
    assert min(small.shape[:2]) == least
    size = small.shape[1::-1]
    expected = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
    assert small.shape == expected.shape
    assert np.abs(small.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("name", ["grey.jpg", "cmyk.jpg", "progressive.jpg"])
def test_odd_jpegs_come_at_a_fraction_too(name):
    whole, small = decode(ODD[name], "x"), decode(ODD[name], "x", 20)
    assert small.shape == (20, 30, 3)
    expected = cv2.resize(whole, (30, 20), interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - expected).mean() < 2


def test_bytes_are_as_good_as_their_file(file):
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    for data in (encoded(RGB, exif=tags), encoded(RGB, "PNG")):
        path = file(data)
        np.testing.assert_array_equal(decode(data, "x"), read(path))
        np.testing.assert_array_equal(thumbnail(data, 20), thumbnail(path, 20))
        assert header_size(data) == header_size(path)
    assert header_size(b"text") == (-1, -1)
    assert (thumbnail(b"text", 20) == 128).all()
    with pytest.raises(UnreadableImage, match="^some/name.jpg: cut short$"):
        decode(encoded(RGB)[:-9], "some/name.jpg", 8)


class Extremes:
    """Draws as a generator does, but only the smallest and the largest numbers."""

    def __init__(self, *ends):
        self.ends = list(ends)

    def uniform(self, low, high):
        return (low, high)[self.ends.pop(0)]

    def integers(self, low, high):
        return low


@pytest.mark.parametrize("crop", [0.9, 0.75, 0.3, 0.05])
def test_a_crop_of_the_least_side_is_not_smaller_than_the_input(crop):
    least = least_side((320, 480), Augment(crop=crop))
    sides = [
        min(pixels.random_crop(np.zeros(shape), crop, Extremes(0, end)).shape)
        for long in range(least, 3 * least, 7)
        for shape in ((least, long), (long, least))
        for end in (0, 1)
    ]
    assert 480 <= min(sides) <= 481  # what is asked for, and not more
    assert least_side((320, 480), Augment()) == 480
    assert least_side((320, 480), Augment(crop=0)) == 0  # never at a fraction


def test_fast_pictures_are_nearly_those_of_a_full_decode(tmp_path):
    paths = np.array([f"{row}.jpg" for row in range(4)])
    shapes = [(300, 420), (90, 75), (70, 200), (600, 500)]
    for row, shape in enumerate(shapes):
        kind = "PNG" if row == 3 else "JPEG"
        (tmp_path / paths[row]).write_bytes(encoded(scene(*shape, row), kind))
    spec = InputSpec(size=64)
    train = [
        TrainImages(tmp_path, paths, np.arange(4), spec, Augment(), 0, fast=fast)
        for fast in (True, False)
    ]
    evaluated = [
        EvalImages(tmp_path, paths, [View(spec)], fast=fast) for fast in (True, False)
    ]
    for row in range(4):
        for fast, slow in (
            [data[1, row][0] for data in train],
            [data[row][0][0] for data in evaluated],
        ):
            assert fast.shape == slow.shape == (3, 64, 64)
            assert np.abs(fast.astype(int) - slow).mean() < 3
        expected = prepare(read(tmp_path / paths[row]), spec)
        np.testing.assert_array_equal(evaluated[1][row][0][0], expected)
    row = 1  # 90 x 75, and 64 is more than half
    small = cv2.resize(read(tmp_path / paths[row]), (64, 64))
    still = TrainImages(tmp_path, paths, np.arange(4), spec, Augment(flip=0), 0)
    np.testing.assert_array_equal(still[0, row][0], small.transpose(2, 0, 1))
    assert train[0].load(encoded(scene(300, 420)), "x", (64, 64)).shape[:2] == (75, 105)
    assert train[1].load(encoded(scene(300, 420)), "x", (64, 64)).shape[0] == 300
    np.testing.assert_array_equal(
        EvalImages(tmp_path, paths, [View(spec)])[0][0], evaluated[1][0][0]
    )  # unless asked
    assert not np.array_equal(evaluated[0][0][0][0], evaluated[1][0][0][0])


def test_a_fast_picture_keeps_the_longest_side_of_its_largest_view(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encoded(scene(300, 420)))
    wide = View(replace(SPEC, template="SS", size=64))  # 64 x 96
    paths, sizes = np.array(["0.jpg"]), np.array([(60, 90)])
    for views, least in ([VIEW, wide], 96), ([wide, View(SPEC, 4.0)], 128):
        data = EvalImages(tmp_path, paths, views, sizes=sizes, fast=True)
        picture = decode((tmp_path / "0.jpg").read_bytes(), "", least)
        assert len(picture) == 150
        for image, view in zip(data[0][0], views, strict=True):
            expected = prepare(picture, view.spec, view.shape(60, 90))
            np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ((40, 63), True),
        ((63, 32), True),
        ((64, 40), False),
        ((40, 64), False),
        ((31, 40), False),
        ((40, 31), False),
    ],
)
def test_what_shrinks_to_more_than_half_is_interpolated(size, changes):
    picture = scene(*size)
    small = shrunk(picture, (32, 32))
    if changes:
        expected = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(small, expected)
    else:
        assert small is picture


class Threads(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, row):
        return torch.get_num_threads(), cv2.getNumThreads()


def test_a_worker_has_one_thread():
    loader = DataLoader(Threads(), num_workers=1, worker_init_fn=in_worker)
    for threads in loader:
        assert [int(count) for count in threads] == [1, 1]


def test_evaluation_sees_every_row_once_and_says_which_are_unreadable(folder):
    root, paths = folder
    data = EvalImages(root, paths, [VIEW])
    assert len(data) == 10
    for row in range(10):
        (image,), fine = data[row]
        assert fine is (row not in (2, 3, 9))
        expected = (
            prepare(read(root / paths[row]), SPEC) if fine else np.zeros_like(image)
        )
        np.testing.assert_array_equal(image, expected)
        assert image.shape == (3, 32, 32) and image.dtype == np.uint8
