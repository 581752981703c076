import math

import numpy as np
import pytest
import torch

from kit.rerank import sort_insert as module
from kit.rerank.sort_insert import (
    WORTHS,
    Predictions,
    cosine_mean,
    cosine_sum,
    distance_sum,
    predict,
    sort_insert,
)


def predict_by_hand(scores, labels, kind):
    """One image after another: label -> sum of what its votes are worth."""
    found = []
    for cosines, names in zip(scores.double().numpy(), labels.tolist(), strict=True):
        sums = {}
        for cosine, name in zip(cosines, names, strict=True):
            worth = {
                "cosine_mean": cosine / len(names),
                "cosine_sum": cosine,
                "distance_sum": 1 - (2 - 2 * cosine),
            }[kind]
            if name >= 0:
                sums[name] = sums.get(name, 0.0) + worth
        best = max(sums, key=sums.get) if sums else -1  # the first of equal ones
        found.append((best, sums.get(best, -math.inf)))
    return found


@pytest.fixture
def near():
    """Cosines (300, 3), descending, and labels (300, 3), many equal and some absent."""
    random = torch.Generator().manual_seed(1)
    scores = torch.randint(-4, 16, (300, 3), generator=random) / 16
    labels = torch.randint(-1, 4, (300, 3), generator=random)
    labels[7] = -1
    return scores.sort(dim=1, descending=True).values, labels


@pytest.mark.parametrize("kind", WORTHS)
def test_predictions_match_their_definition(near, kind):
    found = predict(*near, WORTHS[kind])
    expected = predict_by_hand(*near, kind)
    assert found.labels.tolist() == [label for label, _ in expected]
    sums = torch.tensor([score for _, score in expected], dtype=torch.float32)
    torch.testing.assert_close(found.scores, sums)
    assert -1 in found.labels


def test_what_a_vote_is_worth():  # worked by hand
    scores, labels = torch.tensor([[0.75, 0.5, 0.25]]), torch.tensor([[3, 8, 8]])
    for worth, label, score in (
        (cosine_mean, 3, 0.25),
        (cosine_sum, 3, 0.75),
        (distance_sum, 3, 0.5),
    ):
        found = predict(scores, labels, worth)
        assert (found.labels.item(), found.scores.item()) == (label, score)


def test_of_equal_votes_the_nearer_reference_decides():
    found = predict(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[9, 2, 2]]))
    assert found.labels.tolist() == [9]


def test_predictions_do_not_depend_on_the_block(near, monkeypatch):
    whole = predict(*near)
    monkeypatch.setattr(module, "VOTERS", 7)
    parts = predict(*near)
    assert torch.equal(parts.labels, whole.labels)
    assert torch.equal(parts.scores, whole.scores)


def sort_insert_by_hand(rows, query, index, k, above, at_least):
    """The three steps, one query after another; the lists of rows."""
    lists = []
    for at, label, score in zip(
        rows.tolist(), query.labels.tolist(), query.scores.tolist(), strict=True
    ):
        at = [row for row in at if row >= 0]
        if label < 0 or score < at_least:
            lists.append(at[:k])
            continue
        positives = [row for row in at if index.labels[row] == label]
        negatives = [row for row in at if index.labels[row] != label]
        others = [
            row
            for row in range(len(index.labels))
            if index.labels[row] == label
            and row not in at
            and score + index.scores[row].item() > above
        ]
        others.sort(key=lambda row: (-index.scores[row].item(), row))
        lists.append((positives + others + negatives)[:k])
    return lists


def problem(seed=0, queries=80, index=400, m=20, labels=25):
    """A ranking (Q, m) with ties, and predictions; scores in sixteenths, so that sums tie too."""
    random = torch.Generator().manual_seed(seed)

    def predictions(count):
        names = torch.randint(-1, labels, (count,), generator=random)
        scores = torch.randint(0, 17, (count,), generator=random) / 16
        return Predictions(names, scores)  # whatever the score, -1 is no label

    rows = torch.stack(
        [torch.randperm(index, generator=random)[:m] for _ in range(queries)]
    )
    scores = torch.randint(0, 33, (queries, m), generator=random) / 32
    scores = scores.sort(dim=1, descending=True).values
    lengths = torch.randint(m // 2, 2 * m, (queries, 1), generator=random)
    absent = torch.arange(m) >= lengths
    scores, rows = scores.masked_fill(absent, -torch.inf), rows.masked_fill(absent, -1)
    return scores, rows, predictions(queries), predictions(index)


def as_lists(rows):
    for row in rows.tolist():
        if -1 in row:  # absent places come last
            assert set(row[row.index(-1) :]) == {-1}
    return [[row for row in at if row >= 0] for at in rows.tolist()]


@pytest.mark.parametrize("k", [None, 1, 7, 60, 500])
@pytest.mark.parametrize("above", [-math.inf, 0.5, 1.0, math.inf])
@pytest.mark.parametrize("at_least", [-math.inf, 0.5])
def test_sort_insert_matches_its_definition(k, above, at_least):
    scores, rows, query, index = problem()
    expected = sort_insert_by_hand(rows, query, index, k or 20, above, at_least)
    found_scores, found = sort_insert(scores, rows, query, index, k, above, at_least)
    assert as_lists(found) == expected
    assert found.shape == found_scores.shape == (80, k or 20)
    assert ((found >= 0) == torch.isfinite(found_scores)).all()


def test_a_list_worked_by_hand():
    index = Predictions(
        torch.tensor([5, 7, 5, 5, 7, 5]), torch.tensor([0.3, 0.9, 0.5, 0.2, 0.9, 0.8])
    )
    query = Predictions(torch.tensor([5]), torch.tensor([0.25]))
    scores, rows = torch.tensor([[0.9, 0.8, 0.6]]), torch.tensor([[1, 0, 4]])
    # 5 (.8) and 2 (.5) are over .6 with the query, 3 (.2) is not
    found_scores, found = sort_insert(scores, rows, query, index, k=5)
    assert found.tolist() == [[0, 5, 2, 1, 4]]
    # .8 of the one retrieved; .8 and .5 inserted; .9 and .6 begin where .5 ends
    expected = torch.tensor([[0.8, 0.8, 0.5, 0.5, 0.2]])
    torch.testing.assert_close(found_scores, expected, atol=1e-6, rtol=0)


def test_scores_descend_strictly_and_sorting_by_them_changes_nothing():
    scores, rows, query, index = problem(3)
    found_scores, found = sort_insert(scores, rows, query, index, 40)
    changed = (found[:, :20] != rows).any(dim=1)
    assert changed.any() and not changed.all()
    for values, at in zip(found_scores[changed], found[changed], strict=True):
        values = values[at >= 0]
        assert (values[1:] < values[:-1]).all()


def test_a_list_that_nothing_changes_keeps_its_scores():
    scores, rows, query, index = problem(4)
    left = Predictions(query.labels, query.scores.clamp(max=0.25))
    found_scores, found = sort_insert(scores, rows, left, index, at_least=0.5)
    assert torch.equal(found, rows) and torch.equal(found_scores, scores)
    found_scores, found = sort_insert(scores, rows, query, index, above=math.inf)
    same = (found == rows).all(dim=1)
    assert same.any() and torch.equal(found_scores[same], scores[same])


def test_the_retrieved_images_of_the_landmark_keep_their_scores():
    scores, rows, query, index = problem(5)
    scores += torch.linspace(0.01, 0, 20)  # no ties that would have to be split
    found_scores, found = sort_insert(scores, rows, query, index, 200)
    for number, label in enumerate(query.labels.tolist()):
        old = dict(zip(rows[number].tolist(), scores[number].tolist(), strict=True))
        new = zip(found[number].tolist(), found_scores[number].tolist(), strict=True)
        for row, score in new:
            if row in old and row >= 0:
                if label >= 0 and index.labels[row] == label:
                    assert score == old[row]
                else:
                    assert score <= old[row] + 1e-6


def test_the_threshold_itself_is_not_over_it():
    index = Predictions(torch.tensor([1, 1]), torch.tensor([0.25, 0.5]))
    query = Predictions(torch.tensor([1]), torch.tensor([0.5]))
    scores, rows = torch.tensor([[0.5]]), torch.tensor([[1]])
    found = sort_insert(scores, rows, query, index, 2, above=0.75)[1]
    assert found.tolist() == [[1, -1]]
    found = sort_insert(scores, rows, query, index, 2, above=0.74)[1]
    assert found.tolist() == [[1, 0]]
    found = sort_insert(scores, rows, query, index, 2, above=0, at_least=0.5)[1]
    assert found.tolist() == [[1, 0]]
    found = sort_insert(scores, rows, query, index, 2, above=0, at_least=0.51)[1]
    assert found.tolist() == [[1, -1]]


def test_the_block_of_queries_does_not_matter(monkeypatch):
    whole = sort_insert(*problem(6))
    monkeypatch.setattr(module, "QUERIES", 3)
    assert all(map(torch.equal, sort_insert(*problem(6)), whole))


def test_one_query_is_what_it_is_among_others():
    scores, rows, query, index = problem(7)
    whole = sort_insert(scores, rows, query, index)
    one = Predictions(query.labels[5:6], query.scores[5:6])
    alone = sort_insert(scores[5:6], rows[5:6], one, index)
    assert all(torch.equal(a[0], b[5]) for a, b in zip(alone, whole, strict=True))


def test_permuting_the_index_permutes_the_result():
    scores, rows, query, index = problem(8)
    index = Predictions(index.labels, index.scores + torch.arange(400) * 1e-4)
    new = torch.randperm(400, generator=torch.Generator().manual_seed(0))  # new -> old
    place = torch.empty_like(new)
    place[new] = torch.arange(400)
    moved = Predictions(index.labels[new], index.scores[new])
    there = torch.where(rows < 0, rows, place[rows.clamp(min=0)])
    expected = sort_insert(scores, rows, query, index, 50)
    found = sort_insert(scores, there, query, moved, 50)
    assert torch.equal(found[0], expected[0])
    back = torch.where(found[1] < 0, found[1], new[found[1].clamp(min=0)])
    assert torch.equal(back, expected[1])


def test_sort_insert_leaves_its_inputs_as_they_were():
    scores, rows, query, index = problem(9)
    inputs = [scores, rows, query.labels, query.scores, index.labels, index.scores]
    before = [tensor.clone() for tensor in inputs]
    sort_insert(scores, rows, query, index, 50, at_least=0.5)
    assert all(map(torch.equal, inputs, before))


def test_numbers_that_do_not_fit_are_refused():
    scores, rows, query, index = problem()
    with pytest.raises(ValueError, match="^80 predictions for 79 queries$"):
        sort_insert(scores[:79], rows[:79], query, index)
    with pytest.raises(ValueError, match="of an index of 10 rows"):
        few = Predictions(index.labels[:10], index.scores[:10])
        sort_insert(scores, rows, query, few)
    with pytest.raises(ValueError, match="^k is 0; it must be at least 1$"):
        sort_insert(scores, rows, query, index, 0)


def test_an_unreadable_image_with_a_label_is_refused():
    index = Predictions(torch.tensor([1]), torch.tensor([0.5]))
    query = Predictions(torch.tensor([1]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="one that could not be read must have label"):
        sort_insert(torch.full((1, 1), -torch.inf), torch.tensor([[0]]), query, index)


def test_labels_as_large_as_landmark_ids_are_no_problem():
    scores, rows, query, index = problem(10)
    names = torch.cat([torch.arange(25).flip(0) * 10**9, torch.tensor([-1])])
    renamed = (Predictions(names[p.labels], p.scores) for p in (query, index))
    expected = sort_insert(scores, rows, query, index)
    assert all(map(torch.equal, sort_insert(scores, rows, *renamed), expected))


def test_predictions_are_arrays_of_the_images():
    found = predict(torch.zeros(1, 3), torch.full((1, 3), -1))
    assert found.labels.tolist() == [-1] and np.isneginf(found.scores.item())
