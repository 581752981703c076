"""Small scenes in memory, and what is true of them by hand."""

import numpy as np
import torch

from kit.answers.scene import Model, Scene, Voters
from kit.features.store import Features

QUERIES, INDEX, REFERENCE = 13, 90, 70
LOST = (0, 33, 89)  # index images that could not be read


def unit(count, dim=16, seed=0):
    """(count, dim) float16 of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def features(vectors, name="index", model="m", unreadable=()):
    """A store in memory; its ids are numbers."""
    ids = np.char.mod(f"{name[0]}%04d", np.arange(len(vectors))).astype("U16")
    vectors = np.array(vectors, np.float16)
    vectors[list(unreadable)] = 0
    manifest = {
        "model": {"name": model, "hash": model * 64},
        "list": {"name": name, "hash": name * 8},
        "seen": {f"seen by {model}": "clean"},
        "unreadable": ids[list(unreadable)].tolist(),
    }
    return Features(ids, vectors, manifest)


def model(name="m", seed=0, dim=16, unreadable=LOST):
    return Model(
        features(unit(QUERIES, dim, seed + 1), "query", name),
        features(unit(INDEX, dim, seed + 2), "index", name, unreadable),
        features(unit(REFERENCE, dim, seed + 3), "reference", name),
    )


def voters(seed=4):
    """Sixty of the references in any order, one of them for two landmarks."""
    random = np.random.default_rng(seed)
    rows = np.append(random.permutation(REFERENCE)[:60], 5)
    landmarks = random.integers(0, 6, len(rows))
    countries = np.where(landmarks < 2, -1, landmarks // 2)
    return Voters(rows, torch.tensor(landmarks), torch.tensor(countries))


def scene(*models, weights=(1.0,), pictures=None):
    return Scene(models or (model(),), tuple(weights), voters(), pictures)


def cosines(a, b):
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64).T


def by_score(scores, k):
    """Columns (Q, k): larger scores first, of equal ones the lower column."""
    columns = np.arange(scores.shape[1])
    return np.array([np.lexsort((columns, -row))[:k] for row in scores])


def votes(scores, labels):
    """{label: share of the score} of one image's neighbours."""
    summed = {}
    for score, label in zip(scores, labels, strict=True):
        if label >= 0:
            summed[label] = summed.get(label, 0) + max(score, 0)
    total = sum(summed.values())
    return {label: s / total if total else 0 for label, s in summed.items()}


def bonus(found, index_scores, query_scores, landmark, country, k=3):
    """(Q, N) of the landmark-country rerank; scores are those to the voting references."""
    gained = np.zeros((len(query_scores), len(index_scores)))
    nearest = by_score(index_scores, 1)[:, 0]
    for labels, weight in ((found.landmarks, landmark), (found.countries, country)):
        labels = labels.numpy()
        for q, row in enumerate(query_scores):
            near = by_score(row[None], k)[0]
            shares = votes(row[near], labels[near])
            for i, at in enumerate(nearest):
                gained[q, i] += weight * shares.get(labels[at], 0) * (labels[at] >= 0)
    return gained


def best(scores, k, lost=LOST):
    """Scores (Q, k) float32 and rows (Q, k) of dense scores, without what is lost."""
    scores = np.asarray(scores, np.float64).astype(np.float32).astype(np.float64)
    scores[:, list(lost)] = -np.inf
    rows = by_score(scores, k)
    scores = np.take_along_axis(scores, rows, axis=1)
    return scores, np.where(np.isinf(scores), -1, rows)
