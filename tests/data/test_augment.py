import dataclasses
import math
import random
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from kit.data import pixels
from kit.data.augment import MIDDLE, SOFT, Augment, augment
from kit.data.inputs import InputSpec, prepare

SPEC = InputSpec(size=32, mean=(0.1, 0.5, 0.8), std=(0.2, 0.3, 0.4))
OFF = Augment(flip=0)
# every option; those that always happen first change what the others see
ALL = Augment(
    crop=0.3,
    flip=0.5,
    pad=3,
    photometric=0.5,
    jitter=0.4,
    jitter_probability=0.5,
    augmix=0.5,
    patch=0.5,
    zoom=0.1,
    zoom_probability=0.5,
    shear=4,
    brightness=0.1,
    contrast=0.1,
    motion_blur=0.5,
    clahe=0.5,
    crop_scale=0.3,
    auto_augment=0.5,
    rand_augment=0.5,
    trivial_augment=0.5,
    erase=0.5,
)


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
    outputs = []
    for seed in (1, 2):
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        before = repr((random.getstate(), np.random.get_state()))
        outputs.append(
            [augment(image, SPEC, ALL, np.random.default_rng(k)) for k in range(20)]
        )
        assert repr((random.getstate(), np.random.get_state())) == before
    np.testing.assert_array_equal(*outputs)
    assert len({output.tobytes() for output in outputs[0]}) == 20


def test_nothing_is_random_at_zero():
    image = scene(50, 70)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    np.testing.assert_array_equal(augment(image, SPEC, OFF, rng), prepare(image, SPEC))
    assert rng.bit_generator.state == before
    # what is not 0 then says how often or how strongly something happens that is off
    values = dataclasses.asdict(OFF)
    assert {name for name in values if values[name]} == {
        "crop",
        "jitter_probability",
        "zoom_probability",
        "shear_probability",
        "tone_probability",
        "rand_magnitude",
    }


def test_what_is_certain_moves_no_other_draw():
    image = scene(32, 32)
    for seed in range(10):
        with_flip, without = (
            augment(
                image, SPEC, Augment(flip=flip, jitter=0.3), np.random.default_rng(seed)
            )
            for flip in (1.0, 0.0)
        )
        np.testing.assert_array_equal(with_flip[:, :, ::-1], without)


@pytest.mark.parametrize(
    ("probability", "amounts"),
    [
        ("jitter_probability", {"jitter": 0.2}),
        ("photometric", {}),
        ("augmix", {}),
        ("patch", {}),
        ("zoom_probability", {"zoom": 0.1}),
        ("shear_probability", {"shear": 8.0}),
        ("tone_probability", {"brightness": 0.2}),
        ("tone_probability", {"contrast": 0.2}),
        ("motion_blur", {}),
        ("clahe", {}),
        ("auto_augment", {}),
        ("rand_augment", {}),
        ("trivial_augment", {}),
        ("erase", {}),
    ],
)
def test_a_change_has_its_probability(probability, amounts):
    image = scene(32, 32)
    changed = {}
    for share in (0.0, 0.5, 1.0):
        how = replace(OFF, **amounts, **{probability: share})
        changed[share] = sum(
            not np.array_equal(
                augment(image, SPEC, how, np.random.default_rng(seed)),
                image.transpose(2, 0, 1),
            )
            for seed in range(200)
        )
    assert changed[0.0] == 0
    assert changed[1.0] > 100  # some leave the picture as it is
    assert abs(changed[0.5] / changed[1.0] - 0.5) < 0.14


@pytest.mark.parametrize(
    ("field", "amount", "measure"),
    [
        # of a picture that is 100 in red, and 60 in the mean
        ("brightness", 0.2, lambda image: (image[0, 16, 16] - 100) / 60),
        ("contrast", 0.2, lambda image: image[0, 16, 16] / 100 - 1),
        # of one that brightens from left to right
        ("zoom", 0.1, lambda image: 4 * 23 / np.ptp(image[1, 16, 4:28]) - 1),
        ("shear", 8.0, lambda image: (float(image[1, 0, 16]) - image[1, 31, 16]) / 124),
    ],
)
def test_an_amount_is_the_largest_in_both_directions(field, amount, measure):
    image = np.full((32, 32, 3), (100, 40, 40), np.uint8)
    if field in ("zoom", "shear"):
        image[..., 1] = 4 * np.arange(32) + 50
    how = replace(OFF, **{field: amount, "shear_probability": 1, "tone_probability": 1})
    amounts = [
        measure(augment(image, SPEC, how, np.random.default_rng(seed)).astype(float))
        for seed in range(200)
    ]
    most = math.tan(math.radians(amount)) if field == "shear" else amount
    assert -1.15 * most <= min(amounts) < -0.85 * most
    assert 0.85 * most < max(amounts) <= 1.15 * most


def test_the_limit_of_clahe_is_anything_from_1_to_4():
    image, spec = scene(128, 128), replace(SPEC, size=128)
    outputs = {
        augment(image, spec, replace(OFF, clahe=1), np.random.default_rng(k)).tobytes()
        for k in range(40)
    }
    # a tile of 16 x 16 has one pixel for each of 256 bins: whole limits are all there are
    expected = (pixels.clahe(image, limit).transpose(2, 0, 1) for limit in (1, 2, 3))
    assert outputs == {output.tobytes() for output in expected}


@pytest.mark.parametrize("magnitude", [3, 25])
def test_two_changes_have_the_magnitude_that_is_asked_for(magnitude):
    image, fill = scene(32, 32), tuple(round(255 * share) for share in SPEC.mean)
    how = replace(OFF, rand_augment=1, rand_magnitude=magnitude)
    for seed in range(10):
        output = augment(image, SPEC, how, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        expected = pixels.rand_augment(image, magnitude, fill, rng)
        np.testing.assert_array_equal(output, expected.transpose(2, 0, 1))


ORDER = [
    "random_crop",
    # 2021
    "pad_and_crop",
    "photometric",
    "jitter",
    "augmix",
    "patch",
    "zoom",
    # 2019
    "shear",
    "tone",
    "motion_blur",
    "clahe",
    "crop_then_scale",
    "auto_augment",
    "rand_augment",
    "trivial_augment",
    "erase",
]


def test_changes_come_in_the_order_of_the_two_winning_systems(monkeypatch):
    called = []

    def spy(name):
        real = getattr(pixels, name)
        return lambda *args: called.append(name) or real(*args)

    for name in ORDER:
        monkeypatch.setattr(pixels, name, spy(name))
    on = {
        f.name: 1
        for f in dataclasses.fields(Augment)
        if f.name.endswith("_probability") or getattr(ALL, f.name) == 0.5
    }
    augment(scene(40, 50), SPEC, replace(ALL, **on), np.random.default_rng(0))
    assert called == ORDER


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (80, 80), (7, 5)])
def test_an_image_gets_the_shape_of_its_template(height, width):
    spec = InputSpec(size=256, template="SS")
    image = scene(height, width)
    for how in (OFF, ALL):
        output = augment(image, spec, how, np.random.default_rng(0))
        assert output.shape == (3, *spec.shape(height, width))
        assert output.flags["C_CONTIGUOUS"] and output.dtype == np.uint8
    expected = prepare(image, spec)
    np.testing.assert_array_equal(
        augment(image, spec, OFF, np.random.default_rng(0)), expected
    )


def test_colours_outside_the_picture_are_black_or_the_mean():
    image = np.full((32, 32, 3), 255, np.uint8)
    mean = np.round(np.array(SPEC.mean) * 255)[:, None]
    for how, colour in (
        (replace(OFF, pad=5), 0),
        (replace(OFF, zoom=0.9), 0),
        (replace(OFF, shear=45, shear_probability=1), 0),
        (replace(OFF, crop_scale=0.9), 0),
        (replace(OFF, erase=1), mean),
    ):
        found = 0
        for seed in range(20):
            output = augment(image, SPEC, how, np.random.default_rng(seed))
            found += bool((output == np.reshape(colour, (-1, 1, 1))).all(axis=0).any())
        assert found >= 5
    for field in ("auto_augment", "rand_augment", "trivial_augment"):
        how, found = replace(OFF, **{field: 1}), 0
        for seed in range(200):
            output = augment(image, SPEC, how, np.random.default_rng(seed))
            found += bool((output == mean[..., None]).all(axis=0).any())
        assert found >= 5


def test_the_presets_are_those_of_2019():
    soft = {"flip": 0, "crop_scale": 0.2, "brightness": 0.1}
    middle = {**soft, "crop_scale": 0.3, "shear": 4, "contrast": 0.1}
    default = dataclasses.asdict(Augment())
    for preset, own in ((SOFT, soft), (MIDDLE, middle)):
        values = dataclasses.asdict(preset)
        assert {k: v for k, v in values.items() if v != default[k]} == own
        assert (values["shear_probability"], values["tone_probability"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"flip": 1.5}, "flip is 1.5, not at most 1"),
        ({"augmix": -0.1}, "augmix is -0.1, not at least 0"),
        ({"tone_probability": 2}, "tone_probability is 2, not at most 1"),
        ({"crop": 1.1}, "crop is 1.1, not at most 1"),
        ({"crop_scale": 1.0}, "crop_scale is 1.0, not at most 0.9"),
        ({"zoom": 1.0}, "zoom is 1.0, not at most 0.9"),
        ({"shear": 90}, "shear is 90, not at most 45"),
        ({"rand_magnitude": 31}, "rand_magnitude is 31, not at most 30"),
        ({"pad": 1.5}, "pad cannot be 1.5"),
        ({"pad": -1}, "pad is -1, not at least 0"),
        ({"jitter": math.nan}, "jitter cannot be nan"),
        ({"erase": "yes"}, "erase cannot be 'yes'"),
    ],
)
def test_a_value_out_of_range_is_refused(fields, words):
    with pytest.raises(ValueError) as error:
        Augment(**fields)
    assert str(error.value) == words
