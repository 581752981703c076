"""Votes of neighbours against their slow transcription, and the threshold between two groups."""

import re

import numpy as np
import pytest

from kit.answers.cleaning import candidates, votes
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.rule import Rule
from kit.answers.cleaning.votes import Vote
from tests.answers.cleaning.conftest import image_list, near, random_given


def slow_agreement(given: Labelled, voting, vote: Vote) -> list[float]:
    labels = given.labels.tolist()
    found = []
    for image, label in enumerate(labels):
        others = sum(
            1 for o, l in enumerate(labels) if l == label and voting[o] and o != image
        )
        asked = min(others, vote.neighbours) if label >= 0 else 0
        total, left = 0.0, asked
        for other, cosine in zip(
            given.graph.rows[image].tolist(),
            given.graph.scores[image].tolist(),
            strict=True,
        ):
            if other < 0 or not voting[other] or not left:
                continue
            left -= 1
            if labels[other] == label:
                total += max(cosine, 0.0) ** vote.power
        found.append(total / asked if asked else 0.0)
    return found


def slow_threshold(values) -> tuple[float, float]:
    """Of all cuts between two values the one whose groups' means lie furthest apart, weighted."""
    ranked = np.sort(np.asarray(values, np.float64))
    whole, best = ranked.var(), (-1.0, 0.0)
    for cut in range(1, len(ranked)):
        low, high = ranked[:cut], ranked[cut:]
        shares = len(low) / len(ranked), len(high) / len(ranked)
        share = shares[0] * shares[1] * (high.mean() - low.mean()) ** 2 / whole
        if share > best[0] + 1e-12:
            best = share, (low[-1] + high[0]) / 2
    return best


def two_kinds(seed: int, wrong: int = 4) -> tuple[Labelled, np.ndarray]:
    """6 landmarks of 15 images each, of which the last `wrong` are elsewhere; and which are right."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), 15)
    vectors = np.eye(32)[labels] + rng.normal(size=(90, 32)) / 12
    right = np.tile(np.arange(15) < 15 - wrong, 6)
    vectors[~right] = rng.normal(size=((~right).sum(), 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Labelled(image_list(labels), near(vectors, 60)), right


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vote", [Vote(), Vote(1, 0.0), Vote(4, 1.5), Vote(20, 3.0)])
def test_agreement_matches_its_definition(seed, vote):
    given = random_given(seed)
    before = given.graph.scores.copy()
    for share in (1.0, 0.5, 0.0):
        voting = np.random.default_rng(seed).random(60) < share
        voting &= given.labels >= 0
        found = votes.poll(given, voting, vote)
        assert found.dtype == np.float32
        np.testing.assert_allclose(
            found, slow_agreement(given, voting, vote), atol=1e-6
        )
    np.testing.assert_array_equal(given.graph.scores, before)


def test_a_negative_cosine_is_no_vote_against():
    vectors = np.array([[1, 0], [-0.9, 0.436], [-0.9, -0.436]])
    given = Labelled(image_list([0, 0, 0]), near(vectors, 2))
    assert votes.poll(given, np.ones(3, bool), Vote(2, 3.0))[0] == 0


@pytest.mark.parametrize("block", [1, 7, 60])
def test_agreement_does_not_depend_on_the_blocks(monkeypatch, block):
    given = random_given(0)
    whole = votes.poll(given, given.labels >= 0, Vote())
    monkeypatch.setattr(candidates, "BLOCK", block)
    parts = votes.poll(given, given.labels >= 0, Vote())
    np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_of_all_cuts(seed):
    rng = np.random.default_rng(seed)
    low, high = rng.normal(0.1, 0.05, 3 + seed), rng.normal(0.8, 0.1, 30)
    values = rng.permutation(np.r_[low, high]).astype(np.float32)
    share, cut = slow_threshold(values)
    assert share > votes.SEPARATE
    before = values.copy()
    assert votes.threshold(values) == pytest.approx(cut, abs=1e-6)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("values", [
    np.random.default_rng(0).normal(0.8, 0.05, 500),
    np.full(10, 0.25),
    np.array([0.5]),
])  # fmt: skip
def test_one_heap_is_not_parted(values):
    with pytest.raises(ValueError, match="do not fall into two groups"):
        votes.threshold(values)


@pytest.mark.parametrize("seed", range(3))
def test_wrong_labels_go_and_right_ones_stay(seed):
    given, right = two_kinds(seed)
    poll = votes.by_votes(given, Vote(), Rule())
    np.testing.assert_array_equal(poll.kept.images, right)
    assert poll.voters[0] == 90 and poll.voters[-1] == right.sum()
    assert list(poll.voters) == sorted(poll.voters, reverse=True)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_who_is_dropped_never_votes_again_but_may_stay(seed):
    """Labels exchanged between landmarks: once those are silent, right ones gain agreement."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), 15)
    vectors = np.eye(32)[labels] + rng.normal(size=(90, 32)) / 6
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exchanged = rng.random(90) < 0.3
    labels[exchanged] = rng.integers(0, 6, exchanged.sum())
    given, vote = Labelled(image_list(labels), near(vectors, 60)), Vote(5, 2.0)
    voting = np.ones(90, bool)
    agreement = np.array(slow_agreement(given, voting, vote))
    least = slow_threshold(agreement)[1]
    rounds = [90]
    while not (agreement[voting] >= least).all():
        voting &= agreement >= least
        rounds.append(int(voting.sum()))
        agreement = np.array(slow_agreement(given, voting, vote))
    poll = votes.by_votes(given, vote, Rule())
    assert poll.least == pytest.approx(least, abs=1e-6)
    assert list(poll.voters) == rounds and len(rounds) > 1
    np.testing.assert_allclose(poll.agreement, agreement, atol=1e-6)
    np.testing.assert_array_equal(poll.kept.images, agreement >= least)
    assert (poll.kept.images & ~voting).any()


def test_the_least_agreement_may_be_given():
    given, _ = two_kinds(0)
    poll = votes.by_votes(given, Vote(least=0.9), Rule())
    assert poll.least == 0.9
    np.testing.assert_array_equal(poll.kept.images, poll.agreement >= 0.9)


@pytest.mark.parametrize("alone, kept", [("drop", False), ("keep", True)])
def test_an_image_without_neighbours_of_its_landmark_stays_if_wanted(alone, kept):
    given, right = two_kinds(0)
    labels = given.labels.copy()
    labels[0] = 99
    given = Labelled(image_list(labels), given.graph)
    poll = votes.by_votes(given, Vote(), Rule(alone=alone, min_images=1))
    assert poll.kept.images[0] == kept
    assert poll.kept.dropped["no neighbour of its landmark"][0] != kept
    np.testing.assert_array_equal(poll.kept.images[1:], right[1:])


def test_another_order_of_the_list_keeps_the_same_images():
    given, _ = two_kinds(1)
    order = np.random.default_rng(0).permutation(90)
    new = np.argsort(order)
    rows = new[given.graph.rows][order].astype(np.int32)
    graph = type(given.graph)(rows, given.graph.scores[order])
    moved = Labelled(image_list(given.labels[order]), graph)
    one, other = (votes.by_votes(each, Vote(), Rule()) for each in (given, moved))
    np.testing.assert_array_equal(other.kept.images, one.kept.images[order])


def test_more_votes_than_the_graph_has_are_refused():
    given = random_given(0, k=5)
    message = "6 neighbours vote, the graph has 5 of each"
    with pytest.raises(ValueError, match=re.escape(message)):
        votes.by_votes(given, Vote(6), Rule())


@pytest.mark.parametrize("values", [{"neighbours": 0}, {"power": -1}, {"least": -0.1}])
def test_a_vote_that_means_nothing_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Vote(**values)
