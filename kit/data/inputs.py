"""How pixels become a network's input: shape, resize rule, channels, normalisation.

An `InputSpec` is saved with the weights; training, extraction and submission read it only from
there.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from kit import config
from kit.data import templates

RESIZE = ("squash", "crop")
COLOUR = ("rgb", "bgr")
SLIVER = 16  # a side longer than this many times the other is squashed whatever the rule says


@dataclass(frozen=True)
class InputSpec:
    """How pixels become a network's input."""

    size: int = 224  # side of the square, pixels
    # S2, L2, ...: shapes by aspect ratio beside the square (2019); longest: the image's own,
    # its longest side being `size`; bounded: the same where it is larger
    template: str = ""
    resize: str = "squash"  # whole image, aspect lost; "crop": its central square
    colour: str = "rgb"  # order of the channels, or "bgr"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        config.check(
            self, least={"size": 1}, choices={"resize": RESIZE, "colour": COLOUR}
        )
        if self.template and self.template not in templates.NAMES:
            listed = ", ".join(templates.NAMES)
            raise ValueError(f"template {self.template!r} is not one of {listed}")
        if self.template and self.resize != "squash":
            raise ValueError(
                f"template {self.template} takes the whole image: "
                f"resize is squash with it, not {self.resize}"
            )

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the input that an image becomes; -1, -1 for an unknown one."""
        if self.template:
            return templates.shape(self.template, self.size, height, width)
        return self.size, self.size

    def group(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """(N,) images of one number have one shape."""
        if self.template:
            return templates.groups(self.template, heights, widths, self.size)
        return np.zeros(len(heights), np.int64)

    def normalise(self, batch: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> float32, mean 0 and deviation 1 of the pretraining set."""
        mean, std = (
            torch.tensor(values, device=batch.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        x = batch.to(memory_format=torch.channels_last).float()
        return (x / 255 - mean) / std


@dataclass(frozen=True)
class View:
    """An input at a scale: the sides that its spec makes of an image, times `scale`."""

    spec: InputSpec
    scale: float = 1.0  # 1 leaves the sides as they are
    multiple: int = 1  # a scaled side goes down to a multiple of it
    least: int = 1  # and not below

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the input that an image becomes; -1, -1 for an unknown one."""
        sides = self.spec.shape(height, width)
        if self.scale == 1:
            return sides
        scaled = (int(side * self.scale) for side in sides)
        return tuple(
            max(self.least, side // self.multiple * self.multiple) for side in scaled
        )


def prepare(
    image: np.ndarray, spec: InputSpec, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """(H, W, 3) RGB -> (3, h, w) uint8 as the network expects it, nothing random.

    shape: of the batch that it joins; None: what `spec` makes of the image's own.
    """
    shape = shape or spec.shape(*image.shape[:2])
    return planar(resized(framed(image, spec), shape), spec)


def framed(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """What the resize rule looks at: all of it, or the central square."""
    height, width = image.shape[:2]
    side = min(height, width)
    if spec.resize == "squash" or max(height, width) > SLIVER * side:
        return image
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def resized(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) -> (h, w, 3), whatever its aspect ratio."""
    height, width = shape
    # area averaging when shrinking (no aliasing), bilinear when enlarging
    shrinking = image.shape[0] >= height and image.shape[1] >= width
    return cv2.resize(
        image,
        (width, height),
        interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR,
    )


def planar(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    if spec.colour == "bgr":
        image = image[..., ::-1]
    return np.ascontiguousarray(image.transpose(2, 0, 1))
