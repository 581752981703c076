"""Image files -> uint8 arrays, and datasets of them that survive bad files."""

import re
import struct
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from kit.data.augment import Augment, augment
from kit.data.inputs import InputSpec, prepare

MARKER = re.compile(
    rb"\xff[^\x00\x01\xd0-\xd8\xff]"
)  # of a JPEG, with a length or the end
BROKEN = (OSError, ValueError, SyntaxError, struct.error)  # what Pillow raises


class UnreadableImage(Exception):
    """A file that is missing, empty, cut short or no image at all."""


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
