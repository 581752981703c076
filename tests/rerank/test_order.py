import numpy as np
import pytest
import torch

from kit.rerank import order


@pytest.fixture
def ranking():
    """Scores (50, 12) with many ties and rows (50, 12), some places absent."""
    random = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(40, generator=random)[:12] for _ in range(50)])
    scores = torch.randint(-3, 4, (50, 12), generator=random) / 4
    absent = torch.rand(50, 12, generator=random) < 0.2
    return scores.masked_fill(absent, -torch.inf), rows.masked_fill(absent, -1)


def test_a_sorted_ranking_is_best_first_with_ties_to_the_lower_row(ranking):
    scores, rows = order.sort(*ranking)
    for query in range(len(rows)):
        places = zip(
            ranking[0][query].tolist(), ranking[1][query].tolist(), strict=True
        )
        expected = sorted(places, key=lambda place: (-place[0], place[1]))
        assert scores[query].tolist() == [score for score, _ in expected]
        assert rows[query].tolist() == [row for _, row in expected]


def test_absent_places_come_after_rows_of_no_score():
    scores, rows = torch.full((1, 3), -torch.inf), torch.tensor([[-1, 5, 2]])
    assert order.sort(scores, rows)[1].tolist() == [[2, 5, -1]]


@pytest.mark.parametrize("k", [1, 5, 12, 20])
def test_top_is_the_start_of_a_stable_sort(ranking, k):
    values, columns = order.top(ranking[0], k)
    expected = ranking[0].sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(columns, expected.indices[:, :k])


def stepped_by_hand(scores):
    out = scores.copy()
    for row in out:
        for place in range(1, len(row)):
            if np.isfinite(row[place]):
                below = np.nextafter(row[place - 1], np.float32(-np.inf))
                row[place] = min(row[place], below)
    return out


def test_stepped_scores_are_lowered_one_float_at_a_time(ranking):
    scores = order.sort(*ranking)[0]
    scores[:, 3] += 0.25  # out of order
    expected = stepped_by_hand(scores.numpy())
    np.testing.assert_array_equal(order.stepped(scores).numpy(), expected)


def test_stepping_goes_through_zero_and_leaves_what_descends():
    scores = torch.tensor([[0.0, 0.0, -0.0, -1.0, -torch.inf], [3, 2, 1, 0, -1]])
    stepped = order.stepped(scores)
    least = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    expected = torch.tensor([0, -least, -2 * least, -1, -torch.inf])
    assert torch.equal(stepped[0], expected)
    assert torch.equal(stepped[1], scores[1])


@pytest.mark.parametrize("lists", [1, 2, 4])
def test_totals_match_a_dictionary(lists):
    random = np.random.default_rng(lists)
    rows = [
        np.stack([random.permutation(20)[:8] for _ in range(30)]) for _ in range(lists)
    ]
    rows[0][:, 3] = -1
    scores = [random.integers(-2, 3, (30, 8)) / 4 for _ in rows]
    base = random.integers(0, 3, (30, 1)) / 8
    found, at = order.total(
        [torch.tensor(each) for each in scores],
        [torch.tensor(each) for each in rows],
        10,
        torch.tensor(base),
    )
    for query in range(30):
        sums = {}
        for values, named in zip(scores, rows, strict=True):
            for value, row in zip(values[query], named[query], strict=True):
                if row >= 0:
                    sums[row] = sums.get(row, base[query, 0]) + value
        best = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:10]
        assert at[query].tolist() == [r for r, _ in best] + [-1] * (10 - len(best))
        assert found[query, : len(best)].tolist() == [value for _, value in best]
        assert torch.isneginf(found[query, len(best) :]).all()


def test_sums_are_taken_in_the_order_of_the_lists():
    random = torch.Generator().manual_seed(0)
    rows = [torch.randperm(500, generator=random)[None] for _ in range(3)]
    scores = [torch.full((1, 500), value) for value in (1e20, -1e20, 1.0)]
    found, at = order.total(scores, rows, 500)  # in any other order 1 is lost
    assert torch.equal(at, torch.arange(500)[None])
    assert (found == 1).all()


def test_a_ranking_is_cut_or_filled_to_its_places(ranking):
    scores, rows = order.fit(*ranking, 5)
    assert torch.equal(scores, ranking[0][:, :5])
    assert torch.equal(rows, ranking[1][:, :5])
    scores, rows = order.fit(*ranking, 15)
    assert torch.equal(rows[:, :12], ranking[1])
    assert (rows[:, 12:] == -1).all() and torch.isneginf(scores[:, 12:]).all()


@pytest.mark.parametrize(
    ("scores", "rows", "index", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4).long(), 9, "of one shape"),
        (torch.zeros(2, 3).double(), torch.zeros(2, 3).long(), 9, "must be float32"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 9, "must be float32 and integers"),
        (torch.zeros(0, 3), torch.zeros(0, 3).long(), 9, "of 0 queries has no places"),
        (torch.full((1, 1), torch.nan), torch.zeros(1, 1).long(), 9, "NaN"),
        (torch.zeros(1, 1), torch.full((1, 1), 9), 9, "row 9 of an index of 9 rows"),
        (torch.zeros(1, 1), torch.full((1, 1), -1), 0, "the index has no rows"),
    ],
)
def test_what_is_no_ranking_is_refused(scores, rows, index, words):
    with pytest.raises((ValueError, TypeError), match=words):
        order.check(scores, rows, index)


def test_a_ranking_of_no_places_cannot_be_asked_for(ranking):
    with pytest.raises(ValueError, match="^k is 0; it must be at least 1$"):
        order.fit(*ranking, 0)
