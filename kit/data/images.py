"""Image files -> uint8 arrays, and datasets of them that survive bad files."""

import io
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from kit.data import jpeg
from kit.data.augment import Augment, augment
from kit.data.inputs import InputSpec, View, framed, prepare
from kit.data.readers import Reader, UnreadableImage, file_bytes, open_reader

BROKEN = (OSError, ValueError, SyntaxError, struct.error)  # what Pillow raises
LARGEST = 178_956_970  # pixels; what Pillow refuses, so that lists and decoder agree
AVIF = (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1")  # bytes 4 to 12
REDUCED = {  # the decoder's own shrinking, by the factor
    8: cv2.IMREAD_REDUCED_COLOR_8,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    2: cv2.IMREAD_REDUCED_COLOR_2,
}


# --- files --------------------------------------------------------------------------------------


def read(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a file, as `decode` gives it."""
    return decode(file_bytes(path), str(path))


def decode(data: bytes, name: str, least: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as EXIF says; grey, CMYK and alpha become RGB.

    least: a JPEG may come out at 1/2, 1/4 or 1/8 of its sides where both keep that many
    pixels (0: never); that is faster, and differs a little from shrinking the whole picture.
    Raises UnreadableImage, for a truncated file too: some versions of OpenCV return grey
    pixels for what is missing. So do headers that claim gigabytes of pixels.
    """
    whole, flag = bool(data), cv2.IMREAD_COLOR  # other formats: left to the decoder
    orientation = 1  # that is not left to the decoder
    if jpeg.is_jpeg(data):
        header = jpeg.parse(data)
        whole, side = header.whole, min(header.height, header.width)
        huge = header.height * header.width > LARGEST
        fits = [n for n in REDUCED if 0 < least <= -(-side // n)]
        flag = REDUCED[fits[0]] if fits else flag
    else:
        huge = _claims_too_much(data)
        if data.startswith(b"\x89PNG"):
            whole = _png_is_whole(data)
        elif data[4:12] in AVIF and not huge:
            orientation = _avif_orientation(data)
            flag |= cv2.IMREAD_IGNORE_ORIENTATION  # should a later OpenCV turn it, too
    if huge:
        raise UnreadableImage(f"{name}: claims more than {LARGEST:,} pixels")
    if not whole:
        raise UnreadableImage(f"{name}: {'cut short' if data else 'empty'}")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        image = None
    if image is None:
        raise UnreadableImage(f"{name}: not an image")
    if orientation > 1:
        image = _turn_upright(image, orientation)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _avif_orientation(data: bytes) -> int:
    """Orientation 1 to 8 of EXIF, or of the container; OpenCV applies neither."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _exif_orientation(image)
    except BROKEN:
        return 1


def _exif_orientation(image: Image.Image) -> int:
    """Orientation 1 to 8 as the decoder sees it: XMP does not count, Pillow's `getexif` reads it."""
    if image.format == "TIFF":  # Pillow's size is that of the turned picture already
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
    except BROKEN:  # no EXIF after all
        return 1
    orientation = exif.get(ExifTags.Base.Orientation)
    return orientation if orientation in range(1, 9) else 1


def _turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) -> the picture as EXIF orientation 2 to 8 wants it shown."""
    if orientation >= 5:  # stored by columns
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _png_is_whole(data: bytes) -> bool:
    """Whether its chunks lead to its end; OpenCV reserves what their lengths claim."""
    at = 8
    while at + 8 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4])
    return False


def _claims_too_much(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width * image.height > LARGEST
    except Image.DecompressionBombError:
        return True
    except BROKEN:  # not for Pillow; perhaps for OpenCV
        return False


def header_size(file: Path | bytes) -> tuple[int, int]:
    """Height and width as shown, after EXIF rotation; -1, -1 if unreadable.

    From the header alone: a file that is cut short later has its size.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
            turned = _exif_orientation(image) >= 5
    except (*BROKEN, Image.DecompressionBombError):
        return -1, -1
    return (width, height) if turned else (height, width)


def thumbnail(file: Path | bytes, side: int = 160) -> np.ndarray:
    """(h, w, 3) uint8 RGB, longest side at most `side`; grey where it is unreadable."""
    try:
        image = decode(file, "bytes") if isinstance(file, bytes) else read(file)
    except UnreadableImage:
        return np.full((side, side, 3), 128, np.uint8)
    scale = min(1.0, side / max(image.shape[:2]))
    width, height = (max(1, round(n * scale)) for n in image.shape[1::-1])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


# --- datasets -----------------------------------------------------------------------------------


class _Images(Dataset):
    """Rows of a list: where their bytes are, and which size the list gives them."""

    def __init__(
        self,
        source: Path | Reader,
        paths: np.ndarray,
        specs: Sequence[InputSpec],
        sizes: np.ndarray | None,
    ) -> None:
        for spec in specs:
            if spec.template and sizes is None:
                raise ValueError(
                    f"template {spec.template} takes its shapes from the list's heights "
                    "and widths; give sizes"
                )
        self.reader = open_reader(source) if isinstance(source, Path) else source
        self.paths, self.sizes = packed(paths), sizes

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> str:
        return self.paths[row].decode()

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of the row in the list; -1, -1: unknown."""
        height, width = (-1, -1) if self.sizes is None else self.sizes[row]
        return int(height), int(width)


def packed(paths: np.ndarray) -> np.ndarray:
    """(N,) text -> (N,) bytes: a quarter of NumPy's text, and no object for a fork to touch."""
    if paths.dtype.kind == "S":
        return paths
    parts = [  # text of one width, for all rows at once, would weigh four times the result
        np.char.encode(paths[start : start + 65_536].astype(str), "utf-8")
        for start in range(0, max(1, len(paths)), 65_536)
    ]
    return np.concatenate(parts)


class TrainImages(_Images):
    """(number, row) -> uint8 image, label, row if unreadable (else -1), whether it is trusted.

    The augmentation is a function of (seed, number, row), not of the worker. In an unreadable
    file's place stands the next readable row of its shape, so that a batch keeps its size and
    shape on every rank. Pixels leave as uint8: the device normalises them. `fast` changes
    them by one or two levels of 255 on average, less than 2021's unfiltered shrinking.
    """

    def __init__(
        self,
        source: Path | Reader,
        paths: np.ndarray,  # (N,) text
        labels: np.ndarray,  # (N,) int64
        spec: InputSpec,
        how: Augment,
        seed: int,
        *,
        trusted: np.ndarray | None = None,  # (N,) bool: is the label; None: all are
        sizes: np.ndarray | None = None,  # (N, 2) height and width in the list
        fast: bool = True,  # decode large JPEGs at a fraction, shrink by a faster rule
    ) -> None:
        super().__init__(source, paths, [spec], sizes)
        self.spec, self.labels, self.trusted = spec, labels, trusted
        self.how, self.seed, self.fast = how, seed, fast

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int, int, bool]:
        number, row = key
        image, at = self.readable(row)
        if self.fast and self.how.crop == 1:  # a random crop wants the picture as it is
            image = shrunk(framed(image, self.spec), self.shape(row))
        rng = np.random.default_rng((self.seed, number, row))
        image = augment(image, self.spec, self.how, rng, **self.listed(row))
        return image, *self.facts(row, at)

    def shape(self, row: int) -> tuple[int, int]:
        """(h, w) of the row's input, by the list's size: pictures of a batch share it."""
        return self.spec.shape(*self.size(row))

    def listed(self, row: int) -> dict[str, tuple[int, int]]:
        """The shape as an argument where the list decides it, and not the picture."""
        return {"shape": self.shape(row)} if self.spec.template else {}

    def facts(self, row: int, at: int) -> tuple[int, int, bool]:
        """Label, unreadable row or -1, and trust, where row `at` stands for `row`."""
        trusted = self.trusted is None or bool(self.trusted[at])
        return int(self.labels[at]), -1 if at == row else row, trusted

    def readable(self, row: int) -> tuple[Any, int]:
        """What `load` makes of the row, or of the next readable row of its shape; that row."""
        shape = self.shape(row)
        for step in range(len(self)):
            at = (row + step) % len(self)
            if self.shape(at) != shape:
                continue
            try:
                path = self.path(at)
                return self.load(self.reader.read(path), path, shape), at
            except UnreadableImage:
                continue
        raise UnreadableImage(
            f"{self.reader.root}: none of the list's images can be read"
        )

    def load(self, data: bytes, name: str, shape: tuple[int, int]) -> np.ndarray:
        return decode(data, name, least_side(shape, self.how) if self.fast else 0)


def least_side(shape: tuple[int, int], how: Augment) -> int:
    """Pixels that a side must keep so that a random crop is not smaller than the input."""
    # of the shorter side: both sides of a square's crop where it is smallest and longest
    smallest = max(how.crop, math.sqrt(0.75 * how.crop))
    return math.ceil(max(shape) / smallest) if smallest else 0


def shrunk(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) -> (h, w, 3), bilinear, if no side grows or more than halves; else unchanged.

    So every pixel still counts, in a sixth of the time of averaging over areas.
    """
    if all(new <= old < 2 * new for old, new in zip(image.shape, shape, strict=False)):
        return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return image


class EvalImages(_Images):
    """Row -> a uint8 image for each view, and whether it could be read (zeros where not).

    The file is read and decoded once; each view is resized from the decoded picture.
    """

    def __init__(
        self,
        source: Path | Reader,
        paths: np.ndarray,
        views: Sequence[View],
        *,
        sizes: np.ndarray | None = None,  # (N, 2) height and width in the list
        fast: bool = False,  # decode large JPEGs at a fraction; changes pixels a little
    ) -> None:
        super().__init__(source, paths, [view.spec for view in views], sizes)
        self.views, self.fast = tuple(views), fast

    def __getitem__(self, row: int) -> tuple[list[np.ndarray], bool]:
        path, size = self.path(row), self.size(row)
        shapes = [view.shape(*size) for view in self.views]
        least = max(map(max, shapes)) if self.fast else 0
        try:
            image = decode(self.reader.read(path), path, least)
        except UnreadableImage:
            return [np.zeros((3, *shape), np.uint8) for shape in shapes], False
        both = zip(self.views, shapes, strict=True)
        return [prepare(image, view.spec, shape) for view, shape in both], True


def in_worker(_: int) -> None:
    """One thread a loader worker: they share the cores with the network."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
