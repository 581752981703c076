"""A list's images -> their 64-bit perceptual hashes, on disk, resumable.

The hash is pHash's (Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions", 2010): the picture in grey at 32 x 32, its discrete cosine transform, the 8 x 8
coefficients of the lowest frequencies but for row and column 0, and a bit for each of them:
whether it is above the median of the 64. Shrinking by the mean over areas stands for pHash's
mean filter. Bit i is coefficient i, row by row. Half of the bits are set, so that two hashes
differ in an even number of bits: in 32 on average, a picture and its copy in few. A picture
with hardly any contrast would have a hash of noise: it counts as flat and has none.

hashes/<list>/ids.npy         (N,) U16, each image once, in the list's order
              values.npy      (N,) uint64; 0 where there is none
              states.npy      (N,) uint8: NEW, HASHED, FLAT or UNREADABLE
              manifest.json   list, definition, counts; `complete`, checksums at the end
"""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import kit
from kit import checksums, files, launch
from kit.data.images import decode
from kit.data.lists import ImageList, StoredList
from kit.data.readers import Reader, UnreadableImage, open_reader

log = logging.getLogger(__name__)

SIDE, KEPT = 32, 8  # of the grey picture, and of its coefficients that count
LEAST = 4 * SIDE  # pixels of a side that the decoder's own shrinking leaves
CONTRAST = 1.0  # grey levels of 255: less is flat
STATES = ("new", "hashed", "flat", "unreadable")
NEW, HASHED, FLAT, UNREADABLE = range(len(STATES))
BLOCK = 4096  # images between two marks on disk
REPAIR = "make it again: run kit.answers.audit once more"
FILES = ("ids.npy", "values.npy", "states.npy")
MADE = {"side": SIDE, "kept": KEPT, "least": LEAST, "contrast": CONTRAST}


@dataclass(frozen=True)
class Hashes:
    """The hashes of a list, open for reading."""

    ids: np.ndarray  # (N,) U16
    values: np.ndarray  # (N,) uint64
    states: np.ndarray  # (N,) uint8
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> np.ndarray:
        """(n,) rows that have a hash."""
        return np.flatnonzero(self.states == HASHED)


def shrunk(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (32, 32) float32 grey."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def hashes(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32) float32 -> (N,) uint64, and (N,) bool: which are flat."""
    basis = _basis()
    found = (basis @ grey @ basis.T).reshape(len(grey), KEPT * KEPT)
    above = found > np.median(found, axis=1, keepdims=True)
    values = np.packbits(above, axis=1, bitorder="little").view("<u8")[:, 0]
    # the standard deviation of the picture that these coefficients alone make
    contrast = np.linalg.norm(found, axis=1) / SIDE
    return values.astype(np.uint64), contrast < CONTRAST


def build(
    data: Path,
    listed: ImageList | StoredList,
    out: Path,
    workers: int | None = None,  # threads; None: one a core
    max_unreadable: float = 0.2,  # share of the list; more looks like a lost disk
) -> Hashes:
    """Hashes every image of a list into `out`; goes on where it stopped.

    data: the folder that the list's paths start from. What could not be read is tried again by
    the next run. Hashes of another list in `out` are replaced.
    """
    with files.lock(out):
        _create(out, listed)
        ids, values, states = _arrays(out, "r+")
        if not np.isin(states, (HASHED, FLAT)).all():
            about = checksums.read_manifest(out / "manifest.json", REPAIR)
            checksums.write_manifest(out / "manifest.json", about | {"complete": False})
            with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
                _fill(pool, open_reader(data), listed, ids, values, states)
        counts = {name: int((states == n).sum()) for n, name in enumerate(STATES)}
        about = checksums.read_manifest(out / "manifest.json", REPAIR)
        done = {"complete": True, "counts": counts}
        done["checksums"] = checksums.compute_checksums(out, FILES)
        checksums.write_manifest(out / "manifest.json", about | done)
    if counts["unreadable"] > max_unreadable * len(ids):
        name = ids[np.flatnonzero(states == UNREADABLE)[0]]
        raise ValueError(
            f"list {listed.name}: {counts['unreadable']} of {len(ids)} images cannot be "
            f"read, more than a share of {max_unreadable}; for example {name}"
        )
    return load(out)


def load(folder: Path) -> Hashes:
    """The complete hashes in `folder`."""
    manifest = folder / "manifest.json"
    found = manifest.exists()
    about = checksums.read_manifest(manifest, REPAIR, ("complete",)) if found else {}
    if not about.get("complete"):
        raise FileNotFoundError(
            f"{folder}: no finished hashes; run kit.answers.audit (again)"
        )
    checksums.verify_files(folder, about, REPAIR, FILES)
    arrays = _arrays(folder, "r")
    if {len(array) for array in arrays} != {about["rows"]}:
        raise ValueError(
            f"{folder}: its files are not those that manifest.json describes"
        )
    return Hashes(*(array.view(np.ndarray) for array in arrays), about)


@cache
def _basis() -> np.ndarray:
    """(8, 32) rows 1 to 8 of the orthonormal DCT-II of 32 points."""
    row, column = np.arange(1, KEPT + 1)[:, None], np.arange(SIDE)
    angles = np.pi * row * (2 * column + 1) / (2 * SIDE)
    return (np.sqrt(2 / SIDE) * np.cos(angles)).astype(np.float32)


def _arrays(folder: Path, mode: str) -> list[np.ndarray]:
    return [
        np.load(folder / name, mmap_mode=mode, allow_pickle=False) for name in FILES
    ]


def _create(out: Path, listed: ImageList | StoredList) -> None:
    """Prepares `out` for the list's images, unless that is done."""
    manifest = out / "manifest.json"
    about = {"list": {"name": listed.name, "hash": listed.hash}} | MADE
    if checksums.is_resumable(out, about, FILES):
        return
    manifest.unlink(missing_ok=True)
    blocks = [block["id"].to_numpy().astype("U16") for block in listed.blocks(("id",))]
    ids = np.concatenate([np.zeros(0, "U16"), *blocks])
    ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
    arrays = {
        "ids": ids,
        "values": np.zeros(len(ids), np.uint64),
        "states": np.full(len(ids), NEW, np.uint8),
    }
    for name, array in arrays.items():
        path = out / f"{name}.npy"
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    unfinished = {"rows": len(ids), "complete": False, "kit": kit.__version__}
    checksums.write_manifest(manifest, about | unfinished)


def _fill(
    pool: Executor,
    reader: Reader,
    listed: ImageList | StoredList,
    ids: np.ndarray,
    values: np.ndarray,
    states: np.ndarray,
) -> None:
    """Every hash that is not there yet, block by block."""
    looked = False
    for start, paths in _blocks(listed, ids):
        todo = np.flatnonzero(
            ~np.isin(states[start : start + len(paths)], (HASHED, FLAT))
        )
        if not len(todo):
            continue
        if not looked and not any(map(reader.exists, paths[:100])):
            raise FileNotFoundError(
                f"{reader.root}: {paths[0]} is not there, nor are the list's next images; "
                "is this the folder that the list's paths start from?"
            )
        looked = True
        made, state = _hashed(pool, reader, [paths[n] for n in todo])
        values[start + todo] = made
        values.flush()  # a mark must not reach the disk before its hash
        states[start + todo] = state
        states.flush()
        log.info("%s %9d/%d hashed", listed.name, start + len(paths), len(ids))
        if launch.time_left() <= 0 and start + len(paths) < len(ids):
            raise launch.Stopped(
                f"{listed.name}: stopped after {start + len(paths)} of {len(ids)} images, "
                "the time is over; run it again to go on"
            )


def _blocks(
    listed: ImageList | StoredList, ids: np.ndarray
) -> Iterator[tuple[int, list[str]]]:
    """The first row and the paths of each block of `ids`, the list's images without repeats."""
    at, paths = 0, []
    for rows in listed.blocks(("id", "path")):
        for name, path in zip(rows["id"], rows["path"], strict=True):
            # a repeat stands in ids before `at`, and so is never the next one
            if at == len(ids) or name != ids[at]:
                continue
            paths.append(path)
            at += 1
            if len(paths) == BLOCK:
                yield at - BLOCK, paths
                paths = []
    if paths:
        yield at - len(paths), paths


def _hashed(
    pool: Executor, reader: Reader, paths: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) hashes and (n,) states of the images."""

    def look(path: str) -> np.ndarray | None:
        try:
            return shrunk(decode(reader.read(path), path, LEAST))
        except UnreadableImage:
            return None

    grey = list(pool.map(look, paths))
    readable = np.array([each is not None for each in grey])
    values = np.zeros(len(paths), np.uint64)
    states = np.full(len(paths), UNREADABLE, np.uint8)
    if readable.any():
        made, flat = hashes(np.stack([each for each in grey if each is not None]))
        values[readable] = np.where(flat, 0, made)
        states[readable] = np.where(flat, FLAT, HASHED)
    return values, states
