"""Steps of kind features at work: a scene of one model -> the same images elsewhere."""

from functools import singledispatch

import numpy as np
import torch

from kit.answers.scene import INDEX, QUERY, REFERENCE, Scene
from kit.answers.tags import predicted, verified
from kit.features.search import Neighbours
from kit.rerank import expansion, smoothing, steps, whitening


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
