"""screen.npy: a bfloat16 copy of a store's vectors, which a CPU screens at gemm speed.

features/<model>/<list>/screen.npy    (N, D) uint16: the bits of bfloat16, rounded to nearest
                        screen.json   checksums of the copy and of the vectors it was made from,
                                      and what the proof of the search needs (`Screen`)

The copy is written beside the store, once, by `python -m kit.features.screen FOLDER ...`. It
belongs to one content of vectors.npy: a copy of other vectors is ignored with a warning until
`build` has replaced it. A damaged copy is refused.
"""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kit import checksums, files
from kit.features import store
from kit.features.store import Features

TOLERANCE = 0.01  # by which the length of a stored vector may differ from 1
STEP = 512  # rows converted at a time: they stay in a core's cache
SAFETY = 1.001  # lengths are measured in float32

log = logging.getLogger(__name__)


class Bounds(NamedTuple):
    """What is true of every row of a low-precision copy."""

    longest: float = 0.0  # length of the longest row
    off: float = 0.0  # distance between a row and its copy, at most


class Screen(NamedTuple):
    rows: Tensor  # (N, D) bfloat16, mapped
    bounds: Bounds


def build(folder: Path) -> Path:
    """Writes the copy of the complete store in `folder`, unless it is there already."""
    features = store.load(folder)
    vectors, path = features.vectors, folder / "screen.npy"
    try:
        if _bounds(folder, features) is not None:
            return path
    except checksums.Damaged as error:
        log.warning("%s", error)
    (folder / "screen.json").unlink(missing_ok=True)
    with files.replacing(path) as temporary:
        store.allocate(temporary, vectors.shape, np.uint16)
        bounds = _fill(temporary, vectors)
    about = {
        "vectors": features.manifest["checksums"]["vectors.npy"],
        "checksums": checksums.compute_checksums(folder, ["screen.npy"]),
    }
    checksums.write_manifest(folder / "screen.json", about | bounds._asdict())
    return path


def of(features: Features) -> Screen | None:
    """The copy that lies beside a store, if there is one of these vectors."""
    vectors = features.vectors
    name = getattr(vectors, "filename", None)
    if name is None or not vectors.flags.c_contiguous:
        return None
    folder = Path(name).parent
    if Path(name).name != "vectors.npy":
        return None
    bounds = _bounds(folder, features)
    if bounds is None:
        return None
    copy = np.load(folder / "screen.npy", mmap_mode="r", allow_pickle=False)
    return Screen(mapped(copy.view(np.int16)).view(torch.bfloat16), bounds)


def mapped(array: np.ndarray) -> Tensor:
    """The array as a tensor without a copy; one that is mapped for reading stays so."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The given NumPy array is not writable"
        )
        return torch.from_numpy(array)


def convert(
    block: Tensor,
    out: Tensor,
    numbers: Tensor,
    step: int = STEP,
    measure: bool = True,
) -> Bounds:
    """Rounds rows (n, D) float16 into `out` (n, D) of another type; says how far they moved.

    measure: by how much they did; else, in half the time, by how much they may have. Refuses rows
    that are neither of unit length nor zero, by their `numbers` (n,).
    """
    # made once: memory fresh from the system costs more than all of the arithmetic
    scratch = torch.empty(1 + measure, min(step, len(block)), block.shape[1])
    scratch = scratch.to(out.device)
    lengths, off = torch.zeros(2, len(block), device=out.device)
    for start in range(0, len(block), step):  # all of it in a core's cache
        here = slice(start, min(start + step, len(block)))
        exact = scratch[0, : here.stop - start].copy_(block[here])
        out[here].copy_(exact)
        torch.linalg.vector_norm(exact, dim=1, out=lengths[here])
        if measure:
            exact -= scratch[1, : here.stop - start].copy_(out[here])
            torch.linalg.vector_norm(exact, dim=1, out=off[here])
    refuse_odd(lengths, numbers)
    longest = lengths.max().item() if len(block) else 0.0
    furthest = longest * 2.0**-8 if out.dtype == torch.bfloat16 else 0.0
    if measure:
        furthest = off.max().item() if len(block) else 0.0
    return Bounds((longest + furthest) * SAFETY, furthest * SAFETY)


def refuse_odd(lengths: Tensor, numbers: Tensor) -> None:
    """Names a row whose length is neither 1 nor 0: not normalised, or not finite."""
    fine = ((lengths - 1).abs() <= TOLERANCE) | (lengths == 0)
    if fine.all():
        return
    at = int((~fine).nonzero()[0])
    length = lengths[at].item()
    what = (
        f"length {length:.4g}, not 1" if math.isfinite(length) else "a value not finite"
    )
    raise ValueError(f"row {int(numbers[at])} of the features has {what}")


def widest(one: Bounds, other: Bounds) -> Bounds:
    return Bounds(max(one.longest, other.longest), max(one.off, other.off))


def _fill(path: Path, vectors: np.ndarray) -> Bounds:
    """Writes the rounded rows; by one thread, since steps are small and disks slow."""
    copy = np.load(path, mmap_mode="r+", allow_pickle=False)
    bounds, threads = Bounds(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start in range(0, len(vectors), 64 * STEP):
            block = mapped(vectors[start : start + 64 * STEP])
            rows = torch.empty(block.shape, dtype=torch.bfloat16)
            numbers = torch.arange(start, start + len(block))
            bounds = widest(bounds, convert(block, rows, numbers))
            copy[start : start + len(block)] = (
                rows.view(torch.int16).numpy().view(np.uint16)
            )
    finally:
        torch.set_num_threads(threads)
    copy.flush()
    return bounds


def _bounds(folder: Path, features: Features) -> Bounds | None:
    """Of the whole copy of exactly these vectors, if it is there; a damaged one is refused."""
    about_file, path = folder / "screen.json", folder / "screen.npy"
    if not (about_file.exists() and path.exists()):
        return None
    repair = f"run python -m kit.features.screen {folder}, or remove both files"
    needed = ("vectors", "longest", "off")
    about = checksums.read_manifest(about_file, repair, needed)
    whole = features.manifest.get("rows") == len(features)
    if not whole or about["vectors"] != features.manifest["checksums"]["vectors.npy"]:
        log.warning(
            "%s: a copy of other vectors, not used; build it again: "
            "python -m kit.features.screen %s",
            *(path, folder),
        )
        return None
    checksums.verify_files(folder, about, repair, ["screen.npy"])
    return Bounds(about["longest"], about["off"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write the bfloat16 copies that CPUs search faster."
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", help="features/<model>/<list>, complete"
    )
    folders = parser.parse_args(arguments).folders
    try:
        for folder in folders:
            print(build(folder))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
