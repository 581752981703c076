from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from kit.data.orders import (
    by_class,
    by_quota,
    class_balanced,
    grouped,
    image_uniform,
    pxk,
    quota,
    shuffle,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def labels_of(*counts):
    """(N,) shuffled labels, as many of each as counted; every third number is a class."""
    labels = np.repeat(3 * np.arange(len(counts)), counts)
    return rng(99).permutation(labels)


@pytest.mark.parametrize("length", [1, 2, 50])
def test_shuffle_has_every_row_once(length):
    assert sorted(shuffle(length, rng()).tolist()) == list(range(length))


# Aspect groups


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("length", "batch", "groups"), [(60, 4, 5), (50, 7, 3)])
def test_batches_of_one_group_match_their_definition(length, batch, groups, seed):
    group = rng(7).integers(0, groups, length)
    permutation = rng(seed).permutation(length).tolist()
    filling, batches = {g: [] for g in range(groups)}, []
    for row in permutation:
        filling[group[row]].append(row)
        if len(filling[group[row]]) == batch:
            batches.append(filling[group[row]])
            filling[group[row]] = []
    batches.sort(key=lambda rows: permutation.index(rows[0]))
    assert 0 < len(batches) < length // batch
    found = grouped(group, batch, rng(seed)).reshape(-1, batch)
    assert found.tolist() == batches


# Classes


def test_the_rows_of_a_class_stand_together():
    labels = labels_of(3, 1, 7, 2)
    classes = by_class(labels)
    assert len(classes) == 4
    assert classes.counts.tolist() == [3, 1, 7, 2]
    for at, (start, count) in enumerate(
        zip(classes.starts, classes.counts, strict=True)
    ):
        rows = classes.rows[start : start + count]
        assert rows.tolist() == np.flatnonzero(labels == 3 * at).tolist()


def test_one_row_is_a_class():
    classes = by_class(np.array([0]))
    assert (classes.rows, classes.counts, classes.starts) == ([0], [1], [0])


@pytest.mark.parametrize("count", [4, 8, 10, 3])
def test_class_balanced_has_every_class_once_a_round(count):
    labels = labels_of(30, 1, 5, 2)
    rows = class_balanced(by_class(labels), count, rng())
    assert len(rows) == count
    for start in range(0, count, 4):
        seen = labels[rows[start : start + 4]].tolist()
        assert len(set(seen)) == len(seen)


def test_class_balanced_takes_every_row_of_a_class_as_often():
    labels = labels_of(5, 1, 20)
    rows = class_balanced(by_class(labels), 3 * 4000, rng())
    times = np.bincount(rows, minlength=len(labels))
    for label, size in ((0, 5), (3, 1), (6, 20)):
        share = times[labels == label] / 4000
        assert np.abs(share - 1 / size).max() < 0.03


def test_class_balanced_has_the_classes_in_a_random_order():
    labels = np.arange(20)
    orders = {tuple(class_balanced(by_class(labels), 20, rng(s))) for s in range(9)}
    assert len(orders) == 9


LISTS = [(30, 1, 5, 2, 9, 9), (4, 4, 4, 4), (1, 1, 1, 1, 1), (100, 3, 3, 3, 3), (9,)]


def uniform(counts, each, width, seed):
    """labels, (steps, width, each) rows"""
    labels = labels_of(*counts)
    rows = image_uniform(by_class(labels), each, width * each, rng(seed))
    return labels, rows.reshape(-1, width, each)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("each", "width"), [(1, 1), (1, 3), (4, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("counts", LISTS)
def test_image_uniform_has_every_row_about_once(counts, each, width, seed):
    groups = [-(-count // each) for count in counts]
    if sum(groups) < width:
        return
    labels, batches = uniform(counts, each, width, seed)
    assert len(batches) == sum(groups) // width
    assert (labels[batches] == labels[batches[:, :, :1]]).all()  # a group has one class
    times = np.bincount(batches.reshape(-1), minlength=len(labels))
    missing = (sum(groups) - len(batches) * width) * each
    assert missing < width * each
    for at, count in enumerate(counts):
        of_class = times[labels == 3 * at]
        most = -(-(groups[at] * each) // count)
        assert of_class.max() <= most
        assert of_class.sum() >= groups[at] * each - missing
    if not missing:  # only the fillers of a last group come again
        for at, number in enumerate(groups):
            of_class = times[labels == 3 * at]
            assert of_class.sum() == number * each
            assert of_class.max() - of_class.min() <= 1 and of_class.min() >= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", LISTS)
def test_image_uniform_spreads_a_class_over_the_batches(counts, seed):
    for each, width in ((1, 3), (2, 2), (3, 1)):
        groups = [-(-count // each) for count in counts]
        labels, batches = uniform(counts, each, width, seed)
        for batch in batches:
            for label, times in Counter(labels[batch[:, 0]].tolist()).items():
                assert times <= -(-groups[label // 3] // len(batches))


def test_image_uniform_is_random_in_groups_and_batches():
    places, partners, first = set(), set(), set()
    for seed in range(60):
        _, batches = uniform((4, 4, 4, 4), 2, 2, seed)
        steps = [set(batch.reshape(-1).tolist()) for batch in batches]
        places.add(next(at for at, rows in enumerate(steps) if 0 in rows))
        groups = batches.reshape(-1, 2).tolist()
        partners.add(next(sum(g) for g in groups if 0 in g))
        first.add(int(batches[0, 0, 0]))
    assert places == {0, 1, 2, 3}
    assert len(partners) == 3  # the other rows of its class
    assert len(first) > 10


def test_image_uniform_does_not_deal_a_class_out_in_a_row():
    labels = labels_of(20, *[1] * 60)  # its groups are in half of the batches
    runs = []
    for seed in range(20):
        rows = image_uniform(by_class(labels), 1, 2, rng(seed)).reshape(-1, 2)
        has = (labels[rows] == 0).any(axis=1)
        runs.append(1 + np.count_nonzero(np.diff(has.astype(int))))
    assert min(runs) > 8


def test_image_uniform_leaves_out_any_group_as_often():
    labels = labels_of(10, 1)  # 11 groups of one row, 5 batches of two
    classes = by_class(labels)
    times = np.zeros(11)
    for seed in range(3000):
        times[image_uniform(classes, 1, 2, rng(seed))] += 1
    assert times.max() <= 3000
    assert np.abs(1 - times / 3000 - 1 / 11).max() < 0.02


@pytest.mark.parametrize(("each", "width"), [(1, 1), (2, 3), (4, 2), (3, 5), (4, 6)])
def test_pxk_batches_have_distinct_classes_and_rows(each, width):
    counts = (30, 1, 5, 2, 9, 9)
    labels = labels_of(*counts)
    total = 40 * width * each
    rows = pxk(by_class(labels), each, width * each, total, rng())
    batches = rows.reshape(40, width, each)
    assert (labels[batches] == labels[batches[:, :, :1]]).all()
    for batch in batches:
        assert len(set(labels[batch[:, 0]].tolist())) == width
        for group in batch:
            if counts[labels[group[0]] // 3] >= each:
                assert len(set(group.tolist())) == each


@pytest.mark.parametrize("width", [2, 4, 5])
def test_pxk_has_every_class_as_often(width):
    labels = labels_of(30, 1, 5, 2, 9)
    rows = pxk(by_class(labels), 2, 2 * width, 1000 * 2 * width, rng())
    chosen = labels[rows.reshape(-1, 2)[:, 0]] // 3
    each = np.bincount(chosen) / len(chosen)
    assert np.abs(each - 1 / 5).max() < 0.02
    for start in range(0, len(chosen), 5 // width * width):  # a round
        part = chosen[start : start + 5 // width * width].tolist()
        assert len(set(part)) == len(part)


def test_pxk_takes_every_set_of_rows_as_often():
    labels = np.repeat([0, 1], [5, 2])
    rows = pxk(by_class(labels), 3, 3, 3 * 12_000, rng()).reshape(-1, 3)
    large = rows[labels[rows[:, 0]] == 0]
    sets = Counter(tuple(sorted(group)) for group in large.tolist())
    assert set(sets) == set(combinations(range(5), 3))
    shares = np.array(list(sets.values())) / len(large)
    assert np.abs(shares - 0.1).max() < 0.02
    small = Counter(map(tuple, rows[labels[rows[:, 0]] == 1].tolist()))
    assert len(small) == 8  # with replacement: two rows at three places
    shares = np.array(list(small.values())) / small.total()
    assert np.abs(shares - 1 / 8).max() < 0.02


# Quotas


def slow_quota(count, shares):
    total = sum(shares)
    exact = [count * share / total for share in shares]
    parts = [int(x) for x in exact]
    while sum(parts) < count:
        rest = [x - part for x, part in zip(exact, parts, strict=True)]
        parts[rest.index(max(rest))] += 1
    return parts


@pytest.mark.parametrize("count", [0, 1, 2, 5, 10, 40, 99, 100, 101, 4_825_830])
def test_a_quota_is_rounded_by_the_largest_remainder(count):
    for shares in (
        (50, 20, 15, 10, 2, 1, 1, 1),
        (66, 34),
        (1, 1, 1),
        (29, 71),
        (5, 0),
        (1, 1, 4),  # remainders that are equal but for the last bit
        (1, 1, 13),
    ):
        exact = slow_quota(count, [Fraction(share, 100) for share in shares])
        found = quota(count, np.array(shares) / 100)
        assert found.tolist() == exact
        assert found.sum() == count


def test_quotas_by_hand():
    shares = np.array([0.5, 0.2, 0.15, 0.1, 0.02, 0.01, 0.01, 0.01])
    assert quota(100, shares).tolist() == [50, 20, 15, 10, 2, 1, 1, 1]
    assert quota(10, shares).tolist() == [5, 2, 2, 1, 0, 0, 0, 0]
    assert [quota(n, np.array([0.66, 0.34])).tolist() for n in (50, 20, 1, 2)] == [
        [33, 17],
        [13, 7],
        [1, 0],
        [1, 1],
    ]
    assert quota(7, np.array([0.3, 0.1])).tolist() == [5, 2]


def test_buckets_give_as_many_rows_as_counted_any_of_them_as_often():
    buckets = [np.array([3, 8, 9, 20]), np.array([5]), np.array([], int), np.arange(2)]
    rows = by_quota(buckets, [4000, 70, 0, 1000], rng())
    times = np.bincount(rows)
    assert times[5] == 70 and times.sum() == 5070
    assert times[buckets[0]].sum() == 4000 and times[:2].sum() == 1000
    assert 0 < np.abs(times[buckets[0]] - 1000).max() < 120
    assert np.abs(times[:2] - 500).max() < 80


def test_rows_of_a_quota_come_in_a_random_order():
    rows = by_quota([np.zeros(1, int), np.ones(1, int)], [500, 500], rng())
    assert 180 < rows[:500].sum() < 320
    assert not np.array_equal(rows[:50], rows[50:100])
