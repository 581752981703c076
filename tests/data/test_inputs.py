from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from kit.data.augment import Augment, augment
from kit.data.inputs import InputSpec, View, prepare, resized


def scene(height, width, seed=0):
    """(H, W, 3) uint8, smooth and different everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return cv2.GaussianBlur(noise.astype(np.uint8), (9, 9), 3)


SPEC = InputSpec(size=32, mean=(0.1, 0.5, 0.8), std=(0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    ("field", "choices"), [("resize", "squash, crop"), ("colour", "rgb, bgr")]
)
def test_an_unknown_rule_is_refused(field, choices):
    with pytest.raises(ValueError) as error:
        InputSpec(**{field: "other"})
    assert str(error.value) == f"{field} 'other' is not one of {choices}"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 0}, "size is 0, not at least 1"),
        ({"size": 32.0}, "size cannot be 32.0"),
        ({"mean": (0.5, 0.5)}, "mean cannot be (0.5, 0.5)"),
        (
            {"template": "S3"},
            "template 'S3' is not one of SS, S, M, L, SS2, S2, SM2, M2, L2, longest, bounded",
        ),
        (
            {"template": "S2", "resize": "crop"},
            "template S2 takes the whole image: resize is squash with it, not crop",
        ),
    ],
)
def test_what_makes_no_input_is_refused(fields, words):
    with pytest.raises(ValueError) as error:
        InputSpec(**fields)
    assert str(error.value) == words


def test_without_a_template_every_image_has_one_shape():
    heights, widths = np.array([10, 500, -1]), np.array([300, 20, -1])
    assert SPEC.group(heights, widths).tolist() == [0, 0, 0]
    assert SPEC.group(heights, widths).dtype.kind == "i"
    assert {SPEC.shape(300, 20), SPEC.shape(20, 300), SPEC.shape(-1, -1)} == {(32, 32)}


def test_a_template_decides_the_shape_and_the_size_its_scale():
    spec = replace(SPEC, template="SS2", size=384)
    heights, widths = np.array([60, 100, 200, -1]), np.array([100, 100, 100, -1])
    assert spec.group(heights, widths).tolist() == [0, 2, 4, 2]
    sizes = list(zip(heights, widths, strict=True))
    shapes = [spec.shape(*size) for size in sizes]
    assert shapes == [(320, 480), (384, 384), (480, 320), (384, 384)]
    larger = replace(spec, size=768)
    doubled = [larger.shape(*size) for size in sizes]
    assert doubled == [(640, 960), (768, 768), (960, 640), (768, 768)]
    assert larger.group(heights, widths).tolist() == [0, 2, 4, 2]


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((60, 100), (256, 384)),
        ((76, 100), (256, 384)),
        ((90, 100), (256, 256)),
        ((140, 100), (384, 256)),
        ((3, 1), (384, 256)),
    ],
)
def test_images_of_one_group_are_prepared_to_one_shape(size, shape):
    image = scene(*size)
    output = prepare(image, replace(SPEC, template="SS", size=256))
    expected = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(output, expected.transpose(2, 0, 1))


def test_an_image_takes_the_shape_of_the_batch_it_joins():
    image = scene(60, 100)
    for spec in (SPEC, replace(SPEC, size=256, template="SS")):
        output = prepare(image, spec, (70, 16))
        expected = cv2.resize(image, (16, 70), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(output, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(16, 48), (64, 24), (16, 96)])
def test_a_shrunk_rectangle_averages_the_area_of_each_pixel(shape):
    image = scene(64, 96)
    expected = np.zeros((*shape, 3))
    high, wide = 64 // shape[0], 96 // shape[1]
    for row, column in np.ndindex(shape):
        area = image[high * row : high * (row + 1), wide * column : wide * (column + 1)]
        expected[row, column] = area.reshape(-1, 3).mean(axis=0)
    output = resized(image, shape)
    assert output.shape == (*shape, 3)
    assert np.abs(output - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(128, 48), (32, 120), (70, 97)])
def test_an_image_that_grows_on_a_side_is_interpolated(shape):
    image = scene(64, 96)
    height, width = shape
    expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resized(image, shape), expected)


def test_normalise_matches_its_definition():
    batch = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    before = batch.clone()
    x = SPEC.normalise(batch)
    assert x.dtype == torch.float32 and x.shape == batch.shape
    for image in range(2):
        for channel in range(3):
            for row in range(4):
                for column in range(5):
                    value = batch[image, channel, row, column].item() / 255
                    value = (value - SPEC.mean[channel]) / SPEC.std[channel]
                    assert abs(x[image, channel, row, column].item() - value) < 1e-5
    assert torch.equal(batch, before)


SHAPES = [(32, 32), (64, 96), (50, 31), (7, 9), (1, 1), (3, 400), (400, 3), (33, 32)]
ALL = Augment(flip=0.5, crop=0.3, pad=3, jitter=0.4, erase=0.5)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("colour", ["rgb", "bgr"])
def test_every_shape_becomes_a_square_of_bytes(size, resize, colour):
    spec = replace(SPEC, resize=resize, colour=colour)
    image = scene(*size)
    before = image.copy()
    outputs = [prepare(image, spec)]
    outputs += [
        augment(image, spec, how, np.random.default_rng(seed))
        for how in (Augment(), ALL)
        for seed in range(3)
    ]
    for output in outputs:
        assert output.shape == (3, 32, 32)
        assert output.dtype == np.uint8
        assert output.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(image, before)


def test_squashing_averages_the_area_of_each_pixel():
    image = scene(64, 96)
    expected = np.zeros((3, 32, 32))
    for row in range(32):
        for column in range(32):
            area = image[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            expected[:, row, column] = area.reshape(-1, 3).mean(axis=0)
    output = prepare(image, SPEC)
    assert np.abs(output - expected).max() <= 0.5 + 1e-3


def test_an_image_of_the_right_size_stays_as_it_is():
    image = scene(32, 32)
    for resize in ("squash", "crop"):
        output = prepare(image, replace(SPEC, resize=resize))
        np.testing.assert_array_equal(output, image.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(64, 128), (50, 83), (83, 50), (31, 20), (10, 160)])
def test_crop_takes_the_centre_square_and_squash_the_whole(size):
    image, side = scene(*size), min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    centre = image[top : top + side, left : left + side]
    crop, squash = replace(SPEC, resize="crop"), replace(SPEC, resize="squash")
    output = prepare(image, crop)
    np.testing.assert_array_equal(output, prepare(centre, squash))
    assert np.abs(output.astype(int) - prepare(image, squash)).max() > 5


def test_a_sliver_is_squashed_whatever_the_rule_says():
    crop, squash = replace(SPEC, resize="crop"), replace(SPEC, resize="squash")
    for size in ((161, 10), (10, 161), (3, 400)):
        output = prepare(scene(*size), crop)
        np.testing.assert_array_equal(output, prepare(scene(*size), squash))


def test_bgr_is_rgb_reversed():
    image = scene(50, 70)
    rgb, bgr = SPEC, replace(SPEC, colour="bgr", mean=SPEC.mean[::-1])
    np.testing.assert_array_equal(prepare(image, bgr), prepare(image, rgb)[::-1])
    for seed in range(5):
        one, other = (
            augment(image, spec, replace(ALL, erase=1), np.random.default_rng(seed))
            for spec in (rgb, bgr)
        )
        np.testing.assert_array_equal(other, one[::-1])


# Scales


def test_the_scales_of_2021_are_multiples_of_16():
    spec = replace(SPEC, size=512)
    views = [View(spec, scale, multiple=16, least=32) for scale in (0.707, 1, 1.414)]
    assert [view.shape(300, 900) for view in views] == [
        (352,) * 2,
        (512,) * 2,
        (720,) * 2,
    ]


@pytest.mark.parametrize(
    ("size", "small", "own", "large"),
    [
        ((60, 100), (384, 576), (544, 800), (672, 992)),
        ((75, 100), (448, 576), (608, 800), (736, 992)),
        ((100, 100), (576, 576), (800, 800), (992, 992)),
        ((100, 75), (576, 448), (800, 608), (992, 736)),
        ((100, 60), (576, 384), (800, 544), (992, 672)),
    ],
)
def test_the_scales_of_2019_are_multiples_of_32_of_each_side(size, small, own, large):
    spec = replace(SPEC, template="L2", size=800)
    views = [View(spec, scale, multiple=32, least=128) for scale in (0.75, 1, 1.25)]
    assert [view.shape(*size) for view in views] == [small, own, large]


def test_a_scale_of_1_leaves_the_sides_as_they_are_and_others_have_a_least():
    spec = replace(SPEC, size=100)
    assert View(spec, 1.0, multiple=64, least=128).shape(9, 9) == (100, 100)
    assert View(spec, 0.99, multiple=64, least=128).shape(9, 9) == (128, 128)
    assert View(spec, 0.5).shape(9, 9) == (50, 50)


@pytest.mark.parametrize(("scale", "side"), [(0.707, 70), (0.359, 35), (1.999, 199)])
def test_a_part_of_a_pixel_is_dropped(scale, side):
    assert View(replace(SPEC, size=100), scale).shape(9, 9) == (side, side)
