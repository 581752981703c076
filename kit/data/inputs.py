"""How pixels become a network's input: resize rule, channels, normalisation.

An `InputSpec` is saved with the weights; training, extraction and submission read it only from
there.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

RESIZE = ("squash", "crop")
COLOUR = ("rgb", "bgr")
SLIVER = 16  # a side longer than this many times the other is squashed whatever the rule says


@dataclass(frozen=True)
class InputSpec:
    """How pixels become a network's input."""

    size: int = 224  # side of the square, pixels
    resize: str = "squash"  # whole image, aspect lost; "crop": its central square
    colour: str = "rgb"  # order of the channels, or "bgr"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name, choices in (("resize", RESIZE), ("colour", COLOUR)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}"
                )

    def normalise(self, batch: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> float32, mean 0 and deviation 1 of the pretraining set."""
        mean, std = (
            torch.tensor(values, device=batch.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        x = batch.to(memory_format=torch.channels_last).float()
        return (x / 255 - mean) / std


def prepare(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """(H, W, 3) RGB -> (3, size, size) uint8 as the network expects it, nothing random."""
    return planar(to_square(framed(image, spec), spec.size), spec)


def framed(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """What the resize rule looks at: all of it, or the central square."""
    height, width = image.shape[:2]
    side = min(height, width)
    if spec.resize == "squash" or max(height, width) > SLIVER * side:
        return image
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def to_square(image: np.ndarray, size: int) -> np.ndarray:
    # area averaging when shrinking (no aliasing), bilinear when enlarging
    shrinking = min(image.shape[:2]) >= size
    return cv2.resize(
        image,
        (size, size),
        interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR,
    )


def planar(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    if spec.colour == "bgr":
        image = image[..., ::-1]
    return np.ascontiguousarray(image.transpose(2, 0, 1))
