"""Boxes cut out of pictures, as files that lose nothing."""

from pathlib import Path

import cv2

from kit import files
from kit.data import images

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def cut(source: Path, box: Box, target: Path) -> Path:
    """Writes what of a picture is inside a box, whose sides are rounded to whole pixels, as PNG.

    The picture is turned as EXIF says before it is cut. A box that has no pixel of it is refused;
    raises UnreadableImage where there is no picture.
    """
    image = images.read(source)
    height, width = image.shape[:2]
    left, top, right, bottom = map(round, box)
    part = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if not part.size:
        raise ValueError(
            f"{source}: box {', '.join(f'{side:g}' for side in box)} is not in its "
            f"{width} x {height} pixels"
        )
    data = cv2.imencode(".png", cv2.cvtColor(part, cv2.COLOR_RGB2BGR))[1]
    with files.replacing(target) as temporary:
        temporary.write_bytes(data.tobytes())
    return target
