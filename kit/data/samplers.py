"""The order in which training meets its images: seeded, split over ranks, resumable at a step."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def shuffle(length: int, seed: int, epoch: int) -> np.ndarray:
    """(length,) every row once, in an order of its own for each (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(length)


class Batches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, row) for one rank, from any step of the stage to its end.

    A step takes `batch` rows of the epoch's order, the ranks side by side; the last step of an
    epoch is filled up from the order's beginning, so that every batch is whole on every rank.
    """

    def __init__(
        self,
        length: int,  # rows of the list
        batch: int,  # rows a step, over all ranks
        epochs: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,  # the first step to give, counted over the whole stage
    ) -> None:
        if batch % world:
            raise ValueError(
                f"a batch of {batch} does not split over {world} processes"
            )
        if length < 1:
            raise ValueError("a list without rows cannot be sampled")
        self.length, self.batch, self.epochs, self.seed = length, batch, epochs, seed
        self.rank, self.world, self.start = rank, world, start
        self.per_epoch = -(-length // batch)
        self.steps = epochs * self.per_epoch

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.world
        for epoch in range(self.start // self.per_epoch, self.epochs):
            order = shuffle(self.length, self.seed, epoch)
            order = np.resize(
                order, self.per_epoch * self.batch
            )  # repeats from the beginning
            first = max(self.start - epoch * self.per_epoch, 0)
            for step in range(first, self.per_epoch):
                at = step * self.batch + self.rank * share
                yield [(epoch, int(row)) for row in order[at : at + share]]
