"""What a download will cost before it begins: bytes, hours and room on the disk."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kit.data.download.official import Official, Tar
from kit.data.download.transfer import Client

GB, MB = 1e9, 1e6
TYPICAL = 600  # pixels of a picture's shorter side, assumed where shards are estimated
PACE = (
    12 * MB
)  # of originals a second, shrunk to 512 by one core, measured at 800 x 600


@dataclass(frozen=True)
class Forecast:
    """Bytes of what is still to do."""

    fetched: dict[str, tuple[int, int]]  # split -> tars, their bytes
    told: int  # tars whose size the server has told; of the others it is known about
    kept: int  # on the disk at the end
    passing: int  # besides, while it runs
    shrinking: float  # seconds of one core

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.fetched.values())

    @property
    def tars(self) -> int:
        return sum(count for count, _ in self.fetched.values())


def forecast(
    official: Official,
    tars: Sequence[Tar],
    kind: str,  # what stays: tars, images or shards
    side: int,  # of the images in shards, pixels
    share: float,  # of the images that are wanted
    jobs: int,
    client: Client | None = None,  # asks the server for the sizes
) -> Forecast:
    """Of shards the size is an estimate: it shrinks with the area of a typical picture."""
    asked: list[int | None] = [None] * len(tars)
    # of a server that does not tell the first, no other is asked: each may take a minute
    if client and tars and client.size(official.tar(tars[0])) is not None:
        with ThreadPoolExecutor(16) as pool:
            asked = list(pool.map(lambda tar: client.size(official.tar(tar)), tars))
    sizes = [
        official.bytes[tar.split] if size is None else size
        for tar, size in zip(tars, asked, strict=True)
    ]
    fetched: dict[str, tuple[int, int]] = {}
    for tar, size in zip(tars, sizes, strict=True):
        count, total = fetched.get(tar.split, (0, 0))
        fetched[tar.split] = count + 1, total + size
    left = min(1.0, (side / TYPICAL) ** 2) if kind == "shards" else 1.0
    passing = 0 if kind == "tars" else sum(sorted(sizes)[-jobs:])
    return Forecast(
        fetched,
        sum(size is not None for size in asked),
        round(sum(sizes) * share * left),
        passing,
        sum(sizes) * share / PACE if kind == "shards" else 0.0,
    )


def lines(cost: Forecast, rate: float | None, free: int) -> list[str]:
    """For a person to read; rate: bytes a second, None: an assumed one."""
    told = [
        f"{split}: {count} tars, {_gb(size)}"
        for split, (count, size) in cost.fetched.items()
    ]
    about = cost.tars - cost.told
    source = f"{cost.told} sizes from the server"
    if about:
        source += f", {about} as the dataset's page says about"
    pace, assumed = rate or 40 * MB, "" if rate else ", assumed (--rate)"
    work = f"shrinking: about {cost.shrinking / 3600:.1f} hours of one core"
    return [
        *told,
        f"to fetch: {_gb(cost.bytes)} ({source})",
        f"{cost.bytes / pace / 3600:.1f} hours at {pace / MB:g} MB/s{assumed}",
        *([work] if cost.shrinking else []),
        f"on the disk: about {_gb(cost.kept)} at the end",
        f"while it runs {_gb(cost.passing)} more; {_gb(free)} are free",
    ]


def refuse_full_disk(cost: Forecast, out: Path, there: int = 0) -> None:
    """One clear line before anything is fetched, where it cannot end well.

    there: bytes of the cost that an earlier run has brought.
    """
    there = min(there, cost.passing or cost.kept)  # more jobs than now may have begun
    need, free = cost.kept + cost.passing - there, free_bytes(out)
    if need > free:
        raise ValueError(
            f"{out}: about {_gb(need)} are needed and {_gb(free)} are free; take fewer tars, "
            "--stream-resize with a smaller side, or another disk"
        )


def free_bytes(path: Path) -> int:
    """On the disk where `path` is or will be."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def _gb(count: int) -> str:
    return f"{count / GB:,.1f} GB"
