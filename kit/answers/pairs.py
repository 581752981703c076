"""Inliers of queries with a few references each, out of millions: only those are described."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kit import files
from kit.answers.pictures import Counts, Decoded, Pictures, pair_numbers
from kit.answers.retrieval import Reference
from kit.answers.scene import QUERY
from kit.data.readers import open_reader
from kit.rerank.local import cache, verification
from kit.rerank.local.cache import Cache
from kit.rerank.local.features import LocalFeatures

Way = tuple[str, int]  # backend, side
SAMPLE = 100  # references that are looked for before any is described


@dataclass(frozen=True)
class Pairs:
    """Queries and references that may be verified; a pair is, once, when somebody asks for it.

    References are described in parts, those that nobody asked for before, in
    local/<backend>/<side>/<list>-some/<hash of their names>: the same questions in the same
    order find them again.
    """

    pictures: Pictures  # of the queries; it says where and how
    reference: Reference
    ids: np.ndarray  # (N,) of the reference features, whose rows are asked for
    known: dict[Way, Counts] = field(default_factory=dict, compare=False, repr=False)
    parts: dict[Way, "Parts"] = field(default_factory=dict, compare=False, repr=False)

    def inliers(self, rows: Tensor, backend: str, side: int) -> Tensor:
        """(Q, k) int32 of each query with rows (Q, k) of the references; 0 where a row is below 0."""
        if not (rows >= 0).any():
            return torch.zeros_like(rows, dtype=torch.int32)
        counts = self.known.setdefault((backend, side), Counts())
        numbers = pair_numbers(rows.numpy(), len(self.ids))
        asked = (rows.numpy() >= 0) & ~np.isin(numbers, counts.pairs)
        if asked.any():
            described = self._described(np.unique(rows.numpy()[asked]), backend, side)
            fresh = verification.shortlist_inliers(
                torch.from_numpy(described.at(np.where(asked, rows.numpy(), -1))),
                self.pictures(QUERY, backend, side),
                described,
                verification.backend(backend),
                processes=self.pictures.processes,
            )
            counts.add(numbers[asked], fresh.numpy()[asked])
        return torch.from_numpy(counts.of(numbers)).masked_fill(rows < 0, 0)

    def _described(self, rows: np.ndarray, backend: str, side: int) -> "Parts":
        """Parts that hold all these rows, ascending, with what is missing described now."""
        before = self.parts.get((backend, side), Parts())
        missing = rows[before.at(rows) < 0]
        if len(missing):
            names = self._paths(self.ids[missing])
            reader = open_reader(self.pictures.data)
            if not any(map(reader.exists, names[:SAMPLE])):
                raise FileNotFoundError(
                    f"{self.pictures.data}: {names[0]} and the {len(names) - 1} references "
                    "after it are not there; verification needs their images"
                )
            folder = self.pictures.folder / backend / str(side)
            found = cache.fill(
                folder / f"{self.reference.name}-some" / files.fingerprint(names)[:16],
                names,
                Decoded(reader),
                replace(verification.backend(backend).describe, side=side),
                processes=self.pictures.processes,
            )
            before = before.with_part(missing, found)
            self.parts[backend, side] = before
        return before

    def _paths(self, ids: np.ndarray) -> list[str]:
        """Where these images are, read from the list some rows at a time."""
        found: dict[str, str] = {}
        wanted = set(ids.tolist())
        for block in self.reference.blocks(("id", "path")):
            some = block[block["id"].isin(wanted)]
            found |= dict(zip(some["id"], some["path"], strict=True))
        return [found[name] for name in ids.tolist()]


@dataclass(frozen=True)
class Parts(Sequence):
    """Caches of some images, as one sequence; `rows` are their numbers in the whole list."""

    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    caches: tuple[Cache, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> LocalFeatures:
        for part in self.caches:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(f"image {number} beyond the last of {len(self)}")

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Places (any shape) of rows of the whole list in the sequence; -1 where one lacks."""
        if not len(self.rows):
            return np.full(rows.shape, -1)
        order = np.argsort(self.rows)
        place = order[np.searchsorted(self.rows[order], rows).clip(max=len(order) - 1)]
        return np.where(self.rows[place] == rows, place, -1)

    def with_part(self, rows: np.ndarray, part: Cache) -> "Parts":
        return Parts(np.concatenate([self.rows, rows]), (*self.caches, part))
