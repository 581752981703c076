"""A list's images, shrunk and packed into plain tars that kit.data.readers reads.

`pack` writes into a folder
- `shard_00000.tar`, ...: JPEGs under their list's paths, turned as EXIF says, without metadata
- `shards.json`: what made them, and of each finished shard its images, its unreadable ones and its
  checksum, which `python -m kit.check OUT` compares
- `unreadable.csv`: path and reason of every image that is in no shard
- `tar_index/`: where each image lies (kit.data.tars)

`python -m kit.data.shards ROOT LISTS_FOLDER LIST OUT --side 512` packs a list.
"""

import argparse
import csv
import io
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from kit import checksums, files
from kit.data import lists, tars
from kit.data.images import decode
from kit.data.readers import Reader, UnreadableImage, open_reader

AHEAD = 256  # images in memory between the threads that shrink and the one that writes


def pack(
    reader: Reader,
    paths: Iterable[str],
    out: Path,
    side: int = 512,  # of the shorter side, pixels; smaller images keep their size
    quality: int = 90,
    per_shard: int = 8192,
    workers: int | None = None,  # threads; None: one a core
) -> Path:
    """Packs every path once, in order; returns `out`. Goes on after the last whole shard.

    An image that cannot be read is written to `unreadable.csv`, and packing goes on.
    """
    if side < 1 or per_shard < 1 or not 1 <= quality <= 100:
        raise ValueError(
            f"side {side}, per_shard {per_shard}, quality {quality}: the first two are at "
            "least 1, the last is 1 to 100"
        )
    paths = list(dict.fromkeys(paths))
    for path in paths:
        if not tars.inside(path):
            raise ValueError(f"{path!r} is not a path inside {reader.root}")
    made = {"side": side, "quality": quality, "per_shard": per_shard}
    made |= {"paths": files.fingerprint(paths)}
    with files.lock(out):
        there = _existing(out, made)
        done, sums = there.get("shards", {}), there.get("checksums", {})
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            for start in tqdm(range(0, len(paths), per_shard), "shards", disable=None):
                name = f"shard_{start // per_shard:05d}.tar"
                if name in done and (out / name).exists():
                    continue
                some = paths[start : start + per_shard]
                found = encoded(pool, reader, some, side, quality)
                done[name] = write(out / name, zip(some, found, strict=True))
                sums |= checksums.compute_checksums(out, [name])
                about = made | {"shards": done, "checksums": sums}
                checksums.write_manifest(out / "shards.json", about)
        _report(out / "unreadable.csv", done)
    tars.index(out)
    return out


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) with its shorter side at `side` pixels, or as it is if that is smaller."""
    height, width = image.shape[:2]
    if min(height, width) <= side:
        return image
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encoded(
    pool: ThreadPoolExecutor,
    reader: Reader,
    paths: Sequence[str],
    side: int,
    quality: int,
) -> Iterator[bytes | UnreadableImage]:
    """A JPEG for every path, or why there is none; few are in memory at a time."""

    def encode(path: str) -> bytes | UnreadableImage:
        try:
            image = shrunk(decode(reader.read(path), path), side)
            image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            options = [cv2.IMWRITE_JPEG_QUALITY, quality]
            written, data = cv2.imencode(".jpg", image, options)
        except UnreadableImage as error:
            return error
        long = UnreadableImage(f"{path}: too long for a JPEG")
        return data.tobytes() if written else long

    for start in range(0, len(paths), AHEAD):
        yield from pool.map(encode, paths[start : start + AHEAD])


def write(
    path: Path, found: Iterable[tuple[str, bytes | UnreadableImage]]
) -> dict[str, Any]:
    """Packs JPEGs under their names; returns the shard's record, as `shards.json` has it."""
    count, unreadable = 0, {}
    with files.replacing(path) as temporary, tarfile.open(temporary, "w") as archive:
        for name, data in found:
            if isinstance(data, UnreadableImage):
                unreadable[name] = str(data)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            count += 1
    return {"images": count, "unreadable": unreadable}


def _existing(out: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the finished shards, or {}; refuses a folder with others."""
    path = out / "shards.json"
    if not path.exists():
        return {}
    repair = "pack them again into an empty folder"
    there = checksums.read_manifest(path, repair, ("shards", "checksums"))
    for name, value in made.items():
        if there.get(name) != value:
            raise ValueError(
                f"{out} holds shards of other images or settings ({name} differs); "
                "give an empty folder"
            )
    return there


def _report(path: Path, done: dict[str, Any]) -> None:
    with files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("path", "reason"))
        for name in sorted(done):
            table.writerows(done[name]["unreadable"].items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pack a list's images into tars.")
    parser.add_argument(
        "root", type=Path, help="folder that the list's paths start from"
    )
    parser.add_argument("lists", type=Path, help="folder of the lists")
    parser.add_argument("list", help="its name, such as full")
    parser.add_argument("out", type=Path, help="empty, or with the same shards begun")
    parser.add_argument("--side", type=int, default=512, help="of the shorter side")
    parser.add_argument(
        "--quality", type=int, default=90, help="of the JPEGs, 1 to 100"
    )
    parser.add_argument("--per-shard", type=int, default=8192, help="images in a tar")
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    given = parser.parse_args(arguments)
    try:
        paths = lists.load(given.lists, given.list, ("path",)).rows["path"]
        sizes = given.side, given.quality, given.per_shard, given.workers
        pack(open_reader(given.root), paths, given.out, *sizes)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
