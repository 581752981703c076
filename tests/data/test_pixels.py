import colorsys
import math
import random
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from kit.data import pixels

FILL = (10, 200, 90)
OPERATIONS = {
    "random_crop": partial(pixels.random_crop, smallest=0.5),
    "pad_and_crop": partial(pixels.pad_and_crop, pad=3),
    "crop_then_scale": partial(pixels.crop_then_scale, amount=0.3),
    "zoom": lambda image, rng: pixels.zoom(image, rng.uniform(0.9, 1.1)),
    "shear": lambda image, rng: pixels.shear(image, rng.uniform(-4, 4)),
    "jitter": partial(pixels.jitter, amount=0.4),
    "tone": lambda image, rng: pixels.tone(image, *rng.uniform(-0.2, 0.2, 2)),
    "photometric": pixels.photometric,
    "clahe": lambda image, rng: pixels.clahe(image, rng.uniform(1, 4)),
    "motion_blur": pixels.motion_blur,
    "erase": partial(pixels.erase, fill=FILL),
    "patch": pixels.patch,
    "augmix": partial(pixels.augmix, fill=FILL),
    "auto_augment": partial(pixels.auto_augment, fill=FILL),
    "rand_augment": partial(pixels.rand_augment, magnitude=9, fill=FILL),
    "trivial_augment": partial(pixels.trivial_augment, fill=FILL),
}


def scene(height, width, seed=0):
    """(H, W, 3) uint8, smooth and different everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return cv2.GaussianBlur(noise.astype(np.uint8), (9, 9), 3)


def places(height, width):
    """(H, W, 3) uint8: column, row, 255."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return np.dstack([across, down, np.full_like(across, 255)]).astype(np.uint8)


def states():
    """Of every generator that a process has one of, as text."""
    return repr(
        (random.getstate(), np.random.get_state(), torch.get_rng_state().tolist())
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_depends_on_its_generator_alone_and_changes_nothing_else(name):
    image = scene(130, 150)
    image.flags.writeable = False
    outputs = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = states()
        outputs.append(
            [OPERATIONS[name](image, rng=np.random.default_rng(k)) for k in range(6)]
        )
        assert states() == before
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.uint8
        assert name == "random_crop" or one.shape == image.shape
    assert len({output.tobytes() for output in outputs[0]}) > 2


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 1)])
def test_an_operation_bears_a_tiny_image(name, size):
    for seed in range(5):
        OPERATIONS[name](scene(*size), rng=np.random.default_rng(seed))


def test_the_generators_of_a_process_are_put_back_after_an_error_too():
    before = states()
    with pytest.raises(TypeError):
        pixels.augmix(np.zeros((4, 4, 5)), FILL, np.random.default_rng(0))
    assert states() == before


# where things are


@pytest.mark.parametrize("factor", [0.4, 0.9, 1.0, 1.1])
def test_zoom_enlarges_about_the_centre(factor):
    output = pixels.zoom(places(40, 60), factor).astype(float)
    for row in range(40):
        for column in range(60):
            x = 29.5 + (column - 29.5) / factor
            y = 19.5 + (row - 19.5) / factor
            if 0 <= x <= 59 and 0 <= y <= 39:
                assert np.abs(output[row, column, :2] - (x, y)).max() <= 0.55
                assert output[row, column, 2] == 255
            elif x <= -1 or x >= 60 or y <= -1 or y >= 40:
                assert (output[row, column] == 0).all()


@pytest.mark.parametrize("degrees", [-20, -4, 0, 4, 30])
def test_shear_moves_rows_sideways_by_the_tangent_and_nothing_up_or_down(degrees):
    output = pixels.shear(places(41, 60), degrees).astype(float)
    for row in range(41):
        moved = math.tan(math.radians(degrees)) * (row - 20)
        for column in range(60):
            x = column - moved
            if 0 <= x <= 59:
                assert abs(output[row, column, 0] - x) <= 0.55
                assert output[row, column, 1] == row
            elif x <= -1 or x >= 60:
                assert (output[row, column] == 0).all()


def test_a_window_has_the_factors_and_the_places_that_are_asked_for():
    image = places(60, 80)
    image[..., :2] = 20 + 2 * image[..., :2]
    found = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        output = pixels.crop_then_scale(image, 0.3, rng).astype(float)
        assert output.shape == image.shape
        inside = output[..., 2] == 255
        rows, columns = inside.any(axis=1).nonzero()[0], inside.any(axis=0).nonzero()[0]
        top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
        assert inside[top : bottom + 1, left : right + 1].all()
        outside = output.copy()
        outside[max(0, top - 2) : bottom + 3, max(0, left - 2) : right + 3] = 0
        assert not outside.any()  # black but for the blend at the border
        for axis, (start, end, n, first, last) in enumerate(
            (
                (top, bottom, 60, output[top, left, 1], output[bottom, left, 1]),
                (left, right, 80, output[top, left, 0], output[top, right, 0]),
            )
        ):
            factor = (last - first) / 2 / (end - start)
            # the share of the space, before the picture or before the window in it
            if factor > 1.05:
                share = start / (n * (1 - 1 / factor))
                # all of it is seen, but for half a pixel of the output
                assert first <= 23 and last >= 18 + 2 * (n - 1) - 3
            elif factor < 0.95:
                share = (first - 20) / 2 / (n * (1 - factor))
                assert (start, end) == (0, n - 1)
            else:
                share = math.nan
            found.append((axis, factor, share))
    factors = np.array([[f for a, f, _ in found if a == axis] for axis in (0, 1)])
    assert 0.68 <= factors.min(axis=1).min() and factors.min(axis=1).max() < 0.73
    assert 1.27 < factors.max(axis=1).min() and factors.max(axis=1).max() <= 1.32
    assert np.abs(factors.mean(axis=1) - 1).max() < 0.035  # 4 standard errors
    assert np.abs(factors.std(axis=1) - 0.6 / math.sqrt(12)).max() < 0.02
    assert abs(np.corrcoef(factors)[0, 1]) < 0.2
    for larger in (False, True):
        shares = [s for _, f, s in found if (f > 1) == larger and not math.isnan(s)]
        assert np.quantile(shares, 0.1) < 0.2 and np.quantile(shares, 0.9) > 0.8
        assert abs(np.mean(shares) - 0.5) < 0.08
        assert min(shares) > -0.15 and max(shares) < 1.15


def test_a_window_of_the_pictures_size_is_the_picture():
    image = scene(30, 40)
    output = pixels.crop_then_scale(image, 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(output, image)


# brightness and colour


@pytest.mark.parametrize("amount", [0.1, 0.9])
def test_jitter_matches_its_definition(amount):
    for seed in range(20):
        image = scene(12, 16, seed)
        image[:4] = 255 * (image[:4] > 128)
        output = pixels.jitter(image, amount, np.random.default_rng(seed))
        draws = np.random.default_rng(seed).uniform(-amount, amount, 3)
        x = image * (1 + draws[0])
        x = x.mean() + (x - x.mean()) * (1 + draws[1])
        for row in range(12):
            for column in range(16):
                red, green, blue = x[row, column]
                grey = 0.299 * red + 0.587 * green + 0.114 * blue
                for channel, value in enumerate((red, green, blue)):
                    expected = grey + (value - grey) * (1 + draws[2])
                    expected = min(255, max(0, expected))
                    assert abs(output[row, column, channel] - expected) <= 1


@pytest.mark.parametrize(
    ("brightness", "contrast"), [(0, 0), (0.1, 0), (-0.1, 0.1), (0, -0.1), (1, 1)]
)
def test_tone_scales_pixels_and_adds_a_share_of_the_mean(brightness, contrast):
    image = np.zeros((2, 4, 3), np.uint8)
    image[0] = 40
    image[1] = (200, 160, 240)  # the mean of all is 120
    output = pixels.tone(image, brightness, contrast)
    for before, after in zip(image.flat, output.flat, strict=True):
        before = float(before)
        expected = min(255, max(0, before * (1 + contrast) + 120 * brightness))
        assert abs(float(after) - expected) <= 0.5 + 1e-9


def test_photometric_distortion_matches_its_definition():
    image = np.random.default_rng(9).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        draws, coins = rng.uniform(-1, 1, 4), rng.integers(2, size=4)
        early, swap = rng.integers(2, size=2)
        order = rng.permutation(3) if swap else (0, 1, 2)
        contrast = 1 + 0.5 * draws[1] * coins[1]
        output = pixels.photometric(image, np.random.default_rng(seed))
        for pixel, after in zip(
            image.reshape(-1, 3), output.reshape(-1, 3), strict=True
        ):
            rgb = [max(0.0, v + 32 * draws[0] * coins[0]) for v in pixel.tolist()]
            if early:
                rgb = [v * contrast for v in rgb]
            hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
            hue = (hue + 18 / 360 * draws[3] * coins[3]) % 1
            saturation = min(1.0, saturation * (1 + 0.5 * draws[2] * coins[2]))
            rgb = colorsys.hsv_to_rgb(hue, saturation, value)
            if not early:
                rgb = [v * contrast for v in rgb]
            expected = [min(255.0, rgb[channel]) for channel in order]
            assert np.abs(after - expected).max() <= 0.6


def test_photometric_distortion_keeps_grey_grey_and_never_wraps():
    for grey, low, high in ((250, 109, 255), (100, 34, 198), (5, 0, 56)):
        image = np.full((3, 3, 3), grey, np.uint8)
        seen = []
        for seed in range(800):
            output = pixels.photometric(image, np.random.default_rng(seed))
            assert np.ptp(output) == 0
            seen.append(int(output[0, 0, 0]))
        assert low <= min(seen) <= low + 20 and high - 20 <= max(seen) <= high
        assert seen.count(grey) > 150  # neither brightness nor contrast: a quarter


def test_photometric_distortion_turns_hues_and_permutes_channels():
    image = np.zeros((3, 3, 3), np.uint8)
    image[..., 0] = 200
    red, turns = 0, []
    for seed in range(600):
        output = pixels.photometric(image, np.random.default_rng(seed))[0, 0]
        red += output[0] == output.max()
        low, middle, high = sorted(output.tolist())
        if low == 0 and high < 255:
            turns.append(60 * middle / high)
    assert abs(red / 600 - 2 / 3) < 0.08  # one half, and a third of the others
    assert 16 < max(turns) <= 18.5
    assert 0.3 < np.mean(np.array(turns) == 0) < 0.7


def test_clahe_equalises_lightness_and_leaves_colour():
    image = np.random.default_rng(0).integers(100, 121, (128, 128, 3)).astype(np.uint8)
    image[..., 2] += 60  # bluish
    before = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(float)
    spreads = []
    for limit in (1, 2, 4):
        output = pixels.clahe(image, limit)
        after = cv2.cvtColor(output, cv2.COLOR_RGB2LAB).astype(float)
        assert np.abs(after - before)[..., 1:].mean() < 2
        assert np.corrcoef(after[..., 0].flat, before[..., 0].flat)[0, 1] > 0.8
        spreads.append(after[..., 0].std() / before[..., 0].std())
    assert 1.2 < spreads[0] < spreads[1] < spreads[2]
    flat = np.full((64, 64, 3), (30, 90, 60), np.uint8)
    assert np.ptp(pixels.clahe(flat, 2).reshape(-1, 3), axis=0).max() == 0


def test_motion_blur_is_the_mean_along_a_line_through_the_pixel():
    image = np.zeros((15, 15, 3), np.uint8)
    image[7, 7] = 240
    lengths, lines = set(), set()
    for seed in range(200):
        output = pixels.motion_blur(image, np.random.default_rng(seed))
        assert (output == output[..., :1]).all()
        seen = np.argwhere(output[..., 0]) - 7
        lengths.add(len(seen))
        assert (output[..., 0][output[..., 0] > 0] == round(240 / len(seen))).all()
        assert {(-y, -x) for y, x in seen.tolist()} == {
            (y, x) for y, x in seen.tolist()
        }
        y, x = max(seen.tolist(), key=lambda place: max(map(abs, place)))
        half = max(abs(y), abs(x))
        assert 2 * half + 1 == len(seen)
        for row, column in seen.tolist():  # none a pixel away from the line
            assert abs(row * x - column * y) < half
        lines.add(seen.tobytes())
    assert lengths == {3, 5, 7}
    assert len(lines) > 10


# rectangles


def test_an_erased_rectangle_has_its_share_of_an_image_of_any_shape():
    image = np.zeros((40, 120, 3), np.uint8)
    shares, aspects = [], []
    for seed in range(200):
        output = pixels.erase(image, FILL, np.random.default_rng(seed))
        erased = (output == FILL).all(axis=-1)
        assert (output[~erased] == 0).all()
        rows, columns = erased.any(axis=1).sum(), erased.any(axis=0).sum()
        assert erased.sum() == rows * columns
        shares.append(erased.mean())
        aspects.append(rows / columns)
    assert min(shares) > 0.015 and max(shares) < 0.215
    assert min(shares) < 0.04 and max(shares) > 0.17
    # uniform in 0.3..3.33, but the tallest do not fit into the picture
    assert 1.2 < np.mean(aspects) < 1.9


def test_a_patch_is_a_rectangle_of_the_picture_elsewhere_in_it():
    image, areas, corners, mirrored = places(60, 80), [], set(), 0
    for seed in range(200):
        output = pixels.patch(image, np.random.default_rng(seed)).astype(int)
        rows, columns = (output != image).any(axis=-1).nonzero()
        top, left, bottom, right = rows.min(), columns.min(), rows.max(), columns.max()
        piece = output[top : bottom + 1, left : right + 1]
        step = np.unique(np.diff(piece[..., 0], axis=1)).tolist()
        assert step in ([1], [-1])
        assert (np.diff(piece[..., 0], axis=0) == 0).all()
        assert (np.diff(piece[..., 1], axis=0) == 1).all()
        assert (np.diff(piece[..., 1], axis=1) == 0).all()
        mirrored += step == [-1]
        areas.append(piece[..., 0].size / 60 / 80)
        corners |= {("to", top, left), ("from", piece[0, 0, 1], piece[0, :, 0].min())}
    assert 0.008 < min(areas) < 0.03 and 0.13 < max(areas) < 0.17
    assert 70 < mirrored < 130
    assert len(corners) > 300


# policies of libraries


def test_augmix_mixes_changes_of_severity_one():
    """A spot moves by at most 3 degrees, 3 % of shear and a 30th of a side."""
    image = np.zeros((90, 90, 3), np.uint8)
    image[60:63, 60:63] = 255  # neither equalising nor stretching moves it
    strengths, moved = [], 0
    for seed in range(300):
        output = pixels.augmix(image, (0, 0, 0), np.random.default_rng(seed))
        rows, columns = np.nonzero(output[..., 0] > 3)
        assert np.abs(np.array([rows, columns]) - 61).max(initial=0) <= 1 + 5
        there = output[61, 61, 0] / 255
        strengths.append(1 - there)
        moved += there < 0.99 and len(rows) > 9
    # Beta(0.1, 0.1) is seldom far from 0 and 1: mostly nothing, or all of it
    assert np.mean(np.array(strengths) < 0.02) > 0.5
    assert moved > 30


def test_augmix_posterises_to_four_bits_and_inverts_the_brightest():
    image = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 32, 3))
    posterised, inverted = 0, 0
    for seed in range(500):
        output = pixels.augmix(image, FILL, np.random.default_rng(seed))
        posterised += np.abs(output.astype(int) - (image & 0xF0)).max() <= 2
        centre = output[:, 16, 0].astype(int)
        same = np.abs(centre[:220] - range(220)).max() <= 2
        inverted += same and centre[254] < 10
    assert posterised >= 3
    assert inverted >= 3


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (pixels.auto_augment, v2.AutoAugment),
        (partial(pixels.rand_augment, magnitude=9), v2.RandAugment),
        (
            partial(pixels.rand_augment, magnitude=25),
            partial(v2.RandAugment, num_ops=2, magnitude=25),
        ),
        (pixels.trivial_augment, v2.TrivialAugmentWide),
    ],
)
def test_a_policy_is_torchvisions_with_a_seed_of_our_generator(ours, theirs):
    image = scene(40, 60)
    policy = theirs(interpolation=v2.InterpolationMode.BILINEAR, fill=FILL)
    outputs = set()
    for seed in range(30):
        output = ours(image, fill=FILL, rng=np.random.default_rng(seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng(seed).integers(2**32)))
            expected = np.asarray(policy(Image.fromarray(image)))
        np.testing.assert_array_equal(output, expected)
        outputs.add(output.tobytes())
    assert len(outputs) > 12
