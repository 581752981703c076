"""Random changes of training images: (H, W, 3) uint8 RGB in, a network's (3, h, w) out."""

import dataclasses
import math
from dataclasses import dataclass

import cv2
import numpy as np

from kit import config
from kit.data import pixels
from kit.data.inputs import InputSpec, framed, planar, resized


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image, in order; every default but the flip is off.

    A probability or an amount of 0 is off. Years: that year's Google Landmark Retrieval, 2nd
    place of 2021 and 1st of 2019.
    """

    crop: float = 1.0  # smallest share of the area that a random crop keeps
    flip: float = 0.5  # probability of mirroring left and right
    pad: int = 0  # zeros on each side before a random crop, pixels (2021: 4 % of size)
    # 2021
    jitter: float = 0.0  # largest change of brightness, contrast, saturation (0.1)
    jitter_probability: float = 1.0
    photometric: float = 0.0  # probability of SSD's distortion of colours
    augmix: float = 0.0  # probability of AugMix
    patch: float = 0.0  # probability of a patch copied within the picture
    zoom: float = 0.0  # largest change of scale about the centre (0.1)
    zoom_probability: float = 1.0
    # 2019
    shear: float = 0.0  # largest angle of shearing, degrees
    shear_probability: float = 0.5
    brightness: float = 0.0  # largest change, as a share of the picture's mean
    contrast: float = 0.0  # largest change, as a share
    tone_probability: float = 0.5  # of changing brightness and contrast, both at once
    motion_blur: float = 0.0  # probability of blurring along a line
    clahe: float = 0.0  # probability of equalising lightness in tiles
    crop_scale: float = 0.0  # largest change of height, and of width, of what is seen
    # policies of single changes
    auto_augment: float = 0.0  # probability of the one found on ImageNet
    rand_augment: float = 0.0  # probability of two changes
    rand_magnitude: int = 9  # their strength, 0 to 30
    trivial_augment: float = 0.0  # probability of one change of any strength
    # last
    erase: float = 0.0  # probability of a blank rectangle of 2..20 % (2021: 1)

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        most = dict.fromkeys(names, 1) | {"pad": math.inf, "rand_magnitude": 30}
        most |= {"shear": 45, "zoom": 0.9, "crop_scale": 0.9}
        config.check(self, least=dict.fromkeys(names, 0), most=most)


SOFT = Augment(flip=0, crop_scale=0.2, brightness=0.1)
MIDDLE = Augment(flip=0, crop_scale=0.3, shear=4, brightness=0.1, contrast=0.1)


def augment(
    image: np.ndarray,
    spec: InputSpec,
    how: Augment,
    rng: np.random.Generator,
    shape: tuple[int, int] | None = None,
) -> np.ndarray:
    """(H, W, 3) RGB -> (3, h, w) uint8, changed at random by `rng` alone.

    shape: of the batch that it joins; None: what `spec` makes of the image's own. All but the random crop sees the resized picture, in the order of the two winning systems.
    """
    shape = shape or spec.shape(*image.shape[:2])
    image = framed(image, spec)
    if how.crop < 1:
        image = pixels.random_crop(image, how.crop, rng)
    image = resized(image, shape)
    fill = _mean_colour(spec)
    if _happens(how.flip, rng):
        image = cv2.flip(image, 1)
    if how.pad:
        image = pixels.pad_and_crop(image, how.pad, rng)
    if _happens(how.photometric, rng):
        image = pixels.photometric(image, rng)
    if how.jitter and _happens(how.jitter_probability, rng):
        image = pixels.jitter(image, how.jitter, rng)
    if _happens(how.augmix, rng):
        image = pixels.augmix(image, fill, rng)
    if _happens(how.patch, rng):
        image = pixels.patch(image, rng)
    if how.zoom and _happens(how.zoom_probability, rng):
        image = pixels.zoom(image, 1 + rng.uniform(-how.zoom, how.zoom))
    if how.shear and _happens(how.shear_probability, rng):
        image = pixels.shear(image, rng.uniform(-how.shear, how.shear))
    if (how.brightness or how.contrast) and _happens(how.tone_probability, rng):
        most = np.array([how.brightness, how.contrast])
        image = pixels.tone(image, *rng.uniform(-most, most))
    if _happens(how.motion_blur, rng):
        image = pixels.motion_blur(image, rng)
    if _happens(how.clahe, rng):
        image = pixels.clahe(image, rng.uniform(1, 4))
    if how.crop_scale:
        image = pixels.crop_then_scale(image, how.crop_scale, rng)
    if _happens(how.auto_augment, rng):
        image = pixels.auto_augment(image, fill, rng)
    if _happens(how.rand_augment, rng):
        image = pixels.rand_augment(image, how.rand_magnitude, fill, rng)
    if _happens(how.trivial_augment, rng):
        image = pixels.trivial_augment(image, fill, rng)
    if _happens(how.erase, rng):
        image = pixels.erase(image, fill, rng)
    return planar(image, spec)


def _happens(probability: float, rng: np.random.Generator) -> bool:
    """Draws only where it matters: what is off or certain moves no other draw."""
    return probability >= 1 or (probability > 0 and rng.random() < probability)


def _mean_colour(spec: InputSpec) -> pixels.Colour:
    """RGB, what normalisation makes 0."""
    mean = spec.mean if spec.colour == "rgb" else spec.mean[::-1]
    return tuple(round(255 * share) for share in mean)
