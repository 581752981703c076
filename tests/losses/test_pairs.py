import math

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers

from kit.losses import pairs


@pytest.fixture
def batch():
    """Ten embeddings of four classes; one image is alone in its class, two are equal."""
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    x[5] = x[4]
    return x, labels


def distance(a, b):
    """Between the directions of two vectors."""
    a, b = [v / math.hypot(*v) for v in (a, b)]
    return math.hypot(*(a - b))


def slow_triplet(x, labels, margin):
    rows, terms = x.double().numpy(), []
    for i, own in enumerate(labels):
        same = [
            distance(rows[i], rows[j])
            for j, label in enumerate(labels)
            if label == own and j != i
        ]
        other = [
            distance(rows[i], rows[j]) for j, label in enumerate(labels) if label != own
        ]
        if same and other:
            gap = max(same) - min(other)
            hinge = max(gap + margin, 0)
            terms.append(hinge if margin else math.log(1 + math.exp(gap)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.5])
def test_triplet_takes_the_farthest_and_the_nearest(batch, margin):
    x, labels = batch
    expected = slow_triplet(x, labels.tolist(), margin)
    assert pairs.triplet(x, labels, margin).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_triplet_is_that_of_pytorch_metric_learning(batch, margin):
    x, labels = batch
    mined = miners.BatchHardMiner(distance=distances.LpDistance())(x, labels)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = losses.TripletMarginLoss(
        margin,
        smooth_loss=not margin,
        distance=distances.LpDistance(),
        reducer=reducers.MeanReducer(),
    )(theirs, labels, mined)
    expected.backward()
    loss = pairs.triplet(ours, labels, margin)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def slow_contrastive(x, labels, margin):
    rows, pull, push = x.double().numpy(), [], []
    for i, a in enumerate(labels):
        for j, b in enumerate(labels):
            if i != j and a == b:
                pull.append(distance(rows[i], rows[j]) ** 2 / 2)
            elif i != j:
                push.append(max(margin - distance(rows[i], rows[j]), 0) ** 2 / 2)
    lacking = [value for value in push if value > 0]
    return sum(pull) / len(pull) + sum(lacking) / max(len(lacking), 1)


@pytest.mark.parametrize("margin", [0.1, 0.7, 1.2])
def test_contrastive_pulls_a_class_together_and_pushes_others_away(batch, margin):
    x, labels = batch
    expected = slow_contrastive(x, labels.tolist(), margin)
    own = pairs.contrastive(x, labels, margin).item()
    assert own == pytest.approx(expected, rel=1e-5)


def test_contrastive_squares_the_terms_of_pytorch_metric_learning(batch):
    x, labels = batch
    x[5, 0] += 0.3  # the distance of equal images has no slope
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    terms = losses.ContrastiveLoss(
        0, 0.7, distance=distances.LpDistance(), reducer=reducers.DoNothingReducer()
    )(theirs, labels)
    pull, push = (terms[k]["losses"].square() / 2 for k in ("pos_loss", "neg_loss"))
    expected = pull.mean() + push.sum() / (push > 0).sum()
    expected.backward()
    loss = pairs.contrastive(ours, labels, 0.7)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function", [pairs.triplet, pairs.contrastive])
def test_lengths_order_and_extreme_batches_are_no_matter(batch, function):
    x, labels = batch
    loss = function(x, labels)
    factors = torch.linspace(0.1, 10, 10)[:, None]
    torch.testing.assert_close(function(x * factors, labels), loss)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(function(x[order], labels[order]), loss)
    for alike, given in (
        (torch.ones(4, 3), torch.tensor([0, 0, 1, 1])),  # all in one place
        (torch.randn(4, 3), torch.arange(4)),  # no pair of a class
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)),  # no other class
        (torch.randn(1, 3), torch.zeros(1, dtype=torch.long)),
    ):
        leaf = alike.clone().requires_grad_()
        value = function(leaf, given)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()


def test_without_both_kinds_of_pairs_there_is_no_triplet(batch):
    x, _ = batch
    assert pairs.triplet(x, torch.arange(10)) == 0
    assert pairs.triplet(x, torch.zeros(10, dtype=torch.long)) == 0


def test_centre_distances_are_half_squares_to_the_own_mean(batch):
    x, labels = batch
    means = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    values = pairs.centre_distances(leaf, means, labels.where(labels != 2, -1))
    values.sum().backward()
    for i, label in enumerate(labels.tolist()):
        away = (x[i] - means[label]).tolist()
        expected = sum(v * v for v in away) / 2 if label != 2 else 0
        assert values[i].item() == pytest.approx(expected, rel=1e-5)
        assert leaf.grad[i].tolist() == pytest.approx(away if label != 2 else [0] * 4)


def test_means_move_by_their_images_over_one_more_than_these(batch):
    x, labels = batch
    means = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = means.clone()
    for label in (0, 1, 3):  # another rank has 2, none has 4
        own = x[labels == label]
        expected[label] -= 0.5 * sum(means[label] - row for row in own) / (1 + len(own))
    pairs.move_means(means, x, labels.where(labels != 2, -1))
    torch.testing.assert_close(means, expected)


def test_means_come_to_rest_at_the_means_of_their_images(batch):
    x, labels = batch
    means = torch.zeros(4, 4)
    for _ in range(100):
        pairs.move_means(means, x, labels)
    for label in range(4):
        torch.testing.assert_close(means[label], x[labels == label].mean(0))
