"""Local features on disk: described once, block by block, resumable.

<folder>/manifest.json       describer and its parameters, images (count, hash of their names),
                             block; `complete`, `unreadable`, `keypoints` and the blocks'
                             checksums at the end
         00000.safetensors   of a block of images, one after the other:
                             keypoints (n, 2) float32, descriptors (n, d) float16,
                             starts (images + 1,) int64, sizes (images, 2) int32: height, width
                             (0, 0 where the image could not be read)
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import kit
from kit import checksums, files
from kit.data.readers import UnreadableImage
from kit.rerank.local import spread
from kit.rerank.local.features import Describer, LocalFeatures, nothing

log = logging.getLogger(__name__)

REPAIR = (
    "make it again: run the step that uses it once more (04_tune_rerank, 07_recognition, "
    "01_clean_labels), or remove its folder"
)
FIELDS = ("describer", "parameters", "images", "names", "block", "complete")
OPEN = 64  # blocks whose file stays open


class Cache(Sequence):
    """A complete cache: the features of each image by its number, read from disk when asked for."""

    def __init__(self, folder: Path, describe: Describer | None = None) -> None:
        """describe: what the features must have been made with; another one is refused."""
        self.folder = folder
        self.manifest = _manifest(folder)
        if not self.manifest:
            raise FileNotFoundError(f"no local features in {folder}; fill it first")
        wanted = made_by(describe) if describe is not None else {}
        if other := files.differing(self.manifest, wanted):
            raise ValueError(
                f"{folder} holds local features with another {other}; fill it again"
            )
        if not self.manifest["complete"]:
            raise ValueError(f"{folder}: not all images are described; fill it again")
        self._block = lru_cache(OPEN)(self._open)

    def __len__(self) -> int:
        return self.manifest["images"]

    def __getitem__(self, number: int) -> LocalFeatures:
        if not 0 <= number < len(self):
            raise IndexError(f"image {number} of {len(self)} in {self.folder}")
        block, at = divmod(number, self.manifest["block"])
        return self._block(block).image(at)

    def _open(self, block: int) -> "_Block":
        path = _path(self.folder, block)
        checksums.verify_files(self.folder, self.manifest, REPAIR, [path.name])
        return _Block(path)

    def __reduce__(self) -> tuple:
        return Cache, (self.folder,)  # another process opens the files anew


class _Block:
    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="numpy")
        self._starts = self._file.get_tensor("starts")
        self._sizes = self._file.get_tensor("sizes")
        self._dim = self._file.get_slice("descriptors").get_shape()[1]

    def image(self, at: int) -> LocalFeatures:
        here = slice(int(self._starts[at]), int(self._starts[at + 1]))
        height, width = self._sizes[at].tolist()
        if here.start == here.stop:  # safetensors has no empty slice at a tensor's end
            return nothing(self._dim, (height, width))
        return LocalFeatures(
            self._file.get_slice("keypoints")[here],
            self._file.get_slice("descriptors")[here],
            (height, width),
        )


def fill(
    folder: Path,
    names: Sequence[str],
    read: Callable[[str], np.ndarray],
    describe: Describer,
    *,
    block: int = 64,
    processes: int = 0,
) -> Cache:
    """Describes the images `names` that `read` gives, decoded; goes on where it stopped.

    An image for which `read` raises UnreadableImage has no keypoints and is named in the
    manifest. processes: 0 works in this one; else `read` is pickled. Features of other images, of
    another describer or with other parameters are replaced, and damaged blocks.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it is at least 1")
    names = [str(name) for name in names]
    made = made_by(describe) | {
        "images": len(names),
        "names": files.fingerprint(names),
        "block": block,
    }
    with files.lock(folder):
        there = checksums.find_manifest(folder / "manifest.json", FIELDS)
        for path in checksums.find_damaged(folder, there):
            path.unlink(missing_ok=True)
        if there and (other := files.differing(there, made)):
            log.warning(
                "%s: described again, it was made with another %s", folder, other
            )
            there = {}
        if not there:
            for name in (
                "manifest.json",
                "[0-9]*.safetensors",
            ):  # the first makes them valid
                for old in folder.glob(name):
                    old.unlink()
            begun = {"complete": False, "kit": kit.__version__}
            checksums.write_manifest(folder / "manifest.json", made | begun)
        blocks = range(-(-len(names) // block))
        todo = [number for number in blocks if not _path(folder, number).exists()]
        pieces = [
            (_path(folder, number), names[number * block : (number + 1) * block])
            for number in todo
        ]
        done = spread.run(_describe, pieces, (read, describe), processes)
        for _ in tqdm(done, "local features", len(pieces), disable=None):
            pass
        if not (there and there["complete"] and not todo):
            about = made | {"complete": True, "kit": kit.__version__}
            about |= _counts(folder, names, block)
            whole = [_path(folder, number).name for number in blocks]
            about["checksums"] = checksums.compute_checksums(folder, whole)
            checksums.write_manifest(folder / "manifest.json", about)
    return Cache(folder, describe)


def made_by(describe: Describer) -> dict[str, Any]:
    return {"describer": describe.name, "parameters": asdict(describe)}


def _describe(
    piece: tuple[Path, list[str]],
    read: Callable[[str], np.ndarray],
    describe: Describer,
) -> None:
    path, names = piece
    found = []
    for name in names:
        try:
            found.append(describe(read(name)))
        except UnreadableImage:
            found.append(nothing(describe.dim, (0, 0)))
    counts = np.array([len(each) for each in found])
    tensors = {
        "keypoints": np.concatenate([each.keypoints for each in found]),
        "descriptors": np.concatenate([each.descriptors for each in found]),
        "starts": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "sizes": np.array([each.size for each in found], np.int32),
    }
    size = sum(each.nbytes for each in tensors.values())
    with files.replacing(path, size, aside=True) as temporary:
        save_file(tensors, temporary)


def _counts(folder: Path, names: list[str], block: int) -> dict[str, Any]:
    unreadable, keypoints = [], 0
    for start in range(0, len(names), block):
        with safe_open(_path(folder, start // block), framework="numpy") as file:
            keypoints += int(file.get_tensor("starts")[-1])
            absent = (file.get_tensor("sizes") == 0).any(axis=1)
        unreadable += [names[start + at] for at in np.flatnonzero(absent)]
    return {"unreadable": unreadable, "keypoints": keypoints}


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return checksums.read_manifest(path, REPAIR, FIELDS) if path.exists() else {}


def _path(folder: Path, block: int) -> Path:
    return folder / f"{block:05d}.safetensors"
