"""What is wanted of GLDv2, in which form, and where it lies in the data folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import files
from kit.data.download import official
from kit.data.download.official import Official, Tar

KINDS = ("tars", "images", "shards")


@dataclass(frozen=True)
class Order:
    """What is wanted, and in which form."""

    out: Path
    splits: Sequence[str] = official.SPLITS
    numbers: Sequence[int] | None = None  # of the tars in each split; None: all
    kind: str = "tars"  # what stays: tars, images or shards
    side: int = 512  # shards: of the shorter side, pixels
    quality: int = 90  # shards: of the JPEGs
    landmarks: int = 0  # so many whole ones; 0: everything
    seed: int | None = None  # draws them; None: the first
    jobs: int = 4  # tars at a time

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when a folder is gone on with."""
        shrunk = {"side": self.side, "quality": self.quality}
        return {
            "kind": self.kind,
            **(shrunk if self.kind == "shards" else {}),
            "landmarks": self.landmarks,
            "seed": self.seed,
        }

    @property
    def home(self) -> Path:
        return self.out / "download"

    @property
    def metadata(self) -> Path:
        return self.out / "metadata"

    def record(self, tar: Tar) -> Path:
        """What came of a tar; there once it is done."""
        return self.home / f"{tar.key}.json"

    def original(self, tar: Tar) -> Path:
        # in two folders, where no index of tars looks
        return (self.out if self.kind == "tars" else self.home) / tar.split / tar.name

    def shard(self, tar: Tar) -> Path:
        return self.out / tar.split / f"shard_{tar.number:03d}.tar"

    def tars(self, source: Official) -> list[Tar]:
        return source.tars(self.splits, self.numbers)

    def is_done(self, tar: Tar) -> bool:
        if not self.record(tar).exists():
            return False
        record = files.read_json(self.record(tar))
        if self.kind == "tars":
            path = self.original(tar)
            return path.exists() and path.stat().st_size == record["bytes"]
        if self.kind == "shards":
            return not record["images"] or self.shard(tar).exists()
        return True

    def begun_bytes(self, source: Official) -> int:
        """Of the tars that remain, what is on the disk."""
        paths = [self.original(tar) for tar in self.remaining(source)]
        some = [path.with_name(f"{path.name}.part") for path in paths]
        return sum(path.stat().st_size for path in (*paths, *some) if path.exists())

    def remaining(self, source: Official) -> list[Tar]:
        return [tar for tar in self.tars(source) if not self.is_done(tar)]


def refuse(order: Order, source: Official) -> None:
    """What cannot be done is said before anything is."""
    strange = [split for split in order.splits if split not in official.SPLITS]
    if strange or not order.splits:
        raise ValueError(
            f"split {' '.join(strange) or 'none'} is not of {', '.join(official.SPLITS)}"
        )
    if order.kind not in KINDS or order.side < 1 or not 1 <= order.quality <= 100:
        raise ValueError(
            f"{order.kind} of side {order.side}, quality {order.quality}: give one of "
            f"{', '.join(KINDS)}, a side of 1 or more and a quality of 1 to 100"
        )
    if order.jobs < 1 or order.landmarks < 0:
        raise ValueError(
            f"jobs {order.jobs}, landmarks {order.landmarks}: at least 1 and 0"
        )
    if order.numbers is not None and not source.tars(order.splits, order.numbers):
        raise ValueError(f"no such tar in {', '.join(order.splits)}")
    if order.landmarks and order.kind == "tars":
        raise ValueError(
            "a subset of landmarks is cut out of the tars: extract them or pack shards"
        )
    if order.landmarks and order.numbers is not None:
        raise ValueError(
            "a landmark's images lie in any of the tars: take a subset or some tars, not both"
        )


def numbers(text: str) -> list[int]:
    """`0-9,20` -> the numbers that it names."""
    found: set[int] = set()
    for span in text.split(","):
        if not (match := re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", span)):
            raise ValueError(f"{text!r} is not of the form 0-9,20")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)
