"""Input shapes by aspect ratio: images of one group share a shape, and with it a batch.

1st place of Google Landmark Retrieval 2019. Groups go from landscape to portrait. Those of `FREE`
have none: an image keeps its aspect ratio, and its longest side is the size (`LONGEST`) or at most
the size (`BOUNDED`, as on Oxford and Paris: what is smaller stays as it is).
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
LONGEST, BOUNDED = "longest", "bounded"
FREE = (LONGEST, BOUNDED)
NAMES = (*TEMPLATES, *FREE)
BOUNDS = {3: (0.77, 1.33), 5: (0.67, 0.77, 1.33, 1.5)}  # of height / width


def groups(
    template: str, heights: np.ndarray, widths: np.ndarray, size: int = 0
) -> np.ndarray:
    """(N,) the group of each image, a bound belongs to the taller one; unknown: the square's.

    size: of `FREE` ones, whose groups are the shapes that come out.
    """
    heights, widths = np.asarray(heights), np.asarray(widths)
    known = (heights > 0) & (widths > 0)
    if template in FREE:
        h, w = _free(template, size, heights, widths)
        return np.where(known, h * (size + 1) + w, size * (size + 2))
    aspect = np.where(known, heights, 1) / np.where(known, widths, 1)
    return np.digitize(aspect, BOUNDS[len(TEMPLATES[template])])


def shape(template: str, size: int, height: int, width: int) -> tuple[int, int]:
    """(h, w) of the input that an image becomes.

    size: side of the square; another than the template's own scales all of its shapes, to
    multiples of 32.
    """
    if template in FREE:
        if height <= 0 or width <= 0:
            return size, size
        h, w = _free(template, size, np.array(height), np.array(width))
        return int(h), int(w)
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


def _free(
    template: str, size: int, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sides of which the longer one is `size`, or at most that; the other is at least 1."""
    scale = size / np.maximum(np.maximum(heights, widths), 1)
    if template == BOUNDED:
        scale = np.minimum(scale, 1)
    h, w = (np.rint(sides * scale).astype(np.int64) for sides in (heights, widths))
    return h.clip(1), w.clip(1)
