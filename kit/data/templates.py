"""Input shapes by aspect ratio: images of one group share a shape, and with it a batch.

1st place of Google Landmark Retrieval 2019. Groups go from landscape to portrait.
"""

import numpy as np

TEMPLATES = {  # (width, height) of each group, pixels
    "SS": ((384, 256), (256, 256), (256, 384)),
    "S": ((512, 384), (448, 448), (384, 512)),
    "M": ((800, 608), (704, 704), (608, 800)),
    "L": ((800, 608), (800, 800), (608, 800)),
    "SS2": ((480, 320), (480, 352), (384, 384), (352, 480), (320, 480)),
    "S2": ((512, 352), (512, 384), (448, 448), (384, 512), (352, 512)),
    "SM2": ((736, 512), (704, 544), (608, 608), (544, 704), (512, 736)),
    "M2": ((800, 544), (800, 608), (704, 704), (608, 800), (544, 800)),
    "L2": ((800, 544), (800, 608), (800, 800), (608, 800), (544, 800)),
}
BOUNDS = {3: (0.77, 1.33), 5: (0.67, 0.77, 1.33, 1.5)}  # of height / width


def groups(template: str, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(N,) the group of each image, a bound belongs to the taller one; unknown: the square's."""
    heights, widths = np.asarray(heights), np.asarray(widths)
    known = (heights > 0) & (widths > 0)
    aspect = np.where(known, heights, 1) / np.where(known, widths, 1)
    return np.digitize(aspect, BOUNDS[len(TEMPLATES[template])])


def shape(template: str, size: int, height: int, width: int) -> tuple[int, int]:
    """(h, w) of the input that an image becomes.

    size: side of the square; another than the template's own scales all of its shapes, to
    multiples of 32.
    """
    shapes = TEMPLATES[template]
    w, h = shapes[int(groups(template, height, width))]
    square = square_side(template)
    if size == square:
        return h, w
    return tuple(max(1, round(side * size / square / 32)) * 32 for side in (h, w))


def square_side(template: str) -> int:
    """Pixels of the group in the middle."""
    shapes = TEMPLATES[template]
    return shapes[len(shapes) // 2][0]
