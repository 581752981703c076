"""Rank an index for queries that are themselves index images, each without its own image.

For every such query the index is rebuilt without the query's image, and all steps of the chain run
on what is left: query expansion, database-side augmentation, smoothing, whitening statistics,
graphs and verification never meet the image itself, nor index images that it has moved. The other
images that both ask and are searched stand in the index only, so that a union of queries and index
holds every image once; where a step reads other queries, it reads those that are in no index.

A ranking takes as long as the chain does on the whole index, for each query; only neighbors of
stored features are searched once for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kit.answers import reranking
from kit.answers.pictures import Pictures
from kit.answers.rankings import order as reorder
from kit.answers.scene import INDEX, QUERY, Scene
from kit.answers.tags import verified
from kit.features.search import Neighbours
from kit.features.store import Features
from kit.rerank import order, steps
from kit.rerank.chain import Chain


def rank(scene: Scene, chain: Chain, own: np.ndarray) -> Neighbours:
    """Scores (Q, k) and index rows (Q, k), best first, of each query without its own image.

    own: (Q,) index row of the query's image, -1 where it is not in the index.
    """
    inside, outside = np.flatnonzero(own >= 0), np.flatnonzero(own < 0)
    if not len(inside):
        return reranking.rank(scene, chain)
    first, last = _split(chain)
    width = first.k
    scores = torch.full((len(own), width), -torch.inf)
    rows = torch.full((len(own), width), order.ABSENT)
    index = np.arange(len(scene.models[0].of(INDEX)))
    if len(outside):
        part = _part(scene, outside, index)
        scores[outside], rows[outside] = _filled(reranking.rank(part, first), width)
    _verify_at_once(scene, first)
    near = _Near.of(scene, first)
    others = outside if any(map(_reads_queries, first.steps)) else outside[:0]
    queries = inside if len(index) > 1 else inside[:0]
    for query in tqdm(queries, "leave one out", disable=None):
        part = _part(scene, np.append(query, others), np.delete(index, own[query]))
        near.give(part, query, own[query])
        best = reranking.rank(part, first)
        best = _filled(Neighbours(best.scores[:1], best.rows[:1]), width)
        scores[query] = best.scores[0]
        rows[query] = best.rows[0] + (best.rows[0] >= own[query])
    for step in last:
        scores, rows = reorder(step, scene, scores, rows)
    return Neighbours(scores[:, : chain.k], rows[:, : chain.k])


def _split(chain: Chain) -> tuple[Chain, tuple[steps.Step, ...]]:
    """The chain without the local verifications that it ends in, and these.

    Local verification reads no more than a ranking and the pictures, so that it may verify the
    rankings of all queries at once.
    """
    kept = len(chain.steps)
    while kept and isinstance(chain.steps[kept - 1], steps.Local):
        kept -= 1
    shortlists = [getattr(step, "shortlist", 0) for step in chain.of(steps.RANKING)]
    width = max(chain.k, *shortlists, 0)
    return replace(chain, steps=chain.steps[:kept], k=width), chain.steps[kept:]


def _filled(found: Neighbours, width: int) -> Neighbours:
    return Neighbours(*order.fit(*found, width))


def _reads_queries(step: steps.Step) -> bool:
    """Whether other queries change what the step does to one."""
    return isinstance(step, steps.KReciprocal) or getattr(step, "transductive", False)


def _part(scene: Scene, queries: np.ndarray, index: np.ndarray) -> Scene:
    """The scene of some queries and some index images; it has searched nothing yet."""
    rows = {QUERY: queries, INDEX: index}
    models = []
    for model in scene.models:
        graphs = {name: graph for name, graph in model.graphs.items() if name != INDEX}
        chosen = {which: _rows_of(model.of(which), rows[which]) for which in rows}
        models.append(replace(model, graphs=graphs, **chosen))
    first = scene.models[0]
    sizes = {which: len(first.of(which)) for which in rows}
    pictures = scene.pictures and _Some(scene.pictures, rows, sizes)
    return replace(scene, models=tuple(models), pictures=pictures, found={})


def _rows_of(features: Features, rows: np.ndarray) -> Features:
    vectors = np.asarray(features.vectors)[rows]
    return replace(features, ids=np.asarray(features.ids)[rows], vectors=vectors)


@dataclass(frozen=True)
class _Near:
    """Neighbors in a whole scene, for parts of it that lack one query's image."""

    # of each model, then of their sum: who is near whom among stored features
    found: list[dict[str, Neighbours]]

    @classmethod
    def of(cls, scene: Scene, chain: Chain) -> "_Near":
        """One neighbor more than the chain asks for, since one may be the query's image."""
        wanted = {QUERY: chain.k, INDEX: max([0, *map(_of_index, chain.steps)])}
        scenes = [*scene.each(), *([scene] if scene.each()[0] is not scene else [])]
        return cls(
            [
                {
                    which: each.near(which, INDEX, k + 1)
                    for which, k in wanted.items()
                    if k
                }
                for each in scenes
            ]
        )

    def give(self, part: Scene, query: int, own: int) -> None:
        """Let a part, whose first query is `query` and whose index lacks row `own`, know them."""
        scenes = [*part.each(), *([part] if part.each()[0] is not part else [])]
        for each, found in zip(scenes, self.found, strict=True):
            for which, near in found.items():
                if which == INDEX:
                    others = torch.arange(len(near.rows)) != own
                    near = Neighbours(near.scores[others], near.rows[others])
                elif len(part) == 1:
                    near = Neighbours(near.scores[[query]], near.rows[[query]])
                else:
                    continue
                near = _without(near, own)
                each.found[which, INDEX, near.rows.shape[1]] = near


def _of_index(step: steps.Step) -> int:
    """How many index images near an index image the step asks for."""
    match step:
        case steps.VerifiedDba():
            return step.shortlist
        case steps.Dba() | steps.Smoothing():
            return step.neighbours
        case steps.AlphaQe(transductive=True):
            return step.neighbours + 1
        case steps.KReciprocal():
            return max(step.k1 + 1, step.k2)
        case steps.Diffusion():
            return step.kd
        case steps.Traversal():
            return step.explore + 1
    return 0


def _without(near: Neighbours, own: int) -> Neighbours:
    """(n, k) neighbors in an index -> (n, k - 1) in the same index without row `own`."""
    scores, rows = near
    kept = rows != own
    kept[:, -1] &= ~kept.all(dim=1)  # the last goes where the image was not among them
    shape = len(rows), rows.shape[1] - 1
    scores, rows = scores[kept].view(shape), rows[kept].view(shape)
    return Neighbours(scores, rows - (rows > own).long())


def _verify_at_once(scene: Scene, chain: Chain) -> None:
    """Verify what the chain's first step is going to ask for, in as many processes as there are."""
    first = chain.steps[0] if chain.steps else None
    if isinstance(first, steps.VerifiedQe | steps.VerifiedDba):
        which = QUERY if isinstance(first, steps.VerifiedQe) else INDEX
        for each in scene.each():
            rows = each.near(which, INDEX, first.shortlist + 1).rows
            verified(each, which, rows, first.backend, first.side)


@dataclass(frozen=True)
class _Some:
    """Pictures of some queries and some index images, by their rows in the whole lists."""

    whole: Pictures
    rows: Mapping[str, np.ndarray]
    sizes: Mapping[str, int]  # of the whole lists

    def inliers(self, of: str, rows: Tensor, backend: str, side: int) -> Tensor:
        """As `Pictures.inliers`."""
        index, asking = (torch.from_numpy(self.rows[name]) for name in (INDEX, of))
        named = torch.full((self.sizes[of], rows.shape[1]), order.ABSENT)
        named[asking] = index[rows.clamp(min=0)].masked_fill(rows < 0, order.ABSENT)
        return self.whole.inliers(of, named, backend, side)[asking]
