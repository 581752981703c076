"""Changes of pixels for training: (H, W, 3) uint8 RGB in, the same shape out but for crops.

What is random is drawn from the generator that is passed in, whatever generators a library
uses. A colour outside the picture is black, or the `fill` that is passed in.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import cv2
import numpy as np
import torch
from PIL import Image

Rng = np.random.Generator
Colour = tuple[int, int, int]  # RGB
GREY = np.array([0.299, 0.587, 0.114])  # of RGB (BT.601)
ASPECT = (0.3, 3.33)  # height / width of a random rectangle
# the operations of AugMix's paper; timm's own list has four more
AUGMIX = (
    "AutoContrast",
    "Equalize",
    "PosterizeIncreasing",
    "Rotate",
    "SolarizeIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)


# --- where things are -----------------------------------------------------------------


def random_crop(image: np.ndarray, smallest: float, rng: Rng) -> np.ndarray:
    """A part with at least that share of the area, its aspect within 3/4..4/3."""
    height, width = image.shape[:2]
    area = height * width * rng.uniform(smallest, 1)
    # where that much area fits into the picture so, else as near to it as it does
    narrow, wide = area / height**2, width**2 / area
    low, high = np.clip((3 / 4, 4 / 3), narrow, wide)
    aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
    h = min(height, max(1, round(math.sqrt(area / aspect))))
    w = min(width, max(1, round(math.sqrt(area * aspect))))
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    return image[top : top + h, left : left + w]


def pad_and_crop(image: np.ndarray, pad: int, rng: Rng) -> np.ndarray:
    """Moved by up to `pad` pixels in each direction."""
    padded = cv2.copyMakeBorder(image, *[pad] * 4, cv2.BORDER_CONSTANT)
    top, left = rng.integers(0, 2 * pad + 1, 2)
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


def crop_then_scale(image: np.ndarray, amount: float, rng: Rng) -> np.ndarray:
    """A window of 1 +- `amount` times the height, and as freely the width, scaled back.

    A smaller window lies anywhere in the picture, the picture anywhere in a larger one
    (1st place of Google Landmark Retrieval 2019).
    """
    size = image.shape[:2]
    window = [max(1, round(n * rng.uniform(1 - amount, 1 + amount))) for n in size]
    space = [rng.integers(0, abs(w - n) + 1) for w, n in zip(window, size, strict=True)]
    inside, border = [], []
    for w, n, before in zip(window, size, space, strict=True):
        inside.append(slice(before, before + w) if w < n else slice(None))
        border += [0, 0] if w < n else [before, w - n - before]
    part = cv2.copyMakeBorder(image[*inside], *border, cv2.BORDER_CONSTANT)
    return cv2.resize(part, size[::-1], interpolation=cv2.INTER_LINEAR)


def zoom(image: np.ndarray, factor: float) -> np.ndarray:
    """Enlarged about its centre."""
    x, y = ((n - 1) / 2 for n in image.shape[1::-1])
    return _warp(image, [[factor, 0, (1 - factor) * x], [0, factor, (1 - factor) * y]])


def shear(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rows moved sideways: the upper half to the left of an upright line, if positive."""
    slope = math.tan(math.radians(degrees))
    return _warp(image, [[1, slope, -slope * (image.shape[0] - 1) / 2], [0, 1, 0]])


def _warp(image: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    return cv2.warpAffine(image, np.array(matrix), image.shape[1::-1])


# --- brightness and colour ------------------------------------------------------------


def jitter(image: np.ndarray, amount: float, rng: Rng) -> np.ndarray:
    """Brightness, contrast and saturation by factors of 1 +- `amount` each."""
    brightness, contrast, saturation = 1 + rng.uniform(-amount, amount, 3)
    mean = sum(cv2.mean(image)) / 3
    # all three are linear: (1 - s) grey + s colour of what lies about the mean
    colour = (1 - saturation) * GREY + saturation * np.eye(3)
    shift = np.full((3, 1), brightness * (1 - contrast) * mean)
    return cv2.transform(image, np.hstack([brightness * contrast * colour, shift]))


def tone(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Pixels times 1 + contrast, plus `brightness` times the picture's mean."""
    table = np.arange(256) * (1 + contrast) + brightness * sum(cv2.mean(image)) / 3
    return cv2.LUT(image, np.rint(table).clip(0, 255).astype(np.uint8))


def photometric(image: np.ndarray, rng: Rng) -> np.ndarray:
    """SSD's distortion (Liu et al., ECCV 2016); each step at an even chance.

    Brightness +-32, saturation x 0.5..1.5, hue +-18 degrees, permuted channels, and before
    or after saturation and hue contrast x 0.5..1.5.
    """
    draws = rng.uniform(-1, 1, 4) * rng.integers(2, size=4)
    brightness, contrast, saturation, hue = (draws * (32, 0.5, 0.5, 18)).tolist()
    early, swap = rng.integers(2, size=2)
    x = (image.astype(np.float32) + brightness).clip(0, None)
    x *= 1 + contrast if early else 1
    if saturation or hue:
        hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)  # hue in degrees, saturation 0..1
        hsv[..., 0] += hue
        hsv[..., 1] = (hsv[..., 1] * (1 + saturation)).clip(0, 1)
        x = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    x *= 1 if early else 1 + contrast
    if swap:
        x = x[..., rng.permutation(3)]
    return np.rint(x).clip(0, 255).astype(np.uint8)


def clahe(image: np.ndarray, limit: float) -> np.ndarray:
    """Lightness equalised in 8 x 8 tiles, `limit` times the mean count of a bin at most."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lightness = cv2.createCLAHE(limit, (8, 8)).apply(cv2.extractChannel(lab, 0))
    return cv2.cvtColor(cv2.insertChannel(lightness, lab, 0), cv2.COLOR_LAB2RGB)


def motion_blur(image: np.ndarray, rng: Rng) -> np.ndarray:
    """The mean along a line of 3, 5 or 7 pixels in any direction."""
    half, angle = rng.integers(1, 4), rng.uniform(0, math.pi)
    way = np.array([math.sin(angle), math.cos(angle)])
    steps = np.arange(-half, half + 1)[:, None] * way / np.abs(way).max()
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    kernel[tuple(half + np.rint(steps).astype(int).T)] = 1
    return cv2.filter2D(image, -1, kernel / kernel.sum())


# --- rectangles -----------------------------------------------------------------------


def erase(image: np.ndarray, fill: Colour, rng: Rng) -> np.ndarray:
    """One rectangle of 2..20 % of the area in one colour (Zhong et al., AAAI 2020)."""
    place = _rectangle(image, (0.02, 0.2), rng)
    if place is not None:
        image = image.copy()
        image[place] = fill
    return image


def patch(image: np.ndarray, rng: Rng) -> np.ndarray:
    """A copy of one rectangle of 1..16 % of the area, half the time mirrored, elsewhere.

    After RandomPatch (Zhou et al., ICCV 2019), which pastes from earlier images; those
    depend on the worker, and the result of a row must not.
    """
    place = _rectangle(image, (0.01, 0.16), rng)
    if place is not None:
        piece = image[place][:, :: rng.choice((-1, 1))]
        h, w = piece.shape[:2]
        top, left = rng.integers(0, (image.shape[0] - h + 1, image.shape[1] - w + 1))
        image = image.copy()
        image[top : top + h, left : left + w] = piece
    return image


def _rectangle(
    image: np.ndarray, share: tuple[float, float], rng: Rng
) -> tuple[slice, slice] | None:
    """Rows and columns of one that is smaller than the picture, if 100 tries find any."""
    height, width = image.shape[:2]
    for _ in range(100):
        area, aspect = height * width * rng.uniform(*share), rng.uniform(*ASPECT)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return slice(top, top + h), slice(left, left + w)
    return None


# --- policies of libraries ------------------------------------------------------------


def augmix(image: np.ndarray, fill: Colour, rng: Rng) -> np.ndarray:
    """Three changes of severity 1, mixed (Hendrycks et al., ICLR 2020; alpha 0.1)."""
    return _apply(_augmix(fill), image, rng)


def auto_augment(image: np.ndarray, fill: Colour, rng: Rng) -> np.ndarray:
    """The policy found on ImageNet (Cubuk et al., CVPR 2019)."""
    return _apply(_policy("AutoAugment", fill), image, rng)


def rand_augment(
    image: np.ndarray, magnitude: int, fill: Colour, rng: Rng
) -> np.ndarray:
    """Two changes of a strength from 0 to 30 (Cubuk et al., NeurIPS 2020)."""
    return _apply(_policy("RandAugment", fill, magnitude=magnitude), image, rng)


def trivial_augment(image: np.ndarray, fill: Colour, rng: Rng) -> np.ndarray:
    """One change of any strength (Mueller and Hutter, ICCV 2021)."""
    return _apply(_policy("TrivialAugmentWide", fill), image, rng)


Policy = Callable[[Image.Image], Image.Image]


def _apply(policy: Policy, image: np.ndarray, rng: Rng) -> np.ndarray:
    with _seeded(rng):
        return np.array(policy(Image.fromarray(image)))


@contextmanager
def _seeded(rng: Rng) -> Iterator[None]:
    """Python's, NumPy's and torch's own generators seeded by `rng`, and put back after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed reaches GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# both libraries take seconds to import, and few recipes need them


@cache
def _policy(name: str, fill: Colour, **options: int) -> Policy:
    from torchvision.transforms import v2

    bilinear = v2.InterpolationMode.BILINEAR
    return getattr(v2, name)(fill=fill, interpolation=bilinear, **options)


@cache
def _augmix(fill: Colour) -> Policy:
    # timm's, as torchvision's changes no geometry at severity 1
    from timm.data import auto_augment as timm

    facts = {"img_mean": fill, "translate_pct": 1 / 3, "magnitude_std": math.inf}
    operations = timm.augmix_ops(1, facts, AUGMIX)
    return timm.AugMixAugment(operations, alpha=0.1, width=3, depth=1)
