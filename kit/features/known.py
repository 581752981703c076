"""Features that other lists' stores hold already: found by id, checked, copied to the bit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kit.features import store
from kit.features.store import Features


class Known:
    """A model's vectors of a list's images, as far as other stores have readable ones."""

    def __init__(self, stores: Sequence[Features], ids: np.ndarray) -> None:
        self.there = np.zeros(len(ids), bool)  # (N,)
        self.parts = []  # vectors of a store, and their row for each image, or -1
        for features in stores:
            rows = features.locate(ids)
            new = (rows >= 0) & features.readable()[rows] & ~self.there
            self.parts.append((features.vectors, np.where(new, rows, -1)))
            self.there |= new

    def copy(self, first: int, vectors: np.ndarray) -> None:
        """Sets what is known of (n, D) `vectors`, those of the images from row `first` on."""
        for stored, rows in self.parts:
            here = rows[first : first + len(vectors)]
            vectors[here >= 0] = stored[here[here >= 0]]


def load_known(folder: Path, model_hash: str, views: Mapping[str, Any]) -> Features:
    """The complete store in `folder`; refused where its weights or its views are others."""
    features = store.load(folder)
    facts = features.manifest | {"model": features.manifest["model"]["hash"][:12]}
    for name, wanted in {"model": model_hash[:12], **views}.items():
        if facts.get(name) != wanted:
            raise ValueError(
                f"{folder}: made with {name} {facts.get(name)}, not {wanted}; extract these "
                "features again, or go without them"
            )
    return features
