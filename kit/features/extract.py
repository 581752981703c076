"""Images -> features: one model over one list into a store, on one process or many, resumable.

`python -m kit.features.extract JOB.json`, alone or under torchrun; `run` does the work.
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kit import config, files, launch
from kit.data import lists
from kit.data.images import EvalImages, in_worker
from kit.data.readers import open_reader
from kit.features import store
from kit.models import net as nets

log = logging.getLogger(__name__)

BLOCK = 512  # rows that are marked done together


@dataclass(frozen=True)
class Job:
    """Which model looks at which list, and where the features go."""

    model: Path  # folder with model.safetensors and model.json
    lists: Path
    images: str  # name of the list; an image that stands there twice is extracted once
    data: Path  # folder that the list's paths start from
    out: Path  # features/<model>/<list>
    batch: int = 32
    workers: int = 2  # loader processes of each rank
    scales: tuple[float, ...] = (
        1.0,
    )  # of the input side; embeddings are summed (2021)
    flip: bool = False  # add the mirrored image's embedding
    max_unreadable: float = 0.2  # share of the list; more looks like a lost disk

    def __post_init__(self) -> None:
        config.check(self, least={"batch": 1, "workers": 0, "max_unreadable": 0})

    def write(self) -> Path:
        return config.write(self, self.out / "job.json")


def untrained(net: nets.NetConfig, folder: Path) -> Path:
    """Saves the pretrained backbone, pooled and without a neck: where a recipe starts."""
    net = replace(net, neck="none")
    about = folder / "model.json"
    if not about.exists() or nets.load(folder).config != net:
        nets.save(nets.build(net), folder, seen={})
    return folder


@torch.inference_mode()
def embed(
    net: nets.EmbeddingNet,
    images: Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, D) float32 of unit length; sides of a scale are multiples of 16."""
    x = net.config.input.normalise(images)
    total = torch.zeros(len(x), net.dim, device=x.device)
    for scale in scales:
        side = max(32, int(x.shape[-1] * scale) // 16 * 16)
        at = (
            x
            if scale == 1
            else F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        )
        total += net(at).float()
        if flip:
            total += net(at.flip(-1)).float()
    return F.normalize(total)


def run(job: Job) -> Path:
    """Fills the store block by block, each rank its share; what is already there is kept."""
    with launch.group() as rank:
        images = lists.load(job.lists, job.images, ("id", "path"))
        about = nets.describe(job.model)
        first = ~images.rows["id"].duplicated().to_numpy()
        ids, paths = images.ids[first], images.rows["path"].to_numpy()[first]
        _refuse_wrong_root(job.data, paths)
        manifest = {
            "model": {"name": job.model.name, "hash": about["hash"]},
            "list": {"name": images.name, "hash": images.hash},
            "seen": about["seen"],
            "scales": list(job.scales),
            "flip": job.flip,
        }
        with files.lock(job.out) if rank.main else nullcontext():
            if rank.main:
                store.create(job.out, ids, about["dim"], BLOCK, manifest)
            if rank.world > 1:
                dist.barrier()
            _fill(job, ids, paths, rank)
            if rank.world > 1:
                dist.barrier()
            if rank.main:
                missing = store.finish(job.out, job.max_unreadable)
                if missing:
                    log.info("%s: %d images cannot be read", job.images, missing)
    return job.out


def _fill(job: Job, ids: np.ndarray, paths: np.ndarray, rank: launch.Rank) -> None:
    vectors, done = store.open_for_writing(job.out)
    # a fixed share of all blocks: what others finish in the meantime must not shift it
    todo = [int(b) for b in range(rank.rank, len(done), rank.world) if not done[b]]
    if not todo:
        return
    net = nets.load(job.model, rank.device)
    half = nets.half_precision(rank.device)
    # batches never cross a block: its vectors do not depend on which blocks were there before
    batches = [
        range(start, min(start + job.batch, (block + 1) * BLOCK, len(paths)))
        for block in todo
        for start in range(
            block * BLOCK, min((block + 1) * BLOCK, len(paths)), job.batch
        )
    ]
    loader = DataLoader(
        EvalImages(job.data, paths, net.config.input),
        batch_sampler=batches,
        num_workers=job.workers,
        worker_init_fn=in_worker,
        pin_memory=rank.device.type == "cuda",
    )
    total, written = sum(map(len, batches)), 0
    started = told = time.monotonic()
    for batch, (images, readable) in zip(batches, loader, strict=True):
        with torch.autocast(rank.device.type, half, enabled=half is not None):
            found = embed(
                net, images.to(rank.device, non_blocking=True), job.scales, job.flip
            )
        if not torch.isfinite(found).all():
            name = ids[batch.start + int((~torch.isfinite(found).all(1)).nonzero()[0])]
            raise FloatingPointError(
                f"{job.model}: the embedding of {name} is not finite; its weights or "
                "its half precision are at fault"
            )
        vectors[batch.start : batch.stop] = (
            found.cpu().numpy() * readable.numpy()[:, None]
        )
        written += len(batch)
        if batch.stop % BLOCK == 0 or batch.stop == len(paths):
            vectors.flush()  # the mark must not reach the disk before its block
            done[batch.start // BLOCK] = 1
            done.flush()
            if launch.time_left() <= 0 and written < total:
                raise launch.Stopped(
                    f"{job.images}: stopped after {written} of {total} images, the time is over; "
                    "run it again to go on"
                )
        if rank.main and (written == total or time.monotonic() - told > 10):
            told = time.monotonic()
            speed = written / (told - started)
            left = (total - written) / speed
            log.info(
                "%s %7d/%d images  %6.1f images/s  %5.0f s left",
                *(job.images, written, total, speed, left),
            )


def _refuse_wrong_root(data: Path, paths: np.ndarray) -> None:
    reader = open_reader(data)
    if not any(reader.exists(path) for path in paths[:100]):
        raise FileNotFoundError(
            f"{data}: {paths[0]} is not there, nor are the list's next images; "
            "is this the folder that the list's paths start from?"
        )


@launch.entry
def main(arguments: Sequence[str] | None = None) -> None:
    (path,) = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(config.read(Job, Path(path)))


if __name__ == "__main__":
    main()
