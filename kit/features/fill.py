"""One rank's share of an extraction: batches of decoded images through every model, block by block."""

import logging
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kit import launch
from kit.data.images import EvalImages, in_worker
from kit.data.inputs import InputSpec, View
from kit.features import store
from kit.features.known import Known
from kit.features.views import Views, embed
from kit.models import net as nets

log = logging.getLogger(__name__)

BLOCK = 512  # rows that are marked done together
KNOWN = -1  # group of the images whose features all models have already


class Listed(NamedTuple):
    """A list's images, each once: columns that processes share, no objects."""

    name: str
    paths: np.ndarray  # (N,) bytes
    sizes: np.ndarray | None  # (N, 2) int32 height and width, where a template asks
    # (N,) images of one number have one shape in every view; KNOWN: none is looked at
    group: np.ndarray


class Model:
    """A model on its way through a list, and the store it fills."""

    def __init__(
        self, folder: Path, spec: InputSpec, how: Views, known: Known, out: Path
    ) -> None:
        self.folder, self.how, self.known = folder, how, known
        self.views, self.writer = how.each(spec), store.Writer(out)

    def lacks(self, block: int) -> bool:
        return not self.writer.done[block]

    def load(self, device: torch.device) -> None:
        self.net, self.device = nets.load(self.folder, device), device
        self.half = nets.half_precision(device)

    def begin(self, rows: int) -> None:
        """Another block, of so many rows."""
        self.vectors = np.empty((rows, self.writer.dim), np.float16)

    def look(
        self,
        shown: dict[View, Tensor],
        readable: Tensor,  # (B,) bool
        at: np.ndarray,  # (B,) rows of the block
        paths: np.ndarray,  # (B,) for the error
    ) -> None:
        """Sets the block's vectors of a batch; zeros where an image could not be read."""
        scales = [shown[view] for view in self.views]
        half = self.half
        with torch.autocast(self.device.type, half, enabled=half is not None):
            found = embed(self.net, scales, self.how.flip, self.how.normalise)
        fine = torch.isfinite(found).all(1)
        if half is not None and not fine.all():  # some images are too much for it
            found = embed(self.net, scales, self.how.flip, self.how.normalise)
            fine = torch.isfinite(found).all(1)
        if not fine.all():
            name = paths[int((~fine).nonzero()[0])].decode()
            raise FloatingPointError(
                f"{self.folder}: the embedding of {name} is not finite, in single "
                "precision either; its weights are at fault"
            )
        self.vectors[at] = found.cpu().numpy() * readable.numpy()[:, None]

    def end(self, block: int) -> None:
        self.known.copy(block * BLOCK, self.vectors)
        self.writer.write(block, self.vectors)


def batches(group: np.ndarray, block: int, size: int) -> list[np.ndarray]:
    """The rows of a block that are looked at, in batches of one shape.

    They depend on the list and on what is known, so that vectors do not depend on the number of
    ranks, nor on which blocks were there before.
    """
    first = block * BLOCK
    here = group[first : first + BLOCK]
    return [
        rows[start : start + size]
        for n in np.unique(here[here != KNOWN])
        for rows in [first + np.flatnonzero(here == n)]
        for start in range(0, len(rows), size)
    ]


def fill(
    data: Path,
    listed: Listed,
    models: Sequence[Model],
    rank: launch.Rank,
    batch: int,
    workers: int,
) -> tuple[int, int]:
    """Every block of this rank that a model lacks; what is not finished in time is left.

    How many rows were written, and how many should have been.
    """
    blocks = range(rank.rank, -(-len(listed.paths) // BLOCK), rank.world)
    # a fixed share of all blocks: what others finish in the meantime must not shift it
    todo = [block for block in blocks if any(model.lacks(block) for model in models)]
    groups = {b: listed.group[b * BLOCK : (b + 1) * BLOCK] for b in todo}
    looks = {b: int((group != KNOWN).sum()) for b, group in groups.items()}
    models = [model for model in models if any(map(model.lacks, todo))]
    for model in models:
        if any(looks[b] for b in todo if model.lacks(b)):
            model.load(rank.device)
    views = list(dict.fromkeys(view for model in models for view in model.views))
    pace, written, loaded = _Pace(listed.name, sum(looks.values()), rank), 0, iter(())
    if pace.total:
        rows = (rows for b in todo for rows in batches(listed.group, b, batch))
        loaded = _loaded(data, listed, views, rows, rank, workers)
    for block in todo:
        lacking = [model for model in models if model.lacks(block)]
        for model in lacking:
            model.begin(len(groups[block]))
        for rows in batches(listed.group, block, batch):
            pictures, readable = pace.wait(loaded)
            pictures = (x.to(rank.device, non_blocking=True) for x in pictures)
            shown = dict(zip(views, pictures, strict=True))
            for model in lacking:
                model.look(shown, readable, rows - block * BLOCK, listed.paths[rows])
            pace.tell(len(rows))
        for model in lacking:
            model.end(block)
        written += len(groups[block])
        if launch.time_left() <= 0:
            break
    return written, sum(map(len, groups.values()))


def _loaded(
    data: Path,
    listed: Listed,
    views: Sequence[View],
    batches: Iterator[np.ndarray],
    rank: launch.Rank,
    workers: int,
) -> Iterator[Any]:
    """The batches' pictures, each view's of (B, 3, h, w), and which could be read."""
    loader = DataLoader(
        EvalImages(data, listed.paths, views, sizes=listed.sizes),
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=in_worker,
        pin_memory=rank.device.type == "cuda",
    )
    return iter(loader)


class _Pace:
    """Counts the images that a rank looks at, and tells every ten seconds how far the main one is."""

    def __init__(self, name: str, total: int, rank: launch.Rank) -> None:
        self.name, self.total, self.rank = name, total, rank
        self.written, self.waited = 0, 0.0
        self.started = self.told = time.monotonic()

    def wait(self, loaded: Iterator[Any]) -> Any:
        """The next batch; the time until it is there counts as waiting for data."""
        asked = time.monotonic()
        batch = next(loaded)
        self.waited += time.monotonic() - asked
        return batch

    def tell(self, count: int) -> None:
        self.written += count
        now = time.monotonic()
        if not self.rank.main or (self.written < self.total and now - self.told <= 10):
            return
        self.told, seconds = now, now - self.started
        speed = self.written / seconds
        left = timedelta(seconds=round((self.total - self.written) / speed))
        share = f" in each of {self.rank.world}" if self.rank.world > 1 else ""
        log.info(
            "%s %7d/%d images%s  %6.1f images/s  %2.0f %% waiting for data  %s left",
            *(self.name, self.written, self.total, share, speed),
            *(100 * self.waited / seconds, left),
        )
