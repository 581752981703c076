"""Cleaning without local features: do an image's neighbours vote for its label, and how near are they?

The agreement of image i with its label, over the k nearest images that still vote, whatever their
labels:
    a_i = sum over those with the label of max(cos_ij, 0)^power / k,
    k = min(neighbours, voters of the label other than i).
So a neighbour of another label takes a place and gives nothing, a far one gives little, and a small
landmark is asked for no more votes than it has. The power is that of alpha-QE (Radenovic et al.,
TPAMI 2018), and so is its published size: 3, with 10 neighbours.

What agreement is enough comes from the list alone: Otsu's threshold (IEEE SMC 1979) parts the
agreements into the two groups that lie furthest apart. Then those below do not vote any more, and
everybody is asked again, until no voter is lost: wrong labels no longer confirm each other, nor do
they take places among the neighbours of right ones.
"""

import logging
from dataclasses import dataclass

import numpy as np

from kit import config
from kit.answers.cleaning import candidates, rule
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.rule import Kept, Rule

log = logging.getLogger(__name__)

# share of the variance that lies between the two groups: one normal heap reaches 0.64 (2 / pi),
# numbers that are spread evenly 0.75
SEPARATE = 0.7


@dataclass(frozen=True)
class Vote:
    """How neighbours vote, and what is enough."""

    neighbours: int = 10
    power: float = 3.0  # of the cosine
    least: float = 0.0  # agreement of an image that stays; 0: Otsu's threshold

    def __post_init__(self) -> None:
        config.check(self, least={"neighbours": 1, "power": 0, "least": 0})


@dataclass(frozen=True)
class Poll:
    """What the votes came to."""

    kept: Kept
    agreement: np.ndarray  # (N,) float32, of the last round; 0 without a label
    least: float  # agreement that was enough
    voters: tuple[int, ...]  # images that voted in each round


def by_votes(given: Labelled, vote: Vote, needs: Rule) -> Poll:
    """Polls the neighbours; of `needs` only min_images and alone count."""
    if vote.neighbours > given.graph.k:
        raise ValueError(
            f"{vote.neighbours} neighbours vote, the graph has {given.graph.k} of each "
            "image; build one with more"
        )
    labelled = given.labels >= 0
    alone = candidates.counts(given, 1) == 0
    agreement = poll(given, labelled, vote)
    least = vote.least or threshold(agreement[labelled])
    voting, rounds = labelled, [int(labelled.sum())]
    while True:
        still = voting & (agreement >= least)
        if still.sum() == rounds[-1]:
            break
        voting = still
        rounds.append(int(voting.sum()))
        agreement = poll(given, voting, vote)
    log.info("votes: %s images in turn, agreement of %.3f is enough", rounds, least)
    kept = rule.apply(agreement >= least, alone, given.labels, needs)
    return Poll(kept, agreement, least, tuple(rounds))


def poll(given: Labelled, voting: np.ndarray, vote: Vote) -> np.ndarray:
    """(N,) float32: the agreement of every image with its label where `voting` (N,) images vote."""
    labels, found = given.labels, np.zeros(len(given), np.float32)
    sizes = np.bincount(labels[voting], minlength=labels.max() + 1)
    for here in given.blocks():
        label = labels[here]
        others = np.where(label >= 0, sizes[label] - voting[here], 0)
        most = np.minimum(others, vote.neighbours)[:, None]
        rows = given.graph.rows[here]
        asked = (rows >= 0) & voting[rows]
        asked &= asked.cumsum(axis=1, dtype=np.int32) <= most
        agree = asked & (labels[rows] == label[:, None])
        weights = np.where(agree, given.graph.scores[here], 0).clip(min=0)
        total = np.power(weights, vote.power, where=agree, out=weights).sum(axis=1)
        found[here] = total / np.maximum(most[:, 0], 1)
    return found


def threshold(values: np.ndarray) -> float:
    """Otsu's threshold of values (n,): between the two groups whose means lie furthest apart.

    Refuses values that are one heap: to part them would drop the lower half of what is right.
    """
    ranked = np.sort(values.astype(np.float64))
    below = np.arange(1, len(ranked))
    sums = ranked.cumsum()
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(ranked) - below)
    between = below * (len(ranked) - below) * (means[1] - means[0]) ** 2
    total = len(ranked) * ((ranked - ranked.mean()) ** 2).sum()
    best = int(between.argmax()) if len(between) else 0
    if not total or between[best] < SEPARATE * total:
        share = between[best] / total if total else 0.0
        raise ValueError(
            f"agreements do not fall into two groups (separation {share:.2f}, not "
            f"{SEPARATE}): the list may be clean already; else give the least agreement"
        )
    return float((ranked[best] + ranked[best + 1]) / 2)
