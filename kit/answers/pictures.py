"""Local features of the queries and the index, described when a step first asks for them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kit.data import images, lists
from kit.data.readers import Reader, open_reader
from kit.rerank.local import cache, verification
from kit.rerank.local.cache import Cache


@dataclass(frozen=True)
class Pictures:
    """Images of each list, and the folder that keeps what was described: local/<backend>/<side>."""

    data: Path  # folder that the lists' paths start from
    folder: Path
    lists: Mapping[str, lists.ImageList]  # by what they are: query, index
    processes: int = 0  # that describe; 0: this one

    def __call__(self, which: str, backend: str, side: int) -> Cache:
        """The features of one list, in the order of its stores: each image once."""
        found = self.lists[which]
        first = ~found.rows["id"].duplicated().to_numpy()
        return cache.fill(
            self.folder / backend / str(side) / found.name,
            found.rows["path"].to_numpy()[first],
            _Decoded(open_reader(self.data)),
            replace(verification.backend(backend).describe, side=side),
            processes=self.processes,
        )


@dataclass(frozen=True)
class _Decoded:
    """Reads and decodes; other processes get it pickled."""

    reader: Reader

    def __call__(self, path: str) -> np.ndarray:
        return images.decode(self.reader.read(path), path)
