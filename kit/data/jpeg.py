"""What the markers of a JPEG file say, without its pixels (ITU-T T.81, annex B)."""

import io
import re
import struct
from dataclasses import dataclass

from PIL import ExifTags, Image

# with a length or the end: neither a filled byte nor a restart within the scan
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the others are tables
END, EXIF, ADOBE = 0xD9, 0xE1, 0xEE
# what Pillow raises
BROKEN = (
    *(OSError, ValueError, SyntaxError, struct.error),
    Image.DecompressionBombError,
)


@dataclass
class Header:
    """What a decoder is told before it decodes."""

    height: int = 0  # as stored, before EXIF rotation; 0: no frame header
    width: int = 0
    components: bytes = b""  # identifier of each
    transform: int = -1  # Adobe's: 0 is RGB or CMYK, 1 YCbCr, 2 YCCK; -1: not told
    exif: bool = False
    whole: bool = False  # the end of the image is there

    @property
    def ordinary(self) -> bool:
        """Grey or YCbCr: what every decoder turns into the same colours."""
        told = self.transform == -1 and self.components != b"RGB"
        three = len(self.components) == 3 and (told or self.transform == 1)
        return len(self.components) == 1 or three


def is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def parse(data: bytes) -> Header:
    """Walks the markers to the end of the image; never fails on a damaged file."""
    found = Header()
    at = 2
    while marker := MARKER.search(data, at):
        kind, start = data[marker.end() - 1], marker.end()
        if kind == END:
            found.whole = True
            break
        # skips the segment, and with it a thumbnail's markers; scan data has none
        at = start + int.from_bytes(data[start : start + 2])
        if kind in FRAMES and not found.components:
            found.height = int.from_bytes(data[start + 3 : start + 5])
            found.width = int.from_bytes(data[start + 5 : start + 7])
            found.components = data[start + 8 : at : 3]
        elif kind == EXIF and data.startswith(b"Exif\0\0", start + 2):
            found.exif = True
        elif kind == ADOBE and data.startswith(b"Adobe", start + 2):
            found.transform = data[start + 13] if start + 13 < len(data) else -1
    return found


def turned(data: bytes) -> bool:
    """Whether EXIF tells to show the picture in another way than it is stored."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except BROKEN:
        return True  # nobody knows: left to the careful decoder
