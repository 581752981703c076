"""A chain's steps at work: what each reads is searched for here, what it does is in kit.rerank.

move    a model's features -> the same images elsewhere         (steps of kind features)
gain    a scene -> what is added to its scores                  (score bonuses)
order   a shortlist -> the same or more images in another order (rankings)
"""

from collections.abc import Sequence
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor

from kit.answers.scene import INDEX, QUERY, REFERENCE, Scene
from kit.features.search import Neighbours, knn
from kit.rerank import (
    category,
    diffusion,
    expansion,
    fusion,
    k_reciprocal,
    k_reciprocal_tags,
    landmark_country,
    refine,
    shared_labels,
    smoothing,
    sort_insert,
    steps,
    sums,
    traversal,
    whitening,
)
from kit.rerank.addends import Addends
from kit.rerank.chain import Chain
from kit.rerank.landmark_country import Tags, Votes, Weights, gate, vote
from kit.rerank.local import folding

TAGGED = 30  # references that a k-reciprocal vote looks at (2021)


def rank(scene: Scene, chain: Chain) -> Neighbours:
    """Scores (Q, k) and index rows (Q, k), best first, after all steps of the chain.

    An image that could not be read is in no ranking; where nothing is left the row is -1.
    """
    models = [_moved(each, chain.of(steps.FEATURES)) for each in scene.each()]
    whole = scene.of_models(models)
    rankings = chain.of(steps.RANKING)
    width = max(chain.k, *(getattr(step, "shortlist", 0) for step in rankings), 0)
    if chain.fusion == "ranks" and len(models) > 1:
        found = [_searched([one], one, chain, width).rows for one in models]
        best = Neighbours(*fusion.rrf(found, width, scene.weights))
    else:
        best = _searched(models, whole, chain, width)
    for step in rankings:
        best = Neighbours(*order(step, whole, *best))
    return Neighbours(best.scores[:, : chain.k], best.rows[:, : chain.k])


def _moved(scene: Scene, moves: Sequence[steps.Step]) -> Scene:
    for step in moves:
        scene = move(step, scene)
    return scene


def _searched(
    models: Sequence[Scene], whole: Scene, chain: Chain, k: int
) -> Neighbours:
    """Exact search with the bonuses of each model, or of the sum of all."""
    bonuses = chain.of(steps.BONUS)
    if not bonuses:
        return whole.near(QUERY, INDEX, k)
    if chain.fusion == "tags":
        total = sums.weighted_sum([_total(whole, bonuses)], [sum(whole.weights)])
    else:
        parts = [_total(each, bonuses) for each in models]
        total = sums.weighted_sum(parts, whole.weights)
    return whole.near(QUERY, INDEX, k, total)


def _total(scene: Scene, bonuses: Sequence[steps.Step]) -> Addends:
    parts = [gain(step, scene) for step in bonuses]
    return sums.weighted_sum(parts, [1.0] * len(parts))


# --- features -> features, of a scene of one model ----------------------------------------------


@singledispatch
def move(step: steps.Step, scene: Scene) -> Scene:
    raise TypeError(f"step {step.name} moves no features")


@move.register
def _(step: steps.Whitening, scene: Scene) -> Scene:
    if step.supervised:
        features, labels = scene.tensor(REFERENCE), scene.labelled.landmarks
        learnt = whitening.learn(features, labels, step.dim or None, step.ridge)
    else:
        learnt = whitening.learn_pca(scene.tensor(INDEX), step.dim or None)
    for which in scene.there():
        scene = scene.moved(which, learnt.apply(scene.stored(which)))
    return scene


@move.register
def _(step: steps.Dba, scene: Scene) -> Scene:
    weigh = {
        "equal": expansion.equal,
        "decaying": expansion.decaying,
        "powered": expansion.powered(step.alpha),
    }[step.weigh]
    labels = predicted(scene, INDEX, 3).labels if step.supervised else None
    near = scene.near(INDEX, INDEX, step.neighbours)
    index = scene.tensor(INDEX)
    return scene.moved(
        INDEX, expansion.dba(index, *near, step.neighbours, weigh, labels)
    )


@move.register
def _(step: steps.AlphaQe, scene: Scene) -> Scene:
    queries, n = scene.tensor(QUERY), step.neighbours
    if step.transductive:
        union = scene.union()
        near = without_self(scene.near_union(n + 1), len(queries))
    else:
        union, near = scene.tensor(INDEX), scene.near(QUERY, INDEX, n)
    moved = expansion.alpha_qe(queries, union, *near, n, step.alpha)
    return scene.moved(QUERY, moved)


@move.register
def _(step: steps.Smoothing, scene: Scene) -> Scene:
    for _ in range(step.iterations):
        if step.transductive:
            queries = len(scene)
            near = scene.near_union(step.neighbours)
            moved = smoothing.smooth(scene.union(), *near, step.neighbours, step.beta)
            scene = scene.moved(QUERY, moved[:queries]).moved(INDEX, moved[queries:])
        else:
            near = scene.near(INDEX, INDEX, step.neighbours)
            moved = smoothing.smooth(
                scene.tensor(INDEX), *near, step.neighbours, step.beta
            )
            scene = scene.moved(INDEX, moved)
    return scene


@move.register
def _(step: steps.VerifiedQe, scene: Scene) -> Scene:
    return _verified_expansion(step, scene, QUERY)


@move.register
def _(step: steps.VerifiedDba, scene: Scene) -> Scene:
    return _verified_expansion(step, scene, INDEX)


def _verified_expansion(
    step: steps.VerifiedQe | steps.VerifiedDba, scene: Scene, which: str
) -> Scene:
    scores, rows = scene.near(which, INDEX, step.shortlist)
    inliers = verified(scene, which, rows, step.backend, step.side)
    near = expansion.verified(scores, rows, inliers, step.least_inliers, step.most)
    moved = expansion.expand(scene.tensor(which), scene.tensor(INDEX), *near)
    return scene.moved(which, moved)


# --- score bonuses ------------------------------------------------------------------------------


@singledispatch
def gain(step: steps.Step, scene: Scene) -> Addends:
    raise TypeError(f"step {step.name} adds nothing to scores")


@gain.register
def _(step: steps.LandmarkCountry, scene: Scene) -> Addends:
    scores, landmarks, countries = _tagged(scene, QUERY, step.votes, step.query_tags)
    way = "class_mean" if step.index_tags == "average" else "cosine"
    _, index_landmark, index_country = _tagged(scene, INDEX, 1, way)
    tags = Tags(
        gate(vote(scores, landmarks), step.confidence),
        gate(vote(scores, countries), step.confidence),
        index_landmark[:, 0],
        index_country[:, 0],
    )
    return landmark_country.addends(tags, Weights(step.landmark, step.country))


@gain.register
def _(step: steps.SoftLabels, scene: Scene) -> Addends:
    query, index = (_soft(scene, which, step.votes) for which in (QUERY, INDEX))
    query = gate(query, step.confidence)
    return shared_labels.soft_labels(query, index, step.weight)


def _soft(scene: Scene, which: str, k: int) -> Votes:
    scores, landmarks, _ = scene.votes(which, k)
    return vote(scores, landmarks)


@gain.register
def _(step: steps.SameLabel, scene: Scene) -> Addends:
    scores, landmarks, _ = scene.votes(INDEX, 1)
    query = predicted(scene, QUERY, step.votes).labels
    nearest = landmarks[:, 0], scores[:, 0].clamp(min=0)
    return shared_labels.same_label(query, *nearest, step.same, step.other)


def _tagged(scene: Scene, which: str, k: int, way: str) -> tuple[Tensor, ...]:
    """Scores, landmarks and countries (n, k) of the references that vote for query or index."""
    voters = scene.labelled
    if way == "cosine":
        return scene.votes(which, k)
    if way == "class_mean":
        means, names = landmark_country.class_means(
            scene.blocks(REFERENCE), voters.landmarks
        )
        first = torch.full((int(names.max()) + 1,), len(voters.landmarks))
        places = torch.arange(len(voters.landmarks))
        known = voters.landmarks >= 0
        first.scatter_reduce_(0, voters.landmarks[known], places[known], "amin")
        near = knn(scene.tensor(which), means.half(), min(k, len(names)))
        landmarks = names[near.rows]
        return near.scores, landmarks, voters.countries[first[landmarks]]
    near = scene.near(which, REFERENCE, TAGGED)
    graph = scene.graph(REFERENCE, TAGGED - 1)
    scores, rows = k_reciprocal_tags.tag_scores(
        scene.tensor(which), near.rows, graph, scene.tensor(REFERENCE), k
    )
    landmarks, countries = (
        torch.where(rows >= 0, tags[rows.clamp(min=0)], -1)
        for tags in (voters.landmarks, voters.countries)
    )
    return scores, landmarks, countries


# --- rankings -----------------------------------------------------------------------------------


@singledispatch
def order(
    step: steps.Step, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    raise TypeError(f"step {step.name} orders no ranking")


@order.register
def _(
    step: steps.SortInsert, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    query, index = (
        predicted(scene, which, step.votes, step.worth) for which in (QUERY, INDEX)
    )
    return sort_insert.sort_insert(
        scores, rows, query, index, above=step.above, at_least=step.at_least
    )


@order.register
def _(
    step: steps.Category, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    query, index = (predicted(scene, which, step.votes) for which in (QUERY, INDEX))
    return category.first_of_label(
        scores,
        rows,
        query.labels,
        index.labels,
        scene.tensor(QUERY),
        scene.tensor(INDEX),
    )


@order.register
def _(
    step: steps.CategoryExpansion, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    return category.expand_category(
        scores,
        rows,
        scene.near(QUERY, REFERENCE, step.votes).rows,
        scene.labelled.landmarks,
        scene.tensor(INDEX),
        scene.tensor(REFERENCE),
        step.above,
    )


@order.register
def _(
    step: steps.KReciprocal, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    near = scene.near_union(max(step.k1 + 1, step.k2))
    encoding = k_reciprocal.encode(
        near.rows, scene.union(), len(scene), step.k1, step.k2
    )
    return k_reciprocal.jaccard_rerank(scores, rows, encoding, step.share)


@order.register
def _(
    step: steps.Diffusion, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    graph = diffusion.affinity(*scene.near(INDEX, INDEX, step.kd), step.kd, step.gamma)
    solver = diffusion.Solver(step.alpha)
    return diffusion.diffuse(scores, rows, graph, step.kq, step.gamma, solver)


@order.register
def _(
    step: steps.Traversal, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    graph = scene.near(INDEX, INDEX, step.explore + 1)
    width = rows.shape[1]
    return traversal.traverse(scores, rows, *graph, width, step.explore, step.tau)


@order.register
def _(
    step: steps.Refine, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    return refine.refine(
        scene.tensor(QUERY),
        scene.tensor(INDEX),
        scores,
        rows,
        step.neighbours,
        step.beta,
    )


@order.register
def _(
    step: steps.Local, scene: Scene, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    inliers = verified(scene, QUERY, rows[:, : step.top], step.backend, step.side)
    rows, scores = folding.fold(
        rows, scores, inliers, step.top, step.weight, step.most, step.least_inliers
    )
    return scores, rows


# --- what several steps read --------------------------------------------------------------------


def predicted(
    scene: Scene, which: str, votes: int, worth: str = "cosine_mean"
) -> sort_insert.Predictions:
    """The landmark that the nearest references vote for; -1 for an unreadable index image."""
    scores, landmarks, _ = scene.votes(which, votes)
    found = sort_insert.predict(scores, landmarks, sort_insert.WORTHS[worth])
    if which != INDEX:
        return found
    lost = torch.from_numpy(scene.unreadable)
    return sort_insert.Predictions(
        found.labels.masked_fill(lost, -1), found.scores.masked_fill(lost, -torch.inf)
    )


def verified(scene: Scene, of: str, rows: Tensor, backend: str, side: int) -> Tensor:
    """(n, k) inliers of each query or index image with its ranking's rows (n, k)."""
    if scene.pictures is None:
        raise ValueError("local verification needs the images: give their folder")
    return scene.pictures.inliers(of, rows, backend, side)


def without_self(near: Neighbours, first: int) -> Neighbours:
    """The first rows of a graph of the union without themselves, best first."""
    rows, scores = near.rows[:first], near.scores[:first]
    own = rows == torch.arange(first)[:, None]
    own[:, -1] |= ~own.any(dim=1)
    kept = np.flatnonzero(~own.flatten().numpy())
    shape = (first, rows.shape[1] - 1)
    return Neighbours(
        scores.flatten()[kept].view(shape), rows.flatten()[kept].view(shape)
    )
