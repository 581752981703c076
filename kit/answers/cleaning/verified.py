"""The inliers of a list's pairs of candidates, on disk.

<folder>/manifest.json    list, features, backend and its parameters, candidates an image; at the
                          end `complete`, blocks, pairs, unreadable (paths), checksums
         candidates.npy   (N, most) int32 rows of the list, best first; -1 where there are no more
         00000.npy        of a block of landmarks, (P, 4) int32: two rows of the list, the lower
                          one first; their inliers; whose candidate is whose (1: the second is
                          one of the first's, 2: the first one of the second's, 3: both)
         00000.json       paths of its images that could not be read, if there are any

A block is written once, whole. `kit.answers.cleaning.pairs` fills it.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kit
from kit import checksums, files

log = logging.getLogger(__name__)

REPAIR = "make it again: run 01_clean_labels once more"
MAX_UNREADABLE = 0.2  # share of the images; more looks like a lost disk
FIRST, SECOND = 1, 2  # the other image is a candidate of the pair's first, its second


class Verified:
    """A finished verification, open for reading."""

    def __init__(self, folder: Path) -> None:
        about = folder / "manifest.json"
        if not about.exists():
            raise FileNotFoundError(
                f"no verified pairs in {folder}; verify them first: 01_clean_labels"
            )
        self.folder = folder
        self.manifest = checksums.read_manifest(about, REPAIR, ("complete",))
        if not self.manifest["complete"]:
            raise ValueError(
                f"{folder}: not all pairs are verified; go on with it: 01_clean_labels"
            )
        self.candidates = self._open("candidates.npy")

    def __len__(self) -> int:
        """How many images the list has."""
        return len(self.candidates)

    def blocks(self) -> Iterator[np.ndarray]:
        """(P, 4) int32, see the module."""
        for number in range(self.manifest["blocks"]):
            yield self._open(path(self.folder, number).name)

    def _open(self, name: str) -> np.ndarray:
        checksums.verify_files(self.folder, self.manifest, REPAIR, [name])
        return checksums.open_array(self.folder / name, REPAIR)

    def directed(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Images (P,), a candidate of each, and their inliers; a mutual pair comes twice."""
        for block in self.blocks():
            one, other, count, whose = block.T
            for image, candidate, bit in ((one, other, FIRST), (other, one, SECOND)):
                there = (whose & bit) > 0
                yield image[there], candidate[there], count[there]

    def inliers(self, rows: np.ndarray) -> np.ndarray:
        """(n, most) inliers of the images `rows` with their candidates; -1 where there is none."""
        asked = self.candidates[rows]
        keys = np.asarray(rows, np.int64)[:, None] * len(self) + asked
        keys[asked < 0] = -1
        order = keys.ravel().argsort(kind="stable")
        ranked, found = keys.ravel()[order], np.full(keys.size, -1, np.int32)
        for image, candidate, count in self.directed():
            key = image.astype(np.int64) * len(self) + candidate
            first, end = (
                np.searchsorted(ranked, key, side) for side in ("left", "right")
            )
            for here in np.flatnonzero(end > first):  # a row may be asked for twice
                found[order[first[here] : end[here]]] = count[here]
        return found.reshape(asked.shape)


def begin(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The manifest of what is there or begins here.

    Pairs that were `made` otherwise are removed, and damaged blocks.
    """
    about = folder / "manifest.json"
    there = checksums.find_manifest(about, ("complete",))
    for damaged in checksums.find_damaged(folder, there):
        for end in (".npy", ".json"):  # a block's pairs and what of it is unreadable
            damaged.with_suffix(end).unlink(missing_ok=True)
        there |= {"complete": False}
    if there and (other := files.differing(there, made)):
        log.warning("%s: verified again, it was made with another %s", folder, other)
        there = {}
    if not there:
        for name in ("manifest.json", "*.npy", "*.json"):  # the first makes them valid
            for old in folder.glob(name):
                old.unlink()
        there = made | {"complete": False, "kit": kit.__version__}
        checksums.write_manifest(about, there)
    return there


def save(
    folder: Path, number: int, table: np.ndarray, unreadable: Sequence[str]
) -> None:
    """A block of pairs (P, 4), and the paths of its images that could not be read."""
    about = path(folder, number).with_suffix(".json")
    about.unlink(missing_ok=True)  # of a run that was killed before its block was there
    if unreadable:  # first: the block that is there is whole
        files.write_json(about, sorted(unreadable))
    with (
        files.replacing(path(folder, number)) as temporary,
        temporary.open("wb") as file,
    ):
        np.save(file, table, allow_pickle=False)


def finish(folder: Path, there: dict[str, Any], blocks: int) -> None:
    """Marks the pairs complete.

    Where more than a share of MAX_UNREADABLE of the images with candidates cannot be read, that is
    refused, and their blocks are open again.
    """
    for left in folder.glob("*.local"):  # of a run that was killed at its last line
        shutil.rmtree(left)
    pairs, unreadable = 0, []
    for number in range(blocks):
        block = path(folder, number)
        pairs += len(np.load(block, mmap_mode="r", allow_pickle=False))
        if block.with_suffix(".json").exists():
            unreadable += files.read_json(block.with_suffix(".json"))
    found = np.load(folder / "candidates.npy", mmap_mode="r", allow_pickle=False)
    asked = int((found[:, 0] >= 0).sum())
    if len(unreadable) > MAX_UNREADABLE * asked:
        for number in range(blocks):
            about = path(folder, number).with_suffix(".json")
            if about.exists():
                path(folder, number).unlink()
                about.unlink()
        raise ValueError(
            f"{folder}: {len(unreadable)} of {asked} images cannot be read, such as "
            f"{unreadable[0]}, more than a share of {MAX_UNREADABLE}; bring them back and "
            "run it again"
        )
    counted = {"blocks": blocks, "pairs": pairs, "unreadable": sorted(unreadable)}
    names = [*folder.glob("*.npy"), *folder.glob("[0-9]*.json")]
    counted["checksums"] = checksums.compute_checksums(
        folder, sorted(path.name for path in names)
    )
    checksums.write_manifest(
        folder / "manifest.json", there | counted | {"complete": True}
    )


def path(folder: Path, number: int) -> Path:
    """Of a block."""
    return folder / f"{number:05d}.npy"
