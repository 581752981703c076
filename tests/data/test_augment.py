import random
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from kit.data.augment import Augment, augment
from kit.data.inputs import InputSpec, prepare

SPEC = InputSpec(size=32, mean=(0.1, 0.5, 0.8), std=(0.2, 0.3, 0.4))
ALL = Augment(flip=0.5, crop=0.3, pad=3, jitter=0.4, erase=0.5)


def scene(height, width, seed=0):
    """(H, W, 3) uint8, smooth and different everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return cv2.GaussianBlur(noise.astype(np.uint8), (9, 9), 3)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_only_the_flip_is_on_by_default(resize):
    image, spec = scene(40, 60), replace(SPEC, resize=resize)
    still = prepare(image, spec)
    mirrored = 0
    for seed in range(200):
        output = augment(image, spec, Augment(), np.random.default_rng(seed))
        turned = np.array_equal(output, still[:, :, ::-1])
        assert turned or np.array_equal(output, still)
        mirrored += turned
    assert 70 < mirrored < 130


def test_the_flip_has_its_probability():
    image = scene(32, 32)
    for seed in range(20):
        for flip in (0.0, 1.0):
            how = Augment(flip=flip)
            output = augment(image, SPEC, how, np.random.default_rng(seed))
            expected = image[:, ::-1] if flip else image
            np.testing.assert_array_equal(output, expected.transpose(2, 0, 1))


def test_a_padded_image_is_moved_and_filled_with_zeros():
    image = np.maximum(scene(32, 32), 1)
    big = np.zeros((36, 36, 3), np.uint8)
    big[2:34, 2:34] = image
    places = {
        big[top : top + 32, left : left + 32].tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    assert len(places) == 25
    seen = set()
    for seed in range(400):
        how = Augment(flip=0, pad=2)
        output = augment(image, SPEC, how, np.random.default_rng(seed))
        seen.add(places[output.transpose(1, 2, 0).tobytes()])
    assert len(seen) == 25


@pytest.mark.parametrize("smallest", [0.2, 0.5, 0.9])
def test_a_random_crop_keeps_the_share_and_the_aspect_that_are_asked_for(smallest):
    across, down = np.meshgrid(np.arange(100), np.arange(100))
    image = np.dstack([across, down, across * 0]).astype(np.uint8)
    shares, corners = [], set()
    for seed in range(300):
        how = Augment(flip=0, crop=smallest)
        spec = replace(SPEC, size=100)
        output = augment(image, spec, how, np.random.default_rng(seed)).astype(int)
        width, height = (np.ptp(output[channel]) + 1 for channel in (0, 1))
        assert 3 / 4 <= (width + 0.5) / (height - 0.5)
        assert (width - 0.5) / (height + 0.5) <= 4 / 3
        shares.append((width + 0.5) * (height + 0.5) / 100**2)
        corners.add((output[0].min(), output[1].min()))
    assert min(shares) >= smallest
    assert min(shares) < smallest + 0.3 * (1 - smallest)
    assert max(shares) > 0.9
    assert len(corners) > 20


def test_jitter_changes_brightness_contrast_and_saturation_as_much_as_asked_for():
    image = np.full((32, 32, 3), 80, np.uint8)
    image[10:20] = 160
    image[20:] = (160, 120, 80)  # the mean of all is 120
    factors = []
    for seed in range(300):
        how = Augment(flip=0, jitter=0.3)
        output = augment(image, SPEC, how, np.random.default_rng(seed)).astype(float)
        low, high, colour = output[:, :10], output[:, 10:20], output[:, 20:]
        assert np.ptp(low) <= 1 and np.ptp(high) <= 1  # grey stays grey
        brightness = (high.mean() + low.mean()) / 240
        contrast = (high.mean() - low.mean()) / 80 / brightness
        saturation = (colour[0].mean() - colour[2].mean()) / (high.mean() - low.mean())
        factors.append((brightness, contrast, saturation))
    assert 0.7 - 0.03 <= np.min(factors, axis=0).min()
    assert np.min(factors, axis=0).max() < 0.74
    assert 1.26 < np.max(factors, axis=0).min()
    assert np.max(factors, axis=0).max() <= 1.3 + 0.03
    assert np.abs(np.corrcoef(np.array(factors).T) - np.eye(3)).max() < 0.25


def test_jitter_never_wraps():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:] = (250, 130, 10)
    for seed in range(50):
        how = Augment(flip=0, jitter=0.9)
        red, green, blue = augment(image, SPEC, how, np.random.default_rng(seed))
        assert (red >= green).all() and (green >= blue).all()


@pytest.mark.parametrize("colour", ["rgb", "bgr"])
def test_erase_paints_one_rectangle_in_the_mean_colour(colour):
    spec = replace(SPEC, size=64, colour=colour)
    image = np.full((64, 64, 3), 255, np.uint8)
    places, areas, aspects = set(), [], []
    for seed in range(200):
        how = Augment(flip=0, erase=1)
        output = augment(image, spec, how, np.random.default_rng(seed))
        rows, columns = np.nonzero((output != 255).any(axis=0))
        top, left = rows.min(), columns.min()
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # a rectangle, filled
        assert (height + 0.5) * (width + 0.5) >= 0.02 * 64 * 64
        assert (height - 0.5) * (width - 0.5) <= 0.2 * 64 * 64
        assert (height + 0.5) / (width - 0.5) >= 0.3
        assert (height - 0.5) / (width + 0.5) <= 3.33
        # nothing of the mean colour is left after normalising but the rounding
        x = spec.normalise(torch.from_numpy(output)[None])[0]
        painted = x[:, top : top + height, left : left + width]
        rounding = 0.5 / 255 / torch.tensor(spec.std)[:, None, None] + 1e-6
        assert (painted.abs() <= rounding).all()
        places.add((top, left))
        areas.append(height * width / 64 / 64)
        aspects.append(height / width)
    assert len(places) > 100
    assert min(areas) < 0.04 and max(areas) > 0.17
    assert min(aspects) < 0.5 and max(aspects) > 2.5


def test_erase_has_its_probability():
    image = np.full((32, 32, 3), 255, np.uint8)
    erased = 0
    for seed in range(200):
        how = Augment(erase=0.5)
        output = augment(image, SPEC, how, np.random.default_rng(seed))
        erased += bool((output != 255).any())
    assert 70 < erased < 130


def test_augmentation_depends_on_its_generator_alone():
    image = scene(50, 70)
    first = augment(image, SPEC, ALL, np.random.default_rng(7))
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    same = augment(image, SPEC, ALL, np.random.default_rng(7))
    np.testing.assert_array_equal(first, same)
    other = augment(image, SPEC, ALL, np.random.default_rng(8))
    assert not np.array_equal(first, other)
