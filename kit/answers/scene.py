"""What a chain works on: models' features of queries, index and references, and who is near whom.

One vocabulary for one model and for several: scores are weighted sums, vectors are weighted and
joined, so that a step need not know how many models there are.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit.answers.pictures import Pictures
from kit.features import screen, search
from kit.features.graph import Graph
from kit.features.search import Neighbours
from kit.features.store import Features
from kit.rerank import fusion, order
from kit.rerank.addends import Addends
from kit.rerank.steps import Step

QUERY, INDEX, REFERENCE = "query", "index", "reference"
BLOCK = 16_384  # vectors made at a time


@dataclass(frozen=True)
class Model:
    """One model's features of the images that a chain reads."""

    query: Features
    index: Features | None = None  # of the images that are searched
    reference: Features | None = None  # of the images that vote
    # stored neighbours of index or reference images among themselves
    graphs: Mapping[str, Graph] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.query.manifest["model"]["name"]

    def of(self, which: str) -> Features:
        found: Features | None = getattr(self, which)
        if found is None:
            raise ValueError(
                f"model {self.name} has no features of the {which} list; extract them"
            )
        return found

    def moved(self, which: str, vectors: np.ndarray) -> "Model":
        """The model with other vectors (N, D) of unit length for the same images."""
        features = replace(
            self.of(which), vectors=vectors.astype(np.float16, copy=False)
        )
        kept = {name: graph for name, graph in self.graphs.items() if name != which}
        return replace(self, **{which: features, "graphs": kept})


@dataclass(frozen=True)
class Voters:
    """Labelled references: one entry a (reference image, landmark) pair; perhaps none."""

    rows: np.ndarray  # (R,) rows of the reference features
    landmarks: Tensor  # (R,)
    countries: Tensor  # (R,) -1 for none


@dataclass(frozen=True)
class Scene:
    """Models with their weights, who votes, and what has been searched so far.

    Rows of `reference` are everywhere the entries of `voters`, but for `stored`.
    """

    models: Sequence[Model]
    weights: Sequence[float]
    voters: Voters | None = None
    pictures: Pictures | None = None  # for steps that verify
    found: dict[tuple[str, str, int], Neighbours] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __len__(self) -> int:
        """How many queries there are."""
        return len(self.models[0].query)

    @cached_property
    def path(self) -> list[tuple[Step, "Scene"]]:
        """Steps that moved the features last, one after the other, and the scene after each."""
        return []

    def each(self) -> list["Scene"]:
        """The models one by one, each with weight 1; always the same scenes."""
        return self._each

    @cached_property
    def _each(self) -> list["Scene"]:
        if len(self.models) == 1 and self.weights == (1.0,):
            return [self]
        return [
            replace(self, models=(model,), weights=(1.0,), found={})
            for model in self.models
        ]

    def of_models(self, scenes: Sequence["Scene"]) -> "Scene":
        """The models of scenes of one model each, with this one's weights."""
        models = tuple(scene.models[0] for scene in scenes)
        if all(map(operator.is_, models, self.models)):
            return self
        if len(scenes) == 1 and scenes[0].weights == self.weights:
            return scenes[0]
        if len(scenes) == 1:
            return replace(scenes[0], weights=self.weights, found={})
        return replace(self, models=models, found={})

    def moved(self, which: str, vectors: Tensor) -> "Scene":
        """A scene of one model with other vectors for the same images."""
        (model,) = self.models
        model = model.moved(which, vectors.numpy())
        kept = {key: near for key, near in self.found.items() if which not in key}
        return replace(self, models=(model,), found=kept)

    @cached_property
    def unreadable(self) -> np.ndarray:
        """(N,) bool, of the index: images that some model could not read."""
        readable = [model.of(INDEX).readable() for model in self.models]
        return ~np.logical_and.reduce(readable)

    @property
    def labelled(self) -> Voters:
        if self.voters is None:
            raise ValueError("a step needs references that vote; name their list")
        return self.voters

    def there(self) -> list[str]:
        """Which of query, index and reference the scene has."""
        return [QUERY, INDEX] + [REFERENCE] * (self.voters is not None)

    def near(
        self, of: str, among: str, k: int, addends: Addends | None = None
    ) -> Neighbours:
        """The k nearest `among` rows of each row `of`; an image may be its own neighbour.

        Index images that cannot be read are near nobody and nobody is near them.
        """
        if among == REFERENCE and not len(self.labelled.rows):
            absent = torch.full((self._count(of), 1), order.ABSENT)
            return Neighbours(torch.full(absent.shape, -torch.inf), absent)
        k = min(k, self._count(among))
        if addends is not None:
            return self._search(of, among, k, addends)
        for (here, there, width), found in self.found.items():
            if (here, there) == (of, among) and width >= k:
                return Neighbours(found.scores[:, :k], found.rows[:, :k])
        graph = self._graph(of, k - 1) if of == among else None
        if graph is None:
            near = self._search(of, among, k)
        else:
            near = _with_self(graph, self.stored(of), k)
        if of == among == INDEX:
            lost = torch.from_numpy(self.unreadable)[:, None]
            scores = near.scores.masked_fill(lost, -torch.inf)
            near = Neighbours(scores, near.rows.masked_fill(lost, order.ABSENT))
        self.found[of, among, k] = near
        return near

    def graph(self, which: str, k: int) -> Tensor:
        """(N, k) rows of the k nearest others, and perhaps the image itself; mapped if stored."""
        graph = self._graph(which, k)
        if graph is None:
            return self.near(which, which, k + 1).rows
        return screen.mapped(graph.rows)[:, :k]

    def near_union(self, k: int) -> Neighbours:
        """The k nearest rows of the union of queries and index, queries first, for each of it."""
        blocks = []
        for of in (QUERY, INDEX):
            parts = [self.near(of, among, k) for among in (QUERY, INDEX)]
            shifted = torch.where(parts[1].rows >= 0, parts[1].rows + len(self), -1)
            scores = torch.cat([parts[0].scores, parts[1].scores], dim=1)
            rows = torch.cat([parts[0].rows, shifted], dim=1)
            scores, rows = order.sort(scores, rows)
            blocks.append((scores[:, :k], rows[:, :k]))
        scores, rows = zip(*blocks, strict=True)
        return Neighbours(torch.cat(scores), torch.cat(rows))

    def votes(self, of: str, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (n, k), landmarks (n, k) and countries (n, k) of the nearest voters."""
        near = self.near(of, REFERENCE, k)
        voters = self.labelled
        return (
            near.scores,
            order.named(voters.landmarks, near.rows),
            order.named(voters.countries, near.rows),
        )

    def stored(self, which: str) -> Tensor:
        """(N, D) float16 as it is stored; of several models weighted, joined and in memory."""
        parts = [screen.mapped(model.of(which).vectors) for model in self.models]
        if len(parts) == 1:
            return parts[0]
        return fusion.concatenate(parts, self.weights).half()

    def tensor(self, which: str) -> Tensor:
        """`stored`, of references the rows that vote."""
        stored = self.stored(which)
        if which != REFERENCE or self._all_vote:
            return stored
        return stored[torch.from_numpy(self.labelled.rows)]

    def blocks(self, which: str) -> Iterator[Tensor]:
        """`tensor` as float32, block by block."""
        for block in self.tensor(which).split(BLOCK):
            yield block.float()

    def union(self) -> Tensor:
        """(Q + N, D) float16 of queries, then index; in memory."""
        return torch.cat([self.stored(QUERY), self.stored(INDEX)])

    @cached_property
    def _all_vote(self) -> bool:
        rows = self.labelled.rows
        there = len(self.models[0].of(REFERENCE))
        return len(rows) == there and bool((rows == np.arange(there)).all())

    def _graph(self, which: str, k: int) -> Graph | None:
        """The stored graph, if its rows are this scene's and it has k neighbours."""
        if len(self.models) > 1 or self.weights != (1.0,):
            return None
        if which == REFERENCE and not self._all_vote:
            return None
        graph = self.models[0].graphs.get(which)
        return graph if graph is not None and graph.k >= k else None

    def _count(self, which: str) -> int:
        if which == REFERENCE:
            return len(self.labelled.rows)
        return len(self.models[0].of(which))

    def _search(
        self, of: str, among: str, k: int, addends: Addends | None = None
    ) -> Neighbours:
        queries: list[Any] = [model.of(of) for model in self.models]
        if of == REFERENCE and not self._all_vote:
            queries = [each.vectors[self.labelled.rows] for each in queries]
        return search.knn(
            queries,
            [model.of(among) for model in self.models],
            k,
            weights=self.weights,
            rows=None if among != REFERENCE or self._all_vote else self.labelled.rows,
            skip=self.unreadable if among == INDEX else None,
            addends=addends,
        )


def _with_self(graph: Graph, stored: Tensor, k: int) -> Neighbours:
    """The k nearest rows of each, itself among them: what a search of all by all would find."""
    rows = torch.from_numpy(graph.rows[:, : k - 1].astype(np.int64))
    scores = torch.from_numpy(graph.scores[:, : k - 1].copy())
    # products of float16 add up exactly in float64
    own = torch.cat([b.double().square().sum(dim=1) for b in stored.split(BLOCK)])
    rows = torch.cat([torch.arange(len(rows))[:, None], rows], dim=1)
    return Neighbours(*order.sort(torch.cat([own.float()[:, None], scores], 1), rows))
