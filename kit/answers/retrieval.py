"""Features and a chain -> a ranking of index ids for every query.

Nothing of the size queries x index is ever held.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kit.answers.pictures import Pictures
from kit.answers.reranking import rank
from kit.answers.scene import INDEX, QUERY, REFERENCE, Model, Scene, Voters
from kit.data import lists
from kit.data.sources import OTHER
from kit.features import graph, store
from kit.features.graph import Graph
from kit.features.store import Features
from kit.features.views import Views
from kit.rerank.chain import Chain

log = logging.getLogger(__name__)

# what extraction makes of an image; features that differ in it are not compared
VIEWS = tuple(each.name for each in fields(Views))

Reference = lists.ImageList | lists.StoredList


class Scenes:
    """Features in `folder`/<model>/<list>, loaded once, and the scenes that chains work on."""

    def __init__(
        self,
        folder: Path,
        query: lists.ImageList,
        index: lists.ImageList | None = None,  # that is searched
        reference: Reference | None = None,  # whose labelled images vote
        data: Path | None = None,  # the images, for steps that verify
        graphs: Path | None = None,  # <model>/<list>; those that are there serve
        processes: int = 0,  # that verify; 0: this one
        other_scales: bool = False,  # of references; a run that had no time for all
    ) -> None:
        self.folder, self.graphs, self.query, self.index = folder, graphs, query, index
        self.reference, self.other_scales = reference, other_scales
        shown = {QUERY: query} | ({} if index is None else {INDEX: index})
        self.pictures = data and Pictures(data, folder / "local", shown, processes)
        self._scenes: dict[tuple[str, ...], Scene] = {}
        self._models: dict[str, Model] = {}

    def of(self, models: Mapping[str, float]) -> Scene:
        """The scene of some models; it knows what was searched before with equal weights.

        Refuses features of another version of a list, and of different weights or views.
        """
        weights = tuple(map(float, models.values()))
        key = (*models, *map(str, weights))
        if key not in self._scenes:
            found = tuple(map(self._model, models))
            _refuse_other_images(found)
            there = all(model.reference is not None for model in found)
            voters = _voters(found, self.reference) if there else None
            self._scenes[key] = Scene(found, weights, voters, self.pictures)
        return self._scenes[key]

    def answers(self, chain: Chain) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the queries (Q,) and of their ranked index images (Q, k), best first.

        Empty text stands where the index ran out of images that can be read.
        """
        scene = self.of(chain.models)
        scores, rows = rank(scene, chain)
        first = scene.models[0]
        there = (torch.isfinite(scores) & (rows >= 0)).numpy()
        index = first.of(INDEX)
        return first.query.ids, np.where(there, index.ids[rows.numpy()], "")

    def seen(self, models: Iterable[str]) -> dict[str, str]:
        """hash -> name of every list that the models met or that votes."""
        voting = self.reference
        met = {} if voting is None else {voting.hash: voting.name}
        for model in models:
            met |= self._model(model).query.manifest["seen"]
        return met

    def _model(self, name: str) -> Model:
        if name not in self._models:
            lists = self.query, self.index, self.reference
            model = _model(self.folder / name, *lists, self.other_scales)
            if self.graphs is not None:
                model = replace(model, graphs=_graphs(self.graphs / name, model))
            self._models[name] = model
        return self._models[name]


def _model(
    folder: Path,
    query: lists.ImageList,
    index: lists.ImageList | None,
    reference: Reference | None,
    other_scales: bool,
) -> Model:
    first = store.load(folder / query.name)
    weights = first.manifest["model"]["hash"]
    store.expect(first, list_hash=query.hash)
    others: list[Features | None] = []
    if reference is not None and not (folder / reference.name).exists():
        reference = None  # such as of a model that is only searched with
    for images in (index, reference):
        if images is None:
            others.append(None)
            continue
        features = store.load(folder / images.name)
        store.expect(features, list_hash=images.hash, model_hash=weights)
        free = ("scales",) if other_scales and images is reference else ()
        refuse_other_views(first, features, free)
        others.append(features)
    return Model(first, *others)


def _graphs(folder: Path, model: Model) -> dict[str, Graph]:
    """The stored graphs of index and references; of other features they are refused."""
    found = {}
    for which in (INDEX, REFERENCE):
        features = getattr(model, which)
        stored = features and folder / features.manifest["list"]["name"]
        if stored and (stored / "manifest.json").exists():
            found[which] = graph.load(stored, features)
    return found


def refuse_other_views(
    ours: Features, theirs: Features, free: Collection[str] = ()
) -> None:
    """free: what may differ."""
    for name in VIEWS:
        if name not in free and ours.manifest.get(name) != theirs.manifest.get(name):
            raise ValueError(
                f"features of {ours.manifest['list']['name']} and "
                f"{theirs.manifest['list']['name']} were made with different {name}"
            )


def _refuse_other_images(models: Sequence[Model]) -> None:
    first = models[0]
    for other in models[1:]:
        for ours, theirs in ((first.query, other.query), (first.index, other.index)):
            if ours is None or theirs is None:
                continue
            if not np.array_equal(ours.ids, theirs.ids):
                raise ValueError(
                    f"models {first.name} and {other.name} have features of different "
                    "images"
                )


def _voters(models: Sequence[Model], reference: Reference) -> Voters:
    """One entry a (readable reference image, landmark) pair."""
    features = [model.of(REFERENCE) for model in models]
    readable = np.logical_and.reduce([each.readable() for each in features])
    codes: dict[str, int] = {"": -1, OTHER: -1}
    parts, seen = [], 0
    for block in reference.blocks(("id", "label", "country")):
        rows = features[0].find(block["id"].to_numpy().astype("U16"), seen)
        seen += len(rows)
        names, texts = pd.factorize(block["country"])
        own = [codes.setdefault(text, len(codes)) for text in texts]
        label = block["label"].to_numpy()
        voting = (label >= 0) & readable[rows]
        countries = np.array(own, np.int64)[names]
        parts.append([each[voting] for each in (rows, label, countries)])
    rows, labels, countries = map(np.concatenate, zip(*parts, strict=True))
    if not len(rows):
        log.warning(
            "list %s has no labelled image that can be read: nothing votes, and steps "
            "that read labels change nothing",
            reference.name,
        )
    return Voters(rows, torch.from_numpy(labels), torch.from_numpy(countries))
