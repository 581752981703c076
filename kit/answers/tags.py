"""What several steps of a chain ask a scene for: predicted landmarks, and who is confirmed."""

import torch
from torch import Tensor

from kit.answers.scene import INDEX, Scene
from kit.rerank import sort_insert


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
