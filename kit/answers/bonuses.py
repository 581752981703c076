"""Steps of kind bonus at work: a scene -> what is added to its scores."""

from functools import singledispatch

import torch
from torch import Tensor

from kit.answers.scene import INDEX, QUERY, REFERENCE, Scene
from kit.answers.tags import predicted
from kit.features.search import knn
from kit.rerank import (
    k_reciprocal_tags,
    landmark_country,
    order,
    shared_labels,
    steps,
)
from kit.rerank.addends import Addends
from kit.rerank.landmark_country import Tags, Votes, Weights, gate, vote

TAGGED = 30  # references that a k-reciprocal vote looks at (2021)


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
    if way == "cosine" or not len(voters.rows):
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
        order.named(tags, rows) for tags in (voters.landmarks, voters.countries)
    )
    return scores, landmarks, countries
