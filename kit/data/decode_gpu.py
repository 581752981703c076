"""JPEG bytes -> a network's input on the device: loaders only read, the device does the rest.

`JpegImages` stands for TrainImages where a GPU decodes (torchvision's nvJPEG): its loader hands
over bytes and what chance decided, `on_device` makes the batch of them. Any device will do.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kit.data import jpeg, pixels
from kit.data.augment import Augment
from kit.data.images import TrainImages, decode
from kit.data.inputs import InputSpec, framed
from kit.data.readers import UnreadableImage

FIELDS = ("flip", "pad", "erase")  # of Augment: what is cheap for a whole batch


class Changes(NamedTuple):
    """What chance decided for one image, or for each of a batch."""

    flip: Any
    top: Any  # of the crop from the padded picture
    left: Any
    erased: Any  # (4,) top, left, height and width of the rectangle, zeros where none


class Jpegs(NamedTuple):
    """A batch as the loader hands it over."""

    data: list[bytes]
    rows: Tensor  # (B,)
    labels: Tensor  # (B,)
    unreadable: Tensor  # (B,) the row if another one stands in its place, else -1
    trusted: Tensor  # (B,) bool
    changes: Changes
    shape: tuple[int, int]  # of the input, the same for all


class Batch(NamedTuple):
    """A batch as the network takes it; the first four as TrainImages has them."""

    images: Tensor  # (B, 3, h, w) uint8
    labels: Tensor
    unreadable: Tensor
    trusted: Tensor
    fallbacks: int  # files that the CPU decoded


class JpegImages(TrainImages):
    """(number, row) -> what `collate` makes a batch of; the same draws as in TrainImages."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for field in fields(Augment):
            name, off = field.name, field.default
            if name not in FIELDS and getattr(self.how, name) != off:
                raise ValueError(
                    f"{name} is not done on the device (there: {', '.join(FIELDS)}); "
                    f"decode on the CPU, or leave it at {off}"
                )

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        number, row = key
        data, at = self.readable(row)
        shape = self.shape(row)
        rng = np.random.default_rng((self.seed, number, row))
        return data, row, *self.facts(row, at), draw(self.how, shape, rng), shape

    def load(self, data: bytes, name: str, shape: tuple[int, int]) -> bytes:
        """The bytes, looked at as far as the headers go; what is no JPEG is decoded."""
        if not jpeg.is_jpeg(data) or not jpeg.parse(data).whole:
            decode(data, name)
        return data


def draw(how: Augment, shape: tuple[int, int], rng: np.random.Generator) -> Changes:
    """The draws of kit.data.augment, in its order."""
    flip = _happens(how.flip, rng)
    top = left = how.pad
    if how.pad:
        top, left = (int(n) for n in rng.integers(0, 2 * how.pad + 1, 2))
    erased = np.zeros(4, np.int64)
    if _happens(how.erase, rng):
        seen = pixels.erase(np.zeros((*shape, 1), np.uint8), (1,), rng)[..., 0]
        if seen.any():
            down, across = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            erased[:] = down[0], across[0], len(down), len(across)
    return Changes(flip, top, left, erased)


def _happens(probability: float, rng: np.random.Generator) -> bool:
    return probability >= 1 or (probability > 0 and rng.random() < probability)


def collate(items: Sequence[tuple]) -> Jpegs:
    """Rows of JpegImages that share a shape -> a batch of bytes (a DataLoader's collate_fn)."""
    data, rows, labels, unreadable, trusted, changes, shapes = zip(*items, strict=True)
    if len(set(shapes)) > 1:
        raise ValueError(
            f"a batch with inputs of several shapes: {sorted(set(shapes))}"
        )
    numbers = (torch.tensor(part) for part in (rows, labels, unreadable, trusted))
    drawn = (torch.as_tensor(np.array(part)) for part in zip(*changes, strict=True))
    return Jpegs(list(data), *numbers, Changes(*drawn), shapes[0])


def on_device(
    batch: Jpegs, spec: InputSpec, how: Augment, device: torch.device
) -> Batch:
    """The batch's input. An image that no decoder takes gives its place to the next one's."""
    images, fallbacks = decode_batch(batch.data, device)
    good = [n for n, image in enumerate(images) if image is not None]
    if not good:
        raise UnreadableImage(f"rows {batch.rows.tolist()}: none can be decoded")
    bad = [n for n, image in enumerate(images) if image is None]
    taken = list(range(len(images)))
    unreadable = batch.unreadable.clone()
    for n in bad:
        taken[n] = next((m for m in good if m > n), good[0])
        unreadable[n] = batch.rows[n]
    shape = tuple(batch.shape)  # pinning memory makes a list of it
    x = torch.stack([_resized(images[n], shape, spec) for n in taken])
    x = change(x, batch.changes, how.pad, spec)
    return Batch(x, batch.labels[taken], unreadable, batch.trusted[taken], fallbacks)


def decode_batch(
    data: Sequence[bytes], device: torch.device
) -> tuple[list[Tensor | None], int]:
    """(3, H, W) uint8 RGB of each file on `device`, None where no decoder takes it.

    What torchvision's decoder refuses or would show otherwise (no JPEG, CMYK, cut short, turned
    by EXIF) is decoded on the CPU, one by one; the second result counts these. The device's
    arithmetic differs from the CPU's by a few levels.
    """
    plain = [n for n, one in enumerate(data) if _plain(one)]
    decoded = dict(zip(plain, _decode([data[n] for n in plain], device), strict=True))
    images = [decoded.get(n) for n in range(len(data))]
    fallbacks = [n for n, image in enumerate(images) if image is None]
    for n in fallbacks:
        try:
            image = torch.from_numpy(decode(data[n], f"image {n} of the batch"))
        except UnreadableImage:
            continue
        images[n] = image.permute(2, 0, 1).to(device)
    return images, len(fallbacks)


def change(x: Tensor, changes: Changes, pad: int, spec: InputSpec) -> Tensor:
    """(B, 3, h, w) uint8 RGB, mirrored, moved and erased as drawn; channels as `spec` says."""
    flip, top, left, erased = (part.to(x.device) for part in changes)
    height, width = x.shape[-2:]
    down = torch.arange(height, device=x.device)
    across = torch.arange(width, device=x.device)
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    if pad:
        every = torch.arange(len(x), device=x.device)[:, None, None]
        rows, columns = top[:, None] + down, left[:, None] + across
        x = F.pad(x, [pad] * 4).movedim(1, -1)
        x = x[every, rows[:, :, None], columns[:, None]].movedim(-1, 1)
    start, size = erased[:, :2, None], erased[:, 2:, None]
    inside = [
        (line >= start[:, n]) & (line < start[:, n] + size[:, n])
        for n, line in enumerate((down, across))
    ]
    hidden = inside[0][:, None, :, None] & inside[1][:, None, None]
    if spec.colour == "bgr":
        x = x.flip(1)
    fill = [round(255 * share) for share in spec.mean]  # in the order of the channels
    colour = torch.tensor(fill, dtype=torch.uint8, device=x.device)
    return torch.where(hidden, colour[:, None, None], x).contiguous()


def _resized(image: Tensor, shape: tuple[int, int], spec: InputSpec) -> Tensor:
    """(3, H, W) -> (3, h, w) uint8, without aliasing."""
    image = framed(image.permute(1, 2, 0), spec).permute(2, 0, 1)
    if image.shape[1:] == shape:
        return image
    x = image[None].float()
    x = F.interpolate(x, shape, mode="bilinear", antialias=True)
    return x[0].round().clamp(0, 255).to(torch.uint8)


def _plain(data: bytes) -> bool:
    """Whether every decoder shows this file as ours does."""
    if not jpeg.is_jpeg(data):
        return False
    header = jpeg.parse(data)
    turned = header.exif and jpeg.turned(data)
    return header.whole and header.ordinary and not turned


def _decode(data: list[bytes], device: torch.device) -> list[Tensor | None]:
    """By torchvision, all at once; one by one where that fails, None for what is refused."""
    from torchvision.io import ImageReadMode, decode_jpeg

    if not data:
        return []
    encoded = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in data]
    try:
        return decode_jpeg(encoded, ImageReadMode.RGB, device)
    except RuntimeError:
        if len(data) == 1:
            return [None]
    return [_decode([one], device)[0] for one in data]
