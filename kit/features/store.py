"""Features on disk: one row an image, memory-mapped, written block by block, resumable.

features/<model>/<list>/ids.npy         (N,) U16, each image once, in the list's order
                        vectors.npy     (N, D) float16, unit length; zeros where unreadable
                        done.npy        (blocks,) uint8; 2 where some images were unreadable
                        manifest.json   model, list, what both saw, how an image was looked at,
                                        counts; `complete` and checksums at the end
"""

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

import kit
from kit import checksums, files

REPAIR = (
    "make it again: --force the pipeline's 03_features step, or 03_extract_features"
)
FIELDS = ("complete", "rows", "dim", "block", "unreadable")
WHOLE, WITH_ZEROS = 1, 2  # marks of a block
FILES = ("ids.npy", "vectors.npy", "done.npy")
NO_FALLOCATE = errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF
CHUNK = 1 << 23  # bytes of zeros that are written at once


@dataclass(frozen=True)
class Features:
    """A complete store, open for reading."""

    ids: np.ndarray  # (N,) U16, memory-mapped
    vectors: np.ndarray  # (N, D) float16, memory-mapped
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def locate(self, ids: np.ndarray) -> np.ndarray:
        """(M,) rows of `ids`; -1 where the store lacks one."""
        order = self._order
        at = np.searchsorted(self.ids, ids, sorter=order).clip(max=len(self.ids) - 1)
        rows = order[at]
        return np.where(self.ids[rows] == ids, rows, -1)

    def find(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        """(M,) rows of `ids`; refuses an id that the store lacks.

        start: where they perhaps stand one after the other, which takes no memory to see.
        """
        if np.array_equal(self.ids[start : start + len(ids)], ids):
            return np.arange(start, start + len(ids))
        rows = self.locate(ids)
        strange = rows < 0
        if strange.any():
            raise ValueError(
                f"features of list {self.manifest['list']['name']} have no image "
                f"{ids[strange][0]} ({int(strange.sum())} missing)"
            )
        return rows

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids)

    def readable(self) -> np.ndarray:
        """(N,) bool: False where the image could not be read."""
        lost = np.array(self.manifest["unreadable"], dtype="U16")
        size = 1 << 18  # text is compared in copies of it
        blocks = (self.ids[n : n + size] for n in range(0, len(self.ids), size))
        return np.concatenate([np.zeros(0, bool), *(~np.isin(b, lost) for b in blocks)])

    def blocks(
        self, rows: np.ndarray | None = None, size: int = 16_384
    ) -> Iterator[Tensor]:
        """The vectors (of `rows`, in their order) as float32 blocks of at most `size` rows."""
        length = len(self) if rows is None else len(rows)
        for start in range(0, length, size):
            here = slice(start, start + size)
            block = self.vectors[here if rows is None else rows[here]]
            yield torch.from_numpy(np.array(block)).float()


def create(
    folder: Path, ids: np.ndarray, dim: int, block: int, about: dict[str, Any]
) -> np.ndarray:
    """Prepares a store to be filled; returns its block bitmap (1: already there).

    A store of the same `about` goes on where it stopped, one that was finished without some
    blocks too; another one there is replaced, and a damaged one. Space is taken at once, so that a
    full disk is an error here and not a crash in the middle.
    """
    manifest = folder / "manifest.json"
    facts = {**about, "rows": len(ids), "dim": dim, "block": block}
    same = checksums.is_resumable(folder, facts, FILES)
    if not same:
        for name in ("manifest.json", "done.npy", "ids.npy", "vectors.npy"):
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        allocate(folder / "vectors.npy", (len(ids), dim), np.float16)
        _save(folder / "ids.npy", ids.astype("U16"))
        _save(folder / "done.npy", np.zeros(-(-len(ids) // block), np.uint8))
        unfinished = {"complete": False, "unreadable": [], "kit": kit.__version__}
        checksums.write_manifest(manifest, facts | unfinished)
    done = np.load(folder / "done.npy", allow_pickle=False)
    if same and not done.all():
        about = checksums.read_manifest(manifest, REPAIR)
        checksums.write_manifest(manifest, about | {"complete": False})
    return done


class Writer:
    """Writes whole blocks of a store that `create` has prepared.

    Any number of processes may write at once, on any machines that share the folder: each
    writes its own blocks' bytes, where a memory map would write pages that reach into others'.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = checksums.read_manifest(folder / "manifest.json", REPAIR, FIELDS)
        self.block = about["block"]
        vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        self.rows, self.dim = vectors.shape
        self.done = np.load(folder / "done.npy", allow_pickle=False)

    def write(self, number: int, vectors: np.ndarray, mark: bool = True) -> None:
        """The (n, D) vectors of block `number`, then its mark, each down to the disk.

        Without its mark, a block is made again by whoever goes on with the store.
        """
        first = number * self.block
        expected = min(self.block, self.rows - first), self.dim
        if vectors.shape != expected:
            raise ValueError(
                f"{self.folder}: block {number} is {expected}, not {vectors.shape}"
            )
        write_rows(self.folder / "vectors.npy", first, vectors)
        if mark:
            self.done[number] = WHOLE if vectors.any(axis=1).all() else WITH_ZEROS
            write_rows(self.folder / "done.npy", number, self.done[number, None])


def finish(folder: Path, max_unreadable: float = 1.0, lacking: bool = False) -> int:
    """Marks a store complete; returns how many images could not be read: zero rows.

    More than a share of `max_unreadable` is refused, and their blocks are open again. lacking:
    blocks need no mark; of those, what is written counts, and `create` goes on with them.
    """
    done = np.load(folder / "done.npy", mmap_mode="r+", allow_pickle=False)
    if not lacking and not done.all():
        raise RuntimeError(
            f"{folder}: blocks are missing; run 03_extract_features again"
        )
    ids = np.load(folder / "ids.npy", allow_pickle=False)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    about = checksums.read_manifest(folder / "manifest.json", REPAIR, FIELDS)
    zero = np.concatenate(
        [
            ~vectors[start : start + 16_384].any(axis=1)
            for start in range(0, len(ids), 16_384)
        ]
    )
    lost = np.unique(np.flatnonzero(zero) // about["block"])
    lost = lost[done[lost] == WHOLE]
    if len(lost):
        done[lost] = 0
        raise ValueError(
            f"{folder / 'vectors.npy'}: block {lost[0]} has zero rows, but its images were "
            f"readable; the disk lost them; {REPAIR}"
        )
    if lacking and zero.all():
        raise RuntimeError(f"{folder}: not one image's features are there")
    names = [str(name) for name in ids[zero]]
    if len(names) > max_unreadable * len(ids):
        done[np.unique(np.flatnonzero(zero) // about["block"])] = 0
        raise ValueError(
            f"list {about['list']['name']}: {len(names)} of {len(ids)} images cannot be "
            f"read, more than a share of {max_unreadable}; for example "
            + ", ".join(names[:5])
        )
    made = {"complete": True, "unreadable": names}
    made["checksums"] = checksums.compute_checksums(folder, FILES)
    checksums.write_manifest(folder / "manifest.json", about | made)
    return len(names)


def load(folder: Path) -> Features:
    """The complete store in `folder`; one whose files have changed since is refused."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        raise FileNotFoundError(
            f"no features in {folder}; run 03_extract_features first"
        )
    about = checksums.read_manifest(manifest, REPAIR, FIELDS)
    if not about["complete"]:
        raise ValueError(
            f"{folder}: extraction has not finished; run 03_extract_features again"
        )
    checksums.verify_files(folder, about, REPAIR, FILES[:2])
    ids = np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    if vectors.shape != (about["rows"], about["dim"]) or len(ids) != about["rows"]:
        raise ValueError(
            f"{folder}: its files are not those that manifest.json describes"
        )
    return Features(ids.view(np.ndarray), vectors, about)


def expect(
    features: Features, *, list_hash: str = "", model_hash: str = ""
) -> Features:
    """`features`, refused unless they are of this list and this model."""
    for kind, wanted in (("list", list_hash), ("model", model_hash)):
        found = features.manifest[kind]
        if wanted and found["hash"] != wanted:
            raise ValueError(
                f"features of {kind} {found['name']}: hash {found['hash'][:12]} is not the "
                f"expected {wanted[:12]}; extract them again: 03_extract_features"
            )
    return features


def write_rows(path: Path, first: int, rows: np.ndarray) -> None:
    """Overwrite the rows of an .npy file from `first` on, down to the disk.

    No other row's bytes are written, so processes on any machines may write theirs at once: a
    memory map writes whole pages, which on a network disk bring back old rows of others.
    """
    there = np.load(path, mmap_mode="r", allow_pickle=False)
    data = np.ascontiguousarray(rows, there.dtype)
    with files.explain_errors(path, size=data.nbytes), path.open("r+b") as file:
        file.seek(there.offset + first * there.strides[0])
        file.write(data.data)
        file.flush()
        os.fsync(file.fileno())


def _save(path: Path, array: np.ndarray) -> None:
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def allocate(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    """An .npy file of zeros with its blocks taken on disk: a sparse map on a full disk dies by SIGBUS."""
    header = {
        "descr": npy.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    size = math.prod(shape) * np.dtype(dtype).itemsize
    # readable: where the disk cannot take blocks, the C library reads and writes in each
    with files.replacing(path, size) as temporary, temporary.open("w+b") as file:
        npy.write_array_header_1_0(file, header)
        file.flush()
        if size:
            try:
                os.posix_fallocate(file.fileno(), 0, file.tell() + size)
            except (AttributeError, OSError) as error:  # no such call: macOS, musl
                if getattr(error, "errno", 0) not in (0, *NO_FALLOCATE):
                    raise
                for start in range(0, size, CHUNK):
                    file.write(bytes(min(CHUNK, size - start)))
