"""Features and a recogniser -> a landmark and a confidence for every query.

References are mapped from disk and searched in blocks; nothing of the size queries x references
is ever held, and only the pairs that vote are verified.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kit.answers import distractors
from kit.answers.distractors import Distractors
from kit.answers.metrics import gap
from kit.answers.pairs import Pairs
from kit.answers.retrieval import Reference, Scenes
from kit.answers.scene import QUERY, REFERENCE, Scene
from kit.answers.submission import PREDICTIONS
from kit.data import lists
from kit.features import search
from kit.rerank import recogniser, recognition
from kit.rerank.addends import Addends
from kit.rerank.recogniser import Recogniser
from kit.rerank.recognition import Recognised
from kit.rerank.sort_insert import WORTHS


class Near(NamedTuple):
    """The references near each query, the nearest first."""

    cosines: Tensor  # (Q, M) float64; -inf where there is none
    rows: Tensor  # (Q, M) of the entries of voters; -1 where there is none
    labels: Tensor  # (Q, M)
    penalties: Tensor  # (Q, M) float64, by which a reference's vote is worth less


class Recognition:
    """Features in `folder`/<model>/<list>, loaded once, and what recognisers make of them."""

    def __init__(
        self,
        folder: Path,
        query: lists.ImageList,
        reference: Reference,  # whose labelled images vote
        data: Path | None = None,  # the images, to verify by local features
        lists_folder: Path | None = None,  # with the list of images without a landmark
        solution: pd.DataFrame | None = None,  # of read_recognition, if there is one
        processes: int = 0,  # that verify; 0: this one
        other_scales: bool = False,  # of references; a run that had no time for all
    ) -> None:
        self.folder, self.reference, self.solution = folder, reference, solution
        self.lists_folder, self.other_scales = lists_folder, other_scales
        self._distractors: dict[str, Distractors] = {}
        self.scenes = Scenes(
            *(folder, query, None, reference, data, None, processes, other_scales)
        )
        self.landmarks = landmarks(reference)
        self._pairs: Pairs | None = None

    def predict(self, plan: Recogniser) -> pd.DataFrame:
        """id, landmark ("": none), confidence (float64; 0 for none) of each query, in their order.

        A query that some model could not read has none.
        """
        scene = self.scenes.of(plan.models)
        for model in scene.models:
            model.of(REFERENCE)  # one that has none is refused by its name
        if not len(scene.labelled.rows):
            raise ValueError(
                f"list {self.reference.name} has no labelled image that can be read; "
                "recognition needs one that votes"
            )
        found = self._recognised(scene, plan)
        named = [self.landmarks.get(label, "") for label in found.labels.tolist()]
        sure = torch.where(found.labels < 0, 0.0, found.confidences).numpy()
        columns = scene.models[0].query.ids, np.array(named, dtype=object), sure
        return pd.DataFrame(dict(zip(PREDICTIONS, columns, strict=True)))

    def score(self, plan: Recogniser) -> gap.Score:
        """Of its predictions, by the solution."""
        if self.solution is None:
            raise ValueError("there is no solution to score landmarks by")
        return gap.evaluate(self.predict(plan), self.solution)

    def choose_steps(self, steps: Sequence[str], non_landmarks: str) -> list[str]:
        """Those of `steps` that the public half can choose, with a line about each that it cannot.

        None where no query of it shows a known landmark, as where every class of the queries is
        held out of training; no `non_landmark` where the list has no image without a landmark.
        """
        if self.solution is None or self.lists_folder is None:
            raise ValueError("there is no solution to choose steps by")
        if not gap.any_landmark(self.solution, "Public"):
            print(
                "no query of the public half shows a known landmark: nothing is tuned"
            )
            return []
        elsewhere = lists.load(self.lists_folder, non_landmarks, ("id", "label"))
        if len(distractors.without_landmark(elsewhere, self.solution)):
            return list(steps)
        print(f"list {non_landmarks} has no image without a landmark: no non_landmark")
        return [name for name in steps if name != "non_landmark"]

    def calibrated(self, plan: Recogniser) -> Recogniser:
        """The recogniser with confidences as chances of being right, learnt on the public half.

        As it is where that half's predictions are all right or all wrong.
        """
        bare = recogniser.without(recogniser.without(plan, "frequent"), "probability")
        queries = self.score(bare).queries
        made = queries[(queries["usage"] == "Public") & (queries["landmark"] != "")]
        curve = recognition.fit(
            torch.from_numpy(made["confidence"].to_numpy()),
            torch.from_numpy(made["correct"].to_numpy()),
        )
        if curve is None:
            return plan
        slope, offset = (float(f"{value:.6g}") for value in curve)
        return recogniser.with_step(plan, recogniser.Probability(slope, offset))

    def _recognised(self, scene: Scene, plan: Recogniser) -> Recognised:
        """All steps, those that read the whole batch last."""
        if plan.fusion == "ranks" and len(scene.models) > 1:
            parts = [self._sure([(one, 1.0)], plan) for one in scene.each()]
            found = recognition.by_rank(parts, scene.weights)
        elif plan.fusion == "votes":
            whole = math.fsum(scene.weights)
            shares = [weight / whole for weight in scene.weights]
            found = self._sure(list(zip(scene.each(), shares, strict=True)), plan)
        else:
            found = self._sure([(scene, 1.0)], plan)
        curve = plan.step("probability")
        if curve is not None:
            sure = recognition.probability(found.confidences, curve.slope, curve.offset)
            found = found._replace(confidences=sure)
        frequent = plan.step("frequent")
        if frequent is None:
            return found
        counts = recognition.banned(found.labels, frequent.most)
        marked = recognition.demoted(found, counts)
        if not frequent.within or not counts.any():
            return marked
        nearest = _nearest(scene, torch.nonzero(counts)[:, 0])
        return recognition.spread(marked, counts, nearest, frequent.within)

    def _sure(
        self, searches: Sequence[tuple[Scene, float]], plan: Recogniser
    ) -> Recognised:
        """Vote and confidence; searches: scenes that are searched apart, with shares of the votes."""
        vote, background = plan.step("vote"), plan.step("background")
        penalty = plan.step("non_landmark")
        width = max(vote.votes, background.near if background else 0)
        nears = [self._near(scene, plan, width) for scene, _ in searches]
        worths = [
            share * self._worths(scene, near, plan)
            for (scene, share), near in zip(searches, nears, strict=True)
        ]
        labels = [near.labels[:, : vote.votes] for near in nears]
        found = recognition.vote(torch.cat(worths, dim=1), torch.cat(labels, dim=1))
        lost = torch.stack([_unreadable(scene) for scene, _ in searches]).any(dim=0)
        found = Recognised(
            found.labels.masked_fill(lost, -1),
            found.confidences.masked_fill(lost, -torch.inf),
        )
        for (scene, share), near in zip(searches, nears, strict=True):
            if penalty is not None and penalty.queries:
                shown = self._without_landmark(penalty.images)
                close = shown.nearness(scene, QUERY, penalty.query_near)
                found = recognition.lowered(found, share * penalty.queries * close)
            if background is not None:
                behind = recognition.background(
                    near.cosines, near.labels, found.labels, vote.votes
                )
                found = recognition.lowered(found, share * background.weight * behind)
        return found

    def _near(self, scene: Scene, plan: Recogniser, width: int) -> Near:
        """What each query's search finds, the largest cosine less penalty first."""
        penalty, addends, whole = plan.step("non_landmark"), None, sum(scene.weights)
        if penalty is not None and penalty.references:
            found = self._without_landmark(penalty.images)
            close = found.nearness(scene, REFERENCE, penalty.reference_near)
            addends = Addends(by_row=-penalty.references * whole * close)
        scores, rows = scene.near(QUERY, REFERENCE, width, addends)
        there = rows.clamp(min=0)
        labels = scene.labelled.landmarks[there].masked_fill(rows < 0, -1)
        less = torch.zeros(rows.shape, dtype=torch.float64)
        if addends is not None:
            less = -addends.by_row[there] / whole
        return Near(scores.double() / whole + less, rows, labels, less)

    def _worths(self, scene: Scene, near: Near, plan: Recogniser) -> Tensor:
        """(Q, K) of the references that vote."""
        vote, step = plan.step("vote"), plan.step("inliers")
        cosines, rows = near.cosines[:, : vote.votes], near.rows[:, : vote.votes]
        worths = WORTHS[vote.worth](cosines) - near.penalties[:, : vote.votes]
        if step is None:
            return worths
        images = torch.from_numpy(scene.labelled.rows)[rows.clamp(min=0)]
        images = images.masked_fill(rows < 0, -1)
        counts = self._verified(scene).inliers(images, step.backend, step.side)
        least = step.least_inliers
        return worths + recognition.confirmed(counts, step.weight, step.most, least)

    def _verified(self, scene: Scene) -> Pairs:
        """One for all models: their references are the same images."""
        if scene.pictures is None:
            raise ValueError("local verification needs the images: give their folder")
        if self._pairs is None:
            ids = scene.models[0].of(REFERENCE).ids
            self._pairs = Pairs(scene.pictures, self.reference, ids)
        return self._pairs

    def _without_landmark(self, name: str) -> Distractors:
        if self.lists_folder is None:
            raise ValueError("step non_landmark needs the folder of the lists")
        if name not in self._distractors:
            places = self.lists_folder, self.folder, name
            found = distractors.find(*places, self.solution, self.other_scales)
            self._distractors[name] = found
        return self._distractors[name]


def landmarks(reference: Reference) -> dict[int, str]:
    """label -> landmark_id, of the first image of each label in the list.

    That is one of train wherever train knows the landmark: its images stand before those of the
    index, whose landmark_ids are numbered otherwise.
    """
    found: dict[int, str] = {}
    for block in reference.blocks(("label", "landmark_id")):
        first = block[block["label"] >= 0].drop_duplicates("label")
        pairs = zip(first["label"].tolist(), first["landmark_id"], strict=True)
        found = dict(pairs) | found
    return found


def _unreadable(scene: Scene) -> Tensor:
    """(Q,) bool: queries that some model of the scene could not read."""
    readable = [model.query.readable() for model in scene.models]
    return torch.from_numpy(~np.logical_and.reduce(readable))


def _nearest(scene: Scene, banned: Tensor) -> Tensor:
    """(Q,) cosine of each query to the nearest of some queries."""
    queries = [model.query for model in scene.models]
    found = search.knn(queries, queries, 1, weights=scene.weights, rows=banned)
    return found.scores[:, 0] / sum(scene.weights)
