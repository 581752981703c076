"""The k-nearest-neighbour graph of a store, on disk: what tagging, diffusion, DBA and cleaning read.

graph/<model>/<list>/rows.npy        (N, k) int32, best first; -1 where there are no more
                     scores.npy      (N, k) float32 inner products; -inf there
                     done.npy        (blocks,) uint8
                     manifest.json   the features it was made of, k; `complete`, checksums at the end

`python -m kit.features.graph JOB.json`, alone or under torchrun; `build` does the work. No image is
its own neighbour; an unreadable one has none and is nobody's.
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch.distributed as dist

from kit import checksums, config, files, launch
from kit.features import search, store
from kit.features.store import Features
from kit.features.views import Views

log = logging.getLogger(__name__)

REPAIR = (
    "make it again: --force the pipeline's 03_features step, or build the graph again"
)
FILES = ("rows.npy", "scores.npy", "done.npy")
BLOCK = 4_096  # rows that are searched, and marked done, together


@dataclass(frozen=True)
class Graph:
    """A complete graph, open for reading."""

    rows: np.ndarray  # (N, k) int32, memory-mapped
    scores: np.ndarray  # (N, k) float32, memory-mapped

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def k(self) -> int:
        return self.rows.shape[1]


@dataclass(frozen=True)
class Job:
    """Which features, how many neighbours, and where the graph goes."""

    features: Path  # features/<model>/<list>
    out: Path  # graph/<model>/<list>
    k: int = 30

    def __post_init__(self) -> None:
        config.check(self, least={"k": 1})

    def write(self) -> Path:
        return config.write(self, self.out / "job.json")


def build(job: Job) -> Path:
    """Fills the graph block by block, each rank its share; what is already there is kept."""
    with launch.group() as rank:
        features = store.load(job.features)
        about = {"features": identity(features), "k": job.k}
        with files.lock(job.out) if rank.main else nullcontext():
            if rank.main:
                _create(job.out, len(features), job.k, about)
            if rank.world > 1:
                dist.barrier()
            _fill(job, features, rank)
            if rank.world > 1:
                dist.barrier()
            if rank.main:
                _check_done(job.out)
                manifest = checksums.read_manifest(job.out / "manifest.json", REPAIR)
                made = {"checksums": checksums.compute_checksums(job.out, FILES)}
                checksums.write_manifest(
                    job.out / "manifest.json", manifest | made | {"complete": True}
                )
    return job.out


def identity(features: Features) -> dict[str, object]:
    """What tells features apart: two stores of equal facts hold the same vectors."""
    facts = features.manifest
    names = ("model", "list", "rows", "dim", *(each.name for each in fields(Views)))
    return {name: facts[name] for name in names if name in facts}


def load(folder: Path, features: Features | None = None) -> Graph:
    """The complete graph in `folder`, refused unless it is that of `features`, if given."""
    if not (folder / "manifest.json").exists():
        raise FileNotFoundError(
            f"no graph in {folder}; build it first: 03_extract_features"
        )
    about = checksums.read_manifest(
        folder / "manifest.json", REPAIR, ("features", "k", "complete")
    )
    if not about["complete"]:
        raise ValueError(
            f"{folder}: the graph is not finished; build it again: 03_extract_features"
        )
    if features is not None and about["features"] != identity(features):
        name = features.manifest["list"]["name"]
        raise ValueError(
            f"{folder}: not the graph of these features of {name}; build it again: 03_extract_features"
        )
    checksums.verify_files(folder, about, REPAIR, FILES[:2])
    rows, scores = (
        np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in FILES[:2]
    )
    return Graph(rows, scores)


def _create(folder: Path, length: int, k: int, about: dict[str, object]) -> None:
    manifest = folder / "manifest.json"
    if checksums.is_resumable(folder, about, FILES):
        return
    for name in ("manifest.json", "done.npy", "rows.npy", "scores.npy"):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    store.allocate(folder / "rows.npy", (length, k), np.int32)
    store.allocate(folder / "scores.npy", (length, k), np.float32)
    store.allocate(folder / "done.npy", (-(-length // BLOCK),), np.uint8)
    checksums.write_manifest(manifest, about | {"complete": False})


def _fill(job: Job, features: Features, rank: launch.Rank) -> None:
    done = np.load(job.out / "done.npy", allow_pickle=False)
    todo = [int(b) for b in range(rank.rank, len(done), rank.world) if not done[b]]
    skip = ~features.readable()
    started = told = time.monotonic()
    for count, block in enumerate(todo, 1):
        here = slice(block * BLOCK, min((block + 1) * BLOCK, len(features)))
        scores, rows = _neighbours(features, here, job.k, skip)
        store.write_rows(job.out / "scores.npy", here.start, scores)
        store.write_rows(job.out / "rows.npy", here.start, rows)
        # last: the mark must not reach the disk before its block
        store.write_rows(job.out / "done.npy", block, np.ones(1))
        if rank.main and (count == len(todo) or time.monotonic() - told > 10):
            told = time.monotonic()
            speed = count * BLOCK / (told - started)
            left = (len(todo) - count) * BLOCK / speed
            log.info(
                "graph %7d/%d rows  %8.0f rows/s  %5.0f s left",
                *(min(count * BLOCK, len(features)), len(features), speed, left),
            )
        if launch.time_left() <= 0 and count < len(todo):
            raise launch.Stopped(
                f"{job.out}: stopped after {count} of {len(todo)} blocks, the time is "
                "over; run it again to go on"
            )


def _check_done(folder: Path) -> None:
    done = np.load(folder / "done.npy", allow_pickle=False)
    if not done.all():
        raise RuntimeError(
            f"{folder}: {int((done == 0).sum())} of {len(done)} blocks are missing, such as "
            f"block {int(done.argmin())}; run the same command again"
        )


def _neighbours(
    features: Features, here: slice, k: int, skip: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows (n, k) of the nearest others."""
    vectors = features.vectors[here]
    found = search.knn(vectors, features, min(k + 1, len(features)), skip=skip)
    rows, scores = found.rows.numpy(), found.scores.numpy()
    own = rows == np.arange(here.start, here.stop)[:, None]
    own[:, -1] |= ~own.any(axis=1)  # equal rows before it may push it out of the list
    rows, scores = (each[~own].reshape(len(vectors), -1) for each in (rows, scores))
    unreadable = skip[here][:, None]
    wanted = ((0, 0), (0, k - rows.shape[1]))
    rows = np.pad(np.where(unreadable, -1, rows), wanted, constant_values=-1)
    scores = np.where(unreadable, -np.inf, scores)
    return np.pad(scores, wanted, constant_values=-np.inf), rows


@launch.entry
def main(arguments: Sequence[str] | None = None) -> None:
    job = config.read_argument(Job, arguments, __doc__.partition("\n")[0])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    build(job)


if __name__ == "__main__":
    main()
