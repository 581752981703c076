"""Image files -> uint8 arrays: decode, resize, augment; a dataset that survives bad files.

What a network is fed is decided by its `InputSpec`, saved with the weights; training, extraction
and submission read it only from there.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

RESIZE = ("squash", "crop")
COLOUR = ("rgb", "bgr")
MARKER = re.compile(
    rb"\xff[^\x00\x01\xd0-\xd8\xff]"
)  # of a JPEG, with a length or the end
BROKEN = (OSError, ValueError, SyntaxError, struct.error)  # what Pillow raises
SLIVER = 16  # a side longer than this many times the other is squashed whatever the rule says


class UnreadableImage(Exception):
    """A file that is missing, empty, cut short or no image at all."""


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


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image; every default but the flip is off."""

    flip: float = 0.5  # probability of mirroring left and right
    crop: float = 1.0  # smallest share of the area that a random crop keeps
    pad: int = 0  # zeros on each side before a random crop, pixels (2021)
    jitter: float = 0.0  # largest change of brightness, contrast, saturation
    erase: float = 0.0  # probability of a blank rectangle of 2..20 % (2021)


# --- files --------------------------------------------------------------------------------------


def read(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as EXIF says; grey, CMYK and alpha become RGB.

    Raises UnreadableImage, for a truncated file too: some versions of OpenCV return grey
    pixels for what is missing.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from None
    if not _whole(data):
        raise UnreadableImage(f"{path}: {'cut short' if data else 'empty'}")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # a header that claims an absurd size
        image = None
    if image is None:
        raise UnreadableImage(f"{path}: not an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _whole(data: bytes) -> bool:
    """Whether a JPEG or PNG has its end; other formats are left to the decoder."""
    if data.startswith(b"\xff\xd8"):
        at = 2
        while found := MARKER.search(data, at):
            if data[found.end() - 1] == 0xD9:  # end of image
                return True
            # skips the segment, and with it a thumbnail's markers; scan data has none
            at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
        return False
    if data.startswith(b"\x89PNG"):
        return b"IEND" in data[-64:]
    return bool(data)


def header_size(path: Path) -> tuple[int, int]:
    """Height and width as shown, after EXIF rotation; -1, -1 if unreadable.

    From the header alone: a file that is cut short later has its size.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # the general method: that of PNG decodes the picture first
            exif = Image.Image.getexif(image)
            turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (*BROKEN, Image.DecompressionBombError):
        return -1, -1
    return (width, height) if turned else (height, width)


def thumbnail(path: Path, side: int = 160) -> np.ndarray:
    """(h, w, 3) uint8 RGB, longest side at most `side`; grey where it is unreadable."""
    try:
        image = read(path)
    except UnreadableImage:
        return np.full((side, side, 3), 128, np.uint8)
    scale = min(1.0, side / max(image.shape[:2]))
    width, height = (max(1, round(n * scale)) for n in image.shape[1::-1])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


# --- pixels -------------------------------------------------------------------------------------


def _to_square(image: np.ndarray, size: int) -> np.ndarray:
    # area averaging when shrinking (no aliasing), bilinear when enlarging
    shrinking = min(image.shape[:2]) >= size
    return cv2.resize(
        image,
        (size, size),
        interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR,
    )


def prepare(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """(H, W, 3) RGB -> (3, size, size) uint8 as the network expects it, nothing random."""
    return _channels(_to_square(_framed(image, spec), spec.size), spec)


def augment(
    image: np.ndarray, spec: InputSpec, how: Augment, rng: np.random.Generator
) -> np.ndarray:
    """(H, W, 3) RGB -> (3, size, size) uint8, changed at random by `rng` alone."""
    image = _framed(image, spec)
    if how.crop < 1:
        image = _random_crop(image, how.crop, rng)
    image = _to_square(image, spec.size)
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
    return _channels(image, spec)


def _framed(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """What the resize rule looks at: all of it, or the central square."""
    height, width = image.shape[:2]
    side = min(height, width)
    if spec.resize == "squash" or max(height, width) > SLIVER * side:
        return image
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


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


def _channels(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    if spec.colour == "bgr":
        image = image[..., ::-1]
    return np.ascontiguousarray(image.transpose(2, 0, 1))


# --- datasets -----------------------------------------------------------------------------------


class TrainImages(Dataset):
    """(epoch, row) -> uint8 image, label, and the row if its file was unreadable (else -1).

    The augmentation is a function of (seed, epoch, row), not of the worker. In an unreadable
    file's place stands the next readable row, so that a batch keeps its size on every rank.
    """

    def __init__(
        self,
        root: Path,
        paths: np.ndarray,  # (N,) text
        labels: np.ndarray,  # (N,) int64
        spec: InputSpec,
        how: Augment,
        seed: int,
    ) -> None:
        self.root, self.spec, self.how, self.seed = root, spec, how, seed
        self.paths = np.char.encode(
            paths.astype(str), "utf-8"
        )  # bytes: no object for a fork to touch
        self.labels = labels

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int, int]:
        epoch, row = key
        rng = np.random.default_rng((self.seed, epoch, row))
        for step in range(len(self.paths)):
            at = (row + step) % len(self.paths)
            try:
                image = read(self.root / self.paths[at].decode())
            except UnreadableImage:
                continue
            image = augment(image, self.spec, self.how, rng)
            return image, int(self.labels[at]), row if step else -1
        raise UnreadableImage(f"{self.root}: none of the list's images can be read")


class EvalImages(Dataset):
    """Row -> uint8 image and whether it could be read (zeros where not)."""

    def __init__(self, root: Path, paths: np.ndarray, spec: InputSpec) -> None:
        self.root, self.spec = root, spec
        self.paths = np.char.encode(paths.astype(str), "utf-8")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, bool]:
        try:
            return prepare(read(self.root / self.paths[row].decode()), self.spec), True
        except UnreadableImage:
            return np.zeros((3, self.spec.size, self.spec.size), np.uint8), False


def in_worker(_: int) -> None:
    """One thread a loader worker: they share the cores with the network."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
