"""Each step of recognition against a slow transcription, on random data with many ties."""

import math

import numpy as np
import pytest
import torch

from kit.rerank import recognition
from kit.rerank.recognition import Recognised
from kit.rerank.sort_insert import WORTHS

Q, K, M = 60, 3, 12


@pytest.fixture
def near():
    """Cosines (Q, M) on a coarse grid, best first, with empty places; labels, some of nobody."""
    random = np.random.default_rng(0)
    cosines = -np.sort(-random.integers(-4, 9, (Q, M)) / 8, axis=1)
    labels = random.integers(-1, 4, (Q, M))
    for row, count in ((0, 0), (1, 1), (2, 2), (3, 5)):  # so many references there are
        cosines[row, count:] = -np.inf
        labels[row, count:] = -1
    labels[4] = 2  # all of one landmark
    labels[5] = -1
    return torch.tensor(cosines, dtype=torch.float32), torch.tensor(labels)


@pytest.fixture
def found():
    """Predictions on a coarse grid; every seventh query has none."""
    random = np.random.default_rng(1)
    labels = random.integers(0, 5, Q)
    sure = random.integers(-3, 8, Q) / 4
    labels[::7], sure[::7] = -1, -np.inf
    return Recognised(torch.tensor(labels), torch.tensor(sure))


def slow_vote(worths, labels):
    """One query: (label, sum), of equal sums that of the nearer reference."""
    sums = {}
    for worth, label in zip(worths, labels, strict=True):
        if label >= 0 and worth > -math.inf:
            sums[label] = sums.get(label, 0.0) + worth
    if not sums:
        return -1, -math.inf
    best = max(sums.values())
    return next((label, s) for label, s in sums.items() if s == best)


# The vote


@pytest.mark.parametrize("kind", WORTHS)
def test_a_vote_is_the_sum_of_worths_and_inliers_by_landmark(near, kind):
    cosines, labels = near[0][:, :K], near[1][:, :K]
    inliers = torch.tensor(np.random.default_rng(2).integers(0, 120, (Q, K)))
    worths = WORTHS[kind](cosines.double())
    given = worths + recognition.confirmed(inliers, weight=0.5, most=70, least=20)
    found = recognition.vote(given, labels)
    for q in range(Q):
        said = []
        for cosine, count in zip(cosines[q].tolist(), inliers[q].tolist(), strict=True):
            squared = 2 - 2 * cosine
            plain = {
                "cosine_mean": cosine / K,
                "cosine_sum": cosine,
                "distance_sum": 1 - squared,
            }[kind]
            said.append(plain + 0.5 * (min(70, count) if count >= 20 else 0) / 70)
        label, total = slow_vote(said, labels[q].tolist())
        assert found.labels[q] == label
        assert found.confidences[q].item() == pytest.approx(total, abs=1e-12)


def test_inliers_count_up_to_the_most_and_from_the_least():
    inliers = torch.tensor([[0, 7, 8, 69, 70, 71, 500]])
    added = recognition.confirmed(inliers, weight=2.0, most=70, least=8)
    wanted = [0, 0, 16 / 70, 138 / 70, 2, 2, 2]
    torch.testing.assert_close(added, torch.tensor([wanted], dtype=torch.float64))


def test_of_equal_sums_the_nearer_reference_wins():
    worths = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).double()
    labels = torch.tensor([[7, 3, 3], [1, 9, 1]])
    found = recognition.vote(worths, labels)
    assert found.labels.tolist() == [7, 1]
    assert found.confidences.tolist() == [0.5, 0.5]


def test_with_nobody_to_vote_there_is_no_prediction(near):
    worths = near[0].double()
    found = recognition.vote(worths, near[1])
    assert found.labels[0] == found.labels[5] == -1
    assert torch.isneginf(found.confidences[[0, 5]]).all()
    assert (found.labels[[1, 2, 3, 4]] >= -1).all()
    one = recognition.vote(worths[4:5, :1], near[1][4:5, :1])
    assert one.labels.tolist() == [2]


def test_a_place_without_a_reference_does_not_vote():
    worths = torch.tensor([[0.5, -math.inf, -math.inf]]).double()
    found = recognition.vote(worths, torch.tensor([[3, 4, 4]]))
    assert found.labels.tolist() == [3] and found.confidences.tolist() == [0.5]


# Images without a landmark


@pytest.mark.parametrize("count", [1, 5, 100])
def test_nearness_is_the_mean_of_the_nearest_but_itself(near, count):
    scores = near[0]
    own = torch.tensor(np.random.default_rng(3).random((Q, M)) < 0.1)
    found = recognition.nearness(scores, count, own)
    for q in range(Q):
        kept = [
            s
            for s, mine in zip(scores[q].tolist(), own[q].tolist(), strict=True)
            if not mine and s > -math.inf
        ][:count]
        assert found[q].item() == pytest.approx(np.mean(kept) if kept else 0)
    plain = recognition.nearness(scores, count)
    nobody = torch.zeros_like(own)
    assert torch.equal(plain, recognition.nearness(scores, count, nobody))


def test_what_is_lowered_keeps_its_landmark(found):
    amounts = torch.linspace(-1, 1, Q).float()
    less = recognition.lowered(found, amounts)
    assert torch.equal(less.labels, found.labels)
    wanted = found.confidences - amounts.double()
    assert torch.equal(less.confidences, wanted)


# Comparable confidences


@pytest.mark.parametrize("votes", [1, 3, M, M + 5])
def test_the_background_is_the_mean_of_other_landmarks_far_references(near, votes):
    cosines, labels = near
    predicted = recognition.vote(cosines[:, :K].double(), labels[:, :K]).labels
    found = recognition.background(cosines, labels, predicted, votes)
    for q in range(Q):
        far = [
            (cosine, label)
            for cosine, label in zip(
                cosines[q].tolist(), labels[q].tolist(), strict=True
            )
            if cosine > -math.inf
        ][votes:]
        others = [cosine for cosine, label in far if label != predicted[q]]
        wanted = np.mean(others) if others else far[-1][0] if far else 0.0
        assert found[q].item() == pytest.approx(wanted)


def test_probabilities_keep_the_order_and_lie_between_0_and_1(found):
    sure = recognition.probability(found.confidences, 3.0, -1.0)
    there = found.labels >= 0
    assert torch.isneginf(sure[~there]).all()
    assert ((sure[there] > 0) & (sure[there] < 1)).all()
    before, after = found.confidences[there].tolist(), sure[there].tolist()
    assert after == [1 / (1 + math.exp(-(3 * x - 1))) for x in before] or np.allclose(
        after, [1 / (1 + math.exp(-(3 * x - 1))) for x in before]
    )
    assert len(set(before)) == len(set(after))
    order = np.argsort(before, kind="stable")
    assert np.array_equal(order, np.argsort(after, kind="stable"))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (100.0, -5.0), (0.01, 3.0)])
def test_no_other_curve_is_more_likely(scale, shift):
    random = np.random.default_rng(4)
    x = random.normal(size=400)
    correct = random.random(400) < 1 / (1 + np.exp(-(2 * x + 0.5)))
    given = torch.tensor(x * scale + shift)
    slope, offset = recognition.fit(given, torch.tensor(correct))
    right, wrong = correct.sum(), (~correct).sum()
    target = np.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2))

    def loss(a, b):
        p = 1 / (1 + np.exp(-(a * given.numpy() + b)))
        return -np.sum(target * np.log(p) + (1 - target) * np.log(1 - p))

    best = loss(slope, offset)
    for a in (0.98, 1.02):
        assert loss(slope * a, offset) > best
        # the offset that keeps the middle, so that only the slope is tried
        middle = given.numpy().mean()
        assert loss(slope * a, offset + slope * (1 - a) * middle) > best
    for b in (-0.02, 0.02):
        assert loss(slope, offset + b) > best
    assert slope * scale == pytest.approx(2, abs=0.6)


@pytest.mark.parametrize(
    "correct", [[True] * 4, [False] * 4, [True, True, False, False], []]
)
def test_where_no_rising_curve_fits_there_is_none(correct):
    given = torch.arange(float(len(correct)))
    assert recognition.fit(given, torch.tensor(correct, dtype=torch.bool)) is None


def test_equal_confidences_have_no_rising_curve():
    correct = torch.tensor([True, False, True])
    assert recognition.fit(torch.ones(3), correct) is None


def test_separated_predictions_still_have_a_finite_curve():
    x = torch.tensor([0.0, 0.1, 5.0, 5.1])
    slope, offset = recognition.fit(x, torch.tensor([False, False, True, True]))
    assert 0 < slope < 100 and math.isfinite(offset)


def test_a_confidence_that_is_not_finite_fits_no_curve():
    with pytest.raises(ValueError, match="finite confidences"):
        recognition.fit(torch.tensor([0.0, math.inf]), torch.tensor([True, False]))


# The whole batch


@pytest.mark.parametrize("most", [1, 8, 12, 100])
def test_a_landmark_predicted_too_often_is_demoted_by_its_count(found, most):
    counts = recognition.banned(found.labels, most)
    marked = recognition.demoted(found, counts)
    labels = found.labels.tolist()
    for q, label in enumerate(labels):
        often = labels.count(label)
        if label >= 0 and often > most:
            assert counts[q] == often and marked.confidences[q] == -often
        else:
            assert counts[q] == 0
            assert marked.confidences[q] == found.confidences[q]
    assert torch.equal(marked.labels, found.labels)


def test_a_landmark_is_banned_by_its_whole_name():
    labels = torch.tensor([5] * 31 + [15] * 30 + [115] * 3 + [51])
    counts = recognition.banned(labels, 30)
    assert counts.tolist() == [31] * 31 + [0] * 34


def test_nobody_is_banned_for_having_no_prediction():
    assert not recognition.banned(torch.full((40,), -1), 30).any()


@pytest.mark.parametrize("within", [0.25, 0.5, 1.0])
def test_a_ban_spreads_to_queries_that_look_alike(found, within):
    counts = recognition.banned(found.labels, 10)
    assert counts.any() and not counts.all()
    marked = recognition.demoted(found, counts)
    cosines = torch.tensor(np.random.default_rng(5).integers(0, 9, Q) / 8)
    wide = recognition.spread(marked, counts, cosines, within)
    for q in range(Q):
        squared = 2 - 2 * cosines[q].item()
        hit = squared < within and counts[q] == 0 and found.labels[q] >= 0
        wanted = 0.0 if hit else marked.confidences[q].item()
        assert wide.confidences[q].item() == wanted
    assert torch.equal(wide.labels, found.labels)


def test_places_of_several_models_are_summed_by_landmark(found):
    random = np.random.default_rng(6)
    other = Recognised(
        torch.tensor(np.where(random.random(Q) < 0.5, found.labels.numpy(), 9)),
        torch.tensor(random.integers(0, 6, Q) / 8),
    )
    weights = [1.0, 0.5]
    fused = recognition.by_rank([found, other], weights)
    for q in range(Q):
        sums = {}
        for part, weight in zip((found, other), weights, strict=True):
            made = part.confidences[part.labels >= 0].tolist()
            mine, label = part.confidences[q].item(), part.labels[q].item()
            if label < 0:
                continue
            less = sum(c < mine for c in made) + 0.5 * sum(c == mine for c in made)
            sums[label] = sums.get(label, 0) + weight * less / len(made) / 1.5
        if not sums:
            assert fused.labels[q] == -1
            continue
        best = max(sums.values())
        assert sums[fused.labels[q].item()] == pytest.approx(best)
        assert fused.confidences[q].item() == pytest.approx(best)


def test_of_two_models_with_equal_places_the_first_is_believed():
    one = Recognised(torch.tensor([1, 1]), torch.tensor([0.1, 0.9]).double())
    two = Recognised(torch.tensor([2, 2]), torch.tensor([10.0, 90.0]).double())
    assert recognition.by_rank([one, two], [1.0, 1.0]).labels.tolist() == [1, 1]
    assert recognition.by_rank([one, two], [0.5, 1.0]).labels.tolist() == [2, 2]


def test_a_models_scale_does_not_matter_for_its_places(found):
    sure = torch.where(found.labels >= 0, found.confidences * 7 - 100, -torch.inf)
    other = Recognised(found.labels, sure)
    one, two = (recognition.by_rank([it], [0.3]) for it in (found, other))
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.confidences, two.confidences)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -0.5]])
def test_weights_that_are_none_are_refused(found, weights):
    with pytest.raises(ValueError, match="2 models with weights"):
        recognition.by_rank([found, found], weights)


# All


def test_the_order_of_queries_changes_nothing_but_the_order(near, found):
    order = torch.tensor(np.random.default_rng(7).permutation(Q))
    cosines, labels = near

    def steps(cosines, labels, other):
        made = recognition.vote(2 * cosines[:, :K].double() - 1, labels[:, :K])
        far = recognition.background(cosines, labels, made.labels, K)
        made = recognition.lowered(made, far)
        fused = recognition.by_rank([made, other], [1.0, 0.5])
        counts = recognition.banned(fused.labels, 12)
        made = recognition.demoted(fused, counts)
        return recognition.spread(made, counts, cosines[:, 0], 0.5)

    before = steps(cosines, labels, found)
    moved = Recognised(found.labels[order], found.confidences[order])
    after = steps(cosines[order], labels[order], moved)
    assert torch.equal(after.labels, before.labels[order])
    assert torch.equal(after.confidences, before.confidences[order])


def test_nothing_that_is_given_is_changed(near, found):
    given = [*near, *found]
    copies = [each.clone() for each in given]
    made = recognition.vote(near[0].double(), near[1])
    recognition.background(*near, made.labels, K)
    recognition.nearness(near[0], 3)
    counts = recognition.banned(found.labels, 5)
    recognition.spread(recognition.demoted(found, counts), counts, near[0][:, 0], 1.0)
    recognition.by_rank([found, found], [1.0, 1.0])
    recognition.probability(found.confidences, 1.0, 0.0)
    for each, copy in zip(given, copies, strict=True):
        assert torch.equal(each, copy)
