import io

import numpy as np
import pytest
from PIL import Image

from kit.data import jpeg

NOISE = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
RGB = Image.fromarray(NOISE).resize((57, 31))


def encoded(image=RGB, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def oriented(number):
    tags = Image.Exif()
    tags[0x0112] = number
    return encoded(exif=tags)


@pytest.mark.parametrize(
    "data",
    [
        encoded(),
        encoded(progressive=True),
        encoded(restart_marker_blocks=1),
        encoded(subsampling=0, quality=100),
        oriented(6),
        encoded(comment=b"\xff\xc0 is no frame here"),
    ],
    ids=["baseline", "progressive", "restarts", "4:4:4", "exif", "comment"],
)
def test_the_frame_header_tells_the_stored_size(data):
    header = jpeg.parse(data)
    assert (header.height, header.width, len(header.components)) == (31, 57, 3)
    assert header.whole and header.ordinary and jpeg.is_jpeg(data)


def test_tables_before_the_frame_are_not_taken_for_it():
    data = encoded()
    start = data.find(b"\xff\xc4")
    tables = data[start : start + 2 + int.from_bytes(data[start + 2 : start + 4])]
    header = jpeg.parse(data[:2] + tables + data[2:])
    assert (header.height, header.width, len(header.components)) == (31, 57, 3)


@pytest.mark.parametrize("length", [2, 10, 300, -1, -2])
def test_a_file_cut_short_is_not_whole(length):
    assert not jpeg.parse(encoded()[:length]).whole


def test_a_thumbnail_is_not_taken_for_the_picture():
    small = encoded(RGB.resize((8, 9)))
    size = (len(small) + 2).to_bytes(2)
    data = encoded()
    both = data[:2] + b"\xff\xe3" + size + small + data[2:]
    header = jpeg.parse(both)
    assert (header.height, header.width) == (31, 57) and header.whole
    assert not jpeg.parse(both[: len(small) + 40]).whole


@pytest.mark.parametrize(
    ("data", "ordinary"),
    [
        (encoded(RGB.convert("L")), True),
        (encoded(RGB.convert("CMYK")), False),
        (encoded(keep_rgb=True), False),
        (encoded(), True),
        (b"\xff\xd8", False),
    ],
    ids=["grey", "cmyk", "rgb", "ycbcr", "nothing"],
)
def test_ordinary_is_what_every_decoder_shows_alike(data, ordinary):
    assert jpeg.parse(data).ordinary == ordinary


@pytest.mark.parametrize(("transform", "ordinary"), [(0, False), (1, True)])
def test_adobes_mark_tells_the_colours(transform, ordinary):
    mark = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    data = encoded()
    header = jpeg.parse(data[:2] + mark + data[2:])
    assert (header.transform, header.ordinary) == (transform, ordinary)


@pytest.mark.parametrize("orientation", range(1, 10))
def test_turned_is_every_orientation_but_the_first(orientation):
    data = oriented(orientation)
    assert jpeg.parse(data).exif
    assert jpeg.turned(data) == (2 <= orientation <= 8)
    assert not jpeg.parse(encoded()).exif and not jpeg.turned(encoded())


def test_no_damage_makes_it_fail():
    rng = np.random.default_rng(0)
    whole = oriented(6)
    for _ in range(300):
        data = bytearray(whole[: rng.integers(2, len(whole))])
        data[rng.integers(0, len(data))] = rng.integers(0, 256)
        header = jpeg.parse(bytes(data))
        assert header.height >= 0 and header.ordinary in (True, False)
        assert jpeg.turned(bytes(data)) in (True, False)
