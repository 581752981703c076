import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from kit.rerank import whitening
from kit.rerank.whitening import Whitening, learn, learn_pca


def problem(seed=0, count=400, dim=12, classes=20):
    """Features that vary most where classes do not differ; labels, -1 for some."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, (count,), generator=random)
    centres = torch.randn(classes + 1, dim, generator=random)
    noise = torch.randn(count, dim, generator=random) * torch.linspace(3, 0.3, dim)
    rows = F.normalize(centres[labels] + noise + 0.5, dim=1)
    rows[5] = 0  # unreadable
    return rows, labels


def kept(rows, labels=None):
    there = rows.any(dim=1)
    if labels is None:
        return rows[there].double().numpy()
    there &= labels >= 0
    return rows[there].double().numpy(), labels[there].numpy()


def apply_by_hand(mean, projection, rows):
    out = []
    for row in rows.double().numpy():
        value = (row - mean) @ projection
        out.append(value / np.linalg.norm(value) if row.any() else 0 * value)
    return np.array(out)


def test_pca_whitening_makes_the_covariance_the_identity():
    rows, _ = problem()
    found = learn_pca(rows)
    readable = kept(rows)
    values = (
        readable - found.mean.double().numpy()
    ) @ found.projection.double().numpy()
    covariance = values.T @ values / len(values)
    np.testing.assert_allclose(covariance, np.eye(12), atol=1e-4)
    np.testing.assert_allclose(found.mean, readable.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("dim", [1, 5, 12])
def test_pca_whitening_keeps_the_largest_directions(dim):
    rows, _ = problem(1)
    readable = kept(rows)
    _, singular, directions = np.linalg.svd(readable - readable.mean(axis=0))
    deviations = singular / np.sqrt(len(readable))
    expected = apply_by_hand(
        readable.mean(axis=0), (directions.T / deviations)[:, :dim], rows
    )
    found = learn_pca(rows, dim).apply(rows)
    assert found.shape == (400, dim)
    expected = torch.tensor(expected @ expected.T).float()  # no matter the signs
    torch.testing.assert_close(found @ found.T, expected, atol=1e-4, rtol=0)


def within_by_hand(rows, labels):
    """All pairs of a class, each image counting once."""
    scatter = np.zeros((rows.shape[1], rows.shape[1]))
    for label in np.unique(labels):
        members = rows[labels == label]
        for a in members:
            for b in members:
                scatter += np.outer(a - b, a - b) / (2 * len(members))
    return scatter / len(rows)


@pytest.mark.parametrize("dim", [1, 5, 12])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_learned_whitening_matches_its_definition(dim, ridge):
    rows, labels = problem(2)
    readable, names = kept(rows, labels)
    within = within_by_hand(readable, names)
    within += ridge * np.trace(within) / 12 * np.eye(12)
    variances, axes = np.linalg.eigh(within)
    root = axes / np.sqrt(variances) @ axes.T  # the symmetric inverse root
    centred = readable - readable.mean(axis=0)
    found = learn(rows, labels, dim, ridge)
    projection = found.projection.double().numpy()
    np.testing.assert_allclose(
        projection.T @ within @ projection, np.eye(dim), atol=1e-4
    )
    np.testing.assert_allclose(found.mean, readable.mean(axis=0), atol=1e-6)
    total = centred.T @ centred / len(centred)
    best = np.linalg.eigh(root @ total @ root)[1][:, ::-1][:, :dim]
    expected = apply_by_hand(readable.mean(axis=0), root @ best, rows)
    values = found.apply(rows)
    torch.testing.assert_close(
        values @ values.T,
        torch.tensor(expected @ expected.T).float(),
        atol=1e-4,
        rtol=0,
    )


def test_total_and_between_scatter_have_the_same_best_directions():
    rows, labels = problem(3, classes=4)
    readable, names = kept(rows, labels)
    mean = readable.mean(axis=0)
    between = np.zeros((12, 12))
    for label in np.unique(names):
        shift = readable[names == label].mean(axis=0) - mean
        between += (names == label).mean() * np.outer(shift, shift)
    within = within_by_hand(readable, names)
    variances, axes = np.linalg.eigh(within)
    root = axes / np.sqrt(variances) @ axes.T
    best = np.linalg.eigh(root @ between @ root)[1][:, ::-1][:, :3]  # classes - 1
    expected = root @ best @ best.T @ root
    found = learn(rows, labels, 3, 0.0).projection.double().numpy()
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-3, rtol=1e-4)


def precision(rows, labels):
    """Share of nearest neighbours of the same class."""
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-1)
    there = labels >= 0
    return (labels[cosines.argmax(dim=1)] == labels)[there].float().mean()


def test_whitening_helps_where_classes_hide_behind_large_variations():
    rows, labels = problem(4, count=1200)
    new, names = problem(4, count=2400)
    new, names = new[1200:], names[1200:]
    learned = learn(rows, labels)
    assert precision(learned.apply(new), names) > precision(new, names) + 0.1


def test_whitened_features_have_unit_length_and_unreadable_ones_stay_zero():
    rows, labels = problem(5)
    for found in (learn_pca(rows, 7), learn(rows, labels, 7)):
        lengths = found.apply(rows).norm(dim=1)
        assert lengths[5] == 0
        readable = torch.arange(400) != 5
        torch.testing.assert_close(lengths[readable], torch.ones(399))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_do_not_matter(block, monkeypatch):
    rows, labels = problem(6)
    expected = learn_pca(rows).apply(rows), learn(rows, labels).apply(rows)
    monkeypatch.setattr(whitening, "BLOCK", block)
    found = learn_pca(rows).apply(rows), learn(rows, labels).apply(rows)
    for values, others in zip(found, expected, strict=True):
        torch.testing.assert_close(values, others, atol=1e-4, rtol=0)


def test_the_order_of_rows_and_the_numbers_of_classes_do_not_matter():
    rows, labels = problem(7)
    mixed = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    names = torch.cat([torch.randperm(20) * 1000, torch.tensor([-1])])
    found = learn(rows[mixed], names[labels[mixed]]).apply(rows)
    expected = learn(rows, labels).apply(rows)
    torch.testing.assert_close(
        found @ found.T, expected @ expected.T, atol=1e-4, rtol=0
    )


def test_images_without_a_label_or_a_class_of_one_teach_nothing_about_pairs():
    rows, labels = problem(8)
    more = torch.cat([rows, F.normalize(torch.randn(50, 12), dim=1)])
    unlabelled = torch.cat([labels, torch.full((50,), -1)])
    found, expected = learn(more, unlabelled), learn(rows, labels)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.projection.abs(), expected.projection.abs())


def test_a_whitening_survives_its_file():
    rows, labels = problem(9)
    found = learn(rows, labels, 5)
    read = Whitening.load(load(save(found.state())))
    assert torch.equal(read.apply(rows), found.apply(rows))
    with pytest.raises(ValueError, match="^a whitening has mean and projection, not a"):
        Whitening.load({"a": rows})


def test_the_result_may_be_written_where_the_caller_wants_it():
    rows, labels = problem(10)
    found, out = learn(rows, labels, 5), torch.empty(400, 5, dtype=torch.float16)
    assert found.apply(rows.half(), out) is out
    torch.testing.assert_close(out.float(), found.apply(rows), atol=2e-3, rtol=0)


def test_learning_leaves_its_inputs_as_they_were():
    rows, labels = problem(11)
    before = rows.clone(), labels.clone()
    learn(rows, labels, 5).apply(rows)
    learn_pca(rows, 5)
    assert torch.equal(rows, before[0]) and torch.equal(labels, before[1])


def test_what_cannot_be_learned_is_refused():
    rows, labels = problem()
    with pytest.raises(ValueError, match="^400 features, 399 labels$"):
        learn(rows, labels[:399])
    with pytest.raises(ValueError, match="^whitening to 13 of 12 dimensions; choose 1"):
        learn(rows, labels, 13)
    with pytest.raises(ValueError, match="^whitening to 0 of 12 dimensions"):
        learn_pca(rows, 0)
    with pytest.raises(ValueError, match="two features of one of them$"):
        learn(rows, torch.arange(400))
    with pytest.raises(ValueError, match="of 1 classes; a whitening needs"):
        learn(rows, torch.zeros(400).long())
    with pytest.raises(ValueError, match="^there is no feature to learn"):
        learn_pca(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="^8 features span only 7 directions; whiten"):
        learn_pca(rows[6:14])
    with pytest.raises(ValueError, match="^features have 11 dimensions, the whitening"):
        learn(rows, labels).apply(rows[:, :11])
