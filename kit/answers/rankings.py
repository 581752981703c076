"""Steps of kind ranking at work: a shortlist -> the same or more images in another order."""

from functools import singledispatch

from torch import Tensor

from kit.answers.scene import INDEX, QUERY, REFERENCE, Scene
from kit.answers.tags import predicted, verified
from kit.rerank import (
    category,
    diffusion,
    k_reciprocal,
    refine,
    sort_insert,
    steps,
    traversal,
)
from kit.rerank.local import folding


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
