"""Search by faiss, and smaller copies of features with what they cost in recall.

faiss finds candidates; their scores and order are those of `kit.features.search`: exact inner
products of the stored values, ties to the lower row.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kit import files
from kit.features.certified.task import pack, unpack
from kit.features.screen import refuse_odd
from kit.features.search import Neighbours, Rows, knn, stored

KINDS = ("flat", "ivfpq")
BLOCK = 16_384  # rows converted at a time
CENTROIDS = 256  # of each part of a product code: one byte
TRAINED_ON = 64  # rows for each centroid that k-means finds


class Saving(NamedTuple):
    """What a smaller copy of the features costs."""

    name: str
    bytes_a_row: float
    times_smaller: float  # than the float16 store
    recall: float  # share of the exact k nearest rows that it finds


def knn_faiss(
    query: Rows,
    database: Rows,
    k: int,
    kind: str = "flat",
    *,
    lists: int | None = None,
    codes: int = 64,
    probe: int = 32,
    refine: int = 8,
) -> Neighbours:
    """The k nearest rows by a faiss index; on a GPU if faiss sees one and the kind is "flat".

    "flat" holds the database in float32 and finds what `knn` does, up to what float32 cannot
    tell apart. "ivfpq" looks into `probe` of `lists` cells (the root of N's nearest power of
    two, if not given) of codes of `codes` bytes a row, and scores `refine` k candidates exactly.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose from {', '.join(KINDS)}")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if min(codes, probe, refine, 1 if lists is None else lists) < 1:
        raise ValueError(
            f"lists is {lists}, codes {codes}, probe {probe} and refine {refine}; each must "
            "be at least 1"
        )
    queries, rows = stored(query, "queries"), stored(database, "database")
    if not len(rows):
        raise ValueError("the database has no rows")
    _refuse_odd(queries, rows)
    index = _flat(rows) if kind == "flat" else _ivfpq(rows, lists, codes, probe)
    wanted = k if kind == "flat" else k * refine
    _, found = index.search(queries.float().numpy(), min(wanted, len(rows)))
    return _scored(queries, rows, torch.from_numpy(found), min(k, len(rows)))


def int8_copy(database: Rows, folder: Path) -> Path:
    """Writes int8.npy (N, D) and scales.npy (N,) float32; row = scale x integers."""
    rows = stored(database, "database")
    _refuse_odd(rows)
    codes, scales = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK):
        here = slice(start, start + BLOCK)
        scale, integers = _int8(rows[here].float())
        codes[here], scales[here] = integers.numpy(), scale.numpy()
    for name, values in (("scales", scales), ("int8", codes)):
        with files.replacing(folder / f"{name}.npy") as path, path.open("wb") as file:
            np.save(file, values, allow_pickle=False)
    return folder / "int8.npy"


def savings(
    query: Rows, database: Rows, k: int, codes: tuple[int, ...] = (64, 128)
) -> list[Saving]:
    """Recall@k of an int8 copy and of product quantisers, printed beside the saving.

    codes: bytes a row of the product quantisers, without those that do not divide D.
    """
    queries, rows = stored(query, "queries"), stored(database, "database")
    dim = rows.shape[1]
    if any(dim % size == 0 for size in codes):
        _refuse_few(len(rows))
    exact = knn(queries, rows, k).rows
    coarse = torch.cat([_restored(*_int8(part.float())) for part in rows.split(BLOCK)])
    copies = [("int8", dim + 4.0, knn(queries, coarse, k).rows)]
    for size in codes:
        if dim % size == 0:
            index = _trained(f"PQ{size}", rows)
            found = index.search(queries.float().numpy(), exact.shape[1])[1]
            copies.append((f"PQ{size}", float(size), torch.from_numpy(found)))
    result = []
    for name, size, found in copies:
        shared = (found[:, :, None] == exact[:, None, :]).any(dim=2)
        saving = Saving(name, size, 2 * dim / size, shared.float().mean().item())
        print(
            f"{name:6} {saving.bytes_a_row:6.0f} bytes a row, "
            f"{saving.times_smaller:4.1f}x smaller, recall@{k} {saving.recall:.4f}"
        )
        result.append(saving)
    return result


def _refuse_few(count: int) -> None:
    if count < CENTROIDS:
        raise ValueError(
            f"{count} rows are fewer than the {CENTROIDS} centroids that a product code "
            "learns; search them exactly, or by kind flat"
        )


def _refuse_odd(*sides: Tensor) -> None:
    """Names a row that is neither of unit length nor zero, such as one with NaN."""
    for rows in sides:
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK].float()
            numbers = torch.arange(start, start + len(part))
            refuse_odd(torch.linalg.vector_norm(part, dim=1), numbers)


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (n,) and integers (n, D) of -127 .. 127 for each row."""
    scale = rows.abs().amax(dim=1) / 127
    integers = (rows / scale.clamp(min=1e-12)[:, None]).round()
    return scale, integers.to(torch.int8)


def _restored(scale: Tensor, integers: Tensor) -> Tensor:
    """(n, D) float16 rows that the integers stand for."""
    return (scale[:, None] * integers).half()


def _flat(rows: Tensor):
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    if getattr(faiss, "get_num_gpus", int)():
        index = faiss.index_cpu_to_all_gpus(index)
    for part in rows.split(BLOCK):
        index.add(part.float().numpy())
    return index


def _ivfpq(rows: Tensor, lists: int | None, codes: int, probe: int):
    if rows.shape[1] % codes:
        raise ValueError(f"{codes} codes do not divide {rows.shape[1]} dimensions")
    _refuse_few(len(rows))
    if lists is not None and lists > len(rows):
        raise ValueError(f"{lists} lists are more than the {len(rows)} rows")
    lists = lists or 1 << max(0, (len(rows).bit_length() - 1) // 2)
    index = _trained(f"IVF{lists},PQ{codes}", rows, lists)
    index.nprobe = min(probe, lists)
    return index


def _trained(factory: str, rows: Tensor, lists: int = 1):
    """A faiss index of all rows, its quantisers trained on evenly spaced ones."""
    import faiss

    index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    step = max(1, len(rows) // (TRAINED_ON * max(lists, CENTROIDS)))
    index.train(rows[::step].float().numpy())
    for part in rows.split(BLOCK):
        index.add(part.float().numpy())
    return index


def _scored(queries: Tensor, rows: Tensor, found: Tensor, k: int) -> Neighbours:
    """The k best of the rows found (Q, n; -1: none), by their exact scores."""
    keys = []
    for query, near in zip(queries.double(), found, strict=True):
        scores = (rows[near.clamp(min=0)].double() @ query).float()
        keys.append(pack(torch.where(near < 0, -torch.inf, scores), near))
    return Neighbours(*unpack(torch.stack(keys).sort(descending=True).values[:, :k]))
