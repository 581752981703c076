from bisect import bisect_right

import numpy as np
import pytest

from kit.data.templates import (
    BOUNDED,
    FREE,
    LONGEST,
    TEMPLATES,
    groups,
    shape,
    square_side,
)

# (width, height) by group as the 2019 system has them, and its two sets of bounds of h / w
PUBLISHED = {
    "SS": "384x256 256x256 256x384",
    "S": "512x384 448x448 384x512",
    "M": "800x608 704x704 608x800",
    "L": "800x608 800x800 608x800",
    "SS2": "480x320 480x352 384x384 352x480 320x480",
    "S2": "512x352 512x384 448x448 384x512 352x512",
    "SM2": "736x512 704x544 608x608 544x704 512x736",
    "M2": "800x544 800x608 704x704 608x800 544x800",
    "L2": "800x544 800x608 800x800 608x800 544x800",
}
SQUARES = {
    "SS": 256,
    "S": 448,
    "M": 704,
    "L": 800,
    "SS2": 384,
    "S2": 448,
    "SM2": 608,
    "M2": 704,
    "L2": 800,
}
SIDES = [1, 50, 67, 77, 99, 100, 101, 133, 150, 151, 300, 1000]


def test_the_templates_are_the_published_ones():
    made = {
        name: " ".join(f"{w}x{h}" for w, h in sizes)
        for name, sizes in TEMPLATES.items()
    }
    assert made == PUBLISHED


def test_the_square_is_the_group_in_the_middle():
    assert {name: square_side(name) for name in TEMPLATES} == SQUARES


@pytest.mark.parametrize("template", PUBLISHED)
def test_an_image_has_the_shape_of_its_aspect_ratio(template):
    bounds = [0.67, 0.77, 1.33, 1.5] if "2" in template else [0.77, 1.33]
    sizes = [(height, width) for height in SIDES for width in SIDES]
    found = groups(template, *np.array(sizes).T)
    seen = set()
    for (height, width), group in zip(sizes, found, strict=True):
        expected = bisect_right(bounds, height / width)
        assert group == expected, (height, width)
        w, h = PUBLISHED[template].split()[expected].split("x")
        size = SQUARES[template]
        assert shape(template, size, height, width) == (int(h), int(w))
        seen.add(expected)
    assert seen == set(range(len(bounds) + 1))


def test_a_bound_belongs_to_the_taller_group():
    heights = np.array([66, 67, 76, 77, 132, 133, 149, 150])
    found = groups("S2", heights, np.full(8, 100))
    assert found.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    found = groups("S", heights, np.full(8, 100))
    assert found.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("template", "side"), [("L2", 800), ("M", 704)])
def test_an_unknown_size_is_taken_for_a_square(template, side):
    square = len(TEMPLATES[template]) // 2
    sizes = np.array([(-1, -1), (0, 10), (10, 0), (-1, 500), (500, -1)])
    assert groups(template, *sizes.T).tolist() == [square] * 5
    for height, width in sizes.tolist():
        assert shape(template, side, height, width) == (side, side)


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        (96, [(64, 128), (96, 128), (96, 96), (128, 96), (128, 64)]),
        (192, [(160, 256), (192, 256), (192, 192), (256, 192), (256, 160)]),
        (768, [(640, 960), (704, 960), (768, 768), (960, 704), (960, 640)]),
        (100, [(96, 128), (96, 128), (96, 96), (128, 96), (128, 96)]),
        (4, [(32, 32)] * 5),
    ],
)
def test_another_square_scales_every_shape_to_multiples_of_32(size, shapes):
    sizes = [(50, 100), (70, 100), (1, 1), (140, 100), (200, 100)]
    assert [shape("SS2", size, *each) for each in sizes] == shapes


def test_an_empty_list_has_no_groups():
    assert groups("S2", np.array([], int), np.array([], int)).tolist() == []


def test_the_longest_side_is_the_size_and_the_aspect_ratio_stays():
    assert shape(LONGEST, 320, 480, 640) == (240, 320)
    assert shape(LONGEST, 320, 640, 480) == (320, 240)
    assert shape(LONGEST, 320, 100, 100) == (320, 320)  # small ones grow
    assert shape(LONGEST, 320, 3, 4000) == (1, 320)
    assert shape(LONGEST, 320, -1, -1) == (320, 320)  # unknown


def test_a_bounded_image_is_shrunk_where_it_is_larger_and_never_grows():
    for height, width in [(480, 640), (640, 480), (5, 321), (3, 4000)]:
        expected = shape(LONGEST, 320, height, width)
        assert shape(BOUNDED, 320, height, width) == expected
    for sides in [(100, 100), (320, 7), (1, 320), (319, 320)]:
        assert shape(BOUNDED, 320, *sides) == sides
    assert shape(BOUNDED, 320, -1, -1) == (320, 320)  # unknown


@pytest.mark.parametrize("template", FREE)
def test_images_of_one_group_have_one_shape_of_their_own_and_no_others_do(template):
    sizes = [(height, width) for height in SIDES for width in SIDES] + [(-1, -1)]
    found = groups(template, *np.array(sizes).T, 64).tolist()
    shapes = [shape(template, 64, *each) for each in sizes]
    pairs = set(zip(found, shapes, strict=True))
    assert len(pairs) == len(set(found)) == len(set(shapes)) > 20
