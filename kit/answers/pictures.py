"""Local features of queries and index, and what they confirm, worked out when a step first asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit.data import images, lists
from kit.data.readers import Reader, open_reader
from kit.rerank.local import cache, verification
from kit.rerank.local.cache import Cache


@dataclass(frozen=True)
class Pictures:
    """Images of each list, and the folder that keeps what was described: local/<backend>/<side>.

    A pair of images is verified once, however many chains ask.
    """

    data: Path  # folder that the lists' paths start from
    folder: Path
    lists: Mapping[str, lists.ImageList]  # by what they are: query, index
    processes: int = 0  # that describe and verify; 0: this one
    known: dict[tuple[str, str, int], "Counts"] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __call__(self, which: str, backend: str, side: int) -> Cache:
        """The features of one list, in the order of its stores: each image once."""
        found = self.lists[which]
        first = ~found.rows["id"].duplicated().to_numpy()
        return cache.fill(
            self.folder / backend / str(side) / found.name,
            found.rows["path"].to_numpy()[first],
            Decoded(open_reader(self.data)),
            replace(verification.backend(backend).describe, side=side),
            processes=self.processes,
        )

    def inliers(self, of: str, rows: Tensor, backend: str, side: int) -> Tensor:
        """(n, k) int32 of each query or index image (`of`) with its index rows (n, k); 0 where the
        row is below 0.
        """
        index = self("index", backend, side)
        images = index if of == "index" else self(of, backend, side)
        counts = self.known.setdefault((of, backend, side), Counts())
        pairs = pair_numbers(rows.numpy(), len(index), mutual=of == "index")
        asked = (rows.numpy() >= 0) & ~np.isin(pairs, counts.pairs)
        if asked.any():
            fresh = verification.shortlist_inliers(
                rows.masked_fill(torch.from_numpy(~asked), -1),
                images,
                index,
                verification.backend(backend),
                processes=self.processes,
            )
            counts.add(pairs[asked], fresh.numpy()[asked])
        return torch.from_numpy(counts.of(pairs)).masked_fill(rows < 0, 0)


class Counts:
    """Inliers of pairs, each told by one number."""

    def __init__(self) -> None:
        self.pairs, self.counts = np.empty(0, np.int64), np.empty(0, np.int32)

    def add(self, pairs: np.ndarray, counts: np.ndarray) -> None:
        pairs, counts = np.r_[self.pairs, pairs], np.r_[self.counts, counts]
        self.pairs, first = np.unique(pairs, return_index=True)
        self.counts = counts[first]

    def of(self, pairs: np.ndarray) -> np.ndarray:
        """Of pairs that are known; of others anything."""
        places = np.searchsorted(self.pairs, pairs).clip(max=len(self.pairs) - 1)
        return self.counts[places]


def pair_numbers(rows: np.ndarray, size: int, mutual: bool = False) -> np.ndarray:
    """A number for each pair of own and named row; the same both ways round if mutual."""
    own = np.broadcast_to(np.arange(len(rows))[:, None], rows.shape)
    if mutual:
        own, rows = np.minimum(own, rows), np.maximum(own, rows)
    return own * size + rows


@dataclass(frozen=True)
class Decoded:
    """Reads and decodes; other processes get it pickled."""

    reader: Reader

    def __call__(self, path: str) -> np.ndarray:
        return images.decode(self.reader.read(path), path)
