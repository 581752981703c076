"""Random changes of training images: (H, W, 3) uint8 RGB in, a network's (3, size, size) out."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from kit.data.inputs import InputSpec, framed, planar, to_square


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image; every default but the flip is off."""

    flip: float = 0.5  # probability of mirroring left and right
    crop: float = 1.0  # smallest share of the area that a random crop keeps
    pad: int = 0  # zeros on each side before a random crop, pixels (2021)
    jitter: float = 0.0  # largest change of brightness, contrast, saturation
    erase: float = 0.0  # probability of a blank rectangle of 2..20 % (2021)


def augment(
    image: np.ndarray, spec: InputSpec, how: Augment, rng: np.random.Generator
) -> np.ndarray:
    """(H, W, 3) RGB -> (3, size, size) uint8, changed at random by `rng` alone."""
    image = framed(image, spec)
    if how.crop < 1:
        image = _random_crop(image, how.crop, rng)
    image = to_square(image, spec.size)
    if how.pad:
        padded = cv2.copyMakeBorder(
            image, *[how.pad] * 4, cv2.BORDER_CONSTANT, value=(0, 0, 0)
        )
        top, left = rng.integers(0, 2 * how.pad + 1, 2)
        image = padded[top : top + spec.size, left : left + spec.size]
    if rng.random() < how.flip:
        image = image[:, ::-1]
    if how.jitter:
        image = _jitter(image, how.jitter, rng)
    if rng.random() < how.erase:
        image = _erase(image, spec, rng)
    return planar(image, spec)


def _random_crop(
    image: np.ndarray, smallest: float, rng: np.random.Generator
) -> np.ndarray:
    height, width = image.shape[:2]
    area = height * width * rng.uniform(smallest, 1)
    # within 3/4..4/3 where that much area fits into the picture, else as near as it does
    narrow, wide = area / height**2, width**2 / area
    low, high = np.clip((3 / 4, 4 / 3), narrow, wide)
    aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
    h = min(height, max(1, round(math.sqrt(area / aspect))))
    w = min(width, max(1, round(math.sqrt(area * aspect))))
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    return image[top : top + h, left : left + w]


def _jitter(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    brightness, contrast, saturation = 1 + rng.uniform(-amount, amount, 3)
    x = image.astype(np.float32) * brightness
    x = (x - x.mean()) * contrast + x.mean()
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
    x = (x - grey[..., None]) * saturation + grey[..., None]
    return x.clip(0, 255).astype(np.uint8)


def _erase(image: np.ndarray, spec: InputSpec, rng: np.random.Generator) -> np.ndarray:
    size = spec.size
    for _ in range(100):  # until a rectangle fits
        area = size * size * rng.uniform(0.02, 0.2)
        aspect = rng.uniform(0.3, 3.33)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < size and 0 < w < size:
            top, left = rng.integers(0, size - h + 1), rng.integers(0, size - w + 1)
            colour = spec.mean if spec.colour == "rgb" else spec.mean[::-1]
            image = image.copy()
            image[top : top + h, left : left + w] = np.round(np.array(colour) * 255)
            break
    return image
