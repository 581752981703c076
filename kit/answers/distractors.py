"""Images that show no landmark, and how near queries and references come to them."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kit.answers.retrieval import refuse_other_views
from kit.answers.scene import QUERY, REFERENCE, Scene
from kit.data import lists
from kit.features import search, store
from kit.features.store import Features
from kit.rerank import recognition

BLOCK = 1 << 17  # images whose neighbours are held at a time


@dataclass(frozen=True)
class Distractors:
    """Some images of a list, with features in `folder`/<model>/<list> beside the others."""

    folder: Path
    name: str  # of the list
    hash: str
    ids: np.ndarray  # (D,) those that show no landmark
    other_scales: bool = False  # than the queries'; a run that had no time for all
    known: dict[tuple, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def nearness(self, scene: Scene, of: str, near: int) -> Tensor:
        """(n,) float64 mean cosine to the `near` nearest of them, of each query or voting reference.

        An image that is one of them does not count as its own neighbour.
        """
        names = tuple(model.name for model in scene.models)
        key = (of, near, names, tuple(scene.weights))
        if key not in self.known:
            self.known[key] = self._nearness(scene, of, near)
        return self.known[key]

    def _nearness(self, scene: Scene, of: str, near: int) -> Tensor:
        stores = [self._load(model.of(QUERY)) for model in scene.models]
        readable = np.logical_and.reduce([each.readable() for each in stores])
        rows = stores[0].find(self.ids)
        rows = rows[readable[rows]]
        if not len(rows):
            raise ValueError(f"no distractor of list {self.name} could be read")
        asking = [model.of(of) for model in scene.models]
        asked = scene.labelled.rows if of == REFERENCE else np.arange(len(asking[0]))
        parts = []
        for start in range(0, len(asked), BLOCK):
            some = asked[start : start + BLOCK]
            scores, found = search.knn(
                [each.vectors[some] for each in asking],
                stores,
                near + 1,  # perhaps the image itself
                weights=scene.weights,
                rows=rows,
            )
            own = stores[0].ids[rows[found.numpy()]] == asking[0].ids[some][:, None]
            scores = scores / sum(scene.weights)
            parts.append(recognition.nearness(scores, near, torch.from_numpy(own)))
        return torch.cat(parts)

    def _load(self, query: Features) -> Features:
        """Their features of the model that made the queries'."""
        about = query.manifest["model"]
        found = store.load(self.folder / about["name"] / self.name)
        store.expect(found, list_hash=self.hash, model_hash=about["hash"])
        refuse_other_views(query, found, ("scales",) if self.other_scales else ())
        return found


def find(
    folder: Path,
    features: Path,
    name: str,
    solution: pd.DataFrame | None = None,
    other_scales: bool = False,
) -> Distractors:
    """Those of a list of `folder` that have no label; `features` holds <model>/<list>.

    Of the queries, which have none at all, those of the public half that show no landmark by
    `solution`, a table of tables.read_recognition: the private half must not be known.
    """
    images = lists.load(folder, name, ("id", "label"))
    ids = without_landmark(images, solution)
    if not len(ids):
        where = f"the public half of list {name}" if name == QUERY else f"list {name}"
        raise ValueError(f"{where} has no image without a landmark; name another list")
    return Distractors(features, images.name, images.hash, ids, other_scales)


def without_landmark(
    images: lists.ImageList, solution: pd.DataFrame | None = None
) -> np.ndarray:
    """Ids of those that `find` takes, each once; perhaps none."""
    ids = images.ids[images.labels < 0]
    if images.name == QUERY:
        if solution is None:
            raise ValueError(
                "which queries show no landmark only a solution tells; name another list"
            )
        public = solution[solution["usage"] == "Public"]
        ids = np.intersect1d(ids, public.loc[public["landmarks"] == "", "id"])
    return np.unique(ids).astype("U16")
