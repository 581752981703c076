from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from kit.data.augment import Augment, augment
from kit.data.inputs import InputSpec, prepare


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
