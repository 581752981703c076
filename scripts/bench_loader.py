"""Rows of `bench.py loader`: pictures a second from JPEG files to batches."""

import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as transforms

from kit.data.augment import Augment
from kit.data.images import TrainImages, in_worker
from kit.data.inputs import InputSpec

SIDE, BATCH, WORKERS, GOAL = 256, 32, 2, 2.0
HEIGHT, WIDTH, QUALITY = 600, 800, 75  # about 76 KB a picture
IMAGES, FEW_IMAGES = 600, 128  # with --quick
OCTAVES = ((4, 55), (16, 30), (64, 20), (200, 14))  # cells across, deviation


class TheirImages(Dataset):
    """The baseline: every step in the worker, as the 2nd place of 2021 had it (without PIL)."""

    def __init__(self, paths: list[Path], spec: InputSpec) -> None:
        self.paths, self.spec = paths, spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = cv2.imread(str(self.paths[row]))
        image = cv2.resize(image, (self.spec.size, self.spec.size))
        image = torch.tensor(image)[:, :, [2, 1, 0]]
        image = transforms.to_tensor(image.numpy())
        return transforms.normalize(image, self.spec.mean, self.spec.std), row


def loader_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """An epoch of pictures through two loader processes, which are there before."""
    count = FEW_IMAGES if bench.quick else IMAGES
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), count)
        loaders = ours(Path(folder), paths), theirs(paths)
        ours_s, theirs_s = bench.interleaved(
            *(lambda loader=loader: deque(loader, maxlen=0) for loader in loaders)
        )
        kilobytes = np.mean([path.stat().st_size for path in paths]) / 1000
    name = f"loader, {count} JPEGs of {kilobytes:.0f} KB, {SIDE} px, {WORKERS} workers"
    yield bench.speed(name, ours_s, theirs_s, GOAL, False)


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Pictures like photos: noise of several sizes, the coarse the strongest."""
    draw = torch.Generator().manual_seed(0)
    paths = []
    for number in range(count):
        pixels = torch.full((1, 3, HEIGHT, WIDTH), 128.0)
        for cells, deviation in OCTAVES:
            shape = (1, 3, cells * HEIGHT // WIDTH, cells)
            coarse = deviation * torch.randn(shape, generator=draw)
            pixels += F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")
        pixels += 4 * torch.randn(pixels.shape, generator=draw)
        array = pixels[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()
        paths.append(folder / f"{number:03d}.jpg")
        Image.fromarray(array).save(paths[-1], quality=QUALITY)
    return paths


def ours(folder: Path, paths: list[Path]) -> DataLoader:
    names = np.array([path.name for path in paths])
    labels = np.arange(len(paths))
    data = TrainImages(folder, names, labels, InputSpec(SIDE), Augment(), seed=0)
    batches = [
        [(0, row) for row in range(start, min(start + BATCH, len(paths)))]
        for start in range(0, len(paths), BATCH)
    ]
    return DataLoader(data, batch_sampler=batches, **options())


def theirs(paths: list[Path]) -> DataLoader:
    return DataLoader(TheirImages(paths, InputSpec(SIDE)), BATCH, **options())


def options() -> dict[str, Any]:
    """The same for both: the baseline is faster so than with its own."""
    return {
        "num_workers": WORKERS,
        "worker_init_fn": in_worker,
        "persistent_workers": True,
    }


ROWS = [loader_rows]
